//! Models: architectures as configuration and tensor-name tables over one decoder.

mod ceiling;
mod decoder;
mod dummy;
mod load;
mod plan;
pub mod quantize;
mod rope;

pub use ceiling::{GPUS, Gpu, Work};
pub use decoder::{Batch, DecoderLayer, Limits, LogitsStats, Model};
#[cfg(lowbit_cuda)]
pub(crate) use dummy::fill_random;
pub use dummy::{DUMMY_MODELS, DummyScheme, dummy_config, dummy_linear};
pub(crate) use load::SUB_NORMS;
pub use load::{LayerTable, expected_tensors, layer_tables, linear_names};
pub use plan::{MemoryPlan, Target, attention_shape};
pub use rope::rope_table;

//! Models: one decoder, what the architectures differ in told by a specification, and who computes with it.

mod batch;
mod ceiling;
mod decode_graphs;
mod dummy;
mod forward;
mod layer;
mod model;
mod plan;
pub mod quantize;
pub(crate) mod reference;
mod role;
mod rope;
mod runner;
mod spec;
mod workspace;

pub use batch::{Batch, Limits};
pub use ceiling::{GPUS, Gpu, Work};
#[cfg(lowbit_cuda)]
pub(crate) use dummy::fill_random;
pub use dummy::{DUMMY_MODELS, DummyScheme, dummy_config, dummy_linear};
pub use layer::{Attention, DecoderLayer, DenseMlp, Mlp, Projections, QkNorm};
pub use model::Model;
pub use plan::MemoryPlan;
pub use role::{LinearRole, Slot, SplitAxis};
pub use rope::rope_table;
pub use runner::{Drawn, HiddenStates, Logits, LogitsStats, ModelRunner};
pub use spec::{LayerSpec, LinearSpec, ModelSpec, TensorSpec, attention_shape, expected_tensors, linear_names};

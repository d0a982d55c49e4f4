//! Layers: weights on a device, and how each drives the op table.

mod gate;
mod kv_cache;
mod linear;
mod norm;

pub use kv_cache::KvCache;
pub use linear::Linear;
pub use norm::RmsNorm;

//! Parts of models beside the forward pass.

mod dynamic_rope;
mod plan;
mod rope;

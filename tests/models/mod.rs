//! Parts of models beside the forward pass.

mod plan;
mod rope;

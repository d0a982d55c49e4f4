//! Parts of models that need no checkpoint.

mod rope;

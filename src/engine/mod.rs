//! engine

pub mod sampling;

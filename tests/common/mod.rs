//! What test modules share.

pub mod random;
pub mod tolerance;

//! What test modules share.

#[allow(dead_code)] // used by the tests of several areas
pub mod fixtures;
pub mod random;
pub mod tolerance;

//! Linear layers: families of kernels behind one interface, [`family::GemmFamily`].

mod any;
mod dense;
mod families;
mod family;
mod layout;
mod linear;
mod measuring;
mod pack;
#[cfg(test)]
mod pack_tests;
mod packed;
mod planning;
mod plans;
mod recipe;
mod repack;
pub(super) mod table;
mod tensor_map;
mod tile;
mod tuned;
mod w4a16;
mod w4a8;
mod w8a8;
mod weight;

pub(crate) use linear::{linear, linear_codes};
pub(crate) use planning::packed_bytes;
pub(crate) use weight::CudaPacked;
pub(crate) use weight::{check_epilogue, pack};

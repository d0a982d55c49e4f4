//! W4A16, W8A16, FP8 and codebooks of sixteen values (NF4, FP4): codes made 16-bit floats in registers.

pub(super) mod blocks;
pub(super) mod codes;
mod limits;
pub(super) mod scale_parts;
pub(super) mod sm80;
pub(super) mod sm90;
mod warp_split_k;

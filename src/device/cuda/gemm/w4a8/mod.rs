//! W4A8: weights of up to 4 bits, or 8-bit ones in groups, on int8 tensor cores; ternary weights and groups with factors too.

pub(super) mod blocks;
mod limits;
mod persistent;
pub(super) mod sm80;
pub(super) mod sm90;
mod split_k;
mod warp_split_k;

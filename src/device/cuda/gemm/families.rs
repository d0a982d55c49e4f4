//! The list of families: adding one adds its name here.

pub(super) use super::any::Any;
pub(super) use super::dense::Dense;
pub(super) use super::w4a8::sm80::W4A8Sm80;
pub(super) use super::w4a8::sm90::W4A8Sm90;
pub(super) use super::w4a16::sm80::W4A16Sm80;
pub(super) use super::w4a16::sm90::W4A16Sm90;
pub(super) use super::w8a8::sm80::W8A8Sm80;
pub(super) use super::w8a8::sm90::W8A8Sm90;

/// The families, the fastest first: runs `$f` with the layout that the first of them has which accepts a weight.
macro_rules! first_family {
    ($weight:expr, $target:expr, $family:ident => $f:expr) => {
        first_family!(@ $weight, $target, $family => $f;
            W4A16Sm90, W4A8Sm90, W8A8Sm90, W4A16Sm80, W4A8Sm80, W8A8Sm80, Dense; Any)
    };
    (@ $weight:expr, $target:expr, $family:ident => $f:expr; $($type:ident),*; $last:ident) => {
        $(if let Some($family) = $crate::device::cuda::gemm::families::$type::accept($weight, $target) { $f } else)* {
            let $family = $crate::device::cuda::gemm::families::$last::of($weight);
            $f
        }
    };
}
pub(super) use first_family;

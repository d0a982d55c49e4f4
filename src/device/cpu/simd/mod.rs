//! Vectors of 16 lanes. A fast path is written once, over the [`Simd`] operations, and compiled for every [`Level`]
//! by [`Level::run`]. A value of a `Simd` type is the proof that the machine has its instructions.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
mod portable;

pub(super) use math::{exp, largest, load_part, store_part, sum_of_products};

use half::{bf16, f16};

/// A set of vector instructions, from narrow to wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the compiler makes of plain Rust.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (2013).
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and VNNI (2019).
    Avx512,
}

impl Level {
    /// Every level this machine has, narrow to wide.
    pub fn available() -> Vec<Level> {
        let mut levels = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if avx2::Avx2::detect().is_some() {
                levels.push(Level::Avx2);
            }
            if avx512::Avx512::detect().is_some() {
                levels.push(Level::Avx512);
            }
        }
        levels
    }

    /// The widest level of this machine.
    pub fn detect() -> Level {
        Level::available().pop().unwrap_or(Level::Portable)
    }

    /// Lower-case name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512-vnni",
        }
    }

    /// Runs `kernel` compiled for this level; for the portable one where the machine lacks it.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        match self {
            Level::Avx512 => {
                if let Some(simd) = avx512::Avx512::detect() {
                    return simd.run(kernel);
                }
            }
            Level::Avx2 => {
                if let Some(simd) = avx2::Avx2::detect() {
                    return simd.run(kernel);
                }
            }
            Level::Portable => {}
        }
        kernel.run(portable::Portable)
    }
}

/// A piece of work written over [`Simd`]. `run` must be `#[inline(always)]`, and so must what it calls: that is how it
/// comes to be compiled with a level's instructions. A closure cannot be, so vectors are worked on in loops, not in
/// `map` or `fold`: where the compiler leaves one of these out of line, every operation in it is a call.
pub(super) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Operations on vectors of 16 f32 (`F`) and of 16 i32 or 64 bytes (`I`). Integers wrap.
pub(super) trait Simd: Copy {
    type F: Copy;
    type I: Copy;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; 16]) -> Self::F;
    fn load_f16(self, x: &[f16; 16]) -> Self::F;
    fn load_bf16(self, x: &[bf16; 16]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; 16]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b + c`, rounded once or twice, whichever is faster.
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.fma(a, b, c)
    }
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Sum of the lanes.
    fn sum(self, x: Self::F) -> f32;
    /// Largest lane.
    fn max_lane(self, x: Self::F) -> f32;
    /// Rounded half to even; lanes must be below 2^31.
    fn to_int(self, x: Self::F) -> Self::I;
    /// Rounded half to even.
    fn to_float(self, x: Self::I) -> Self::F;
    /// `2^x` for -126 to 127.
    fn power_of_two(self, x: Self::I) -> Self::F;

    fn splat_int(self, x: i32) -> Self::I;
    fn load_int(self, x: &[i32; 16]) -> Self::I;
    fn load_bytes(self, x: &[u8; 64]) -> Self::I;
    /// Values times 2^-8 of 64 FP8 `e4m3fn` codes, which must not be NaN: lane `o` of vector `c` is that of byte
    /// `32 * (c / 2) + 2 * o + c % 2`.
    ///
    /// Moved to where an f16 has sign, exponent and mantissa, a code is that f16, subnormal ones too: their biases of 7
    /// and 15 make the factor.
    fn load_e4m3(self, x: &[u8; 64]) -> [Self::F; 4];
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I;
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// Each lane times 256.
    fn shift_left_8(self, x: Self::I) -> Self::I;
    /// Each lane divided by 256, rounded down.
    fn shift_right_8(self, x: Self::I) -> Self::I;
    /// Each lane as an unsigned integer divided by 16, rounded down.
    fn shift_right_4(self, x: Self::I) -> Self::I;
    /// In each lane, the lane of `table` that the low four bits of `index` name; the other bits do not matter.
    fn lookup(self, table: Self::F, index: Self::I) -> Self::F;
    fn store_int(self, x: Self::I, to: &mut [i32; 16]);
    /// The low byte of each lane.
    fn store_low_bytes(self, x: Self::I, to: &mut [i8; 16]);
    /// The low four bits of each byte.
    fn low_nibbles(self, x: Self::I) -> Self::I;
    /// The high four bits of each byte.
    fn high_nibbles(self, x: Self::I) -> Self::I;
    /// In each lane, `sum + a0 * b0 + a1 * b1 + a2 * b2 + a3 * b3`, exactly: `a` unsigned bytes, `b` signed ones.
    fn dot4(self, sum: Self::I, a: Self::I, b: Self::I) -> Self::I;
}

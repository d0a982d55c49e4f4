//! [`Simd`] in plain Rust, for machines without the wider levels.

use std::array::from_fn;
use std::sync::LazyLock;

use half::{bf16, f16};

use super::Simd;
use crate::quant::encoding::e4m3;

#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Values of `e4m3fn` codes, times 2^-8.
static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| from_fn(|code| e4m3(code as u8) / 256.0));

impl Simd for Portable {
    type F = [f32; 16];
    type I = [i32; 16];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; 16]
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; 16]) -> Self::F {
        x.map(f16::to_f32)
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 16]) -> Self::F {
        x.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; 16]) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Without an instruction for it, `f32::mul_add` is a slow call.
        if cfg!(target_arch = "aarch64") { self.fma(a, b, c) } else { self.add(self.mul(a, b), c) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let halves =
            |x: &[f32], width: usize| -> [f32; 16] { from_fn(|i| if i < width { x[i] + x[i + width] } else { 0.0 }) };
        halves(&halves(&halves(&halves(&x, 8), 4), 2), 1)[0]
    }
    #[inline(always)]
    fn max_lane(self, x: Self::F) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn to_int(self, x: Self::F) -> Self::I {
        x.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn power_of_two(self, x: Self::I) -> Self::F {
        x.map(|x| f32::from_bits(((x + 127) as u32) << 23))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        [x; 16]
    }
    #[inline(always)]
    fn load_int(self, x: &[i32; 16]) -> Self::I {
        *x
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::I {
        from_fn(|i| i32::from_le_bytes([x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]]))
    }
    #[inline(always)]
    fn load_e4m3(self, x: &[u8; 64]) -> [Self::F; 4] {
        from_fn(|c| from_fn(|o| E4M3[usize::from(x[32 * (c / 2) + 2 * o + c % 2])]))
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| a[i].wrapping_mul(b[i]))
    }
    #[inline(always)]
    fn shift_left_8(self, x: Self::I) -> Self::I {
        x.map(|x| x << 8)
    }
    #[inline(always)]
    fn shift_right_8(self, x: Self::I) -> Self::I {
        x.map(|x| x >> 8)
    }
    #[inline(always)]
    fn shift_right_4(self, x: Self::I) -> Self::I {
        x.map(|x| (x as u32 >> 4) as i32)
    }
    #[inline(always)]
    fn lookup(self, table: Self::F, index: Self::I) -> Self::F {
        index.map(|i| table[(i & 15) as usize])
    }
    #[inline(always)]
    fn store_int(self, x: Self::I, to: &mut [i32; 16]) {
        *to = x;
    }
    #[inline(always)]
    fn store_low_bytes(self, x: Self::I, to: &mut [i8; 16]) {
        *to = x.map(|x| x as i8);
    }
    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        x.map(|x| x & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        x.map(|x| (x >> 4) & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn dot4(self, sum: Self::I, a: Self::I, b: Self::I) -> Self::I {
        dot4(&sum, &a, &b)
    }
}

/// Not inlined: unrolled many times into the kernels it would take minutes to compile.
#[inline(never)]
fn dot4(sum: &[i32; 16], a: &[i32; 16], b: &[i32; 16]) -> [i32; 16] {
    from_fn(|i| {
        let (a, b) = (a[i].to_le_bytes(), b[i].to_le_bytes());
        (0..4).fold(sum[i], |sum, j| sum.wrapping_add(i32::from(a[j]) * i32::from(b[j] as i8)))
    })
}

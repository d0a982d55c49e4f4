//! [`Simd`] on AVX2, FMA and F16C: two registers a vector.
#![allow(unsafe_code)] // intrinsics: each is called under the proof that a value of `Avx2` is

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Proof that this machine has the instructions: only [`Avx2::detect`] makes one.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }

    /// Runs `kernel` with everything inlined into it compiled for these instructions.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run<K: Kernel>(kernel: K, simd: Avx2) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that the machine has these features.
        unsafe { run(kernel, self) }
    }
}

/// One intrinsic, or an expression of several.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: a value of `Avx2` proves the instructions; memory operands are references to whole vectors, of which
        // each register takes half.
        unsafe { $e }
    };
}

/// Both registers of a vector, each by the same intrinsics; see [`Kernel`] for what a closure would cost.
macro_rules! halves {
    (|$i:ident| $e:expr) => {
        intrinsic!([
            {
                let $i = 0_usize;
                $e
            },
            {
                let $i = 1_usize;
                $e
            }
        ])
    };
}

impl Avx2 {
    /// 16 f16 as f32.
    #[inline(always)]
    fn widen(self, x: __m256i) -> [__m256; 2] {
        intrinsic!([_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x))])
    }
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        intrinsic!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        intrinsic!([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))])
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; 16]) -> Self::F {
        intrinsic!([
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(8).cast()))
        ])
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 16]) -> Self::F {
        halves!(|i| {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(8 * i).cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; 16]) {
        intrinsic!({
            _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), x[1]);
        })
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        intrinsic!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        intrinsic!({
            let eight = _mm256_add_ps(x[0], x[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn max_lane(self, x: Self::F) -> f32 {
        intrinsic!({
            let eight = _mm256_max_ps(x[0], x[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn to_int(self, x: Self::F) -> Self::I {
        intrinsic!([_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1])])
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        intrinsic!([_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])])
    }
    #[inline(always)]
    fn power_of_two(self, x: Self::I) -> Self::F {
        halves!(|i| {
            let biased = _mm256_add_epi32(x[i], _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        })
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        intrinsic!([_mm256_set1_epi32(x); 2])
    }
    #[inline(always)]
    fn load_int(self, x: &[i32; 16]) -> Self::I {
        intrinsic!([_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())])
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::I {
        intrinsic!([_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(32).cast())])
    }
    #[inline(always)]
    fn load_e4m3(self, x: &[u8; 64]) -> [Self::F; 4] {
        let pairs = self.load_bytes(x);
        // As 16-bit words: sign, a copy of it to be cleared, exponent and mantissa.
        let bits = intrinsic!(_mm256_set1_epi16(0xbf80_u16 as i16));
        let even = halves!(|i| _mm256_and_si256(_mm256_srai_epi16::<1>(_mm256_slli_epi16::<8>(pairs[i])), bits));
        let odd = halves!(|i| _mm256_and_si256(_mm256_srai_epi16::<1>(pairs[i]), bits));
        [self.widen(even[0]), self.widen(odd[0]), self.widen(even[1]), self.widen(odd[1])]
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!([_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!([_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!([_mm256_mullo_epi32(a[0], b[0]), _mm256_mullo_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn shift_left_8(self, x: Self::I) -> Self::I {
        intrinsic!([_mm256_slli_epi32::<8>(x[0]), _mm256_slli_epi32::<8>(x[1])])
    }
    #[inline(always)]
    fn shift_right_8(self, x: Self::I) -> Self::I {
        intrinsic!([_mm256_srai_epi32::<8>(x[0]), _mm256_srai_epi32::<8>(x[1])])
    }
    #[inline(always)]
    fn shift_right_4(self, x: Self::I) -> Self::I {
        halves!(|i| _mm256_srli_epi32::<4>(x[i]))
    }
    #[inline(always)]
    fn lookup(self, table: Self::F, index: Self::I) -> Self::F {
        // Both halves of the table by the low three bits; the fourth, as a sign, chooses between them.
        halves!(|i| {
            let low = _mm256_permutevar8x32_ps(table[0], index[i]);
            let high = _mm256_permutevar8x32_ps(table[1], index[i]);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index[i])))
        })
    }
    #[inline(always)]
    fn store_int(self, x: Self::I, to: &mut [i32; 16]) {
        intrinsic!({
            _mm256_storeu_si256(to.as_mut_ptr().cast(), x[0]);
            _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), x[1]);
        })
    }
    #[inline(always)]
    fn store_low_bytes(self, x: Self::I, to: &mut [i8; 16]) {
        let low = halves!(|i| _mm256_and_si256(x[i], _mm256_set1_epi32(255)));
        intrinsic!({
            // Packs work within halves of 128 bits: bytes come out as lanes 0-3, 8-11, 0-3, 8-11 | 4-7, 12-15, ...
            let words = _mm256_packus_epi32(low[0], low[1]);
            let bytes = _mm256_packus_epi16(words, words);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
            let sorted = _mm256_permutevar8x32_epi32(bytes, order);
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_castsi256_si128(sorted));
        })
    }
    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        halves!(|i| _mm256_and_si256(x[i], _mm256_set1_epi8(15)))
    }
    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        halves!(|i| _mm256_and_si256(_mm256_srli_epi16::<4>(x[i]), _mm256_set1_epi8(15)))
    }
    #[inline(always)]
    fn dot4(self, sum: Self::I, a: Self::I, b: Self::I) -> Self::I {
        halves!(|i| {
            // A pair of products passes 16 bits: even and odd bytes are widened apart, then multiplied in pairs.
            let even = _mm256_and_si256(a[i], _mm256_set1_epi16(255));
            let odd = _mm256_srli_epi16::<8>(a[i]);
            let b_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b[i]));
            let b_odd = _mm256_srai_epi16::<8>(b[i]);
            let sum = _mm256_add_epi32(sum[i], _mm256_madd_epi16(even, b_even));
            _mm256_add_epi32(sum, _mm256_madd_epi16(odd, b_odd))
        })
    }
}

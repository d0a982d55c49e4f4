//! [`Simd`] on AVX-512 with VNNI: one register a vector.
#![allow(unsafe_code)] // intrinsics: each is called under the proof that a value of `Avx512` is

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Proof that this machine has the instructions: only [`Avx512::detect`] makes one.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("fma");
        found.then_some(Avx512(()))
    }

    /// Runs `kernel` with everything inlined into it compiled for these instructions.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
        fn run<K: Kernel>(kernel: K, simd: Avx512) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that the machine has these features.
        unsafe { run(kernel, self) }
    }
}

/// One intrinsic, or an expression of several.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: a value of `Avx512` proves the instructions; memory operands are references to whole vectors.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        intrinsic!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> Self::F {
        intrinsic!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; 16]) -> Self::F {
        intrinsic!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 16]) -> Self::F {
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
            x.as_ptr().cast()
        )))))
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; 16]) {
        intrinsic!(_mm512_storeu_ps(to.as_mut_ptr(), x))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(x))
    }
    #[inline(always)]
    fn max_lane(self, x: Self::F) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(x))
    }
    #[inline(always)]
    fn to_int(self, x: Self::F) -> Self::I {
        intrinsic!(_mm512_cvtps_epi32(x))
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::F {
        intrinsic!(_mm512_cvtepi32_ps(x))
    }
    #[inline(always)]
    fn power_of_two(self, x: Self::I) -> Self::F {
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(x, _mm512_set1_epi32(127)))))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        intrinsic!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn load_int(self, x: &[i32; 16]) -> Self::I {
        intrinsic!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::I {
        intrinsic!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_e4m3(self, x: &[u8; 64]) -> [Self::F; 4] {
        intrinsic!({
            // As 16-bit words: sign, a copy of it to be cleared, exponent and mantissa.
            let bits = _mm512_set1_epi16(0xbf80_u16 as i16);
            let pairs = self.load_bytes(x);
            let even = _mm512_and_si512(_mm512_srai_epi16::<1>(_mm512_slli_epi16::<8>(pairs)), bits);
            let odd = _mm512_and_si512(_mm512_srai_epi16::<1>(pairs), bits);
            [
                _mm512_cvtph_ps(_mm512_castsi512_si256(even)),
                _mm512_cvtph_ps(_mm512_castsi512_si256(odd)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(even)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(odd)),
            ]
        })
    }
    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn mul_int(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn shift_left_8(self, x: Self::I) -> Self::I {
        intrinsic!(_mm512_slli_epi32::<8>(x))
    }
    #[inline(always)]
    fn shift_right_8(self, x: Self::I) -> Self::I {
        intrinsic!(_mm512_srai_epi32::<8>(x))
    }
    #[inline(always)]
    fn shift_right_4(self, x: Self::I) -> Self::I {
        intrinsic!(_mm512_srli_epi32::<4>(x))
    }
    #[inline(always)]
    fn lookup(self, table: Self::F, index: Self::I) -> Self::F {
        intrinsic!(_mm512_permutexvar_ps(index, table))
    }
    #[inline(always)]
    fn store_int(self, x: Self::I, to: &mut [i32; 16]) {
        intrinsic!(_mm512_storeu_si512(to.as_mut_ptr().cast(), x))
    }
    #[inline(always)]
    fn store_low_bytes(self, x: Self::I, to: &mut [i8; 16]) {
        intrinsic!(_mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)))
    }
    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        intrinsic!(_mm512_and_si512(x, _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        intrinsic!(_mm512_and_si512(_mm512_srli_epi16::<4>(x), _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn dot4(self, sum: Self::I, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_dpbusd_epi32(sum, a, b))
    }
}

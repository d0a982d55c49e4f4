//! FP8 codes in a 32-bit word, as kernels that make 16-bit floats of them find them (docs/formats.md, "Kernel layouts").

use crate::device::cuda::embedded::abi;
use crate::dtype::DType;

/// The codes of four columns, those that a kernel makes two pairs of, in one word. Those of the first two lie in its low and its high half where a float of
/// `dtype` (`F16` or `BF16`) has its sign, the lower four bits of its exponent and the first three of its mantissa, so that a mask
/// makes numbers of them; those of the others lie in the bits between.
pub(crate) fn arrange(codes: [u8; 4], dtype: DType) -> u32 {
    let [first, second, third, fourth] = codes.map(u32::from);
    let half = |a: u32, b: u32| match dtype {
        DType::F16 => (a & 0x80) << 8 | (a & 0x7f) << 7 | (b & 0x80) << 7 | b & 0x7f,
        _ => (a & 0x80) << 8 | (a & 0x7f) << 4 | (b & 0x80) << 4 | (b & 0x70) << 8 | b & 0x0f,
    };
    half(second, fourth) << 16 | half(first, third)
}

/// Every word of `bytes`, four codes each, arranged.
pub(crate) fn arrange_all(mut bytes: Vec<u8>, dtype: DType) -> Vec<u8> {
    for word in bytes.chunks_exact_mut(4) {
        let codes = [word[0], word[1], word[2], word[3]];
        word.copy_from_slice(&arrange(codes, dtype).to_le_bytes());
    }
    bytes
}

/// What `kernels/ops/repack.cu` calls the arrangement.
pub(crate) fn arrangement(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => abi::LOWBIT_E4M3_F16,
        _ => abi::LOWBIT_E4M3_BF16,
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::quant::encoding::e4m3;

    /// The worked words of docs/formats.md.
    #[test]
    fn worked_words() {
        let codes = [0x38, 0xb8, 0x01, 0x7e];
        assert_eq!(arrange(codes, DType::F16), 0x9c7e_1c01);
        assert_eq!(arrange(codes, DType::BF16), 0xf38e_0381);
    }

    /// What the kernels do with a word: masks for the first pair, shifts and masks for the second, a power of two for both.
    #[test]
    fn masks_make_numbers_of_every_code() {
        for code in (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f) {
            let codes = [code, !code & 0x7e, code ^ 0x55 & 0x54, code.rotate_left(3) & 0xfe];
            let value = |code: u8| if code & 0x7f == 0x7f { None } else { Some(e4m3(code)) };
            let w = arrange(codes, DType::F16);
            let pairs = [w & 0xbf80_bf80, (w << 7 & 0x3f80_3f80) | (w << 1 & 0x8000_8000)];
            for (i, code) in codes.into_iter().enumerate() {
                let Some(value) = value(code) else { continue };
                let bits = (pairs[i / 2] >> (16 * (i % 2))) as u16;
                assert_eq!(f16::from_bits(bits).to_f32() * 256.0, value, "f16, code {code:#x} in place {i}");
            }
            let w = arrange(codes, DType::BF16);
            let pairs = [w & 0x87f0_87f0, (w << 4 & 0x80f0_80f0) | (w >> 4 & 0x0700_0700)];
            for (i, code) in codes.into_iter().enumerate() {
                let Some(value) = value(code) else { continue };
                let bits = (pairs[i / 2] >> (16 * (i % 2))) as u16;
                assert_eq!(bf16::from_bits(bits).to_f32() * 2f32.powi(120), value, "bf16, code {code:#x} in place {i}");
            }
        }
    }
}

//! What the codes of a weight stand for: evenly spaced integers, a table of sixteen values, or 8-bit floats.

use rayon::prelude::*;

use super::codebook::Codebook;
use super::codes::{Codes, Storage};

/// What the codes of a weight stand for, before zero point and scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Encoding {
    /// Code `q` is the number `q`, of 2 to 8 bits.
    Affine,
    /// Sixteen values by 4-bit code; zero points are 0.
    Codebook(Codebook),
    /// Each code is a number in FP8 `e4m3fn` ([`e4m3`]); 8 bits, zero points are 0.
    E4m3,
}

impl Encoding {
    /// The table, where there is one.
    pub fn codebook(&self) -> Option<&Codebook> {
        match self {
            Encoding::Codebook(codebook) => Some(codebook),
            Encoding::Affine | Encoding::E4m3 => None,
        }
    }

    /// True where codes are the numbers themselves.
    pub fn is_affine(&self) -> bool {
        *self == Encoding::Affine
    }

    /// The name of such a weight in a scheme: `w4`, `nf4`, `fp8`.
    pub(super) fn name(&self, bits: u8) -> String {
        match self {
            Encoding::Affine => format!("w{bits}"),
            Encoding::Codebook(codebook) => codebook.name().to_owned(),
            Encoding::E4m3 => "fp8".to_owned(),
        }
    }

    /// What each code of `bits` stands for: `2^bits` values.
    pub fn values(&self, bits: u8) -> Vec<f32> {
        match self {
            Encoding::Affine => (0..1u16 << bits).map(f32::from).collect(),
            Encoding::Codebook(codebook) => codebook.0.to_vec(),
            Encoding::E4m3 => (0..=u8::MAX).map(e4m3).collect(),
        }
    }
}

/// The value of an FP8 `e4m3fn` code (Micikevicius et al. 2022, arXiv 2209.05433): a sign, four bits of exponent with a
/// bias of 7, three of mantissa. Exponent 0 is subnormal, `m * 2^-9`; there are no infinities, the largest value is 448,
/// and 0x7f and 0xff are NaN.
pub fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (code >> 3 & 15, f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        // A power of two from its bits: biased by 127 where the code has 7.
        _ => f32::from_bits((u32::from(exponent) + 120) << 23) * (1.0 + mantissa / 8.0),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}

/// Where the first NaN is among `e4m3fn` codes, as they lie in a file.
pub fn find_e4m3_nan(codes: &[u8]) -> Option<usize> {
    // Whole pieces first, by an operation that takes many bytes at once.
    const PIECE: usize = 1 << 16;
    let has_nan = |piece: &[u8]| piece.iter().fold(false, |found, &code| found | (code & 0x7f == 0x7f));
    let piece = codes.par_chunks(PIECE).position_first(has_nan)?;
    let start = piece * PIECE;
    codes[start..].iter().position(|code| code & 0x7f == 0x7f).map(|at| start + at)
}

/// True where one of the codes, taken as `e4m3fn`, is NaN. Those that a file has one to a byte are not copied.
pub(crate) fn has_e4m3_nan(codes: &Codes) -> bool {
    let parts = codes.parts(0);
    match parts.iter().all(|part| part.storage == Storage::Bytes { offset: 0 }) {
        true => parts.iter().any(|part| find_e4m3_nan(part.bytes).is_some()),
        false => find_e4m3_nan(codes).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against `half`: the bits of a code, moved to where an f16 has them, are the value times 2^-8.
    #[test]
    fn every_code_has_its_value() {
        for code in 0..=u8::MAX {
            let value = e4m3(code);
            if code & 0x7f == 0x7f {
                assert!(value.is_nan(), "{code:#x}");
                continue;
            }
            let bits = u16::from(code & 0x80) << 8 | u16::from(code & 0x7f) << 7;
            assert_eq!(value.to_bits(), (half::f16::from_bits(bits).to_f32() * 256.0).to_bits(), "{code:#x}");
        }
        let some = [(0x01, 2f32.powi(-9)), (0x07, 0.013_671_875), (0x08, 0.015_625), (0x38, 1.0), (0x7e, 448.0)];
        for (code, value) in some {
            assert_eq!((e4m3(code), e4m3(code | 0x80)), (value, -value));
        }
        assert_eq!(e4m3(0x80).to_bits(), (-0f32).to_bits());
    }

    #[test]
    fn the_first_nan_is_found() {
        let mut codes = vec![0x7eu8; 200_000];
        assert_eq!(find_e4m3_nan(&codes), None);
        codes[199_999] = 0x7f;
        assert_eq!(find_e4m3_nan(&codes), Some(199_999));
        codes[65_536] = 0xff;
        assert_eq!(find_e4m3_nan(&codes), Some(65_536));
        assert!(has_e4m3_nan(&codes.into()) && !has_e4m3_nan(&vec![0xfe; 3].into()));
    }
}

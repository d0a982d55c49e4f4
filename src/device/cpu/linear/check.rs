//! Checks of canonical weights on their way into the CPU's kernel layouts.

use rayon::prelude::*;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::encoding::has_e4m3_nan;
use crate::quant::{ActQuant, Codebook, Encoding, LinearWeight, QuantWeight, Weight};

/// Fails unless the parts of a weight agree with each other and with what the kernels rely on: lengths, code range,
/// a permutation as order, finite scales, and int8 sums that fit 32 bits.
pub(crate) fn check(weight: &LinearWeight) -> Result<()> {
    let (n, k) = (weight.n(), weight.k());
    if n == 0 || k == 0 {
        return Err(mismatch("n and k of at least 1", format!("[{n}, {k}]")));
    }
    if let Some(bias) = &weight.bias {
        expect_len("bias", bias.len(), n)?;
    }
    match &weight.weight {
        Weight::Dense { data, .. } => {
            expect_len("weight", data.len(), n.saturating_mul(k))?;
            if !matches!(data.dtype(), DType::F32 | DType::F16 | DType::BF16) {
                return Err(mismatch("a weight of f32, f16 or bf16", data.dtype()));
            }
            if weight.activation != ActQuant::None {
                return Err(Error::unsupported("int8 activations on an unquantized weight", "Quantize the weight too"));
            }
            Ok(())
        }
        Weight::Quant(q) => check_quant(q, weight.activation),
    }
}

fn check_quant(q: &QuantWeight, activation: ActQuant) -> Result<()> {
    if !(2..=8).contains(&q.bits) {
        return Err(Error::unsupported(format!("{}-bit weight codes", q.bits), "2 to 8 bits are supported"));
    }
    if q.group_size == 0 || q.group_size > q.k {
        return Err(mismatch(format!("a group size from 1 to {}", q.k), q.group_size));
    }
    expect_len("codes", q.codes.len(), q.n.saturating_mul(q.k))?;
    expect_len("scales", q.scales.len(), q.n.saturating_mul(q.groups()))?;
    expect_len("zeros", q.zeros.len(), q.scales.len())?;
    if !q.codes.fit(q.bits) {
        return Err(mismatch(format!("codes below {}", 1u16 << q.bits), q.codes.iter().max().unwrap_or(&0)));
    }
    if let Some(scale) = q.scales.par_iter().find_first(|s| !s.is_finite()) {
        return Err(mismatch("finite scales", scale));
    }
    let largest_zero = f32::from(1u16 << q.bits);
    if let Some(zero) = q.zeros.par_iter().find_first(|z| !(0.0..=largest_zero).contains(*z)) {
        return Err(mismatch(format!("zero points from 0 to {largest_zero}"), zero));
    }
    if !q.encoding.is_affine() {
        check_encoding(q, activation)?;
    }
    if let Some(order) = &q.order {
        check_permutation(order, q.k)?;
    }
    if activation == ActQuant::None {
        return Ok(());
    }
    if let Some(zero) = q.zeros.iter().find(|z| z.fract() != 0.0) {
        return Err(Error::unsupported(
            format!("int8 activations on a weight with the fractional zero point {zero}"),
            "Use a scheme with 16-bit activations",
        ));
    }
    if let ActQuant::LlmInt8 { threshold } = activation {
        if !(threshold.is_finite() && threshold > 0.0) {
            return Err(mismatch("a finite positive threshold of LLM.int8()", threshold));
        }
        if q.groups() != 1 {
            return Err(Error::unsupported("LLM.int8() on a weight with groups", "Use one scale an output channel"));
        }
    }
    check_sums_fit(q, activation)
}

/// What holds of codes that stand for floating-point values.
fn check_encoding(q: &QuantWeight, activation: ActQuant) -> Result<()> {
    let (name, bits) = match &q.encoding {
        Encoding::Codebook(codebook) => (codebook.name(), Codebook::BITS),
        Encoding::E4m3 | Encoding::Affine => ("fp8", 8),
    };
    if q.bits != bits || q.zeros.iter().any(|&z| z != 0.0) {
        let expected = format!("{bits}-bit codes without zero points in a {name} weight");
        return Err(mismatch(expected, format!("{} bits", q.bits)));
    }
    if let Some(value) = q.encoding.codebook().and_then(|codebook| codebook.0.iter().find(|v| !v.is_finite())) {
        return Err(mismatch("finite values in a codebook", value));
    }
    if q.encoding == Encoding::E4m3 && has_e4m3_nan(&q.codes) {
        return Err(mismatch("e4m3fn codes that are numbers", "a NaN (0x7f or 0xff)"));
    }
    if activation != ActQuant::None {
        return Err(Error::unsupported(
            format!("int8 activations on a {name} weight"),
            "Use a scheme with 16-bit activations",
        ));
    }
    Ok(())
}

/// Exact sums of products of codes must fit i32 whatever the data.
fn check_sums_fit(q: &QuantWeight, activation: ActQuant) -> Result<()> {
    let largest_code = (1i64 << q.bits) - 1;
    let weight = q.zeros.iter().map(|&z| (z as i64).max(largest_code - z as i64)).max().unwrap_or(0);
    let input = match activation {
        ActQuant::StaticPerTensor { scale, zero_point } => {
            if !(scale.is_finite() && scale > 0.0 && (-128..=127).contains(&zero_point)) {
                return Err(mismatch(
                    "a finite positive activation scale and a zero point from -128 to 127",
                    format!("{scale}, {zero_point}"),
                ));
            }
            (i64::from(zero_point) + 128).max(127 - i64::from(zero_point))
        }
        ActQuant::DynamicAsymmetric => 255,
        ActQuant::DynamicPerToken | ActQuant::LlmInt8 { .. } | ActQuant::None => 127,
    };
    let longest = i64::from(i32::MAX) / (weight * input).max(1);
    if q.group_size as i64 > longest {
        return Err(Error::unsupported(
            format!("int8 products over {} inputs: their sum can pass 32 bits", q.group_size),
            format!("This scheme works up to {longest} inputs to a group; use a group size"),
        ));
    }
    Ok(())
}

fn check_permutation(order: &[u32], k: usize) -> Result<()> {
    expect_len("order", order.len(), k)?;
    let mut seen = vec![false; k];
    for &column in order {
        match seen.get_mut(column as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => {
                return Err(mismatch(
                    format!("order to be a permutation of 0..{k}"),
                    format!("{column} twice or outside"),
                ));
            }
        }
    }
    Ok(())
}

fn expect_len(part: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(mismatch(format!("{expected} elements of {part}"), got)) }
}

fn mismatch(expected: impl ToString, got: impl ToString) -> Error {
    Error::Shape { op: "pack", expected: expected.to_string(), got: got.to_string() }
}

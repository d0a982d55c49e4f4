//! [`Epilogue`]: what a linear layer does with its sums before it writes them, fixed when its weight is packed.

use crate::error::{Error, Result};
use crate::quant::requantize::Q31;
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Weight};

/// Function of each output, in f32 after the bias. One sequence of f32 operations on every device (docs/numerics.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// `y`
    #[default]
    None,
    /// `max(y, 0)`
    Relu,
    /// `0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))`, `gelu_pytorch_tanh`. Hendrycks and Gimpel 2016, arXiv 1606.08415.
    GeluTanh,
    /// `0.5 y (1 + erf(y / sqrt(2)))`, `gelu`.
    GeluErf,
    /// `y / (1 + exp(-y))`
    Silu,
    /// `silu(gate) * up`: the weight's first half of rows is gate, the second up, and half as many columns are written.
    /// Shazeer 2020, arXiv 2002.05202.
    SwiGlu,
}

/// What is written of each output.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Output {
    /// Floats of the destination's type: [`crate::device::Device::linear`].
    #[default]
    Floats,
    /// Codes `clamp(rne(y / scale) + zero_point, -128, 127)`: what `quantize` makes of the same f32 values.
    Static {
        /// Real value of one step.
        scale: f32,
        /// Code of real zero.
        zero_point: i32,
    },
    /// Codes without floating point: `clamp(multiplier[n] * (sum + bias[n]) + zero_point, -128, 127)`, the multiplier
    /// `s_x s_w[n] / scale` as [`Q31`], the bias in units of `s_x s_w[n]`. Jacob et al. 2018, section 2.2.
    FixedPoint {
        /// Real value of one step.
        scale: f32,
        /// Code of real zero.
        zero_point: i32,
    },
    /// Symmetric codes with one scale for each row and [`GROUP_OUTPUTS`] outputs, `s = amax / 127` as in dynamic
    /// quantization.
    Groups,
}

impl Output {
    /// How a linear layer must quantize its input to read these codes; `None` where none does.
    pub(super) fn as_input(&self) -> Option<ActQuant> {
        match *self {
            Output::Static { scale, zero_point } | Output::FixedPoint { scale, zero_point } => {
                Some(ActQuant::StaticPerTensor { scale, zero_point })
            }
            Output::Floats | Output::Groups => None,
        }
    }
}

/// Outputs that share a scale in [`Output::Groups`].
pub const GROUP_OUTPUTS: usize = 128;

/// From sums to outputs: scales and bias of the weight, then `activation`, then `output`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Epilogue {
    /// Function of each output.
    pub activation: Activation,
    /// What is written.
    pub output: Output,
}

/// Scales of [`Output::Static`] for which the GPU's division by a constant is exact.
const STATIC_SCALES: std::ops::RangeInclusive<f32> = 8.673_617e-19..=1.152_921_5e18; // 2^-60 to 2^60

impl Epilogue {
    /// Sums times scales, plus bias, as floats.
    pub const NONE: Epilogue = Epilogue { activation: Activation::None, output: Output::Floats };

    /// Columns written by a weight of `n` rows.
    pub fn outputs(&self, n: usize) -> usize {
        if self.activation == Activation::SwiGlu { n / 2 } else { n }
    }

    /// Scales of a row of codes of a weight of `n` rows.
    pub(crate) fn scales(&self, n: usize) -> usize {
        if self.output == Output::Groups { self.outputs(n).div_ceil(GROUP_OUTPUTS) } else { 1 }
    }

    /// Fails unless `weight`, whose parts agree with each other, can have this epilogue on a device that has it for such weights
    /// at all ([`Device::check_epilogue`](crate::device::Device::check_epilogue)).
    ///
    /// # Errors
    /// `Unsupported`, naming what stands against it.
    pub fn check(&self, weight: &LinearWeight) -> Result<()> {
        if *self == Epilogue::NONE {
            return Ok(());
        }
        let unsupported = |what: String, advice: &str| Err(Error::unsupported(what, advice));
        let Weight::Quant(q) = &weight.weight else {
            return unsupported("a fused epilogue on an unquantized weight".into(), "Apply it as an op of its own");
        };
        let gives_floats = self.activation == Activation::SwiGlu && self.output == Output::Floats;
        if weight.activation == ActQuant::None && !gives_floats {
            return unsupported(
                "a fused epilogue other than SwiGLU to floats on 16-bit activations".into(),
                "Apply it as an op of its own",
            );
        }
        if let ActQuant::LlmInt8 { .. } = weight.activation {
            return unsupported("a fused epilogue on LLM.int8()".into(), "Apply it as an op of its own");
        }
        if self.activation == Activation::SwiGlu && (!q.n.is_multiple_of(16) || q.n == 0) {
            return unsupported(
                format!("SwiGLU fused into a weight of {} rows", q.n),
                "Gate and up interleave in blocks of 8 rows: use silu_mul",
            );
        }
        let bias_is_finite = weight.bias.iter().flatten().all(|b| b.is_finite());
        match self.output {
            Output::Floats => Ok(()),
            _ if !bias_is_finite => unsupported("codes of a layer whose bias is not finite".into(), "Check the file"),
            Output::Groups => Ok(()),
            Output::Static { scale, zero_point } | Output::FixedPoint { scale, zero_point } => {
                if !STATIC_SCALES.contains(&scale) || !(-128..=127).contains(&zero_point) {
                    return unsupported(
                        format!("an output scale of {scale} with zero point {zero_point}"),
                        "A scale from 2^-60 to 2^60 and a zero point from -128 to 127 are supported",
                    );
                }
                match self.output {
                    Output::FixedPoint { .. } => self.q31_columns(q, weight, scale).map(|_| ()),
                    _ => Ok(()),
                }
            }
        }
    }

    /// `[3, n]`: bias, mantissa and shift of each output of [`Output::FixedPoint`]; empty for any other.
    pub(crate) fn fixed_point(&self, weight: &LinearWeight) -> Result<Vec<i32>> {
        match (&self.output, &weight.weight) {
            (Output::FixedPoint { scale, .. }, Weight::Quant(q)) => self.q31_columns(q, weight, *scale),
            _ => Ok(Vec::new()),
        }
    }

    fn q31_columns(&self, q: &QuantWeight, weight: &LinearWeight, out_scale: f32) -> Result<Vec<i32>> {
        let unsupported = |what: String, advice: &str| Err(Error::unsupported(what, advice));
        let ActQuant::StaticPerTensor { scale: x_scale, zero_point: x_zero } = weight.activation else {
            return unsupported("fixed-point output of dynamic activations".into(), "Use static activations");
        };
        if q.groups() != 1 || !matches!(self.activation, Activation::None | Activation::Relu) {
            return unsupported(
                format!("fixed-point output with {} groups and {:?}", q.groups(), self.activation),
                "One scale a channel, and no activation or ReLU, are supported",
            );
        }
        let x_largest = (i64::from(x_zero) + 128).max(127 - i64::from(x_zero));
        let mut columns = vec![0; 3 * q.n];
        for r in 0..q.n {
            let unit = f64::from(x_scale) * f64::from(q.scales[r]);
            let bias = weight.bias.as_ref().map_or(0.0, |b| (f64::from(b[r]) / unit).round_ties_even());
            let steps = q.codes[r * q.k..(r + 1) * q.k].iter().map(|&c| (i64::from(c) - q.zeros[r] as i64).abs());
            let largest = steps.sum::<i64>() * x_largest;
            let multiplier = if unit > 0.0 { Q31::new(unit / f64::from(out_scale)) } else { None };
            let Some(multiplier) = multiplier else {
                return unsupported(
                    format!("fixed-point output of channel {r}: {x_scale} * {} / {out_scale}", q.scales[r]),
                    "Scales must be positive and their quotient below 2^31",
                );
            };
            if bias.abs() + largest as f64 > f64::from(i32::MAX) {
                return unsupported(
                    format!("fixed-point output of channel {r}: its sum and bias of {bias} steps can pass 32 bits"),
                    "Use a float multiplier",
                );
            }
            columns[r] = bias as i32;
            columns[q.n + r] = multiplier.mantissa;
            columns[2 * q.n + r] = multiplier.shift;
        }
        Ok(columns)
    }
}

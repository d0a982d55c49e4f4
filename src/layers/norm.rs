//! RMSNorm.

use crate::device::{Device, InputFormat, LinearInput, Tensor};
use crate::dtype::HostData;
use crate::error::Result;

/// Root mean square normalization with a learned weight (Zhang and Sennrich 2019).
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// Moves the weight (`[k]`, any floating type) to the device as `F32`.
    pub fn new(device: &Device, weight: &HostData, eps: f32) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: device.upload(HostData::F32(weight.to_f32()))?, eps })
    }

    /// `out = norm(x)` in `format` for `m` rows of the `F32` residual stream.
    pub fn forward(
        &self,
        device: &Device,
        out: &mut LinearInput,
        x: &Tensor,
        format: InputFormat<'_>,
        m: usize,
    ) -> Result<()> {
        device.rms_norm(out, x, &self.weight, self.eps, format, m)
    }

    /// `out = norm(x)` in `format` for `m` rows of activations, or where `gated` of `relu(gate)^2 * up` from `[m, 2 * k]`.
    pub fn forward_inner(
        &self,
        device: &Device,
        out: &mut LinearInput,
        x: &Tensor,
        gated: bool,
        format: InputFormat<'_>,
        m: usize,
    ) -> Result<()> {
        device.sub_norm(out, x, gated, &self.weight, self.eps, format, m)
    }

    /// `[k]` `F32` weight.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Epsilon.
    pub fn eps(&self) -> f32 {
        self.eps
    }
}

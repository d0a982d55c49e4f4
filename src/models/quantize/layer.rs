//! One decoder layer on the host: its weights as they are quantized one after the other.

use crate::checkpoint::write::{Format, OutTensor};
use crate::checkpoint::{Architecture, Checkpoint};
use crate::device::{AttentionShape, Device};
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::layers::{Linear, RmsNorm};
use crate::quant::{ActQuant, LinearWeight, QuantWeight, Weight};

use super::super::layer::{DecoderLayer, Projections};
use super::super::role::{LinearRole, Slot};
use super::super::spec::{LayerSpec, LinearSpec, ModelSpec, TensorSpec};
use super::recipe::LayerScheme;

/// A linear layer: floating point until it is quantized.
#[derive(Debug)]
pub(super) struct HostLinear {
    /// Module name.
    pub(super) name: String,
    pub(super) n: usize,
    pub(super) k: usize,
    /// `[n, k]`, with folded scales.
    pub(super) weight: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    /// Types of weight and bias in the source.
    weight_type: DType,
    pub(super) bias_type: DType,
    /// What it is to become; `None` stays as it is.
    pub(super) scheme: Option<LayerScheme>,
    pub(super) quantized: Option<(QuantWeight, ActQuant)>,
}

impl HostLinear {
    fn read(checkpoint: &Checkpoint, spec: &LinearSpec, scheme: Option<LayerScheme>) -> Result<HostLinear> {
        let (name, linear) = (spec.name.as_str(), spec.read(checkpoint)?);
        let Weight::Dense { n, k, data } = linear.weight else {
            return Err(Error::unsupported(
                format!("`{name}`: quantizing what is quantized already"),
                "Use the full-precision model that it was made from",
            ));
        };
        let bias_name = format!("{name}.bias");
        let bias_type = if linear.bias.is_some() { checkpoint.tensor(&bias_name)?.dtype() } else { DType::F32 };
        Ok(HostLinear { bias: linear.bias, bias_type, ..HostLinear::dense(name, [n, k], &data, scheme) })
    }

    /// The output head, where it is tied a copy of the embedding.
    pub(super) fn head(checkpoint: &Checkpoint, scheme: LayerScheme) -> Result<HostLinear> {
        let ModelSpec { embedding, head, is_head_tied, .. } = ModelSpec::new(checkpoint.config());
        if !is_head_tied {
            return HostLinear::read(checkpoint, &head, Some(scheme));
        }
        let data = checkpoint.tensor(&embedding.name)?;
        Ok(HostLinear::dense(&head.name, [head.n, head.k], &data, Some(scheme)))
    }

    /// Without a bias.
    fn dense(name: &str, [n, k]: [usize; 2], data: &HostData, scheme: Option<LayerScheme>) -> HostLinear {
        let (name, weight, weight_type) = (name.to_owned(), data.to_f32(), data.dtype());
        let bias_type = DType::F32;
        HostLinear { name, n, k, weight, bias: None, weight_type, bias_type, scheme, quantized: None }
    }

    /// Ends the work on a weight that stays in floating point: as its file will have it.
    pub(super) fn keep(&mut self) {
        self.weight.iter_mut().for_each(|w| *w = self.weight_type.round(*w));
    }

    /// Number of weights.
    pub(super) fn weights(&self) -> f64 {
        (self.n * self.k) as f64
    }

    /// Bits of a weight that stays in floating point.
    pub(super) fn bits(&self) -> f64 {
        8.0 * self.weight_type.size_bytes() as f64
    }

    /// Everything it has in the checkpoint.
    pub(super) fn tensors(&self, format: Format, dtype: DType) -> Result<Vec<OutTensor>> {
        let mut all = match &self.quantized {
            Some((q, activation)) => format.tensors(&self.name, q, *activation, dtype)?,
            None => {
                let name = format!("{}.weight", self.name);
                vec![OutTensor::floats(name, self.weight_type, &[self.n, self.k], &self.weight)]
            }
        };
        if let Some(bias) = &self.bias {
            all.push(OutTensor::floats(format!("{}.bias", self.name), self.bias_type, &[bias.len()], bias));
        }
        Ok(all)
    }

    fn to_linear(&self) -> LinearWeight {
        let (weight, activation) = match &self.quantized {
            Some((q, activation)) => (Weight::Quant(q.clone()), *activation),
            None => {
                let data = HostData::F32(self.weight.clone());
                (Weight::Dense { n: self.n, k: self.k, data }, ActQuant::None)
            }
        };
        LinearWeight { weight, bias: self.bias.clone(), activation }
    }

    /// Multiplies the columns, for inputs that were divided.
    fn multiply_columns(&mut self, scales: &[f32]) {
        for row in self.weight.chunks_exact_mut(self.k) {
            row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
        }
    }

    /// Divides the outputs.
    fn divide_rows(&mut self, scales: &[f32]) {
        for (row, s) in self.weight.chunks_exact_mut(self.k).zip(scales) {
            row.iter_mut().for_each(|w| *w /= s);
        }
        if let Some(bias) = &mut self.bias {
            bias.iter_mut().zip(scales).for_each(|(b, s)| *b = self.bias_type.round(*b / s));
        }
    }
}

/// A norm's weight, and the type it is stored in.
#[derive(Debug)]
pub(super) struct HostNorm {
    pub(super) name: String,
    pub(super) weight: Vec<f32>,
    pub(super) dtype: DType,
}

impl HostNorm {
    pub(super) fn read(checkpoint: &Checkpoint, spec: &TensorSpec) -> Result<HostNorm> {
        let data = checkpoint.tensor(&spec.name)?;
        Ok(HostNorm { name: spec.name.clone(), weight: data.to_f32(), dtype: data.dtype() })
    }

    pub(super) fn tensor(&self) -> OutTensor {
        OutTensor::floats(&self.name, self.dtype, &[self.weight.len()], &self.weight)
    }

    /// Divides the weight by `scales`, which become what its stored, rounded values were divided by.
    fn fold(&mut self, scales: &mut [f32]) {
        for (weight, s) in self.weight.iter_mut().zip(scales) {
            let folded = self.dtype.round(*weight / *s);
            if folded == 0.0 || !folded.is_finite() {
                *s = 1.0; // cannot be, or need not be, divided
            } else {
                *s = *weight / folded;
                *weight = folded;
            }
        }
    }
}

/// All weights of one decoder layer.
#[derive(Debug)]
pub(super) struct HostLayer {
    pub(super) parts: DecoderLayer<Projections<HostLinear>, HostNorm>,
    pub(super) attention: AttentionShape,
    eps: f32,
}

impl HostLayer {
    /// Reads a layer whose linear layers, by name, are to become what `scheme` says.
    pub(super) fn read(
        checkpoint: &Checkpoint,
        spec: &LayerSpec,
        scheme: impl Fn(&str) -> Option<LayerScheme>,
    ) -> Result<HostLayer> {
        let config = checkpoint.config();
        if config.architecture == Architecture::BitNet {
            let what = "quantizing BitNet models: they are trained for ternary weights";
            return Err(Error::unsupported(what, "Use another model; this one runs as it is"));
        }
        let linear = |spec: &LinearSpec| HostLinear::read(checkpoint, spec, scheme(&spec.name));
        let norms = spec.parts.as_ref().try_map_norms(|norm| HostNorm::read(checkpoint, norm))?;
        let parts = norms.try_map(|_, linears| linears.try_map(|_, spec| linear(spec)))?;
        Ok(HostLayer { parts, attention: spec.attention, eps: config.rms_norm_eps })
    }

    /// The layer on a device: what is quantized so far as it will run, the rest in f32.
    pub(super) fn to_device(&self, device: &Device) -> Result<DecoderLayer<Linear, RmsNorm>> {
        let norm = |norm: &HostNorm| RmsNorm::new(device, &HostData::F32(norm.weight.clone()), self.eps);
        let norms = self.parts.as_ref().try_map_norms(norm)?;
        // Each slot by itself: calibration looks between gate, up and their product.
        norms.try_map(|_, linears| Linear::new(device, linears.iter().map(HostLinear::to_linear).collect()))
    }

    /// The factors that a slot's inputs can have, made of those wished for: each query head of a group shares its values'
    /// channel, so `o`'s are averaged over the group (in the log).
    pub(super) fn tie(&self, slot: Slot, scales: &mut [f32]) {
        if slot != Slot::O {
            return;
        }
        let (v, head) = (self.parts.linear(LinearRole::V), self.attention.head_dim);
        let kv_heads = v.n / head;
        let repeat = scales.len() / head / kv_heads;
        for kv in 0..kv_heads {
            for c in 0..head {
                let places: Vec<usize> = (0..repeat).map(|r| (kv * repeat + r) * head + c).collect();
                let log: f32 =
                    places.iter().map(|&p| scales[p].max(f32::MIN_POSITIVE).ln()).sum::<f32>() / repeat as f32;
                places.iter().for_each(|&p| scales[p] = log.exp());
            }
        }
    }

    /// Divides the inputs of a slot by `scales` in what produces them, and multiplies the slot's weights, so that the
    /// layer computes the same. Returns the factors as they came to be: a norm's are such that its stored, rounded weight
    /// is exact.
    pub(super) fn fold(&mut self, slot: Slot, mut scales: Vec<f32>) -> Vec<f32> {
        match slot {
            Slot::Qkv => self.parts.input_norm.fold(&mut scales),
            Slot::GateUp => self.parts.post_attention_norm.fold(&mut scales),
            Slot::O => {
                let head = self.attention.head_dim;
                let v = self.parts.linear_mut(LinearRole::V);
                let repeat = scales.len() / v.n;
                let of_v: Vec<f32> = (0..v.n).map(|j| scales[j / head * repeat * head + j % head]).collect();
                v.divide_rows(&of_v);
            }
            Slot::Down => self.parts.linear_mut(LinearRole::Up).divide_rows(&scales),
        }
        for (_, linear) in self.parts.slot_mut(slot).iter_mut() {
            linear.multiply_columns(&scales);
        }
        scales
    }

    /// Everything the layer's part of the checkpoint holds.
    pub(super) fn tensors(&self, format: Format, dtype: DType) -> Result<Vec<OutTensor>> {
        let mut all: Vec<OutTensor> = self.parts.norms().map(HostNorm::tensor).collect();
        for (_, linear) in self.parts.linears() {
            all.extend(linear.tensors(format, dtype)?);
        }
        Ok(all)
    }
}

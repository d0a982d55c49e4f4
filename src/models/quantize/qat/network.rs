//! The decoder as a differentiable function of its weights: the teacher's fixed, the student's variables.

use std::sync::Arc;

use candle_core::{D, DType as Type, Device, Result, Tensor, Var};

use crate::checkpoint::ModelConfig;
use crate::dtype::DType;
use crate::quant::ActQuant;

use super::super::super::layer::{DecoderLayer, Projections};
use super::super::super::role::LinearRole;
use super::super::super::rope::rope_table;
use super::super::layer::{HostLayer, HostLinear, HostNorm};
use super::ops::{CausalSoftmax, FakeQuantize, Quantizer, Rope, RoundRows};
use super::optimizer::{Kind, Parameter};

/// A linear layer.
struct Projection {
    weight: Tensor,
    bias: Option<Vector>,
    /// The grid, and the factors of its steps.
    quantizer: Option<(Arc<Quantizer>, Tensor)>,
    int8_input: bool,
}

impl Projection {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = match &self.quantizer {
            Some((quantizer, factors)) => self.weight.apply_op2(factors, FakeQuantize(quantizer.clone()))?,
            None => self.weight.clone(),
        };
        let x = if self.int8_input { x.apply_op1(RoundRows)? } else { x.clone() };
        let y = x.matmul(&weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.stored()?),
            None => Ok(y),
        }
    }
}

/// A norm's weight or a bias.
struct Vector {
    values: Tensor,
    dtype: DType,
}

impl Vector {
    /// The values as the file holds them; the gradient passes through the rounding.
    fn stored(&self) -> Result<Tensor> {
        let dtype = match self.dtype {
            DType::F16 => Type::F16,
            DType::BF16 => Type::BF16,
            _ => return Ok(self.values.clone()),
        };
        self.values.to_dtype(dtype)?.to_dtype(Type::F32)
    }

    fn rms_norm(&self, x: &Tensor, eps: f32) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(&self.stored()?)
    }
}

struct Layer {
    parts: DecoderLayer<Projections<Projection>, Vector>,
    window: Option<usize>,
}

/// What a network is made of beside its decoder layers; never trained but for the norm.
pub(super) struct Frame<'a> {
    pub(super) config: &'a ModelConfig,
    /// `[vocab, hidden]`.
    pub(super) embedding: Arc<Vec<f32>>,
    /// `[vocab, hidden]`.
    pub(super) head: Tensor,
    pub(super) norm: &'a HostNorm,
    /// Tokens of a window.
    pub(super) context: usize,
}

/// Embedding, decoder layers, head.
pub(super) struct Network {
    config: ModelConfig,
    context: usize,
    rope: Rope,
    embedding: Arc<Vec<f32>>,
    layers: Vec<Layer>,
    norm: Vector,
    head: Tensor,
}

/// Makes tensors: variables, listed as parameters, for a student.
struct Maker {
    parameters: Option<Vec<Parameter>>,
}

impl Maker {
    fn tensor(&mut self, name: String, values: &[f32], shape: &[usize], kind: Kind) -> Result<Tensor> {
        let Some(parameters) = &mut self.parameters else {
            return Tensor::from_slice(values, shape, &Device::Cpu);
        };
        let var = Var::from_slice(values, shape, &Device::Cpu)?;
        let tensor = var.as_tensor().clone();
        parameters.push(Parameter::new(name, var, kind));
        Ok(tensor)
    }

    fn vector(&mut self, name: &str, values: &[f32], dtype: DType) -> Result<Vector> {
        let values = self.tensor(name.to_owned(), values, &[values.len()], Kind::Vector)?;
        Ok(Vector { values, dtype })
    }

    fn norm(&mut self, norm: &HostNorm) -> Result<Vector> {
        self.vector(&norm.name, &norm.weight, norm.dtype)
    }

    /// A layer that stays as it is is not trained either.
    fn linear(&mut self, linear: &HostLinear) -> Result<Projection> {
        let shape = [linear.n, linear.k];
        let (Some((q, activation)), Some(scheme), true) =
            (&linear.quantized, &linear.scheme, self.parameters.is_some())
        else {
            let mut fixed = Maker { parameters: None };
            return Ok(Projection {
                weight: fixed.tensor(String::new(), &linear.weight, &shape, Kind::Weight)?,
                bias: linear.bias.as_ref().map(|b| fixed.vector("", b, linear.bias_type)).transpose()?,
                quantizer: None,
                int8_input: false,
            });
        };
        let quantizer = Quantizer::new(q, &scheme.grid);
        let factors = vec![1.0; quantizer.steps()];
        Ok(Projection {
            weight: self.tensor(weight_name(linear), &linear.weight, &shape, Kind::Weight)?,
            quantizer: Some((
                Arc::new(quantizer),
                self.tensor(steps_name(linear), &factors, &[q.n, q.groups()], Kind::Step)?,
            )),
            bias: match &linear.bias {
                Some(bias) => Some(self.vector(&bias_name(linear), bias, linear.bias_type)?),
                None => None,
            },
            int8_input: *activation == ActQuant::DynamicPerToken,
        })
    }
}

pub(super) fn weight_name(linear: &HostLinear) -> String {
    format!("{}.weight", linear.name)
}

pub(super) fn bias_name(linear: &HostLinear) -> String {
    format!("{}.bias", linear.name)
}

pub(super) fn steps_name(linear: &HostLinear) -> String {
    format!("{}.steps", linear.name)
}

impl Network {
    /// The model as it is.
    pub(super) fn teacher(frame: &Frame, layers: &[HostLayer]) -> Result<Network> {
        Network::new(frame, layers, &mut Maker { parameters: None })
    }

    /// The model with fake quantization, on the grids of its layers' quantized weights, and what is trained of it.
    pub(super) fn student(frame: &Frame, layers: &[HostLayer]) -> Result<(Network, Vec<Parameter>)> {
        let mut maker = Maker { parameters: Some(Vec::new()) };
        let network = Network::new(frame, layers, &mut maker)?;
        Ok((network, maker.parameters.unwrap_or_default()))
    }

    fn new(frame: &Frame, layers: &[HostLayer], maker: &mut Maker) -> Result<Network> {
        let config = frame.config;
        let mut all = Vec::new();
        for layer in layers {
            let norms = layer.parts.as_ref().try_map_norms(|norm| maker.norm(norm))?;
            let parts = norms.try_map(|_, linears| linears.try_map(|_, linear| maker.linear(linear)))?;
            all.push(Layer { parts, window: layer.attention.window });
        }
        let table = rope_table(&config.rope, config.head_dim, config.max_position_embeddings, frame.context);
        Ok(Network {
            config: config.clone(),
            context: frame.context,
            rope: Rope { table: Arc::new(table), context: frame.context, head_dim: config.head_dim },
            embedding: frame.embedding.clone(),
            layers: all,
            norm: maker.norm(frame.norm)?,
            head: frame.head.clone(),
        })
    }

    /// The grid of a student's linear layer; `None` where it is not quantized.
    pub(super) fn quantizer(&self, layer: usize, role: LinearRole) -> Option<&Quantizer> {
        self.layers[layer].parts.linear(role).quantizer.as_ref().map(|(q, _)| q.as_ref())
    }

    /// `[tokens, vocab]` logits of whole windows.
    pub(super) fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        let hidden = self.config.hidden_size;
        let rows = ids.iter().flat_map(|&id| &self.embedding[id as usize * hidden..][..hidden]).copied();
        let mut x = Tensor::from_vec(rows.collect::<Vec<f32>>(), (ids.len(), hidden), &Device::Cpu)?;
        for layer in &self.layers {
            x = self.layer(layer, &x)?;
        }
        self.norm.rms_norm(&x, self.config.rms_norm_eps)?.matmul(&self.head.t()?)
    }

    fn layer(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps;
        let of = |role: LinearRole, x: &Tensor| layer.parts.linear(role).forward(x);
        let input = layer.parts.input_norm.rms_norm(x, eps)?;
        let [q, k, v] = [LinearRole::Q, LinearRole::K, LinearRole::V].map(|role| of(role, &input));
        let attention = self.attention(layer, q?, k?, v?)?;
        let x = (x + of(LinearRole::O, &attention)?)?;
        let input = layer.parts.post_attention_norm.rms_norm(&x, eps)?;
        let inner = (of(LinearRole::Gate, &input)?.silu()? * of(LinearRole::Up, &input)?)?;
        x + of(LinearRole::Down, &inner)?
    }

    /// The query heads of a group are stacked upon one another: their rows meet the same keys.
    fn attention(&self, layer: &Layer, q: Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (t, d, heads, kv) = (self.context, c.head_dim, c.num_heads, c.num_kv_heads);
        let rows = q.dim(0)?;
        let windows = rows / t;
        let (mut q, mut k) = (q.reshape((rows, heads, d))?, k.reshape((rows, kv, d))?);
        if let Some(norm) = &layer.parts.attention.qk_norm {
            (q, k) = (norm.q.rms_norm(&q, c.rms_norm_eps)?, norm.k.rms_norm(&k, c.rms_norm_eps)?);
        }
        let by_head = |x: Tensor, heads: usize, stacked: usize| {
            let x = x.reshape((windows, t, heads, d))?.transpose(1, 2)?.contiguous()?;
            x.reshape((windows * heads / stacked, stacked * t, d))
        };
        let q = by_head(q.apply_op1(self.rope.clone())?, heads, heads / kv)?;
        let k = by_head(k.apply_op1(self.rope.clone())?, kv, 1)?;
        let v = by_head(v, kv, 1)?;
        let scale = (d as f32).sqrt().recip();
        let weights = q.matmul(&k.t()?)?.apply_op1(CausalSoftmax { scale, context: t, window: layer.window })?;
        let y = weights.matmul(&v)?.reshape((windows, heads, t, d))?.transpose(1, 2)?.contiguous()?;
        y.reshape((rows, heads * d))
    }
}

//! The forward pass by the executable specification: the CPU's reference functions on canonical weights, in floats on the
//! host. What `verify` holds a device against.

use crate::checkpoint::Checkpoint;
use crate::device::AttentionShape;
use crate::device::cpu::reference::{self, PagedKv, Rounding};
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::quant::{ActQuant, LinearWeight, Weight};

use super::layer::{DecoderLayer, Mlp, Projections};
use super::spec::{LayerSpec, LinearSpec, ModelSpec, TensorSpec};

/// How a number comes about: exactly, or as a kernel of a device computes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arithmetic {
    pub(crate) rounding: Rounding,
    /// Activations of weight-only quantized layers pass through 16-bit integers, as on the CPU's fast path.
    int16_activations: bool,
}

impl Arithmetic {
    pub(crate) const EXACT: Arithmetic = Arithmetic { rounding: Rounding::Exact, int16_activations: false };

    /// That of a device whose activations have `dtype`.
    pub(crate) fn twin(dtype: DType) -> Arithmetic {
        Arithmetic { rounding: Rounding::As(dtype), int16_activations: dtype == DType::F32 }
    }
}

/// One named weight of a layer.
#[derive(Debug)]
pub(crate) struct ReferenceLinear {
    /// `q_proj` and so on.
    pub(crate) name: String,
    pub(crate) weight: LinearWeight,
}

impl ReferenceLinear {
    fn read(checkpoint: &Checkpoint, spec: &LinearSpec) -> Result<ReferenceLinear> {
        let name = spec.name.rsplit('.').next().unwrap_or(&spec.name).to_owned();
        Ok(ReferenceLinear { name, weight: spec.read(checkpoint)? })
    }

    /// `[m, k]` of the layer's own input order in the weight's stored order.
    pub(crate) fn ordered<T: Copy>(&self, x: &[T]) -> Vec<T> {
        match &self.weight.weight {
            Weight::Quant(q) => q.order.as_ref().map_or(x.to_vec(), |order| reference::gather_columns(x, order)),
            Weight::Dense { .. } => x.to_vec(),
        }
    }

    /// `[m, n]` of the linear layer for `x` `[m, k]`.
    pub(crate) fn forward(&self, x: &[f32], how: Arithmetic) -> Vec<f64> {
        let bias = self.weight.bias.as_deref();
        match (&self.weight.weight, self.weight.activation) {
            (Weight::Dense { data, k, .. }, _) => reference::linear_dense(x, data, *k, bias, how.rounding),
            (Weight::Quant(q), ActQuant::None) => {
                let mut x = self.ordered(x);
                if how.int16_activations {
                    x = reference::round_int16(&x, q.k, q.group_size);
                }
                reference::linear_quant(&x, q, bias, how.rounding)
            }
            (Weight::Quant(q), activation) => {
                let x = reference::quantize_rows(&self.ordered(x), q.k, activation);
                let y = reference::linear_of_codes(&x, q, bias);
                y.into_iter().map(|y| how.rounding.round(f64::from(y))).collect()
            }
        }
    }
}

/// A decoder layer's weights on the host.
#[derive(Debug)]
pub(crate) struct ReferenceLayer {
    /// Its linear layers and norms.
    pub(crate) parts: DecoderLayer<Projections<ReferenceLinear>, Vec<f32>>,
    /// Shape of its attention.
    pub(crate) shape: AttentionShape,
    /// Epsilon of its norms.
    pub(crate) eps: f32,
}

impl ReferenceLayer {
    /// Reads the layer that `spec` tells of.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear`] and [`Checkpoint::tensor`].
    pub(crate) fn read(checkpoint: &Checkpoint, spec: &LayerSpec) -> Result<ReferenceLayer> {
        let norm = |norm: &TensorSpec| Ok::<_, Error>(checkpoint.tensor(&norm.name)?.to_f32());
        let norms = spec.parts.as_ref().try_map_norms(norm)?;
        let linear = |linear: &LinearSpec| ReferenceLinear::read(checkpoint, linear);
        let parts = norms.try_map(|_, linears| linears.try_map(|_, spec| linear(spec)))?;
        Ok(ReferenceLayer { parts, shape: spec.attention, eps: checkpoint.config().rms_norm_eps })
    }

    /// True when a linear layer quantizes its input to int8.
    pub(crate) fn has_int8_activations(&self) -> bool {
        self.parts.linears().any(|(_, linear)| linear.weight.activation != ActQuant::None)
    }

    /// One layer over all rows of its sequences at once. `x` is the residual stream before it, `rope` `[positions, head_dim]`.
    pub(crate) fn forward(&self, x: &[f32], rows: &Rows, rope: &[f32], num_blocks: usize, how: Arithmetic) -> Steps {
        let (rounding, eps, shape) = (how.rounding, self.eps, &self.shape);
        let (attention, Mlp::Dense(mlp)) = (&self.parts.attention, &self.parts.mlp);
        let normed = narrow(reference::rms_norm(x, &self.parts.input_norm, eps, rounding));
        let qkv = side_by_side(&attention.qkv, &normed, how);
        let qk_normed = match &attention.qk_norm {
            Some(norm) => narrow(reference::qk_norm(&qkv, &norm.q, &norm.k, eps, shape, rounding)),
            None => qkv.clone(),
        };
        let rotated = narrow(reference::rope(&qk_normed, rope, &rows.positions, shape, rounding));
        let cache_dtype = if let Rounding::As(dtype) = rounding { dtype } else { DType::F32 };
        let (k, v) = fill_cache(&rotated, rows, shape, cache_dtype, num_blocks);
        let attended = narrow(reference::attention(&rotated, &paged(&k, &v, rows), shape, rounding));
        let attention_out = match &attention.sub_norm {
            Some(norm) => narrow(reference::sub_norm(&attended, false, norm, eps, rounding)),
            None => attended.clone(),
        };
        let middle = add(x, &attention.o.first().forward(&attention_out, how));
        let mlp_normed = narrow(reference::rms_norm(&middle, &self.parts.post_attention_norm, eps, rounding));
        let gate_up = side_by_side(&mlp.gate_up, &mlp_normed, how);
        let down = mlp.down.first();
        let activated = match &mlp.sub_norm {
            Some(norm) => narrow(reference::sub_norm(&gate_up, true, norm, eps, rounding)),
            None => narrow(reference::silu_mul(&gate_up, down.weight.k(), rounding)),
        };
        let out = add(&middle, &down.forward(&activated, how));
        Steps { normed, qkv, rotated, attended, attention_out, middle, mlp_normed, gate_up, activated, out }
    }
}

/// The output head with its norm.
#[derive(Debug)]
pub(crate) struct ReferenceHead {
    norm: Vec<f32>,
    /// The head.
    pub(crate) head: ReferenceLinear,
    eps: f32,
}

impl ReferenceHead {
    /// Reads the head that `spec` tells of.
    ///
    /// # Errors
    /// As [`ReferenceLayer::read`].
    pub(crate) fn read(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<ReferenceHead> {
        let (norm, head) = (checkpoint.tensor(&spec.norm.name)?, ReferenceLinear::read(checkpoint, &spec.head)?);
        Ok(ReferenceHead { norm: norm.to_f32(), head, eps: checkpoint.config().rms_norm_eps })
    }

    /// Logits of rows of the residual stream.
    pub(crate) fn forward(&self, x: &[f32], how: Arithmetic) -> Vec<f64> {
        let x = narrow(reference::rms_norm(x, &self.norm, self.eps, how.rounding));
        self.head.forward(&x, how)
    }
}

/// Sequences of a check: every row of each, in one ragged batch over a paged cache.
pub(crate) struct Rows {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) slots: Vec<u32>,
    /// `[batch, max_blocks]`.
    pub(crate) block_tables: Vec<u32>,
    pub(crate) max_blocks: usize,
    /// Rows and keys of each sequence.
    pub(crate) lens: Vec<u32>,
    /// First row of each sequence, then the number of rows.
    pub(crate) starts: Vec<u32>,
}

/// What every step of a layer gives, each `[m, ...]` rounded to f32.
pub(crate) struct Steps {
    pub(crate) normed: Vec<f32>,
    pub(crate) qkv: Vec<f32>,
    /// Queries and keys normalized where the model does that.
    pub(crate) rotated: Vec<f32>,
    pub(crate) attended: Vec<f32>,
    /// What the attention output takes: normalized where the model does that.
    pub(crate) attention_out: Vec<f32>,
    /// The residual stream between attention and MLP.
    pub(crate) middle: Vec<f32>,
    pub(crate) mlp_normed: Vec<f32>,
    pub(crate) gate_up: Vec<f32>,
    pub(crate) activated: Vec<f32>,
    /// The residual stream after the layer.
    pub(crate) out: Vec<f32>,
}

/// Keys and values of `rotated` rows in a fresh cache of `dtype`, with `num_blocks` blocks.
pub(crate) fn fill_cache(
    rotated: &[f32],
    rows: &Rows,
    shape: &AttentionShape,
    dtype: DType,
    num_blocks: usize,
) -> (HostData, HostData) {
    let len = num_blocks * shape.block_size * shape.num_kv_heads * shape.head_dim;
    let (mut k, mut v) = (HostData::zeros(dtype, len), HostData::zeros(dtype, len));
    reference::kv_write(&mut k, &mut v, rotated, &rows.slots, shape);
    (k, v)
}

/// A cache filled with all rows, as attention reads it.
pub(crate) fn paged<'a>(k: &'a HostData, v: &'a HostData, rows: &'a Rows) -> PagedKv<'a> {
    PagedKv {
        k,
        v,
        block_tables: &rows.block_tables,
        max_blocks: rows.max_blocks,
        context_lens: &rows.lens,
        cu_seqlens_q: &rows.starts,
    }
}

/// Outputs of several linear layers over one input, `[m, n1 + n2 + ...]`.
fn side_by_side(weights: &Projections<ReferenceLinear>, x: &[f32], how: Arithmetic) -> Vec<f32> {
    let m = x.len() / weights.first().weight.k();
    let parts: Vec<Vec<f64>> = weights.iter().map(|w| w.forward(x, how)).collect();
    let row = |r: usize| {
        parts.iter().zip(weights.iter()).flat_map(move |(part, w)| &part[r * w.weight.n()..(r + 1) * w.weight.n()])
    };
    (0..m).flat_map(row).map(|&y| y as f32).collect()
}

fn narrow(x: Vec<f64>) -> Vec<f32> {
    x.into_iter().map(|x| x as f32).collect()
}

fn add(x: &[f32], y: &[f64]) -> Vec<f32> {
    x.iter().zip(y).map(|(&x, &y)| (f64::from(x) + y) as f32).collect()
}

//! A decoder layer by the executable specification: the CPU's reference functions on canonical weights.

use crate::checkpoint::{Architecture, Checkpoint, ModelConfig};
use crate::device::AttentionShape;
use crate::device::cpu::reference::{self, PagedKv, Rounding};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::models::{LayerTable, SUB_NORMS, attention_shape};
use crate::quant::{ActQuant, LinearWeight, Weight};

/// How a number comes about: exactly, or as a kernel of a device computes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arithmetic {
    pub(super) rounding: Rounding,
    /// Activations of weight-only quantized layers pass through 16-bit integers, as on the CPU's fast path.
    int16_activations: bool,
}

impl Arithmetic {
    pub(super) const EXACT: Arithmetic = Arithmetic { rounding: Rounding::Exact, int16_activations: false };

    /// That of a device whose activations have `dtype`.
    pub(super) fn twin(dtype: DType) -> Arithmetic {
        Arithmetic { rounding: Rounding::As(dtype), int16_activations: dtype == DType::F32 }
    }
}

/// One named weight of a layer.
pub(super) struct Named {
    /// `q_proj` and so on.
    pub(super) name: String,
    pub(super) weight: LinearWeight,
}

impl Named {
    fn read(checkpoint: &Checkpoint, module: &str) -> Result<Named> {
        let name = module.rsplit('.').next().unwrap_or(module).to_owned();
        Ok(Named { name, weight: checkpoint.linear(module)? })
    }

    /// `[m, k]` of the layer's own input order in the weight's stored order.
    pub(super) fn ordered<T: Copy>(&self, x: &[T]) -> Vec<T> {
        match &self.weight.weight {
            Weight::Quant(q) => q.order.as_ref().map_or(x.to_vec(), |order| reference::gather_columns(x, order)),
            Weight::Dense { .. } => x.to_vec(),
        }
    }

    /// `[m, n]` of the linear layer for `x` `[m, k]`.
    pub(super) fn forward(&self, x: &[f32], how: Arithmetic) -> Vec<f64> {
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

/// Weights of one layer on the host.
pub(super) struct HostLayer {
    pub(super) input_norm: Vec<f32>,
    pub(super) qkv: Vec<Named>,
    /// Norms of query and key heads.
    pub(super) qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// Norms inside attention and MLP.
    pub(super) sub_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) o: Named,
    pub(super) post_attention_norm: Vec<f32>,
    pub(super) gate_up: Vec<Named>,
    pub(super) down: Named,
    pub(super) shape: AttentionShape,
    pub(super) eps: f32,
}

impl HostLayer {
    pub(super) fn read(checkpoint: &Checkpoint, table: &LayerTable, index: usize) -> Result<HostLayer> {
        let config = checkpoint.config();
        let norm = |name: &str| Ok(checkpoint.tensor(&format!("{}.{name}.weight", table.prefix))?.to_f32());
        let qk_norm = match config.architecture {
            Architecture::Qwen3 => Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)),
            _ => None,
        };
        let sub_norms = match config.architecture {
            Architecture::BitNet => Some((norm(SUB_NORMS[0])?, norm(SUB_NORMS[1])?)),
            _ => None,
        };
        Ok(HostLayer {
            sub_norms,
            input_norm: norm("input_layernorm")?,
            qkv: table.qkv.iter().map(|(name, _)| Named::read(checkpoint, name)).collect::<Result<_>>()?,
            qk_norm,
            o: Named::read(checkpoint, &table.o)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            gate_up: table.gate_up.iter().map(|name| Named::read(checkpoint, name)).collect::<Result<_>>()?,
            down: Named::read(checkpoint, &table.down)?,
            shape: attention_shape(config, config.windows.get(index).copied().flatten()),
            eps: config.rms_norm_eps,
        })
    }

    /// True when a linear layer quantizes its input to int8.
    pub(super) fn has_int8_activations(&self) -> bool {
        let all = self.qkv.iter().chain([&self.o]).chain(&self.gate_up).chain([&self.down]);
        all.into_iter().any(|named| named.weight.activation != ActQuant::None)
    }
}

/// The output head with its norm.
pub(super) struct HostHead {
    pub(super) norm: Vec<f32>,
    pub(super) head: Named,
    pub(super) eps: f32,
}

impl HostHead {
    pub(super) fn read(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<HostHead> {
        let head = Named::read(checkpoint, "lm_head")?;
        Ok(HostHead { norm: checkpoint.tensor("model.norm.weight")?.to_f32(), head, eps: config.rms_norm_eps })
    }

    /// Logits of rows of the residual stream.
    pub(super) fn forward(&self, x: &[f32], how: Arithmetic) -> Vec<f64> {
        let x = narrow(reference::rms_norm(x, &self.norm, self.eps, how.rounding));
        self.head.forward(&x, how)
    }
}

/// Sequences of a check: every row of each, in one ragged batch over a paged cache.
pub(super) struct Rows {
    pub(super) token_ids: Vec<u32>,
    pub(super) positions: Vec<u32>,
    pub(super) slots: Vec<u32>,
    /// `[batch, max_blocks]`.
    pub(super) block_tables: Vec<u32>,
    pub(super) max_blocks: usize,
    /// Rows and keys of each sequence.
    pub(super) lens: Vec<u32>,
    /// First row of each sequence, then the number of rows.
    pub(super) starts: Vec<u32>,
}

/// What every step of a layer gives, each `[m, ...]` rounded to f32.
pub(super) struct Steps {
    pub(super) normed: Vec<f32>,
    pub(super) qkv: Vec<f32>,
    /// Queries and keys normalized where the model does that.
    pub(super) qk_normed: Vec<f32>,
    pub(super) rotated: Vec<f32>,
    pub(super) attended: Vec<f32>,
    /// What the attention output takes: normalized where the model does that.
    pub(super) attention_out: Vec<f32>,
    /// The residual stream between attention and MLP.
    pub(super) middle: Vec<f32>,
    pub(super) mlp_normed: Vec<f32>,
    pub(super) gate_up: Vec<f32>,
    pub(super) activated: Vec<f32>,
    /// The residual stream after the layer.
    pub(super) out: Vec<f32>,
}

/// Keys and values of `rotated` rows in a fresh cache of `dtype`, with `num_blocks` blocks.
pub(super) fn fill_cache(
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

/// One layer over all rows of its sequences at once.
pub(super) fn layer(w: &HostLayer, x: &[f32], rows: &Rows, rope: &[f32], num_blocks: usize, how: Arithmetic) -> Steps {
    let rounding = how.rounding;
    let normed = narrow(reference::rms_norm(x, &w.input_norm, w.eps, rounding));
    let qkv = side_by_side(&w.qkv, &normed, how);
    let qk_normed = match &w.qk_norm {
        Some((q, k)) => narrow(reference::qk_norm(&qkv, q, k, w.eps, &w.shape, rounding)),
        None => qkv.clone(),
    };
    let rotated = narrow(reference::rope(&qk_normed, rope, &rows.positions, &w.shape, rounding));
    let cache_dtype = if let Rounding::As(dtype) = rounding { dtype } else { DType::F32 };
    let (k, v) = fill_cache(&rotated, rows, &w.shape, cache_dtype, num_blocks);
    let attended = narrow(reference::attention(&rotated, &paged(&k, &v, rows), &w.shape, rounding));
    let attention_out = match &w.sub_norms {
        Some((norm, _)) => narrow(reference::sub_norm(&attended, false, norm, w.eps, rounding)),
        None => attended.clone(),
    };
    let middle = add(x, &w.o.forward(&attention_out, how));
    let mlp_normed = narrow(reference::rms_norm(&middle, &w.post_attention_norm, w.eps, rounding));
    let gate_up = side_by_side(&w.gate_up, &mlp_normed, how);
    let activated = match &w.sub_norms {
        Some((_, norm)) => narrow(reference::sub_norm(&gate_up, true, norm, w.eps, rounding)),
        None => narrow(reference::silu_mul(&gate_up, w.down.weight.k(), rounding)),
    };
    let out = add(&middle, &w.down.forward(&activated, how));
    Steps { normed, qkv, qk_normed, rotated, attended, attention_out, middle, mlp_normed, gate_up, activated, out }
}

/// A cache filled with all rows, as attention reads it.
pub(super) fn paged<'a>(k: &'a HostData, v: &'a HostData, rows: &'a Rows) -> PagedKv<'a> {
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
pub(super) fn side_by_side(weights: &[Named], x: &[f32], how: Arithmetic) -> Vec<f32> {
    let m = x.len() / weights[0].weight.k();
    let parts: Vec<Vec<f64>> = weights.iter().map(|w| w.forward(x, how)).collect();
    let row =
        |r: usize| parts.iter().zip(weights).flat_map(move |(part, w)| &part[r * w.weight.n()..(r + 1) * w.weight.n()]);
    (0..m).flat_map(row).map(|&y| y as f32).collect()
}

pub(super) fn narrow(x: Vec<f64>) -> Vec<f32> {
    x.into_iter().map(|x| x as f32).collect()
}

fn add(x: &[f32], y: &[f64]) -> Vec<f32> {
    x.iter().zip(y).map(|(&x, &y)| (f64::from(x) + y) as f32).collect()
}

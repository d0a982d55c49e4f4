//! What passes over a model compute with beside its weights: all of it is allocated here, for the largest batch, and counted
//! here by a plan.

use crate::checkpoint::{ModelConfig, RopeConfig};
use crate::device::{AttentionShape, BatchMeta, Device, LinearInput, SampleRow, Tensor};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::layers::KvCache;

use super::batch::{Batch, Limits};
use super::rope::{rope_rows, rope_table};
use super::spec::{attention_shape, widest_input};

/// What decoder layers compute with beside their weights, allocated once for the largest batch: activations, the batch's
/// metadata and the rotary table.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) device: Device,
    /// `[max_batch_tokens, hidden]` f32.
    pub(super) residual: Tensor,
    /// `[max(max_batch_tokens, max_logit_rows), widest linear input]`: the head's input is here too.
    pub(super) input: LinearInput,
    /// The same, for linear layers whose parts need inputs of their own.
    pub(super) spare: LinearInput,
    /// `[max_batch_tokens, qkv_width]`.
    pub(super) qkv: Tensor,
    /// `[max_batch_tokens, num_heads * head_dim]`.
    pub(super) attention: Tensor,
    /// `[max_batch_tokens, 2 * intermediate]`.
    pub(super) gate_up: Tensor,
    pub(super) meta: BatchMeta,
    /// Of attention, whatever the layer's window.
    pub(super) shape: AttentionShape,
    pub(super) rope: Rotary,
}

/// Cosines and sines, and which row of them each token has.
#[derive(Debug)]
pub(super) enum Rotary {
    /// `[max_model_len, head_dim]`, a row a position.
    Fixed(Tensor),
    /// For a base that depends on the text: made for every pass.
    Live {
        /// `[max_batch_tokens, head_dim]`, a row a token of the pass.
        table: Tensor,
        /// `[max_batch_tokens]`: 0, 1, 2, ...
        rows: Tensor,
        rope: RopeConfig,
        head_dim: usize,
        max_position_embeddings: usize,
    },
}

impl Rotary {
    fn new(device: &Device, config: &ModelConfig, limits: &Limits) -> Result<Rotary> {
        let &ModelConfig { rope, head_dim, max_position_embeddings, .. } = config;
        let (len, tokens) = (limits.max_model_len, limits.max_batch_tokens);
        if config.rope_length(len).is_none() {
            let table = || HostData::F32(rope_table(&rope, head_dim, max_position_embeddings, len));
            return Ok(Rotary::Fixed(device.upload_with(DType::F32, len * head_dim, table)?));
        }
        Ok(Rotary::Live {
            table: device.zeros(DType::F32, tokens * head_dim)?,
            rows: device.upload_with(DType::U32, tokens, || HostData::U32((0..tokens as u32).collect()))?,
            rope,
            head_dim,
            max_position_embeddings,
        })
    }

    /// Makes it that of the batch.
    pub(super) fn start(&mut self, device: &Device, batch: &Batch) -> Result<()> {
        let Rotary::Live { table, rope, head_dim, max_position_embeddings, .. } = self else { return Ok(()) };
        let tokens = batch.positions.iter().copied().zip(batch.rope_lengths.iter().copied());
        device.write(table, &HostData::F32(rope_rows(rope, *head_dim, *max_position_embeddings, tokens)))
    }

    /// The table and the row of each token, whose `positions` these are.
    pub(super) fn rows<'a>(&'a self, positions: &'a Tensor) -> (&'a Tensor, &'a Tensor) {
        match self {
            Rotary::Fixed(table) => (table, positions),
            Rotary::Live { table, rows, .. } => (table, rows),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Rotary::Fixed(table) => table.bytes(),
            Rotary::Live { table, rows, .. } => table.bytes() + rows.bytes(),
        }
    }
}

impl Workspace {
    pub(super) fn new(device: &Device, config: &ModelConfig, limits: &Limits) -> Result<Workspace> {
        let (tokens, dtype) = (limits.max_batch_tokens, device.activation_dtype());
        let input = || LinearInput::new(device, tokens.max(limits.max_logit_rows), widest_input(config));
        let shape = attention_shape(config, None);
        Ok(Workspace {
            residual: device.zeros(DType::F32, tokens * config.hidden_size)?,
            input: input()?,
            spare: input()?,
            qkv: device.zeros(dtype, tokens * shape.qkv_width())?,
            attention: device.zeros(dtype, tokens * shape.num_heads * shape.head_dim)?,
            gate_up: device.zeros(dtype, tokens * 2 * config.intermediate_size)?,
            meta: BatchMeta::new(device, limits.batch_sizes())?,
            shape,
            rope: Rotary::new(device, config, limits)?,
            device: device.clone(),
        })
    }

    /// Bytes of all its tensors.
    pub(super) fn bytes(&self) -> usize {
        let Workspace { device: _, shape: _, residual, input, spare, qkv, attention, gate_up, meta, rope } = self;
        let tensors = [residual, qkv, attention, gate_up].map(Tensor::bytes);
        tensors.iter().sum::<usize>() + input.bytes() + spare.bytes() + meta.bytes() + rope.bytes()
    }

    /// Moves the batch's metadata to the device.
    pub(super) fn start(&mut self, batch: &Batch) -> Result<()> {
        self.rope.start(&self.device, batch)?;
        batch.write(&self.device, &mut self.meta, &self.shape)
    }

    /// Replaces the residual stream.
    pub(super) fn set_residual(&mut self, residual: Vec<f32>) -> Result<()> {
        self.device.write(&mut self.residual, &HostData::F32(residual))
    }

    /// The first `len` elements of the residual stream.
    pub(super) fn read_residual(&self, len: usize) -> Result<Vec<f32>> {
        Ok(self.device.download(&self.residual, len)?.to_f32())
    }
}

/// What the output head and statistics of its logits compute with.
#[derive(Debug)]
pub(super) struct HeadScratch {
    pub(super) gathered: Tensor,    // [max_logit_rows, hidden] f32
    pub(super) logits: Tensor,      // [max_logit_rows, vocab] f32
    pub(super) ids: Tensor,         // [max_logit_rows] u32
    pub(super) stats: Tensor,       // [max_logit_rows, 3] f32
    pub(super) targets: Tensor,     // [max_logit_rows] u32
    pub(super) sample_rows: Tensor, // [max_logit_rows, 8] u32
}

impl HeadScratch {
    pub(super) fn new(device: &Device, config: &ModelConfig, limits: &Limits) -> Result<HeadScratch> {
        let rows = limits.max_logit_rows;
        Ok(HeadScratch {
            gathered: device.zeros(DType::F32, rows * config.hidden_size)?,
            logits: device.zeros(DType::F32, rows * config.vocab_size)?,
            ids: device.zeros(DType::U32, rows)?,
            stats: device.zeros(DType::F32, 3 * rows)?,
            targets: device.zeros(DType::U32, rows)?,
            sample_rows: device.zeros(DType::U32, SampleRow::WORDS * rows)?,
        })
    }

    /// Bytes of all its tensors.
    pub(super) fn bytes(&self) -> usize {
        let HeadScratch { gathered, logits, ids, stats, targets, sample_rows } = self;
        [gathered, logits, ids, stats, targets, sample_rows].map(Tensor::bytes).iter().sum()
    }
}

/// The KV cache of a runner with these limits.
pub(super) fn kv_cache(device: &Device, config: &ModelConfig, limits: &Limits) -> Result<KvCache> {
    KvCache::new(device, &attention_shape(config, None), config.num_layers, limits.kv_blocks)
}

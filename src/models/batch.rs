//! What one forward pass computes, [`Batch`], the sizes that bound it, [`Limits`], and its form on a device.

use crate::checkpoint::ModelConfig;
use crate::device::{AttentionShape, BatchMeta, BatchRows, BatchSizes, Device};
use crate::error::{Error, Result};
use crate::layers::KvCache;

/// Sizes that scratch memory and tables are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
    /// Most rows of one forward pass.
    pub max_batch_tokens: usize,
    /// Most sequences of one forward pass.
    pub max_seqs: usize,
    /// Most rows whose logits one pass computes.
    pub max_logit_rows: usize,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
}

impl Limits {
    /// Limits for `max_seqs` sequences of up to `max_model_len` tokens each, all resident at once.
    pub fn new(max_model_len: usize, max_batch_tokens: usize, max_seqs: usize) -> Limits {
        let kv_blocks = max_seqs * max_model_len.div_ceil(KvCache::BLOCK_SIZE);
        Limits { max_model_len, max_batch_tokens, max_seqs, max_logit_rows: max_seqs, kv_blocks }
    }
}

/// All that one forward pass needs from the host: a ragged batch, rows of its sequences concatenated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// `[m]` token ids.
    pub token_ids: Vec<u32>,
    /// `[m]` positions.
    pub positions: Vec<u32>,
    /// `[m]` lengths of the texts whose forward gives each token its rotary base, where that depends on it
    /// ([`ModelConfig::rope_length`]).
    pub rope_lengths: Vec<u32>,
    /// `[m]` KV slots.
    pub slot_mapping: Vec<u32>,
    /// Blocks of each sequence. Those that no query of this pass sees, being behind every layer's window, may have any number.
    pub block_tables: Vec<Vec<u32>>,
    /// Keys of each sequence, this pass's included.
    pub context_lens: Vec<u32>,
    /// First row of each sequence, then `m`.
    pub cu_seqlens_q: Vec<u32>,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<u32>,
}

impl Batch {
    /// Adds `token_ids` of a sequence that has `past` keys in the cache already and owns `blocks`. Logits are wanted
    /// of its last row when `logits`. Its first tokens are those of a prompt, later ones each follow a text of their own
    /// ([`Batch::of_prompt`] tells it otherwise).
    pub fn push(&mut self, token_ids: &[u32], past: usize, blocks: &[u32], logits: bool) {
        if self.cu_seqlens_q.is_empty() {
            self.cu_seqlens_q.push(0);
        }
        for (i, &id) in token_ids.iter().enumerate() {
            let position = past + i;
            let block = blocks[position / KvCache::BLOCK_SIZE] as usize;
            self.token_ids.push(id);
            self.positions.push(position as u32);
            self.rope_lengths.push(if past == 0 { token_ids.len() } else { position + 1 } as u32);
            self.slot_mapping.push((block * KvCache::BLOCK_SIZE + position % KvCache::BLOCK_SIZE) as u32);
        }
        self.block_tables.push(blocks.to_vec());
        self.context_lens.push((past + token_ids.len()) as u32);
        self.cu_seqlens_q.push(self.token_ids.len() as u32);
        if logits {
            self.logit_rows.push(self.token_ids.len() as u32 - 1);
        }
    }

    /// Says that the sequence added last has a prompt of `prompt` tokens, of which a part was added, or all and what was
    /// generated after it.
    pub fn of_prompt(&mut self, prompt: usize) {
        let first = self.cu_seqlens_q.iter().rev().nth(1).map_or(0, |&first| first as usize);
        for (length, &position) in self.rope_lengths[first..].iter_mut().zip(&self.positions[first..]) {
            *length = (position + 1).max(prompt as u32);
        }
    }

    /// Fails unless the batch is within `limits` and its ids are in the vocabulary.
    ///
    /// # Errors
    /// `Input`, naming what is too much.
    pub(super) fn check(&self, config: &ModelConfig, limits: &Limits) -> Result<()> {
        let m = self.token_ids.len();
        let too_many = |what: &str, got: usize, limit: usize| {
            Err(Error::input(what, format!("{got} in one pass, the limit planned at start is {limit}")))
        };
        if m > limits.max_batch_tokens {
            return too_many("batch tokens", m, limits.max_batch_tokens);
        }
        if self.block_tables.len() > limits.max_seqs {
            return too_many("sequences", self.block_tables.len(), limits.max_seqs);
        }
        if let Some(&id) = self.token_ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(Error::input("token ids", format!("{id} is outside the vocabulary of {}", config.vocab_size)));
        }
        match self.context_lens.iter().find(|&&len| len as usize > limits.max_model_len) {
            Some(&len) => too_many("context tokens", len as usize, limits.max_model_len),
            None => Ok(()),
        }
    }
}

impl Limits {
    /// Room for the metadata of any batch.
    pub(super) fn batch_sizes(&self) -> BatchSizes {
        BatchSizes {
            rows: self.max_batch_tokens,
            sequences: self.max_seqs,
            blocks: self.max_model_len.div_ceil(KvCache::BLOCK_SIZE),
            logit_rows: self.max_logit_rows,
        }
    }
}

impl Batch {
    /// The same with sequences behind its own that have no keys and write nowhere, `sequences` in all, each of one row.
    pub(super) fn padded(&self, sequences: usize) -> Batch {
        let mut batch = self.clone();
        for _ in self.context_lens.len()..sequences {
            batch.token_ids.push(0);
            batch.positions.push(0);
            batch.rope_lengths.push(1);
            batch.slot_mapping.push(u32::MAX);
            batch.block_tables.push(Vec::new());
            batch.context_lens.push(0);
            batch.cu_seqlens_q.push(batch.token_ids.len() as u32);
        }
        batch
    }

    /// Moves it to `meta`, for attention of `shape`.
    ///
    /// # Errors
    /// `Shape` when there is no room for it; the device's failure.
    pub(super) fn write(&self, device: &Device, meta: &mut BatchMeta, shape: &AttentionShape) -> Result<()> {
        let table_stride = self.block_tables.iter().map(Vec::len).max().unwrap_or(0).min(meta.max_blocks);
        let mut block_tables = vec![0; self.block_tables.len() * table_stride];
        for (row, blocks) in block_tables.chunks_exact_mut(table_stride.max(1)).zip(&self.block_tables) {
            let used = blocks.len().min(table_stride);
            row[..used].copy_from_slice(&blocks[..used]);
        }
        let rows = BatchRows {
            token_ids: &self.token_ids,
            positions: &self.positions,
            slot_mapping: &self.slot_mapping,
            block_tables: &block_tables,
            table_stride,
            context_lens: &self.context_lens,
            cu_seqlens_q: &self.cu_seqlens_q,
        };
        meta.fill(device, &rows, shape)
    }
}

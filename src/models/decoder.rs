//! The decoder: one plain loop over layers, every line one op of the device.

use crate::checkpoint::ModelConfig;
use crate::device::{Act, AttentionShape, BatchMeta, Device, Tensor, Write};
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::layers::{KvCache, Linear, RmsNorm};
use crate::quant::{ActQuant, LinearWeight};

use super::plan::{attention_shape, widest_input};
use super::rope::rope_table;

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
    /// `[m]` KV slots.
    pub slot_mapping: Vec<u32>,
    /// Blocks of each sequence.
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
    /// of its last row when `logits`.
    pub fn push(&mut self, token_ids: &[u32], past: usize, blocks: &[u32], logits: bool) {
        if self.cu_seqlens_q.is_empty() {
            self.cu_seqlens_q.push(0);
        }
        for (i, &id) in token_ids.iter().enumerate() {
            let position = past + i;
            let block = blocks[position / KvCache::BLOCK_SIZE] as usize;
            self.token_ids.push(id);
            self.positions.push(position as u32);
            self.slot_mapping.push((block * KvCache::BLOCK_SIZE + position % KvCache::BLOCK_SIZE) as u32);
        }
        self.block_tables.push(blocks.to_vec());
        self.context_lens.push((past + token_ids.len()) as u32);
        self.cu_seqlens_q.push(self.token_ids.len() as u32);
        if logits {
            self.logit_rows.push(self.token_ids.len() as u32 - 1);
        }
    }
}

/// Weights of one decoder layer.
#[derive(Debug)]
pub struct DecoderLayer {
    /// Norm before attention.
    pub input_norm: RmsNorm,
    /// q, k and v.
    pub qkv: Linear,
    /// Norms of query and key heads (Qwen3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// Norms before the attention output and before `down`, whose activation is then squared ReLU (BitNet).
    pub sub_norms: Option<(RmsNorm, RmsNorm)>,
    /// Attention output.
    pub o: Linear,
    /// Norm before the MLP.
    pub post_attention_norm: RmsNorm,
    /// gate and up.
    pub gate_up: Linear,
    /// MLP output.
    pub down: Linear,
}

/// Activations, allocated once for the largest batch.
#[derive(Debug)]
struct Scratch {
    residual: Tensor,  // [max_batch_tokens, hidden] f32
    act: Act,          // [max_batch_tokens, widest linear input]
    spare: Act,        // the same, for linears whose parts need inputs of their own
    qkv: Tensor,       // [max_batch_tokens, qkv_width]
    attention: Tensor, // [max_batch_tokens, num_heads * head_dim]
    gate_up: Tensor,   // [max_batch_tokens, 2 * intermediate]
    gathered: Tensor,  // [max_logit_rows, hidden] f32
    logits: Tensor,    // [max_logit_rows, vocab] f32
    ids: Tensor,       // [max_logit_rows] u32
    stats: Tensor,     // [max_logit_rows, 3] f32
    targets: Tensor,   // [max_logit_rows] u32
    meta: BatchMeta,
}

/// A decoder-only transformer on one device, its weights and its scratch.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    device: Device,
    limits: Limits,
    embedding: Tensor,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: Linear,
    rope: Tensor,
    scratch: Scratch,
}

impl Model {
    /// Puts the parts together and allocates scratch. `embedding` is `[vocab, hidden]`.
    pub fn assemble(
        config: ModelConfig,
        device: &Device,
        limits: Limits,
        embedding: HostData,
        layers: Vec<DecoderLayer>,
        norm: RmsNorm,
        head: LinearWeight,
    ) -> Result<Model> {
        let table = rope_table(&config.rope, config.head_dim, config.max_position_embeddings, limits.max_model_len);
        Ok(Model {
            embedding: device.upload(embedding)?,
            head: Linear::new(device, vec![head])?,
            rope: device.upload(HostData::F32(table))?,
            scratch: Scratch::new(&config, device, &limits)?,
            device: device.clone(),
            config,
            limits,
            layers,
            norm,
        })
    }

    /// Shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What its scratch was made for.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Weights of the decoder layers.
    pub fn layers(&self) -> &[DecoderLayer] {
        &self.layers
    }

    /// The output head.
    pub fn head(&self) -> &Linear {
        &self.head
    }

    /// Bytes of the weights that one decoded token reads: every linear layer, and the head.
    pub fn weight_bytes(&self) -> usize {
        let layer = |l: &DecoderLayer| l.qkv.bytes() + l.o.bytes() + l.gate_up.bytes() + l.down.bytes();
        self.layers.iter().map(layer).sum::<usize>() + self.head.bytes()
    }

    /// A KV cache of the planned size.
    pub fn new_cache(&self) -> Result<KvCache> {
        KvCache::new(&self.device, &attention_shape(&self.config, None), self.layers.len(), self.limits.kv_blocks)
    }

    /// One pass: all layers over the batch, then the logits of its `logit_rows`.
    ///
    /// # Errors
    /// `Input` when the batch exceeds the limits or holds an id outside the vocabulary.
    pub fn forward(&mut self, batch: &Batch, cache: &mut KvCache) -> Result<()> {
        self.begin(batch)?;
        for i in 0..self.layers.len() {
            self.layer(i, cache)?;
        }
        self.compute_logits(&batch.logit_rows)
    }

    /// Checks the batch, moves its metadata to the device and embeds its tokens into the residual stream.
    pub fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.check(batch)?;
        self.scratch.meta.fill(&self.device, batch)?;
        let (s, hidden) = (&mut self.scratch, self.config.hidden_size);
        self.device.embed(&mut s.residual, &self.embedding, &s.meta.token_ids, hidden, s.meta.m)
    }

    /// One decoder layer over the residual stream of the batch that `begin` set up.
    pub fn layer(&mut self, index: usize, cache: &mut KvCache) -> Result<()> {
        let (d, s, layer) = (&self.device, &mut self.scratch, &self.layers[index]);
        let m = s.meta.m;
        let shape = attention_shape(&self.config, self.config.windows.get(index).copied().flatten());
        let kv = &mut cache.layers[index];

        layer.input_norm.forward(d, &mut s.act, &s.residual, layer.qkv.emit(), m)?;
        layer.qkv.forward(d, &mut s.qkv, &s.act, &mut s.spare, Write::Store, m)?;
        if let Some((q, k)) = &layer.qk_norm {
            d.qk_norm(&mut s.qkv, q.weight(), k.weight(), q.eps(), &shape, m)?;
        }
        d.rope(&mut s.qkv, &self.rope, &s.meta.positions, &shape, m)?;
        d.kv_write(kv, &s.qkv, &s.meta.slot_mapping, &shape, m)?;
        self.attend(index, &shape, cache)?;

        let (d, s, layer) = (&self.device, &mut self.scratch, &self.layers[index]);
        layer.o.forward(d, &mut s.residual, &s.act, &mut s.spare, Write::Add, m)?;
        layer.post_attention_norm.forward(d, &mut s.act, &s.residual, layer.gate_up.emit(), m)?;
        if let Some((_, norm)) = &layer.sub_norms {
            layer.gate_up.forward(d, &mut s.gate_up, &s.act, &mut s.spare, Write::Store, m)?;
            norm.forward_inner(d, &mut s.spare, &s.gate_up, true, layer.down.emit(), m)?;
        } else {
            layer.gate_up.gate(d, &mut s.spare, &s.act, &mut s.gate_up, &layer.down, m)?;
        }
        layer.down.forward(d, &mut s.residual, &s.spare, &mut s.act, Write::Add, m)
    }

    /// Attention, its result in `act` as the output projection wants it.
    fn attend(&mut self, index: usize, shape: &AttentionShape, cache: &KvCache) -> Result<()> {
        let (d, s, layer) = (&self.device, &mut self.scratch, &self.layers[index]);
        let (kv, o, emit) = (&cache.layers[index], &layer.o, layer.o.emit());
        if let Some((norm, _)) = &layer.sub_norms {
            d.attention(&mut s.attention, &s.qkv, kv, &s.meta, shape)?;
            return norm.forward_inner(d, &mut s.act, &s.attention, false, emit, s.meta.m);
        }
        if emit.order.is_none() && emit.quant == ActQuant::None {
            return d.attention(&mut s.act.floats, &s.qkv, kv, &s.meta, shape);
        }
        d.attention(&mut s.attention, &s.qkv, kv, &s.meta, shape)?;
        d.quantize(&mut s.act, &s.attention, o.k(), emit, s.meta.m)
    }

    /// Final norm and output head for `rows` of the residual stream.
    pub fn compute_logits(&mut self, rows: &[u32]) -> Result<()> {
        if rows.len() > self.limits.max_logit_rows {
            return Err(Error::input(
                "logit rows",
                format!("{} exceed the limit {}", rows.len(), self.limits.max_logit_rows),
            ));
        }
        let (d, s, m) = (&self.device, &mut self.scratch, rows.len());
        s.meta.num_logit_rows = m;
        if m == 0 {
            return Ok(());
        }
        d.write(&mut s.meta.logit_rows, &HostData::U32(rows.to_vec()))?;
        d.gather_rows(&mut s.gathered, &s.residual, &s.meta.logit_rows, self.config.hidden_size, m)?;
        self.norm.forward(d, &mut s.act, &s.gathered, self.head.emit(), m)?;
        self.head.forward(d, &mut s.logits, &s.act, &mut s.spare, Write::Store, m)
    }

    /// The computed logits on the host, `[rows, vocab]`.
    pub fn logits(&self) -> Result<Vec<f32>> {
        let len = self.scratch.meta.num_logit_rows * self.config.vocab_size;
        Ok(self.device.download(&self.scratch.logits, len)?.to_f32())
    }

    /// For each computed row of logits: its best id (ties to the lowest) and that id's log-probability, and the
    /// log-probability of `targets[row]` (id 0 where `targets` is shorter).
    pub fn logits_stats(&mut self, targets: &[u32]) -> Result<Vec<LogitsStats>> {
        let (d, s, vocab) = (&self.device, &mut self.scratch, self.config.vocab_size);
        let m = s.meta.num_logit_rows;
        if m == 0 {
            return Ok(Vec::new());
        }
        let mut wanted = targets.to_vec();
        wanted.resize(m, 0);
        d.write(&mut s.targets, &HostData::U32(wanted))?;
        d.logits_stats(&mut s.ids, &mut s.stats, &s.logits, &s.targets, vocab, m)?;
        let stats = d.download(&s.stats, 3 * m)?.to_f32();
        let HostData::U32(ids) = d.download(&s.ids, m)? else {
            return Err(Error::Shape { op: "logits_stats", expected: "u32 ids".into(), got: "another type".into() });
        };
        let rows = ids.into_iter().zip(stats.chunks_exact(3));
        Ok(rows.map(|(id, s)| LogitsStats { id, logprob: s[0] - s[1], target_logprob: s[2] - s[1] }).collect())
    }

    /// The residual stream of the current batch on the host, `[m, hidden]`.
    pub fn residual(&self) -> Result<Vec<f32>> {
        Ok(self.device.download(&self.scratch.residual, self.scratch.meta.m * self.config.hidden_size)?.to_f32())
    }

    /// Replaces the residual stream of the current batch: how `verify` feeds one device another's state.
    pub fn set_residual(&mut self, residual: Vec<f32>) -> Result<()> {
        self.device.write(&mut self.scratch.residual, &HostData::F32(residual))
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        let (m, limits) = (batch.token_ids.len(), &self.limits);
        let too_many = |what: &str, got: usize, limit: usize| {
            Err(Error::input(what, format!("{got} in one pass, the limit planned at start is {limit}")))
        };
        if m > limits.max_batch_tokens {
            return too_many("batch tokens", m, limits.max_batch_tokens);
        }
        if batch.block_tables.len() > limits.max_seqs {
            return too_many("sequences", batch.block_tables.len(), limits.max_seqs);
        }
        if let Some(&id) = batch.token_ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            return Err(Error::input(
                "token ids",
                format!("{id} is outside the vocabulary of {}", self.config.vocab_size),
            ));
        }
        match batch.context_lens.iter().find(|&&len| len as usize > limits.max_model_len) {
            Some(&len) => too_many("context tokens", len as usize, limits.max_model_len),
            None => Ok(()),
        }
    }
}

/// What [`Model::logits_stats`] tells of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitsStats {
    /// Most likely id, the lowest on ties.
    pub id: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// Natural log-probability of the target id.
    pub target_logprob: f32,
}

impl Scratch {
    fn new(config: &ModelConfig, device: &Device, limits: &Limits) -> Result<Scratch> {
        let (tokens, rows, dtype) = (limits.max_batch_tokens, limits.max_logit_rows, device.activation_dtype());
        // The head's input shares `act`, so it must hold the logit rows too.
        let act_rows = tokens.max(rows);
        let act = || Act::new(device, act_rows, widest_input(config));
        let shape = attention_shape(config, None);
        Ok(Scratch {
            residual: device.zeros(DType::F32, tokens * config.hidden_size)?,
            act: act()?,
            spare: act()?,
            qkv: device.zeros(dtype, tokens * shape.qkv_width())?,
            attention: device.zeros(dtype, tokens * shape.num_heads * shape.head_dim)?,
            gate_up: device.zeros(dtype, tokens * 2 * config.intermediate_size)?,
            gathered: device.zeros(DType::F32, rows * config.hidden_size)?,
            logits: device.zeros(DType::F32, rows * config.vocab_size)?,
            ids: device.zeros(DType::U32, rows)?,
            stats: device.zeros(DType::F32, 3 * rows)?,
            targets: device.zeros(DType::U32, rows)?,
            meta: BatchMeta::new(device, limits)?,
        })
    }
}

impl BatchMeta {
    pub(super) fn new(device: &Device, limits: &Limits) -> Result<BatchMeta> {
        let max_blocks = limits.max_model_len.div_ceil(KvCache::BLOCK_SIZE);
        let zeros = |len: usize| device.zeros(DType::U32, len);
        Ok(BatchMeta {
            token_ids: zeros(limits.max_batch_tokens)?,
            positions: zeros(limits.max_batch_tokens)?,
            slot_mapping: zeros(limits.max_batch_tokens)?,
            block_tables: zeros(limits.max_seqs * max_blocks)?,
            context_lens: zeros(limits.max_seqs)?,
            cu_seqlens_q: zeros(limits.max_seqs + 1)?,
            logit_rows: zeros(limits.max_logit_rows)?,
            m: 0,
            batch: 0,
            max_blocks,
            max_q_len: 0,
            max_context_len: 0,
            num_logit_rows: 0,
        })
    }

    pub(super) fn fill(&mut self, device: &Device, batch: &Batch) -> Result<()> {
        let u32s = |v: &[u32]| HostData::U32(v.to_vec());
        device.write(&mut self.token_ids, &u32s(&batch.token_ids))?;
        device.write(&mut self.positions, &u32s(&batch.positions))?;
        device.write(&mut self.slot_mapping, &u32s(&batch.slot_mapping))?;
        device.write(&mut self.context_lens, &u32s(&batch.context_lens))?;
        device.write(&mut self.cu_seqlens_q, &u32s(&batch.cu_seqlens_q))?;
        let mut tables = vec![0; batch.block_tables.len() * self.max_blocks];
        for (row, blocks) in tables.chunks_exact_mut(self.max_blocks).zip(&batch.block_tables) {
            let used = blocks.len().min(row.len());
            row[..used].copy_from_slice(&blocks[..used]);
        }
        device.write(&mut self.block_tables, &HostData::U32(tables))?;
        self.m = batch.token_ids.len();
        self.batch = batch.block_tables.len();
        self.max_q_len = batch.cu_seqlens_q.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
        self.max_context_len = batch.context_lens.iter().copied().max().unwrap_or(0) as usize;
        Ok(())
    }
}

//! [`ModelRunner`]: what computes with a model's weights: scratch, metadata of the batch, KV cache.

use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::device::{Device, InputFormat, SampleRow, Tensor, Write};
use crate::dtype::HostData;
use crate::error::{Error, Result};
use crate::layers::KvCache;

use super::batch::{Batch, Limits};
use super::decode_graphs::DecodeGraphs;
use super::forward::unobserved;
use super::model::Model;
use super::plan::MemoryPlan;
use super::workspace::{HeadScratch, Workspace, kv_cache};

/// A model and all that passes over it need beside its weights, allocated once for its [`Limits`]; a pass allocates nothing.
///
/// What a pass leaves on the device is a value that borrows the runner ([`HiddenStates`], [`Logits`]), so that none is read that
/// was not computed.
#[derive(Debug)]
pub struct ModelRunner {
    /// Before what they were recorded with, so that they are dropped first.
    graphs: Option<DecodeGraphs>,
    model: Model,
    limits: Limits,
    workspace: Workspace,
    head: HeadScratch,
    cache: KvCache,
}

impl ModelRunner {
    /// Allocates everything that passes within `limits` take.
    ///
    /// # Errors
    /// `OutOfMemory`, or the device's own failure.
    pub fn new(model: Model, limits: Limits) -> Result<ModelRunner> {
        let (device, config) = (&model.device, &model.config);
        Ok(ModelRunner {
            graphs: DecodeGraphs::new(device, &limits)?,
            workspace: Workspace::new(device, config, &limits)?,
            head: HeadScratch::new(device, config, &limits)?,
            cache: kv_cache(device, config, &limits)?,
            limits,
            model,
        })
    }

    /// [`Model::load`] and [`ModelRunner::new`].
    ///
    /// # Errors
    /// Those of the two.
    pub fn load(
        checkpoint: &Checkpoint,
        device: &Device,
        limits: Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ModelRunner> {
        ModelRunner::new(Model::load(checkpoint, device, &limits, progress)?, limits)
    }

    /// The weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.model.device
    }

    /// What it was made for.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The KV cache, for its size.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// The longest sliding window of all layers: no query sees a key that is farther behind. `None` where a layer has none.
    pub fn window(&self) -> Option<usize> {
        let windows = self.model.spec.layers.iter().map(|layer| layer.attention.window);
        windows.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// Whether a token's keys and values depend on the tokens up to it alone, so that sequences that start alike may share them. Not so
    /// where the rotary base follows a sequence's length beyond the trained context.
    pub fn shares_prefixes(&self) -> bool {
        self.model.config.rope_length(self.limits.max_model_len).is_none()
    }

    /// Bytes of everything that it holds on its device, as a plan tells them before; nothing is packed any more.
    pub fn allocated(&self) -> MemoryPlan {
        let kv = self.cache.layers.iter().map(|layer| layer.k.bytes() + layer.v.bytes());
        MemoryPlan {
            weights: self.model.resident_bytes() as u64,
            kv_cache: kv.sum::<usize>() as u64,
            scratch: (self.workspace.bytes() + self.head.bytes() + self.graphs.as_ref().map_or(0, DecodeGraphs::bytes))
                as u64,
            packing: 0,
        }
    }

    /// One pass: all layers over the batch, then the logits of its `logit_rows`. Where every sequence decodes, a GPU replays a
    /// recorded step.
    ///
    /// # Errors
    /// `Input` when the batch exceeds the limits or holds an id outside the vocabulary.
    pub fn run(&mut self, batch: &Batch) -> Result<Logits<'_>> {
        let Some(bucket) = self.graphs.as_ref().and_then(|graphs| graphs.bucket(batch)) else {
            return self.forward(batch)?.into_logits(&batch.logit_rows);
        };
        batch.check(&self.model.config, &self.limits)?;
        self.decode(&batch.padded(bucket), bucket)?;
        Ok(Logits { rows: batch.logit_rows.len(), runner: self })
    }

    /// A step of `bucket` sequences of one row each: as it was recorded, or the first time op by op and then recorded.
    fn decode(&mut self, batch: &Batch, bucket: usize) -> Result<()> {
        let Some(graphs) = &mut self.graphs else { return Ok(()) };
        self.workspace.rope.start(&self.model.device, batch)?;
        batch.write(&self.model.device, &mut graphs.meta, &self.workspace.shape)?;
        if let Some(recorded) = graphs.get(bucket) {
            return recorded.replay();
        }
        std::mem::swap(&mut graphs.meta, &mut self.workspace.meta);
        let device = self.model.device.clone();
        let recorded = self.enqueue_decode(bucket).and_then(|()| device.record(|| self.enqueue_decode(bucket)));
        if let Some(graphs) = &mut self.graphs {
            std::mem::swap(&mut graphs.meta, &mut self.workspace.meta);
            if let Some(recorded) = recorded? {
                graphs.insert(bucket, recorded);
            }
        }
        Ok(())
    }

    /// All ops of such a step, over the batch that the workspace's metadata has.
    fn enqueue_decode(&mut self, rows: usize) -> Result<()> {
        self.enqueue_embed()?;
        (0..self.model.layers.len()).try_for_each(|index| self.run_layer(index))?;
        self.enqueue_head(rows)
    }

    fn enqueue_embed(&mut self) -> Result<()> {
        let w = &mut self.workspace;
        let (table, hidden) = (&self.model.embedding, self.model.config.hidden_size);
        w.device.embed(&mut w.residual, table, &w.meta.token_ids, hidden, w.meta.m)
    }

    /// Copies the first `m` of the metadata's `logit_rows` of the residual stream to where the final norm reads them.
    fn enqueue_gather(&mut self, m: usize) -> Result<()> {
        let ModelRunner { model, workspace: w, head, .. } = self;
        w.device.gather_rows(&mut head.gathered, &w.residual, &w.meta.logit_rows, model.config.hidden_size, m)
    }

    /// Final norm and output head of those rows.
    fn enqueue_head(&mut self, m: usize) -> Result<()> {
        self.enqueue_gather(m)?;
        let ModelRunner { model, workspace: w, head, .. } = self;
        model.norm.forward(&w.device, &mut w.input, &head.gathered, model.head.input_format(), m)?;
        model.head.forward(&w.device, &mut head.logits, &w.input, &mut w.spare, Write::Store, m)
    }

    /// All layers over the batch.
    ///
    /// # Errors
    /// As [`ModelRunner::run`].
    pub fn forward(&mut self, batch: &Batch) -> Result<HiddenStates<'_>> {
        self.embed(batch)?;
        (0..self.model.layers.len()).try_for_each(|index| self.run_layer(index))?;
        Ok(self.hidden_states(batch.token_ids.len()))
    }

    /// The embedded tokens of the batch, what reaches its first layer.
    ///
    /// # Errors
    /// As [`ModelRunner::run`].
    pub fn embed(&mut self, batch: &Batch) -> Result<HiddenStates<'_>> {
        batch.check(&self.model.config, &self.limits)?;
        self.workspace.start(batch)?;
        self.enqueue_embed()?;
        Ok(self.hidden_states(batch.token_ids.len()))
    }

    /// What layer number `index` alone makes of `residual` `[m, hidden]`, the stream of `batch` before it. Its keys and values
    /// replace those of the batch's slots.
    ///
    /// # Errors
    /// As [`ModelRunner::run`]; `Shape` when `residual` has not a row for each token.
    pub fn layer(&mut self, index: usize, batch: &Batch, residual: Vec<f32>) -> Result<HiddenStates<'_>> {
        batch.check(&self.model.config, &self.limits)?;
        self.check_rows("layer", residual.len(), batch.token_ids.len())?;
        self.workspace.start(batch)?;
        self.workspace.set_residual(residual)?;
        self.run_layer(index)?;
        Ok(self.hidden_states(batch.token_ids.len()))
    }

    /// Hidden states as a pass would leave them, of `residual` `[rows, hidden]`.
    ///
    /// # Errors
    /// `Shape` when they are no whole rows, or more than a pass has.
    pub fn restore(&mut self, residual: Vec<f32>) -> Result<HiddenStates<'_>> {
        let rows = residual.len() / self.model.config.hidden_size.max(1);
        self.check_rows("restore", residual.len(), rows.min(self.limits.max_batch_tokens))?;
        self.workspace.set_residual(residual)?;
        Ok(self.hidden_states(rows))
    }

    fn check_rows(&self, op: &'static str, len: usize, rows: usize) -> Result<()> {
        let hidden = self.model.config.hidden_size;
        if len == rows * hidden {
            return Ok(());
        }
        Err(Error::Shape { op, expected: format!("[{rows}, {hidden}]"), got: format!("{len} elements") })
    }

    fn run_layer(&mut self, index: usize) -> Result<()> {
        let (layer, kv) = (&self.model.layers[index], &mut self.cache.layers[index]);
        let shape = &self.model.spec.layers[index].attention;
        layer.forward(&mut self.workspace, shape, kv, &mut unobserved).map(drop)
    }

    fn hidden_states(&mut self, rows: usize) -> HiddenStates<'_> {
        HiddenStates { runner: self, rows }
    }
}

/// The residual stream of a pass, on the device.
#[derive(Debug)]
pub struct HiddenStates<'a> {
    runner: &'a mut ModelRunner,
    rows: usize,
}

impl<'a> HiddenStates<'a> {
    /// `[m, hidden]` on the host.
    ///
    /// # Errors
    /// The device's failure.
    pub fn read(&self) -> Result<Vec<f32>> {
        self.runner.workspace.read_residual(self.rows * self.runner.model.config.hidden_size)
    }

    /// Some `rows` after the final norm, `[rows, hidden]` on the host: what the output head reads, before any quantization of its input.
    ///
    /// # Errors
    /// As [`HiddenStates::logits`].
    pub fn normed(&mut self, rows: &[u32]) -> Result<Vec<f32>> {
        self.select(rows)?;
        self.runner.enqueue_gather(rows.len())?;
        let ModelRunner { model, workspace: w, head, .. } = &mut *self.runner;
        let (m, hidden) = (rows.len(), model.config.hidden_size);
        model.norm.forward(&w.device, &mut w.input, &head.gathered, InputFormat::FLOATS, m)?;
        Ok(w.device.download(&w.input.floats, m * hidden)?.to_f32())
    }

    /// Final norm and output head for some `rows`.
    ///
    /// # Errors
    /// `Input` when they are more than the limits allow at once, or not there.
    pub fn logits(&mut self, rows: &[u32]) -> Result<Logits<'_>> {
        HiddenStates { runner: &mut *self.runner, rows: self.rows }.into_logits(rows)
    }

    /// The same, giving up the hidden states.
    ///
    /// # Errors
    /// As [`HiddenStates::logits`].
    pub fn into_logits(mut self, rows: &[u32]) -> Result<Logits<'a>> {
        self.select(rows)?;
        if !rows.is_empty() {
            self.runner.enqueue_head(rows.len())?;
        }
        Ok(Logits { rows: rows.len(), runner: self.runner })
    }

    /// Tells the device which rows the final norm is to read.
    fn select(&mut self, rows: &[u32]) -> Result<()> {
        let ModelRunner { limits, workspace: w, .. } = &mut *self.runner;
        let m = rows.len();
        if m > limits.max_logit_rows {
            return Err(Error::input("logit rows", format!("{m} exceed the limit {}", limits.max_logit_rows)));
        }
        if let Some(row) = rows.iter().find(|&&row| row as usize >= self.rows) {
            return Err(Error::input("logit rows", format!("{row} of a pass of {} rows", self.rows)));
        }
        w.device.write(&mut w.meta.logit_rows, &HostData::U32(rows.to_vec()))
    }
}

/// Logits that a pass computed, on the device.
#[derive(Debug)]
pub struct Logits<'a> {
    runner: &'a mut ModelRunner,
    rows: usize,
}

/// What [`Logits::stats`] tells of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitsStats {
    /// Most likely id, the lowest on ties.
    pub id: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// Natural log-probability of the target id.
    pub target_logprob: f32,
}

/// A token that [`Logits::sample`] drew.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// Which; [`Device::NOT_FINITE`] and [`Device::NO_TOKEN`] where there is none.
    pub id: u32,
    /// Its natural log-probability.
    pub logprob: f32,
}

fn read_ids(device: &Device, ids: &Tensor, len: usize) -> Result<Vec<u32>> {
    match device.download(ids, len)? {
        HostData::U32(ids) => Ok(ids),
        other => Err(Error::Shape { op: "read_ids", expected: "u32 ids".into(), got: other.dtype().to_string() }),
    }
}

impl Logits<'_> {
    /// Columns of a row.
    pub fn vocab_size(&self) -> usize {
        self.runner.model.config.vocab_size
    }

    /// `[rows, vocab]` on the host.
    ///
    /// # Errors
    /// The device's failure.
    pub fn read(&self) -> Result<Vec<f32>> {
        let ModelRunner { model, head, .. } = &*self.runner;
        Ok(model.device.download(&head.logits, self.rows * model.config.vocab_size)?.to_f32())
    }

    /// One id for each row, drawn on the device as `rows` say, with the natural log-probability that the model itself gave it.
    ///
    /// # Errors
    /// The device's failure.
    pub fn sample(&mut self, rows: &[SampleRow]) -> Result<Vec<Drawn>> {
        let ModelRunner { model, head, .. } = &mut *self.runner;
        let (d, m, vocab) = (&model.device, self.rows.min(rows.len()), model.config.vocab_size);
        if m == 0 {
            return Ok(Vec::new());
        }
        d.write(&mut head.sample_rows, &HostData::U32(SampleRow::words(&rows[..m])))?;
        d.sample(&mut head.targets, &head.sample_rows, &head.logits, vocab, m)?;
        d.logits_stats(&mut head.ids, &mut head.stats, &head.logits, &head.targets, vocab, m)?;
        let ids = read_ids(d, &head.targets, m)?;
        let stats = d.download(&head.stats, 3 * m)?.to_f32();
        let drawn = ids.into_iter().zip(stats.chunks_exact(3));
        Ok(drawn.map(|(id, s)| Drawn { id, logprob: s[2] - s[1] }).collect())
    }

    /// For each row: its best id (ties to the lowest) and that id's log-probability, and the log-probability of
    /// `targets[row]` (id 0 where `targets` is shorter).
    ///
    /// # Errors
    /// The device's failure.
    pub fn stats(&mut self, targets: &[u32]) -> Result<Vec<LogitsStats>> {
        let ModelRunner { model, head, .. } = &mut *self.runner;
        let (d, m, vocab) = (&model.device, self.rows, model.config.vocab_size);
        if m == 0 {
            return Ok(Vec::new());
        }
        let mut wanted = targets.to_vec();
        wanted.resize(m, 0);
        d.write(&mut head.targets, &HostData::U32(wanted))?;
        d.logits_stats(&mut head.ids, &mut head.stats, &head.logits, &head.targets, vocab, m)?;
        let stats = d.download(&head.stats, 3 * m)?.to_f32();
        let ids = read_ids(d, &head.ids, m)?;
        let rows = ids.into_iter().zip(stats.chunks_exact(3));
        Ok(rows.map(|(id, s)| LogitsStats { id, logprob: s[0] - s[1], target_logprob: s[2] - s[1] }).collect())
    }
}

//! Calibration: one decoder layer at a time over a residual stream kept on the host, its steps shown to whoever asks.

use crate::checkpoint::ModelConfig;
use crate::device::{AttentionShape, Device, InputFormat};
use crate::dtype::HostData;
use crate::error::Result;
use crate::layers::{KvCache, Linear, RmsNorm};

use super::super::batch::{Batch, Limits};
use super::super::forward::Observer;
use super::super::layer::DecoderLayer;
use super::super::spec::attention_shape;
use super::super::workspace::Workspace;

/// What some windows of tokens at once take of a device.
#[derive(Debug)]
pub(super) struct Runner {
    workspace: Workspace,
    cache: KvCache,
    hidden: usize,
    context: usize,
    windows: usize,
}

impl Runner {
    /// For `windows` windows of `context` tokens at a time.
    pub(super) fn new(device: &Device, config: &ModelConfig, context: usize, windows: usize) -> Result<Runner> {
        let limits = Limits::new(context, context * windows, windows);
        Ok(Runner {
            workspace: Workspace::new(device, config, &limits)?,
            cache: KvCache::new(device, &attention_shape(config, None), 1, limits.kv_blocks)?,
            hidden: config.hidden_size,
            context,
            windows,
        })
    }

    /// `[tokens, hidden]` embeddings of `ids`, the first residual stream.
    pub(super) fn embed(&self, ids: &[u32], embedding: &HostData) -> Vec<f32> {
        let table = embedding.to_f32();
        ids.iter().flat_map(|&id| &table[id as usize * self.hidden..][..self.hidden]).copied().collect()
    }

    /// Runs a layer over all windows of `residual` `[windows * context, hidden]`, which becomes its output unless `observer` ends
    /// it before.
    pub(super) fn run(
        &mut self,
        layer: &DecoderLayer<Linear, RmsNorm>,
        shape: &AttentionShape,
        residual: &mut [f32],
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        for part in residual.chunks_mut(self.rows()) {
            self.start(part)?;
            if layer.forward(&mut self.workspace, shape, &mut self.cache.layers[0], observer)?.is_continue() {
                part.copy_from_slice(&self.workspace.read_residual(part.len())?);
            }
        }
        Ok(())
    }

    /// Shows the final norm of the residual stream `[windows * context, hidden]`.
    pub(super) fn normalize(&mut self, norm: &RmsNorm, residual: &[f32], see: &mut dyn FnMut(&[f32])) -> Result<()> {
        for part in residual.chunks(self.rows()) {
            let (w, m) = (&mut self.workspace, part.len() / self.hidden);
            w.set_residual(part.to_vec())?;
            norm.forward(&w.device, &mut w.input, &w.residual, InputFormat::FLOATS, m)?;
            see(&w.device.download(&w.input.floats, part.len())?.to_f32());
        }
        Ok(())
    }

    /// Elements of the residual stream that are computed at once.
    fn rows(&self) -> usize {
        self.context * self.windows * self.hidden
    }

    /// Moves whole windows of the residual stream to the device; ids are not needed there.
    fn start(&mut self, residual: &[f32]) -> Result<()> {
        let windows = (residual.len() / self.hidden / self.context) as u32;
        let blocks = self.context.div_ceil(KvCache::BLOCK_SIZE) as u32;
        let mut batch = Batch::default();
        for w in 0..windows {
            let blocks: Vec<u32> = (w * blocks..(w + 1) * blocks).collect();
            batch.push(&vec![0; self.context], 0, &blocks, false);
        }
        self.workspace.start(&batch)?;
        self.workspace.set_residual(residual.to_vec())
    }
}

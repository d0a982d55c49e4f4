//! The forward pass of a decoder layer on a device: one plain list of ops, with a tap for those who watch it.

use std::ops::ControlFlow;

use crate::device::{AttentionShape, HeadNorms, InputFormat, KvLayer, LinearInput, RopeRows, Tensor, Write};
use crate::error::Result;
use crate::layers::{Linear, RmsNorm};
use crate::quant::ActQuant;

use super::layer::{Attention, DecoderLayer, DenseMlp, Mlp};
use super::role::Slot;
use super::workspace::Workspace;

/// What an observer of a layer sees, in the order in which it comes about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step<'a> {
    /// The input of a slot's linear layers, `rows` rows in the format that they read.
    Input {
        /// Whose.
        slot: Slot,
        /// `[rows, k]`.
        input: &'a LinearInput,
        /// Tokens.
        rows: usize,
    },
    /// Queries, keys and values side by side, after the rotary embedding.
    Qkv {
        /// `[rows, qkv_width]` in the activation type.
        qkv: &'a Tensor,
        /// Tokens.
        rows: usize,
    },
}

/// Sees every step of a layer; `Break` ends the layer there.
pub(super) type Observer<'a> = dyn FnMut(Step<'_>) -> Result<ControlFlow<()>> + 'a;

/// Who does not look.
pub(super) fn unobserved(_: Step<'_>) -> Result<ControlFlow<()>> {
    Ok(ControlFlow::Continue(()))
}

impl DecoderLayer<Linear, RmsNorm> {
    /// Bytes of its linear layers.
    pub fn weight_bytes(&self) -> usize {
        self.slots().map(Linear::bytes).sum()
    }

    /// Runs the layer over the residual stream of the batch that `w` was started with, its keys and values going to `kv`. `Break`
    /// when `observer` ended it, the residual stream then being of no use.
    pub(super) fn forward(
        &self,
        w: &mut Workspace,
        shape: &AttentionShape,
        kv: &mut KvLayer,
        observer: &mut Observer<'_>,
    ) -> Result<ControlFlow<()>> {
        let (d, m) = (w.device.clone(), w.meta.m);
        let (attention, Mlp::Dense(mlp)) = (&self.attention, &self.mlp);

        self.input_norm.forward(&d, &mut w.input, &w.residual, attention.qkv.input_format(), m)?;
        if observer(Step::Input { slot: Slot::Qkv, input: &w.input, rows: m })?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        attention.qkv.forward(&d, &mut w.qkv, &w.input, &mut w.spare, Write::Store, m)?;
        attention.attend(w, shape, kv, observer)?;
        if observer(Step::Input { slot: Slot::O, input: &w.input, rows: m })?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        attention.o.forward(&d, &mut w.residual, &w.input, &mut w.spare, Write::Add, m)?;

        self.post_attention_norm.forward(&d, &mut w.input, &w.residual, mlp.gate_up.input_format(), m)?;
        if observer(Step::Input { slot: Slot::GateUp, input: &w.input, rows: m })?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        mlp.gate(w)?;
        if observer(Step::Input { slot: Slot::Down, input: &w.spare, rows: m })?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        mlp.down.forward(&d, &mut w.residual, &w.spare, &mut w.input, Write::Add, m)?;
        Ok(ControlFlow::Continue(()))
    }
}

impl Attention<Linear, RmsNorm> {
    /// From `w.qkv` to `w.input` as the output projection reads it.
    fn attend(
        &self,
        w: &mut Workspace,
        shape: &AttentionShape,
        kv: &mut KvLayer,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let (d, m, format) = (&w.device, w.meta.m, self.o.input_format());
        let norm = self.qk_norm.as_ref();
        let norm = norm.map(|norm| HeadNorms { q: norm.q.weight(), k: norm.k.weight(), eps: norm.q.eps() });
        let (table, positions) = w.rope.rows(&w.meta.positions);
        let rows = RopeRows { table, positions, slot_mapping: &w.meta.slot_mapping };
        d.rope_kv_write(kv, &mut w.qkv, norm, rows, shape, m)?;
        let _ = observer(Step::Qkv { qkv: &w.qkv, rows: m })?; // nothing to save by ending here
        if let Some(norm) = &self.sub_norm {
            d.attention(&mut w.attention, &w.qkv, kv, &w.meta, shape)?;
            return norm.forward_inner(d, &mut w.input, &w.attention, false, format, m);
        }
        if format.order.is_none() && format.quant == ActQuant::None {
            d.attention(&mut w.input.floats, &w.qkv, kv, &w.meta, shape)?;
            w.input.record(InputFormat::FLOATS, m, self.o.k());
            return Ok(());
        }
        d.attention(&mut w.attention, &w.qkv, kv, &w.meta, shape)?;
        d.quantize(&mut w.input, &w.attention, self.o.k(), format, m)
    }
}

impl DenseMlp<Linear, RmsNorm> {
    /// From `w.input` to `w.spare` as `down` reads it.
    fn gate(&self, w: &mut Workspace) -> Result<()> {
        let (d, m) = (&w.device, w.meta.m);
        let Some(norm) = &self.sub_norm else {
            return self.gate_up.gate(d, &mut w.spare, &w.input, &mut w.gate_up, &self.down, m);
        };
        self.gate_up.forward(d, &mut w.gate_up, &w.input, &mut w.spare, Write::Store, m)?;
        norm.forward_inner(d, &mut w.spare, &w.gate_up, true, self.down.input_format(), m)
    }
}

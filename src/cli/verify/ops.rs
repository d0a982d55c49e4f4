//! Every op of one layer on a device, each fed what the specification's own previous op gave.

use crate::device::cpu::reference::{self, PagedKv, Rounding};
use crate::device::{
    BatchMeta, BatchRows, Device, HeadNorms, InputFormat, KvLayer, LinearInput, RopeRows, Tensor, Write,
};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::layers::{Linear, RmsNorm};
use crate::models::reference::{Arithmetic, ReferenceLayer, ReferenceLinear, Rows, Steps, fill_cache, paged};
use crate::models::{Attention, DecoderLayer, DenseMlp, Mlp, Projections};
use crate::quant::ActQuant;

use super::report::Report;

/// A device and the sizes that the checks of one layer share.
pub(super) struct OpChecks<'a> {
    pub(super) device: &'a Device,
    pub(super) rows: &'a Rows,
    /// `[positions, head_dim]` cosines and sines.
    pub(super) rope: &'a [f32],
    pub(super) num_blocks: usize,
    pub(super) report: &'a mut Report,
}

impl OpChecks<'_> {
    /// All ops of a layer whose input is `x`, in the order they run. `steps` are the specification's.
    pub(super) fn layer(
        &mut self,
        layer: &DecoderLayer<Linear, RmsNorm>,
        host: &ReferenceLayer,
        x: &[f32],
        steps: &Steps,
    ) -> Result<()> {
        let (attention, Mlp::Dense(mlp)) = (&layer.attention, &layer.mlp);
        let (host_attention, Mlp::Dense(host_mlp)) = (&host.parts.attention, &host.parts.mlp);
        self.rms_norm("input_norm", &layer.input_norm, &host.parts.input_norm, host.eps, x)?;
        self.linear(&attention.qkv, &host_attention.qkv, &steps.normed, Write::Store)?;
        self.rope_kv_write(&layer.attention, host, steps)?;
        self.attention(host, steps)?;
        if let (Some(norm), Some(weight)) = (&attention.sub_norm, &host_attention.sub_norm) {
            self.sub_norm("attn_sub_norm", norm, weight, host.eps, &steps.attended, false)?;
        }
        self.linear(&attention.o, &host_attention.o, &steps.attention_out, Write::Add)?;
        self.rms_norm(
            "post_attention_norm",
            &layer.post_attention_norm,
            &host.parts.post_attention_norm,
            host.eps,
            &steps.middle,
        )?;
        if mlp.gate_up.is_gate_fused() {
            self.gate(mlp, host_mlp, &steps.mlp_normed)?;
        } else {
            self.linear(&mlp.gate_up, &host_mlp.gate_up, &steps.mlp_normed, Write::Store)?;
        }
        if let (Some(norm), Some(weight)) = (&mlp.sub_norm, &host_mlp.sub_norm) {
            self.sub_norm("ffn_sub_norm", norm, weight, host.eps, &steps.gate_up, true)?;
        } else {
            let k = mlp.down.k();
            let gate_up = self.rounded(&steps.gate_up);
            let mut act = self.act(k)?;
            self.device.silu_mul(&mut act, &self.upload(&gate_up)?, k, InputFormat::FLOATS, self.m())?;
            self.bounded("silu_mul", &act.floats, |rounding| reference::silu_mul(&gate_up, k, rounding))?;
        }
        self.linear(&mlp.down, &host_mlp.down, &steps.activated, Write::Add)
    }

    fn m(&self) -> usize {
        self.rows.token_ids.len()
    }

    fn dtype(&self) -> DType {
        self.device.activation_dtype()
    }

    /// Values as the device holds them between ops.
    fn rounded(&self, x: &[f32]) -> Vec<f32> {
        x.iter().map(|&x| self.dtype().round(x)).collect()
    }

    fn upload(&self, x: &[f32]) -> Result<Tensor> {
        self.device.upload(HostData::from_f32(self.dtype(), x.to_vec()))
    }

    fn act(&self, k: usize) -> Result<LinearInput> {
        LinearInput::new(self.device, self.m(), k)
    }

    fn bounded(&mut self, op: &str, got: &Tensor, of: impl Fn(Rounding) -> Vec<f64>) -> Result<()> {
        let exact = of(Rounding::Exact);
        let got = self.device.download(got, exact.len())?.to_f32();
        self.report.bounded(op, "", &got, &exact, &of(Rounding::As(self.dtype())), self.dtype());
        Ok(())
    }

    fn rms_norm(&mut self, op: &str, norm: &RmsNorm, weight: &[f32], eps: f32, x: &[f32]) -> Result<()> {
        let mut act = self.act(weight.len())?;
        norm.forward(
            self.device,
            &mut act,
            &self.device.upload(HostData::F32(x.to_vec()))?,
            InputFormat::FLOATS,
            self.m(),
        )?;
        self.bounded(op, &act.floats, |rounding| reference::rms_norm(x, weight, eps, rounding))
    }

    fn sub_norm(&mut self, op: &str, norm: &RmsNorm, weight: &[f32], eps: f32, x: &[f32], gated: bool) -> Result<()> {
        let x = self.rounded(x);
        let mut act = self.act(weight.len())?;
        norm.forward_inner(self.device, &mut act, &self.upload(&x)?, gated, InputFormat::FLOATS, self.m())?;
        self.bounded(op, &act.floats, |rounding| reference::sub_norm(&x, gated, weight, eps, rounding))
    }

    /// A linear layer and the op that prepares its input: codes and int8 results bit for bit, the rest bounded.
    fn linear(
        &mut self,
        linear: &Linear,
        weights: &Projections<ReferenceLinear>,
        x: &[f32],
        write: Write,
    ) -> Result<()> {
        let (m, k, n) = (self.m(), linear.k(), linear.n());
        let x = self.rounded(x);
        let (mut act, mut spare) = (self.act(k)?, self.act(k)?);
        let format = linear.input_format();
        self.device.quantize(&mut act, &self.upload(&x)?, k, format, m)?;
        if format.quant != ActQuant::None {
            let expected = reference::quantize_rows(&weights.first().ordered(&x), k, format.quant);
            let codes = self.device.download(&act.codes, m * k)?.to_f32();
            let expected_codes: Vec<f32> = expected.codes.iter().map(|&c| f32::from(c)).collect();
            self.report.exact("quantize codes", "", &codes, &expected_codes);
            let scales = self.device.download(&act.scales, m)?.to_f32();
            self.report.exact("quantize scales", "", &scales, &expected.scales);
        }
        let out_dtype = if write == Write::Add { DType::F32 } else { self.dtype() };
        let mut out = self.device.zeros(out_dtype, m * n)?;
        linear.forward(self.device, &mut out, &act, &mut spare, write, m)?;
        let out = self.device.download(&out, m * n)?.to_f32();
        let kernels: Vec<String> = linear.parts().iter().map(|part| part.kernel(m)).collect();
        let mut offset = 0;
        for named in weights.iter() {
            let width = named.weight.n();
            let got: Vec<f32> = out.chunks_exact(n).flat_map(|row| &row[offset..offset + width]).copied().collect();
            let detail = format!("{}; {}", named.weight.scheme(), kernels.join(" + "));
            let exact = named.forward(&x, Arithmetic::EXACT);
            if named.weight.activation == ActQuant::None {
                let twin = named.forward(&x, Arithmetic::twin(self.dtype()));
                self.report.bounded(&named.name, &detail, &got, &exact, &twin, self.dtype());
            } else {
                let expected: Vec<f32> = exact.iter().map(|&y| out_dtype.round(y as f32)).collect();
                self.report.exact(&named.name, &detail, &got, &expected);
            }
            offset += width;
        }
        Ok(())
    }

    /// gate and up with SwiGLU fused: of int8 activations what `down` takes, bit for bit; else the floats, bounded.
    fn gate(
        &mut self,
        layer: &DenseMlp<Linear, RmsNorm>,
        host: &DenseMlp<Projections<ReferenceLinear>, Vec<f32>>,
        x: &[f32],
    ) -> Result<()> {
        let (m, k, width) = (self.m(), layer.gate_up.k(), layer.down.k());
        let x = self.rounded(x);
        let (mut act, mut out) = (self.act(k)?, self.act(width)?);
        self.device.quantize(&mut act, &self.upload(&x)?, k, layer.gate_up.input_format(), m)?;
        let mut scratch = self.device.zeros(self.dtype(), m * width)?;
        layer.gate_up.gate(self.device, &mut out, &act, &mut scratch, &layer.down, m)?;

        let kernels: Vec<String> = layer.gate_up.parts().iter().map(|part| part.kernel(m)).collect();
        let detail = format!("SwiGLU; {}; {}", host.gate_up.first().weight.scheme(), kernels.join(" + "));
        let name = &host.gate_up.first().name;
        let of = |how: Arithmetic| host.gate_up.iter().map(|linear| linear.forward(&x, how)).collect::<Vec<_>>();
        let exact = of(Arithmetic::EXACT);
        if host.gate_up.first().weight.activation == ActQuant::None {
            let floats = if layer.down.input_format().quant == ActQuant::None { &out.floats } else { &scratch };
            let got = self.device.download(floats, m * width)?.to_f32();
            let swiglu = |of: &[Vec<f64>]| -> Vec<f64> {
                let y: Vec<f64> = of[0].iter().zip(&of[1]).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                host.down.first().ordered(&y)
            };
            let twin = swiglu(&of(Arithmetic::twin(self.dtype())));
            self.report.bounded(name, &detail, &got, &swiglu(&exact), &twin, self.dtype());
            return Ok(());
        }
        let y: Vec<f32> =
            exact[0].iter().zip(&exact[1]).map(|(&g, &u)| reference::swiglu(g as f32, u as f32)).collect();
        let y = host.down.first().ordered(&y);
        match layer.down.input_format().quant {
            ActQuant::None => {
                let got = self.device.download(&out.floats, m * width)?.to_f32();
                self.report.exact(name, &detail, &got, &self.rounded(&y));
            }
            quant => {
                let direct = matches!(quant, ActQuant::StaticPerTensor { .. });
                let y = if direct { y } else { self.rounded(&y) };
                let expected = reference::quantize_rows(&y, width, quant);
                let codes: Vec<f32> = expected.codes.iter().map(|&c| f32::from(c)).collect();
                let got = self.device.download(&out.codes, m * width)?.to_f32();
                self.report.exact(name, &detail, &got, &codes);
                let scales = self.device.download(&out.scales, m)?.to_f32();
                self.report.exact(&format!("{name} scales"), &detail, &scales, &expected.scales);
            }
        }
        Ok(())
    }

    /// Norms of heads, rotation, and the cache, which must hold what was rotated.
    fn rope_kv_write(
        &mut self,
        attention: &Attention<Linear, RmsNorm>,
        host: &ReferenceLayer,
        steps: &Steps,
    ) -> Result<()> {
        let (m, shape, rows, dtype, rope) = (self.m(), &host.shape, self.rows, self.dtype(), self.rope);
        let input = self.rounded(&steps.qkv);
        let mut qkv = self.upload(&input)?;
        let len = self.num_blocks * shape.block_size * shape.num_kv_heads * shape.head_dim;
        let mut cache = KvLayer { k: self.device.zeros(dtype, len)?, v: self.device.zeros(dtype, len)? };
        let u32s = |values: &[u32]| self.device.upload(HostData::U32(values.to_vec()));
        let (positions, slot_mapping) = (u32s(&rows.positions)?, u32s(&rows.slots)?);
        let table = self.device.upload(HostData::F32(rope.to_vec()))?;
        let of_rows = RopeRows { table: &table, positions: &positions, slot_mapping: &slot_mapping };
        let norm = attention.qk_norm.as_ref();
        let norm = norm.map(|norm| HeadNorms { q: norm.q.weight(), k: norm.k.weight(), eps: host.eps });
        self.device.rope_kv_write(&mut cache, &mut qkv, norm, of_rows, shape, m)?;
        self.bounded("rope_kv_write", &qkv, |rounding| {
            let normed = host.parts.attention.qk_norm.as_ref().map(|norm| {
                let normed = reference::qk_norm(&input, &norm.q, &norm.k, host.eps, shape, rounding);
                normed.into_iter().map(|x| x as f32).collect::<Vec<_>>()
            });
            reference::rope(normed.as_deref().unwrap_or(&input), rope, &rows.positions, shape, rounding)
        })?;
        let rotated = self.device.download(&qkv, input.len())?.to_f32();
        let (k, v) = fill_cache(&rotated, rows, shape, dtype, self.num_blocks);
        for (name, got, expected) in [("cached keys", &cache.k, &k), ("cached values", &cache.v, &v)] {
            let got = self.device.download(got, expected.len())?.to_f32();
            self.report.exact(name, "", &got, &expected.to_f32());
        }
        Ok(())
    }

    /// Attention over the cache: all rows at once as for a prompt, then each as in decoding.
    fn attention(&mut self, host: &ReferenceLayer, steps: &Steps) -> Result<()> {
        let (m, shape, rows, dtype) = (self.m(), &host.shape, self.rows, self.dtype());
        let rotated = self.rounded(&steps.rotated);
        let (k, v) = fill_cache(&rotated, rows, shape, dtype, self.num_blocks);
        let cache = KvLayer { k: self.device.upload(k.clone())?, v: self.device.upload(v.clone())? };

        self.attend("attention prefill", &rotated, &cache, &paged(&k, &v, rows), host)?;
        // Every row once more as a sequence of its own that decodes its last token.
        let prompt = paged(&k, &v, rows);
        let sequences = || rows.starts.windows(2).enumerate().flat_map(|(b, w)| (w[0]..w[1]).map(move |_| b));
        let tables: Vec<u32> = sequences()
            .flat_map(|b| &prompt.block_tables[b * prompt.max_blocks..][..prompt.max_blocks])
            .copied()
            .collect();
        let lens: Vec<u32> = rows.positions.iter().map(|p| p + 1).collect();
        let starts: Vec<u32> = (0..=m as u32).collect();
        let kv = PagedKv { block_tables: &tables, context_lens: &lens, cu_seqlens_q: &starts, ..prompt };
        self.attend("attention decode", &rotated, &cache, &kv, host)
    }

    fn attend(
        &mut self,
        op: &str,
        qkv: &[f32],
        cache: &KvLayer,
        kv: &PagedKv<'_>,
        host: &ReferenceLayer,
    ) -> Result<()> {
        let shape = &host.shape;
        let m = qkv.len() / shape.qkv_width();
        let rows = BatchRows {
            token_ids: &vec![0; m],
            positions: &vec![0; m],
            slot_mapping: &vec![u32::MAX; m],
            block_tables: kv.block_tables,
            table_stride: kv.max_blocks,
            context_lens: kv.context_lens,
            cu_seqlens_q: kv.cu_seqlens_q,
        };
        let meta = BatchMeta::of(self.device, &rows, shape)?;
        let mut out = self.device.zeros(self.dtype(), m * shape.num_heads * shape.head_dim)?;
        self.device.attention(&mut out, &self.upload(qkv)?, cache, &meta, shape)?;
        self.bounded(op, &out, |rounding| reference::attention(qkv, kv, shape, rounding))
    }
}

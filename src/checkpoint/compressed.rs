//! compressed-tensors checkpoints (llm-compressor): packed and int8-stored integer weights, and FP8 ones; docs/formats.md section 4.

use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::quant::pack::Packing;
use crate::quant::{ActQuant, Codes, Encoding, LinearWeight, QuantWeight, Scheme, Storage, Stored, Weight};

pub(super) use super::compressed_config::CompressedTensors;
use super::compressed_config::{Activations, Format, GroupScheme, Strategy};
use super::fp8::{self, Block};
use super::module::{FLOATS, Module, Sizes, WORDS};
use super::order::{self, sort_by_group, transpose};

const INTEGERS: &[Dtype] = &[Dtype::I8, Dtype::I32, Dtype::I64];

impl CompressedTensors {
    fn scheme_for(&self, m: &Module) -> Result<Option<&GroupScheme>> {
        self.scheme_of(m.name).map_err(|reason| m.shards().error(m.name, reason))
    }

    pub(super) fn check(&self, m: &mut Module) -> Result<Option<Sizes>> {
        let Some(s) = self.scheme_for(m)? else { return Ok(m.check_dense()) };
        let sizes = match s.format {
            Format::Packed => self.check_packed(m, s)?,
            Format::Int => m.matrix("weight", &[Dtype::I8]).map(|(n, k)| Sizes { n, k }),
            Format::Float => return Ok(s.check_float(m)),
        };
        let Some(Sizes { n, k }) = sizes else { return Ok(None) };
        let groups = s.groups(k);
        let shapes: &[&[usize]] = match s.strategy {
            Strategy::Tensor => &[&[1], &[], &[1, 1]],
            Strategy::Channel => &[&[n, 1], &[n]],
            Strategy::Group(_) | Strategy::Block(_) => &[&[n, groups]],
        };
        m.need("weight_scale", FLOATS, shapes);
        match (s.packs_zeros(), s.symmetric) {
            (true, false) => {
                let shapes = [Packing::Dense, Packing::Aligned].map(|p| [p.words(n, s.bits), groups]);
                m.need("weight_zero_point", WORDS, &[&shapes[0], &shapes[1]]);
            }
            (false, false) => m.need("weight_zero_point", INTEGERS, shapes),
            (_, true) => {
                m.optional("weight_zero_point", INTEGERS, shapes);
            }
        }
        if let Activations::StaticPerTensor { symmetric } = s.activations {
            m.need("input_scale", FLOATS, &[&[1], &[], &[1, 1]]);
            if symmetric {
                m.optional("input_zero_point", INTEGERS, &[&[1], &[], &[1, 1]]);
            } else {
                m.need("input_zero_point", INTEGERS, &[&[1], &[], &[1, 1]]);
            }
        }
        if s.act_order {
            m.optional("weight_g_idx", &[Dtype::I32, Dtype::I64], &[&[k]]);
        }
        m.optional("bias", FLOATS, &[&[n]]);
        Ok(Some(Sizes { n, k }))
    }

    /// Sizes from `weight_shape`, which the words must fit in one of the two packings.
    fn check_packed(&self, m: &mut Module, s: &GroupScheme) -> Result<Option<Sizes>> {
        let Some((n, words)) = m.matrix("weight_packed", WORDS) else { return Ok(None) };
        if !m.optional("weight_shape", &[Dtype::I64, Dtype::I32], &[&[2]]) {
            m.problem("weight_shape", "missing; it holds the two sizes of the weight");
        }
        if !m.problems.is_empty() {
            return Ok(None);
        }
        let shape = m.integers("weight_shape")?;
        let k = shape[1];
        let fits = shape[0] == n as i64 && k > 0 && k <= 1 << 32 && packing(words, k as usize, s.bits, true).is_some();
        if !fits {
            m.problem(
                "weight_shape",
                format!("{shape:?} does not fit weight_packed [{n}, {words}] of {} bits", s.bits),
            );
            return Ok(None);
        }
        Ok(Some(Sizes { n, k: k as usize }))
    }

    pub(super) fn scheme(&self, m: &Module, sizes: Sizes) -> Result<Scheme> {
        let Some(s) = self.scheme_for(m)? else { return Ok(m.dense_scheme()) };
        if s.format == Format::Float {
            return Ok(s.block().scheme(sizes));
        }
        let k = sizes.k;
        Ok(Scheme {
            weight_bits: s.bits,
            group_size: Some(s.group_size(k)).filter(|&g| g < k),
            symmetric: s.symmetric,
            encoding: Encoding::Affine,
            act_order: s.order(m, k)?.is_some(),
            activation: s.activation(m)?,
        })
    }

    pub(super) fn read(&self, m: &Module, sizes: Sizes) -> Result<LinearWeight> {
        let Some(s) = self.scheme_for(m)? else { return m.read_dense(sizes) };
        let Sizes { n, k } = sizes;
        let (codes, packing): (Codes, Packing) = match s.format {
            Format::Packed => {
                let words = m.shared("weight_packed")?;
                let per_row = words.len() / 4 / n;
                let packing = packing(per_row, k, s.bits, self.dense_streams).unwrap_or(Packing::Dense);
                (Stored::new(words, n, k, s.bits, Storage::Rows(packing)).into(), packing)
            }
            // Every byte is a code of 8 bits.
            Format::Int if s.bits == 8 => {
                (Stored::new(m.shared("weight")?, n, k, 8, Storage::Bytes { offset: 128 }).into(), Packing::Dense)
            }
            Format::Int => (s.unsigned_bytes(m, "weight")?.into(), Packing::Dense),
            Format::Float => return s.block().read(m, sizes, "weight_scale"),
        };
        let groups = s.groups(k);
        let scales = spread(m.scales("weight_scale")?, n * groups);
        let zeros = s.zeros(m, n, groups, packing)?;
        let (bits, group_size) = (s.bits, s.group_size(k));
        let mut weight =
            QuantWeight { n, k, bits, group_size, codes, scales, zeros, order: None, encoding: Encoding::Affine };
        if let Some(order) = s.order(m, k)? {
            order::apply(&mut weight, order);
        }
        Ok(LinearWeight { weight: Weight::Quant(weight), bias: m.bias()?, activation: s.activation(m)? })
    }
}

impl GroupScheme {
    /// What shares a scale in FP8.
    fn block(&self) -> Block {
        match self.strategy {
            Strategy::Tensor => Block::TENSOR,
            Strategy::Channel => Block::CHANNEL,
            Strategy::Group(columns) => Block { rows: 1, columns },
            Strategy::Block(block) => block,
        }
    }

    fn check_float(&self, m: &mut Module) -> Option<Sizes> {
        let sizes = self.block().check(m, "weight_scale");
        // Some writers keep the zeros that every symmetric scheme has.
        if m.has("weight_zero_point") {
            m.used.push("weight_zero_point");
            if m.bytes("weight_zero_point").iter().any(|&byte| byte != 0) {
                m.problem("weight_zero_point", "has other values than 0, which FP8 weights cannot have");
            }
        }
        if let (Some(_), Activations::Fp8 { is_static }) = (sizes, self.activations) {
            fp8::note_activations(m, is_static, &["input_scale"]);
        }
        sizes
    }

    fn group_size(&self, k: usize) -> usize {
        match self.strategy {
            Strategy::Group(g) => g.min(k),
            Strategy::Block(block) => block.columns.min(k),
            Strategy::Tensor | Strategy::Channel => k,
        }
    }

    fn groups(&self, k: usize) -> usize {
        k.div_ceil(self.group_size(k))
    }

    /// Signed codes with `2^(bits-1)` added.
    fn unsigned(&self, m: &Module, suffix: &str, signed: &[i64]) -> Result<Vec<u8>> {
        let half = 1i64 << (self.bits - 1);
        let code = |&q: &i64| (-half..half).contains(&q).then_some((q + half) as u8);
        signed.iter().map(code).collect::<Option<Vec<u8>>>().ok_or_else(|| self.out_of_range(m, suffix))
    }

    /// [`GroupScheme::unsigned`] of a whole weight, without widening it on the way.
    fn unsigned_bytes(&self, m: &Module, suffix: &str) -> Result<Vec<u8>> {
        let half = 1u8 << (self.bits - 1);
        // In range exactly when, moved to unsigned, no bit above the width is set.
        let codes: Vec<u8> = m.bytes(suffix).par_iter().map(|&byte| byte.wrapping_add(half)).collect();
        match codes.par_iter().any(|&code| u32::from(code) >> self.bits != 0) {
            true => Err(self.out_of_range(m, suffix)),
            false => Ok(codes),
        }
    }

    fn out_of_range(&self, m: &Module, suffix: &str) -> Error {
        let half = 1i64 << (self.bits - 1);
        let range = format!("{} to {}, the range of {} bits", -half, half - 1, self.bits);
        m.error(suffix, format!("a code is outside {range}"))
    }

    /// `[n, groups]` zero points of unsigned codes.
    fn zeros(&self, m: &Module, n: usize, groups: usize, weight_packing: Packing) -> Result<Vec<f32>> {
        let middle = f32::from(1u8 << (self.bits - 1));
        let suffix = "weight_zero_point";
        if self.symmetric {
            // Some writers keep the zeros that a symmetric scheme has.
            if m.has(suffix) && m.integers(suffix)?.iter().any(|&z| z != 0) {
                return Err(m.error(suffix, "the configuration says symmetric, but there are zero points other than 0"));
            }
            return Ok(vec![middle; n * groups]);
        }
        if !self.packs_zeros() {
            let zeros = self.unsigned(m, suffix, &m.integers(suffix)?)?;
            return Ok(spread(zeros.into_iter().map(f32::from).collect(), n * groups));
        }
        // Packed along the output channels.
        let words = m.words(suffix)?;
        let dense = weight_packing == Packing::Dense;
        let packing = packing(words.len() / groups, n, self.bits, dense).unwrap_or(weight_packing);
        let mut zeros = Vec::with_capacity(n * groups);
        let mut fields = vec![0u8; n];
        for group in 0..groups {
            let column: Vec<u32> = words.iter().skip(group).step_by(groups).copied().collect();
            packing.unpack(&column, self.bits, &mut fields);
            zeros.extend(fields.iter().map(|&z| f32::from(z)));
        }
        Ok(transpose(&zeros, groups, n))
    }

    /// Whether zero points are packed in words, as the weight is. A single one never is.
    fn packs_zeros(&self) -> bool {
        self.format == Format::Packed && self.strategy != Strategy::Tensor
    }

    fn order(&self, m: &Module, k: usize) -> Result<Option<Vec<u32>>> {
        if !self.act_order || !m.has("weight_g_idx") {
            return Ok(None);
        }
        let g_idx = m.integers("weight_g_idx")?;
        // As initialised, before anything was assigned.
        if g_idx.iter().all(|&g| g == -1) {
            return Ok(None);
        }
        sort_by_group(&g_idx, self.group_size(k)).map_err(|reason| m.error("weight_g_idx", reason))
    }

    fn activation(&self, m: &Module) -> Result<ActQuant> {
        let symmetric = match self.activations {
            Activations::None | Activations::Fp8 { .. } => return Ok(ActQuant::None),
            Activations::DynamicPerToken { symmetric: false } => return Ok(ActQuant::DynamicAsymmetric),
            Activations::DynamicPerToken { symmetric: true } => return Ok(ActQuant::DynamicPerToken),
            Activations::StaticPerTensor { symmetric } => symmetric,
        };
        let scale = m.scales("input_scale")?[0];
        if scale <= 0.0 {
            return Err(m.error("input_scale", format!("is {scale}; expected a positive number")));
        }
        let zero_point = if m.has("input_zero_point") { m.integers("input_zero_point")?[0] } else { 0 };
        let allowed = if symmetric { 0..=0 } else { -128..=127 };
        if !allowed.contains(&zero_point) {
            return Err(m.error(
                "input_zero_point",
                format!("is {zero_point}; expected {} to {}", allowed.start(), allowed.end()),
            ));
        }
        Ok(ActQuant::StaticPerTensor { scale, zero_point: zero_point as i32 })
    }
}

/// The packing by which `len` codes take `words` words. Where both do, they differ only for a few codes' width, and
/// the writer's version decides.
fn packing(words: usize, len: usize, bits: u8, prefer_dense: bool) -> Option<Packing> {
    let order = if prefer_dense { [Packing::Dense, Packing::Aligned] } else { [Packing::Aligned, Packing::Dense] };
    order.into_iter().find(|p| p.words(len, bits) == words)
}

/// One value for all, one for each channel or one for each group: all of length `len`.
fn spread(values: Vec<f32>, len: usize) -> Vec<f32> {
    if values.len() == 1 { vec![values[0]; len] } else { values }
}

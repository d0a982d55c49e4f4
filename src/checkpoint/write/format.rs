//! The formats that are written: what each has a place for, and the tensors of a linear layer in it.

use std::borrow::Cow;

use rayon::prelude::*;
use safetensors::Dtype;

use super::super::order::transpose;
use super::{OutTensor, Written, bitsandbytes, hqq};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::pack::{AWQ_ORDER, Packing};
use crate::quant::table::columns_of_block;
use crate::quant::{ActQuant, Codebook, Encoding, QuantWeight, Scheme};

/// A format of quantized checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// AutoGPTQ's, zero points stored less one: what most programs load.
    Gptq,
    /// The same with zero points as they are.
    GptqV2,
    /// AutoAWQ's gemm layout: 4 bits.
    Awq,
    /// llm-compressor's: packed for 16-bit activations, int8 for quantized ones.
    CompressedTensors,
    /// bitsandbytes': NF4 and FP4 in blocks, and LLM.int8().
    BitsAndBytes {
        /// Largest magnitudes of 4-bit blocks are quantized to 8 bits.
        double_quant: bool,
    },
    /// The hqq library's: groups with real zero points.
    Hqq,
    /// lowbit's own: a learned table for each layer.
    Codebook,
}

impl Format {
    /// The format's name as flags have it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Gptq => "gptq",
            Format::GptqV2 => "gptq-v2",
            Format::Awq => "awq",
            Format::CompressedTensors => "compressed-tensors",
            Format::BitsAndBytes { .. } => "bitsandbytes",
            Format::Hqq => "hqq",
            Format::Codebook => "codebook",
        }
    }

    /// Type that scales are stored in, in a model of `model` type.
    pub fn scale_type(self, model: DType) -> DType {
        match self {
            Format::CompressedTensors | Format::Hqq => model,
            Format::BitsAndBytes { .. } => DType::F32,
            Format::Gptq | Format::GptqV2 | Format::Awq | Format::Codebook => DType::F16,
        }
    }

    /// Smallest zero point that the format holds.
    pub fn smallest_zero(self) -> u8 {
        if self == Format::Gptq { 1 } else { 0 }
    }

    /// Fails when the format has no place for a model.
    ///
    /// # Errors
    /// [`Error::Unsupported`], naming a format that has; [`Error::Input`] when nothing is quantized.
    pub fn check(self, written: &Written) -> Result<()> {
        let schemes = written.schemes();
        for (scheme, _) in &schemes {
            self.check_scheme(scheme)?;
        }
        if written.kv_scales.is_some() && self != Format::CompressedTensors {
            return Err(Error::unsupported(
                format!("--kv-scales in the format {}", self.name()),
                "Use --format compressed-tensors, the one format that has a place for them",
            ));
        }
        if written.quantizes_head() && !matches!(self, Format::Gptq | Format::GptqV2 | Format::CompressedTensors) {
            return Err(Error::unsupported(
                format!("--lm-head in the format {}, whose heads are in 16 bit", self.name()),
                "Use --format gptq or compressed-tensors",
            ));
        }
        match (self, schemes.as_slice()) {
            (_, []) => Err(Error::input("--rule", "all linear layers stay as they are: nothing is to be quantized")),
            (Format::Gptq | Format::GptqV2 | Format::CompressedTensors, _) => Ok(()),
            (_, [(a, _), (b, names), ..]) => Err(Error::unsupported(
                format!("`{}` as {b} beside {a} in the format {}, which has one scheme for all", names[0], self.name()),
                "Use --format gptq or compressed-tensors, or leave the layer as it is (`skip`)",
            )),
            _ => Ok(()),
        }
    }

    /// Fails when the format has no place for a layer of `scheme`.
    pub fn check_scheme(self, scheme: &Scheme) -> Result<()> {
        let integers = scheme.activation != ActQuant::None;
        let codebook = scheme.encoding.codebook();
        let learned = codebook.is_some_and(|table| table.name() == Codebook::LEARNED);
        let reason = match self {
            Format::Codebook if learned && scheme.weight_bits == Codebook::BITS => None,
            Format::Codebook => Some("anything but a learned table of sixteen values"),
            _ if learned => Some("learned tables"),
            Format::BitsAndBytes { .. } if codebook.is_some() && scheme.weight_bits == Codebook::BITS => None,
            _ if codebook.is_some() => Some("NF4 and FP4"),
            _ if scheme.encoding == Encoding::E4m3 => Some("FP8"),
            Format::BitsAndBytes { .. } if scheme.weight_bits != 8 || scheme.group_size.is_some() => {
                Some("integers other than 8 bits with one scale a channel")
            }
            Format::BitsAndBytes { double_quant: true } => Some("double quantization of 8-bit weights"),
            Format::BitsAndBytes { .. } if !scheme.symmetric || scheme.act_order => {
                Some("asymmetric or reordered weights")
            }
            Format::BitsAndBytes { .. }
                if !matches!(scheme.activation, ActQuant::LlmInt8 { .. } | ActQuant::DynamicPerToken) =>
            {
                Some("8-bit weights without int8 activations per token")
            }
            Format::BitsAndBytes { .. } => None,
            _ if matches!(scheme.activation, ActQuant::LlmInt8 { .. }) => Some("outliers in 16 bit"),
            Format::Hqq if ![2, 3, 4, 5, 6, 8].contains(&scheme.weight_bits) => Some("7 bits"),
            Format::Hqq if scheme.act_order => Some("reordered columns"),
            Format::CompressedTensors if integers && !scheme.symmetric => {
                Some("asymmetric weights with int8 activations")
            }
            Format::CompressedTensors if integers && scheme.act_order => {
                Some("reordered columns with int8 activations")
            }
            Format::CompressedTensors if scheme.act_order && scheme.group_size.is_none() => {
                Some("reordered columns without groups")
            }
            Format::CompressedTensors => None,
            _ if integers => Some("int8 activations"),
            Format::Gptq | Format::GptqV2 if ![2, 3, 4, 8].contains(&scheme.weight_bits) => Some("5, 6 or 7 bits"),
            Format::Awq if scheme.weight_bits != 4 => Some("other than 4 bits"),
            Format::Awq if scheme.act_order => Some("reordered columns"),
            Format::Gptq | Format::GptqV2 | Format::Awq | Format::Hqq => None,
        };
        match reason {
            None => Ok(()),
            Some(what) => Err(Error::unsupported(
                format!("{what} in the format {}", self.name()),
                "Use --format compressed-tensors (symmetric weights for int8 activations), or another --scheme or --method",
            )),
        }
    }

    /// Fails when no program could load a layer of `n` outputs and `k` inputs with this scheme.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the layer, the numbers that do not fit, and what would.
    pub fn check_sizes(self, name: &str, n: usize, k: usize, scheme: &Scheme) -> Result<()> {
        let group = scheme.group_size.filter(|&g| g != k);
        let uneven = group.filter(|&g| !k.is_multiple_of(g)).map(|g| format!("{k} inputs in groups of {g}"));
        let grouped = "Use a --group-size that divides the inputs of every layer (or 0), --format gptq or compressed-tensors, whose \
                       last group may be short, or a --rule that skips this layer";
        let (what, advice) = match self {
            Format::Awq if let Some(uneven) = uneven => (uneven, grouped),
            // A word has the codes of eight outputs (AutoAWQ's gemm).
            Format::Awq if !n.is_multiple_of(8) => {
                (format!("{n} outputs, no multiple of 8"), "Use --format gptq or compressed-tensors")
            }
            // A group that is longer than a row is the row.
            Format::Hqq => match uneven
                .filter(|_| group < Some(k))
                .or_else(|| hqq::misfit(n * (k / group.map_or(k, |g| g.min(k))), scheme.weight_bits))
            {
                Some(misfit) => (
                    misfit,
                    "Use a --group-size that divides the inputs of every layer, or a --rule that skips this one",
                ),
                None => return Ok(()),
            },
            Format::BitsAndBytes { .. }
                if scheme.encoding.codebook().is_some()
                    && !bitsandbytes::has_blocks_of(columns_of_block(scheme.group_size.unwrap_or(k), k)) =>
            {
                (
                    format!("{k} inputs in blocks that bitsandbytes has, 32 to 4096 by powers of two"),
                    "Use a --group-size of which 32 or more divide the inputs of every layer, or a --rule that skips this one",
                )
            }
            _ => return Ok(()),
        };
        Err(Error::unsupported(format!("`{name}`: {what} in the format {}", self.name()), advice))
    }

    /// The weight as reading its file gives it: `q` itself, but for scales that the format rounds once more.
    pub fn as_read(self, q: &QuantWeight) -> Cow<'_, QuantWeight> {
        match self {
            Format::BitsAndBytes { double_quant: true } if q.encoding.codebook().is_some() => {
                Cow::Owned(bitsandbytes::double_quantized(q))
            }
            _ => Cow::Borrowed(q),
        }
    }

    /// The tensors of one linear layer, all but its bias, in a model of `dtype`; scales are of [`Format::scale_type`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the layer's sizes do not fit the format ([`Format::check_sizes`]), or its zero points.
    pub fn tensors(self, name: &str, q: &QuantWeight, activation: ActQuant, dtype: DType) -> Result<Vec<OutTensor>> {
        self.check_sizes(name, q.n, q.k, &q.scheme(activation))?;
        match self {
            Format::BitsAndBytes { double_quant } if q.encoding.codebook().is_some() => {
                Ok(bitsandbytes::table(name, q, double_quant, dtype))
            }
            Format::BitsAndBytes { .. } => Ok(bitsandbytes::int8(name, q)),
            Format::Codebook => Ok(bitsandbytes::learned(name, q, self.scale_type(dtype))),
            Format::Hqq => Ok(hqq::tensors(name, q, dtype)),
            Format::Gptq => gptq(name, q, 1),
            Format::GptqV2 => gptq(name, q, 0),
            Format::Awq => awq(name, q),
            Format::CompressedTensors => Ok(compressed(name, q, activation, self.scale_type(dtype))),
        }
    }
}

/// `qweight` packed down the inputs, `qzeros` along the outputs, `g_idx` always.
fn gptq(name: &str, q: &QuantWeight, offset: u8) -> Result<Vec<OutTensor>> {
    let (n, k, groups) = (q.n, q.k, q.groups());
    let height = Packing::Dense.words(k, q.bits);
    // The file's rows are inputs in their own order; `g_idx` tells the group of each.
    let column = |c: usize| q.order.as_ref().map_or(c, |order| order[c] as usize);
    let mut g_idx = vec![0u32; k];
    (0..k).for_each(|c| g_idx[column(c)] = (c / q.group_size) as u32);
    let columns: Vec<Vec<u32>> = q
        .codes
        .par_chunks(k)
        .map(|codes| {
            let mut natural = vec![0u8; k];
            codes.iter().enumerate().for_each(|(c, &code)| natural[column(c)] = code);
            Packing::Dense.pack(&natural, q.bits)
        })
        .collect();
    let mut words = vec![0u32; height * n];
    words.par_chunks_mut(n).enumerate().for_each(|(w, row)| {
        row.iter_mut().zip(&columns).for_each(|(to, column)| *to = column[w]);
    });
    let zeros = transpose(&q.zeros, n, groups);
    let mut packed = Vec::with_capacity(groups * Packing::Dense.words(n, q.bits));
    for zeros in zeros.chunks_exact(n) {
        packed.extend(Packing::Dense.pack(&whole(name, zeros, f32::from(offset), q.bits)?, q.bits));
    }
    Ok(vec![
        OutTensor::words(format!("{name}.qweight"), &[height, n], &words),
        OutTensor::words(format!("{name}.qzeros"), &[groups, Packing::Dense.words(n, q.bits)], &packed),
        OutTensor::floats(format!("{name}.scales"), DType::F16, &[groups, n], &transpose(&q.scales, n, groups)),
        OutTensor::words(format!("{name}.g_idx"), &[k], &g_idx),
    ])
}

/// Zero points less `offset` as codes.
fn whole(name: &str, zeros: &[f32], offset: f32, bits: u8) -> Result<Vec<u8>> {
    let field = |&z: &f32| {
        let stored = z - offset;
        let fits = stored.fract() == 0.0 && stored >= 0.0 && stored < f32::from(1u16 << bits);
        fits.then_some(stored as u8).ok_or_else(|| {
            Error::unsupported(
                format!("`{name}`: zero point {z} in a format of whole {bits}-bit zero points"),
                "Use another --format or a symmetric --mapping",
            )
        })
    };
    zeros.iter().map(field).collect()
}

/// AutoAWQ's gemm layout: eight outputs a word, in [`AWQ_ORDER`].
fn awq(name: &str, q: &QuantWeight) -> Result<Vec<OutTensor>> {
    let (n, k, groups) = (q.n, q.k, q.groups());
    let pack = |row: &[u8], words: &mut [u32]| {
        for (word, codes) in words.iter_mut().zip(row.chunks_exact(8)) {
            *word = (0..8).fold(0, |w, i| w | u32::from(codes[AWQ_ORDER[i]]) << (4 * i));
        }
    };
    let mut words = vec![0u32; k * n / 8];
    words.par_chunks_mut(n / 8).enumerate().for_each(|(c, words)| {
        let column: Vec<u8> = (0..n).map(|r| q.codes[r * k + c]).collect();
        pack(&column, words);
    });
    let zeros = transpose(&q.zeros, n, groups);
    let mut packed = vec![0u32; groups * n / 8];
    for (zeros, words) in zeros.chunks_exact(n).zip(packed.chunks_exact_mut(n / 8)) {
        pack(&whole(name, zeros, 0.0, 4)?, words);
    }
    Ok(vec![
        OutTensor::words(format!("{name}.qweight"), &[k, n / 8], &words),
        OutTensor::words(format!("{name}.qzeros"), &[groups, n / 8], &packed),
        OutTensor::floats(format!("{name}.scales"), DType::F16, &[groups, n], &transpose(&q.scales, n, groups)),
    ])
}

/// pack-quantized without activation quantization, else int-quantized.
fn compressed(name: &str, q: &QuantWeight, activation: ActQuant, scale_type: DType) -> Vec<OutTensor> {
    let (n, k, groups) = (q.n, q.k, q.groups());
    let at = |suffix: &str| format!("{name}.{suffix}");
    let middle = 1u8 << (q.bits - 1);
    let mut all = vec![OutTensor::floats(at("weight_scale"), scale_type, &[n, groups], &q.scales)];
    if activation != ActQuant::None {
        let signed = q.codes.par_iter().map(|&code| code.wrapping_sub(middle)).collect();
        all.push(OutTensor::raw(at("weight"), Dtype::I8, &[n, k], signed));
    } else {
        let column = |c: usize| q.order.as_ref().map_or(c, |order| order[c] as usize);
        let width = Packing::Dense.words(k, q.bits);
        let words: Vec<u32> = q
            .codes
            .par_chunks(k)
            .flat_map_iter(|codes| {
                let mut natural = vec![0u8; k];
                codes.iter().enumerate().for_each(|(c, &code)| natural[column(c)] = code);
                Packing::Dense.pack(&natural, q.bits)
            })
            .collect();
        let shape = [n as i64, k as i64].iter().flat_map(|x| x.to_le_bytes()).collect();
        all.push(OutTensor::words(at("weight_packed"), &[n, width], &words));
        all.push(OutTensor::raw(at("weight_shape"), Dtype::I64, &[2], shape));
        if !q.is_symmetric() {
            let height = Packing::Dense.words(n, q.bits);
            let mut packed = vec![0u32; height * groups];
            for (g, zeros) in transpose(&q.zeros, n, groups).chunks_exact(n).enumerate() {
                let zeros: Vec<u8> = zeros.iter().map(|&z| z as u8).collect();
                let words = Packing::Dense.pack(&zeros, q.bits);
                words.into_iter().enumerate().for_each(|(w, word)| packed[w * groups + g] = word);
            }
            all.push(OutTensor::words(at("weight_zero_point"), &[height, groups], &packed));
        }
        if q.order.is_some() {
            let mut g_idx = vec![0u32; k];
            (0..k).for_each(|c| g_idx[column(c)] = (c / q.group_size) as u32);
            all.push(OutTensor::words(at("weight_g_idx"), &[k], &g_idx));
        }
    }
    if let ActQuant::StaticPerTensor { scale, zero_point } = activation {
        all.push(OutTensor::floats(at("input_scale"), scale_type, &[1], &[scale]));
        all.push(OutTensor::raw(at("input_zero_point"), Dtype::I8, &[1], vec![zero_point as i8 as u8]));
    }
    all
}

//! Repacking of canonical weights into the layouts of the linear kernels (docs/formats.md, "Kernel layouts").

use rayon::prelude::*;

use super::candidates::{self, Config};
use super::choose::{Launch, Problem, choose, choose_batch_invariant};
use super::ops::u32_of;
use super::pack_blocks::{BlockShape, ROWS};
use super::pack_w4a8::NibbleShape;
use super::scale_parts::ScaleParts;
use super::{Buffer, CudaDevice, tuned};
use crate::device::cpu::check;
use crate::device::{Activation, Epilogue, Output, PackedBody, PackedWeight};
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::quant::{ActQuant, Codebook, LinearWeight, QuantWeight, Weight};

/// How the bytes of a weight lie, which is also which kernels read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[n, k]` int8, code minus zero point: gemm_w8a8 before sm_90.
    Rows8,
    /// The same in blocks of 64 x 128, as sm_90's products read them from shared memory: gemm_w8a8 on sm_90.
    Blocks8,
    /// 4-bit codes in blocks of 64 x 128 for int8 activations: gemm_w4a8 on sm_90.
    Blocks4(NibbleShape),
    /// Fragment order for int8 activations: gemm_w4a8. 4-bit codes, or 8-bit codes minus their zero points.
    Fragments8Bit { bits: usize },
    /// Fragment order for 16-bit activations: gemm_w4a16. Codes of 4 or 8 bits.
    Fragments16Bit { bits: usize },
    /// Blocks for 16-bit activations on sm_90: gemm_w4a16/sm90.
    Blocks16(BlockShape),
    /// Fragment order for 16-bit activations: gemm_w4a16. 4-bit codes of a codebook.
    FragmentsCodebook,
    /// `[n, k]` in the activation type: gemm_16bit or cuBLASLt where rows start on 16 bytes, else gemm_any.
    Dense { aligned: bool },
    /// `[n, k]` codes, one to a byte: gemm_any.
    Canonical { int8: bool },
    /// `[n, k]` codes of a codebook, one to a byte: gemm_any.
    CanonicalCodebook,
}

/// A weight in the layout of one linear kernel.
#[derive(Debug)]
pub(crate) struct CudaPacked {
    pub(super) device: CudaDevice,
    pub(super) layout: Layout,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) group_size: usize,
    /// Zero point of every weight, where `zeros` is absent.
    pub(super) zero: u32,
    /// Zero point of the activations, and whether each row has its own.
    pub(super) x_zero: i32,
    pub(super) x_zeros: bool,
    pub(super) weights: Buffer,
    /// `F32`; `[groups, n_pad]` beside fragments, `[n, groups]` else.
    pub(super) scales: Option<Buffer>,
    /// How many floats of the activation type a scale is, in fragment order for 16-bit activations.
    pub(super) scale_parts: ScaleParts,
    /// `[groups, n_pad]` 16-bit integers beside fragments, `[n, groups]` `F32` beside canonical codes.
    pub(super) zeros: Option<Buffer>,
    /// `I32` sums of code minus zero point over each group, for asymmetric activations.
    pub(super) sums: Option<Buffer>,
    /// LLM.int8(): rows come with outliers.
    pub(super) outliers: bool,
    /// What codes stand for, where they are not evenly spaced.
    pub(super) codebook: Option<Codebook>,
    /// `[n]` `F32`.
    pub(super) bias: Option<Buffer>,
    /// `[3, n]` `I32`, as [`Epilogue::fixed_point`] says.
    pub(super) fixed: Option<Buffer>,
    pub(super) epilogue: Epilogue,
    /// Rows and the configuration measured to be the fastest for them, ascending.
    pub(super) tuned: Vec<(usize, Config)>,
}

impl CudaPacked {
    /// Bytes in device memory.
    pub(crate) fn bytes(&self) -> usize {
        let parts = [&self.scales, &self.zeros, &self.sums, &self.bias, &self.fixed].into_iter().flatten();
        parts.chain([&self.weights]).map(|buffer| buffer.len() * buffer.dtype().size_bytes()).sum()
    }

    /// Name of the kernel that runs for `m` rows, and its configuration.
    pub(crate) fn kernel(&self, m: usize) -> String {
        if self.is_for_blas() {
            return "cublaslt".into();
        }
        let launch = self.launch(m.max(1), false);
        format!("{} {}", launch.module, launch.config)
    }

    /// True where activations are 8-bit codes.
    pub(super) fn takes_int8(&self) -> bool {
        matches!(
            self.layout,
            Layout::Rows8
                | Layout::Blocks8
                | Layout::Blocks4(_)
                | Layout::Fragments8Bit { .. }
                | Layout::Canonical { int8: true }
        )
    }

    /// True for an unquantized weight that cuBLASLt, which chooses by the number of rows, is asked to run. Where it has no algorithm for a shape (odd
    /// alignments), the launch of [`Self::launch`] runs.
    pub(super) fn is_for_blas(&self) -> bool {
        let by_blas = matches!(self.layout, Layout::Dense { .. }) && self.bias.is_none();
        by_blas && self.device.has_blas() && !self.device.is_batch_invariant()
    }

    /// The launch of one of our own kernels for `m` rows, `m` at least 1, of uint8 activations or not.
    pub(super) fn launch(&self, m: usize, x_u8: bool) -> Launch {
        let p = self.problem(x_u8);
        if self.device.is_batch_invariant() {
            return choose_batch_invariant(&p, m);
        }
        // Some kernels of uint8 have fewer tiles than those that were measured.
        match tuned::config(&self.tuned, m).filter(|_| !x_u8) {
            Some(config) => candidates::launch(&p, config, m),
            None => choose(&p, m),
        }
    }

    /// What its launches depend on beside the number of rows.
    pub(super) fn problem(&self, x_u8: bool) -> Problem {
        let Self { layout, n, k, epilogue, outliers, scale_parts, .. } = *self;
        Problem {
            layout,
            n,
            k,
            epilogue,
            x_u8,
            outliers,
            sums_only: scale_parts == ScaleParts::SumsOnly,
            sm_count: self.device.sm_count(),
            max_shared: self.device.max_dynamic_shared(),
            suffix: self.device.suffix(),
        }
    }
}

impl CudaDevice {
    /// A copy of `weight` in memory of its own, for measurements that must not find it in a cache.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cuda`; `Shape` for a weight packed for another device.
    pub fn duplicate(&self, weight: &PackedWeight) -> Result<PackedWeight> {
        let PackedBody::Cuda(packed) = &weight.body else {
            let (expected, got) = ("a weight packed for CUDA".into(), "one packed for the CPU".into());
            return Err(Error::Shape { op: "duplicate", expected, got });
        };
        let copy = |part: &Option<Buffer>| part.as_ref().map(Buffer::duplicate).transpose();
        let body = CudaPacked {
            device: packed.device.clone(),
            weights: packed.weights.duplicate()?,
            scales: copy(&packed.scales)?,
            zeros: copy(&packed.zeros)?,
            sums: copy(&packed.sums)?,
            bias: copy(&packed.bias)?,
            fixed: copy(&packed.fixed)?,
            tuned: packed.tuned.clone(),
            ..**packed
        };
        let order = weight.order.as_ref().map(|order| Ok(order.cuda()?.duplicate()?.into())).transpose()?;
        Ok(PackedWeight { order, body: PackedBody::Cuda(Box::new(body)), ..*weight })
    }
}

/// Of 16-bit activations, sm_90's kernels alone have SwiGLU.
pub(crate) fn check_epilogue(device: &CudaDevice, weight: &LinearWeight, epilogue: Epilogue) -> Result<()> {
    let Weight::Quant(q) = &weight.weight else { return Ok(()) };
    let needs_blocks = epilogue != Epilogue::NONE && weight.activation == ActQuant::None;
    if needs_blocks && !(device.uses_sm90() && BlockShape::of(q, device.dtype()).is_some()) {
        return Err(Error::unsupported(
            format!("SwiGLU fused into a weight of scheme {} on this GPU", weight.scheme()),
            "Kernels of compute capability 9.0 have it, for weights that their blocks hold: use silu_mul",
        ));
    }
    Ok(())
}

/// Checks `weight` and moves it to the GPU in the layout of the kernels that will run it.
///
/// # Errors
/// As the CPU's check of canonical weights; `Cuda` or `OutOfMemory` from the upload.
pub(crate) fn pack(device: &CudaDevice, mut weight: LinearWeight, epilogue: Epilogue) -> Result<PackedWeight> {
    check(&weight)?;
    epilogue.check(&weight)?;
    check_epilogue(device, &weight, epilogue)?;
    let scheme = weight.scheme();
    let (n, k) = (weight.n(), weight.k());
    u32_of(n.next_multiple_of(256))?;
    u32_of(k.next_multiple_of(256))?;
    let upload = |data: HostData| Buffer::upload(device, &data);
    let fixed = Some(epilogue.fixed_point(&weight)?).filter(|columns| !columns.is_empty());
    if epilogue.activation == Activation::SwiGlu {
        interleave(&mut weight, device.uses_sm90());
    }
    let bias = weight.bias.map(HostData::F32).map(upload).transpose()?;
    let mut order = None;
    let host = match weight.weight {
        Weight::Dense { data, .. } => {
            let dtype = device.dtype();
            let data = if data.dtype() == dtype { data } else { HostData::from_f32(dtype, data.to_f32()) };
            HostPacked::new(Layout::Dense { aligned: k.is_multiple_of(8) }, data)
        }
        Weight::Quant(mut q) => {
            order = q.order.take().map(|order| upload(HostData::U32(order))).transpose()?;
            let activation = weight.activation;
            let blocks = match activation {
                ActQuant::None if device.uses_sm90() => HostPacked::blocks16(&q, device.dtype()),
                ActQuant::None | ActQuant::LlmInt8 { .. } => None,
                _ if device.uses_sm90() => HostPacked::blocks4(&q),
                _ => None,
            };
            blocks.unwrap_or_else(|| HostPacked::quant(&q, activation, device.uses_sm90()))
        }
    };
    if epilogue.output == Output::Groups && !matches!(host.layout, Layout::Rows8 | Layout::Blocks8) {
        return Err(Error::unsupported(
            format!("codes in groups from a weight of scheme {scheme}, k = {k}"),
            "Only 8-bit weights with a scale a channel and k a multiple of 16 have them",
        ));
    }
    let mut body = CudaPacked {
        device: device.clone(),
        layout: host.layout,
        n,
        k,
        group_size: scheme.group_size.unwrap_or(k),
        outliers: matches!(scheme.activation, ActQuant::LlmInt8 { .. }),
        codebook: scheme.codebook,
        zero: host.zero,
        x_zero: weight.activation.zero_point(),
        x_zeros: weight.activation == ActQuant::DynamicAsymmetric,
        weights: upload(host.weights)?,
        scale_parts: ScaleParts::of(host.scales.as_deref().unwrap_or_default(), host.largest, device.dtype()),
        scales: host.scales.map(HostData::F32).map(upload).transpose()?,
        zeros: host.zeros.map(upload).transpose()?,
        sums: host.sums.map(HostData::I32).map(upload).transpose()?,
        bias,
        fixed: fixed.map(HostData::I32).map(upload).transpose()?,
        epilogue,
        tuned: Vec::new(),
    };
    body.tuned = device.tuned().of(&body.problem(false));
    Ok(PackedWeight { n, k, scheme, epilogue, order: order.map(Into::into), body: PackedBody::Cuda(Box::new(body)) })
}

/// A packed weight on the host.
#[derive(Debug)]
struct HostPacked {
    layout: Layout,
    weights: HostData,
    zero: u32,
    /// No weight is more times its scale.
    largest: f32,
    scales: Option<Vec<f32>>,
    zeros: Option<HostData>,
    sums: Option<Vec<i32>>,
}

impl HostPacked {
    fn new(layout: Layout, weights: HostData) -> Self {
        HostPacked { layout, weights, zero: 0, largest: 0.0, scales: None, zeros: None, sums: None }
    }

    /// In blocks for 16-bit activations on sm_90, where those hold `q`.
    fn blocks16(q: &QuantWeight, dtype: DType) -> Option<Self> {
        let shape = BlockShape::of(q, dtype)?;
        let weights = HostData::U8(shape.pack(q, dtype));
        Some(HostPacked { zero: q.zeros[0] as u32, ..HostPacked::new(Layout::Blocks16(shape), weights) })
    }

    /// In blocks for int8 activations on sm_90, where those hold `q`.
    fn blocks4(q: &QuantWeight) -> Option<Self> {
        let shape = NibbleShape::of(q)?;
        let scales = shape.one_group.then(|| padded(q.scales.clone(), ROWS));
        Some(HostPacked { scales, ..HostPacked::new(Layout::Blocks4(shape), HostData::U8(shape.pack(q))) })
    }

    fn quant(q: &QuantWeight, activation: ActQuant, sm90: bool) -> Self {
        let layout = layout(q, activation, sm90);
        let weights = match layout {
            Layout::Rows8 => HostData::I8(steps(q)),
            Layout::Blocks8 => HostData::I8(blocks8(q)),
            Layout::Fragments8Bit { bits: 8 } => {
                let steps: Vec<u8> = steps(q).into_iter().map(|step| step as u8).collect();
                HostData::U8(fragments8(q.n, q.k, &steps))
            }
            Layout::Fragments8Bit { .. } => HostData::U8(fragments4(q.n, q.k, &q.codes, NIBBLES_8BIT)),
            Layout::Fragments16Bit { bits: 8 } => HostData::U8(fragments8(q.n, q.k, &q.codes)),
            Layout::Fragments16Bit { .. } => HostData::U8(fragments4(q.n, q.k, &q.codes, NIBBLES_16BIT)),
            Layout::FragmentsCodebook => HostData::U8(fragments4(q.n, q.k, &q.codes, NIBBLES_CODEBOOK)),
            Layout::Canonical { .. } | Layout::CanonicalCodebook => HostData::U8(q.codes.clone()),
            Layout::Dense { .. } | Layout::Blocks16(_) | Layout::Blocks4(_) => unreachable!("not of `layout`"),
        };
        let mut host = HostPacked::new(layout, weights);
        host.largest = match &q.codebook {
            Some(codebook) => codebook.0.iter().fold(0.0, |max, value| value.abs().max(max)),
            None => f32::from(1u16 << q.bits),
        };
        let asymmetric_input = activation.zero_point() != 0 || activation == ActQuant::DynamicAsymmetric;
        match layout {
            Layout::Canonical { .. } => {
                host.scales = Some(q.scales.clone());
                host.zeros = Some(HostData::F32(q.zeros.clone()));
            }
            Layout::CanonicalCodebook => host.scales = Some(q.scales.clone()),
            Layout::Rows8 => {
                host.scales = Some(q.scales.clone());
                // Always: uint8 codes of symmetric activations have a zero point too.
                host.sums = Some(group_sums(q));
            }
            Layout::Blocks8 => {
                host.scales = Some(padded(q.scales.clone(), SM90_COLUMNS));
                host.sums = Some(padded(group_sums(q), SM90_COLUMNS)); // always, as above
            }
            _ => {
                host.zero = q.zeros[0] as u32;
                let zeros_are_needed = layout != Layout::Fragments8Bit { bits: 8 };
                if zeros_are_needed && q.zeros.iter().any(|&z| z != q.zeros[0]) {
                    let by_group = by_group(q, &q.zeros, 0.0);
                    let bytes = by_group.into_iter().flat_map(|z| (z as u16).to_le_bytes()).collect();
                    host.zeros = Some(HostData::U8(bytes));
                }
                host.scales = Some(by_group(q, &q.scales, 0.0));
                host.sums = asymmetric_input.then(|| by_group(q, &group_sums(q), 0));
            }
        }
        host
    }
}

/// Gate above up as 8 rows of gate, 8 of up, and so on, for layouts whose kernels own such blocks. A canonical weight stays
/// as it is.
fn interleave(weight: &mut LinearWeight, sm90: bool) {
    let Weight::Quant(q) = &mut weight.weight else { return };
    if matches!(layout(q, weight.activation, sm90), Layout::Canonical { .. }) {
        return;
    }
    let n = q.n;
    q.codes = interleaved(&q.codes, n);
    q.scales = interleaved(&q.scales, n);
    q.zeros = interleaved(&q.zeros, n);
    if let Some(bias) = &mut weight.bias {
        *bias = interleaved(bias, n);
    }
}

/// The `n` rows of `values`, blocks of 8 of its first half and of its second in turn.
fn interleaved<T: Copy>(values: &[T], n: usize) -> Vec<T> {
    let (gate, up) = values.split_at(values.len() / 2);
    let block = 8 * values.len() / n;
    gate.chunks(block).zip(up.chunks(block)).flat_map(|(gate, up)| [gate, up].concat()).collect()
}

/// The fastest layout that holds `q` exactly, for kernels of sm_90 too where `sm90`.
fn layout(q: &QuantWeight, activation: ActQuant, sm90: bool) -> Layout {
    let per_channel = q.groups() == 1;
    let whole_groups = per_channel || q.group_size.is_multiple_of(32);
    if q.codebook.is_some() {
        let is_fast = whole_groups && q.k.is_multiple_of(8);
        return if is_fast { Layout::FragmentsCodebook } else { Layout::CanonicalCodebook };
    }
    if activation == ActQuant::None {
        let integral = q.zeros.iter().all(|z| z.fract() == 0.0);
        return match (whole_groups && integral && q.k.is_multiple_of(8), q.bits) {
            (true, ..=4) => Layout::Fragments16Bit { bits: 4 },
            (true, _) => Layout::Fragments16Bit { bits: 8 },
            (false, _) => Layout::Canonical { int8: false },
        };
    }
    if !whole_groups || !q.k.is_multiple_of(16) {
        return Layout::Canonical { int8: true };
    }
    if let ActQuant::LlmInt8 { .. } = activation {
        return if steps_fit_i8(q) { Layout::Rows8 } else { Layout::Canonical { int8: true } };
    }
    match q.bits {
        ..=4 => Layout::Fragments8Bit { bits: 4 },
        _ if !steps_fit_i8(q) => Layout::Canonical { int8: true },
        _ if per_channel && sm90 => Layout::Blocks8,
        _ if per_channel => Layout::Rows8,
        _ => Layout::Fragments8Bit { bits: 8 },
    }
}

/// The widest tile of gemm_w8a8/sm90, which reads scales and sums of whole tiles.
const SM90_COLUMNS: usize = 256;

/// `values` and zeros, up to a multiple of `multiple`.
fn padded<T: Copy + Default>(mut values: Vec<T>, multiple: usize) -> Vec<T> {
    values.resize(values.len().next_multiple_of(multiple), T::default());
    values
}

/// Code minus zero point, which [`steps_fit_i8`], one zero point a row, in blocks of 64 rows x 128 columns, those of the
/// same rows one after the other; within a block, chunk `c` of 16 columns of row `r` lies at chunk `c ^ (r % 8)`.
fn blocks8(q: &QuantWeight) -> Vec<i8> {
    let slices = q.k.div_ceil(128);
    let mut bytes = vec![0; q.n.div_ceil(64) * slices * 64 * 128];
    bytes.par_chunks_mut(slices * 64 * 128).enumerate().for_each(|(block, bytes)| {
        for r in block * 64..q.n.min(block * 64 + 64) {
            let zero = q.zeros[r] as i32 as u8; // steps fit, so their low bytes do
            for (c, codes) in q.codes[r * q.k..(r + 1) * q.k].chunks(16).enumerate() {
                let to = c / 8 * (64 * 128) + r % 64 * 128 + ((c % 8) ^ (r % 8)) * 16;
                for (to, code) in bytes[to..to + 16].iter_mut().zip(codes) {
                    *to = code.wrapping_sub(zero) as i8;
                }
            }
        }
    });
    bytes
}

/// Row `r`'s codes with the zero points of their groups.
fn row_steps(q: &QuantWeight, r: usize) -> impl Iterator<Item = i32> {
    let zeros = &q.zeros[r * q.groups()..];
    q.codes[r * q.k..(r + 1) * q.k]
        .chunks(q.group_size)
        .zip(zeros)
        .flat_map(|(codes, &zero)| codes.iter().map(move |&code| i32::from(code) - zero as i32))
}

/// True when every code minus its zero point is an int8. All are, at up to 7 bits and at 8 bits about the middle.
fn steps_fit_i8(q: &QuantWeight) -> bool {
    q.bits < 8 || q.is_symmetric() || (0..q.n).into_par_iter().all(|r| row_steps(q, r).all(|s| i8::try_from(s).is_ok()))
}

/// `[n, k]` code minus zero point, which [`steps_fit_i8`].
fn steps(q: &QuantWeight) -> Vec<i8> {
    let mut steps = vec![0; q.n * q.k];
    steps.par_chunks_mut(q.k).enumerate().for_each(|(r, row)| {
        for (to, step) in row.iter_mut().zip(row_steps(q, r)) {
            *to = step as i8;
        }
    });
    steps
}

/// `[n, groups]` sums of code minus zero point.
fn group_sums(q: &QuantWeight) -> Vec<i32> {
    let groups = q.groups();
    let mut sums = vec![0; q.n * groups];
    sums.par_chunks_mut(groups).enumerate().for_each(|(r, sums)| {
        let codes = q.codes[r * q.k..(r + 1) * q.k].chunks(q.group_size);
        for ((sum, codes), zero) in sums.iter_mut().zip(codes).zip(&q.zeros[r * groups..]) {
            *sum = codes.iter().map(|&code| i32::from(code)).sum::<i32>() - *zero as i32 * codes.len() as i32;
        }
    });
    sums
}

/// `[n, groups]` to `[groups, n_pad]`, so that neighbouring outputs are loaded together.
fn by_group<T: Copy>(q: &QuantWeight, values: &[T], padding: T) -> Vec<T> {
    let (groups, n_pad) = (q.groups(), padded_n(q.n));
    let mut transposed = vec![padding; groups * n_pad];
    for (r, row) in values.chunks_exact(groups).enumerate() {
        for (g, &value) in row.iter().enumerate() {
            transposed[g * n_pad + r] = value;
        }
    }
    transposed
}

/// Outputs of a weight in fragment order: whole tiles of 16.
pub(super) fn padded_n(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Where in a 32-bit word the code of row `g + 8 * r` and column `i` (of four) lies: nibble `[r][i]`.
type Nibbles = [[u32; 4]; 2];
/// Columns 0 1 of a row are the low and high half of a word once it is masked by 0x000f000f; then columns 2 3.
const NIBBLES_16BIT: Nibbles = [[0, 4, 2, 6], [1, 5, 3, 7]];
/// Columns 0 1 2 3 of a row are the bytes of a word once it is masked by 0x0f0f0f0f.
const NIBBLES_8BIT: Nibbles = [[0, 2, 4, 6], [1, 3, 5, 7]];
/// Columns 0 1 2 3 of a row are the four nibbles of a half word, the selector of a byte permutation.
const NIBBLES_CODEBOOK: Nibbles = [[0, 1, 2, 3], [4, 5, 6, 7]];

/// 4-bit codes `[n, k]` in tiles of 16 x 64 (512 bytes), the tiles of 16 rows one after the other.
fn fragments4(n: usize, k: usize, codes: &[u8], nibbles: Nibbles) -> Vec<u8> {
    let slices = k.div_ceil(64);
    let mut bytes = vec![0; padded_n(n) / 16 * slices * 512];
    bytes.par_chunks_mut(slices * 512).enumerate().for_each(|(tile, bytes)| {
        for (at, word) in bytes.chunks_exact_mut(4).enumerate() {
            let (slice, lane, j) = (at / 128, at / 4 % 32, at % 4);
            let first = slice * 64 + j / 2 * 32 + lane % 4 * 8 + j % 2 * 4;
            let mut value = 0u32;
            for (half, nibbles) in nibbles.iter().enumerate() {
                let row = tile * 16 + half * 8 + lane / 4;
                if row >= n || first >= k {
                    continue;
                }
                let columns = &codes[row * k + first..row * k + k.min(first + 4)];
                for (&code, nibble) in columns.iter().zip(nibbles) {
                    value |= u32::from(code) << (4 * nibble);
                }
            }
            word.copy_from_slice(&value.to_le_bytes());
        }
    });
    bytes
}

/// 8-bit codes `[n, k]` in tiles of 16 x 32 (512 bytes), k padded to 64.
fn fragments8(n: usize, k: usize, codes: &[u8]) -> Vec<u8> {
    let slices = k.div_ceil(64) * 2;
    let mut bytes = vec![0; padded_n(n) / 16 * slices * 512];
    bytes.par_chunks_mut(slices * 512).enumerate().for_each(|(tile, bytes)| {
        for (at, to) in bytes.chunks_exact_mut(8).enumerate() {
            let (slice, lane, half) = (at / 64, at / 2 % 32, at % 2);
            let (row, first) = (tile * 16 + half * 8 + lane / 4, slice * 32 + lane % 4 * 8);
            if row < n && first < k {
                let columns = &codes[row * k + first..row * k + k.min(first + 8)];
                to[..columns.len()].copy_from_slice(columns);
            }
        }
    });
    bytes
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;

//! Repacking of canonical weights into the layouts of the linear kernels (docs/formats.md, "Kernel layouts").

use rayon::prelude::*;

use super::candidates::{self, Config};
use super::choose::{Launch, Problem, choose, choose_batch_invariant};
use super::ops::u32_of;
use super::pack_blocks::{BlockShape, ROWS};
use super::pack_host::{pack_on_host, steps_fit_i8};
use super::pack_w4a8::NibbleShape;
use super::repack::repack;
use super::scale_parts::ScaleParts;
use super::{Buffer, CudaDevice, tuned};
use crate::device::cpu::check;
use crate::device::{Activation, Epilogue, Output, PackedBody, PackedWeight};
use crate::dtype::HostData;
use crate::error::{Error, Result};
use crate::quant::{ActQuant, Codebook, Factored, LinearWeight, QuantWeight, Weight};

/// How the bytes of a weight lie, which is also which kernels read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[n, k]` int8, code minus zero point: gemm_w8a8 and gemm_llm_int8 before sm_90.
    Rows8,
    /// The same in blocks of 64 x 128, as sm_90's products read them from shared memory: these two on sm_90.
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
        let packed = cuda_packed("duplicate", weight)?;
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
            ..*packed
        };
        let order = weight.order.as_ref().map(|order| Ok(order.cuda()?.duplicate()?.into())).transpose()?;
        Ok(PackedWeight { order, body: PackedBody::Cuda(Box::new(body)), ..*weight })
    }

    /// What a packed weight holds: its codes, then those there are of scales, zero points and sums.
    ///
    /// # Errors
    /// `Cuda`; `Shape` for a weight packed for another device.
    pub fn contents(&self, weight: &PackedWeight) -> Result<Vec<HostData>> {
        let packed = cuda_packed("contents", weight)?;
        let beside = [&packed.scales, &packed.zeros, &packed.sums].into_iter().flatten();
        std::iter::once(&packed.weights).chain(beside).map(|buffer| buffer.download(buffer.len())).collect()
    }
}

/// What `op` needs of `weight`.
pub(super) fn cuda_packed<'a>(op: &'static str, weight: &'a PackedWeight) -> Result<&'a CudaPacked> {
    match &weight.body {
        PackedBody::Cuda(packed) => Ok(packed),
        PackedBody::Cpu(_) => {
            Err(Error::Shape { op, expected: "a weight packed for CUDA".into(), got: "one packed for the CPU".into() })
        }
    }
}

/// Fails where the kernels that would run `weight` do not have `epilogue`.
pub(crate) fn check_epilogue(device: &CudaDevice, weight: &LinearWeight, epilogue: Epilogue) -> Result<()> {
    // To find the layout may take a look at every code, which is done only where something depends on it.
    let is_on_codes = weight.activation != ActQuant::None && epilogue.output != Output::Groups;
    if epilogue == Epilogue::NONE || is_on_codes {
        return Ok(());
    }
    check_kernels(layout(weight, device), weight, epilogue)
}

/// Fails where the kernels of `layout`, which is `weight`'s, do not have `epilogue`.
fn check_kernels(layout: Layout, weight: &LinearWeight, epilogue: Epilogue) -> Result<()> {
    let is_on_floats = epilogue != Epilogue::NONE && weight.activation == ActQuant::None;
    if is_on_floats && !matches!(layout, Layout::Blocks16(_)) {
        return Err(Error::unsupported(
            format!("SwiGLU fused into a weight of scheme {} on this GPU", weight.scheme()),
            "Kernels of compute capability 9.0 have it, for weights that their blocks hold: use silu_mul",
        ));
    }
    if epilogue.output == Output::Groups && !matches!(layout, Layout::Rows8 | Layout::Blocks8) {
        return Err(Error::unsupported(
            format!("codes in groups from a weight of scheme {}, k = {}", weight.scheme(), weight.k()),
            "Only 8-bit weights with a scale a channel and k a multiple of 16 have them",
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
    let scheme = weight.scheme();
    // Kernels of sm_90 multiply by factors, others have the weight in int8.
    if let Some((q, factored)) = weight.factored()
        && !device.uses_sm90()
    {
        weight.weight = Weight::Quant(factored.int8_rows(q));
    }
    let layout = layout(&weight, device);
    check_kernels(layout, &weight, epilogue)?;
    let (n, k) = (weight.n(), weight.k());
    // Layouts pad both sides to whole tiles of at most 256.
    u32_of(n.next_multiple_of(256))?;
    u32_of(k.next_multiple_of(256))?;
    let upload = |data: HostData| Buffer::upload(device, &data);
    let fixed = Some(epilogue.fixed_point(&weight)?).filter(|columns| !columns.is_empty());
    if epilogue.activation == Activation::SwiGlu && !matches!(layout, Layout::Canonical { .. }) {
        interleave(&mut weight);
    }
    let bias = weight.bias.map(HostData::F32).map(upload).transpose()?;
    // What unquantized weights have.
    let (mut order, mut zero, mut scale_parts) = (None, 0, ScaleParts::One);
    let packed = match weight.weight {
        Weight::Dense { data, .. } => {
            let dtype = device.dtype();
            let data = if data.dtype() == dtype { data } else { HostData::from_f32(dtype, data.to_f32()) };
            Packed::new(upload(data)?)
        }
        Weight::Quant(mut q) => {
            order = q.order.take().map(|order| upload(HostData::U32(order))).transpose()?;
            let beside = Beside::of(layout, &q, weight.activation);
            zero = beside.zero;
            if let Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook = layout {
                scale_parts = ScaleParts::of(&q.scales, largest(&q), device.dtype());
            }
            match repack(device, layout, &q, &beside)? {
                Some(packed) => packed,
                None => pack_on_host(layout, &q, &beside, device.dtype()).upload(device)?,
            }
        }
    };
    let mut body = CudaPacked {
        device: device.clone(),
        layout,
        n,
        k,
        group_size: scheme.group_size.unwrap_or(k),
        outliers: matches!(scheme.activation, ActQuant::LlmInt8 { .. }),
        codebook: scheme.codebook,
        zero,
        x_zero: weight.activation.zero_point(),
        x_zeros: weight.activation == ActQuant::DynamicAsymmetric,
        weights: packed.weights,
        scale_parts,
        scales: packed.scales,
        zeros: packed.zeros,
        sums: packed.sums,
        bias,
        fixed: fixed.map(HostData::I32).map(upload).transpose()?,
        epilogue,
        tuned: Vec::new(),
    };
    body.tuned = device.tuned().of(&body.problem(false));
    Ok(PackedWeight { n, k, scheme, epilogue, order: order.map(Into::into), body: PackedBody::Cuda(Box::new(body)) })
}

/// No weight of `q` is more times its scale.
fn largest(q: &QuantWeight) -> f32 {
    match &q.codebook {
        Some(codebook) => codebook.0.iter().fold(0.0, |max, value| value.abs().max(max)),
        None => f32::from(1u16 << q.bits),
    }
}

/// A packed weight: of `HostData`, or of `Buffer` in GPU memory.
#[derive(Debug)]
pub(super) struct Packed<T> {
    pub(super) weights: T,
    pub(super) scales: Option<T>,
    pub(super) zeros: Option<T>,
    pub(super) sums: Option<T>,
}

impl<T> Packed<T> {
    pub(super) fn new(weights: T) -> Self {
        Packed { weights, scales: None, zeros: None, sums: None }
    }
}

impl Packed<HostData> {
    fn upload(self, device: &CudaDevice) -> Result<Packed<Buffer>> {
        let upload = |data: HostData| Buffer::upload(device, &data);
        Ok(Packed {
            weights: upload(self.weights)?,
            scales: self.scales.map(upload).transpose()?,
            zeros: self.zeros.map(upload).transpose()?,
            sums: self.sums.map(upload).transpose()?,
        })
    }
}

/// How one value for each group of each row lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// `[n, groups]`
    ByRow,
    /// `[groups, n_pad]`, so that neighbouring outputs are loaded together.
    ByGroup { n_pad: usize },
}

/// What lies beside the codes of a layout.
#[derive(Debug)]
pub(super) struct Beside {
    /// Order of what there is; `None` where blocks hold it all.
    pub(super) order: Option<Order>,
    /// Zero points, by row as f32, by group as uint16.
    pub(super) zeros: bool,
    pub(super) sums: bool,
    /// Zero point of every weight, where there are no `zeros`.
    pub(super) zero: u32,
    /// Where blocks have factors; the scales are those of rows.
    pub(super) factored: Option<Factored>,
}

impl Beside {
    pub(super) fn of(layout: Layout, q: &QuantWeight, activation: ActQuant) -> Self {
        let by_group = |multiple| Some(Order::ByGroup { n_pad: q.n.next_multiple_of(multiple) });
        let asymmetric_input = activation.zero_point() != 0 || activation == ActQuant::DynamicAsymmetric;
        let zero = q.zeros[0] as u32;
        let (order, zeros, sums, zero) = match layout {
            Layout::Canonical { .. } => (Some(Order::ByRow), true, false, 0),
            Layout::Dense { .. } | Layout::CanonicalCodebook => (Some(Order::ByRow), false, false, 0),
            // Sums always: uint8 codes of symmetric activations have a zero point too.
            Layout::Rows8 => (Some(Order::ByRow), false, true, 0),
            Layout::Blocks8 => (by_group(SM90_COLUMNS), false, true, 0),
            Layout::Blocks16(_) => (None, false, false, zero),
            Layout::Blocks4(shape) => (shape.one_group.then_some(by_group(ROWS)).flatten(), false, false, 0),
            Layout::Fragments8Bit { bits: 8 } => (by_group(TILE), false, asymmetric_input, zero),
            Layout::Fragments8Bit { .. } | Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook => {
                (by_group(TILE), q.zeros.par_iter().any(|&z| z != q.zeros[0]), asymmetric_input, zero)
            }
        };
        let has_factors = matches!(layout, Layout::Blocks4(NibbleShape { factors: true, .. }));
        Beside { order, zeros, sums, zero, factored: has_factors.then(|| Factored::of(q)).flatten() }
    }
}

/// Gate above up as 8 rows of gate, 8 of up, and so on, for kernels that own such blocks: all but those of canonical codes.
fn interleave(weight: &mut LinearWeight) {
    let Weight::Quant(q) = &mut weight.weight else { return };
    let n = q.n;
    let rows: Vec<u32> = (0..n as u32).collect();
    q.codes.gather_rows(q.k, &interleaved(&rows, n));
    q.scales = interleaved(&q.scales, n);
    q.zeros = interleaved(&q.zeros, n);
    if let Some(bias) = &mut weight.bias {
        *bias = interleaved(bias, n);
    }
}

/// The `n` rows of `values`, blocks of 8 of its first half and of its second in turn.
pub(super) fn interleaved<T: Copy>(values: &[T], n: usize) -> Vec<T> {
    let (gate, up) = values.split_at(values.len() / 2);
    let block = 8 * values.len() / n;
    gate.chunks(block).zip(up.chunks(block)).flat_map(|(gate, up)| [gate, up].concat()).collect()
}

/// The layout of the fastest kernels that `device` has for `weight`. The order of its rows makes no difference.
fn layout(weight: &LinearWeight, device: &CudaDevice) -> Layout {
    let Weight::Quant(q) = &weight.weight else { return Layout::Dense { aligned: weight.k().is_multiple_of(8) } };
    let blocks = match weight.activation {
        _ if !device.uses_sm90() => None,
        ActQuant::None => BlockShape::of(q, device.dtype()).map(Layout::Blocks16),
        ActQuant::LlmInt8 { .. } => None,
        _ => NibbleShape::of(q).map(Layout::Blocks4),
    };
    blocks.unwrap_or_else(|| general_layout(q, weight.activation, device.uses_sm90()))
}

/// The layout of `q` among those without blocks that have a shape, for kernels of sm_90 too where `sm90`.
pub(super) fn general_layout(q: &QuantWeight, activation: ActQuant, sm90: bool) -> Layout {
    let per_channel = q.groups() == 1;
    let whole_groups = per_channel || q.group_size.is_multiple_of(32);
    if q.codebook.is_some() {
        let is_fast = whole_groups && q.k.is_multiple_of(8);
        return if is_fast { Layout::FragmentsCodebook } else { Layout::CanonicalCodebook };
    }
    if activation == ActQuant::None {
        let integral = q.zeros.par_iter().all(|z| z.fract() == 0.0);
        return match (whole_groups && integral && q.k.is_multiple_of(8), q.bits) {
            (true, ..=4) => Layout::Fragments16Bit { bits: 4 },
            (true, _) => Layout::Fragments16Bit { bits: 8 },
            (false, _) => Layout::Canonical { int8: false },
        };
    }
    if !whole_groups || !q.k.is_multiple_of(16) {
        return Layout::Canonical { int8: true };
    }
    match q.bits {
        ..=4 if !matches!(activation, ActQuant::LlmInt8 { .. }) => Layout::Fragments8Bit { bits: 4 },
        _ if !steps_fit_i8(q) => Layout::Canonical { int8: true },
        _ if per_channel && sm90 => Layout::Blocks8,
        _ if per_channel => Layout::Rows8,
        _ => Layout::Fragments8Bit { bits: 8 },
    }
}

/// The widest tile of gemm_w8a8/sm90, which reads scales and sums of whole tiles.
const SM90_COLUMNS: usize = 256;

/// Outputs of a tile in fragment order.
const TILE: usize = 16;

/// Outputs of a weight in fragment order: whole tiles of 16.
pub(super) fn padded_n(n: usize) -> usize {
    n.next_multiple_of(TILE)
}

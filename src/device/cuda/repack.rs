//! Packing of weights on the GPU: codes go up as the file holds them, and kernels/ops/repack.cu puts them in the layout of
//! the linear kernels, byte for byte what `pack_host` makes of them.
#![allow(unsafe_code)] // kernel launches

use std::ffi::c_void;

use rayon::prelude::*;

use super::abi::{self, RepackArgs, RepackPart};
use super::ops::u32_of;
use super::pack::{Beside, Layout, Order, Packed, padded_n};
use super::pack_host::{NIBBLES_8BIT, NIBBLES_16BIT, NIBBLES_CODEBOOK, Nibbles};
use super::pack_w4a8::NibbleShape;
use super::{Buffer, CudaDevice};
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::codes::Part;
use crate::quant::pack::Packing;
use crate::quant::{QuantWeight, Storage};

/// Most parts of a weight that the kernels know.
const MOST_PARTS: usize = abi::LOWBIT_REPACK_PARTS as usize;

/// Moves `q` to the GPU in `layout` with what lies `beside`. `None` where the host has to pack it: stacked of more parts than
/// [`MOST_PARTS`], in blocks of 2 bits, or on a device that is to.
///
/// Beside the result it takes room for the codes as they lie in the file, and for scales and zero points as f32, until it
/// is done (models/plan.rs counts it).
///
/// # Errors
/// `OutOfMemory`; `Cuda`; `Unsupported` for a weight beyond 32-bit indices.
pub(super) fn repack(
    device: &CudaDevice,
    layout: Layout,
    q: &QuantWeight,
    beside: &Beside,
) -> Result<Option<Packed<Buffer>>> {
    let parts = q.codes.parts(q.n);
    let is_known = !matches!(layout, Layout::Blocks4(NibbleShape { bits: 2, .. } | NibbleShape { factors: true, .. }));
    if device.packs_on_host() || parts.len() > MOST_PARTS || !is_known {
        return Ok(None);
    }
    let upload = |data: HostData| Buffer::upload(device, &data);
    let indices = |of: Option<&[u32]>| of.map(|of| upload(HostData::U32(of.to_vec()))).transpose();
    let (rows, columns) = (indices(q.codes.rows())?, indices(q.codes.columns())?);
    let sources = parts.iter().map(|part| Buffer::upload_bytes(device, part.bytes)).collect::<Result<Vec<_>>>()?;
    let scales = Buffer::upload_floats(device, &q.scales)?;
    let uneven = layout != Layout::CanonicalCodebook && q.zeros.par_iter().any(|&z| z != q.zeros[0]);
    let zeros = uneven.then(|| Buffer::upload_floats(device, &q.zeros)).transpose()?;
    let pointer = |buffer: &Option<Buffer>| buffer.as_ref().map_or(std::ptr::null_mut(), Buffer::ptr::<u32>);
    let common = RepackArgs {
        parts: part_args(&parts, sources.iter().map(Buffer::ptr), q)?,
        rows: pointer(&rows),
        columns: pointer(&columns),
        scales: scales.ptr(),
        zeros: pointer(&zeros).cast(),
        zero: q.zeros[0] as i32,
        n: u32_of(q.n)?,
        k: u32_of(q.k)?,
        bits: u32::from(q.bits),
        group_size: u32_of(q.group_size)?,
        groups: u32_of(q.groups())?,
        ..RepackArgs::default()
    };
    // SAFETY of the launches below: the parts hold `n` rows of `k` codes (`Stored::new`), `rows` and `columns` are permutations
    // of those, scales and zero points were checked to be `[n, groups]`, and every output has the units that are counted.
    let launch = |function: &str, args: &RepackArgs, threads_a_unit: usize| {
        let threads = u32_of(args.units as usize * threads_a_unit)?;
        let blocks = [threads.div_ceil(abi::LOWBIT_REPACK_THREADS), 1, 1];
        // SAFETY: as said above.
        unsafe { device.launch("ops/repack", function, blocks, abi::LOWBIT_REPACK_THREADS, 0, args) }
    };
    let shape = Shape::of(layout, q, device.suffix());
    let weights = Buffer::new(device, shape.dtype, shape.bytes)?;
    let units = u32_of(shape.bytes.div_ceil(16))?;
    let specific = RepackArgs { out: weights.ptr(), units, ..shape.args(common) };
    launch(&shape.function, &specific, 1)?;
    let mut packed = Packed::new(weights);
    let Some(order) = beside.order else { return Ok(Some(packed)) };
    let (n_pad, lines) = if let Order::ByGroup { n_pad } = order { (n_pad, n_pad) } else { (0, q.n) };
    let values = lines * q.groups();
    let common = RepackArgs { n_pad: u32_of(n_pad)?, units: u32_of(values)?, ..common };
    if beside.sums {
        let sums = Buffer::new(device, DType::I32, values)?;
        launch("repack_sums", &RepackArgs { out: sums.ptr(), steps: 1, ..common }, 32)?;
        packed.sums = Some(sums);
    }
    if beside.zeros && order == Order::ByRow {
        packed.zeros = Some(Buffer::upload_floats(device, &q.zeros)?);
    } else if beside.zeros {
        let by_group = Buffer::new(device, DType::U8, 2 * values)?;
        launch("repack_zeros", &RepackArgs { out: by_group.ptr(), ..common }, 1)?;
        packed.zeros = Some(by_group);
    }
    packed.scales = Some(match order {
        Order::ByRow => scales,
        Order::ByGroup { .. } => {
            let by_group = Buffer::new(device, DType::F32, values)?;
            launch("repack_scales", &RepackArgs { out: by_group.ptr(), ..common }, 1)?;
            by_group
        }
    });
    Ok(Some(packed))
}

/// What a layout's weights are and how its kernel is called.
struct Shape {
    function: String,
    dtype: DType,
    bytes: usize,
    /// Codes minus zero points.
    steps: bool,
    nibbles: Nibbles,
    block: Block,
}

/// What a block has beside its codes, where weights lie in blocks.
#[derive(Default)]
struct Block {
    /// Bits of a code.
    bits: usize,
    /// With scales of their own.
    groups: usize,
    low_scales: bool,
    zeros: bool,
}

impl Shape {
    fn of(layout: Layout, q: &QuantWeight, suffix: &str) -> Self {
        let (n, k) = (q.n, q.k);
        let blocks = n.div_ceil(64) * k.div_ceil(128);
        let fragments = |bits| padded_n(n) * k.next_multiple_of(64) * bits / 8;
        let shape = |function: &str, dtype, bytes, steps| Shape {
            function: function.to_owned(),
            dtype,
            bytes,
            steps,
            nibbles: NIBBLES_16BIT,
            block: Block::default(),
        };
        match layout {
            Layout::Rows8 => shape("repack_rows", DType::I8, n * k, true),
            // Dense weights never come here; their elements are not codes.
            Layout::Canonical { .. } | Layout::CanonicalCodebook | Layout::Dense { .. } => {
                shape("repack_rows", DType::U8, n * k, false)
            }
            Layout::Blocks8 => shape("repack_blocks8", DType::I8, blocks * 64 * 128, true),
            Layout::Blocks4(s) => Shape {
                block: Block { bits: 4, groups: if s.one_group { 0 } else { s.parts }, ..Block::default() },
                ..shape("repack_blocks4", DType::U8, blocks * s.bytes(), true)
            },
            Layout::Blocks16(s) => Shape {
                block: Block { bits: s.bits, groups: s.groups, low_scales: s.low_scales, zeros: s.zeros },
                ..shape(&format!("repack_blocks16_{suffix}"), DType::U8, blocks * s.bytes(), false)
            },
            Layout::Fragments8Bit { bits: 8 } => shape("repack_fragments8", DType::U8, fragments(8), true),
            Layout::Fragments16Bit { bits: 8 } => shape("repack_fragments8", DType::U8, fragments(8), false),
            Layout::Fragments8Bit { .. } => {
                Shape { nibbles: NIBBLES_8BIT, ..shape("repack_fragments4", DType::U8, fragments(4), false) }
            }
            Layout::Fragments16Bit { .. } => shape("repack_fragments4", DType::U8, fragments(4), false),
            Layout::FragmentsCodebook => {
                Shape { nibbles: NIBBLES_CODEBOOK, ..shape("repack_fragments4", DType::U8, fragments(4), false) }
            }
        }
    }

    fn args(&self, common: RepackArgs) -> RepackArgs {
        let places = |half: [u32; 4]| half.iter().rev().fold(0, |word, nibble| word << 8 | nibble);
        RepackArgs {
            steps: u32::from(self.steps),
            nibbles: places(self.nibbles[0]),
            nibbles_high: places(self.nibbles[1]),
            container: self.block.bits as u32,
            block_groups: self.block.groups as u32,
            low_scales: u32::from(self.block.low_scales),
            zero_points: u32::from(self.block.zeros),
            ..common
        }
    }
}

/// The kernels' view of `parts`, whose bytes are at `addresses`.
fn part_args(
    parts: &[Part<'_>],
    addresses: impl Iterator<Item = *mut c_void>,
    q: &QuantWeight,
) -> Result<[RepackPart; MOST_PARTS]> {
    let mut args = [RepackPart { first: u32::MAX, ..RepackPart::default() }; MOST_PARTS];
    let mut first = 0;
    for ((to, part), address) in args.iter_mut().zip(parts).zip(addresses) {
        let words = |packing: Packing| packing.words(q.k, q.bits);
        let (storage, strides) = match part.storage {
            Storage::Bytes { .. } => (abi::LOWBIT_STORED_BYTES, (0, 0)),
            Storage::Rows(Packing::Dense) => (abi::LOWBIT_STORED_STREAM, (1, words(Packing::Dense))),
            Storage::Rows(Packing::Aligned) => (abi::LOWBIT_STORED_ALIGNED, (1, words(Packing::Aligned))),
            Storage::Columns => (abi::LOWBIT_STORED_STREAM, (part.n, 1)),
            Storage::Awq => (abi::LOWBIT_STORED_AWQ, (part.n / 8, 0)),
            Storage::HighFirst => (abi::LOWBIT_STORED_HIGH, (0, 0)),
        };
        *to = RepackPart {
            data: address,
            first: u32_of(first)?,
            storage,
            offset: if let Storage::Bytes { offset } = part.storage { u32::from(offset) } else { 0 },
            word_stride: u32_of(strides.0)?,
            row_stride: u32_of(strides.1)?,
            per_word: 32 / u32::from(q.bits),
        };
        first += part.n;
    }
    Ok(args)
}

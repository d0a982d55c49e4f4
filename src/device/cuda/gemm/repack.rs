//! Packing of weights on the GPU: codes go up as the file holds them, and kernels/ops/repack.cu puts them in the layout of
//! the linear kernels, byte for byte what the host makes of them.
#![allow(unsafe_code)] // kernel launches

use std::ffi::c_void;

use rayon::prelude::*;

use super::layout::e4m3::arrangement;
use super::packed::{Order, Packed, Parameters};
use super::recipe::Repack;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::embedded::abi::{self, RepackArgs, RepackPart};
use crate::device::cuda::kernel::u32_of;
use crate::device::cuda::memory::Buffer;
use crate::device::cuda::op_kernel::OpKernel;
use crate::dtype::{DType, HostData};
use crate::error::Result;
use crate::quant::codes::Part;
use crate::quant::pack::Packing;
use crate::quant::{QuantWeight, Storage};

/// Most parts of a weight that the kernels know.
const MOST_PARTS: usize = abi::LOWBIT_REPACK_PARTS as usize;

/// Moves `q` to the GPU, its codes as `codes` says and `parameters` beside them. `None` where the host has to pack it: stacked of
/// more parts than [`MOST_PARTS`].
///
/// Beside the result it takes room for the codes as they lie in the file, and for scales and zero points as f32, until it
/// is done (the memory plan counts it).
///
/// # Errors
/// `OutOfMemory`; `Cuda`; `Unsupported` for a weight beyond 32-bit indices.
pub(super) fn repack(
    device: &CudaDevice,
    q: &QuantWeight,
    codes: &Repack,
    parameters: Option<Parameters>,
) -> Result<Option<Packed<Buffer>>> {
    let parts = q.codes.parts(q.n);
    if parts.len() > MOST_PARTS {
        return Ok(None);
    }
    let upload = |data: HostData| Buffer::upload(device, &data);
    let indices = |of: Option<&[u32]>| of.map(|of| upload(HostData::U32(of.to_vec()))).transpose();
    let (rows, columns) = (indices(q.codes.rows())?, indices(q.codes.columns())?);
    let sources = parts.iter().map(|part| Buffer::upload_bytes(device, part.bytes)).collect::<Result<Vec<_>>>()?;
    let scales = Buffer::upload_floats(device, &q.scales)?;
    let uneven = q.encoding.is_affine() && q.zeros.par_iter().any(|&z| z != q.zeros[0]);
    let zeros = uneven.then(|| Buffer::upload_floats(device, &q.zeros)).transpose()?;
    let pointer = |buffer: &Option<Buffer>| buffer.as_ref().map_or(std::ptr::null_mut(), Buffer::ptr::<u32>);
    let common = RepackArgs {
        parts: part_args(&parts, sources.iter().map(Buffer::ptr), q)?,
        rows: pointer(&rows),
        columns: pointer(&columns),
        scales: scales.ptr(),
        zero_points: pointer(&zeros).cast(),
        zero_point: q.zeros[0] as i32,
        n: u32_of(q.n)?,
        k: u32_of(q.k)?,
        bits: u32::from(q.bits),
        group_size: u32_of(q.group_size)?,
        groups: u32_of(q.groups())?,
        ..RepackArgs::default()
    };
    // SAFETY of the launches below: the parts hold `n` rows of `k` codes (`Stored::new`), `rows` and `columns` are permutations
    // of those, scales and zero points were checked to be `[n, groups]`, and every output has the units that are counted.
    let launch = |kernel: OpKernel, args: &RepackArgs, threads_a_unit: usize| {
        let threads = u32_of(args.units as usize * threads_a_unit)?;
        let blocks = [threads.div_ceil(abi::LOWBIT_REPACK_THREADS), 1, 1];
        // SAFETY: as said above.
        unsafe { device.launch_op(kernel, blocks, abi::LOWBIT_REPACK_THREADS, 0, args) }
    };
    let out = Buffer::new(device, codes.dtype, codes.bytes)?;
    let units = u32_of(codes.bytes.div_ceil(16))?;
    launch(codes.kernel, &RepackArgs { out: out.ptr(), units, ..codes.args(common) }, 1)?;
    let mut packed = Packed::new(out);
    let Some(Parameters { order, zero_points, sums }) = parameters else { return Ok(Some(packed)) };
    let lines = order.lines(q.n);
    let n_pad = if order == Order::ByRow { 0 } else { lines };
    let values = lines * q.groups();
    let common = RepackArgs { n_pad: u32_of(n_pad)?, units: u32_of(values)?, ..common };
    if sums {
        let sums = Buffer::new(device, DType::I32, values)?;
        launch(OpKernel::RepackSums, &RepackArgs { out: sums.ptr(), subtract_zeros: 1, ..common }, 32)?;
        packed.sums = Some(sums);
    }
    if zero_points && order == Order::ByRow {
        packed.zero_points = Some(Buffer::upload_floats(device, &q.zeros)?);
    } else if zero_points {
        let by_group = Buffer::new(device, DType::U8, 2 * values)?;
        launch(OpKernel::RepackZeros, &RepackArgs { out: by_group.ptr(), ..common }, 1)?;
        packed.zero_points = Some(by_group);
    }
    packed.scales = Some(match order {
        Order::ByRow => scales,
        Order::ByGroup { .. } => {
            let by_group = Buffer::new(device, DType::F32, values)?;
            launch(OpKernel::RepackScales, &RepackArgs { out: by_group.ptr(), ..common }, 1)?;
            by_group
        }
    });
    Ok(Some(packed))
}

impl Repack {
    fn args(&self, common: RepackArgs) -> RepackArgs {
        let places = |half: [u32; 4]| half.iter().rev().fold(0, |word, nibble| word << 8 | nibble);
        RepackArgs {
            subtract_zeros: u32::from(self.steps),
            nibbles: places(self.nibbles[0]),
            nibbles_high: places(self.nibbles[1]),
            container: self.block.bits as u32,
            block_groups: self.block.groups as u32,
            low_scales: u32::from(self.block.low_scales),
            has_zero_points: u32::from(self.block.zero_points),
            e4m3: self.e4m3.map_or(abi::LOWBIT_E4M3_NONE, arrangement),
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

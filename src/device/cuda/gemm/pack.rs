//! Packing: a family says how codes and what belongs to them lie; the GPU does it, or the host where the GPU cannot.

use rayon::prelude::*;

use super::packed::{Order, Packed, Parameters};
use super::recipe::Recipe;
use super::repack;
use crate::device::cuda::context::CudaDevice;
use crate::device::cuda::memory::Buffer;
use crate::dtype::HostData;
use crate::error::Result;
use crate::quant::QuantWeight;

/// Moves `q` to the GPU as `recipe` says.
///
/// # Errors
/// `OutOfMemory`; `Cuda`; `Unsupported` for a weight beyond 32-bit indices.
pub(super) fn pack(device: &CudaDevice, q: &QuantWeight, recipe: &Recipe) -> Result<Packed<Buffer>> {
    let on_gpu = recipe.on_gpu.as_ref().filter(|_| !device.packs_on_host() && recipe.row_scales.is_none());
    if let Some(codes) = on_gpu
        && let Some(packed) = repack::repack(device, q, codes, recipe.parameters)?
    {
        return Ok(packed);
    }
    pack_on_host(q, recipe).try_map(|data| Buffer::upload(device, data))
}

/// `q` on the host as `recipe` says: what every layout means, in plain code.
pub(super) fn pack_on_host(q: &QuantWeight, recipe: &Recipe) -> Packed<HostData> {
    let _unpacked: &[u8] = &q.codes; // before cores share the work
    let mut packed = Packed::new((recipe.on_host)(q));
    let Some(Parameters { order, zero_points, sums }) = recipe.parameters else { return packed };
    packed.scales = Some(HostData::F32(match &recipe.row_scales {
        Some(scales) => ordered(scales, 1, order),
        None => ordered(&q.scales, q.groups(), order),
    }));
    packed.zero_points = zero_points.then(|| match order {
        Order::ByGroup { .. } => {
            let zeros = ordered(&q.zeros, q.groups(), order);
            HostData::U8(zeros.into_iter().flat_map(|z| (z as u16).to_le_bytes()).collect())
        }
        Order::ByRow => HostData::F32(q.zeros.clone()),
    });
    packed.sums = sums.then(|| HostData::I32(ordered(&group_sums(q), q.groups(), order)));
    packed
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

/// `[n, groups]` values in `order`, padded with zeros.
fn ordered<T: Copy + Default>(values: &[T], groups: usize, order: Order) -> Vec<T> {
    let Order::ByGroup { .. } = order else { return values.to_vec() };
    let lines = order.lines(values.len() / groups);
    let mut transposed = vec![T::default(); groups * lines];
    for (r, row) in values.chunks_exact(groups).enumerate() {
        for (g, &value) in row.iter().enumerate() {
            transposed[g * lines + r] = value;
        }
    }
    transposed
}

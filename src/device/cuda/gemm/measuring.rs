//! What benchmarks and tests of linear layers ask of packed weights: copies, contents, and one configuration or another.

use super::table::{Choice, Tuned};
use crate::device::cuda::context::CudaDevice;
use crate::device::{ActOrder, PackedBody, PackedWeight};
use crate::dtype::HostData;
use crate::error::Result;

impl CudaDevice {
    /// A copy of `weight` in memory of its own, for measurements that must not find it in a cache.
    ///
    /// # Errors
    /// `OutOfMemory`; `Cuda`; `Shape` for a weight packed for another device.
    pub fn duplicate(&self, weight: &PackedWeight) -> Result<PackedWeight> {
        let body = PackedBody::Cuda(Box::new(weight.cuda("duplicate")?.duplicate()?));
        let duplicate = |order: &ActOrder| Ok(ActOrder::new(order.indices().cuda()?.duplicate()?.into(), order.id()));
        let order = weight.order.as_ref().map(duplicate).transpose()?;
        Ok(PackedWeight { order, body, ..*weight })
    }

    /// What a packed weight holds: its codes, then those there are of scales, zero points and sums.
    ///
    /// # Errors
    /// `Cuda`; `Shape` for a weight packed for another device.
    pub fn contents(&self, weight: &PackedWeight) -> Result<Vec<HostData>> {
        let packed = weight.cuda("contents")?;
        packed.weight.parts.parts().map(|buffer| buffer.download(buffer.len())).collect()
    }

    /// Configurations of `weight`'s kernels among which the fastest for `m` rows should be, that of the cost model first. Empty
    /// where there is nothing to choose.
    pub fn candidates(&self, weight: &PackedWeight, m: usize) -> Vec<Choice> {
        let PackedBody::Cuda(packed) = &weight.body else { return Vec::new() };
        packed.runner.candidates(&packed.weight, m)
    }

    /// Makes `weight` run `choice.m` rows in that configuration, one of [`Self::candidates`], and no other number as any table says.
    pub fn fix(&self, weight: &mut PackedWeight, choice: &Choice) {
        if let PackedBody::Cuda(packed) = &mut weight.body {
            packed.runner = packed.runner.tuned_by(&packed.weight, &Tuned::only(choice));
        }
    }
}

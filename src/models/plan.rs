//! What a model will take of a device's memory, found before anything is allocated by allocating it on a device that only counts.

use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::device::{Device, MetaDevice, Target};
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::layers::RmsNorm;
use crate::quant::Scheme;

use super::batch::Limits;
use super::decode_graphs::DecodeGraphs;
use super::role::Slot;
use super::spec::{LinearSpec, ModelSpec};
use super::workspace::{HeadScratch, Workspace, kv_cache};

/// Bytes a model takes on its device, by use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, norms and embedding.
    pub weights: u64,
    /// Keys and values.
    pub kv_cache: u64,
    /// Activations, logits, batch metadata and rotary table.
    pub scratch: u64,
    /// Most that packing takes beside the weights: codes of one layer as they are in the file, its scales and zero points as
    /// f32. Given back before the KV cache and scratch are allocated.
    pub packing: u64,
}

impl MemoryPlan {
    /// The plan of a model whose embedding is stored in `embedding`, and whose linear layers have the schemes that `scheme` tells
    /// by module name.
    ///
    /// # Errors
    /// Those of `scheme`.
    pub fn new(
        config: &ModelConfig,
        limits: &Limits,
        target: Target,
        embedding: DType,
        mut scheme: impl FnMut(&str) -> Result<Scheme>,
    ) -> Result<MemoryPlan> {
        let spec = ModelSpec::new(config);
        let meta = MetaDevice::new(target);
        let device = Device::Meta(meta.clone());
        let (mut weights, mut packing) = (0, 0);
        let mut pack = |joined: &Joined| -> Result<()> {
            let Joined { scheme, n, k, bias, parts, .. } = joined;
            weights += target.packed_bytes(scheme, *n, *k, *bias);
            // Whether parts share their order, headers do not tell.
            (0..if scheme.act_order { *parts } else { 0 })
                .try_for_each(|_| device.zeros(DType::U32, *k).map(|_| ()))?;
            packing = packing.max(packing_bytes(scheme, *n, *k));
            Ok(())
        };
        let mut open: Option<Joined> = None;
        let of_layers = spec.layers.iter().enumerate().flat_map(|(index, layer)| {
            layer.parts.linears().map(move |(role, linear)| (Some((index, role.slot())), linear))
        });
        for (slot, linear) in of_layers.chain([(None, &spec.head)]) {
            let scheme = scheme(&linear.name)?;
            match &mut open {
                Some(joined) if slot.is_some() && joined.slot == slot && joined.scheme == scheme => joined.add(linear),
                _ => {
                    if let Some(joined) = open.replace(Joined::new(slot, scheme, linear)) {
                        pack(&joined)?;
                    }
                }
            }
        }
        open.iter().try_for_each(&mut pack)?;
        for norm in spec.norms() {
            RmsNorm::new(&device, &HostData::zeros(DType::F32, norm.elements()), config.rms_norm_eps)?;
        }
        device.zeros(embedding, spec.embedding.elements())?;
        weights += meta.take_bytes();
        kv_cache(&device, config, limits)?;
        let kv_cache = meta.take_bytes();
        Workspace::new(&device, config, limits)?;
        DecodeGraphs::new(&device, limits)?;
        HeadScratch::new(&device, config, limits)?;
        Ok(MemoryPlan { weights, kv_cache, scratch: meta.take_bytes(), packing })
    }

    /// The plan of a checkpoint's model.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear_scheme`].
    pub fn of_checkpoint(checkpoint: &Checkpoint, limits: &Limits, target: Target) -> Result<MemoryPlan> {
        let (config, scheme) = (checkpoint.config(), |name: &str| checkpoint.linear_scheme(name));
        MemoryPlan::new(config, limits, target, embedding_dtype(checkpoint), scheme)
    }

    /// What to say of a head of `scheme` that is tied: it is held beside the embedding, of whose layout its kernel knows
    /// nothing. `None` for one that is not.
    pub fn tied_head(config: &ModelConfig, target: Target, scheme: &Scheme) -> Option<String> {
        let ModelSpec { head, is_head_tied, .. } = ModelSpec::new(config);
        let mib = target.packed_bytes(scheme, head.n, head.k, head.bias) as f64 / f64::from(1 << 20);
        is_head_tied.then(|| {
            format!("the head is the embedding and is held twice: as rows to look up, and packed for the head's kernel ({mib:.1} MiB, counted above)")
        })
    }

    /// All that is needed at once.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv_cache.saturating_add(self.scratch).max(self.packing))
    }

    /// Fails when the plan needs more than `free` bytes.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn check(&self, free: u64) -> Result<()> {
        if self.total() <= free {
            return Ok(());
        }
        let grows_with_sequences = self.weights < free;
        let advice = if grows_with_sequences {
            "The weights fit, KV cache and scratch do not: fewer or shorter sequences take less"
        } else {
            "Use a model with fewer or smaller weights, or another device"
        };
        Err(Error::OutOfMemory {
            what: format!(
                "the model ({} weights, {} KV cache, {} scratch bytes)",
                self.weights, self.kv_cache, self.scratch
            ),
            needed_bytes: self.total(),
            free_bytes: free,
            advice: advice.into(),
            grows_with_sequences,
        })
    }
}

/// A type as wide as that of a checkpoint's embedding.
fn embedding_dtype(checkpoint: &Checkpoint) -> DType {
    let spec = ModelSpec::new(checkpoint.config()).embedding;
    let bytes = checkpoint.inventory().find(|(name, ..)| *name == spec.name).map_or(0, |(.., bytes)| bytes);
    if bytes == 4 * spec.elements() { DType::F32 } else { DType::BF16 }
}

/// Neighbours of a slot that have one scheme, which are packed as one weight.
struct Joined {
    /// Layer and slot; `None` of the head.
    slot: Option<(usize, Slot)>,
    scheme: Scheme,
    n: usize,
    k: usize,
    bias: bool,
    parts: usize,
}

impl Joined {
    fn new(slot: Option<(usize, Slot)>, scheme: Scheme, linear: &LinearSpec) -> Joined {
        Joined { slot, scheme, n: linear.n, k: linear.k, bias: linear.bias, parts: 1 }
    }

    fn add(&mut self, linear: &LinearSpec) {
        self.n += linear.n;
        self.bias |= linear.bias;
        self.parts += 1;
    }
}

/// Bytes that packing a layer takes beside its result: codes, one to a byte at most, scales and zero points.
fn packing_bytes(scheme: &Scheme, n: usize, k: usize) -> u64 {
    let (n, k) = (n as u64, k as u64);
    let groups = scheme.group_size.map_or(1, |g| k.div_ceil(g as u64));
    if scheme.is_dense() { 0 } else { n * k + n * groups * 8 }
}

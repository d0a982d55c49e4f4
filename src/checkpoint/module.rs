//! The tensors of one linear layer: which are there, which are used, and what is wrong with them.

use safetensors::Dtype;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{ActQuant, LinearWeight, Scheme, SharedBytes, Weight};

use super::shards::{Entry, Shards};

pub(super) const FLOATS: &[Dtype] = &[Dtype::F16, Dtype::BF16, Dtype::F32];
pub(super) const WORDS: &[Dtype] = &[Dtype::I32, Dtype::U32];

/// Suffixes that only quantized layers have; one of them on a layer that should be plain is a contradiction.
const QUANTIZED: [&str; 8] =
    ["W_q", "qweight", "weight_packed", "weight_scale", "weight_scale_inv", "scales", "SCB", "weight.absmax"];

/// One linear layer under examination. Formats look tensors up through it; it keeps what was used, and gathers
/// every problem rather than the first.
#[derive(Debug)]
pub(super) struct Module<'a> {
    shards: &'a Shards,
    pub(super) name: &'a str,
    /// What is wrong, each naming its tensor.
    pub(super) problems: Vec<String>,
    /// Things worth telling, without the module's name.
    pub(super) notes: Vec<String>,
    /// Suffixes of tensors that will be read.
    pub(super) used: Vec<&'static str>,
}

/// `n` output channels by `k` inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) n: usize,
    pub(super) k: usize,
}

impl<'a> Module<'a> {
    pub(super) fn new(shards: &'a Shards, name: &'a str) -> Module<'a> {
        Module { shards, name, problems: Vec::new(), notes: Vec::new(), used: Vec::new() }
    }

    pub(super) fn shards(&self) -> &'a Shards {
        self.shards
    }

    pub(super) fn full(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    pub(super) fn entry(&self, suffix: &str) -> Option<&'a Entry> {
        self.shards.get(&self.full(suffix))
    }

    pub(super) fn has(&self, suffix: &str) -> bool {
        self.entry(suffix).is_some()
    }

    /// Whether a tensor is there that only quantized layers have.
    pub(super) fn has_quantized(&self) -> bool {
        QUANTIZED.iter().any(|suffix| self.has(suffix))
    }

    pub(super) fn problem(&mut self, suffix: &str, reason: impl std::fmt::Display) {
        self.problems.push(format!("`{}`: {reason}", self.full(suffix)));
    }

    /// The shape of a matrix that must be there, both sizes positive.
    pub(super) fn matrix(&mut self, suffix: &'static str, dtypes: &[Dtype]) -> Option<(usize, usize)> {
        self.used.push(suffix);
        let Some(entry) = self.entry(suffix) else {
            self.problem(suffix, "missing");
            return None;
        };
        if !dtypes.contains(&entry.dtype) {
            self.problem(suffix, format!("is {:?}; expected {}", entry.dtype, names(dtypes)));
            return None;
        }
        match entry.shape.as_slice() {
            &[rows, columns] if rows > 0 && columns > 0 => Some((rows, columns)),
            shape => {
                self.problem(suffix, format!("has shape {shape:?}; expected a matrix"));
                None
            }
        }
    }

    /// Checks a tensor that must be there and have one of `shapes`.
    pub(super) fn need(&mut self, suffix: &'static str, dtypes: &[Dtype], shapes: &[&[usize]]) {
        if !self.optional(suffix, dtypes, shapes) {
            self.problem(suffix, format!("missing; expected {:?} {}", shapes[0], names(dtypes)));
        }
    }

    /// Checks a tensor if it is there; tells whether it is.
    pub(super) fn optional(&mut self, suffix: &'static str, dtypes: &[Dtype], shapes: &[&[usize]]) -> bool {
        self.used.push(suffix);
        let Some(entry) = self.entry(suffix) else { return false };
        if !dtypes.contains(&entry.dtype) {
            self.problem(suffix, format!("is {:?}; expected {}", entry.dtype, names(dtypes)));
        }
        if !shapes.contains(&entry.shape.as_slice()) {
            self.problem(suffix, format!("has shape {:?}; expected {:?}", entry.shape, shapes[0]));
        }
        true
    }

    /// The problems so far as one error.
    pub(super) fn finish(&self) -> Result<()> {
        match self.problems.as_slice() {
            [] => Ok(()),
            problems => Err(self.shards.error(self.name, problems.join("; "))),
        }
    }

    /// An error about one of the layer's tensors.
    pub(super) fn error(&self, suffix: &str, reason: impl Into<String>) -> Error {
        self.shards.error(&self.full(suffix), reason)
    }

    /// Scales, every one finite. Zero, subnormal and negative scales are values like any other.
    pub(super) fn scales(&self, suffix: &str) -> Result<Vec<f32>> {
        Ok(self.shards.floats(&self.full(suffix))?.to_f32())
    }

    pub(super) fn words(&self, suffix: &str) -> Result<Vec<u32>> {
        self.shards.words(&self.full(suffix))
    }

    /// A tensor's bytes as they lie in the file; none when it is absent.
    pub(super) fn bytes(&self, suffix: &str) -> &'a [u8] {
        self.entry(suffix).map_or(&[], |entry| self.shards.bytes(entry))
    }

    /// The same, to be kept.
    pub(super) fn shared(&self, suffix: &str) -> Result<SharedBytes> {
        self.shards.shared(&self.full(suffix))
    }

    pub(super) fn integers(&self, suffix: &str) -> Result<Vec<i64>> {
        self.shards.integers(&self.full(suffix))
    }

    pub(super) fn bias(&self) -> Result<Option<Vec<f32>>> {
        if !self.has("bias") {
            return Ok(None);
        }
        Ok(Some(self.shards.floats(&self.full("bias"))?.to_f32()))
    }

    /// Examines the layer as an unquantized one.
    pub(super) fn check_dense(&mut self) -> Option<Sizes> {
        if let Some(suffix) = QUANTIZED.into_iter().find(|s| self.has(s)) {
            self.problem(suffix, "there, though the configuration says this layer is not quantized");
        }
        let (n, k) = self.matrix("weight", FLOATS)?;
        self.optional("bias", FLOATS, &[&[n]]);
        Some(Sizes { n, k })
    }

    /// Reads the layer as an unquantized one.
    pub(super) fn read_dense(&self, Sizes { n, k }: Sizes) -> Result<LinearWeight> {
        let weight = Weight::Dense { n, k, data: self.shards.floats(&self.full("weight"))? };
        Ok(LinearWeight { weight, bias: self.bias()?, activation: ActQuant::None })
    }

    /// Scheme of the layer as an unquantized one.
    pub(super) fn dense_scheme(&self) -> Scheme {
        let is_f32 = self.entry("weight").is_some_and(|e| e.dtype == Dtype::F32);
        Scheme::dense(if is_f32 { DType::F32 } else { DType::F16 })
    }
}

fn names(dtypes: &[Dtype]) -> String {
    dtypes.iter().map(|d| format!("{d:?}")).collect::<Vec<_>>().join(" or ")
}

//! The output head: a layer of its own or the embedding, and rounded to fewer bits where that was asked for.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::affine::Mapping;
use crate::quant::grid::{Grid, Search, round_to_nearest};
use crate::quant::{ActQuant, LinearWeight, Scheme, Weight};

use super::module::{FLOATS, Module};
use super::shards::Shards;
use super::{Checkpoint, ModelConfig};

/// Module name.
pub(super) const NAME: &str = "lm_head";
pub(super) const WEIGHT: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
/// Weights of a rounded head that share a scale.
pub const HEAD_GROUP_SIZE: usize = 128;

/// Settles what files and configuration say of head and embedding together, before anything asks: a tied pair of which the
/// files hold only the head is an embedding, and a head in the files that is not the embedding is a layer of its own,
/// whatever `tie_word_embeddings` says (transformers 5 does so). Returns what to tell about it.
pub(super) fn settle(config: &mut ModelConfig, shards: &mut Shards) -> Option<String> {
    if !config.tie_word_embeddings {
        return None;
    }
    let mut m = Module::new(shards, NAME);
    if !m.has("weight") && !m.has_quantized() {
        return None;
    }
    if !m.has_quantized() && shards.get(EMBEDDING).is_none() {
        shards.rename(WEIGHT, EMBEDDING);
        return None;
    }
    if m.matrix("weight", FLOATS).is_some() && !m.has_quantized() && is_same(shards) {
        return None;
    }
    config.tie_word_embeddings = false;
    Some(format!(
        "{NAME} is a layer of its own in the files, and not the embedding: it is used, though tie_word_embeddings says that they are one"
    ))
}

/// Whether head and embedding, both in the files, are one matrix.
fn is_same(shards: &Shards) -> bool {
    let (Some(head), Some(embedding)) = (shards.get(WEIGHT), shards.get(EMBEDDING)) else { return false };
    if head.shape != embedding.shape {
        return false;
    }
    if head.dtype == embedding.dtype {
        return shards.bytes(head) == shards.bytes(embedding);
    }
    match (shards.floats(WEIGHT), shards.floats(EMBEDDING)) {
        (Ok(head), Ok(embedding)) => head.to_f32() == embedding.to_f32(),
        _ => false,
    }
}

impl Checkpoint {
    /// From here on a floating-point output head is read as codes of `bits`, symmetric, in groups of [`HEAD_GROUP_SIZE`], rounded to nearest.
    /// A head that is quantized in the file stays as it is, and so does an embedding that is the head too.
    pub fn round_head(&mut self, bits: u8) {
        self.head_bits = Some(bits);
    }

    /// Whether the head is no tensor of its own.
    fn is_head_tied(&self) -> bool {
        self.config.tie_word_embeddings
    }

    pub(super) fn head(&self) -> Result<LinearWeight> {
        let found = if self.is_head_tied() {
            let (n, k, data) = (self.config.vocab_size, self.config.hidden_size, self.tensor(EMBEDDING)?);
            if data.len() != n * k {
                let reason = format!("{} values; the model's shape makes it [{n}, {k}]", data.len());
                return Err(Error::tensor(self.dir(), EMBEDDING, reason));
            }
            LinearWeight { weight: Weight::Dense { n, k, data }, bias: None, activation: ActQuant::None }
        } else {
            self.quantization.linear(&mut Module::new(&self.shards, NAME))?
        };
        let (Weight::Dense { k, data, .. }, Some(bits)) = (&found.weight, self.head_bits) else { return Ok(found) };
        let (group_size, mapping, search) = (Some(HEAD_GROUP_SIZE), Mapping::Centered, Search::MinMax);
        let grid = Grid { bits, group_size, mapping, search, scale_type: data.dtype(), smallest_zero: 0 };
        let Some(rounded) = round_to_nearest(&data.to_f32(), *k, &grid) else {
            let tensor = if self.is_head_tied() { EMBEDDING } else { WEIGHT };
            let reason = "holds a NaN or an infinity; a head to be rounded must be finite";
            return Err(Error::tensor(self.dir(), tensor, reason));
        };
        Ok(LinearWeight { weight: Weight::Quant(rounded), ..found })
    }

    pub(super) fn head_scheme(&self) -> Result<Scheme> {
        let found = if self.is_head_tied() {
            let is_f32 = self.shards.get(EMBEDDING).is_some_and(|e| e.dtype == safetensors::Dtype::F32);
            Scheme::dense(if is_f32 { DType::F32 } else { DType::F16 })
        } else {
            self.quantization.scheme(&mut Module::new(&self.shards, NAME))?
        };
        let Some(weight_bits) = self.head_bits.filter(|_| found.is_dense()) else { return Ok(found) };
        let group_size = Some(HEAD_GROUP_SIZE).filter(|&g| g < self.config.hidden_size);
        Ok(Scheme { weight_bits, group_size, ..found })
    }
}

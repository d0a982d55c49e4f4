//! Model directories: configuration, safetensors shards, every quantized format read into canonical weights.
//!
//! Files as found, on the host; nothing here knows a device. `Checkpoint::open` reads and checks the configuration
//! and maps the shards, `Checkpoint::check` reports everything missing, extra or mis-shaped against what a model
//! needs, and `linear`/`tensor` then hand out weights one at a time.

mod awq;
mod bitnet;
mod bitsandbytes;
mod compressed;
mod compressed_config;
mod config;
mod files;
mod foreign;
mod fp8;
mod gptq;
mod head;
mod hqq;
pub mod hub;
mod json;
mod module;
mod order;
mod parse_config;
mod parse_generation;
mod parse_rope;
mod pattern;
mod quantization;
mod report;
mod shards;
mod tool_fields;
pub mod write;

pub use config::{Architecture, GenerationConfig, ModelConfig, RopeConfig, RopeScaling};
pub use head::HEAD_GROUP_SIZE;
pub use json::{not_content, strict as strict_json, without_bom};
pub use report::Note;

use std::path::Path;

use crate::dtype::HostData;
use crate::error::Result;
use crate::quant::{LinearWeight, Scheme};

use self::files::ModelDir;
use self::module::Module;
use self::quantization::{MAX_CONFIG_BYTES, Quantization};
use self::shards::Shards;

/// One thing a model needs from its checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum Expected {
    /// A linear layer, whatever its format; `name` without suffix (`model.layers.0.mlp.up_proj`).
    Linear {
        /// Module name.
        name: String,
        /// Output channels.
        n: usize,
        /// Inputs.
        k: usize,
        /// A `.bias` of `[n]` must be there; without this one that is there is warned of and not used.
        bias: bool,
    },
    /// A floating-point tensor under its full name.
    Tensor {
        /// Tensor name (`model.norm.weight`).
        name: String,
        /// Shape.
        shape: Vec<usize>,
    },
}

/// An opened model directory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: ModelDir,
    config: ModelConfig,
    generation: GenerationConfig,
    quantization: Quantization,
    shards: Shards,
    /// Bits that a floating-point head is rounded to.
    head_bits: Option<u8>,
    /// Where files and configuration disagree, and how that was settled.
    settled: Vec<Note>,
}

impl Checkpoint {
    /// Opens a model directory: reads its configuration, maps its shards and checks their headers.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Checkpoint`] for files that are missing or broken, [`Error::Config`] for fields out of
    /// range or not understood, [`Error::Unsupported`] for models and formats this crate has not.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let dir = ModelDir::open(dir)?;
        let Some(config) = dir.json("config.json", MAX_CONFIG_BYTES)? else { return Err(foreign::no_config(&dir)?) };
        let mut model = parse_config::model(&config)?;
        let generation = dir.json("generation_config.json", MAX_CONFIG_BYTES)?;
        let generation = parse_generation::generation(generation.as_ref(), &model)?;
        let quantization = Quantization::read(&dir, &config)?;
        let mut shards = Shards::open(&dir)?;
        let mut settled: Vec<Note> = head::settle(&mut model, &mut shards).map(Note::warning).into_iter().collect();
        if !generation.unused.is_empty() {
            let fields = generation.unused.join("`, `");
            settled.push(Note::warning(format!(
                "generation_config.json: `{fields}`: not used, though it may change the output"
            )));
        }
        Ok(Checkpoint { dir, config: model, generation, quantization, shards, head_bits: None, settled })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The model's shape, as the files have it: `tie_word_embeddings` is false where they hold a head that is not the
    /// embedding.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// config.json as it is written.
    ///
    /// # Errors
    /// Those of reading it again.
    pub fn raw_config(&self) -> Result<serde_json::Map<String, serde_json::Value>> {
        Ok(self.dir.json("config.json", MAX_CONFIG_BYTES)?.map(json::Object::into_map).unwrap_or_default())
    }

    /// Sampling defaults and end-of-sequence ids.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Compares the files with what the model needs; the error lists everything missing, mis-shaped or not
    /// understood. Returns notes worth showing (tensors not used, an ambiguity and how it was settled).
    pub fn check(&self, expected: &[Expected]) -> Result<Vec<Note>> {
        report::check(self, expected)
    }

    /// Reads one linear layer into canonical form, with a bias if the files have one; a head that is tied is the embedding.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the tensor that is missing, mis-shaped or holds values no such layer can have.
    pub fn linear(&self, name: &str) -> Result<LinearWeight> {
        if name == head::NAME { self.head() } else { self.quantization.linear(&mut Module::new(&self.shards, name)) }
    }

    /// The scheme of one linear layer, from the configuration and headers alone (for `inspect` and memory plans).
    pub fn linear_scheme(&self, name: &str) -> Result<Scheme> {
        if name == head::NAME {
            return self.head_scheme();
        }
        self.quantization.scheme(&mut Module::new(&self.shards, name))
    }

    /// Whether a tensor of this full name is in the files.
    pub fn has(&self, name: &str) -> bool {
        self.shards.get(name).is_some()
    }

    /// Reads one floating-point tensor in its file type.
    pub fn tensor(&self, name: &str) -> Result<HostData> {
        self.shards.floats(name)
    }

    /// Names, shapes and sizes in bytes of all tensors in the files, by name.
    pub fn inventory(&self) -> impl Iterator<Item = (&str, &[usize], usize)> {
        self.shards.iter().map(|(name, entry)| (name, entry.shape.as_slice(), self.shards.bytes(entry).len()))
    }

    /// Bytes of all tensors in the files.
    pub fn bytes(&self) -> u64 {
        self.shards.total_bytes()
    }
}

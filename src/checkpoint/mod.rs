//! Model directories: configuration, safetensors shards, every quantized format read into canonical weights.
//!
//! Files as found, on the host; nothing here knows a device. `Checkpoint::open` reads and checks the configuration
//! and maps the shards, `Checkpoint::check` reports everything missing, extra or mis-shaped against what a model
//! needs, and `linear`/`tensor` then hand out weights one at a time.

mod config;
pub mod hub;

pub use config::{Architecture, GenerationConfig, ModelConfig, RopeConfig, RopeScaling};

use std::path::Path;

use crate::dtype::HostData;
use crate::error::Result;
use crate::quant::{LinearWeight, Scheme};

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
        /// A `.bias` of `[n]` must be there; without this one that is there is used too.
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
    config: ModelConfig,
}

impl Checkpoint {
    /// Opens a model directory: reads its configuration, maps its shards and checks their headers.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let _ = dir;
        unimplemented!()
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        unimplemented!()
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Sampling defaults and end-of-sequence ids.
    pub fn generation(&self) -> &GenerationConfig {
        unimplemented!()
    }

    /// Compares the files with what the model needs; the error lists everything missing, mis-shaped or not
    /// understood. Returns notes worth showing (tensors not used, an ambiguity and how it was settled).
    pub fn check(&self, expected: &[Expected]) -> Result<Vec<String>> {
        let _ = expected;
        unimplemented!()
    }

    /// Reads one linear layer into canonical form.
    pub fn linear(&self, name: &str) -> Result<LinearWeight> {
        let _ = name;
        unimplemented!()
    }

    /// The scheme of one linear layer, from the configuration and headers alone (for `inspect` and memory plans).
    pub fn linear_scheme(&self, name: &str) -> Result<Scheme> {
        let _ = name;
        unimplemented!()
    }

    /// Whether a tensor of this full name is in the files.
    pub fn has(&self, name: &str) -> bool {
        let _ = name;
        unimplemented!()
    }

    /// Reads one floating-point tensor in its file type.
    pub fn tensor(&self, name: &str) -> Result<HostData> {
        let _ = name;
        unimplemented!()
    }

    /// Bytes of all tensors in the files.
    pub fn bytes(&self) -> u64 {
        unimplemented!()
    }
}

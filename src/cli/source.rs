//! What a verb measures, plans or serves: a checkpoint, or random weights of a known shape.

use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::device::{Device, Target};
use crate::dtype::DType;
use crate::error::Result;
use crate::models::{
    DummyScheme, Limits, MemoryPlan, Model, ModelRunner, dummy_config, dummy_linear, expected_tensors,
};
use crate::quant::Scheme;

use super::options::{HeadArgs, load_model, model_dtype};
use super::output;

/// Flags that name it.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct SourceArgs {
    /// Model directory or hub id (`org/name[@revision]`).
    #[arg(required_unless_present = "dummy", conflicts_with = "dummy")]
    model: Option<String>,

    /// Random weights of a known shape instead of a model, such as `llama-1.1b` or `llama-3.1-8b`; an unknown name
    /// lists them.
    #[arg(long, env = "LOWBIT_DUMMY", value_name = "SHAPE")]
    dummy: Option<String>,

    /// Quantization of --dummy: `bf16`, `fp8a16`, `w2a16` to `w8a16`, `w2a8` to `w8a8`; embedding and head in 16 bit, but for --lm-head.
    #[arg(long, env = "LOWBIT_SCHEME", default_value = "w4a16")]
    pub(super) scheme: String,

    /// Inputs of --dummy that share a scale; 0 is one scale for each output channel. Without it one scale for each output channel at 8 bits,
    /// else 128.
    #[arg(long, env = "LOWBIT_GROUP_SIZE", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1 << 20))]
    group_size: Option<u32>,
}

impl SourceArgs {
    /// The model or shape as it was given.
    pub(super) fn name(&self) -> &str {
        self.model.as_deref().or(self.dummy.as_deref()).unwrap_or_default()
    }

    /// Opens it; of a checkpoint the headers are read and its tensors compared with what the model takes.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`] and [`Checkpoint::check`]; `Input` for an unknown shape or scheme.
    pub(super) fn open(&self, head: &HeadArgs) -> Result<Source> {
        let Some(shape) = &self.dummy else {
            let checkpoint = head.open(self.model.as_deref().unwrap_or_default())?;
            checkpoint.check(&expected_tensors(checkpoint.config()))?;
            let dtype = model_dtype(&checkpoint)?;
            return Ok(Source::Checkpoint(Box::new(checkpoint), dtype));
        };
        let group_size = self.group_size.map(|size| size as usize);
        let decoder = DummyScheme::parse(&self.scheme, group_size)?;
        Ok(Source::Dummy(Box::new(dummy_config(shape)?), decoder, head.dummy()))
    }
}

/// A checkpoint whose headers are read with the type of its activations, or a shape with the schemes of its decoder and its head.
#[derive(Debug)]
pub(super) enum Source {
    Checkpoint(Box<Checkpoint>, DType),
    Dummy(Box<ModelConfig>, DummyScheme, DummyScheme),
}

impl Source {
    /// Its configuration.
    pub(super) fn config(&self) -> &ModelConfig {
        match self {
            Source::Checkpoint(checkpoint, _) => checkpoint.config(),
            Source::Dummy(config, ..) => config,
        }
    }

    /// Type of activations that suits it.
    pub(super) fn dtype(&self) -> DType {
        match self {
            Source::Checkpoint(_, dtype) => *dtype,
            Source::Dummy(..) => DType::BF16,
        }
    }

    /// How the linear layer of that name is quantized.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear_scheme`].
    pub(super) fn scheme(&self, name: &str) -> Result<Scheme> {
        match self {
            Source::Checkpoint(checkpoint, _) => checkpoint.linear_scheme(name),
            Source::Dummy(_, decoder, head) => {
                let scheme = if name == "lm_head" { head } else { decoder };
                // A few rows of as many columns as make a group one of several.
                Ok(dummy_linear(*scheme, 8, 2 * scheme.group_size().max(128), false, 0).scheme())
            }
        }
    }

    /// What it takes of a device's memory.
    ///
    /// # Errors
    /// Those of [`MemoryPlan::of_checkpoint`].
    pub(super) fn plan(&self, limits: &Limits, target: Target) -> Result<MemoryPlan> {
        match self {
            Source::Checkpoint(checkpoint, _) => MemoryPlan::of_checkpoint(checkpoint, limits, target),
            Source::Dummy(config, ..) => MemoryPlan::new(config, limits, target, DType::BF16, |name| self.scheme(name)),
        }
    }

    /// Loads it, or makes its weights, with progress. `memory_flags` says which flags of the verb make it take less memory.
    ///
    /// # Errors
    /// Those of [`ModelRunner::load`].
    pub(super) fn load(&self, device: &Device, limits: Limits, memory_flags: &str) -> Result<ModelRunner> {
        match self {
            Source::Checkpoint(checkpoint, _) => load_model(checkpoint, device, limits, memory_flags),
            Source::Dummy(config, decoder, head) => {
                let bar = output::progress("random weights");
                let model = Model::dummy((**config).clone(), *decoder, *head, device, &limits, &mut |done, all| {
                    bar.set_length(all as u64);
                    bar.set_position(done as u64);
                });
                bar.finish_and_clear();
                let runner = model.and_then(|model| ModelRunner::new(model, limits));
                runner.map_err(|error| error.with_memory_advice(memory_flags))
            }
        }
    }
}

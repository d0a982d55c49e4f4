//! [`Model`]: a decoder's weights on a device, and reading them from a checkpoint.

use std::collections::HashMap;

use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::device::{Device, PackedWeight, Tensor};
use crate::error::{Error, Result};
use crate::layers::{Linear, RmsNorm};

use super::batch::Limits;
use super::layer::DecoderLayer;
use super::plan::MemoryPlan;
use super::spec::{LayerSpec, ModelSpec, attention_shape};

/// The weights of a decoder-only transformer on one device. They never change: what computes with them is a
/// [`ModelRunner`](super::ModelRunner).
#[derive(Debug)]
pub struct Model {
    /// Where it lives.
    pub device: Device,
    /// Shape of the model.
    pub config: ModelConfig,
    /// Its parts by name.
    pub spec: ModelSpec,
    /// `[vocab, hidden]`.
    pub embedding: Tensor,
    /// Decoder layers.
    pub layers: Vec<DecoderLayer<Linear, RmsNorm>>,
    /// Norm before the head.
    pub norm: RmsNorm,
    /// Output head.
    pub head: Linear,
}

impl Model {
    /// Checks the checkpoint against the model and moves every weight to `device`, one layer at a time, if there is room for them
    /// and for what a runner of these `limits` takes.
    ///
    /// `progress` is called with the layers done and their number. Notes of the checkpoint's inventory go to the log.
    ///
    /// # Errors
    /// One report of everything missing or mis-shaped; `OutOfMemory` before anything is allocated; whatever a
    /// weight's format makes impossible, naming its tensor.
    pub fn load(
        checkpoint: &Checkpoint,
        device: &Device,
        limits: &Limits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Model> {
        let config = checkpoint.config().clone();
        let spec = ModelSpec::new(&config);
        device.check_attention(&attention_shape(&config, None))?;
        for note in checkpoint.check(&spec.expected())? {
            note.log();
        }
        MemoryPlan::of_checkpoint(checkpoint, limits, device.into())?.check(device.memory()?.0)?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        progress(0, spec.layers.len());
        for layer in &spec.layers {
            layers.push(load_layer(checkpoint, layer, device)?);
            progress(layers.len(), spec.layers.len());
        }
        Ok(Model {
            device: device.clone(),
            embedding: device.upload(checkpoint.tensor(&spec.embedding.name)?)?,
            head: Linear::new(device, vec![spec.head.read(checkpoint)?])?,
            norm: RmsNorm::new(device, &checkpoint.tensor(&spec.norm.name)?, config.rms_norm_eps)?,
            config,
            spec,
            layers,
        })
    }

    /// Bytes of everything that it holds on its device.
    pub fn resident_bytes(&self) -> usize {
        let layers = &self.layers;
        let linears = layers.iter().flat_map(DecoderLayer::slots).chain([&self.head]).flat_map(Linear::parts);
        let norms = layers.iter().flat_map(DecoderLayer::norms).chain([&self.norm]).map(RmsNorm::weight);
        let linears: usize = linears.map(PackedWeight::resident_bytes).sum();
        linears + norms.chain([&self.embedding]).map(Tensor::bytes).sum::<usize>()
    }

    /// Bytes of the weights that one decoded token reads: every linear layer, and the head.
    pub fn weight_bytes(&self) -> usize {
        self.layers.iter().map(DecoderLayer::weight_bytes).sum::<usize>() + self.head.bytes()
    }
}

fn load_layer(checkpoint: &Checkpoint, spec: &LayerSpec, device: &Device) -> Result<DecoderLayer<Linear, RmsNorm>> {
    // What is read on the host at all (scales, zero points, floating weights) is read side by side.
    let names: Vec<_> = spec.parts.linears().collect();
    let weights = names.into_par_iter().map(|(role, linear)| Ok((role, linear.read(checkpoint)?)));
    let mut weights = weights.collect::<Result<HashMap<_, _>>>()?;
    let eps = checkpoint.config().rms_norm_eps;
    let norms = spec.parts.as_ref().try_map_norms(|norm| RmsNorm::new(device, &checkpoint.tensor(&norm.name)?, eps))?;
    let mut take = |role| weights.remove(&role).expect("each role is asked for once");
    norms.try_map(|_, linears| linears.try_map(|role, _| Ok::<_, Error>(take(role))))?.pack(device)
}

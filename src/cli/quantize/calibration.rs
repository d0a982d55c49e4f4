//! Calibration text as tokens, and what must be the same for a run to go on.

use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::models::quantize::{Calibration, Recipe, spread};
use crate::text::tokenizer::Tokenizer;

use super::super::output;

/// Disjoint windows, spread evenly over the text.
pub(super) fn calibrate(path: &Path, source: &Checkpoint, samples: usize, context: usize) -> Result<Calibration> {
    let (all, text_sha256) = encode(path, source, context)?;
    let windows = all.len() / context;
    if windows < samples {
        tracing::warn!("{} has {windows} windows of {context} tokens, not {samples}: all are used", path.display());
    }
    let ids = spread(&all, context, samples).flatten().copied().collect();
    Ok(Calibration { ids, context, text_sha256 })
}

/// The tokens of a text, at least one window of them, and its SHA-256.
pub(super) fn encode(path: &Path, source: &Checkpoint, context: usize) -> Result<(Vec<u32>, String)> {
    let text = crate::cli::read_text(path)?;
    let ids = Tokenizer::load(source.dir(), source.config().vocab_size)?.encode(&text, false)?;
    if ids.len() < context {
        let reason = format!(
            "{} has {} tokens, less than one window of {context}; give more text or lower --seq-len",
            path.display(),
            ids.len()
        );
        return Err(Error::input("--calib", reason));
    }
    Ok((ids, output::sha256(text.as_bytes())))
}

/// What must be the same for a run to go on.
pub(super) fn fingerprint(source: &Checkpoint, recipe: &Recipe, calibration: Option<&Calibration>) -> Result<Value> {
    let mut tensors = Vec::new();
    for (name, shape, bytes) in source.inventory() {
        tensors.extend(format!("{name} {shape:?} {bytes};").into_bytes());
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(source.dir()).map_err(Error::io(source.dir()))? {
        let entry = entry.map_err(Error::io(source.dir()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(meta) = std::fs::metadata(entry.path())
            && (name.ends_with(".safetensors") || name == "config.json")
        {
            let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            files.push(format!("{name} {} {:?}", meta.len(), modified.map(|t| t.as_nanos())));
        }
    }
    files.sort();
    let ids = calibration.map(|c| {
        let bytes: Vec<u8> = c.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        json!({ "sha256": output::sha256(&bytes), "context": c.context })
    });
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "recipe": recipe.json(),
        "tensors": output::sha256(&tensors),
        "files": output::sha256(files.join("\n").as_bytes()),
        "calibration": ids,
    }))
}

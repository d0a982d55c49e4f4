//! The end of every run: the report, its page, and the checkpoint made of all parts.

use std::time::Instant;

use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Output;
use crate::dtype::DType;
use crate::error::Result;

use super::super::spec::linear_names;
use super::{Calibration, PAGE, REPORT, Recipe, page, seconds, sizes};

/// Finishes `output`, of which all parts are there, and returns the report; `own` is what a method adds to
/// it. The model is of `dtype`.
pub(super) fn finish(
    output: Output,
    source: &Checkpoint,
    recipe: &Recipe,
    dtype: DType,
    calibration: Option<&Calibration>,
    started: Instant,
    own: (&str, Value),
) -> Result<Value> {
    let names = linear_names(source.config());
    let written = recipe.written(&names);
    let layers = (0..output.parts()).map(|i| output.note(i)).collect::<Result<Vec<_>>>()?;
    let report = json!({
        "quantizer": format!("lowbit {}", env!("CARGO_PKG_VERSION")),
        "source": source.dir().file_name().map(|name| name.to_string_lossy()),
        "recipe": recipe.json(),
        "schemes": written.to_string(),
        "calibration": calibration.map(Calibration::json),
        (own.0): own.1,
        "seconds": seconds(started),
        "totals": sizes::totals(&layers, source),
        "layers": layers,
    });
    let (text, html) = (page::pretty(&report).into_bytes(), page::render(&report)?.into_bytes());
    // Biases that the model has are in the parts; others are not its own.
    let mut replaced: Vec<String> =
        names.iter().flat_map(|name| ["weight", "bias"].map(|suffix| format!("{name}.{suffix}"))).collect();
    let mut changes = vec![("quantization_config", recipe.format.config(&written, dtype))];
    if recipe.head.is_some() {
        replaced.push("lm_head.weight".into());
    }
    if recipe.head.is_some() || !source.config().tie_word_embeddings {
        changes.push(("tie_word_embeddings", json!(false)));
    }
    let done =
        format!("Quantized by lowbit {}: {written}, in the format {}", env!("CARGO_PKG_VERSION"), recipe.format.name());
    output.finish(source, &done, &replaced, &changes, &[(REPORT, text), (PAGE, html)])?;
    Ok(report)
}

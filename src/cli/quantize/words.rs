//! What `quantize` tells a person: estimates, a line a layer, the widths of mixed precision.

use std::process::ExitCode;

use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Written;
use crate::error::Result;
use crate::models::quantize::{Estimate, PAGE, REPORT, Recipe};

use super::super::{Outcome, output};
use super::Args;

pub(super) fn dry_run(args: &Args, recipe: &Recipe, written: &Written, estimate: &Estimate) -> Outcome {
    if args.json {
        output::write_json(&json!({
            "recipe": recipe.json(),
            "memory_bytes": estimate.memory_bytes,
            "checkpoint_bytes": estimate.checkpoint_bytes,
            "disk_bytes": estimate.disk_bytes,
            "seconds": output::rounded(estimate.seconds),
        }))?;
    } else {
        let scheme = match recipe.target {
            Some(target) => format!("mixed precision of {} bits a weight", target.bits_per_weight),
            None => written.to_string(),
        };
        output::write(&format!("{scheme} in the format {}: {}\n", recipe.format.name(), in_words(estimate)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The end of a run: `what` it came to, or the whole report.
pub(super) fn tell(args: &Args, report: &Value, what: &str) -> Result<()> {
    if args.json {
        return output::write_json(report);
    }
    let bytes = output::bytes(Checkpoint::open(&args.destination)?.bytes());
    let dst = args.destination.display();
    output::write(&format!("{dst}: {what}, {bytes} of tensors; report in {REPORT} and {PAGE}\n"))
}

pub(super) fn in_words(e: &Estimate) -> String {
    format!(
        "{} of memory, {:.0} s or more, {} of disk ({} in the end)",
        output::bytes(e.memory_bytes),
        e.seconds.max(1.0),
        output::bytes(e.disk_bytes),
        output::bytes(e.checkpoint_bytes)
    )
}

/// `layer 3/8, 2.1 s: q 0.0012 k 0.0010 ...`: the relative squared error of the outputs, or of the weights without
/// calibration.
pub(super) fn layer_line(layer: usize, layers: usize, note: &Value) -> String {
    let linears = note["linears"].as_array().map_or(&[][..], Vec::as_slice);
    let parts = linears.iter().map(|row| {
        let name = row["name"].as_str().and_then(|n| n.rsplit('.').next()).unwrap_or("?");
        let mut part = match (row["output_error"].as_f64(), row["weight_sqnr_db"].as_f64()) {
            (Some(error), _) => format!("{} {error:.2e}", name.trim_end_matches("_proj")),
            (None, Some(db)) => format!("{} {db:.1} dB", name.trim_end_matches("_proj")),
            (None, None) => name.to_owned(),
        };
        if row.get("damp").is_some_and(Value::is_null) {
            part.push_str(" (rounded to nearest)");
        }
        part
    });
    let parts: Vec<String> = parts.collect();
    format!("layer {}/{layers}, {:.1} s: {}", layer + 1, note["seconds"].as_f64().unwrap_or(0.0), parts.join(", "))
}

/// The widths of mixed precision: a line a layer, `-` for what stays in 16 bit.
pub(super) fn widths_table(mixed: &Value) -> String {
    let bits = mixed["bits_per_weight"].as_f64().unwrap_or(0.0);
    let mut text = format!("{bits:.3} bits a weight:");
    let mut layer = String::new();
    for unit in mixed["units"].as_array().into_iter().flatten() {
        let modules: Vec<&str> = unit["modules"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let place = |m: &&str| m.rsplit('.').next().unwrap_or(m).trim_end_matches("_proj").to_owned();
        let of_layer = modules.first().and_then(|m| m.rsplitn(3, '.').last()).unwrap_or("");
        if of_layer != layer {
            layer = of_layer.to_owned();
            text.push_str(&format!("\n  {layer}:"));
        }
        let width = unit["width"].as_u64().map_or("-".to_owned(), |w| w.to_string());
        text.push_str(&format!(" {} {width}", modules.iter().map(place).collect::<Vec<_>>().join(",")));
    }
    text
}

//! Several models side by side: what they take and how good they are.

use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::models::{ModelRunner, linear_names};

use super::super::options::{load_model, model_dtype, scheme_summary};
use super::super::{bench, output};
use super::divergence::Divergence;
use super::perplexity::Perplexity;
use super::score::{Reference, limits, score};
use super::size_plot::{self, Point};
use super::{Args, MEMORY_FLAGS, Windows, open_reference, overlap};

/// Tokens of the decoding that is timed.
const DECODED: usize = 32;

/// Residual streams of the reference that are kept, so that it does not run again for each model.
const KEPT_BYTES: usize = 1 << 30;

/// What the figures mean, for the JSON.
const PROTOCOL: &str = "bytes: all tensors of the files; linear_bits_per_weight: 8 * bytes of all tensors of the decoder layers' linear layers \
                        (codes, scales, zero points, orders; not biases) / their weights; bits_per_weight: 8 * bytes / parameters; \
                        prefill_tokens_per_s: tokens of all windows over the time of layers, head and statistics of every token while \
                        evaluating, `batch` windows at a time; decode_tokens_per_s: one sequence, `decoded_tokens` tokens from an empty \
                        context, model passes only (no sampling), the second of two runs";

/// One line.
struct Row {
    name: String,
    scheme: String,
    bytes: u64,
    linear_bits: f64,
    bits: f64,
    perplexity: Perplexity,
    divergence: Option<Divergence>,
    decode: f64,
}

/// Evaluates all models of `--compare`, and the reference, and writes the table.
pub(super) fn run(args: &Args) -> Result<()> {
    let (path, text) = args.read_text()?;
    let checkpoints = args.compare.iter().map(|name| args.head.open(name)).collect::<Result<Vec<_>>>()?;
    let windows = shared_windows(args, &checkpoints, &text)?;
    let config = checkpoints[0].config();
    let reference = args.reference.as_deref().map(|name| open_reference(name, &checkpoints[0])).transpose()?;
    let device = args.device.open(model_dtype(&checkpoints[0])?)?;
    let limits = limits(windows.context, windows.at_once(args), config.vocab_size);
    let names = names(args.compare.iter().chain(&args.reference));
    for (checkpoint, name) in checkpoints.iter().zip(&names) {
        if let Some(warning) = overlap::warning(checkpoint.dir(), text.as_bytes(), &windows.all) {
            eprintln!("warning: {name}: {warning}");
        }
    }
    let mut reference_model =
        reference.as_ref().map(|checkpoint| load_model(checkpoint, &device, limits, MEMORY_FLAGS)).transpose()?;
    let mut other = reference_model.as_mut().map(|model| Reference::new(model, KEPT_BYTES));
    let mut rows: Vec<Row> = Vec::new();
    for (checkpoint, name) in checkpoints.iter().zip(&names) {
        let mut model = load_model(checkpoint, &device, limits, MEMORY_FLAGS)?;
        let bar = output::progress("windows");
        bar.set_length(windows.count as u64);
        let (ids, context) = (windows.ids(), windows.context);
        let (perplexity, divergence) =
            score(&mut model, other.as_mut(), ids, context, &mut |s| bar.set_position(s.windows as u64))?;
        bar.finish_and_clear();
        rows.push(Row::new(name, checkpoint, &mut model, windows.context, perplexity, divergence)?);
    }
    // Of the first model: beside others the reference has not run.
    if let (Some(checkpoint), Some(model), Some(name)) = (&reference, &mut reference_model, names.last())
        && let Some(perplexity) = rows.first().and_then(|row| row.divergence.as_ref()).map(|d| d.reference)
    {
        rows.insert(0, Row::new(name, checkpoint, model, windows.context, perplexity, None)?);
    }
    let has_reference = reference.is_some();
    if args.json {
        output::write_json(&to_json(&rows, &windows, &path, args, has_reference, device.name()))?;
    } else {
        output::write(&to_text(&rows, &windows, has_reference))?;
    }
    if let Some(file) = &args.plot {
        draw(file, &rows, &windows, &path, has_reference)?;
    }
    Ok(())
}

impl Row {
    fn new(
        name: &str,
        checkpoint: &Checkpoint,
        model: &mut ModelRunner,
        context: usize,
        perplexity: Perplexity,
        divergence: Option<Divergence>,
    ) -> Result<Row> {
        let bytes = checkpoint.bytes();
        Ok(Row {
            name: name.to_owned(),
            scheme: scheme_summary(model.model()),
            bytes,
            linear_bits: linear_bits(checkpoint),
            bits: 8.0 * bytes as f64 / bench::parameters(checkpoint.config()) as f64,
            perplexity,
            divergence,
            decode: bench::decode_speed(model, DECODED.min(context))?,
        })
    }

    fn prefill(&self, context: usize) -> f64 {
        output::per_second(self.perplexity.windows * context, self.perplexity.time)
    }
}

/// Bits that a weight of the decoder layers' linear layers takes in the files.
fn linear_bits(checkpoint: &Checkpoint) -> f64 {
    let config = checkpoint.config();
    let modules: std::collections::HashSet<String> = linear_names(config).into_iter().collect();
    let in_linear = |name: &str| {
        // Codes may be `weight`, or `weight.absmax` and the like (bitsandbytes).
        let module = name.split_once("_proj.").map(|(module, rest)| (format!("{module}_proj"), rest));
        module.is_some_and(|(module, rest)| rest != "bias" && modules.contains(&module))
    };
    let bytes: usize = checkpoint.inventory().filter(|(name, ..)| in_linear(name)).map(|(.., bytes)| bytes).sum();
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let weights = config.num_layers * config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size);
    8.0 * bytes as f64 / weights as f64
}

/// The windows, which must be the same for all.
fn shared_windows(args: &Args, checkpoints: &[Checkpoint], text: &str) -> Result<Windows> {
    let mut shared: Option<Windows> = None;
    for (checkpoint, name) in checkpoints.iter().zip(&args.compare) {
        let (_, windows) = args.windows(checkpoint, text)?;
        match &shared {
            None => shared = Some(windows),
            Some(first) if first.all == windows.all => {}
            Some(_) => {
                let reason = format!(
                    "{name} makes other tokens of the text than {}; perplexities of different tokens do not compare",
                    args.compare[0]
                );
                return Err(Error::input("--compare", reason));
            }
        }
    }
    shared.ok_or_else(|| Error::input("--compare", "names no model"))
}

/// Last parts of the paths; the whole paths where two share one.
fn names<'a>(models: impl Iterator<Item = &'a String>) -> Vec<String> {
    let models: Vec<&String> = models.collect();
    let last = |name: &str| Path::new(name).file_name().map_or(name.to_owned(), |n| n.to_string_lossy().into_owned());
    let short: Vec<String> = models.iter().map(|name| last(name)).collect();
    let is_shared = |name: &String| short.iter().filter(|other| *other == name).count() > 1;
    models
        .iter()
        .zip(&short)
        .map(|(whole, short)| if is_shared(short) { (*whole).clone() } else { short.clone() })
        .collect()
}

fn to_json(rows: &[Row], windows: &Windows, text: &Path, args: &Args, has_reference: bool, device: &str) -> Value {
    let row = |(i, row): (usize, &Row)| {
        let mut all = row.perplexity.json(windows.context);
        if let Some(fields) = all.as_object_mut() {
            fields.retain(|name, _| !["protocol", "context", "windows", "tokens"].contains(&name.as_str()));
        }
        all["model"] = row.name.clone().into();
        all["is_reference"] = (has_reference && i == 0).into();
        all["scheme"] = row.scheme.clone().into();
        all["bytes"] = row.bytes.into();
        all["linear_bits_per_weight"] = row.linear_bits.into();
        all["bits_per_weight"] = row.bits.into();
        all["decode_tokens_per_s"] = output::rounded(row.decode);
        if let Some(divergence) = &row.divergence {
            all["kld"] = divergence.json();
        }
        all
    };
    json!({
        "protocol": { "perplexity": super::perplexity::PROTOCOL, "kld": super::divergence::PROTOCOL, "sizes_and_speeds": PROTOCOL },
        "text": text.display().to_string(),
        "text_sha256": windows.sha256,
        "context": windows.context,
        "windows": windows.count,
        "batch": windows.at_once(args),
        "tokens": rows.first().map(|row| row.perplexity.tokens),
        "decoded_tokens": DECODED.min(windows.context),
        "device": device,
        "threads": rayon::current_num_threads(),
        "models": rows.iter().enumerate().map(row).collect::<Vec<_>>(),
    })
}

fn to_text(rows: &[Row], windows: &Windows, has_reference: bool) -> String {
    let mut header = vec!["model", "size", "bpw linear", "bpw all", "perplexity", "+-"];
    if has_reference {
        header.extend(["KLD mean", "KLD p99", "top-1"]);
    }
    header.extend(["prefill t/s", "decode t/s"]);
    let row = |(i, row): (usize, &Row)| {
        let mark = if has_reference && i == 0 { " (reference)" } else { "" };
        let mut cells = vec![
            format!("{}{mark}", row.name),
            output::bytes(row.bytes),
            format!("{:.3}", row.linear_bits),
            format!("{:.3}", row.bits),
            format!("{:.4}", row.perplexity.perplexity()),
            format!("{:.4}", row.perplexity.stderr()),
        ];
        if has_reference {
            cells.extend(match &row.divergence {
                Some(d) => [
                    format!("{:.5}", d.mean()),
                    format!("{:.4}", d.quantile(0.99)),
                    format!("{:.2} %", 100.0 * d.top1_agreement()),
                ],
                None => ["", "", ""].map(str::to_owned),
            });
        }
        cells.extend([format!("{:.1}", row.prefill(windows.context)), format!("{:.1}", row.decode)]);
        cells
    };
    let rows: Vec<Vec<String>> = rows.iter().enumerate().map(row).collect();
    let right: Vec<&str> = header[1..].to_vec();
    format!(
        "{}\n{} windows of {} tokens; bpw: bits per weight in the files; prefill: while evaluating; decode: one sequence, {} tokens\n",
        output::table(&header, &rows, &right),
        windows.count,
        windows.context,
        DECODED.min(windows.context)
    )
}

/// Draws size against quality: the divergence where there is a reference, else the perplexity.
fn draw(file: &Path, rows: &[Row], windows: &Windows, text: &Path, has_reference: bool) -> Result<()> {
    let quality = |row: &Row| match &row.divergence {
        Some(d) => Some(d.mean()),
        None => (!has_reference).then(|| row.perplexity.perplexity()),
    };
    let points =
        rows.iter().filter_map(|row| Some(Point { name: row.name.clone(), bits: row.bits, quality: quality(row)? }));
    let measure = match rows.first().filter(|_| has_reference) {
        Some(reference) => size_plot::Measure::Divergence { from: reference.name.clone() },
        None => size_plot::Measure::Perplexity,
    };
    let conditions = format!(
        "{} tokens of {} in {} windows of {}; bits of all tensors in the files over all parameters",
        rows.first().map_or(0, |row| row.perplexity.tokens),
        text.file_name().map_or("the text".into(), |name| name.to_string_lossy()),
        windows.count,
        windows.context
    );
    let picture = size_plot::svg(&points.collect::<Vec<_>>(), &measure, &conditions)?;
    output::write_file(file, picture.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_where_they_differ() {
        let of = |all: &[&str]| names(all.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>().iter());
        assert_eq!(of(&["a/x", "b/y/"]), ["x", "y"]);
        assert_eq!(of(&["a/x", "b/x", "c/z"]), ["a/x", "b/x", "z"]);
    }
}

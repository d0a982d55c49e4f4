//! The report as a page for people: what was done, what it took and cost, and where, with plots. One file, no scripts, nothing
//! from elsewhere; every text of the report is escaped by the template engine.

use minijinja::Environment;
use serde_json::{Value, json};

use crate::error::{Error, Result};

const TEMPLATE: &str = include_str!("page.html");

/// Linear layers of a decoder layer by the end of their names, with a colour for each (Okabe and Ito 2008).
const KINDS: [(&str, &str); 7] = [
    ("q_proj", "#0072b2"),
    ("k_proj", "#56b4e9"),
    ("v_proj", "#009e73"),
    ("o_proj", "#d55e00"),
    ("gate_proj", "#cc79a7"),
    ("up_proj", "#e69f00"),
    ("down_proj", "#000000"),
];

/// Pixels of the plot of errors: the picture, and left, top, right, bottom of what is drawn in.
const PLOT: (f64, f64) = (860.0, 330.0);
const AREA: [f64; 4] = [84.0, 14.0, 850.0, 284.0];
/// Pixels of a histogram.
const SMALL: (f64, f64) = (132.0, 46.0);

/// The page of a report as `quantize` makes it.
///
/// # Errors
/// `Text` when the template fails: a bug.
pub(super) fn render(report: &Value) -> Result<String> {
    let failed =
        |e: minijinja::Error| Error::Text { what: "the quantization report's page".into(), reason: format!("{e:#}") };
    let mut env = Environment::new();
    // The name's ending is what makes the engine escape.
    env.add_template("page.html", TEMPLATE).map_err(failed)?;
    let layers = report["layers"].as_array().map_or(&[][..], Vec::as_slice);
    let context = json!({
        "title": report["source"],
        "scheme": report["schemes"],
        "quantizer": report["quantizer"],
        "facts": facts(report),
        "recipe": pairs(&report["recipe"]),
        "calibration": pairs(&report["calibration"]),
        "errors": error_plot(layers),
        "rows": layers.iter().flat_map(linears).map(row).collect::<Vec<_>>(),
        "weights": layers.iter().map(|layer| histograms(layer, "weights")).collect::<Vec<_>>(),
        "inputs": layers.iter().map(|layer| histograms(layer, "inputs")).filter(|l| l["cells"] != json!([])).collect::<Vec<_>>(),
        "plot": { "width": PLOT.0, "height": PLOT.1, "left": AREA[0], "top": AREA[1], "right": AREA[2], "bottom": AREA[3] },
        "small": { "width": SMALL.0, "height": SMALL.1 },
    });
    env.get_template("page.html").and_then(|template| template.render(context)).map_err(failed)
}

/// JSON as people read it, but for the innermost lists and objects, each of which is a line.
pub(super) fn pretty(report: &Value) -> String {
    let mut text = String::new();
    write_pretty(report, 5, 0, &mut text);
    text.push('\n');
    text
}

/// Writes a value, broken into lines down to `depth` levels.
fn write_pretty(value: &Value, depth: usize, indent: usize, out: &mut String) {
    let start = |out: &mut String, i: usize| {
        out.push_str(if i == 0 { "\n" } else { ",\n" });
        out.push_str(&"  ".repeat(indent + 1));
    };
    let end = format!("\n{}", "  ".repeat(indent));
    match value {
        Value::Object(fields) if depth > 0 && !fields.is_empty() => {
            out.push('{');
            for (i, (name, value)) in fields.iter().enumerate() {
                start(out, i);
                out.push_str(&format!("{}: ", Value::from(name.as_str())));
                write_pretty(value, depth - 1, indent + 1, out);
            }
            out.push_str(&end);
            out.push('}');
        }
        Value::Array(all) if depth > 0 && !all.is_empty() => {
            out.push('[');
            for (i, value) in all.iter().enumerate() {
                start(out, i);
                write_pretty(value, depth - 1, indent + 1, out);
            }
            out.push_str(&end);
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
    }
}

fn linears(layer: &Value) -> &[Value] {
    layer["linears"].as_array().map_or(&[], Vec::as_slice)
}

/// The end of a module's name: `q_proj`.
fn kind(row: &Value) -> &str {
    row["name"].as_str().and_then(|name| name.rsplit('.').next()).unwrap_or("")
}

/// The few numbers that matter most.
fn facts(report: &Value) -> Vec<Value> {
    let totals = &report["totals"];
    let mib = |field: &str| totals[field].as_f64().map(|bytes| bytes / f64::from(1 << 20));
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: String| facts.push(json!({ "name": name, "value": value }));
    if let (Some(before), Some(after)) = (mib("bytes_before"), mib("bytes_after")) {
        fact("tensors before", format!("{before:.2} MiB"));
        fact("tensors after", format!("{after:.2} MiB"));
        fact("smaller by", format!("{:.2}×", before / after));
    }
    if let Some(bits) = totals["linear_bits_per_weight"].as_f64() {
        fact("bits a weight, linear layers", format!("{bits:.3}"));
    }
    let layers = report["layers"].as_array().map_or(&[][..], Vec::as_slice);
    let seconds: f64 = layers.iter().filter_map(|layer| layer["seconds"].as_f64()).sum();
    fact("time in layers", format!("{seconds:.1} s"));
    let losses: Vec<f64> = layers.iter().flat_map(linears).filter_map(|row| row["output_error"].as_f64()).collect();
    if !losses.is_empty() {
        fact("mean error of outputs", percent(losses.iter().sum::<f64>() / losses.len() as f64));
    }
    facts
}

/// A value of the report as people write it: `gptq (act order static, damp 0.01)`.
fn in_words(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Array(all) => all.iter().map(in_words).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            let field = |(name, value): (&String, &Value)| match value {
                Value::Object(_) => format!("{} ({})", name.replace('_', " "), in_words(value)),
                _ => format!("{} {}", name.replace('_', " "), in_words(value)),
            };
            fields.iter().map(field).collect::<Vec<_>>().join(", ")
        }
    }
}

/// The fields of an object, those within others too, as text; long hashes are left to the JSON.
fn pairs(object: &Value) -> Vec<Value> {
    let mut all = Vec::new();
    for (name, value) in object.as_object().into_iter().flatten() {
        let text = match value {
            Value::Null => continue,
            Value::Object(fields) if fields.is_empty() => continue,
            other => in_words(other),
        };
        if name != "sketch" {
            all.push(json!({ "name": name.replace('_', " "), "value": text }));
        }
    }
    all
}

/// A line of the table.
fn row(row: &Value) -> Value {
    let text = |field: &str, show: &dyn Fn(f64) -> String| row[field].as_f64().map_or(String::new(), show);
    // No damping that worked: rounded to nearest.
    let damp = match row.get("damp") {
        Some(Value::Null) => "failed: to nearest".to_owned(),
        _ => text("damp", &|x| format!("{x:.4}")),
    };
    json!({
        "name": row["name"],
        "error": text("output_error", &percent),
        "sqnr": text("weight_sqnr_db", &|x| format!("{x:.2}")),
        "damp": damp,
        "outliers": text("outlier_inputs", &|x| format!("{x:.0}")),
        "bits": bits(row).map_or(String::new(), |bits| format!("{bits:.3}")),
        "seconds": text("seconds", &|x| format!("{x:.2}")),
    })
}

/// Bits of a weight in the files; as the scheme has it where sizes are not known.
fn bits(row: &Value) -> Option<f64> {
    let weights = row["shape"].as_array().map(|shape| shape.iter().filter_map(Value::as_f64).product::<f64>());
    match (row["bytes"].as_f64(), weights.filter(|&n| n > 0.0)) {
        (Some(bytes), Some(weights)) if bytes > 0.0 => Some(8.0 * bytes / weights),
        _ => row["bits_per_weight"].as_f64(),
    }
}

fn percent(x: f64) -> String {
    format!("{} %", short(100.0 * x))
}

/// Lines of the error of every kind of linear layer over the layers, on a logarithmic axis: of outputs where there was a
/// calibration text, else of weights. `Null` where there is nothing to draw.
fn error_plot(layers: &[Value]) -> Value {
    let is_calibrated = layers.iter().flat_map(linears).any(|row| row["output_error"].is_number());
    let error = |row: &Value| match is_calibrated {
        true => row["output_error"].as_f64(),
        false => row["weight_sqnr_db"].as_f64().map(|db| 10f64.powf(-db / 10.0)),
    };
    let mut points: Vec<(usize, usize, f64)> = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        for row in linears(layer) {
            let place = KINDS.iter().position(|(name, _)| *name == kind(row));
            if let (Some(place), Some(error)) = (place, error(row).filter(|e| *e > 0.0 && e.is_finite())) {
                points.push((place, i, error));
            }
        }
    }
    if points.is_empty() {
        return Value::Null;
    }
    let (low, high) = points.iter().fold((f64::MAX, 0f64), |(low, high), p| (low.min(p.2), high.max(p.2)));
    let (low, high) = (low.log10() - 0.1, high.log10() + 0.1);
    let last = points.iter().map(|p| p.1).max().unwrap_or(0);
    let x = |layer: usize| {
        let inset = 16.0;
        AREA[0] + inset + (AREA[2] - AREA[0] - 2.0 * inset) * layer as f64 / (last as f64).max(1.0)
    };
    let y = |error: f64| AREA[3] - (AREA[3] - AREA[1]) * (error.log10() - low) / (high - low);
    let series = KINDS.iter().enumerate().filter_map(|(place, (name, color))| {
        let own: Vec<Value> = points
            .iter()
            .filter(|p| p.0 == place)
            .map(|&(_, layer, error)| json!({ "x": round(x(layer)), "y": round(y(error)), "layer": layer, "error": percent(error) }))
            .collect();
        let line: Vec<String> = own.iter().map(|p| format!("{},{}", p["x"], p["y"])).collect();
        (!own.is_empty()).then(|| json!({ "name": name, "color": color, "line": line.join(" "), "points": own }))
    });
    let step = last.div_ceil(16).max(1);
    let decades = (low.floor() as i32..=high.ceil() as i32)
        .flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(decade)))
        .filter(|tick| (low..high).contains(&tick.log10()));
    json!({
        "what": if is_calibrated { "Relative squared error of the outputs on the calibration text" } else { "Relative squared error of the weights" },
        "series": series.collect::<Vec<_>>(),
        "x": (0..=last).step_by(step).map(|layer| json!({ "at": round(x(layer)), "label": layer })).collect::<Vec<_>>(),
        "y": decades.map(|tick| json!({ "at": round(y(tick)), "label": tick_label(tick) })).collect::<Vec<_>>(),
    })
}

/// `0.02 %`, `5e-7 %`.
fn tick_label(error: f64) -> String {
    let percent = 100.0 * error;
    if percent >= 1e-3 { format!("{} %", (percent * 1e6).round() / 1e6) } else { format!("{percent:.0e} %") }
}

/// Tenths of a pixel.
fn round(x: f64) -> f64 {
    (x * 10.0).round() / 10.0
}

/// The histograms `field` of a layer's linear layers, as shapes.
fn histograms(layer: &Value, field: &str) -> Value {
    let name = match &layer["layer"] {
        Value::String(name) => name.clone(),
        number => format!("layer {number}"),
    };
    let cells = linears(layer).iter().filter(|row| row[field].is_object()).filter_map(|row| {
        let (low, high) = (row[field]["low"].as_f64()?, row[field]["high"].as_f64()?);
        let counts: Vec<f64> = row[field]["counts"].as_array()?.iter().filter_map(Value::as_f64).collect();
        let x = |value: f64| match high > low {
            true => round(((value - low) / (high - low) * SMALL.0).clamp(-1.0, SMALL.0 + 1.0)),
            false => 0.0,
        };
        // From weights: least, median and largest end of the groups' ranges; from inputs: one range, or none.
        let range = &row[field]["range"];
        let ends = |side: &str, i: usize| range[side][i].as_f64();
        let (band, lines, words) = match (ends("low", 0), ends("low", 1), ends("high", 1), ends("high", 2)) {
            (Some(widest), Some(from), Some(to), Some(most)) => (
                json!([x(widest), round(x(most) - x(widest))]),
                vec![x(from), x(to)],
                format!("; the middle group reaches from {} to {}", short(from), short(to)),
            ),
            _ => match (range[0].as_f64(), range[1].as_f64()) {
                (Some(from), Some(to)) => {
                    (Value::Null, vec![x(from), x(to)], format!("; int8 reaches from {} to {}", short(from), short(to)))
                }
                _ => (Value::Null, vec![], String::new()),
            },
        };
        let kind = if field == "inputs" { input_of(kind(row)) } else { kind(row) };
        Some(json!({
            "kind": kind,
            "shape": shape(&counts),
            "low": short(low),
            "high": short(high),
            "band": band,
            "lines": lines,
            "words": format!("{kind}: from {} to {}{words}", short(low), short(high)),
        }))
    });
    json!({ "name": name, "cells": cells.collect::<Vec<_>>() })
}

/// The linear layers that share the input of one of them.
fn input_of(kind: &str) -> &str {
    match kind {
        "q_proj" => "input of q, k, v",
        "o_proj" => "input of o",
        "gate_proj" => "input of gate, up",
        "down_proj" => "input of down",
        other => other,
    }
}

/// Steps as high as the logarithm of the counts.
fn shape(counts: &[f64]) -> String {
    let high = counts.iter().fold(0f64, |most, &c| most.max(c)).ln_1p().max(1e-9);
    let width = SMALL.0 / counts.len().max(1) as f64;
    let mut path = format!("M0 {}", SMALL.1);
    for (i, count) in counts.iter().enumerate() {
        let top = round(SMALL.1 * (1.0 - count.ln_1p() / high));
        path.push_str(&format!("V{top}H{}", round((i + 1) as f64 * width)));
    }
    path + &format!("V{}Z", SMALL.1)
}

/// Three digits.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if !(1e-3..1e4).contains(&a) => format!("{x:.1e}"),
        a => {
            let decimals = (2.0 - a.log10().floor()).max(0.0) as usize;
            format!("{x:.decimals$}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Value {
        let counts: Vec<u64> = (0..64).map(|i| if i == 20 { 999 } else { i % 3 }).collect();
        let weights = json!({ "low": -0.5, "high": 0.5, "counts": counts, "range": { "low": [-0.6, -0.4, -0.1], "high": [0.1, 0.35, 0.5] } });
        let inputs = json!({ "low": -2.0, "high": 30.0, "counts": counts, "range": [-8.0, 8.0] });
        let linear = |layer: usize, name: &str, error: f64| {
            json!({
                "name": format!("model.layers.{layer}.mlp.{name}"), "weight_sqnr_db": 20.5, "output_error": error, "outlier_inputs": 2,
                "bits_per_weight": 4.125, "damp": if layer == 0 { json!(0.01) } else { Value::Null }, "seconds": 1.0, "weights": weights, "inputs": inputs,
            })
        };
        let layers: Vec<Value> = (0..2)
            .map(|i| json!({ "layer": i, "seconds": 2.5, "linears": [linear(i, "up_proj", 1e-3), linear(i, "down_proj", 2e-4)] }))
            .collect();
        json!({
            "source": "<script>alert('x')</script> & co", "quantizer": "lowbit", "schemes": "w4a16", "recipe": { "scheme": "w4a16", "rules": { "a": "<b>" }, "rounding": { "gptq": { "act_order": "static", "damp": 0.01 } }, "fused": true },
            "calibration": { "tokens": 100, "text_sha256": "ab", "sketch": { "x": 1 } }, "layers": layers,
            "totals": { "bytes_before": 4 << 20, "bytes_after": 1 << 20, "linear_bits_per_weight": 4.125 },
        })
    }

    #[test]
    fn pretty_json_is_the_same_json() {
        let report = report();
        let text = pretty(&report);
        assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), report);
        assert!(text.lines().count() < 120 && text.contains("\"counts\":["), "{text}");
        assert_eq!(pretty(&json!({ "a": [], "b": {} })), "{\n  \"a\": [],\n  \"b\": {}\n}\n");
    }

    #[test]
    fn a_page_of_its_own() {
        let page = render(&report()).expect("renders");
        for text in [
            "&lt;script&gt;",
            "4.00 MiB",
            "1.00 MiB",
            "4.00×",
            "model.layers.1.mlp.down_proj",
            "failed: to nearest",
            "0.0100",
            "0.100 %",
            "0.0200 %",
            "20.50",
            "layer 1",
            "the middle group reaches from -0.400 to 0.350",
            "int8 reaches from -8.00 to 8.00",
            "&lt;b&gt;",
            "gptq (act order static, damp 0.01)",
            ">yes<",
        ] {
            assert!(page.contains(text), "{text} is not in the page");
        }
        for foreign in
            ["<script", "http://", "https://", "<link", "<img", "@import", "url(", "sketch", "undefined", "NaN"]
        {
            let found = page.replace("http://www.w3.org/2000/svg", "").contains(foreign);
            assert!(!found, "{foreign} is in the page");
        }
        assert_eq!(page.matches("<polyline").count(), 2);
        // Each of four linear layers shows its weights and its inputs.
        assert_eq!(page.matches("class=\"cell\"").count(), 8);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    }

    /// Without calibration the plot is of weights, and there are no inputs to show.
    #[test]
    fn without_calibration() {
        let mut report = report();
        report["calibration"] = Value::Null;
        for row in
            report["layers"].as_array_mut().unwrap().iter_mut().flat_map(|l| l["linears"].as_array_mut().unwrap())
        {
            let row = row.as_object_mut().unwrap();
            ["output_error", "inputs", "damp", "outlier_inputs"].iter().for_each(|field| drop(row.remove(*field)));
        }
        let page = render(&report).expect("renders");
        assert!(page.contains("Relative squared error of the weights") && !page.contains("input of"));
        assert_eq!(page.matches("class=\"cell\"").count(), 4);
        let nothing = render(&json!({ "layers": [] })).expect("renders");
        assert!(!nothing.contains("<polyline"));
    }

    #[test]
    fn numbers() {
        assert_eq!([0.0, 0.0001, -1.5, 123.4, 5e4].map(short), ["0", "1.0e-4", "-1.50", "123", "5.0e4"]);
        assert_eq!([2e-4, 5e-9].map(tick_label), ["0.02 %", "5e-7 %"]);
        assert_eq!(shape(&[0.0, 1.0]), "M0 46V46H66V0H132V46Z");
    }
}

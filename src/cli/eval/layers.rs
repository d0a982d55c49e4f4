//! Where a model's loss comes from: the error of the residual stream layer by layer, against a reference.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::models::ModelRunner;

use super::super::output;
use super::score::{Pass, windows_at_once};

/// The measures in words, for the JSON.
const PROTOCOL: &str = "the windows of the perplexity, all tokens of them; sums of squares over all tokens and channels. stream_error: \
                        |model's residual stream after the layer - reference's|^2 / |reference's|^2, the layers before being \
                        each model's own. own_error: the same of what the layer makes of the reference's stream. \
                        own_error_of_update: own_error's numerator over |what the reference's layer adds to the stream|^2";

/// Sums of squares of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sums {
    /// Of the reference's residual stream after the layer.
    reference: f64,
    /// Of what the reference's layer added to it.
    update: f64,
    /// Of the model's stream less the reference's.
    stream: f64,
    /// Of the layer's output less the reference's, both from the reference's stream.
    own: f64,
}

/// Relative squared errors of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LayerError {
    /// Of the residual stream after the layer, all layers before being the model's own.
    pub stream: f64,
    /// That this layer alone adds, to the reference's stream.
    pub own: f64,
    /// The same over what the reference's layer adds to the stream, which does not hide behind a large stream.
    pub own_of_update: f64,
}

/// Errors of all layers, and of the embedding before them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerErrors {
    /// Of the residual stream before the first layer.
    pub embedding: f64,
    /// Of each layer.
    pub layers: Vec<LayerError>,
}

/// Runs both models over `ids` in windows of `context` tokens, layer by layer. `progress` gets the windows done.
///
/// # Errors
/// `Input` when the models differ in shape or their limits hold no window; [`Error::NotFinite`] when a residual stream is not
/// finite; a device's failure.
pub fn layer_errors(
    model: &mut ModelRunner,
    reference: &mut ModelRunner,
    ids: &[u32],
    context: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<LayerErrors> {
    let at_once = windows_at_once(model.limits(), context)?.min(windows_at_once(reference.limits(), context)?);
    let shape = |m: &ModelRunner| (m.model().layers.len(), m.config().hidden_size);
    if shape(model) != shape(reference) {
        let ((a, b), (c, d)) = (shape(model), shape(reference));
        let reason = format!("{c} layers of width {d}; the model has {a} of width {b}: expected the same");
        return Err(Error::input("--reference", reason));
    }
    let layers = model.model().layers.len();
    let mut embedding = Sums::default();
    let mut sums = vec![Sums::default(); layers];
    let windows: Vec<&[u32]> = ids.chunks_exact(context).collect();
    let mut done = 0;
    for windows in windows.chunks(at_once) {
        let batch = &Pass::of_windows(windows).batch;
        let (mut exact, mut stream) = (reference.embed(batch)?.read()?, model.embed(batch)?.read()?);
        embedding.reference += squares(&exact);
        embedding.stream += squared_distance(&stream, &exact);
        for (layer, sums) in sums.iter_mut().enumerate() {
            let after = reference.layer(layer, batch, exact.clone())?.read()?;
            sums.reference += squares(&after);
            sums.update += squared_distance(&after, &exact);
            sums.own += squared_distance(&model.layer(layer, batch, exact)?.read()?, &after);
            stream = model.layer(layer, batch, stream)?.read()?;
            sums.stream += squared_distance(&stream, &after);
            exact = after;
        }
        done += windows.len();
        progress(done);
    }
    let ratio = |error: f64, of: f64| if error == 0.0 { 0.0 } else { error / of };
    let layer = |(i, s): (usize, &Sums)| {
        if !(s.reference + s.update + s.stream + s.own).is_finite() {
            return Err(Error::not_finite(format!("activations of layer {i}"), "a value that is not"));
        }
        Ok(LayerError {
            stream: ratio(s.stream, s.reference),
            own: ratio(s.own, s.reference),
            own_of_update: ratio(s.own, s.update),
        })
    };
    Ok(LayerErrors {
        embedding: ratio(embedding.stream, embedding.reference),
        layers: sums.iter().enumerate().map(layer).collect::<Result<_>>()?,
    })
}

fn squares(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum()
}

impl LayerErrors {
    pub(super) fn json(&self) -> Value {
        let layer = |(i, e): (usize, &LayerError)| json!({ "layer": i, "stream_error": e.stream, "own_error": e.own, "own_error_of_update": e.own_of_update });
        json!({
            "protocol": PROTOCOL,
            "embedding_error": self.embedding,
            "layers": self.layers.iter().enumerate().map(layer).collect::<Vec<_>>(),
        })
    }

    /// A table, the layer that adds most marked.
    pub(super) fn text(&self) -> String {
        let header = ["layer", "stream error", "own error", "own error of update", ""];
        let most = self.layers.iter().map(|e| e.own).fold(0.0, f64::max);
        let percent = |x: f64| if x == 0.0 { "0".to_owned() } else { format!("{:.4} %", 100.0 * x) };
        let mut rows = vec![vec!["embedding".to_owned(), percent(self.embedding), "".into(), "".into(), "".into()]];
        rows.extend(self.layers.iter().enumerate().map(|(i, e)| {
            let bar = if most > 0.0 { (20.0 * e.own / most).round() as usize } else { 0 };
            vec![i.to_string(), percent(e.stream), percent(e.own), percent(e.own_of_update), "#".repeat(bar)]
        }));
        let table = output::table(&header, &rows, &header[1..4]);
        format!(
            "\nRelative squared error of the residual stream; bars show what each layer alone adds (`own error`).\n{table}"
        )
    }
}

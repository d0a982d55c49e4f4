//! What to do to a model: transforms, rounding, scheme, format.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::checkpoint::write::{Format, KvScales, Written};
use crate::dtype::DType;
use crate::quant::affine::Mapping;
use crate::quant::gptq::{ActOrder, GptqOptions};
use crate::quant::granularity::bits_per_weight;
use crate::quant::grid::{Grid, Search};
use crate::quant::ternary::Threshold;
use crate::quant::{ActQuant, Codebook, Encoding, Scheme};

use super::super::spec::ModelSpec;

/// A change of the model before rounding that leaves its outputs as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Transform {
    /// None.
    None,
    /// AWQ's scales, and its clipping of weights.
    Awq,
    /// SmoothQuant's scales.
    Smooth {
        /// How much of the outliers' size moves into the weights, 0 to 1.
        alpha: f32,
    },
}

/// How weights become codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum WeightRounding {
    /// Each to the nearest.
    Nearest,
    /// By GPTQ.
    Gptq(GptqOptions),
    /// Each to the nearest, with HQQ's real zero points.
    Hqq,
    /// To -1, 0 and 1.
    Ternary(Threshold),
    /// Each to the nearest value of a given table.
    Table(Codebook),
    /// Each to the nearest value of a table learned from the linear layer's weight.
    KMeans {
        /// Weights count by what calibration saw of their inputs.
        sensitive: bool,
    },
}

/// How activations will be quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// Not at all.
    None,
    /// int8 per token while running.
    Dynamic {
        /// Zero points other than 0.
        asymmetric: bool,
    },
    /// int8 per token while running, but for values of at least this magnitude, which stay in 16 bit (LLM.int8()).
    LlmInt8 {
        /// Positive.
        threshold: f32,
    },
    /// int8 per tensor, by the range that calibration saw.
    Static {
        /// Zero points other than 0.
        asymmetric: bool,
        /// How the range is chosen.
        observer: Observer,
    },
}

/// How the range of static activations is chosen from what calibration saw. All but [`Observer::MinMax`] look at evenly
/// spaced rows of a layer's inputs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Observer {
    /// Everything seen.
    MinMax,
    /// That, shrunk by hundredths to where the squared error is least.
    Mse,
    /// Magnitudes up to this percentile.
    Percentile(f64),
    /// Magnitudes up to where the relative entropy is least (TensorRT's procedure, 2048 bins).
    Entropy,
    /// Moving average of the ranges of batches of 8 rows, each counting 1 in 100.
    MovingAverage,
}

/// What a linear layer becomes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerScheme {
    /// Codes and scales of the weight.
    pub grid: Grid,
    /// Activations.
    pub activation: Activation,
}

impl LayerScheme {
    /// Bits that a weight of `k` inputs takes in its file: codes, scales, and zero points where they are stored.
    pub(super) fn bits_per_weight(&self, k: usize, format: Format) -> f64 {
        let grid = &self.grid;
        let scale_type = 8 * grid.scale_type.size_bytes() as u8;
        let scale = if format == (Format::BitsAndBytes { double_quant: true }) { 8 } else { scale_type };
        let zeros = match format {
            Format::Hqq => scale_type,
            _ if grid.mapping.is_symmetric() => 0,
            _ => grid.bits,
        };
        // Beside int8 activations codes are stored one in a byte.
        let bits = if self.activation == Activation::None { grid.bits } else { 8 };
        bits_per_weight(bits, grid.columns(k), scale, zeros)
    }
}

/// What mixed precision is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// At most so many bits a weight, with scales and zero points, of all linear layers of the decoder together.
    pub bits_per_weight: f64,
    /// q, k and v of a layer share their width, and gate and up theirs.
    pub fused: bool,
}

/// Everything that decides the result, but for the model and the calibration text.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// What linear layers become where nothing else is said.
    pub base: LayerScheme,
    /// Linear layers that become something else, by module name; `None` stays as it is.
    pub overrides: BTreeMap<String, Option<LayerScheme>>,
    /// Mixed precision: widths are chosen for the layers that no override decides.
    pub target: Option<Target>,
    /// What the output head becomes; `None` stays as it is.
    pub head: Option<LayerScheme>,
    /// Scales for an int8 KV cache beside the weights.
    pub kv_scales: Option<KvScales>,
    /// What happens first.
    pub transform: Transform,
    /// What happens then.
    pub rounding: WeightRounding,
    /// Calibrate each linear layer behind the quantized ones before it in the same decoder layer.
    pub true_sequential: bool,
    /// Format of the files.
    pub format: Format,
}

impl Recipe {
    /// True when inputs of layers have to be seen.
    pub fn needs_calibration(&self) -> bool {
        let ranges = |layer: &LayerScheme| matches!(layer.activation, Activation::Static { .. });
        self.transform != Transform::None
            || matches!(self.rounding, WeightRounding::Gptq(_) | WeightRounding::KMeans { sensitive: true })
            || self.kv_scales.is_some()
            || self.target.is_some()
            || self.head.iter().chain([&self.base]).chain(self.overrides.values().flatten()).any(ranges)
    }

    /// What a linear layer becomes, with what the format asks of it for a model of `dtype`; `None` stays as it is.
    pub(super) fn layer(&self, name: &str, dtype: DType) -> Option<LayerScheme> {
        self.overrides.get(name).copied().unwrap_or(Some(self.base)).map(|layer| self.fit(layer, dtype))
    }

    /// Widths that mixed precision chooses among, besides leaving a layer as it is.
    pub(super) fn widths(&self) -> Vec<u8> {
        // Some formats have one scheme for all layers, and some methods one width.
        let mixes = matches!(self.format, Format::Gptq | Format::GptqV2 | Format::CompressedTensors)
            && matches!(self.rounding, WeightRounding::Nearest | WeightRounding::Gptq(_));
        let fits = |bits: &u8| {
            if !mixes && *bits != self.base.grid.bits {
                return false;
            }
            let layer = LayerScheme { grid: Grid { bits: *bits, ..self.base.grid }, ..self.base };
            self.format.check_scheme(&self.scheme(&layer)).is_ok()
        };
        // Beside int8 activations each code takes a byte: fewer bits would save nothing.
        let least = if self.base.activation == Activation::None { 2 } else { 8 };
        (least..=8).filter(fits).collect()
    }

    /// What a linear layer or the head becomes.
    pub(super) fn becomes(&self, name: &str, spec: &ModelSpec) -> Option<LayerScheme> {
        if name == spec.head.name { self.head(DType::F16) } else { self.layer(name, DType::F16) }
    }

    /// What the head becomes, likewise.
    pub(super) fn head(&self, dtype: DType) -> Option<LayerScheme> {
        self.head.map(|layer| self.fit(layer, dtype))
    }

    fn fit(&self, layer: LayerScheme, dtype: DType) -> LayerScheme {
        let smallest_zero = self.format.smallest_zero();
        let scale_type = match layer.grid.mapping {
            Mapping::Progressive => DType::F32, // 16 bits do not hold the multiples of a scale
            _ => self.format.scale_type(dtype),
        };
        LayerScheme { grid: Grid { scale_type, smallest_zero, ..layer.grid }, ..layer }
    }

    /// True when GPTQ's groups are of reordered columns.
    fn reorders(&self) -> bool {
        matches!(self.rounding, WeightRounding::Gptq(GptqOptions { act_order: ActOrder::Dynamic, .. }))
    }

    /// A layer's scheme as its file will have it.
    pub(super) fn scheme(&self, layer: &LayerScheme) -> Scheme {
        Scheme {
            weight_bits: layer.grid.bits,
            group_size: layer.grid.group_size,
            symmetric: layer.grid.mapping.is_symmetric() && self.rounding != WeightRounding::Hqq,
            encoding: match self.rounding {
                WeightRounding::Table(table) => Encoding::Codebook(table),
                // Each layer will have its own.
                WeightRounding::KMeans { .. } => Encoding::Codebook(Codebook([0.0; 16])),
                _ => Encoding::Affine,
            },
            act_order: self.reorders() && layer.grid.group_size.is_some(),
            activation: match layer.activation {
                Activation::None => ActQuant::None,
                Activation::Dynamic { asymmetric: false } => ActQuant::DynamicPerToken,
                Activation::Dynamic { asymmetric: true } => ActQuant::DynamicAsymmetric,
                Activation::LlmInt8 { threshold } => ActQuant::LlmInt8 { threshold },
                Activation::Static { asymmetric, .. } => {
                    ActQuant::StaticPerTensor { scale: 1.0, zero_point: i32::from(asymmetric) }
                }
            },
        }
    }

    /// What config.json says of a model of linear layers `names` and a head.
    pub fn written(&self, names: &[String]) -> Written {
        let (static_order, damp) = match self.rounding {
            WeightRounding::Gptq(o) => (o.act_order == ActOrder::Static, Some(o.damp)),
            _ => (false, None),
        };
        let scheme = |name: &String| self.layer(name, DType::F16).map(|layer| self.scheme(&layer));
        let mut modules: Vec<_> = names.iter().map(|name| (name.clone(), scheme(name))).collect();
        modules.push(("lm_head".into(), self.head.map(|layer| self.scheme(&layer))));
        Written { modules, kv_scales: self.kv_scales, static_order, damp }
    }

    /// All of it, for reports and to tell runs apart.
    pub fn json(&self) -> Value {
        let rounding = match self.rounding {
            WeightRounding::Nearest => json!("nearest"),
            WeightRounding::Hqq => json!("hqq"),
            WeightRounding::Ternary(Threshold::Twn) => json!("ternary"),
            WeightRounding::Ternary(Threshold::AbsMean) => json!("ternary-absmean"),
            WeightRounding::Table(table) => json!(table.name()),
            WeightRounding::KMeans { sensitive } => json!({ "k-means": { "sensitive": sensitive } }),
            WeightRounding::Gptq(o) => json!({ "gptq": { "act_order": words(&o.act_order), "damp": o.damp } }),
        };
        let overrides: BTreeMap<&String, Value> =
            self.overrides.iter().map(|(name, layer)| (name, self.layer_json(layer.as_ref()))).collect();
        let mut all = self.layer_json(Some(&self.base));
        all["overrides"] = json!(overrides);
        all["target"] = json!(self.target.map(|t| json!({ "bits_per_weight": t.bits_per_weight, "fused": t.fused })));
        all["head"] = self.layer_json(self.head.as_ref());
        all["kv_scales"] = json!(self.kv_scales.map(|granularity| words(&granularity)));
        all["transform"] = match self.transform {
            Transform::Smooth { alpha } => json!({ "smooth": { "alpha": alpha } }),
            other => json!(words(&other)),
        };
        all["rounding"] = rounding;
        all["true_sequential"] = json!(self.true_sequential);
        all["format"] = json!(self.format.name());
        all["double_quant"] = json!(self.format == Format::BitsAndBytes { double_quant: true });
        all
    }

    fn layer_json(&self, layer: Option<&LayerScheme>) -> Value {
        let Some(layer) = layer else { return json!("unquantized") };
        let search = match layer.grid.search {
            Search::MinMax => json!("min-max"),
            Search::Shrink { norm } => json!({ "shrink": { "norm": norm } }),
        };
        json!({
            "scheme": self.scheme(layer).to_string(),
            "mapping": words(&layer.grid.mapping),
            "range": search,
            "activation": match layer.activation {
                Activation::None => json!("16-bit"),
                Activation::Dynamic { asymmetric } => json!({ "dynamic": { "asymmetric": asymmetric } }),
                Activation::LlmInt8 { threshold } => json!({ "llm-int8": { "threshold": threshold } }),
                Activation::Static { asymmetric, observer } => {
                    let observer = match observer {
                        Observer::Percentile(p) => format!("percentile {p}"),
                        other => words(&other),
                    };
                    json!({ "static": { "asymmetric": asymmetric, "observer": observer } })
                }
            },
        })
    }
}

/// The name of a choice as flags spell it: `MaxClip` is `max-clip`.
fn words(choice: &impl std::fmt::Debug) -> String {
    let mut out = String::new();
    for c in format!("{choice:?}").chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.extend(c.to_lowercase());
    }
    out
}

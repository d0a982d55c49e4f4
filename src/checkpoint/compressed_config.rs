//! The configuration of compressed-tensors: which scheme each module has.

use crate::error::{Error, Result};

use super::fp8::Block;
use super::json::Object;
use super::pattern::Pattern;

const TOP: &[&str] = &[
    // Which tool made it, and how a program is to run it.
    "autoround_version",
    "dequantize",
    "provider",
    "use_optimized_inference",
    "config_groups",
    "format",
    "global_compression_ratio",
    "ignore",
    "kv_cache_scheme",
    "quant_method",
    "quantization_status",
    "run_compressed",
    "sparsity_config",
    "transform_config",
    "version",
];
const STATUS: [&str; 4] = ["initialized", "calibration", "frozen", "compressed"];
const GROUP: &[&str] = &["targets", "weights", "input_activations", "output_activations", "format"];
const ARGS: &[&str] = &[
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    // How values were found and in what type they are stored, which the tensors say themselves.
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
];

/// Where a weight's scales apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strategy {
    Tensor,
    Channel,
    Group(usize),
    Block(Block),
}

/// Activations of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activations {
    None,
    DynamicPerToken {
        symmetric: bool,
    },
    StaticPerTensor {
        symmetric: bool,
    },
    /// FP8, under scales of the file or of the live values; not run so.
    Fp8 {
        is_static: bool,
    },
}

/// How codes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// `weight_packed`, codes in words.
    Packed,
    /// `weight`, one code in each int8.
    Int,
    /// `weight`, FP8.
    Float,
}

/// Scheme of one config group.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GroupScheme {
    pub(super) bits: u8,
    pub(super) symmetric: bool,
    pub(super) strategy: Strategy,
    /// Columns may have been reordered (`actorder: group`).
    pub(super) act_order: bool,
    pub(super) activations: Activations,
    pub(super) format: Format,
}

/// A module name pattern of `targets` or `ignore`.
#[derive(Debug, Clone, PartialEq)]
enum Target {
    /// Class `Linear`: every module that this crate asks for.
    Linear,
    Exact(String),
    Regex(Pattern),
}

/// A compressed-tensors configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CompressedTensors {
    /// Group name, targets, scheme (`None` leaves weights as they are).
    groups: Vec<(String, Vec<Target>, Option<GroupScheme>)>,
    ignore: Vec<Target>,
    /// From 0.18 on, odd bit widths are dense bit streams.
    pub(super) dense_streams: bool,
}

impl CompressedTensors {
    pub(super) fn parse(o: &Object) -> Result<CompressedTensors> {
        o.refuse_unknown(&[TOP])?;
        // Scales for a quantized KV cache (`kv_cache_scheme`) are not used: keys and values are kept in 16 bit.
        if !o.is_neutral("transform_config") {
            return Err(unsupported(o, "transform_config", "transforms"));
        }
        if let Some(sparsity) = o.object("sparsity_config")?
            && sparsity.str("format")?.is_some_and(|f| f != "dense")
        {
            return Err(unsupported(&sparsity, "format", "sparse weights"));
        }
        // Where its maker stood when it was written; what the file holds, the tensors say.
        if let Some(status) = o.str("quantization_status")?.filter(|status| !STATUS.contains(status)) {
            return Err(
                o.error("quantization_status", format!("expected one of {}, got `{status}`", STATUS.join(", ")))
            );
        }
        let default_format = o.str("format")?;
        let groups_object = o.object("config_groups")?.ok_or_else(|| o.error("config_groups", "missing"))?;
        let mut groups = Vec::new();
        for name in groups_object.keys() {
            let group =
                groups_object.object(name)?.ok_or_else(|| groups_object.error(name, "expected an object, got null"))?;
            group.refuse_unknown(&[GROUP])?;
            let targets = targets(&group, "targets")?;
            groups.push((name.to_owned(), targets, scheme(&group, default_format)?));
        }
        let version = o.str("version")?.unwrap_or("");
        Ok(CompressedTensors { groups, ignore: targets(o, "ignore")?, dense_streams: at_least_0_18(version) })
    }

    /// The scheme of a module; `None` when it is left unquantized. Exact names go before patterns, those before
    /// the class.
    pub(super) fn scheme_of(&self, name: &str) -> Result<Option<&GroupScheme>, String> {
        for target in &self.ignore {
            if target.rank(name)?.is_some() {
                return Ok(None);
            }
        }
        let mut best: Option<(u8, &str, Option<&GroupScheme>)> = None;
        for (group, targets, scheme) in &self.groups {
            for target in targets {
                let Some(rank) = target.rank(name)? else { continue };
                match best {
                    Some((r, ..)) if r < rank => {}
                    Some((r, other, s)) if r == rank && s != scheme.as_ref() => {
                        return Err(format!("matches both config groups `{other}` and `{group}`, which differ"));
                    }
                    _ => best = Some((rank, group, scheme.as_ref())),
                }
            }
        }
        Ok(best.and_then(|(.., scheme)| scheme))
    }
}

impl Target {
    /// How closely this matches `name`, 0 the closest.
    fn rank(&self, name: &str) -> Result<Option<u8>, String> {
        Ok(match self {
            // Wrappers put prefixes before a name, so a whole-component suffix counts as the name.
            Target::Exact(t) => {
                (name == t || name.strip_suffix(t.as_str()).is_some_and(|p| p.ends_with('.'))).then_some(0)
            }
            Target::Regex(pattern) => pattern.matches(name)?.then_some(1),
            Target::Linear => Some(2),
        })
    }
}

fn targets(o: &Object, field: &str) -> Result<Vec<Target>> {
    let target = |t: String| match t.strip_prefix("re:") {
        Some(source) => Pattern::new(source).map(Target::Regex).map_err(|reason| o.error(field, reason)),
        None if t == "Linear" => Ok(Target::Linear),
        None => Ok(Target::Exact(t)),
    };
    o.strings(field)?.unwrap_or_default().into_iter().map(target).collect()
}

fn scheme(group: &Object, default_format: Option<&str>) -> Result<Option<GroupScheme>> {
    if !group.is_neutral("output_activations") {
        return Err(unsupported(group, "output_activations", "quantized outputs"));
    }
    let Some(w) = group.object("weights")? else {
        if !group.is_neutral("input_activations") {
            return Err(unsupported(group, "input_activations", "quantized activations with unquantized weights"));
        }
        return Ok(None);
    };
    let Some(name) = group.str("format")?.or(default_format) else {
        return Err(group.error("format", "missing, and there is no `format` for all groups"));
    };
    let format = match (name, w.str("type")?.unwrap_or("int")) {
        ("pack-quantized", "int") => Format::Packed,
        ("int-quantized" | "naive-quantized", "int") => Format::Int,
        ("float-quantized" | "naive-quantized", "float") => Format::Float,
        ("pack-quantized" | "int-quantized" | "naive-quantized" | "float-quantized", other) => {
            return Err(unsupported(&w, "type", &format!("`{other}` codes in the format `{name}`")));
        }
        (other, _) => return Err(unsupported(group, "format", &format!("the format `{other}`"))),
    };
    let activations = match group.object("input_activations")? {
        Some(args) => activations(&args, format)?,
        None => Activations::None,
    };
    let (bits, symmetric) = args(&w)?;
    if w.get("dynamic").is_some_and(|d| *d != false) {
        return Err(unsupported(&w, "dynamic", "weights quantized while running"));
    }
    let act_order = match w.get("actorder").map(|a| a.as_str().map_or_else(|| a.to_string(), str::to_owned)).as_deref()
    {
        None | Some("false" | "weight" | "static") => false,
        Some("true" | "group" | "dynamic") => true,
        Some(other) => return Err(w.error("actorder", format!("expected group, weight or static, got `{other}`"))),
    };
    if format != Format::Float {
        if !w.is_neutral("block_structure") {
            return Err(unsupported(&w, "block_structure", "block scales of integers"));
        }
        if w.str("strategy")? == Some("block") {
            return Err(unsupported(&w, "strategy", "weight scales by `block` of integers"));
        }
    }
    let strategy = strategy(&w)?;
    match format {
        Format::Packed if act_order && !matches!(strategy, Strategy::Group(_)) => {
            return Err(w.error("actorder", "expected null without groups"));
        }
        Format::Float if act_order => return Err(unsupported(&w, "actorder", "reordered columns in FP8")),
        _ => {}
    }
    Ok(Some(GroupScheme { bits, symmetric, strategy, act_order, activations, format }))
}

/// Where the scales of a weight apply.
fn strategy(w: &Object) -> Result<Strategy> {
    let size = w.group_size("group_size")?.flatten();
    let block = Block::parse(w, "block_structure")?;
    let inferred = if block.is_some() {
        "block"
    } else if size.is_some() {
        "group"
    } else if w.get("group_size").is_some() {
        "channel"
    } else {
        "tensor"
    };
    let strategy = w.str("strategy")?.unwrap_or(inferred);
    if block.is_some() && strategy != "block" {
        return Err(w.error("block_structure", format!("expected null with the strategy `{strategy}`")));
    }
    match (strategy, size, block) {
        ("tensor", ..) => Ok(Strategy::Tensor),
        ("channel", ..) => Ok(Strategy::Channel),
        ("group", Some(size), _) => Ok(Strategy::Group(size)),
        ("group", None, _) => Err(w.error("group_size", "missing; the strategy `group` needs a positive number")),
        ("block", _, Some(block)) => Ok(Strategy::Block(block)),
        ("block", _, None) => Err(w.error("block_structure", "missing; the strategy `block` needs two sizes")),
        (other, ..) => Err(unsupported(w, "strategy", &format!("weight scales by `{other}`"))),
    }
}

/// Activations of weights in `format`: integers with integers, FP8 with FP8.
fn activations(a: &Object, format: Format) -> Result<Activations> {
    let (bits, symmetric) = args(a)?;
    let is_float = match (a.str("type")?.unwrap_or("int"), format) {
        ("int", Format::Packed | Format::Int) => false,
        ("float", Format::Float) => true,
        (other, Format::Float) => return Err(unsupported(a, "type", &format!("`{other}` activations of FP8 weights"))),
        (other, _) => return Err(unsupported(a, "type", &format!("`{other}` codes"))),
    };
    if bits != 8 {
        return Err(unsupported(a, "num_bits", &format!("activations of {bits} bits")));
    }
    if !a.is_neutral("actorder") {
        return Err(a.error("actorder", "expected null for activations"));
    }
    if !a.is_neutral("block_structure") {
        return Err(unsupported(a, "block_structure", "activation scales by blocks"));
    }
    let dynamic = a.get("dynamic").is_some_and(|d| *d != false);
    if a.str("dynamic").is_ok_and(|s| s.is_some()) {
        return Err(unsupported(a, "dynamic", "locally dynamic activations"));
    }
    let default = if a.group_size("group_size")?.is_some() { "group" } else { "tensor" };
    match (dynamic, a.str("strategy")?.unwrap_or(default)) {
        (true, "token" | "tensor" | "group") if is_float => Ok(Activations::Fp8 { is_static: false }),
        (false, "tensor") if is_float => Ok(Activations::Fp8 { is_static: true }),
        (true, "token") => Ok(Activations::DynamicPerToken { symmetric }),
        (false, "tensor") => Ok(Activations::StaticPerTensor { symmetric }),
        (true, other) => Err(unsupported(a, "strategy", &format!("dynamic activation scales by `{other}`"))),
        (false, other) => Err(unsupported(a, "strategy", &format!("static activation scales by `{other}`"))),
    }
}

/// What weights and activations have in common: bits and symmetry.
fn args(a: &Object) -> Result<(u8, bool)> {
    a.refuse_unknown(&[ARGS])?;
    let bits = match (a.integer("num_bits", 0..=64)?.unwrap_or(8), a.str("type")?) {
        (8, Some("float")) => 8,
        (other, Some("float")) => return Err(unsupported(a, "num_bits", &format!("floats of {other} bits"))),
        (b @ 2..=8, _) => b as u8,
        (other, _) => return Err(a.error("num_bits", format!("expected 2 to 8, got {other}"))),
    };
    let symmetric = a.bool("symmetric")?.unwrap_or(true);
    if !symmetric && a.str("type")? == Some("float") {
        return Err(a.error("symmetric", "expected true for floats"));
    }
    Ok((bits, symmetric))
}

fn unsupported(o: &Object, field: &str, what: &str) -> Error {
    Error::unsupported(
        format!("{}: field `{}`: {what}", o.file().display(), o.field_path(field)),
        "Of compressed-tensors, integer weights of 2 to 8 bits (pack-quantized, int-quantized), with 8-bit dynamic per-token, static per-tensor or no activation quantization, and FP8 weights (float-quantized) are supported",
    )
}

/// Whether a version `major.minor...` is 0.18 or later.
fn at_least_0_18(version: &str) -> bool {
    let mut parts = version.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (0, 18)
}

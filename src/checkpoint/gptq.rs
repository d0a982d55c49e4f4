//! GPTQ checkpoints (AutoGPTQ, GPTQModel): 2, 3, 4 or 8 bits packed down the inputs, docs/formats.md section 2.

use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::quant::pack::Packing;
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Scheme, Storage, Stored, Weight};

use super::json::Object;
use super::module::{FLOATS, Module, Sizes, WORDS};
use super::order::{self, sort_by_group, transpose};
use super::pattern::Pattern;
use super::tool_fields::{self, TOOL_FIELDS};

const UNDERSTOOD: &[&str] = &[
    "bits",
    "checkpoint_format",
    "desc_act",
    "dynamic",
    "format",
    "group_size",
    "is_marlin_format",
    "lm_head",
    "method",
    "pack_dtype",
    "quant_method",
    "sym",
    "version",
];

/// Which number `qzeros` holds: the zero point less one, or the zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroConvention {
    V1,
    V2,
}

/// What may differ between modules.
#[derive(Debug, Clone, PartialEq)]
struct Params {
    bits: u8,
    /// `None` is one group for all inputs.
    group_size: Option<usize>,
    symmetric: bool,
    desc_act: bool,
}

/// A GPTQ configuration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Gptq {
    params: Params,
    label: ZeroConvention,
    /// GPTQModel's overrides; the first pattern that matches a module decides. `None` leaves the module unquantized.
    dynamic: Vec<(Pattern, Option<Params>)>,
}

impl Gptq {
    pub(super) fn parse(o: &Object) -> Result<Gptq> {
        o.refuse_unknown(&[UNDERSTOOD, TOOL_FIELDS])?;
        let format = match (o.str("checkpoint_format")?, o.str("format")?) {
            (Some(a), Some(b)) if a != b => {
                return Err(o.error("format", format!("`{b}` contradicts checkpoint_format `{a}`")));
            }
            (a, b) => a.or(b).unwrap_or("gptq"),
        };
        let field = |field: &str| format!("{}: field `{}`", o.file().display(), o.field_path(field));
        if o.bool("is_marlin_format")? == Some(true) || format == "marlin" {
            let named = if format == "marlin" { "checkpoint_format" } else { "is_marlin_format" };
            let what = format!("{}: weights repacked for the Marlin kernels alone, in their own layout", field(named));
            return Err(Error::unsupported(what, "Use the GPTQ checkpoint that it was repacked from"));
        }
        let label = match format {
            "gptq" => ZeroConvention::V1,
            "gptq_v2" => ZeroConvention::V2,
            other => {
                let what = format!("{}: GPTQ weights in the layout `{other}`", field("checkpoint_format"));
                return Err(Error::unsupported(
                    what,
                    "Use the checkpoint in the format `gptq` or `gptq_v2`, which it was made from",
                ));
            }
        };
        tool_fields::check(o)?;
        if o.str("pack_dtype")?.is_some_and(|d| d != "int32") {
            return Err(o.error("pack_dtype", "expected `int32`"));
        }
        let Some(params) = override_params(o, None)? else {
            return Err(o.error("bits", "missing; expected 2, 3, 4 or 8"));
        };
        let mut dynamic = Vec::new();
        if let Some(overrides) = o.object("dynamic")? {
            for key in overrides.keys() {
                let (skip, source) = match key.strip_prefix("-:") {
                    Some(source) => (true, source),
                    None => (false, key.strip_prefix("+:").unwrap_or(key)),
                };
                let pattern = Pattern::new(source).map_err(|reason| overrides.error(key, reason))?;
                let value = match overrides.object(key)? {
                    _ if skip => None,
                    Some(value) => {
                        value.refuse_unknown(&[&["bits", "group_size", "sym", "desc_act"], TOOL_FIELDS])?;
                        override_params(&value, Some(&params))?
                    }
                    None => Some(params.clone()),
                };
                dynamic.push((pattern, value));
            }
        }
        Ok(Gptq { params, label, dynamic })
    }

    /// The parameters of a module; `None` when it is left unquantized.
    fn params(&self, m: &Module) -> Result<Option<&Params>> {
        for (pattern, params) in &self.dynamic {
            if pattern.matches(m.name).map_err(|reason| m.shards().error(m.name, reason))? {
                return Ok(params.as_ref());
            }
        }
        // What the configuration does not single out is quantized where the file has it quantized: heads, and
        // modules outside `modules_in_block_to_quantize`.
        Ok((m.has("qweight") || !m.has("weight")).then_some(&self.params))
    }

    pub(super) fn check(&self, m: &mut Module) -> Result<Option<Sizes>> {
        let Some(p) = self.params(m)? else { return Ok(m.check_dense()) };
        let Some((words, n)) = m.matrix("qweight", WORDS) else { return Ok(None) };
        let bits = usize::from(p.bits);
        let k = match m.entry("g_idx").map(|e| e.shape.as_slice()) {
            Some(&[k]) => k,
            _ => words * 32 / bits,
        };
        if k == 0 || words != Packing::Dense.words(k, p.bits) {
            m.problem("qweight", format!("{words} rows of words for {k} inputs of {bits} bits"));
            return Ok(None);
        }
        let groups = p.group_size.map_or(1, |g| k.div_ceil(g));
        m.need("qzeros", WORDS, &[&[groups, Packing::Dense.words(n, p.bits)]]);
        m.need("scales", FLOATS, &[&[groups, n]]);
        m.optional("g_idx", &[Dtype::I32, Dtype::I64], &[&[k]]);
        m.optional("bias", FLOATS, &[&[n]]);
        if m.has("weight") {
            m.problem("weight", "there beside qweight; expected one of them");
        }
        if m.problems.is_empty() {
            let zeros = self.zeros(m, p, n, groups).and_then(|(_, note)| Ok((note, order(m, p, k, groups)?)));
            match zeros {
                Ok((note, _)) => m.notes.extend(note),
                Err(e) => m.problems.push(e.to_string()),
            }
        }
        Ok(Some(Sizes { n, k }))
    }

    pub(super) fn scheme(&self, m: &Module, Sizes { k, .. }: Sizes) -> Result<Scheme> {
        let Some(p) = self.params(m)? else { return Ok(m.dense_scheme()) };
        let groups = p.group_size.map_or(1, |g| k.div_ceil(g));
        Ok(Scheme {
            weight_bits: p.bits,
            group_size: p.group_size.filter(|&g| g < k),
            symmetric: p.symmetric,
            encoding: Encoding::Affine,
            act_order: order(m, p, k, groups)?.is_some(),
            activation: ActQuant::None,
        })
    }

    pub(super) fn read(&self, m: &Module, sizes: Sizes) -> Result<LinearWeight> {
        let Some(p) = self.params(m)? else { return m.read_dense(sizes) };
        let Sizes { n, k } = sizes;
        let group_size = p.group_size.map_or(k, |g| g.min(k));
        let groups = k.div_ceil(group_size);
        let order = order(m, p, k, groups)?;
        let codes = Stored::new(m.shared("qweight")?, n, k, p.bits, Storage::Columns).into();
        let mut weight = QuantWeight {
            n,
            k,
            bits: p.bits,
            group_size,
            codes,
            scales: transpose(&m.scales("scales")?, groups, n),
            zeros: transpose(&self.zeros(m, p, n, groups)?.0, groups, n),
            order: None,
            encoding: Encoding::Affine,
        };
        if let Some(order) = order {
            order::apply(&mut weight, order);
        }
        Ok(LinearWeight { weight: Weight::Quant(weight), bias: m.bias()?, activation: ActQuant::None })
    }

    /// `[groups, n]` zero points, and what to tell about how their convention was found out.
    ///
    /// A v1 file stores `z - 1`. Labels are not to be trusted: some writers label v2 contents `gptq`. A symmetric
    /// file can hold only one of two values, so there the value decides.
    fn zeros(&self, m: &Module, p: &Params, n: usize, groups: usize) -> Result<(Vec<f32>, Option<String>)> {
        let words = m.words("qzeros")?;
        let mut fields = vec![0u8; groups * n];
        let per_row = Packing::Dense.words(n, p.bits);
        let rows = fields.par_chunks_mut(n).zip(words.par_chunks(per_row));
        rows.for_each(|(row, words)| Packing::Dense.unpack(words, p.bits, row));
        let middle = 1u8 << (p.bits - 1);
        let (convention, note) = if p.symmetric {
            let all = |v: u8| fields.par_iter().all(|&f| f == v);
            let found = match () {
                () if all(middle - 1) => ZeroConvention::V1,
                () if all(middle) => ZeroConvention::V2,
                () => {
                    let odd = fields.iter().find(|&&f| f != middle && f != middle - 1);
                    let got = odd.map_or("a mixture of them".to_owned(), |f| f.to_string());
                    let reason = format!(
                        "the configuration says symmetric, so every field is {} (v1) or {middle} (v2); got {got}",
                        middle - 1
                    );
                    return Err(m.error("qzeros", reason));
                }
            };
            let lie = "labelled v1 (`gptq`), but zero points are stored as v2; read as v2";
            let lie_v2 = "labelled `gptq_v2`, but zero points are stored as v1; read as v1";
            let note = (found != self.label).then(|| if found == ZeroConvention::V2 { lie } else { lie_v2 }.to_owned());
            (found, note)
        } else {
            let how = match self.label {
                ZeroConvention::V1 => {
                    "v1 (stored value + 1), as the label `gptq` says; if the text is broken, the label may be wrong"
                }
                ZeroConvention::V2 => "v2 (stored value), as the label `gptq_v2` says",
            };
            (self.label, Some(format!("asymmetric zero points read as {how}")))
        };
        // Not masked to `bits`: a stored 2^b - 1 means a zero point of 2^b.
        let offset = if convention == ZeroConvention::V1 { 1.0 } else { 0.0 };
        Ok((fields.par_iter().map(|&f| f32::from(f) + offset).collect(), note))
    }
}

/// Parameters written in `o`, over those of `base`. `None` without a base and without bits.
fn override_params(o: &Object, base: Option<&Params>) -> Result<Option<Params>> {
    let bits = match o.integer("bits", 0..=64)? {
        Some(b @ (2 | 3 | 4 | 8)) => b as u8,
        Some(other) => return Err(o.error("bits", format!("expected 2, 3, 4 or 8 for GPTQ, got {other}"))),
        None => match base {
            Some(base) => base.bits,
            None => return Ok(None),
        },
    };
    let group_size = match o.group_size("group_size")? {
        Some(group_size) => group_size,
        None => base.map_or(Some(128), |b| b.group_size),
    };
    let symmetric = o.bool("sym")?.unwrap_or(base.is_none_or(|b| b.symmetric));
    let desc_act = o.bool("desc_act")?.unwrap_or(base.is_some_and(|b| b.desc_act));
    Ok(Some(Params { bits, group_size, symmetric, desc_act }))
}

/// The order of columns that `g_idx` asks for; `None` when it is the natural one.
fn order(m: &Module, p: &Params, k: usize, groups: usize) -> Result<Option<Vec<u32>>> {
    let group_size = p.group_size.map_or(k, |g| g.min(k));
    let g_idx = if m.has("g_idx") { m.integers("g_idx")? } else { Vec::new() };
    // Exports without act-order leave g_idx out or zero.
    if g_idx.iter().all(|&g| g == 0) {
        if p.desc_act && groups > 1 {
            return Err(m.error("g_idx", "absent or all zero, though desc_act says that columns are reordered"));
        }
        return Ok(None);
    }
    sort_by_group(&g_idx, group_size).map_err(|reason| m.error("g_idx", reason))
}

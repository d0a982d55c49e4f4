//! The one report at load: everything that does not fit between a model and its files.

use std::collections::{BTreeMap, HashSet};

use crate::error::{Error, Result};

use super::module::{FLOATS, Module};
use super::{Checkpoint, Expected, head};

/// Lines a report shows; the rest is counted.
const MAX_LINES: usize = 40;

/// Something about a model worth showing, where nothing is wrong enough to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What.
    pub text: String,
    /// Files and configuration disagree: whoever runs the model should know.
    pub is_warning: bool,
}

impl Note {
    pub(super) fn plain(text: impl Into<String>) -> Note {
        Note { text: text.into(), is_warning: false }
    }

    pub(super) fn warning(text: impl Into<String>) -> Note {
        Note { text: text.into(), is_warning: true }
    }

    /// Tells it by the log.
    pub fn log(&self) {
        match self.is_warning {
            true => tracing::warn!("{}", self.text),
            false => tracing::info!("{}", self.text),
        }
    }
}

/// See [`Checkpoint::check`].
pub(super) fn check(checkpoint: &Checkpoint, expected: &[Expected]) -> Result<Vec<Note>> {
    let mut problems = Vec::new();
    let mut biases = Vec::new();
    let mut notes: BTreeMap<String, usize> = BTreeMap::new();
    let mut used: HashSet<String> = HashSet::new();
    let mut linears: HashSet<&str> = HashSet::new();
    for item in expected {
        match item {
            Expected::Tensor { name, shape } => {
                problems.extend(check_tensor(checkpoint, name, shape));
                used.insert(name.clone());
            }
            Expected::Linear { name, n, k, bias } => {
                let mut m = Module::new(&checkpoint.shards, name);
                match checkpoint.quantization.check(&mut m) {
                    Ok(Some(found)) if (found.n, found.k) != (*n, *k) => {
                        m.problems.push(format!(
                            "`{name}`: [{}, {}]; the model's shape makes it [{n}, {k}]",
                            found.n, found.k
                        ));
                    }
                    Ok(_) => {}
                    Err(e) => m.problems.push(e.to_string()),
                }
                match (*bias, m.has("bias")) {
                    (true, false) => m.problem("bias", format!("missing; expected [{n}]")),
                    (false, true) => biases.push(m.full("bias")),
                    _ => {}
                }
                used.extend(m.used.iter().map(|suffix| m.full(suffix)));
                problems.append(&mut m.problems);
                for note in m.notes {
                    *notes.entry(note).or_default() += 1;
                }
                linears.insert(name);
            }
        }
    }
    let layers = notes.into_iter().map(|(note, count)| Note::plain(format!("{count} layers: {note}")));
    let mut notes: Vec<Note> = checkpoint.settled.iter().cloned().chain(layers).collect();
    notes.extend(unused_biases(checkpoint, &biases));
    let mut extra = Vec::new();
    for (name, _) in checkpoint.shards.iter().filter(|(name, _)| !used.contains(*name)) {
        if is_cache_scale(name) {
            extra.push(name);
            continue;
        }
        // A tensor of a layer that is read without it: what it says about the layer's numbers would be lost.
        if name.match_indices('.').any(|(i, _)| linears.contains(&name[..i])) {
            problems.push(format!("`{name}`: not understood for a layer of this scheme"));
        } else {
            extra.push(name);
        }
    }
    notes.extend(extra_notes(checkpoint, &extra));
    if problems.is_empty() {
        return Ok(notes);
    }
    let count = problems.len();
    let mut lines = problems;
    if let Some(hint) = naming_hint(checkpoint).filter(|_| count > 1) {
        lines.insert(0, hint);
    }
    if count > MAX_LINES {
        lines.truncate(MAX_LINES);
        lines.push(format!("and {} more", count - MAX_LINES));
    }
    let plural = if count == 1 { "problem" } else { "problems" };
    Err(Error::file(checkpoint.dir(), format!("{count} {plural}:\n  {}", lines.join("\n  "))))
}

fn check_tensor(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Option<String> {
    let Some(entry) = checkpoint.shards.get(name) else {
        return Some(format!("`{name}`: missing; expected {shape:?}"));
    };
    if !FLOATS.contains(&entry.dtype) {
        return Some(format!("`{name}`: is {:?}; expected F16, BF16 or F32", entry.dtype));
    }
    (entry.shape != shape).then(|| format!("`{name}`: has shape {:?}; expected {shape:?}", entry.shape))
}

/// What to tell about biases of layers that have none by the configuration. Zeros, which some exporters add, change nothing.
fn unused_biases(checkpoint: &Checkpoint, biases: &[String]) -> Option<Note> {
    let first = biases.first()?;
    let is_zero =
        |name: &String| checkpoint.shards.floats(name).is_ok_and(|bias| bias.to_f32().iter().all(|&b| b == 0.0));
    if biases.iter().all(is_zero) {
        return Some(Note::plain(format!("{} biases of zeros not used, the first `{first}`", biases.len())));
    }
    Some(Note::warning(format!(
        "the configuration says that these layers have no bias, but the files hold {}: not applied, as in transformers; \
         if the model was trained with them, correct the configuration: {}",
        biases.len(),
        listed(biases)
    )))
}

/// What to say of files whose tensors have other names than this crate asks for.
fn naming_hint(checkpoint: &Checkpoint) -> Option<String> {
    const HERE: &str = "model.embed_tokens.weight";
    /// The embedding's name in other schemes, and whose they are.
    const SCHEMES: [(&str, &str); 6] = [
        ("tok_embeddings.weight", "its maker's own names (params.json), not Hugging Face's"),
        ("token_embd.weight", "GGUF's names"),
        ("transformer.wte.weight", "names of GPT-2 and of the first Qwen"),
        ("transformer.word_embeddings.weight", "names of Falcon and BLOOM"),
        ("gpt_neox.embed_in.weight", "names of GPT-NeoX"),
        ("transformer.embedding.word_embeddings.weight", "names of ChatGLM"),
    ];
    if checkpoint.has(HERE) {
        return None;
    }
    let mut names = checkpoint.shards.iter().map(|(name, _)| name);
    if let Some((name, whose)) = SCHEMES.iter().find(|(name, _)| checkpoint.has(name)) {
        return Some(format!(
            "the files have {whose} (`{name}`): convert the model to the layout of its architecture in transformers"
        ));
    }
    let name = names.find(|name| name.ends_with("embed_tokens.weight"))?;
    let reason = match name.strip_suffix(HERE) {
        Some(prefix) if prefix.starts_with("base_model.") => format!("the prefix `{prefix}`, as adapters have (peft): merge it into its base model"),
        Some(prefix) => format!("the prefix `{prefix}`: a part of a larger model, or one that was wrapped when it was saved; save the language model alone"),
        None => "no prefix `model.`: the model without its head; save the causal language model (transformers: AutoModelForCausalLM)".to_owned(),
    };
    Some(format!("the files name tensors with {reason} (`{name}`, expected `{HERE}`)"))
}

/// Names in a line, the first few.
fn listed(names: &[String]) -> String {
    let shown = names.iter().take(6).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match names.len() {
        0..=6 => shown,
        all => format!("{shown} and {} more", all - 6),
    }
}

/// Whether a tensor says how keys, values or queries are quantized in attention: today's names of compressed-tensors,
/// its older ones (outputs of the layers that make them), and those of AutoFP8, ModelOpt and Quark.
fn is_cache_scale(name: &str) -> bool {
    const NAMES: [&str; 7] =
        ["k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point", "prob_scale"];
    let Some((_, rest)) = name.rsplit_once(".self_attn.") else { return false };
    match rest.split_once('.') {
        None => NAMES.contains(&rest),
        Some(("k_proj" | "v_proj", "output_scale" | "output_zero_point")) => true,
        Some(("q_proj" | "k_proj" | "v_proj" | "qkv_proj" | "attn", end)) => NAMES.contains(&end),
        Some(_) => false,
    }
}

/// Number of the decoder layer that a tensor belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Notes on tensors that nothing reads.
fn extra_notes(checkpoint: &Checkpoint, extra: &[&str]) -> Vec<Note> {
    // Buffers that old versions of transformers saved, recomputed by everyone.
    let rotary = |name: &&str| name.ends_with("rotary_emb.inv_freq");
    // Where it is not the embedding itself, the head is none that is tied.
    let tied_head = |name: &&str| checkpoint.config.tie_word_embeddings && *name == head::WEIGHT;
    let cache = |name: &&str| is_cache_scale(name);
    let mut notes = Vec::new();
    if extra.iter().any(cache) {
        notes.push(Note::plain("scales of a quantized KV cache: not used; keys and values are kept in 16 bit"));
    }
    if extra.iter().any(rotary) {
        notes.push(Note::plain("rotary_emb.inv_freq: not used; frequencies come from the configuration"));
    }
    let others = extra.iter().filter(|n| !rotary(n) && !tied_head(n) && !cache(n)).copied();
    let layers = checkpoint.config.num_layers;
    let (beyond, rest): (Vec<&str>, Vec<&str>) = others.partition(|name| layer_of(name).is_some_and(|i| i >= layers));
    if let Some(first) = beyond.first() {
        notes.push(Note::warning(format!(
            "config.json says `num_hidden_layers` {layers}: {} tensors of later layers not used, the first `{first}`",
            beyond.len()
        )));
    }
    if let Some(first) = rest.first() {
        notes.push(Note::plain(format!("{} tensors not used, the first `{first}`", rest.len())));
    }
    notes
}

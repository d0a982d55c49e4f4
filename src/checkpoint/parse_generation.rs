//! `generation_config.json` into [`GenerationConfig`]: what is honoured, what is known to change nothing here, and what is
//! told because it would change the output.

use serde_json::{Value, json};

use crate::error::{Error, Result};

use super::config::{GenerationConfig, MAX_POSITIONS, ModelConfig};
use super::json::Object;
use super::parse_config::{ids_of, token_ids};

/// Fields that are read.
const HONOURED: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
];

/// Fields of transformers' `GenerationConfig` (5.24 and before) that do not change which tokens one sequence gets: what is
/// returned, how it is computed, and parameters of beam search, which without `num_beams` say nothing.
const WITHOUT_EFFECT: &[&str] = &[
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "chat_format",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "diversity_penalty",
    "early_stopping",
    "generation_kwargs",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_matching_ngram_size",
    "max_window_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "target_lookbehind",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
];

/// Fields that change the output, each with the value that does not.
fn neutral(field: &str) -> Option<Value> {
    Some(match field {
        "num_beams" | "num_beam_groups" => json!(1),
        "typical_p" | "encoder_repetition_penalty" | "guidance_scale" | "top_h" => json!(1.0),
        "epsilon_cutoff" | "eta_cutoff" | "penalty_alpha" => json!(0.0),
        "encoder_no_repeat_ngram_size" | "min_length" => json!(0),
        "token_healing" => json!(false),
        _ => return None,
    })
}

/// Reads `generation_config.json`; `None` when there is none.
pub(super) fn generation(o: Option<&Object>, model: &ModelConfig) -> Result<GenerationConfig> {
    let mut eos_token_ids = model.eos_token_ids.clone();
    let Some(o) = o else { return Ok(GenerationConfig { eos_token_ids, ..GenerationConfig::default() }) };
    let vocab = model.vocab_size;
    for id in token_ids(o, "eos_token_id", vocab)? {
        if !eos_token_ids.contains(&id) {
            eos_token_ids.push(id);
        }
    }
    let number = |field, low, high| Ok::<_, Error>(o.number(field, low, high)?.map(|v| v as f32));
    let count = |field| Ok::<_, Error>(o.integer(field, 0..=MAX_POSITIONS as i64)?.map(|n| n as usize));
    Ok(GenerationConfig {
        eos_token_ids,
        do_sample: o.bool("do_sample")?,
        temperature: number("temperature", 0.0, 1e4)?,
        top_p: number("top_p", 0.0, 1.0)?,
        // -1 is how other programs write that all are kept.
        top_k: o.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as u32),
        min_p: number("min_p", 0.0, 1.0)?,
        repetition_penalty: number("repetition_penalty", 1e-4, 1e4)?,
        suppress_tokens: token_ids(o, "suppress_tokens", vocab)?,
        begin_suppress_tokens: token_ids(o, "begin_suppress_tokens", vocab)?,
        bad_words_ids: bad_words(o, vocab)?,
        sequence_bias: sequence_bias(o, vocab)?,
        no_repeat_ngram_size: count("no_repeat_ngram_size")?.unwrap_or(0),
        min_new_tokens: count("min_new_tokens")?.unwrap_or(0),
        max_new_tokens: count("max_new_tokens")?.filter(|&n| n > 0),
        max_length: count("max_length")?.filter(|&n| n > 0),
        stop_strings: match o.get("stop_strings") {
            Some(Value::String(text)) => vec![text.clone()],
            _ => o.strings("stop_strings")?.unwrap_or_default(),
        },
        unused: o.keys().filter(|field| changes_output(o, field)).map(str::to_owned).collect(),
    })
}

/// Whether a field is written that is not used, though it may say something.
fn changes_output(o: &Object, field: &str) -> bool {
    if o.is_neutral(field) || HONOURED.contains(&field) || WITHOUT_EFFECT.contains(&field) {
        return false;
    }
    let same = |a: &Value, b: &Value| a == b || a.as_f64().is_some_and(|a| b.as_f64() == Some(a));
    match (o.get(field), neutral(field)) {
        (Some(value), Some(neutral)) => !same(value, &neutral),
        _ => true,
    }
}

/// Lists of ids, none of them empty.
fn bad_words(o: &Object, vocab: usize) -> Result<Vec<Vec<u32>>> {
    const FIELD: &str = "bad_words_ids";
    let Some(value) = o.get(FIELD) else { return Ok(Vec::new()) };
    let lists = value.as_array().ok_or_else(|| o.error(FIELD, "expected a list of lists of token ids"))?;
    lists.iter().map(|list| sequence(o, FIELD, list, vocab)).collect()
}

/// `[[ids], bias]` pairs.
fn sequence_bias(o: &Object, vocab: usize) -> Result<Vec<(Vec<u32>, f32)>> {
    const FIELD: &str = "sequence_bias";
    let Some(value) = o.get(FIELD) else { return Ok(Vec::new()) };
    let bad = || o.error(FIELD, "expected a list of pairs: a list of token ids, and a number");
    let pair = |pair: &Value| {
        let [ids, bias] = pair.as_array().map_or(&[][..], Vec::as_slice) else { return Err(bad()) };
        let bias = bias.as_f64().filter(|bias| bias.abs() <= 1e9).ok_or_else(bad)?;
        Ok((sequence(o, FIELD, ids, vocab)?, bias as f32))
    };
    value.as_array().ok_or_else(bad)?.iter().map(pair).collect()
}

fn sequence(o: &Object, field: &str, list: &Value, vocab: usize) -> Result<Vec<u32>> {
    match list {
        Value::Array(ids) if !ids.is_empty() => ids_of(o, field, list, vocab),
        _ => Err(o.error(field, format!("{list} is not a list of token ids"))),
    }
}

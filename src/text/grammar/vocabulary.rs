//! A tokenizer's vocabulary as the grammar parser wants it: what each token of the model adds to the text.

use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

use crate::error::{Error, Result};
use crate::text::panics::guard;
use crate::text::tokenizer::Tokenizer;

/// Longest token in bytes that a grammar may use: the trie has room for 1023 levels.
const MAX_TOKEN_BYTES: usize = 1000;

/// The tokens of a model's embedding, by the bytes that they add in the middle of a text. `eos_ids` end it.
///
/// A grammar sees bytes alone, and allows every way of cutting them into tokens, so that what is drawn is the model's own distribution
/// over the texts that it allows. Special tokens and those of `eos_ids` are no text: behind a marker byte, which no UTF-8 has, only a
/// grammar that names them (`<|im_end|>` in Lark) finds them. Rows without a token are never allowed.
///
/// # Errors
/// [`Error::Text`] where the vocabulary is too large for the parser.
pub(super) fn token_env(tokenizer: &Tokenizer, eos_ids: &[u32]) -> Result<TokEnv> {
    let rows = tokenizer.rows();
    let words: Vec<Vec<u8>> = (0..rows as u32).map(|id| word(tokenizer, id, eos_ids.contains(&id))).collect();
    let ends: Vec<u32> = eos_ids.iter().copied().filter(|&id| (id as usize) < rows).collect();
    let build = || {
        let info = TokRxInfo::new(rows as u32, ends.first().copied().unwrap_or(INVALID_TOKEN));
        let trie = TokTrie::from(&info, &words);
        if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) }
    };
    let too_large = || Error::Text {
        what: "tokenizer.json".to_string(),
        reason: format!("its vocabulary of {rows} tokens is more than the grammar parser takes"),
    };
    let trie = guard(build).ok_or_else(too_large)?;
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}

fn word(tokenizer: &Tokenizer, id: u32, is_end: bool) -> Vec<u8> {
    let Some((bytes, is_special)) = tokenizer.pieces().bytes(id) else { return Vec::new() };
    let marker = TokTrie::SPECIAL_TOKEN_MARKER;
    let bytes = match is_special || is_end {
        true if bytes.is_empty() => format!("<[{id}]>").into_bytes(),
        true => bytes.into_owned(),
        // What no UTF-8 begins with must not look like a special token; the byte alone does not.
        false if bytes.len() > 1 && bytes[0] == marker => return Vec::new(),
        false => return if bytes.len() > MAX_TOKEN_BYTES { Vec::new() } else { bytes.into_owned() },
    };
    let bytes = [&[marker], &bytes[..]].concat();
    if bytes.len() > MAX_TOKEN_BYTES { Vec::new() } else { bytes }
}

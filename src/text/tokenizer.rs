//! Text to token ids and back, from a model directory's `tokenizer.json`.
//!
//! The work is the `tokenizers` crate's; here are its limits, the rules of `tokenizer_config.json`, and the checks
//! against the model. What bounds a hostile file: its size, below; the crate refuses merges of tokens that the
//! vocabulary lacks; `fancy-regex` refuses patterns that compile to more than some megabytes, matches those without
//! look-around or back-references in linear time, and gives up any other match after a million steps.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use super::detokenizer::{Detokenizer, Pieces};
use super::{read_bounded, read_object, special_tokens, text_error};
use crate::error::{Error, Result};

/// Largest tokenizer.json read. The largest in use (256k entries, pretty-printed) are near 35 MiB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Arc<Pieces>,
    /// Special tokens put before and after a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    vocab: usize,
}

/// The part of tokenizer.json that the crate reads without checking.
#[derive(Deserialize)]
struct AddedTokens {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory, for a model of `vocab_size` entries.
    ///
    /// `add_bos_token` and `add_eos_token` of tokenizer_config.json override what tokenizer.json adds around a text,
    /// as in transformers; its truncation and padding are ignored, as there.
    ///
    /// # Errors
    /// [`Error::Text`] when a file is missing, malformed or too large, or when ids reach beyond the model's
    /// vocabulary (the model's may be larger, it is often padded); [`Error::Unsupported`] for a decoder of an
    /// unknown kind.
    pub fn load(dir: &Path, vocab_size: usize) -> Result<Tokenizer> {
        let Some((path, bytes)) = read_bounded(dir, "tokenizer.json", MAX_FILE_BYTES)? else {
            let advice = "there is no such file. Save the model's fast tokenizer with transformers: \
                          `AutoTokenizer.from_pretrained(...).save_pretrained(...)`";
            return Err(text_error(&dir.join("tokenizer.json"), advice));
        };
        let declared: AddedTokens = serde_json::from_slice(&bytes).map_err(|e| text_error(&path, e))?;
        let mut inner = guard(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(|e| text_error(&path, e))?;
        drop(bytes);
        inner.with_truncation(None).map_err(|e| text_error(&path, e))?.with_padding(None);
        for token in &declared.added_tokens {
            let got = inner.token_to_id(&token.content);
            if got != Some(token.id) {
                let reason = format!(
                    "added token `{}` says id {}, but the vocabulary makes it {}",
                    token.content,
                    token.id,
                    got.map_or("unknown".to_string(), |id| id.to_string())
                );
                return Err(text_error(&path, reason));
            }
        }
        let vocab = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        if vocab == 0 {
            return Err(text_error(&path, "its vocabulary is empty"));
        }
        if vocab > vocab_size {
            let reason = format!(
                "has {vocab} token ids, but the model's vocabulary (vocab_size in config.json) has {vocab_size}: \
                 this is another model's tokenizer"
            );
            return Err(text_error(&path, reason));
        }

        let roles = special_tokens(dir)?;
        let id_of = |role: &str| roles.get(role).and_then(|content| inner.token_to_id(content));
        let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
        let (mut prefix, mut suffix) = around(&inner).map_err(|e| text_error(&path, e))?;
        let config = read_object(dir, "tokenizer_config.json")?.unwrap_or_default();
        let wanted = |field: &str| config.get(field).and_then(serde_json::Value::as_bool);
        if let (Some(wanted), Some(bos)) = (wanted("add_bos_token"), bos) {
            prefix.retain(|&id| id != bos);
            if wanted {
                prefix.insert(0, bos);
            }
        }
        if let (Some(wanted), Some(eos)) = (wanted("add_eos_token"), eos) {
            suffix.retain(|&id| id != eos);
            if wanted {
                suffix.push(eos);
            }
        }
        let pieces = Arc::new(guard(|| Ok(Pieces::new(&inner, vocab))).map_err(|e| text_error(&path, e))??);
        Ok(Tokenizer { inner, pieces, prefix, suffix, bos, eos, vocab })
    }

    /// Token ids of `text`; special tokens written out in it become their ids. `add_special_tokens` puts those the
    /// model wants around a whole text (a BOS), which text from a chat template already has.
    ///
    /// # Errors
    /// [`Error::Text`] when the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = guard(|| self.inner.encode_fast(text, false))
            .map_err(|reason| Error::Text { what: "tokenizer".to_string(), reason })?;
        if !add_special_tokens {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok([&self.prefix, encoding.get_ids(), &self.suffix].concat())
    }

    /// Text of `ids`, with or without special tokens; ids without a token have no text.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut stream = self.detokenizer(skip_special_tokens);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// A detokenizer for one sequence.
    pub fn detokenizer(&self, skip_special_tokens: bool) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.pieces), skip_special_tokens)
    }

    /// The token of an id as the vocabulary writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary writes it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Begin-of-sequence id of tokenizer_config.json or special_tokens_map.json.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// End-of-sequence id of tokenizer_config.json or special_tokens_map.json; config.json and
    /// generation_config.json may name more.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// One more than the greatest token id; at most the model's vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }
}

/// The special tokens that tokenizer.json's post-processor puts before and after a text.
fn around(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let ids = |special| guard(|| inner.encode_fast("a", special)).map(|e| e.get_ids().to_vec());
    let (bare, full) = (ids(false)?, ids(true)?);
    match (0..=full.len().saturating_sub(bare.len())).find(|&at| full[at..].starts_with(&bare)) {
        Some(at) => Ok((full[..at].to_vec(), full[at + bare.len()..].to_vec())),
        None => Err("its post-processor changes the text's own tokens".to_string()),
    }
}

/// Runs a call into the `tokenizers` crate, which panics on some malformed files; that too becomes an error.
fn guard<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("is malformed in a way that its parser does not explain".to_string()),
    }
}

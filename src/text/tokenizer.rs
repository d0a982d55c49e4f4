//! Text to token ids and back, from a model directory's `tokenizer.json`.
//!
//! The work is the `tokenizers` crate's; here are its limits, the rules of `tokenizer_config.json`, and the checks
//! against the model. What bounds a hostile file: its size, below; the crate refuses merges of tokens that the
//! vocabulary lacks; `fancy-regex` refuses patterns that compile to more than some megabytes, matches those without
//! look-around or back-references in linear time, and gives up any other match after a million steps.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use super::detokenizer::{Detokenizer, Pieces};
use super::panics::guard;
use super::tokenizer_config::TokenizerConfig;
use super::{read_bounded, text_error, utf8};
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
    /// Rows of the model's embedding.
    rows: usize,
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
    /// What is added around a text stands in tokenizer.json, but for the classes of tokenizers that obey `add_bos_token`
    /// and `add_eos_token` of tokenizer_config.json; added tokens come from every file that transformers reads, and the
    /// file's truncation and padding are ignored, as there. Tokens that the model has no row for are warned of.
    ///
    /// # Errors
    /// [`Error::Text`] when a file is missing, malformed or too large, when it is another model's, or puts a token
    /// around every text that the model lacks; [`Error::Unsupported`] for a decoder of an unknown kind.
    pub fn load(dir: &Path, vocab_size: usize) -> Result<Tokenizer> {
        let Some((path, bytes)) = read_bounded(dir, "tokenizer.json", MAX_FILE_BYTES)? else {
            let advice = "there is no such file. Save the model's fast tokenizer with transformers: \
                          `AutoTokenizer.from_pretrained(...).save_pretrained(...)`";
            return Err(text_error(&dir.join("tokenizer.json"), advice));
        };
        // The crate that reads it panics on some files that are no JSON.
        let text = utf8(&path, &bytes)?;
        let declared: AddedTokens = serde_json::from_str(text).map_err(|e| text_error(&path, e))?;
        let mut inner = attempt(|| tokenizers::Tokenizer::from_bytes(text)).map_err(|e| text_error(&path, e))?;
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
        let config = TokenizerConfig::read(dir)?;
        for note in attempt(|| config.extend(&mut inner)).map_err(|e| text_error(&path, e))? {
            tracing::warn!("{}: {note}", dir.display());
        }
        let vocab = fitting_ids(&inner, vocab_size).map_err(|reason| text_error(&path, reason))?;

        let id_of = |role: &str| config.roles.get(role).and_then(|content| inner.token_to_id(content));
        let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
        let (mut prefix, mut suffix) = around(&inner).map_err(|e| text_error(&path, e))?;
        if let (Some(wanted), Some(bos)) = (config.add_bos, bos) {
            prefix.retain(|&id| id != bos);
            if wanted {
                prefix.insert(0, bos);
            }
        }
        if let (Some(wanted), Some(eos)) = (config.add_eos, eos) {
            suffix.retain(|&id| id != eos);
            if wanted {
                suffix.push(eos);
            }
        }
        if let Some(&id) = prefix.iter().chain(&suffix).find(|&&id| id as usize >= vocab_size) {
            let token = inner.id_to_token(id).unwrap_or_default();
            return Err(text_error(&path, format!("puts `{token}` around every text, {}", no_row(id, vocab_size))));
        }
        let pieces = Arc::new(attempt(|| Ok(Pieces::new(&inner, vocab))).map_err(|e| text_error(&path, e))??);
        let in_model = |id: Option<u32>| id.filter(|&id| (id as usize) < vocab_size);
        Ok(Tokenizer { inner, pieces, prefix, suffix, bos: in_model(bos), eos: in_model(eos), vocab, rows: vocab_size })
    }

    /// Token ids of `text`; special tokens written out in it become their ids. `add_special_tokens` puts those the
    /// model wants around a whole text (a BOS), which text from a chat template already has.
    ///
    /// # Errors
    /// [`Error::Text`] when the tokenizer cannot represent the text; [`Error::Input`] when it holds a token that the model
    /// has no row for.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = attempt(|| self.inner.encode_fast(text, false))
            .map_err(|reason| Error::Text { what: "tokenizer".to_string(), reason })?;
        let ids = encoding.get_ids();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            let token = self.id_to_token(id).unwrap_or_default();
            return Err(Error::input("text", format!("holds `{token}`, {}", no_row(id, self.rows))));
        }
        if !add_special_tokens {
            return Ok(ids.to_vec());
        }
        Ok([&self.prefix, ids, &self.suffix].concat())
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

    /// A detokenizer for one sequence that skips special tokens, but for these: the markers of a
    /// [`ReplyParser`](super::ReplyParser). Those that the vocabulary does not have are passed over.
    pub fn detokenizer_keeping(&self, tokens: &[&str]) -> Detokenizer {
        self.detokenizer(true).keeping(tokens.iter().filter_map(|token| self.token_to_id(token)).collect())
    }

    /// What each token adds to a text.
    pub(super) fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    /// Rows of the model's embedding: logits of each position.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Whether a token is special: skipped in texts, and not made of a text's own letters.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.bytes(id).is_some_and(|(_, is_special)| is_special)
    }

    /// The bytes that a token adds to a text that goes on, special or not; none for an id without a token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.pieces.bytes(id).map(|(bytes, _)| bytes.into_owned()).unwrap_or_default()
    }

    /// The token of an id as the vocabulary writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary writes it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Begin-of-sequence id of tokenizer_config.json or special_tokens_map.json, where the model has it.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// End-of-sequence id of tokenizer_config.json or special_tokens_map.json, where the model has it; config.json and
    /// generation_config.json may name more.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// One more than the greatest token id; at most the model's vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }
}

/// Of a model's vocabulary, the part of the base vocabulary that may lie beyond it: more is another model's tokenizer.
const BEYOND: usize = 16;

/// One more than the greatest id that the model has a row for; warns of tokens beyond.
fn fitting_ids(inner: &tokenizers::Tokenizer, vocab_size: usize) -> Result<usize, String> {
    let ids = inner.get_vocab(true);
    let vocab = ids.values().max().map_or(0, |&id| id as usize + 1);
    if vocab == 0 {
        return Err("its vocabulary is empty".to_string());
    }
    if vocab <= vocab_size {
        return Ok(vocab);
    }
    let added = inner.get_added_tokens_decoder().into_keys().filter(|&id| id as usize >= vocab_size).count();
    if vocab - vocab_size > added + vocab_size / BEYOND {
        return Err(format!(
            "has {vocab} token ids, but the model's vocabulary (vocab_size in config.json) has {vocab_size}: \
             this is another model's tokenizer"
        ));
    }
    let beyond = ids.iter().filter(|&(_, &id)| id as usize >= vocab_size);
    let first = beyond.min_by_key(|(_, id)| **id).map_or("", |(token, _)| token);
    tracing::warn!(
        "the tokenizer has {vocab} token ids, the model {vocab_size}: text that holds `{first}` or another of those beyond is refused"
    );
    Ok(vocab_size)
}

/// Why a token cannot be used.
fn no_row(id: u32, vocab_size: usize) -> String {
    format!("token {id}, which the model lacks: its vocabulary (vocab_size in config.json) has {vocab_size}")
}

/// The special tokens that tokenizer.json's post-processor puts before and after a text.
fn around(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let ids = |special| attempt(|| inner.encode_fast("a", special)).map(|e| e.get_ids().to_vec());
    let (bare, full) = (ids(false)?, ids(true)?);
    match (0..=full.len().saturating_sub(bare.len())).find(|&at| full[at..].starts_with(&bare)) {
        Some(at) => Ok((full[..at].to_vec(), full[at + bare.len()..].to_vec())),
        None => Err("its post-processor changes the text's own tokens".to_string()),
    }
}

/// Runs a call into the `tokenizers` crate, which panics on some malformed files; that too becomes an error.
fn attempt<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match guard(call) {
        Some(result) => result.map_err(|e| e.to_string()),
        None => Err("its parts do not fit together, in a way that its parser does not explain".to_string()),
    }
}

//! Token ids to text, one id at a time.

use std::borrow::Cow;
use std::sync::Arc;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder, Tokenizer};

use crate::error::{Error, Result};

/// What every token of a vocabulary adds to the text. Read once from the tokenizer, shared by all streams.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// End of each token's piece in `bytes`.
    ends: Vec<usize>,
    kinds: Vec<Kind>,
    style: Style,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Kind {
    /// Left out of the text when special tokens are skipped.
    special: bool,
    /// A byte of its own (`<0x0A>`) in a vocabulary with byte fallback.
    byte: bool,
}

/// How pieces make text.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Style {
    /// Byte-level BPE: pieces are bytes; all of them in a row are UTF-8, each invalid part one U+FFFD.
    ByteLevel,
    /// Sentencepiece through `Metaspace`: `space` stands for a blank, and for nothing in the first token if `drop`.
    Metaspace { space: char, drop: bool },
    /// Sentencepiece through a list of decoders: pieces are text; a run of byte tokens is UTF-8 or one U+FFFD each;
    /// up to `strip.1` characters `strip.0` at the start of the text are dropped.
    Sequence { strip: (char, usize) },
}

impl Pieces {
    /// Reads the pieces of all `vocab` ids.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for decoders of other kinds.
    pub(super) fn new(tokenizer: &Tokenizer, vocab: usize) -> Result<Pieces> {
        let mut stages = Vec::new();
        flatten(tokenizer.get_decoder(), &mut stages);
        let (style, replace, byte_fallback) = style(&stages)?;
        let added = tokenizer.get_added_vocabulary();
        let mut pieces = Pieces { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new(), style };
        for id in 0..vocab as u32 {
            let token = tokenizer.id_to_token(id).unwrap_or_default();
            let special = added.is_special_token(&token);
            let mut byte = false;
            match style {
                Style::ByteLevel => match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                    Some(bytes) => pieces.bytes.extend(bytes),
                    None => pieces.bytes.extend(token.as_bytes()),
                },
                Style::Metaspace { .. } => pieces.bytes.extend(token.as_bytes()),
                Style::Sequence { .. } => {
                    let mut text = token;
                    for stage in replace {
                        let parts = stage.decode_chain(vec![text]);
                        text = parts.map_err(|e| unsupported(&stages, &e.to_string()))?.concat();
                    }
                    match byte_token(&text).filter(|_| byte_fallback) {
                        Some(b) => {
                            byte = true;
                            pieces.bytes.push(b);
                        }
                        None => pieces.bytes.extend(text.as_bytes()),
                    }
                }
            }
            pieces.ends.push(pieces.bytes.len());
            pieces.kinds.push(Kind { special, byte });
        }
        Ok(pieces)
    }

    /// The bytes that a token adds to a text that goes on ([`Detokenizer::continuing`]), and whether it is special; `None` for ids
    /// without a token.
    pub(super) fn bytes(&self, id: u32) -> Option<(Cow<'_, [u8]>, bool)> {
        let (piece, kind) = self.get(id)?;
        let bytes = match self.style {
            Style::Metaspace { space, .. } => {
                Cow::Owned(String::from_utf8_lossy(piece).replace(space, " ").into_bytes())
            }
            Style::ByteLevel | Style::Sequence { .. } => Cow::Borrowed(piece),
        };
        Some((bytes, kind.special))
    }

    fn get(&self, id: u32) -> Option<(&[u8], Kind)> {
        let id = id as usize;
        let start = if id == 0 { 0 } else { *self.ends.get(id - 1)? };
        Some((&self.bytes[start..*self.ends.get(id)?], self.kinds[id]))
    }
}

/// Turns the ids of one sequence into text as they come.
///
/// Only whole characters come out, and U+FFFD only for bytes that no further token can complete. The concatenation
/// of everything returned is the tokenizer's decoding of all ids. Each id costs O(1) amortized.
#[derive(Debug)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    skip_special: bool,
    /// Special tokens that are text all the same.
    kept: Vec<u32>,
    /// Bytes that may yet become characters: at most three with byte-level BPE, a run of byte tokens otherwise.
    held: Vec<u8>,
    first: bool,
    /// Characters that may still be dropped at the start.
    strip: usize,
}

impl Detokenizer {
    pub(super) fn new(pieces: Arc<Pieces>, skip_special: bool) -> Detokenizer {
        let strip = if let Style::Sequence { strip } = pieces.style { strip.1 } else { 0 };
        Detokenizer { pieces, skip_special, kept: Vec::new(), held: Vec::new(), first: true, strip }
    }

    /// Keeps these special tokens where others are skipped.
    pub(super) fn keeping(mut self, kept: Vec<u32>) -> Detokenizer {
        self.kept = kept;
        self
    }

    /// For text that goes on after other text: a blank at its start is kept, which tokenizers of the sentencepiece
    /// kind take off a whole text.
    pub fn continuing(mut self) -> Detokenizer {
        (self.first, self.strip) = (false, 0);
        self
    }

    /// Takes one id and returns the text that is now certain. Ids outside the tokenizer's vocabulary have no text.
    pub fn push(&mut self, id: u32) -> String {
        let pieces = Arc::clone(&self.pieces);
        let Some((piece, kind)) = pieces.get(id) else { return String::new() };
        if self.skip_special && kind.special && !self.kept.contains(&id) {
            return String::new();
        }
        let first = std::mem::take(&mut self.first);
        match pieces.style {
            Style::ByteLevel => {
                self.held.extend_from_slice(piece);
                self.take_characters()
            }
            Style::Metaspace { space, drop } => {
                String::from_utf8_lossy(piece).replace(space, if first && drop { "" } else { " " })
            }
            Style::Sequence { .. } if kind.byte => {
                self.held.extend_from_slice(piece);
                String::new()
            }
            Style::Sequence { .. } => {
                let mut text = self.take_run();
                text.push_str(&String::from_utf8_lossy(piece));
                self.strip_start(text)
            }
        }
    }

    /// The end of the sequence: text for the bytes that never became a character.
    pub fn finish(&mut self) -> String {
        match self.pieces.style {
            Style::Sequence { .. } => {
                let text = self.take_run();
                self.strip_start(text)
            }
            _ => String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned(),
        }
    }

    /// Takes from `held` all that no later byte can change.
    fn take_characters(&mut self) -> String {
        let mut text = String::new();
        let mut done = 0;
        while done < self.held.len() {
            match std::str::from_utf8(&self.held[done..]) {
                Ok(rest) => {
                    text.push_str(rest);
                    done = self.held.len();
                }
                Err(e) => {
                    text.push_str(&String::from_utf8_lossy(&self.held[done..done + e.valid_up_to()]));
                    done += e.valid_up_to();
                    let Some(invalid) = e.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    done += invalid;
                }
            }
        }
        self.held.drain(..done);
        text
    }

    /// Ends a run of byte tokens.
    fn take_run(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.held))
            .unwrap_or_else(|e| char::REPLACEMENT_CHARACTER.to_string().repeat(e.as_bytes().len()))
    }

    fn strip_start(&mut self, text: String) -> String {
        let Style::Sequence { strip: (content, _) } = self.pieces.style else { return text };
        let mut rest = text.as_str();
        while self.strip > 0 && !rest.is_empty() {
            match rest.strip_prefix(content) {
                Some(after) => (rest, self.strip) = (after, self.strip - 1),
                None => self.strip = 0,
            }
        }
        rest.to_string()
    }
}

fn flatten<'a>(decoder: Option<&'a DecoderWrapper>, stages: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        Some(DecoderWrapper::Sequence(list)) => list.get_decoders().iter().for_each(|d| flatten(Some(d), stages)),
        Some(one) => stages.push(one),
        None => {}
    }
}

/// Style, the `Replace` stages that apply to every token, and whether bytes have tokens of their own.
fn style<'a>(stages: &'a [&'a DecoderWrapper]) -> Result<(Style, &'a [&'a DecoderWrapper], bool)> {
    match stages {
        [DecoderWrapper::ByteLevel(_)] => return Ok((Style::ByteLevel, &[], false)),
        [DecoderWrapper::Metaspace(m)] => {
            let drop = m.prepend_scheme != tokenizers::pre_tokenizers::metaspace::PrependScheme::Never;
            return Ok((Style::Metaspace { space: m.get_replacement(), drop }, &[], false));
        }
        _ => {}
    }
    let replaces = stages.iter().take_while(|d| matches!(d, DecoderWrapper::Replace(_))).count();
    let (replace, rest) = stages.split_at(replaces);
    let (byte_fallback, rest) = match rest {
        [DecoderWrapper::ByteFallback(_), rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    let strip = match rest {
        [] if !stages.is_empty() => (' ', 0),
        [DecoderWrapper::Fuse(_)] => (' ', 0),
        [DecoderWrapper::Fuse(_), DecoderWrapper::Strip(s)] if s.stop == 0 => (s.content, s.start),
        _ => return Err(unsupported(stages, "")),
    };
    Ok((Style::Sequence { strip }, replace, byte_fallback))
}

fn unsupported(stages: &[&DecoderWrapper], reason: &str) -> Error {
    let mut names: Vec<String> = stages.iter().map(|d| format!("{d:?}").chars().take(60).collect()).collect();
    if !reason.is_empty() {
        names.push(reason.to_string());
    }
    Error::unsupported(
        format!("tokenizer.json: decoder [{}]", names.join(", ")),
        "Supported are ByteLevel, Metaspace, and Replace, ByteFallback, Fuse, Strip in this order",
    )
}

/// The byte of a byte-fallback token `<0xNN>`.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The byte that a character stands for in byte-level BPE (GPT-2): printable Latin-1 for itself, the other 68 bytes
/// in order from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        c @ 0..=0xff => u8::try_from(c).ok().filter(|&b| printable(b)),
        c => (0..=u8::MAX).filter(|&b| !printable(b)).nth(c as usize - 0x100),
    }
}

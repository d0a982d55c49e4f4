//! Grammars that an output is held to: JSON schemas, regular expressions, choices, Lark grammars, compiled for a tokenizer.
//!
//! The work is the `llguidance` crate's; here are its limits, what it caches, and the tokenizer as it sees it. What bounds a hostile source:
//! its length and depth (`source`), the parser's own limits on sizes and work (`limits`), a stack that holds what is left of recursion,
//! a time after which nobody waits for it any more, and how many are compiled at once (`worker`). What is compiled is kept while it
//! fits in [`MAX_CACHE_BYTES`].
//!
//! The text that a grammar sees is that of a [`crate::text::Detokenizer`] that is [`continuing`](crate::text::Detokenizer::continuing): a
//! blank that the first token of a sentencepiece vocabulary begins with is part of it.

mod source;
mod vocabulary;
mod worker;

pub use source::{Constraint, MAX_LARK_BYTES, MAX_SCHEMA_DEPTH, MAX_SOURCE_BYTES};
pub use worker::MAX_SECONDS as MAX_COMPILE_SECONDS;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use lru::LruCache;

use crate::engine::Matcher;
use crate::error::{Error, Result};
use crate::text::tokenizer::Tokenizer;
use source::Source;
use worker::Workers;

/// Most bytes of compiled grammars that are kept, by an estimate.
pub const MAX_CACHE_BYTES: usize = 64 << 20;

/// Compiles constraints for one tokenizer. Clones share what is compiled.
#[derive(Clone)]
pub struct GrammarCompiler {
    shared: Arc<Shared>,
}

struct Shared {
    factory: ParserFactory,
    vocab: usize,
    cache: Mutex<Cache>,
    workers: Workers,
}

struct Cache {
    /// Compiled grammars at their start, with an estimate of their bytes; the least recently used first to go.
    grammars: LruCache<Source, (Matcher, usize)>,
    bytes: usize,
}

/// What the parser may take, in its own units: per grammar and per token some tens of milliseconds and some tens of megabytes at most.
fn limits() -> ParserLimits {
    ParserLimits { max_lexer_states: 20_000, verbose_errors: false, ..ParserLimits::default() }
}

impl GrammarCompiler {
    /// A compiler for a tokenizer and its model, whose texts end with `eos_ids`: ids that the engine is to stop at, in
    /// `SamplingParams::stop_token_ids`. Reads the whole vocabulary, which takes a second for the largest ones.
    ///
    /// # Errors
    /// [`Error::Text`] where the vocabulary is too large for the parser.
    pub fn new(tokenizer: &Tokenizer, eos_ids: &[u32]) -> Result<GrammarCompiler> {
        let env = vocabulary::token_env(tokenizer, eos_ids)?;
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|e| Error::Text { what: "tokenizer.json".to_string(), reason: first_line(&e.to_string()) })?;
        *factory.quiet().limits_mut() = limits();
        let cache = Mutex::new(Cache { grammars: LruCache::unbounded(), bytes: 0 });
        let shared = Shared { factory, vocab: tokenizer.rows(), cache, workers: Workers::default() };
        Ok(GrammarCompiler { shared: Arc::new(shared) })
    }

    /// The matcher of a constraint, at its start; `field` is the request's field that asks for it, which errors name. What was compiled
    /// lately costs a copy; else this may take seconds, and at most [`MAX_COMPILE_SECONDS`]: never call it on a thread that others wait
    /// for.
    ///
    /// # Errors
    /// [`Error::Input`] naming `field` where the constraint is malformed, not supported, can match nothing, or is too long, too deep or too
    /// complex. [`Error::Engine`] when all compilers are busy with others for as long.
    pub fn compile(&self, constraint: &Constraint, field: &str) -> Result<Matcher> {
        let wrong = |reason: String| Error::input(field, reason);
        let source = constraint.source().map_err(wrong)?;
        if let Some(known) = self.shared.cached(&source) {
            return Ok(known.for_field(field));
        }
        let shared = Arc::clone(&self.shared);
        let (matcher, bytes) = self
            .shared
            .workers
            .run({
                let source = source.clone();
                move || shared.compile(&source)
            })?
            .map_err(wrong)?;
        let matcher = matcher.for_field(field);
        self.shared.keep(source, matcher.clone(), bytes);
        Ok(matcher)
    }

    /// Compiled grammars that are kept, and an estimate of their bytes, at most [`MAX_CACHE_BYTES`].
    pub fn cache(&self) -> (usize, usize) {
        let cache = self.shared.cache();
        (cache.grammars.len(), cache.bytes)
    }
}

impl Shared {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A matcher at its start, its first set of tokens computed, and an estimate of its bytes.
    fn compile(&self, source: &Source) -> Result<(Matcher, usize), String> {
        let grammar = source.grammar().map_err(|e| e.to_string())?;
        let parser = self.factory.create_parser(grammar).map_err(|e| advice(&format!("{e:#}")))?;
        // The grammar's symbols take some tens of bytes for each of the source.
        let bytes = 64 * source.len() + parser.parser.lexer_stats().num_bytes;
        let matcher = Matcher::new(parser, self.vocab, "");
        match matcher.allowed() {
            // Of the start alone the reader knows nothing.
            Err(Error::Input { reason, .. }) => Err(format!("nothing matches it: {reason}")),
            Err(error) => Err(error.to_string()),
            Ok(_) => Ok((matcher, bytes)),
        }
    }

    fn cached(&self, source: &Source) -> Option<Matcher> {
        self.cache().grammars.get(source).map(|(matcher, _)| matcher.clone())
    }

    fn keep(&self, source: Source, matcher: Matcher, bytes: usize) {
        let mut cache = self.cache();
        let before = cache.grammars.put(source, (matcher, bytes));
        cache.bytes += bytes;
        cache.bytes -= before.map_or(0, |(_, bytes)| bytes);
        while cache.bytes > MAX_CACHE_BYTES {
            let Some((_, (_, bytes))) = cache.grammars.pop_lru() else { break };
            cache.bytes -= bytes;
        }
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").field("vocab", &self.shared.vocab).finish_non_exhaustive()
    }
}

/// The parser's complaint, with what to do where it does not say so.
fn advice(reason: &str) -> String {
    let complaint = first_line(reason);
    let is = |sign| reason.contains(sign);
    if is("panic: ") {
        return worker::FAILED.to_string();
    }
    if is("oneOf constraints are not supported") {
        return "`oneOf` whose branches may overlap is not supported; use `anyOf`".to_string();
    }
    if is("retrieving it failed") {
        return format!("refers to a schema elsewhere, and none is fetched; put it under `$defs` ({complaint})");
    }
    // Of a regular expression the last line says what is wrong.
    match reason.lines().find_map(|line| line.strip_prefix("error: ")) {
        Some(wrong) => format!("malformed or unsupported regular expression: {}", first_line(wrong)),
        None => complaint.replace("Unimplemented keys:", "keywords that are not supported:"),
    }
}

/// The first line of an error, without what could be a whole source in it.
fn first_line(reason: &str) -> String {
    let line = reason.lines().next().unwrap_or_default().trim_end_matches([':', ' ']);
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_string(),
    }
}

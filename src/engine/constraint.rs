//! What a sequence may say: which tokens its grammar allows next, worked out on another thread while the device computes their logits.
//!
//! The grammar's parser is the `llguidance` crate's; `crate::text::grammar` compiles one for a tokenizer.

use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llguidance::{CancellationHandle, TokenParser};

use super::deadline;
use crate::error::{Error, Result};

/// A set of tokens, one bit each: bit `id % 32` of word `id / 32`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u32>,
}

impl TokenSet {
    /// `words` are `[vocab.div_ceil(32)]`.
    pub fn new(words: Vec<u32>) -> TokenSet {
        TokenSet { words }
    }

    /// `[vocab.div_ceil(32)]`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether a token is in it; ids beyond its end are not.
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Whether tokens other than `ids` are in it.
    pub fn has_more_than(&self, ids: &[u32]) -> bool {
        let among = |at: usize, bit: u32| ids.contains(&(32 * at as u32 + bit));
        self.words.iter().enumerate().any(|(at, word)| (0..32).any(|bit| word >> bit & 1 == 1 && !among(at, bit)))
    }

    /// Bans every token that is not in it: its logit of `[vocab]` becomes negative infinity.
    pub fn ban_others(&self, logits: &mut [f32]) {
        for (at, logits) in logits.chunks_mut(32).enumerate() {
            let word = self.words.get(at).copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// A grammar, and how far one sequence has got in it. Its state is that of the tokens accepted, wherever their keys and values are.
///
/// A clone goes on from the same place by itself: nothing is shared that one could change for another.
pub struct Matcher {
    /// Name of the request's field that asked for it, for errors.
    field: Arc<str>,
    vocab: usize,
    state: Arc<Mutex<State>>,
}

/// Time that a grammar's parser may take for a sequence, and more of it for each token. Usual grammars take some microseconds of it; others
/// run in the same batch, and wait.
const TIME: Duration = Duration::from_secs(1);
const TIME_PER_TOKEN: Duration = Duration::from_millis(20);

/// Who locks it and finds no set of tokens computes it: a thread that was told to, or else who needs it first.
struct State {
    grammar: llguidance::Matcher,
    cancellation: CancellationHandle,
    /// Tokens accepted.
    len: usize,
    /// Time taken so far.
    spent: Duration,
    /// What may come next, or why it could not be told.
    allowed: Option<Result<Arc<TokenSet>, String>>,
}

impl State {
    fn new(grammar: llguidance::Matcher) -> State {
        let grammar = grammar.into_cancellable();
        let cancellation = grammar.cancellation_handle().unwrap_or_default();
        State { grammar, cancellation, len: 0, spent: Duration::ZERO, allowed: None }
    }

    fn allowed(&mut self, vocab: usize) -> Result<Arc<TokenSet>, String> {
        if let Some(allowed) = &self.allowed {
            return allowed.clone();
        }
        let allowed = self.timed(llguidance::Matcher::compute_mask_or_eos).map(|set| {
            let mut words = set.as_slice().to_vec();
            words.resize(vocab.div_ceil(32), 0);
            Arc::new(TokenSet { words })
        });
        self.allowed.insert(allowed).clone()
    }

    /// Runs the parser for as long as it may.
    fn timed<T, E: Display>(
        &mut self,
        work: impl FnOnce(&mut llguidance::Matcher) -> Result<T, E>,
    ) -> Result<T, String> {
        let earned = TIME.saturating_add(TIME_PER_TOKEN.saturating_mul(self.len.try_into().unwrap_or(u32::MAX)));
        let start = Instant::now();
        let left = earned.saturating_sub(self.spent);
        let result = deadline::within(left, &self.cancellation, || work(&mut self.grammar));
        self.spent += start.elapsed();
        result.map_err(|error| explain(&error.to_string()))
    }
}

/// What became of a grammar, in words.
fn explain(reason: &str) -> String {
    if reason.starts_with("NoExtensionBias") {
        return "no token of the vocabulary goes on as the grammar demands".to_string();
    }
    if reason.starts_with("panic") {
        return "the grammar parser failed".to_string();
    }
    if reason.starts_with(&llguidance::Cancelled.to_string()) {
        let (s, ms) = (TIME.as_secs(), TIME_PER_TOKEN.as_millis());
        return format!("the grammar is too ambiguous: it takes more than {s} s and {ms} ms for each token");
    }
    let first = reason.lines().next().unwrap_or_default();
    let is_too_complex = ["LexerTooComplex", "ParserTooComplex", "fuel", "too many", "limit"];
    match is_too_complex.iter().any(|word| first.contains(word)) {
        true => format!("the grammar is too complex here ({first}); simplify it"),
        false => first.to_string(),
    }
}

impl Matcher {
    /// The start of a grammar for a model of `vocab` logits, whose parser's token ids are below that.
    pub(crate) fn new(parser: TokenParser, vocab: usize, field: &str) -> Matcher {
        let state = State::new(llguidance::Matcher::new(Ok(parser)));
        Matcher { field: Arc::from(field), vocab, state: Arc::new(Mutex::new(state)) }
    }

    /// The same at the same place, for another field of a request.
    pub(crate) fn for_field(self, field: &str) -> Matcher {
        Matcher { field: Arc::from(field), ..self }
    }

    /// Logits that its sets of tokens are for.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// Name of the request's field that asked for it.
    pub fn field(&self) -> &str {
        &self.field
    }

    /// Has another thread work out what may come next. [`Matcher::allowed`] waits for it; nothing but time depends on this.
    pub fn prepare(&self) {
        let (state, vocab) = (Arc::clone(&self.state), self.vocab);
        rayon::spawn(move || {
            // Whoever holds it computes already.
            if let Ok(mut state) = state.try_lock() {
                let _kept_in_state = state.allowed(vocab);
            }
        });
    }

    /// The tokens that may come next: where the text may end, those that end it too. Never empty.
    ///
    /// # Errors
    /// [`Error::Input`] of its field where no token of the vocabulary goes on as the grammar demands, or where the parser takes more time or
    /// work than it may. The matcher is of no use then.
    pub fn allowed(&self) -> Result<Arc<TokenSet>> {
        let mut state = self.lock();
        let len = state.len;
        state.allowed(self.vocab).map_err(|reason| self.error(len, &reason))
    }

    /// Accepts a token that [`Matcher::allowed`] has.
    ///
    /// # Errors
    /// [`Error::Input`] of its field where the grammar does not allow it, or where the parser takes more time or work than it may. The
    /// matcher is of no use then.
    pub fn advance(&mut self, token: u32) -> Result<()> {
        let mut state = self.lock();
        state.allowed = None;
        let result =
            state.grammar.consume_token(token).map_err(|error| self.error(state.len, &explain(&error.to_string())));
        state.len += 1;
        result
    }

    /// Whether the text may end here.
    pub fn is_accepting(&self) -> bool {
        self.lock().grammar.is_accepting().unwrap_or(false)
    }

    /// Whether nothing but the end may come.
    pub fn is_finished(&self) -> bool {
        self.lock().grammar.is_stopped()
    }

    /// What a panic leaves is the parser's own error.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, len: usize, reason: &str) -> Error {
        let place = if len == 0 { String::new() } else { format!("after {len} tokens: ") };
        Error::input(self.field.as_ref(), format!("{place}{reason}"))
    }
}

impl Clone for Matcher {
    fn clone(&self) -> Matcher {
        let state = self.lock();
        let copy = State {
            len: state.len,
            spent: state.spent,
            allowed: state.allowed.clone(),
            ..State::new(state.grammar.deep_clone())
        };
        Matcher { field: Arc::clone(&self.field), vocab: self.vocab, state: Arc::new(Mutex::new(copy)) }
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let len = self.lock().len;
        f.debug_struct("Matcher").field("field", &self.field).field("len", &len).finish_non_exhaustive()
    }
}

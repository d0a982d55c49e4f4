//! From one row of logits to one token id.
//!
//! The order is fixed: repetition, presence and frequency penalties; biases of tokens and of sequences, repeated n-grams,
//! and the bans of first tokens and of end tokens before `min_tokens`; the ban of what a grammar does not allow; temperature; min-p; top-k; top-p; the draw. Each filter sees the distribution that the one before
//! it left, renormalized, as in vLLM. Ties always go to the lowest id, so `top_k = 1` is greedy decoding.
//!
//! Randomness is a pure function of (seed, step): a sequence draws the same numbers whatever else is in its batch. Filters and draw are
//! [`crate::device::cpu::reference::sample`], which a GPU runs too.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::checkpoint::GenerationConfig;
use crate::device::SampleRow;
use crate::device::cpu::Chooser;
use crate::error::{Error, Result};

use super::constraint::TokenSet;

/// How to choose tokens; names and meanings of vLLM.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Candidates kept; 0 keeps all.
    pub top_k: u32,
    /// Least mass that the kept candidates must hold, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Least probability relative to the best candidate's, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits and multiplies negative ones of every token in prompt or output; 1 is none.
    pub repetition_penalty: f32,
    /// Taken off the logit of every token in the output; in [-2, 2].
    pub presence_penalty: f32,
    /// Taken off the logit once for every occurrence in the output; in [-2, 2].
    pub frequency_penalty: f32,
    /// Added to logits by token id; negative infinity bans a token.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Added to the logit of a sequence's last token where prompt and output end in those before it; negative infinity bans
    /// the sequence (`bad_words_ids`, `sequence_bias` of transformers).
    pub sequence_bias: Vec<(Vec<u32>, f32)>,
    /// Tokens that may not be the first (`begin_suppress_tokens`).
    pub begin_suppress_tokens: Vec<u32>,
    /// No n-gram of this length comes twice in prompt and output; 0 lets them.
    pub no_repeat_ngram_size: usize,
    /// Makes the draw repeatable; without one each [`Sampler`] picks its own.
    pub seed: Option<u64>,
    /// How many of the most probable tokens to report at each step; the chosen one's is always reported.
    pub logprobs: Option<usize>,
    /// Tokens to generate before any of `stop_token_ids` may be chosen.
    pub min_tokens: usize,
    /// Ids that end the sequence: the model's own and the request's. The engine stops on them unless `ignore_eos`.
    pub stop_token_ids: Vec<u32>,
    /// Go on after `stop_token_ids`.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            sequence_bias: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            no_repeat_ngram_size: 0,
            seed: None,
            logprobs: None,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

impl SamplingParams {
    /// Greedy decoding.
    pub fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..SamplingParams::default() }
    }

    /// A model's own defaults: what `generation_config.json` sets, end-of-sequence ids included, and the neutral
    /// value for the rest. `do_sample: false` is temperature 0.
    pub fn from_generation(config: &GenerationConfig) -> SamplingParams {
        let neutral = SamplingParams::default();
        let temperature = if config.do_sample == Some(false) { Some(0.0) } else { config.temperature };
        // A sequence of one token is a token; the end of a text is never a bad word.
        let is_end = |ids: &[u32]| ids.len() == 1 && config.eos_token_ids.contains(&ids[0]);
        let bad = config.bad_words_ids.iter().filter(|ids| !is_end(ids)).map(|ids| (ids.clone(), f32::NEG_INFINITY));
        let (tokens, sequence_bias): (Vec<_>, Vec<_>) =
            bad.chain(config.sequence_bias.iter().cloned()).partition(|(ids, _)| ids.len() == 1);
        let suppressed = config.suppress_tokens.iter().map(|&id| (id, f32::NEG_INFINITY));
        let mut logit_bias = BTreeMap::new();
        for (id, bias) in tokens.iter().map(|(ids, bias)| (ids[0], *bias)).chain(suppressed) {
            *logit_bias.entry(id).or_default() += bias;
        }
        SamplingParams {
            temperature: temperature.unwrap_or(neutral.temperature),
            top_k: config.top_k.unwrap_or(neutral.top_k),
            // Of no mass at all the best token is left, as transformers has it.
            top_p: config.top_p.map_or(neutral.top_p, |p| p.max(f32::MIN_POSITIVE)),
            min_p: config.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(neutral.repetition_penalty),
            logit_bias,
            sequence_bias,
            begin_suppress_tokens: config.begin_suppress_tokens.clone(),
            no_repeat_ngram_size: config.no_repeat_ngram_size,
            min_tokens: config.min_new_tokens,
            stop_token_ids: config.eos_token_ids.clone(),
            ..neutral
        }
    }

    /// Tokens are drawn from the logits as they are, once `min_tokens` are there, and no alternatives are asked for: no penalty, bias or
    /// ban.
    fn draws_from_logits(&self) -> bool {
        self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
            && !self.looks_back()
            && self.begin_suppress_tokens.is_empty()
            && self.logprobs.is_none()
    }

    /// Whether the next token depends on which tokens came before it, beyond their number and the model's own say.
    fn looks_back(&self) -> bool {
        !self.sequence_bias.is_empty() || self.no_repeat_ngram_size > 0
    }

    /// Checks every field against its range and the model's `vocab` size.
    ///
    /// # Errors
    /// [`Error::Input`] naming the first field that is out of range or not a number.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        let range = |what: &str, value: f32, fits: bool, expected: &str| match fits {
            true => Ok(()),
            false => Err(Error::input(what, format!("expected {expected}, got {value}"))),
        };
        let (t, r) = (self.temperature, self.repetition_penalty);
        range("temperature", t, t.is_finite() && t >= 0.0, "a number of at least 0")?;
        range("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0 and at most 1")?;
        range("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        range("repetition_penalty", r, r.is_finite() && r > 0.0, "a number above 0")?;
        for (what, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            range(what, value, (-2.0..=2.0).contains(&value), "a number from -2 to 2")?;
        }
        for (&id, &bias) in &self.logit_bias {
            if id as usize >= vocab {
                return Err(Error::input("logit_bias", format!("token id {id} is not below the vocabulary's {vocab}")));
            }
            let fits = bias.is_finite() || bias == f32::NEG_INFINITY;
            range(&format!("logit_bias of token {id}"), bias, fits, "a finite number or negative infinity")?;
        }
        for (ids, bias) in &self.sequence_bias {
            if ids.is_empty() {
                return Err(Error::input("sequence_bias", "a sequence of no tokens"));
            }
            let fits = bias.is_finite() || *bias == f32::NEG_INFINITY;
            range("sequence_bias", *bias, fits, "a finite number or negative infinity")?;
        }
        if let Some(id) = self.stop_token_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input("stop_token_ids", format!("token id {id} is not below the vocabulary's {vocab}")));
        }
        match self.logprobs {
            Some(n) if n > vocab => {
                Err(Error::input("logprobs", format!("expected at most the vocabulary's {vocab}, got {n}")))
            }
            _ => Ok(()),
        }
    }
}

/// One token, chosen or given, and how likely it was.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Natural log of the probability that the model itself gave it: temperature 1, no penalty, bias or filter.
    pub logprob: f32,
    /// The `logprobs` most probable tokens with the same kind of figure, best first.
    pub top: Vec<(u32, f32)>,
}

/// The sampling state of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    seed: u64,
    step: u64,
    /// Tokens of prompt and output, with how often each is in the output.
    seen: HashMap<u32, u32>,
    /// Prompt and output, where the parameters look back.
    history: Vec<u32>,
    logits: Vec<f32>,
    chooser: Chooser,
}

impl Sampler {
    /// A sampler for a sequence that starts with `prompt_ids`; `params` have passed [`SamplingParams::validate`].
    pub fn new(params: SamplingParams, prompt_ids: &[u32]) -> Sampler {
        // The standard library's keys are random per process and thread; hashing nothing with them gives a seed.
        let seed = params.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let seen = match params.repetition_penalty == 1.0 {
            true => HashMap::new(),
            false => prompt_ids.iter().map(|&id| (id, 0)).collect(),
        };
        let history = if params.looks_back() { prompt_ids.to_vec() } else { Vec::new() };
        Sampler { params, seed, step: 0, seen, history, logits: Vec::new(), chooser: Chooser::default() }
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Chooses the next token from one row of logits, `[vocab]`, and counts it as output.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the row is empty or holds NaN or positive infinity; [`Error::Input`] when biases ban
    /// every token.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled> {
        self.choose(logits, None)
    }

    /// The same among the tokens that a grammar allows: as if the model gave no other any probability, but for the probabilities that are
    /// reported. With `ignore_eos` an end token is chosen only where nothing else is allowed.
    ///
    /// # Errors
    /// Those of [`Sampler::sample`]; [`Error::Input`] also when nothing but the end is allowed before `min_tokens`.
    pub fn sample_among(&mut self, logits: &[f32], allowed: &TokenSet) -> Result<Sampled> {
        self.choose(logits, Some(allowed))
    }

    fn choose(&mut self, logits: &[f32], allowed: Option<&TokenSet>) -> Result<Sampled> {
        check(logits)?;
        let log_total = log_sum_exp(logits);
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.penalize();
        if let Some(allowed) = allowed {
            allowed.ban_others(&mut self.logits);
            let SamplingParams { stop_token_ids, min_tokens, ignore_eos, .. } = &self.params;
            let is_early = self.step < *min_tokens as u64;
            if (*ignore_eos || is_early) && allowed.has_more_than(stop_token_ids) {
                ban(&mut self.logits, stop_token_ids);
            } else if is_early {
                return Err(nothing_left_to_say(*min_tokens, self.step as usize));
            }
        }
        let id = self.chooser.choose(&self.logits, &self.row());
        let id = id.ok_or_else(|| {
            let by = if allowed.is_some() { "the model and the grammar allow" } else { "the model allows" };
            Error::input("logit_bias", format!("this and the other bans leave no token that {by}"))
        })?;
        let top = top_logprobs(&mut self.chooser, logits, log_total, self.params.logprobs.unwrap_or(0));
        self.count(id);
        Ok(Sampled { id, logprob: (f64::from(logits[id as usize]) - log_total) as f32, top })
    }

    /// How a device is to draw the next token from logits as they are, for [`Sampler::count`] to count; `None` where logits must be changed
    /// before, or more of them is asked for.
    pub fn device_row(&self) -> Option<SampleRow> {
        let is_free = self.params.draws_from_logits() && self.step >= self.params.min_tokens as u64;
        is_free.then(|| self.row())
    }

    /// Counts a token as output.
    pub fn count(&mut self, id: u32) {
        *self.seen.entry(id).or_default() += 1;
        if self.params.looks_back() {
            self.history.push(id);
        }
        self.step += 1;
    }

    /// How the next token is drawn.
    fn row(&self) -> SampleRow {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let floor = if min_p > 0.0 { min_p.ln() } else { f32::MIN };
        SampleRow { temperature, top_k, top_p, floor, draw: random(self.seed, self.step) }
    }

    /// Penalties, bias and the ban of end tokens, in place.
    fn penalize(&mut self) {
        let p = &self.params;
        if p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
            for (&id, &count) in &self.seen {
                let Some(x) = self.logits.get_mut(id as usize) else { continue };
                *x = if *x > 0.0 { *x / p.repetition_penalty } else { *x * p.repetition_penalty };
                if count > 0 {
                    *x -= p.presence_penalty + p.frequency_penalty * count as f32;
                }
            }
        }
        for (&id, bias) in &p.logit_bias {
            if let Some(x) = self.logits.get_mut(id as usize) {
                *x += bias;
            }
        }
        for (ids, bias) in &p.sequence_bias {
            if let Some((&last, before)) = ids.split_last()
                && self.history.ends_with(before)
                && let Some(x) = self.logits.get_mut(last as usize)
            {
                *x += bias;
            }
        }
        let mut banned = Vec::new();
        if let Some(before) = p.no_repeat_ngram_size.checked_sub(1)
            && let Some(start) = self.history.len().checked_sub(before)
        {
            let repeats = self.history.windows(before + 1).filter(|ngram| ngram.starts_with(&self.history[start..]));
            banned.extend(repeats.map(|ngram| ngram[before]));
        }
        if self.step == 0 {
            banned.extend(&p.begin_suppress_tokens);
        }
        if self.step < p.min_tokens as u64 {
            banned.extend(&p.stop_token_ids);
        }
        ban(&mut self.logits, &banned);
    }
}

fn ban(logits: &mut [f32], ids: &[u32]) {
    for &id in ids {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = f32::NEG_INFINITY;
        }
    }
}

/// A grammar's text is complete before `min_tokens`.
pub(super) fn nothing_left_to_say(min_tokens: usize, generated: usize) -> Error {
    let reason = format!("{min_tokens} are asked for, but after {generated} the grammar allows nothing but the end");
    Error::input("min_tokens", reason)
}

/// What a row of logits, `[vocab]`, says of one token, with the `top` most probable ones.
///
/// # Errors
/// [`Error::NotFinite`] as [`Sampler::sample`].
pub fn score(logits: &[f32], id: u32, top: usize) -> Result<Sampled> {
    check(logits)?;
    let log_total = log_sum_exp(logits);
    let logprob = (f64::from(logits[id as usize]) - log_total) as f32;
    Ok(Sampled { id, logprob, top: top_logprobs(&mut Chooser::default(), logits, log_total, top) })
}

/// The `n` most probable tokens, best first.
fn top_logprobs(chooser: &mut Chooser, logits: &[f32], log_total: f64, n: usize) -> Vec<(u32, f32)> {
    let logprob = |id: u32| (f64::from(logits[id as usize]) - log_total) as f32;
    chooser.top(logits, n).into_iter().map(|id| (id, logprob(id))).collect()
}

fn check(logits: &[f32]) -> Result<()> {
    match logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
        Some(id) => Err(Error::not_finite("logits", format!("{} for token {id}", logits[id]))),
        None if logits.iter().all(|x| *x == f32::NEG_INFINITY) => {
            Err(Error::not_finite("logits", "no token with a probability above 0"))
        }
        None => Ok(()),
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from((x - max).exp())).sum();
    f64::from(max) + sum.ln()
}

/// Output number `step` of SplitMix64 seeded with `seed` (Steele, Lea and Flood, "Fast splittable pseudorandom
/// number generators", OOPSLA 2014). Its state is a plain counter, so any step is reached at once.
pub fn random(seed: u64, step: u64) -> u64 {
    let mut z = seed.wrapping_add(step.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

//! One continuation in flight: its tokens, its KV blocks and its counters.

use std::ops::Range;
use std::sync::Arc;

use crate::device::{Device, SampleRow};
use crate::error::{Error, Result};
use crate::models::{Drawn, HiddenStates};

use super::block_manager::{BlockManager, BlockTable};
use super::constraint::Matcher;
use super::event::FinishReason;
use super::prompt_work::PromptWork;
use super::request::{Request, RequestId};
use super::rows::Row;
use super::sampling::{Sampled, Sampler, SamplingParams, nothing_left_to_say};

/// Identity of a sequence. The order is that in which sequences are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SequenceId {
    /// Lower first.
    pub(super) priority: i32,
    /// Whose.
    pub(super) request: RequestId,
    /// Which of its choices.
    pub(super) choice: usize,
}

/// A prompt, what was generated after it, and how far its keys and values are computed.
#[derive(Debug)]
pub(super) struct Sequence {
    id: SequenceId,
    token_ids: Vec<u32>,
    prompt_len: usize,
    max_tokens: usize,
    /// Tokens whose keys and values are in the cache.
    pub(super) computed: usize,
    /// Its KV blocks; none while it waits.
    pub(super) table: BlockTable,
    salt: Arc<str>,
    sampler: Sampler,
    /// What its output follows.
    constraint: Option<Matcher>,
    /// Choices of its request; the first sequence makes the others when the prompt is computed.
    choices: usize,
    /// What there is to learn of the prompt, until it is computed.
    pub(super) prompt: Option<PromptWork>,
}

/// The parameters of a choice: of those of its request, the seed plus its number.
fn params_of_choice(params: &SamplingParams, choice: usize) -> SamplingParams {
    SamplingParams { seed: params.seed.map(|seed| seed.wrapping_add(choice as u64)), ..params.clone() }
}

impl Sequence {
    /// The first choice of a request, without blocks.
    pub(super) fn new(request: RequestId, asked: Request) -> Sequence {
        let salt = Arc::from(asked.cache_salt.as_str());
        if let Some(constraint) = &asked.constraint {
            constraint.prepare();
        }
        Sequence {
            id: SequenceId { priority: asked.priority, request, choice: 0 },
            prompt_len: asked.prompt_ids.len(),
            max_tokens: asked.max_tokens,
            computed: 0,
            table: BlockTable::new(&salt),
            salt,
            choices: asked.n,
            prompt: Some(PromptWork::new(&asked)),
            sampler: Sampler::new(asked.params, &asked.prompt_ids),
            constraint: asked.constraint,
            token_ids: asked.prompt_ids,
        }
    }

    /// The other choices of its request, none of them with blocks. Called once, when the prompt is computed and nothing generated.
    pub(super) fn make_choices(&self) -> Vec<Sequence> {
        let choice = |choice| Sequence {
            id: SequenceId { choice, ..self.id },
            token_ids: self.token_ids.clone(),
            computed: 0,
            table: BlockTable::new(&self.salt),
            salt: Arc::clone(&self.salt),
            sampler: Sampler::new(params_of_choice(self.sampler.params(), choice), &self.token_ids),
            constraint: self.constraint.clone(),
            prompt: None,
            ..*self
        };
        (1..self.choices).map(choice).collect()
    }

    /// Its blocks, which it then has no more.
    pub(super) fn take_table(&mut self) -> BlockTable {
        std::mem::replace(&mut self.table, BlockTable::new(&self.salt))
    }

    /// Records that its first `computed` tokens have keys and values, and lets others find the full blocks among them.
    pub(super) fn computed_to(&mut self, computed: usize, blocks: &mut BlockManager) {
        self.computed = computed;
        blocks.offer(&mut self.table, &self.token_ids, computed);
    }

    /// Its identity.
    pub(super) fn id(&self) -> SequenceId {
        self.id
    }

    /// Prompt and output.
    pub(super) fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Its first tokens.
    pub(super) fn prompt_ids(&self) -> &[u32] {
        &self.token_ids[..self.prompt_len]
    }

    /// With whom its blocks may be shared.
    pub(super) fn salt(&self) -> &Arc<str> {
        &self.salt
    }

    /// Tokens that are there and not computed.
    pub(super) fn remaining(&self) -> usize {
        self.token_ids.len() - self.computed
    }

    /// Most tokens it can ever have.
    pub(super) fn max_len(&self) -> usize {
        self.prompt_len + self.max_tokens
    }

    /// Leading tokens that need not be computed where their keys and values are there: never all, the last one's logits are needed.
    pub(super) fn reusable(&self) -> usize {
        let all_but_one = self.token_ids.len() - 1;
        self.prompt.as_ref().map_or(all_but_one, |work| work.reusable().min(all_but_one))
    }

    /// Whether tokens are to be generated at all.
    pub(super) fn generates(&self) -> bool {
        self.max_tokens > 0
    }

    /// How a device may draw its next token; `None` where the host must see its logits. A prompt that several choices follow is drawn from
    /// several times.
    pub(super) fn device_row(&self) -> Option<SampleRow> {
        let is_free = self.constraint.is_none() && (self.prompt.is_none() || self.choices == 1);
        self.sampler.device_row().filter(|_| is_free)
    }

    /// Takes what is wanted of the prompt from a pass that computed the tokens `part`, the first of them its row number `row`.
    ///
    /// # Errors
    /// Those of [`PromptWork::observe`].
    pub(super) fn observe(
        &mut self,
        pass: &mut HiddenStates<'_>,
        row: usize,
        part: Range<usize>,
        rows_at_once: usize,
    ) -> Result<()> {
        let prompt_ids = &self.token_ids[..self.prompt_len];
        self.prompt.as_mut().map_or(Ok(()), |work| work.observe(pass, row, part, prompt_ids, rows_at_once))
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// `NotFinite` when the logits are not; `Input` when every token is banned, and those of [`Matcher::allowed`].
    pub(super) fn choose(&mut self, row: Row<'_>) -> Result<Sampled> {
        match row {
            Row::Logits(logits) => match &self.constraint {
                Some(constraint) => self.sampler.sample_among(logits, &*constraint.allowed()?),
                None => self.sampler.sample(logits),
            },
            Row::Best(best) if best.logprob.is_nan() => Err(Error::not_finite("logits", best.logprob)),
            Row::Best(best) => Ok(self.drawn(best.id, best.logprob)),
            Row::Drawn(Drawn { id: Device::NOT_FINITE, .. }) => Err(Error::not_finite("logits", "NaN or inf")),
            Row::Drawn(Drawn { id: Device::NO_TOKEN, .. }) => {
                Err(Error::not_finite("logits", "no token with a probability above 0"))
            }
            Row::Drawn(drawn) => Ok(self.drawn(drawn.id, drawn.logprob)),
        }
    }

    /// A token that a device chose.
    fn drawn(&mut self, id: u32, logprob: f32) -> Sampled {
        self.sampler.count(id);
        Sampled { id, logprob, top: Vec::new() }
    }

    /// Appends a generated token; the reason when it is the last one.
    ///
    /// # Errors
    /// `Input` when its grammar leaves nothing to say before `min_tokens`, and those of [`Matcher::advance`].
    pub(super) fn push(&mut self, token: u32) -> Result<Option<FinishReason>> {
        self.token_ids.push(token);
        let params = self.sampler.params();
        if !params.ignore_eos && params.stop_token_ids.contains(&token) {
            return Ok(Some(FinishReason::Stop));
        }
        let is_full = self.token_ids.len() == self.max_len();
        if let Some(constraint) = &mut self.constraint {
            constraint.advance(token)?;
            if constraint.is_finished() {
                let generated = self.token_ids.len() - self.prompt_len;
                return match generated < params.min_tokens {
                    true => Err(nothing_left_to_say(params.min_tokens, generated)),
                    false => Ok(Some(FinishReason::Stop)),
                };
            }
            if !is_full {
                constraint.prepare();
            }
        }
        Ok(is_full.then_some(FinishReason::Length))
    }
}

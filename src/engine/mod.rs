//! The engine: token ids in, token ids out. Nothing above it knows tensors, nothing below it knows requests.
//!
//! [`Engine::submit`] queues a request, [`Engine::step`] runs one forward pass over whatever is scheduled and returns
//! what happened, [`Engine::abort`] drops a request and frees its blocks. One thread owns an engine.

mod block_manager;
pub mod sampling;
mod scheduler;
mod sequence;

pub use block_manager::BlockManager;
pub use scheduler::{Scheduled, Scheduler};
pub use sequence::{FinishReason, RequestId, Sequence};

use crate::error::{Error, Result};
use crate::models::{Batch, Logits, LogitsStats, ModelRunner};
use sampling::{Sampled, SamplingParams};

/// One request.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt; at least one token, each below the vocabulary size.
    pub prompt_ids: Vec<u32>,
    /// How to choose tokens, and the ids that end the sequence.
    pub params: SamplingParams,
    /// Most tokens to generate.
    pub max_tokens: usize,
}

/// What a step did to one request.
#[derive(Debug)]
pub enum Event {
    /// A token was generated. End-of-sequence ids are reported too, followed by `Finished`.
    Token {
        /// Whose.
        id: RequestId,
        /// Which, and how likely.
        token: Sampled,
    },
    /// The request is done and its memory free.
    Finished {
        /// Which.
        id: RequestId,
        /// Why.
        reason: FinishReason,
    },
    /// The request failed; others go on.
    Failed {
        /// Which.
        id: RequestId,
        /// Why.
        error: Error,
    },
}

/// A snapshot of how busy an engine is, for routers and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Sequences being generated.
    pub running: usize,
    /// Requests not started yet.
    pub waiting: usize,
    /// KV blocks in use.
    pub used_blocks: usize,
    /// KV blocks in all.
    pub total_blocks: usize,
}

/// A model, its KV cache and the requests in flight.
#[derive(Debug)]
pub struct Engine {
    runner: ModelRunner,
    scheduler: Scheduler,
    next_id: u64,
}

impl Engine {
    /// An engine without requests.
    pub fn new(runner: ModelRunner) -> Engine {
        let scheduler = Scheduler::new(runner.limits(), BlockManager::new(runner.cache().num_blocks));
        Engine { runner, scheduler, next_id: 0 }
    }

    /// The model, and what it runs with.
    pub fn runner(&self) -> &ModelRunner {
        &self.runner
    }

    /// Queues a request.
    ///
    /// # Errors
    /// `Input` when it could never run: no prompt, an id outside the vocabulary, a parameter out of range, or more
    /// tokens than a sequence may have.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let vocab = self.runner.config().vocab_size;
        request.params.validate(vocab)?;
        if request.prompt_ids.is_empty() {
            return Err(Error::input("prompt", "is empty after tokenization; give at least one token"));
        }
        if let Some(id) = request.prompt_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input("prompt", format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        let limit = self.runner.limits().max_model_len;
        let prompt = request.prompt_ids.len();
        if request.max_tokens == 0 || prompt.saturating_add(request.max_tokens) > limit {
            let reason = format!(
                "the prompt has {prompt} tokens and {} are to be generated; between 1 and {} fit in --max-model-len {limit}",
                request.max_tokens,
                limit.saturating_sub(prompt)
            );
            return Err(Error::input("max_tokens", reason));
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.scheduler.add(Sequence::new(id, request))?;
        Ok(id)
    }

    /// Drops a request, running or waiting. Unknown ids are ignored: it may just have finished.
    pub fn abort(&mut self, id: RequestId) {
        self.scheduler.remove(id);
    }

    /// True when nothing is queued or running.
    pub fn is_idle(&self) -> bool {
        let load = self.load();
        load.running + load.waiting == 0
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        self.scheduler.load()
    }

    /// Runs one forward pass and samples a token for every sequence whose prompt is complete.
    ///
    /// # Errors
    /// A device failure, which ends every request; failures of a single request are events.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let scheduled = self.scheduler.schedule();
        if scheduled.is_empty() {
            return Ok(Vec::new());
        }
        let mut batch = Batch::default();
        let mut sampling = Vec::new();
        for s in &scheduled {
            let sequence = self.scheduler.get(s.id);
            let complete = s.end == sequence.token_ids().len();
            batch.push(&sequence.token_ids()[s.start..s.end], s.start, sequence.blocks(), complete);
            batch.of_prompt(sequence.prompt_len());
            if complete {
                sampling.push(s.id);
            }
        }
        let logits = self.runner.run(&batch)?;
        for s in &scheduled {
            self.scheduler.get_mut(s.id).set_computed(s.end);
        }
        let sampled = sample(&mut self.scheduler, &sampling, logits)?;
        let mut events = Vec::new();
        for (id, sampled) in sampling.into_iter().zip(sampled) {
            match sampled {
                Ok(token) => {
                    let finished = self.scheduler.get_mut(id).push(token.id);
                    events.push(Event::Token { id, token });
                    if let Some(reason) = finished {
                        self.scheduler.remove(id);
                        events.push(Event::Finished { id, reason });
                    }
                }
                Err(error) => {
                    self.scheduler.remove(id);
                    events.push(Event::Failed { id, error });
                }
            }
        }
        Ok(events)
    }
}

/// One token for each of `ids`, whose rows of `logits` are in this order. Plain greedy batches never leave the device.
fn sample(scheduler: &mut Scheduler, ids: &[RequestId], mut logits: Logits<'_>) -> Result<Vec<Result<Sampled>>> {
    if ids.iter().all(|&id| scheduler.get(id).is_plain_greedy()) {
        let pick = |s: LogitsStats| {
            if s.logprob.is_nan() {
                return Err(Error::not_finite("logits", s.logprob));
            }
            Ok(Sampled { id: s.id, logprob: s.logprob, top: Vec::new() })
        };
        return Ok(logits.stats(&[])?.into_iter().map(pick).collect());
    }
    let vocab = logits.vocab_size();
    let logits = logits.read()?;
    let rows = logits.chunks_exact(vocab);
    Ok(ids.iter().zip(rows).map(|(&id, row)| scheduler.get_mut(id).sample(row)).collect())
}

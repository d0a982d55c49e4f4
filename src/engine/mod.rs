//! The engine: token ids in, token ids out. Nothing above it knows tensors, nothing below it knows requests.
//!
//! [`Engine::submit`] queues a request, [`Engine::step`] runs one forward pass over whatever is scheduled and returns
//! what happened, [`Engine::abort`] drops a request and frees its blocks. One thread owns an engine.

mod block_events;
mod block_manager;
mod constraint;
mod deadline;
mod event;
mod prefix_cache;
mod prompt_work;
mod request;
mod rows;
pub mod sampling;
mod scheduler;
mod sequence;

pub use block_events::{BlockEvent, BlockEvents};
pub use constraint::{Matcher, TokenSet};
pub use event::{Event, FinishReason, Load, PromptOutput};
pub use request::{MAX_CHOICES, MAX_PROMPT_LOGPROBS, Pooling, Request, RequestId};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::models::{Batch, ModelRunner};
use block_manager::{BlockManager, Contents};
use prefix_cache::PrefixCache;
use rows::{Row, Rows};
use sampling::{Sampled, SamplingParams};
use scheduler::{Part, Scheduler};
use sequence::{Sequence, SequenceId};

/// How an engine works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Keep keys and values of full blocks for later prompts that start alike. Has no effect where the model's depend on more than the
    /// tokens before ([`ModelRunner::shares_prefixes`]).
    pub prefix_caching: bool,
    /// How many changes of the prefix cache to hold for [`Engine::take_block_events`]; 0 records none.
    pub block_events: usize,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { prefix_caching: true, block_events: 0 }
    }
}

/// Whether requests are taken.
#[derive(Debug)]
enum State {
    Open,
    Draining,
    /// Why the device failed.
    Failed(String),
}

/// A model, its KV cache and the requests in flight.
#[derive(Debug)]
pub struct Engine {
    runner: ModelRunner,
    scheduler: Scheduler,
    next_id: u64,
    state: State,
}

impl Engine {
    /// An engine without requests, of the default options.
    pub fn new(runner: ModelRunner) -> Engine {
        Engine::with_options(runner, EngineOptions::default())
    }

    /// An engine without requests.
    pub fn with_options(runner: ModelRunner, options: EngineOptions) -> Engine {
        let num_blocks = runner.cache().num_blocks;
        let is_caching = options.prefix_caching && runner.shares_prefixes();
        let cache = is_caching.then(|| PrefixCache::new(num_blocks, options.block_events));
        let blocks = BlockManager::new(num_blocks, runner.window(), cache);
        let scheduler = Scheduler::new(runner.limits(), blocks);
        Engine { runner, scheduler, next_id: 0, state: State::Open }
    }

    /// The model, and what it runs with.
    pub fn runner(&self) -> &ModelRunner {
        &self.runner
    }

    /// Queues a request.
    ///
    /// # Errors
    /// `Input` when it could never run: no prompt, an id outside the vocabulary, a parameter out of range, or more tokens than a sequence or
    /// the KV cache may have. `Engine` while it drains and when it has failed.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        match &self.state {
            State::Open => {}
            State::Draining => {
                let reason = "it is draining and takes no more requests; send them to another".into();
                return Err(Error::Engine { reason });
            }
            State::Failed(reason) => return Err(failed(reason)),
        }
        request.check(self.runner.config(), self.runner.limits().max_model_len)?;
        let id = RequestId(self.next_id);
        self.scheduler.add(Sequence::new(id, request))?;
        self.next_id += 1;
        Ok(id)
    }

    /// Drops a request, running or waiting, with all of its choices. Unknown ids are ignored: it may just have finished.
    pub fn abort(&mut self, id: RequestId) {
        self.scheduler.remove(id, Contents::Keep);
    }

    /// Drops one choice of a request, running or waiting; its others go on. Before the prompt is computed there is only number 0.
    pub fn abort_choice(&mut self, id: RequestId, choice: usize) {
        self.scheduler.remove_choice(id, choice);
    }

    /// Runs steps of every number of sequences that a GPU records, so that no request waits for that. Leaves nothing behind but cached
    /// blocks under a salt of their own.
    ///
    /// # Errors
    /// The device's failure.
    pub fn warm_up(&mut self) -> Result<()> {
        let limits = *self.runner.limits();
        let most = match self.runner.device() {
            Device::Cpu(_) => 1,
            _ => limits.max_seqs,
        };
        for size in (1..=most).filter(|&n| n.is_power_of_two() || n % 8 == 0 || n == most) {
            for id in 0..size {
                let prompt = vec![(id % self.runner.config().vocab_size) as u32];
                let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy() };
                let salt = "warm-up".to_owned();
                self.submit(Request { cache_salt: salt, ..Request::new(prompt, params, 1) })?;
            }
            while !self.is_idle() {
                let failed = self.step().into_iter().find_map(|event| match event {
                    Event::Failed { error: error @ Error::Engine { .. }, .. } => Some(error),
                    _ => None,
                });
                failed.map_or(Ok(()), Err)?;
            }
        }
        Ok(())
    }

    /// Takes no more requests; further steps finish those it has.
    pub fn drain(&mut self) {
        if matches!(self.state, State::Open) {
            self.state = State::Draining;
        }
    }

    /// What the device failed with. An engine that has failed has no requests and takes none.
    pub fn fault(&self) -> Option<&str> {
        match &self.state {
            State::Failed(reason) => Some(reason),
            _ => None,
        }
    }

    /// True when nothing is queued or running.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        self.scheduler.load()
    }

    /// Changes of the prefix cache since the last call, if [`EngineOptions::block_events`] asked for them.
    pub fn take_block_events(&mut self) -> BlockEvents {
        self.scheduler.take_block_events()
    }

    /// Checks the books of the KV cache, for tests: each block is counted as often as sequences hold it, and none is lost.
    ///
    /// # Errors
    /// What does not add up.
    pub fn audit(&self) -> Result<(), String> {
        self.scheduler.audit()
    }

    /// Runs one forward pass and chooses a token for every sequence whose tokens are then all computed. Failures are events: of one
    /// request, or of all when the device failed ([`Engine::fault`]).
    pub fn step(&mut self) -> Vec<Event> {
        let parts = self.scheduler.schedule();
        if parts.is_empty() {
            return Vec::new();
        }
        match self.compute(&parts) {
            Ok((rows, errors)) => self.settle_all(&parts, &rows, errors),
            Err(error) => self.stop(&error),
        }
    }

    /// The device's share of a step: logits of the parts that are sampled, and the requests whose prompts came to no number.
    fn compute(&mut self, parts: &[Part]) -> Result<(Rows, Vec<(RequestId, Error)>)> {
        let Engine { runner, scheduler, .. } = self;
        let mut batch = Batch::default();
        let (mut draws, mut has_prompt_work) = (Some(Vec::new()), false);
        for part in parts {
            let sequence = scheduler.running(part.id);
            batch.push(
                &sequence.token_ids()[part.start..part.end],
                part.start,
                sequence.table.blocks(),
                part.is_sampled,
            );
            batch.of_prompt(sequence.prompt_ids().len());
            has_prompt_work |= sequence.prompt.is_some();
            if part.is_sampled {
                draws = draws.zip(sequence.device_row()).map(|(mut draws, row)| {
                    draws.push(row);
                    draws
                });
            }
        }
        if !has_prompt_work {
            return Ok((Rows::read(runner.run(&batch)?, draws.as_deref())?, Vec::new()));
        }
        let rows_at_once = runner.limits().max_logit_rows;
        let mut pass = runner.forward(&batch)?;
        let mut errors = Vec::new();
        for (part, &row) in parts.iter().zip(&batch.cu_seqlens_q) {
            match scheduler.running(part.id).observe(&mut pass, row as usize, part.start..part.end, rows_at_once) {
                Ok(()) => {}
                Err(error @ Error::NotFinite { .. }) => errors.push((part.id.request, error)),
                Err(error) => return Err(error),
            }
        }
        Ok((Rows::read(pass.into_logits(&batch.logit_rows)?, draws.as_deref())?, errors))
    }

    /// The host's share of a step. What fails here is one request.
    fn settle_all(&mut self, parts: &[Part], rows: &Rows, errors: Vec<(RequestId, Error)>) -> Vec<Event> {
        let mut events = Vec::new();
        for (id, error) in errors {
            self.fail(id, error, &mut events);
        }
        let mut next_row = 0;
        for part in parts {
            let row = part.is_sampled.then(|| rows.get(next_row));
            next_row += usize::from(part.is_sampled);
            // Not running any more where another part of its request has failed.
            if self.scheduler.is_running(part.id)
                && let Err(error) = self.settle(part, row, &mut events)
            {
                self.fail(part.id.request, error, &mut events);
            }
        }
        events
    }

    /// What becomes of a sequence whose `part` is computed.
    fn settle(&mut self, part: &Part, row: Option<Row<'_>>, events: &mut Vec<Event>) -> Result<()> {
        let id = part.id;
        let token = row.map(|row| self.scheduler.running(id).choose(row)).transpose()?;
        let sequence = self.scheduler.computed(part);
        if sequence.remaining() > 0 {
            return Ok(());
        }
        let mut choices = Vec::new();
        if let Some(work) = sequence.prompt.take() {
            events.push(Event::Prompt { id: id.request, waited: work.waited(), output: work.finish() });
            choices = sequence.make_choices();
        }
        let ended = match token {
            Some(token) => push(sequence, token, events)?,
            None => end(id, FinishReason::Length, events),
        };
        for (mut choice, row) in choices.into_iter().zip(std::iter::repeat(row)) {
            let Some(token) = row.map(|row| choice.choose(row)).transpose()? else { continue };
            if !push(&mut choice, token, events)? {
                self.scheduler.add_choice(id, choice);
            }
        }
        if ended {
            self.scheduler.finish(id);
        }
        Ok(())
    }

    /// Ends a request that failed. What its blocks hold may be what failed it, unless the request itself was wrong.
    fn fail(&mut self, id: RequestId, error: Error, events: &mut Vec<Event>) {
        let is_asked_wrong = matches!(error, Error::Input { .. });
        self.scheduler.remove(id, if is_asked_wrong { Contents::Keep } else { Contents::Forget });
        events.push(Event::Failed { id, error });
    }

    /// Ends everything: what the device holds is not known any more.
    fn stop(&mut self, error: &Error) -> Vec<Event> {
        let reason = error.to_string();
        let mut events = Vec::new();
        for id in self.scheduler.requests() {
            self.fail(id, failed(&reason), &mut events);
        }
        self.state = State::Failed(reason);
        events
    }
}

fn failed(reason: &str) -> Error {
    Error::Engine { reason: format!("its device failed and it has stopped, start it again: {reason}") }
}

/// Appends a token and tells so; true when it is the last one.
///
/// # Errors
/// Those of [`Sequence::push`].
fn push(sequence: &mut Sequence, token: Sampled, events: &mut Vec<Event>) -> Result<bool> {
    let (id, last) = (sequence.id(), sequence.push(token.id));
    events.push(Event::Token { id: id.request, choice: id.choice, token });
    Ok(last?.is_some_and(|reason| end(id, reason, events)))
}

/// Tells that a sequence has ended: true.
fn end(id: SequenceId, reason: FinishReason, events: &mut Vec<Event>) -> bool {
    events.push(Event::Finished { id: id.request, choice: id.choice, reason });
    true
}

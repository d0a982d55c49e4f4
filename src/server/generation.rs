//! One request on its way through the engine: from its events to text as it becomes certain, for every API alike.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use futures_util::Stream;
use serde_json::{Value, json};

use crate::engine::sampling::Sampled;
use crate::engine::{Event, FinishReason, PromptOutput, Request};
use crate::text::{Detokenizer, StopStrings, Tokenizer};

use super::error::ApiError;
use super::metrics::{self, Timing};
use super::worker::{EngineHandle, Running, Timed};

/// How the ids of a request become text, and what ends it beside the engine's own reasons.
#[derive(Debug, Clone)]
pub(super) struct TextOptions {
    pub(super) stop: Vec<String>,
    pub(super) include_stop_str_in_output: bool,
    pub(super) skip_special_tokens: bool,
    /// Special tokens that are not skipped.
    pub(super) keep: Vec<&'static str>,
    /// The output goes on after a text, so that a blank at its start is kept.
    pub(super) continuing: bool,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finish {
    /// `stop` or `length`.
    pub(super) reason: &'static str,
    /// The stop string or stop id that was met; null for the end of a text and for `length`.
    pub(super) stop_reason: Value,
}

/// What a token added to one choice.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    pub(super) choice: usize,
    /// Text that is now certain; may be empty.
    pub(super) text: String,
    /// The token, but where text that was held back came at the end.
    pub(super) token: Option<Sampled>,
    pub(super) finish: Option<Finish>,
}

/// What happened to a request.
#[derive(Debug)]
pub(super) enum Step {
    /// Its prompt is computed; comes first.
    Prompt(PromptOutput),
    Piece(Piece),
    /// Every choice has ended; comes last.
    End(Usage),
}

/// Tokens of a request, as `usage` tells them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) cached: usize,
    pub(super) completion: usize,
}

struct Choice {
    detokenizer: Detokenizer,
    stop: StopStrings,
    tokens: usize,
    last_token: Option<Instant>,
    is_live: bool,
}

/// A request that the engine has taken. Dropping it aborts what is left.
pub(super) struct Generation {
    running: Running,
    choices: Vec<Choice>,
    min_tokens: usize,
    ignore_eos: bool,
    /// Ids that end a text as the model itself ends it.
    eos: Vec<u32>,
    stop_ids: Vec<u32>,
    include_stop: bool,
    pending: VecDeque<Step>,
    usage: Usage,
    arrived: Instant,
    submitted: Instant,
    first_token: Option<Instant>,
    scheduled: Option<Instant>,
    deadline: Instant,
    metrics: metrics::Shared,
}

/// What surrounds a request.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) engine: Arc<EngineHandle>,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) metrics: metrics::Shared,
    /// When the request came in.
    pub(super) arrived: Instant,
    /// How long it may take.
    pub(super) timeout: Duration,
    /// Ids that end a text as the model itself ends it.
    pub(super) eos: Vec<u32>,
}

impl Generation {
    /// Hands a request to the engine.
    ///
    /// # Errors
    /// What is wrong with it, or that there is no place.
    pub(super) async fn start(context: &Context, request: Request, text: &TextOptions) -> Result<Generation, ApiError> {
        let choice = || -> Result<Choice, ApiError> {
            let detokenizer = match text.skip_special_tokens {
                true => context.tokenizer.detokenizer_keeping(&text.keep),
                false => context.tokenizer.detokenizer(false),
            };
            Ok(Choice {
                detokenizer: if text.continuing { detokenizer.continuing() } else { detokenizer },
                stop: StopStrings::new(&text.stop, text.include_stop_str_in_output)?,
                tokens: 0,
                last_token: None,
                is_live: true,
            })
        };
        let choices = (0..request.n).map(|_| choice()).collect::<Result<Vec<_>, _>>()?;
        let place = context.engine.admit(request.n)?;
        let params = &request.params;
        Ok(Generation {
            choices,
            min_tokens: params.min_tokens,
            ignore_eos: params.ignore_eos,
            eos: context.eos.clone(),
            stop_ids: params.stop_token_ids.clone(),
            include_stop: text.include_stop_str_in_output,
            pending: VecDeque::new(),
            usage: Usage { prompt: request.prompt_ids.len(), ..Usage::default() },
            arrived: context.arrived,
            submitted: Instant::now(),
            first_token: None,
            scheduled: None,
            deadline: context.arrived + context.timeout,
            metrics: Arc::clone(&context.metrics),
            running: context.engine.submit(request, place).await?,
        })
    }

    /// All that happens.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<Step, ApiError>> + Send {
        futures_util::stream::unfold(self, |mut generation| async move {
            let step = generation.next().await?;
            Some((step, generation))
        })
    }

    /// What happens next; `None` when every choice has ended.
    ///
    /// # Errors
    /// The request failed, or took too long; nothing comes after that.
    async fn next(&mut self) -> Option<Result<Step, ApiError>> {
        loop {
            if let Some(step) = self.pending.pop_front() {
                return Some(Ok(step));
            }
            if self.choices.iter().all(|choice| !choice.is_live) {
                return None;
            }
            let next = tokio::time::timeout_at(self.deadline.into(), self.running.next()).await;
            match next {
                Err(_) => {
                    self.end_all("timeout");
                    let message = format!("the request took longer than {:?}", self.deadline - self.arrived);
                    return Some(Err(ApiError::timeout(StatusCode::GATEWAY_TIMEOUT, message)));
                }
                Ok(None) => {
                    self.end_all("error");
                    return Some(Err(ApiError::unavailable("the engine has stopped")));
                }
                Ok(Some(Timed { at, event })) => {
                    if let Err(error) = self.take(at, event) {
                        self.end_all("error");
                        return Some(Err(error));
                    }
                }
            }
        }
    }

    fn take(&mut self, at: Instant, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Prompt { waited, output, .. } => {
                self.scheduled = Some(self.submitted + waited);
                self.usage.cached = output.cached_tokens;
                self.metrics.prompt(self.usage.prompt);
                self.pending.push_back(Step::Prompt(output));
            }
            Event::Token { choice, token, .. } => self.token(at, choice, token),
            Event::Finished { choice, reason, .. } => {
                let reason = match reason {
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                };
                self.finish(at, choice, Finish { reason, stop_reason: Value::Null });
            }
            Event::Failed { error, .. } => return Err(error.into()),
        }
        Ok(())
    }

    fn token(&mut self, at: Instant, index: usize, token: Sampled) {
        let choice = &mut self.choices[index];
        if !choice.is_live {
            return;
        }
        self.usage.completion += 1;
        choice.tokens += 1;
        match choice.last_token.replace(at) {
            Some(before) => self.metrics.next_token(at - before),
            None => self.metrics.first_token(at - self.arrived),
        }
        self.first_token.get_or_insert(at);
        // Text of what ends a sequence is not part of it, be it a special token or not.
        let ends = !self.ignore_eos && self.stop_ids.contains(&token.id) && choice.tokens > self.min_tokens;
        let text = if ends && !self.include_stop { String::new() } else { choice.detokenizer.push(token.id) };
        let text = if choice.tokens > self.min_tokens { choice.stop.push(&text) } else { text };
        let stopped = choice.stop.found().then(|| Finish { reason: "stop", stop_reason: json!(choice.stop.matched()) });
        let by_id = (ends && !self.eos.contains(&token.id)).then_some(token.id);
        self.pending.push_back(Step::Piece(Piece { choice: index, text, token: Some(token), finish: None }));
        if let Some(finish) = stopped {
            self.running.abort_choice(index);
            self.finish(at, index, finish);
        } else if let Some(id) = by_id {
            self.finish(at, index, Finish { reason: "stop", stop_reason: json!(id) });
        }
    }

    /// Ends a choice, once: its last piece gets what text was held back.
    fn finish(&mut self, at: Instant, index: usize, finish: Finish) {
        let choice = &mut self.choices[index];
        if !std::mem::take(&mut choice.is_live) {
            return;
        }
        let mut rest = String::new();
        if !choice.stop.found() {
            rest = choice.stop.push(&choice.detokenizer.finish());
            rest.push_str(&choice.stop.finish());
        }
        self.metrics.finished(finish.reason, choice.tokens);
        let last = self.pending.iter_mut().rev().find_map(|step| match step {
            Step::Piece(piece) if piece.choice == index => Some(piece),
            _ => None,
        });
        match last {
            Some(piece) => {
                piece.text.push_str(&rest);
                piece.finish = Some(finish);
            }
            None => self.pending.push_back(Step::Piece(Piece {
                choice: index,
                text: rest,
                token: None,
                finish: Some(finish),
            })),
        }
        if self.choices.iter().all(|choice| !choice.is_live) {
            self.measure(at);
            self.pending.push_back(Step::End(self.usage));
        }
    }

    fn measure(&self, at: Instant) {
        let Some(first) = self.first_token else { return };
        let scheduled = self.scheduled.unwrap_or(first);
        let timing = Timing {
            queue: scheduled.saturating_duration_since(self.arrived),
            prefill: first.saturating_duration_since(scheduled),
            decode: at.saturating_duration_since(first),
            e2e: at.saturating_duration_since(self.arrived),
        };
        self.metrics.request(&timing, self.choices.iter().map(|choice| choice.tokens).max().unwrap_or(0));
    }

    fn end_all(&mut self, reason: &'static str) {
        for choice in self.choices.iter_mut().filter(|choice| choice.is_live) {
            choice.is_live = false;
            self.metrics.finished(reason, choice.tokens);
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.end_all("abort");
    }
}

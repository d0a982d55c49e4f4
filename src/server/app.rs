//! What every handler sees: the model as served, its engine, and the limits of requests.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ring::rand::{SecureRandom, SystemRandom};

use crate::engine::sampling::SamplingParams;
use crate::engine::{Matcher, Request};
use crate::text::{ChatTemplate, Constraint, GrammarCompiler, ReasoningFormat, Tokenizer, ToolFormat};

use super::error::ApiError;
use super::generation::{Context, Generation, TextOptions};
use super::metrics;
use super::worker::EngineHandle;

/// Most bytes that a token of a vocabulary has on average over a text.
const MAX_BYTES_PER_TOKEN: usize = 64;

/// A model as clients see it.
#[derive(Debug)]
pub struct ServedModel {
    /// Names under which clients ask for it; the first is what responses say.
    pub names: Vec<String>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, if it is a chat model.
    pub template: Option<ChatTemplate>,
    /// How it writes tool calls; `None` where that is not known.
    pub tool_format: Option<ToolFormat>,
    /// How it marks its reasoning, if it does.
    pub reasoning_format: Option<ReasoningFormat>,
    /// Compiles what outputs are held to.
    pub grammars: GrammarCompiler,
    /// Sampling where a request does not say.
    pub sampling: SamplingParams,
    /// Texts that end an output where a request names none.
    pub stop: Vec<String>,
    /// Tokens to generate where a request does not say.
    pub max_new_tokens: Option<usize>,
}

/// Limits of requests.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestLimits {
    /// Bytes of a body.
    pub max_body_bytes: usize,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long a request may take.
    pub request_timeout: Duration,
    /// Choices of a request, `n` times its prompts.
    pub max_choices: usize,
    /// Alternatives to each token that are told.
    pub max_logprobs: usize,
}

impl Default for RequestLimits {
    fn default() -> RequestLimits {
        RequestLimits {
            max_body_bytes: 16 << 20,
            body_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(600),
            max_choices: 128,
            max_logprobs: 20,
        }
    }
}

/// State of the server.
pub(super) struct App {
    pub(super) model: ServedModel,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) engine: Arc<EngineHandle>,
    pub(super) metrics: metrics::Shared,
    pub(super) limits: RequestLimits,
    pub(super) max_model_len: usize,
    pub(super) hidden_size: usize,
    pub(super) vocab_size: usize,
    /// When it was started, in seconds since 1970.
    pub(super) created: u64,
}

impl App {
    /// Fails unless `model` is a name of the model that is served; without a name it is meant.
    ///
    /// # Errors
    /// 404.
    pub(super) fn check_model(&self, model: Option<&str>) -> Result<(), ApiError> {
        match model {
            Some(name) if !self.model.names.iter().any(|known| known == name) => {
                let known = self.model.names.join("`, `");
                let message = format!("The model `{}` does not exist; served is `{known}`", clipped(name, 200));
                Err(ApiError::not_found("model_not_found", message))
            }
            _ => Ok(()),
        }
    }

    /// The name that responses say.
    pub(super) fn name(&self) -> &str {
        &self.model.names[0]
    }

    /// Runs work that takes time, such as tokenization and templates, on a thread of its own.
    ///
    /// # Errors
    /// Those of the work.
    pub(super) async fn prepare<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let app = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&app)).await;
        done.map_err(|_| ApiError::internal("preparing the request failed: this is a bug"))?
    }

    /// How many tokens to generate after a prompt of `prompt` tokens, `asked` for or else `otherwise`.
    ///
    /// # Errors
    /// 400 where the context has no room for one.
    pub(super) fn room(&self, prompt: usize, asked: Option<usize>, otherwise: usize) -> Result<usize, ApiError> {
        let limit = self.max_model_len;
        let left = limit.saturating_sub(prompt);
        if asked == Some(0) {
            return Err(ApiError::invalid("max_tokens", "expected at least 1, got 0"));
        }
        if left == 0 {
            return Err(self.too_long("prompt", format!("the prompt has {prompt}, which leaves none to generate")));
        }
        Ok(asked.or(self.model.max_new_tokens).unwrap_or(otherwise).min(left))
    }

    /// Fails unless `prompts` times `n` is a number of choices that one request may have.
    ///
    /// # Errors
    /// 400.
    pub(super) fn check_choices(&self, prompts: usize, n: usize) -> Result<(), ApiError> {
        let most = self.limits.max_choices.min(self.engine.capacity());
        match prompts.checked_mul(n) {
            Some(1..) if prompts * n <= most => Ok(()),
            _ if n == 0 => Err(ApiError::invalid("n", "expected at least 1, got 0")),
            _ => Err(ApiError::invalid(
                "n",
                format!("{prompts} prompts with {n} choices each: expected 1 to {most} in all"),
            )),
        }
    }

    /// Fails where more alternatives are asked for than are told.
    ///
    /// # Errors
    /// 400 naming `param`.
    pub(super) fn check_logprobs(&self, param: &str, asked: Option<usize>) -> Result<(), ApiError> {
        let most = self.limits.max_logprobs;
        match asked {
            Some(n) if n > most => Err(ApiError::invalid(param, format!("expected at most {most}, got {n}"))),
            _ => Ok(()),
        }
    }

    /// Token ids of a text in field `param`.
    ///
    /// # Errors
    /// 400 for a text that is too long to be tokenized, or cannot be.
    pub(super) fn encode(&self, param: &str, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
        // No vocabulary has tokens of more bytes on average; what is longer does not fit, and need not be tokenized to know.
        let most = self.max_model_len.saturating_mul(MAX_BYTES_PER_TOKEN);
        if text.len() > most {
            return Err(self.too_long(param, format!("the text has {} bytes", text.len())));
        }
        let ids = self.tokenizer.encode(text, add_special_tokens);
        ids.map_err(|error| ApiError::invalid(param, error))
    }

    /// Fails for a prompt that does not fit, where nothing is to be generated after it.
    ///
    /// # Errors
    /// 400 naming `param`.
    pub(super) fn check_prompt(&self, param: &str, tokens: usize) -> Result<(), ApiError> {
        match tokens <= self.max_model_len {
            true => Ok(()),
            false => Err(self.too_long(param, format!("it has {tokens}"))),
        }
    }

    fn too_long(&self, param: &str, what: String) -> ApiError {
        let reason = format!("This model's maximum context length is {} tokens; {what}", self.max_model_len);
        ApiError::invalid(param, reason).with_code("context_length_exceeded")
    }

    /// The matcher of a constraint that a field asks for.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(super) fn compile(&self, asked: Option<(Constraint, String)>) -> Result<Option<Matcher>, ApiError> {
        let compiled = asked.map(|(constraint, field)| self.model.grammars.compile(&constraint, &field));
        Ok(compiled.transpose()?)
    }

    /// The last `truncate_prompt_tokens` of a prompt; -1 is as many as the context holds.
    ///
    /// # Errors
    /// 400 for another number that is not positive.
    pub(super) fn truncated(&self, mut ids: Vec<u32>, to: Option<i64>) -> Result<Vec<u32>, ApiError> {
        let keep = match to {
            None => return Ok(ids),
            Some(-1) => self.max_model_len - 1,
            Some(n) => usize::try_from(n).ok().filter(|n| (1..self.max_model_len).contains(n)).ok_or_else(|| {
                let most = self.max_model_len - 1;
                ApiError::invalid("truncate_prompt_tokens", format!("expected -1 or 1 to {most}, got {n}"))
            })?,
        };
        ids.drain(..ids.len().saturating_sub(keep));
        Ok(ids)
    }

    /// Hands a request that came at `arrived` to the engine.
    ///
    /// # Errors
    /// What is wrong with it, or that there is no place.
    pub(super) async fn generate(
        &self,
        arrived: Instant,
        request: Request,
        text: &TextOptions,
    ) -> Result<Generation, ApiError> {
        let context = Context {
            engine: Arc::clone(&self.engine),
            tokenizer: Arc::clone(&self.tokenizer),
            metrics: Arc::clone(&self.metrics),
            arrived,
            timeout: self.limits.request_timeout,
            eos: self.model.sampling.stop_token_ids.clone(),
        };
        Generation::start(&context, request, text).await
    }
}

/// Seconds since 1970.
pub(super) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A name that no other has: `prefix` and 32 hexadecimal digits.
pub(super) fn unique_id(prefix: &str) -> String {
    let mut bytes = [0; 16];
    // Where the system has no randomness the names are less unique, and nothing else is worse.
    if SystemRandom::new().fill(&mut bytes).is_err() {
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        bytes = nanos.to_le_bytes();
    }
    format!("{prefix}{:032x}", u128::from_le_bytes(bytes))
}

/// The beginning of a text that came from outside.
pub(super) fn clipped(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

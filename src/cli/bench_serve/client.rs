//! One request to the server: sent, its stream read, its tokens timed as vLLM's benchmark times them.

use std::io::Read;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::Agent;

use super::load::Load;
use super::sse::Events;
use crate::error::{Error, Result};

/// Bytes of a read from a connection; a step of a server sends each stream some hundred.
const READ: usize = 16 << 10;
/// Bytes of an answer that are read to say what is wrong.
const MAX_MESSAGE: u64 = 64 << 10;

/// A server, and how it is asked.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    base_url: String,
    url: String,
    headers: Vec<(String, String)>,
    is_chat: bool,
    /// Fields of every request.
    fields: Map<String, Value>,
}

/// How a server is asked.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) base_url: String,
    pub(super) endpoint: String,
    pub(super) is_chat: bool,
    /// Name and value.
    pub(super) headers: Vec<(String, String)>,
    pub(super) ignore_eos: bool,
    /// Fields of every request, which go before ours.
    pub(super) extra_body: Map<String, Value>,
    pub(super) timeout: Duration,
    /// Requests at once.
    pub(super) concurrency: usize,
}

/// What became of a request.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    /// When it was sent.
    pub(super) start: Instant,
    /// Seconds from there to the first token.
    pub(super) ttft: f64,
    /// Seconds from each token (each event with a choice) to the next.
    pub(super) itl: Vec<f64>,
    /// Seconds from the start to the last token.
    pub(super) latency: f64,
    pub(super) input_tokens: usize,
    pub(super) output_tokens: usize,
    /// The server counted the tokens; else they are our own lengths, and events.
    pub(super) has_usage: bool,
    /// Why it failed.
    pub(super) error: Option<String>,
}

/// What the events of a stream hold that matters here.
#[derive(Debug, Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    delta: Option<Map<String, Value>>,
    finish_reason: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    prompt_tokens: Option<usize>,
    completion_tokens: Option<usize>,
}

impl Client {
    /// # Errors
    /// [`Error::Input`] for an address or a header that HTTP cannot express.
    pub(super) fn new(options: Options) -> Result<Client> {
        let base_url = options.base_url.trim_end_matches('/').to_string();
        if !base_url.starts_with("http://") && !base_url.starts_with("https://") {
            let reason = format!("`{base_url}`: expected http://HOST:PORT or https://HOST");
            return Err(Error::input("--base-url", reason));
        }
        if !options.endpoint.starts_with('/') {
            let reason = format!("`{}`: expected a path, such as /v1/completions", options.endpoint);
            return Err(Error::input("--endpoint", reason));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .accept_encoding("identity")
            .user_agent(concat!("lowbit/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_global(Some(options.timeout))
            .input_buffer_size(READ)
            .output_buffer_size(READ)
            .max_idle_connections(options.concurrency)
            .max_idle_connections_per_host(options.concurrency)
            .build();
        let mut fields = Map::new();
        if options.ignore_eos {
            fields.insert("ignore_eos".to_string(), json!(true));
        }
        fields.extend(options.extra_body);
        Ok(Client {
            agent: config.new_agent(),
            url: format!("{base_url}{}", options.endpoint),
            base_url,
            headers: options.headers,
            is_chat: options.is_chat,
            fields,
        })
    }

    /// The address that requests go to.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// The first model that the server names, or why it names none.
    ///
    /// # Errors
    /// [`Error::Server`] when the server cannot be reached.
    pub(super) fn first_model(&self) -> Result<Result<String, Error>> {
        let url = format!("{}/v1/models", self.base_url);
        let failed = |reason: String| Error::Server { url: url.clone(), reason };
        let mut request = self.agent.get(&url);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let mut response = request.call().map_err(|e| failed(unreachable_reason(&e)))?;
        let status = response.status().as_u16();
        let text = body_text(response.body_mut());
        if status != 200 {
            return Ok(Err(failed(http_reason(status, &text))));
        }
        let models: Option<Value> = serde_json::from_str(&text).ok();
        let id = models.as_ref().and_then(|models| models.pointer("/data/0/id")?.as_str());
        Ok(id.map(str::to_string).ok_or_else(|| failed("names no model: give --model".to_string())))
    }

    /// The body that asks for prompt `i` of a load.
    pub(super) fn body(&self, model: &str, load: &Load, i: usize) -> String {
        let output_len = load.output_len(i);
        let mut body = match self.is_chat {
            true => json!({
                "model": model,
                "messages": [{"role": "user", "content": load.words(i)}],
                "max_completion_tokens": output_len,
            }),
            false => json!({"model": model, "prompt": load.ids(i), "max_tokens": output_len}),
        };
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        for (name, value) in &self.fields {
            body[name] = value.clone();
        }
        body.to_string()
    }

    /// Sends a request and reads its stream to the end. `input_len` stands for the prompt's tokens where the server does not count
    /// them.
    pub(super) fn ask(&self, body: &str, input_len: usize) -> Reply {
        let mut reply = Reply {
            start: Instant::now(),
            ttft: 0.0,
            itl: Vec::new(),
            latency: 0.0,
            input_tokens: input_len,
            output_tokens: 0,
            has_usage: false,
            error: None,
        };
        reply.error = self.stream(body, &mut reply).err();
        reply
    }

    fn stream(&self, body: &str, reply: &mut Reply) -> Result<(), String> {
        let mut request = self.agent.post(&self.url).header("content-type", "application/json");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let mut response = request.send(body).map_err(|e| unreachable_reason(&e))?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(http_reason(status, &body_text(response.body_mut())));
        }
        let mut reader = response.into_body().into_reader();
        let mut tokens = Tokens { reply, is_chat: self.is_chat, last: None, is_over: false, error: None };
        let (mut events, mut buffer) = (Events::default(), [0; READ]);
        loop {
            let read = reader.read(&mut buffer).map_err(|e| format!("the stream broke off: {}", kind(&e)))?;
            let now = Instant::now();
            if read == 0 {
                events.finish(|data| tokens.event(data, now));
                return tokens.finish();
            }
            let pushed = events.push(&buffer[..read], |data| tokens.event(data, now));
            pushed.map_err(|_| "sent an event of more than 16 MiB".to_string())?;
        }
    }
}

/// The tokens of a stream as they come.
struct Tokens<'a> {
    reply: &'a mut Reply,
    is_chat: bool,
    last: Option<Instant>,
    /// `[DONE]`, or why the model stopped, was seen.
    is_over: bool,
    error: Option<String>,
}

impl Tokens<'_> {
    fn event(&mut self, data: &[u8], now: Instant) {
        if data.trim_ascii() == b"[DONE]" {
            self.is_over = true;
            return;
        }
        let Ok(chunk) = serde_json::from_slice::<Chunk>(data) else {
            let start = String::from_utf8_lossy(&data[..data.len().min(80)]).into_owned();
            self.error.get_or_insert(format!("sent an event that is no chunk of a completion: {start}"));
            return;
        };
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            self.error.get_or_insert(message(&error));
        }
        if let Some(usage) = chunk.usage {
            self.reply.input_tokens = usage.prompt_tokens.unwrap_or(self.reply.input_tokens);
            if let Some(tokens) = usage.completion_tokens {
                (self.reply.output_tokens, self.reply.has_usage) = (tokens, true);
            }
        }
        let Some(choice) = chunk.choices.as_ref().and_then(|choices| choices.first()) else { return };
        self.is_over |= choice.finish_reason.is_some();
        if self.is_chat && choice.is_role_alone() {
            return;
        }
        match self.last {
            None => self.reply.ttft = (now - self.reply.start).as_secs_f64(),
            Some(last) => self.reply.itl.push((now - last).as_secs_f64()),
        }
        self.last = Some(now);
    }

    fn finish(self) -> Result<(), String> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let Some(last) = self.last else { return Err("sent no token".to_string()) };
        if !self.is_over {
            return Err("the stream ended before the answer did".to_string());
        }
        self.reply.latency = (last - self.reply.start).as_secs_f64();
        if !self.reply.has_usage {
            self.reply.output_tokens = self.reply.itl.len() + 1;
        }
        Ok(())
    }
}

impl Choice {
    /// The chunk by which some servers open a chat's stream before there is a token.
    fn is_role_alone(&self) -> bool {
        let Some(delta) = &self.delta else { return false };
        let is_empty = |value: &Value| value.is_null() || value.as_str() == Some("");
        self.finish_reason.is_none()
            && delta.contains_key("role")
            && delta.iter().all(|(name, value)| name == "role" || is_empty(value))
    }
}

fn body_text(body: &mut ureq::Body) -> String {
    let mut bytes = Vec::new();
    // Half a message is better than none.
    let _ = body.as_reader().take(MAX_MESSAGE).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A status and what the server says of it.
fn http_reason(status: u16, body: &str) -> String {
    let said = serde_json::from_str::<Value>(body).map_or_else(|_| body.trim().to_string(), |body| message(&body));
    let said: String = said.chars().take(300).collect();
    if said.is_empty() { format!("HTTP {status}") } else { format!("HTTP {status}: {said}") }
}

/// The message of an error in OpenAI's shape, or in another.
fn message(error: &Value) -> String {
    let found =
        ["/error/message", "/message", "/error", "/detail"].into_iter().find_map(|at| error.pointer(at)?.as_str());
    found.or(error.as_str()).map_or_else(|| error.to_string(), str::to_string)
}

/// Why a request did not come to an answer.
fn unreachable_reason(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            "nothing listens there: connection refused".to_string()
        }
        ureq::Error::Io(e) => kind(e),
        ureq::Error::HostNotFound => "there is no such host".to_string(),
        ureq::Error::Timeout(_) => "timed out".to_string(),
        other => other.to_string(),
    }
}

/// An error of a connection, without what differs from one to the next.
fn kind(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::TimedOut => "timed out".to_string(),
        _ => error.to_string(),
    }
}

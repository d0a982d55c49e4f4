//! Log-probabilities in the shapes that the APIs give them.

use serde_json::{Map, Value, json};

use crate::engine::sampling::Sampled;
use crate::text::Tokenizer;

/// What stands for negative infinity, which JSON cannot write; OpenAI's own choice.
const LOWEST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(LOWEST)
}

/// How tokens are named: by their text, or by number as `token_id:7`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Naming<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) as_ids: bool,
}

impl Naming<'_> {
    /// A token's name. Bytes that are no text of their own are written as `bytes:\xe2\x80`, as OpenAI has it.
    pub(super) fn name(&self, id: u32) -> String {
        if self.as_ids {
            return format!("token_id:{id}");
        }
        let bytes = self.tokenizer.token_bytes(id);
        String::from_utf8(bytes).unwrap_or_else(|error| {
            let escaped = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
            format!("bytes:{escaped}")
        })
    }

    fn of_chat(&self, id: u32, logprob: f32) -> Value {
        json!({ "token": self.name(id), "logprob": finite(logprob), "bytes": self.tokenizer.token_bytes(id) })
    }

    /// `logprobs` of a chat choice: each token with `top` alternatives.
    pub(super) fn chat(&self, tokens: &[Sampled]) -> Value {
        let entry = |token: &Sampled| {
            let mut entry = self.of_chat(token.id, token.logprob);
            entry["top_logprobs"] = token.top.iter().map(|&(id, logprob)| self.of_chat(id, logprob)).collect();
            entry
        };
        json!({ "content": tokens.iter().map(entry).collect::<Value>(), "refusal": null })
    }

    /// `prompt_logprobs` in vLLM's shape: null for the first token, then the token and its alternatives by id.
    pub(super) fn prompt(&self, tokens: &[Sampled]) -> Value {
        let entry = |token: &Sampled| {
            let rank = token.top.iter().position(|&(id, _)| id == token.id).map(|index| index + 1);
            let top = token.top.iter().enumerate().map(|(index, &(id, logprob))| (id, logprob, Some(index + 1)));
            let all = top.chain([(token.id, token.logprob, rank)]);
            let of = |(id, logprob, rank): (u32, f32, Option<usize>)| {
                let told = json!({ "logprob": finite(logprob), "rank": rank, "decoded_token": self.name(id) });
                (id.to_string(), told)
            };
            Value::Object(all.map(of).collect::<Map<_, _>>())
        };
        std::iter::once(Value::Null).chain(tokens.iter().map(entry)).collect()
    }
}

/// `logprobs` of a text completion: four lists of one entry a token.
#[derive(Debug, Default)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Characters before the next token.
    offset: usize,
}

impl CompletionLogprobs {
    /// Adds a token; `sampled` is `None` of the first token of a prompt, of which nothing is known.
    pub(super) fn push(&mut self, naming: &Naming<'_>, id: u32, sampled: Option<&Sampled>) {
        let name = naming.name(id);
        self.text_offset.push(self.offset);
        self.offset += naming.tokenizer.decode(&[id], false).chars().count();
        self.token_logprobs.push(sampled.map(|sampled| finite(sampled.logprob)));
        self.top_logprobs.push(sampled.map_or(Value::Null, |sampled| {
            let mut top: Map<String, Value> =
                sampled.top.iter().map(|&(id, logprob)| (naming.name(id), json!(finite(logprob)))).collect();
            top.insert(name.clone(), json!(finite(sampled.logprob)));
            Value::Object(top)
        }));
        self.tokens.push(name);
    }

    /// What was added since the last call.
    pub(super) fn take(&mut self) -> Value {
        let offset = self.offset;
        let taken = std::mem::replace(self, CompletionLogprobs { offset, ..CompletionLogprobs::default() });
        json!({
            "tokens": taken.tokens,
            "token_logprobs": taken.token_logprobs,
            "top_logprobs": taken.top_logprobs,
            "text_offset": taken.text_offset,
        })
    }
}

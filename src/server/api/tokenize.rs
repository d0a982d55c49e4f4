//! `POST /tokenize` and `/detokenize`: what the model sees of a text, or of a conversation.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::server::app::App;
use crate::server::error::ApiError;

use super::conversation::TemplateFields;
use super::fields::{refuse_unknown, take};
use super::tools::ToolFields;

#[derive(Debug, Deserialize)]
struct TokenizeFields {
    #[serde(default)]
    prompt: Option<String>,
    #[serde(default)]
    messages: Option<Vec<Value>>,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    return_token_strs: bool,
}

#[derive(Debug, Deserialize)]
struct PromptFields {
    #[serde(default)]
    add_special_tokens: Option<bool>,
}

/// Ids of a text, or of the prompt that a conversation makes.
///
/// # Errors
/// What is wrong with the request.
pub(in crate::server) fn tokenize(app: &App, mut body: Map<String, Value>) -> Result<Value, ApiError> {
    let fields: TokenizeFields = take(&mut body)?;
    app.check_model(fields.model.as_deref())?;
    let ids = match (fields.prompt, fields.messages) {
        (Some(text), None) => {
            let special: PromptFields = take(&mut body)?;
            refuse_unknown(&body)?;
            app.encode("prompt", &text, special.add_special_tokens.unwrap_or(true))?
        }
        (None, Some(messages)) => {
            let template: TemplateFields = take(&mut body)?;
            let tools: ToolFields = take(&mut body)?;
            refuse_unknown(&body)?;
            template.render(app, messages, &tools.resolve()?.tools)?.ids
        }
        _ => return Err(ApiError::invalid("prompt", "expected either `prompt` or `messages`")),
    };
    let strings = fields
        .return_token_strs
        .then(|| ids.iter().map(|&id| app.tokenizer.id_to_token(id).unwrap_or_default()).collect::<Vec<_>>());
    Ok(json!({
        "count": ids.len(),
        "max_model_len": app.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }))
}

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    tokens: Vec<u32>,
    #[serde(default)]
    model: Option<String>,
}

/// The text of ids, special tokens written out.
///
/// # Errors
/// What is wrong with the request.
pub(in crate::server) fn detokenize(app: &App, mut body: Map<String, Value>) -> Result<Value, ApiError> {
    let fields: DetokenizeFields = take(&mut body)?;
    refuse_unknown(&body)?;
    app.check_model(fields.model.as_deref())?;
    if let Some(id) = fields.tokens.iter().find(|&&id| id as usize >= app.vocab_size) {
        let reason = format!("token id {id} is outside the vocabulary of {}", app.vocab_size);
        return Err(ApiError::invalid("tokens", reason));
    }
    Ok(json!({ "prompt": app.tokenizer.decode(&fields.tokens, false) }))
}

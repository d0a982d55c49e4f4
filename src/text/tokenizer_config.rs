//! What the files beside tokenizer.json say about a tokenizer: special tokens by role, tokens to add to its vocabulary,
//! and whether a begin and an end go around a text. Which file counts when is transformers' rule (5.24).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{read_object, text_error};
use crate::error::Result;

const FILE: &str = "tokenizer_config.json";
/// Tokenizer classes that make their post-processor of `add_bos_token` and `add_eos_token`; all others leave it to
/// tokenizer.json and ignore the two.
const OBEYS_FLAGS: [&str; 4] = ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"];

/// The files beside tokenizer.json, read.
#[derive(Debug, Default)]
pub(super) struct TokenizerConfig {
    /// Special tokens by role (`bos_token`).
    pub(super) roles: BTreeMap<String, String>,
    /// Whether the begin-of-sequence token goes before a text; `None` leaves it to tokenizer.json.
    pub(super) add_bos: Option<bool>,
    /// The same for the end-of-sequence token after it.
    pub(super) add_eos: Option<bool>,
    /// Tokens with the ids that their file gives them.
    listed: BTreeMap<u32, AddedToken>,
    /// Tokens that are special whether listed or not.
    special: Vec<AddedToken>,
}

impl TokenizerConfig {
    /// Reads tokenizer_config.json; and where that has no `added_tokens_decoder`, special_tokens_map.json, which then
    /// overrides it, and added_tokens.json.
    pub(super) fn read(dir: &Path) -> Result<TokenizerConfig> {
        let config = read_object(dir, FILE)?.unwrap_or_default();
        let mut found = TokenizerConfig::default();
        found.take_special(&config);
        match config.get("added_tokens_decoder").filter(|v| !v.is_null()) {
            Some(decoder) => found
                .take_decoder(decoder)
                .map_err(|reason| text_error(&dir.join(FILE), format!("`added_tokens_decoder`: {reason}")))?,
            None => {
                found.take_special(&read_object(dir, "special_tokens_map.json")?.unwrap_or_default());
                if let Some(added) = read_object(dir, "added_tokens.json")? {
                    found.take_added(&added).map_err(|reason| text_error(&dir.join("added_tokens.json"), reason))?;
                }
            }
        }
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let (bos, eos) = (flag("add_bos_token"), flag("add_eos_token"));
        if bos.or(eos).is_some() && obeys_flags(dir, &config)? {
            (found.add_bos, found.add_eos) = (bos, eos);
        }
        Ok(found)
    }

    /// Roles and lists of special tokens.
    fn take_special(&mut self, from: &Map<String, Value>) {
        for (key, value) in from {
            match (key.as_str(), value) {
                ("additional_special_tokens" | "extra_special_tokens", Value::Array(list)) => {
                    self.special.extend(list.iter().filter_map(|value| token(value, true)));
                }
                ("extra_special_tokens", Value::Object(roles)) => self.take_roles(roles),
                _ => {}
            }
        }
        self.take_roles(from);
    }

    fn take_roles(&mut self, from: &Map<String, Value>) {
        for (role, value) in from.iter().filter(|(role, _)| role.ends_with("_token")) {
            if let Some(token) = token(value, true) {
                self.roles.insert(role.clone(), token.content.clone());
                self.special.push(token);
            }
        }
    }

    fn take_decoder(&mut self, decoder: &Value) -> Result<(), String> {
        let decoder = decoder.as_object().ok_or("expected an object of ids and tokens")?;
        for (id, value) in decoder {
            let parsed: u32 = id.parse().map_err(|_| format!("`{id}` is not a token id"))?;
            let token = token(value, false).filter(|_| value.is_object());
            let token = token.ok_or_else(|| format!("`{id}`: expected an object with `content`"))?;
            self.listed.insert(parsed, token);
        }
        Ok(())
    }

    fn take_added(&mut self, added: &Map<String, Value>) -> Result<(), String> {
        let special: HashSet<&str> = self.special.iter().map(|token| token.content.as_str()).collect();
        for (content, id) in added {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| format!("`{content}`: expected a token id"))?;
            self.listed.insert(id, AddedToken::from(content.clone(), special.contains(content.as_str())));
        }
        Ok(())
    }

    /// Adds every token to the vocabulary of `inner`, which gives ids in order; returns what differs from the files.
    pub(super) fn extend(&self, inner: &mut tokenizers::Tokenizer) -> tokenizers::Result<Vec<String>> {
        let special: HashSet<&str> = self.special.iter().map(|token| token.content.as_str()).collect();
        let listed = self.listed.values().map(|token| AddedToken {
            special: token.special || special.contains(token.content.as_str()),
            ..token.clone()
        });
        // How a token is matched stands in the first place that lists it.
        let mut known: HashMap<String, AddedToken> =
            inner.get_added_tokens_decoder().into_values().map(|token| (token.content.clone(), token)).collect();
        known.extend(listed.clone().map(|token| (token.content.clone(), token)));
        let special = self
            .special
            .iter()
            .map(|token| AddedToken { special: true, ..known.get(&token.content).unwrap_or(token).clone() });
        inner.add_tokens(listed.chain(special).collect::<Vec<_>>())?;
        let differs = self.listed.iter().filter_map(|(&id, token)| {
            let got = inner.token_to_id(&token.content).filter(|&got| got != id)?;
            Some(format!("added token `{}` says id {id}, but the vocabulary makes it {got}", token.content))
        });
        Ok(differs.collect())
    }
}

/// A token as these files write it: its text, or an object with `content` and how it is matched; one that has a role is special
/// whatever that says.
fn token(value: &Value, has_role: bool) -> Option<AddedToken> {
    if let Some(content) = value.as_str() {
        return Some(AddedToken::from(content, true));
    }
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = has_role || flag("special").unwrap_or(false);
    let token = AddedToken::from(value.get("content")?.as_str()?, special);
    let token = token.single_word(flag("single_word").unwrap_or(false));
    let token = token.lstrip(flag("lstrip").unwrap_or(false)).rstrip(flag("rstrip").unwrap_or(false));
    Some(token.normalized(flag("normalized").unwrap_or(!special)))
}

fn obeys_flags(dir: &Path, config: &Map<String, Value>) -> Result<bool> {
    let named = |from: &Map<String, Value>| Some(from.get("tokenizer_class")?.as_str()?.to_string());
    let class = match named(config) {
        Some(class) => Some(class),
        None => read_object(dir, "config.json")?.as_ref().and_then(named),
    };
    Ok(class.is_some_and(|class| OBEYS_FLAGS.contains(&class.trim_end_matches("Fast"))))
}

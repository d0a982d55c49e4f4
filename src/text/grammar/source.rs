//! What a text is to be held to, as a request says it, and as the grammar parser wants it.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

/// Longest source in bytes; of a schema, as JSON without blanks.
pub const MAX_SOURCE_BYTES: usize = 256 << 10;

/// Longest Lark grammar in bytes: long chains of terminals take time with the square of their number.
pub const MAX_LARK_BYTES: usize = 64 << 10;

/// Most levels of arrays and objects that a schema may have one in the other.
pub const MAX_SCHEMA_DEPTH: usize = 100;

/// What may stand between two tokens of JSON: one blank, or a line break and an indentation. A model that has nothing better to say goes on
/// with blanks for ever where it may.
const BLANKS: &str = r"\x20|\x0D?\x0A[\x20\x09]{0,40}";

/// What an output must be, from its first character to its last.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema accepts, keys in the schema's order. Of the drafts from 4 to 2020-12 what can be told while the text is written;
    /// a keyword that cannot (`not`, `if`, `uniqueItems`, ...) is an error, and so is a `oneOf` whose branches may overlap. Remote
    /// schemas are not fetched.
    JsonSchema(Value),
    /// A text that a regular expression matches as a whole, in the syntax of Rust's `regex` crate without look-around and anchors inside.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A context-free grammar in llguidance's variant of Lark, whose start is the rule `start`.
    Lark(String),
}

/// The same in one of the parser's languages, a different one for constraints that differ: also the key of what is compiled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Source {
    Json(String),
    Lark(String),
}

impl Constraint {
    /// Its source.
    ///
    /// # Errors
    /// What is wrong with it: too long, too deep, or no choice.
    pub(super) fn source(&self) -> Result<Source, String> {
        match self {
            Constraint::JsonObject => Ok(Source::Json(json!({ "type": "object" }).to_string())),
            Constraint::JsonSchema(schema) => {
                if is_deeper_than(schema, MAX_SCHEMA_DEPTH) {
                    return Err(format!("is nested more than {MAX_SCHEMA_DEPTH} levels deep"));
                }
                bounded(schema.to_string(), MAX_SOURCE_BYTES).map(Source::Json)
            }
            Constraint::Regex(regex) => {
                let regex = bounded(without_anchors(regex).to_string(), MAX_SOURCE_BYTES)?;
                Ok(Source::Lark(format!("start: /{}/", llguidance::regex_to_lark(&regex, ""))))
            }
            Constraint::Choice(choices) if choices.is_empty() => Err("is empty; give at least one text".to_string()),
            Constraint::Choice(choices) => {
                // JSON's strings are Lark's.
                let choices: Vec<String> =
                    choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
                bounded(choices.join(" | "), MAX_SOURCE_BYTES).map(|choices| Source::Lark(format!("start: {choices}")))
            }
            Constraint::Lark(grammar) => bounded(grammar.clone(), MAX_LARK_BYTES).map(Source::Lark),
        }
    }
}

impl Source {
    pub(super) fn len(&self) -> usize {
        match self {
            Source::Json(text) | Source::Lark(text) => text.len(),
        }
    }

    /// What the parser compiles.
    ///
    /// # Errors
    /// Those of JSON.
    pub(super) fn grammar(&self) -> Result<TopLevelGrammar, serde_json::Error> {
        match self {
            Source::Lark(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
            Source::Json(text) => {
                let mut schema: Value = serde_json::from_str(text)?;
                if let Value::Object(fields) = &mut schema {
                    // Options of the parser in a schema are ours alone.
                    fields.insert("x-guidance".to_string(), json!({ "whitespace_pattern": BLANKS }));
                }
                Ok(TopLevelGrammar::from_json_schema(schema))
            }
        }
    }
}

/// Most that the least common multiple of all `multipleOf` of a schema may be: the parser counts remainders, one state for each.
const MAX_MULTIPLE: u64 = 10_000;

/// Fails where the remainders that a schema's `multipleOf`s make would take more states than there is time or memory for; compiling cannot be
/// stopped once it has begun. A grammar may hold schemas too, so text is looked at.
fn check_multiples(source: &str) -> Result<(), String> {
    let text = without_escapes(source);
    let mut common = 1u64;
    for (at, key) in text.match_indices("multipleOf") {
        let value = text[at + key.len()..].trim_start_matches(|c: char| c == '"' || c == ':' || c.is_whitespace());
        let digits: String = value.chars().take_while(|c| c.is_ascii_digit() || ".eE+-".contains(*c)).collect();
        // Its digits without the decimal point: of 0.25 it is the 25 that counts.
        let coefficient = digits.split(['e', 'E']).next().unwrap_or_default().replace(['.', '+', '-'], "");
        let Ok(n) = coefficient.trim_start_matches('0').trim_end_matches('0').parse::<u64>() else { continue };
        // The zeros of 5000 count where it is an integer.
        let n = digits.parse::<u64>().unwrap_or(n).max(1);
        common = (common / gcd(common, n)).saturating_mul(n);
        if common > MAX_MULTIPLE {
            return Err(format!(
                "holds `multipleOf`s whose least common multiple is above {MAX_MULTIPLE}, which takes too long"
            ));
        }
    }
    Ok(())
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Text with its JSON escapes of four digits resolved.
fn without_escapes(source: &str) -> String {
    let mut parts = source.split("\\u");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..4).and_then(|digits| u32::from_str_radix(digits, 16).ok()).and_then(char::from_u32);
        match code {
            Some(c) => {
                text.push(c);
                text.push_str(&part[4..]);
            }
            None => text.push_str(part),
        }
    }
    text
}

fn bounded(source: String, most: usize) -> Result<String, String> {
    check_multiples(&source)?;
    match source.len() {
        len if len > most => Err(format!("is {len} bytes long, more than {} KiB", most >> 10)),
        _ => Ok(source),
    }
}

/// Whether arrays and objects lie in one another on more levels. Takes no stack.
fn is_deeper_than(value: &Value, most: usize) -> bool {
    let mut level = vec![value];
    for _ in 0..=most {
        level = level.into_iter().flat_map(children).collect();
    }
    !level.is_empty()
}

fn children(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => Vec::new(),
    }
}

/// The whole text is matched anyway: `^` at the start and `$` at the end say so once more.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let backslashes = |text: &str| text.len() - text.trim_end_matches('\\').len();
    regex.strip_suffix('$').filter(|rest| backslashes(rest) % 2 == 0).unwrap_or(regex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiples_are_counted_together() {
        let schema = |values: &[&str]| {
            let all: Vec<String> = values.iter().map(|value| format!("{{\"multipleOf\": {value}}}")).collect();
            check_multiples(&format!("{{\"allOf\": [{}]}}", all.join(","))).is_ok()
        };
        assert!(schema(&["0.01"]) && schema(&["5", "10", "25", "50", "100"]) && schema(&["60", "24", "7"]));
        assert!(schema(&["0.25", "0.5"]) && schema(&["-3", "x", ""]));
        assert!(
            !schema(&["9973", "9967"]) && !schema(&["99999989"]) && !schema(&["50000"]) && !schema(&["0.99999989"])
        );
        assert!(!schema(&["18446744073709551615", "18446744073709551557"]));
        assert!(check_multiples("%json {\"multiple\\u004ff\": 20011}").is_err());
    }
}

//! The fields that hold an output to a grammar: OpenAI's `response_format`, vLLM's `structured_outputs` and its older names.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::server::error::ApiError;
use crate::text::Constraint;

/// Fields of a request; at most one of them may be given.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct StructuredFields {
    response_format: Option<Map<String, Value>>,
    structured_outputs: Option<Map<String, Value>>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
}

/// A constraint, and the field that it came from.
pub(super) type Asked = (Constraint, String);

impl StructuredFields {
    /// What the output is to be held to, if anything.
    ///
    /// # Errors
    /// 400 naming a field that is malformed, not supported, or contradicts another.
    pub(super) fn constraint(self) -> Result<Option<Asked>, ApiError> {
        let of_format = self.response_format.map(of_response_format).transpose()?.flatten();
        let of_outputs = self.structured_outputs.map(of_structured_outputs).transpose()?.flatten();
        let older = |field: &str, constraint| Some((constraint, field.to_owned()));
        let all = [
            of_format,
            of_outputs,
            self.guided_json.map(schema).transpose()?.and_then(|schema| older("guided_json", schema)),
            self.guided_regex.and_then(|regex| older("guided_regex", Constraint::Regex(regex))),
            self.guided_choice.and_then(|choice| older("guided_choice", Constraint::Choice(choice))),
            self.guided_grammar.and_then(|grammar| older("guided_grammar", Constraint::Lark(grammar))),
        ];
        let mut given = all.into_iter().flatten();
        let first = given.next();
        if let (Some((_, first)), Some((_, second))) = (&first, given.next()) {
            return Err(ApiError::invalid(second, format!("cannot be given beside {first}")));
        }
        Ok(first)
    }
}

/// A schema, as an object or as a text that holds one.
fn schema(value: Value) -> Result<Constraint, ApiError> {
    match value {
        Value::String(text) => serde_json::from_str(&text)
            .map(Constraint::JsonSchema)
            .map_err(|e| ApiError::invalid("guided_json", format!("is not JSON: {e}"))),
        schema => Ok(Constraint::JsonSchema(schema)),
    }
}

fn of_response_format(mut format: Map<String, Value>) -> Result<Option<Asked>, ApiError> {
    let kind = format.remove("type");
    match kind.as_ref().and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some((Constraint::JsonObject, "response_format".into()))),
        Some("json_schema") => {
            // The Responses API has the schema beside the type, Chat Completions one level down.
            let schema = match format.remove("json_schema") {
                Some(Value::Object(mut inner)) => inner.remove("schema"),
                Some(_) => return Err(ApiError::invalid("response_format.json_schema", "expected an object")),
                None => format.remove("schema"),
            };
            let schema = schema.filter(|schema| !schema.is_null());
            let schema =
                schema.ok_or_else(|| ApiError::invalid("response_format.json_schema.schema", "is required"))?;
            Ok(Some((Constraint::JsonSchema(schema), "response_format.json_schema.schema".into())))
        }
        Some("regex") => text(&mut format, "pattern", "response_format.pattern", Constraint::Regex),
        Some("grammar") => text(&mut format, "grammar", "response_format.grammar", Constraint::Lark),
        _ => {
            Err(ApiError::invalid("response_format.type", "expected text, json_object, json_schema, regex or grammar"))
        }
    }
}

fn text(
    format: &mut Map<String, Value>,
    key: &str,
    field: &str,
    of: impl Fn(String) -> Constraint,
) -> Result<Option<Asked>, ApiError> {
    match format.remove(key) {
        Some(Value::String(text)) => Ok(Some((of(text), field.to_owned()))),
        _ => Err(ApiError::invalid(field, "expected a text")),
    }
}

fn of_structured_outputs(outputs: Map<String, Value>) -> Result<Option<Asked>, ApiError> {
    let mut asked = None;
    for (name, value) in outputs.into_iter().filter(|(_, value)| !value.is_null()) {
        let field = format!("structured_outputs.{name}");
        let wrong = |expected: &str| ApiError::invalid(&field, format!("expected {expected}"));
        let constraint = match (name.as_str(), value) {
            ("json", Value::String(text)) => {
                Constraint::JsonSchema(serde_json::from_str(&text).map_err(|e| wrong(&format!("JSON: {e}")))?)
            }
            ("json", schema) => Constraint::JsonSchema(schema),
            ("json_object", Value::Bool(true)) => Constraint::JsonObject,
            ("json_object" | "disable_any_whitespace" | "disable_fallback", Value::Bool(false)) => continue,
            ("regex", Value::String(regex)) => Constraint::Regex(regex),
            ("grammar", Value::String(grammar)) => Constraint::Lark(grammar),
            ("choice", choices) => {
                Constraint::Choice(serde_json::from_value(choices).map_err(|_| wrong("a list of texts"))?)
            }
            ("json_object" | "regex" | "grammar", _) => return Err(wrong("a text, or true")),
            _ => {
                return Err(ApiError::invalid(
                    &field,
                    "is not supported: expected json, json_object, regex, choice or grammar",
                ));
            }
        };
        if asked.is_some() {
            return Err(ApiError::invalid(field, "cannot be given beside another constraint"));
        }
        asked = Some((constraint, field));
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn asked(body: Value) -> Result<Option<Asked>, Option<String>> {
        let fields: StructuredFields = serde_json::from_value(body).unwrap();
        fields.constraint().map_err(|error| error.param)
    }

    #[test]
    fn each_name_is_understood() {
        let schema = json!({ "type": "object" });
        let openai = json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema, "strict": true } } });
        assert_eq!(
            asked(openai),
            Ok(Some((Constraint::JsonSchema(schema.clone()), "response_format.json_schema.schema".into())))
        );
        assert_eq!(asked(json!({ "response_format": { "type": "text" } })), Ok(None));
        assert_eq!(
            asked(json!({ "response_format": { "type": "json_object" } })),
            Ok(Some((Constraint::JsonObject, "response_format".into())))
        );
        let choice = json!({ "structured_outputs": { "choice": ["a", "b"], "json_object": false, "regex": null } });
        assert_eq!(
            asked(choice),
            Ok(Some((Constraint::Choice(vec!["a".into(), "b".into()]), "structured_outputs.choice".into())))
        );
        assert_eq!(
            asked(json!({ "guided_json": schema.to_string() })),
            Ok(Some((Constraint::JsonSchema(schema), "guided_json".into())))
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, field) in [
            (json!({ "response_format": {} }), "response_format.type"),
            (json!({ "response_format": { "type": "yaml" } }), "response_format.type"),
            (json!({ "response_format": { "type": "json_schema" } }), "response_format.json_schema.schema"),
            (json!({ "response_format": { "type": "json_schema", "json_schema": 1 } }), "response_format.json_schema"),
            (json!({ "structured_outputs": { "regex": 1 } }), "structured_outputs.regex"),
            (json!({ "structured_outputs": { "structural_tag": "x" } }), "structured_outputs.structural_tag"),
            (json!({ "structured_outputs": { "choice": [1] } }), "structured_outputs.choice"),
            (json!({ "guided_regex": "a", "guided_choice": ["a"] }), "guided_choice"),
        ] {
            assert_eq!(asked(body.clone()), Err(Some(field.to_owned())), "{body}");
        }
    }
}

//! What the tools' schemas say of their parameters.

use std::collections::HashMap;

use serde_json::Value;

/// How a value that is written without quotes is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A string, whatever it looks like.
    Text,
    /// `null`, or a string.
    TextOrNull,
    /// JSON, or a string where it is none.
    Json,
}

/// The kinds of all parameters of all tools.
#[derive(Debug, Clone, Default)]
pub(super) struct Parameters(HashMap<String, HashMap<String, Kind>>);

impl Parameters {
    /// From tools in OpenAI's shape; what has another is passed over.
    pub(super) fn of(tools: &[Value]) -> Parameters {
        let of_tool = |tool: &Value| {
            let (name, parameters) = function(tool)?;
            let properties = parameters.get("properties").and_then(Value::as_object);
            let kinds = properties.into_iter().flatten().map(|(key, schema)| (key.clone(), kind(schema))).collect();
            Some((name.to_string(), kinds))
        };
        Parameters(tools.iter().filter_map(of_tool).collect())
    }

    pub(super) fn kind(&self, tool: &str, parameter: &str) -> Kind {
        self.0.get(tool).and_then(|kinds| kinds.get(parameter)).copied().unwrap_or(Kind::Json)
    }
}

/// Name and parameters of a tool: `{"type": "function", "function": {"name": .., "parameters": {..}}}`, or the inner object alone.
pub(super) fn function(tool: &Value) -> Option<(&str, &Value)> {
    let function = tool.get("function").unwrap_or(tool);
    Some((function.get("name")?.as_str()?, function.get("parameters").unwrap_or(&Value::Null)))
}

/// The kind of a parameter by its schema.
pub(super) fn kind(schema: &Value) -> Kind {
    let mut types = Vec::new();
    let alternatives = ["anyOf", "oneOf"].into_iter().find_map(|word| schema.get(word)?.as_array());
    for schema in alternatives.map_or(std::slice::from_ref(schema), Vec::as_slice) {
        let values = schema.get("enum").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        match schema.get("type") {
            Some(Value::String(name)) => types.push(name.as_str()),
            Some(Value::Array(names)) => types.extend(names.iter().filter_map(Value::as_str)),
            _ if values.is_empty() && schema.get("const").is_none() => return Kind::Json,
            _ => types.extend(values.iter().chain(schema.get("const")).map(|value| match value {
                Value::String(_) => "string",
                Value::Null => "null",
                _ => "other",
            })),
        }
    }
    match (types.contains(&"string"), types.contains(&"null")) {
        (true, _) if types.iter().any(|name| !matches!(*name, "string" | "null")) => Kind::Json,
        (true, false) => Kind::Text,
        (true, true) => Kind::TextOrNull,
        (false, _) => Kind::Json,
    }
}

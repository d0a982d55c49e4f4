//! Grammars that make a model call tools and do nothing else, in llguidance's dialect of Lark
//! (<https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md>).

use serde_json::{Map, Value, json};

use super::format::ToolFormat;
use super::parameters::{Kind, function, kind};
use super::{hermes, is_name, mistral};
use crate::error::{Error, Result};

/// The id of a marker that is a special token.
type Special<'a> = &'a dyn Fn(&str) -> Option<u32>;

/// A tool whose schema was looked at.
struct Tool<'a> {
    name: &'a str,
    /// A schema of objects.
    parameters: Value,
    /// Where it stands in the request, for errors.
    what: String,
}

impl ToolFormat {
    /// A grammar in llguidance's dialect of Lark that makes a model call tools and do nothing else: one of `tools` (in OpenAI's
    /// shape), or where `parallel` one or more calls in a row. [`ReplyParser`](super::ReplyParser) reads all that it allows.
    ///
    /// `special` gives the id of a marker that the tokenizer has as a special token, which no text can spell.
    ///
    /// # Errors
    /// [`Error::Input`] when there are no tools, or one has no name or parameters that are no object.
    pub fn call_grammar(
        self,
        tools: &[Value],
        parallel: bool,
        special: impl Fn(&str) -> Option<u32>,
    ) -> Result<String> {
        let special: Special = &special;
        let tools = tools.iter().enumerate().map(|(i, tool)| Tool::new(i, tool)).collect::<Result<Vec<_>>>()?;
        if tools.is_empty() {
            return Err(Error::input("tools", "expected at least one tool, since a call is demanded"));
        }
        let start = |separator: &str| match parallel {
            true => format!("start: call ({} call)*\n", text(separator)),
            false => "start: call\n".to_string(),
        };
        let marker = |name: &str| marker(name, special);
        Ok(match self {
            ToolFormat::Hermes => {
                let (open, close) = (marker(hermes::OPEN), marker(hermes::CLOSE));
                let object = any_object(&tools, "arguments", "#");
                start("\n") + &format!("call: {open} \"\\n\" object \"\\n\" {close}\nobject: {}\n", compact(&object))
            }
            ToolFormat::Llama3Json => {
                let object = any_object(&tools, "parameters", "#");
                start("; ") + &format!("call: {}\n", compact(&object))
            }
            // Models whose vocabulary has the newer form's marker were trained on it.
            ToolFormat::Mistral if special(mistral::ARGS).is_some() => {
                let (open, args) = (marker(mistral::CALLS), marker(mistral::ARGS));
                let calls = rules(&tools, |_, tool| {
                    Ok(format!("{open} {} {args} {}\n", text(tool.name), compact(&tool.parameters)))
                })?;
                format!("start: call{}\n{calls}", if parallel { "+" } else { "" })
            }
            ToolFormat::Mistral => {
                let mut array =
                    json!({"type": "array", "items": any_object(&tools, "arguments", "#/items"), "minItems": 1});
                if !parallel {
                    array["maxItems"] = json!(1);
                }
                format!("start: {} {}\n", marker(mistral::CALLS), compact(&array))
            }
            ToolFormat::Glm45 => {
                let (open, close) = (marker(hermes::OPEN), marker(hermes::CLOSE));
                let values = Values {
                    before_key: marker("<arg_key>"),
                    before_value: format!("{} \"\\n\" {}", marker("</arg_key>"), marker("<arg_value>")),
                    line_end: "",
                    end: "</arg_value>",
                    special,
                };
                let calls = rules(&tools, |rule, tool| {
                    let (arguments, more) = values.of(rule, tool)?;
                    Ok(format!("{open} {} \"\\n\" {arguments} {close}\n{more}", text(tool.name)))
                })?;
                start("\n") + &calls
            }
            ToolFormat::Qwen3Coder => {
                let (open, close) = (marker(hermes::OPEN), marker(hermes::CLOSE));
                let values = Values {
                    before_key: text("<parameter="),
                    before_value: text(">\n"),
                    line_end: "\n",
                    end: "</parameter>",
                    special,
                };
                let calls = rules(&tools, |rule, tool| {
                    let (arguments, more) = values.of(rule, tool)?;
                    let name = text(&format!("\n<function={}>\n", tool.name));
                    Ok(format!("{open} {name} {arguments} \"</function>\\n\" {close}\n{more}"))
                })?;
                start("\n") + &calls
            }
        })
    }
}

impl<'a> Tool<'a> {
    fn new(i: usize, tool: &'a Value) -> Result<Tool<'a>> {
        let what = format!("tools[{i}]");
        let Some((name, parameters)) = function(tool).filter(|(name, _)| !name.is_empty() && name.chars().all(is_name))
        else {
            return Err(Error::input(
                what,
                "expected a function with a name of letters, digits, `_`, `-`, `.`, `:`, `/`",
            ));
        };
        let parameters = match parameters {
            // Without any, a function takes none.
            Value::Null => json!({"type": "object", "properties": {}, "additionalProperties": false}),
            Value::Object(map) => {
                let mut map = map.clone();
                let is_told = ["type", "$ref", "anyOf", "oneOf", "allOf"].iter().any(|word| map.contains_key(*word));
                if !is_told {
                    map.insert("type".to_string(), json!("object"));
                }
                // A function takes the arguments that are declared; schemas seldom say that it takes no others.
                if map.contains_key("properties") && !map.contains_key("patternProperties") {
                    map.entry("additionalProperties").or_insert(json!(false));
                }
                Value::Object(map)
            }
            _ => return Err(Error::input(format!("{what}.function.parameters"), "expected a JSON schema, an object")),
        };
        if parameters.get("type").is_some_and(|kind| kind != "object") {
            return Err(Error::input(format!("{what}.function.parameters.type"), "expected `object`"));
        }
        Ok(Tool { name, parameters, what })
    }
}

/// `call: call_0 | call_1`, and of each tool its rule; `rule` gives what follows the colon, from the rule's name.
fn rules(tools: &[Tool], rule: impl Fn(&str, &Tool) -> Result<String>) -> Result<String> {
    let names: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
    let mut all = format!("call: {}\n", names.join(" | "));
    for (tool, name) in tools.iter().zip(&names) {
        all.push_str(&format!("{name}: {}", rule(name, tool)?));
    }
    Ok(all)
}

/// The schema of `{"name": .., KEY: ..}` of any of the tools, to stand at `at` in a document.
fn any_object(tools: &[Tool], key: &str, at: &str) -> Value {
    let object = |(i, tool): (usize, &Tool)| {
        let mut parameters = tool.parameters.clone();
        move_references(&mut parameters, &format!("{at}/anyOf/{i}/properties/{key}"));
        json!({
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: parameters},
            "required": ["name", key],
            "additionalProperties": false,
        })
    };
    json!({"anyOf": tools.iter().enumerate().map(object).collect::<Vec<_>>()})
}

/// JSON of a schema, with blanks where Python's `json.dumps` has them and nowhere else: so models write calls, and one that has nothing to
/// say does not fill the output with blanks.
fn compact(schema: &Value) -> String {
    let mut schema = schema.clone();
    if let Value::Object(fields) = &mut schema {
        let blanks = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
        fields.insert("x-guidance".into(), blanks);
    }
    format!("%json {schema}")
}

/// References within a schema, which is to stand at `at` in another document.
fn move_references(schema: &mut Value, at: &str) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(to) if key == "$ref" && to.starts_with('#') => *to = format!("{at}{}", &to[1..]),
                    value => move_references(value, at),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| move_references(value, at)),
        _ => {}
    }
}

/// How a format of tags writes arguments.
struct Values<'a> {
    before_key: String,
    before_value: String,
    /// Before the marker that ends a value.
    line_end: &'static str,
    end: &'static str,
    special: Special<'a>,
}

impl Values<'_> {
    /// All arguments of a tool in the order of its schema, and the rules that this needs, their names beginning with `rule`.
    fn of(&self, rule: &str, tool: &Tool) -> Result<(String, String)> {
        let Some(properties) = tool.parameters.get("properties").and_then(Value::as_object) else {
            let rules = format!("{rule}_key: /[^<>\\s]+/\n{rule}_value{}", self.text_value());
            return Ok((format!("({})*", self.argument(&format!("{rule}_key"), &format!("{rule}_value"))), rules));
        };
        let required = tool.parameters.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let (mut arguments, mut rules) = (String::new(), String::new());
        for (i, (key, schema)) in properties.iter().enumerate() {
            if key.is_empty() || key.contains(|c: char| c == '<' || c == '>' || c.is_control()) {
                let what = format!("{}.function.parameters.properties", tool.what);
                return Err(Error::input(what, format!("`{key}`: this model's tool calls cannot hold such a name")));
            }
            let is_optional = !required.iter().any(|name| name == key);
            let argument = self.argument(&text(key), &format!("{rule}_{i}"));
            arguments.push_str(&format!("({argument}){} ", if is_optional { "?" } else { "" }));
            rules.push_str(&format!("{rule}_{i}{}", self.value(tool, key, schema)));
        }
        Ok((arguments, rules))
    }

    fn argument(&self, key: &str, value: &str) -> String {
        format!("{} {key} {} {value} \"\\n\"", self.before_key, self.before_value)
    }

    /// A rule's end: a value by its schema and the marker behind it.
    fn value(&self, tool: &Tool, key: &str, schema: &Value) -> String {
        let end = match self.line_end {
            "" => marker(self.end, self.special),
            line_end => format!("{} {}", text(line_end), marker(self.end, self.special)),
        };
        if kind(schema) == Kind::Json {
            return format!(": {} {end}\n", compact(&standing_alone(tool, key, schema)));
        }
        let listed = schema.get("enum").and_then(Value::as_array).cloned();
        let listed = listed.or_else(|| schema.get("const").map(|value| vec![value.clone()]));
        match listed {
            Some(values) => {
                let values: Vec<String> = values.iter().map(|v| text(v.as_str().unwrap_or("null"))).collect();
                format!(": ({}) {end}\n", values.join(" | "))
            }
            None => self.text_value(),
        }
    }

    /// Any text up to the marker.
    fn text_value(&self) -> String {
        match (self.special)(self.end) {
            Some(id) => format!(": /(.|\\n)*/ <[{id}]>\n"),
            None => format!("[lazy]: /(.|\\n)*{}/\n", self.end.replace('/', "\\/")),
        }
    }
}

/// The schema of one parameter, with all that it refers to.
fn standing_alone(tool: &Tool, key: &str, schema: &Value) -> Value {
    if !schema.to_string().contains("\"$ref\"") {
        return if schema.is_object() { schema.clone() } else { Value::Object(Map::new()) };
    }
    let mut parameters = tool.parameters.clone();
    move_references(&mut parameters, "#/$defs/parameters");
    let key = key.replace('~', "~0").replace('/', "~1");
    json!({"$ref": format!("#/$defs/parameters/properties/{key}"), "$defs": {"parameters": parameters}})
}

/// A marker as a token where it is one, else as text.
fn marker(name: &str, special: Special) -> String {
    special(name).map_or_else(|| text(name), |id| format!("<[{id}]>"))
}

/// A string of Lark.
fn text(text: &str) -> String {
    Value::String(text.to_string()).to_string()
}

//! Which format a model has, by its template; names; grammars of forced calls.

use std::fs;

use lowbit::text::ToolFormat;
use serde_json::{Value, json};

use super::{calls, said, tools_of_the_tests};

fn detect(template: &str, tokens: &[&str]) -> Option<ToolFormat> {
    ToolFormat::detect(template, |token| tokens.contains(&token))
}

#[test]
fn formats_are_found_by_the_template() {
    let fixture = |name: &str| fs::read_to_string(format!("tests/fixtures/chat/{name}.jinja")).unwrap();
    assert_eq!(detect(&fixture("qwen25"), &[]), Some(ToolFormat::Hermes));
    assert_eq!(detect(&fixture("qwen3"), &[]), Some(ToolFormat::Hermes));
    assert_eq!(detect(&fixture("mistral"), &[]), Some(ToolFormat::Mistral));
    assert_eq!(detect(&fixture("llama3"), &[]), Some(ToolFormat::Llama3Json));
    assert_eq!(detect(&fixture("chatml"), &["<tool_call>"]), None, "it takes no tools");
    let glm = "{% for tool in tools %}<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value></tool_call>{% endfor %}";
    assert_eq!(detect(glm, &[]), Some(ToolFormat::Glm45), "before hermes");
    let coder =
        "{% if tools %}<tool_call>\n<function=f>\n<parameter=p>\nv\n</parameter>\n</function>\n</tool_call>{% endif %}";
    assert_eq!(detect(coder, &[]), Some(ToolFormat::Qwen3Coder), "before hermes");
    let mistral = "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS]{{ '[TOOL_CALLS] [' }}";
    assert_eq!(detect(mistral, &["<tool_call>"]), Some(ToolFormat::Mistral));
    let llama = r#"<|start_header_id|>{{ tools }}{"name": function name, "parameters": dictionary}"#;
    assert_eq!(detect(llama, &[]), Some(ToolFormat::Llama3Json));
    // A template that shows no format of its own: by the vocabulary.
    let plain = "{{ tools | tojson }}";
    assert_eq!(detect(plain, &["[TOOL_CALLS]"]), Some(ToolFormat::Mistral));
    assert_eq!(detect(plain, &["<|python_tag|>"]), Some(ToolFormat::Llama3Json));
    assert_eq!(detect(plain, &[]), None);
}

#[test]
fn formats_have_vllms_names() {
    let names: Vec<String> = ToolFormat::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["hermes", "llama3_json", "mistral", "glm45", "qwen3_coder"]);
    for (name, format) in names.iter().zip(ToolFormat::ALL) {
        assert_eq!(name.parse::<ToolFormat>().unwrap(), format);
    }
    let error = "pythonic".parse::<ToolFormat>().unwrap_err().to_string();
    assert!(error.contains("--tool-call-parser: `pythonic`") && error.contains("llama3_json"), "{error}");
}

fn grammar(format: ToolFormat, tools: &[Value], parallel: bool) -> String {
    format.call_grammar(tools, parallel, |_| None).unwrap()
}

/// Written after llguidance's description of its syntax.
#[test]
fn grammars_of_forced_calls() {
    let now = [json!({"type": "function", "function": {"name": "now"}})];
    let nothing = r#""type":"object","properties":{},"additionalProperties":false"#;
    let blanks = r#""x-guidance":{"whitespace_flexible":false,"item_separator":", ","key_separator":": "}"#;
    let object = |key: &str| {
        format!(
            r#"{{"anyOf":[{{"type":"object","properties":{{"name":{{"const":"now"}},"{key}":{{{nothing}}}}},"required":["name","{key}"],"additionalProperties":false}}],{blanks}}}"#
        )
    };
    assert_eq!(
        grammar(ToolFormat::Hermes, &now, false),
        format!(
            "start: call\ncall: \"<tool_call>\" \"\\n\" object \"\\n\" \"</tool_call>\"\nobject: %json {}\n",
            object("arguments")
        )
    );
    assert_eq!(
        grammar(ToolFormat::Llama3Json, &now, true),
        format!("start: call (\"; \" call)*\ncall: %json {}\n", object("parameters"))
    );
    let special = |marker: &str| ["[TOOL_CALLS]", "[ARGS]"].iter().position(|m| *m == marker).map(|i| i as u32 + 5);
    assert_eq!(
        ToolFormat::Mistral.call_grammar(&now, true, special).unwrap(),
        format!("start: call+\ncall: call_0\ncall_0: <[5]> \"now\" <[6]> %json {{{nothing},{blanks}}}\n")
    );
    let place = &tools_of_the_tests()[..1];
    let coder = grammar(ToolFormat::Qwen3Coder, place, false);
    assert!(
        coder.contains("(\"<parameter=\" \"city\" \">\\n\" call_0_0 \"\\n\") (\"<parameter=\" \"days\""),
        "{coder}"
    );
    assert!(coder.contains("\ncall_0_0[lazy]: /(.|\\n)*<\\/parameter>/\n"), "text: {coder}");
    let days = format!("\ncall_0_1: %json {{\"type\":\"integer\",{blanks}}} \"\\n\" \"</parameter>\"\n");
    assert!(coder.contains(&days), "JSON: {coder}");
    assert!(coder.contains("\ncall_0_2: (\"celsius\" | \"fahrenheit\") \"\\n\" \"</parameter>\"\n"), "listed: {coder}");
    // What a schema refers to within itself moves with it.
    let hermes = grammar(ToolFormat::Hermes, place, false);
    assert!(hermes.contains(r##""$ref":"#/anyOf/0/properties/arguments/$defs/place""##), "{hermes}");
    let mistral = grammar(ToolFormat::Mistral, place, false);
    assert!(mistral.contains(r##""$ref":"#/items/anyOf/0/properties/arguments/$defs/place""##), "{mistral}");
    assert!(mistral.trim_end().contains(r#""minItems":1,"maxItems":1,"#), "{mistral}");
    let glm = grammar(ToolFormat::Glm45, place, false);
    assert!(glm.contains(r##"{"$ref":"#/$defs/parameters/properties/where","$defs":{"parameters":"##), "{glm}");
}

#[test]
fn what_no_call_can_be_made_of_is_refused() {
    let error = |tools: &[Value]| ToolFormat::Glm45.call_grammar(tools, true, |_| None).unwrap_err().to_string();
    assert_eq!(error(&[]), "tools: expected at least one tool, since a call is demanded");
    let ok = json!({"name": "f"});
    assert!(error(&[ok.clone(), json!({"name": "a b"})]).starts_with("tools[1]: expected a function with a name"));
    assert!(error(&[json!({"type": "function"})]).starts_with("tools[0]: expected a function"));
    let with = |parameters: Value| json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
    assert!(error(&[with(json!([]))]).starts_with("tools[0].function.parameters: expected a JSON schema"));
    assert_eq!(error(&[with(json!({"type": "string"}))]), "tools[0].function.parameters.type: expected `object`");
    let key = error(&[with(json!({"properties": {"a<b": {}}}))]);
    assert!(key.starts_with("tools[0].function.parameters.properties: `a<b`"), "{key}");
}

/// Texts that the grammars allow, blanks and all, are calls and nothing else.
#[test]
fn what_the_grammars_allow_is_read() {
    let both = [("get_weather", r#"{"city":"x"}"#), ("now", "{}")];
    let texts = [
        (
            ToolFormat::Hermes,
            "<tool_call>\n{\"name\":\"get_weather\",\"arguments\":{\"city\":\"x\"}}\n</tool_call>\n<tool_call>\n{\"name\":\"now\",\"arguments\":{}}\n</tool_call>",
        ),
        (
            ToolFormat::Llama3Json,
            "{\"name\":\"get_weather\",\"parameters\":{\"city\":\"x\"}}; {\"name\":\"now\",\"parameters\":{}}",
        ),
        (
            ToolFormat::Mistral,
            "[TOOL_CALLS][{\"name\":\"get_weather\",\"arguments\":{\"city\":\"x\"}},{\"name\":\"now\",\"arguments\":{}}]",
        ),
        (ToolFormat::Mistral, "[TOOL_CALLS]get_weather[ARGS]{\"city\":\"x\"}[TOOL_CALLS]now[ARGS]{}"),
    ];
    for (format, text) in texts {
        assert_eq!(calls(format, text), said("", &both), "{format}");
    }
    let both = [("get_weather", r#"{"city": "x"}"#), ("now", "{}")];
    let glm = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>";
    assert_eq!(calls(ToolFormat::Glm45, glm), said("", &both));
    let coder = "<tool_call>\n<function=get_weather>\n<parameter=city>\nx\n</parameter>\n</function>\n</tool_call>\n\
                 <tool_call>\n<function=now>\n</function>\n</tool_call>";
    assert_eq!(calls(ToolFormat::Qwen3Coder, coder), said("", &both));
}

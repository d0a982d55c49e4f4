//! Calls of each format, whole, wrong, and cut anywhere.

use lowbit::text::{ReplyPart, ToolFormat};
use proptest::prelude::*;

use super::{calls, parser, read_pieces, said};

#[test]
fn hermes() {
    let read = |text: &str| calls(ToolFormat::Hermes, text);
    let weather = r#"<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}
</tool_call>"#;
    let call = ("get_weather", r#"{"city": "Paris", "days": 3}"#);
    assert_eq!(read(weather), said("", &[call]));
    assert_eq!(read(&format!("Let me look.\n{weather}\n{weather}\n")), said("Let me look.\n", &[call, call]));
    assert_eq!(read(&format!("{weather} Between. {weather}")), said("Between. ", &[call, call]));
    // The arguments are the model's own text, to the blank.
    let odd = r#"<tool_call>{"name":"f","arguments":{"s":"a \"} é \\","n":[1.50,-2e+3,true,null,{}],  "m":{"k":{}}}}</tool_call>"#;
    let arguments = r#"{"s":"a \"} é \\","n":[1.50,-2e+3,true,null,{}],  "m":{"k":{}}}"#;
    assert_eq!(read(odd), said("", &[("f", arguments)]));
    // In another order, with more, and without arguments.
    assert_eq!(
        read(r#"<tool_call>{"arguments": {"a": 1}, "x": [2], "name": "f", "y": 0}</tool_call>."#),
        said(".", &[("f", r#"{"a": 1}"#)])
    );
    assert_eq!(read(r#"<tool_call>{"name": "now"}</tool_call>"#), said("", &[("now", "{}")]));
    // Two objects in the same tags.
    let two = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(read(two), said("", &[("f", "{}"), ("g", "{}")]));
    // A line end in a string, which JSON does not allow, is escaped: the arguments are JSON.
    assert_eq!(
        read("<tool_call>{\"name\": \"f\", \"arguments\": {\"s\": \"a\nb\"}}</tool_call>"),
        said("", &[("f", r#"{"s": "a\nb"}"#)])
    );
    // A string may hold the closing tag.
    let tag = r#"{"s": "</tool_call>"}"#;
    assert_eq!(
        read(&format!(r#"<tool_call>{{"name": "f", "arguments": {tag}}}</tool_call>"#)),
        said("", &[("f", tag)])
    );
}

#[test]
fn llama3_json() {
    let read = |text: &str| calls(ToolFormat::Llama3Json, text);
    let weather = r#"{"name": "get_weather", "parameters": {"city": "Paris"}}"#;
    let call = ("get_weather", r#"{"city": "Paris"}"#);
    assert_eq!(read(weather), said("", &[call]));
    assert_eq!(read(&format!("\n<|python_tag|>{weather}")), said("\n", &[call]));
    assert_eq!(read(&format!("{weather}; {weather};{weather}\n")), said("", &[call, call, call]));
    assert_eq!(read(&format!("I look. <|python_tag|>{weather} So.")), said("I look. So.", &[call]));
    assert_eq!(
        read(r#"{"type": "function", "name": "f", "arguments": {"a": {}}}"#),
        said("", &[("f", r#"{"a": {}}"#)])
    );
    // JSON that is no call, as a question may ask for.
    for text in [
        r#"{"name": "Ada", "born": 1815}"#,
        r#"{"name": "Ada"}"#,
        r#"{"answer": {"name": "f", "parameters": {}}}"#,
        r#"[{"name": "f", "parameters": {}}]"#,
        r#"{"name": 3, "parameters": {}}"#,
        r#"{"name": "f", "parameters": 3}"#,
        "<|python_tag|>print(1)",
        "{",
        " ",
    ] {
        assert_eq!(read(text), said(text, &[]));
    }
    // Inside a text only what the tag announces is a call.
    assert_eq!(read(&format!("Like {weather}")), said(&format!("Like {weather}"), &[]));
}

#[test]
fn mistral() {
    let read = |text: &str| calls(ToolFormat::Mistral, text);
    let call = ("get_weather", r#"{"city": "Paris"}"#);
    assert_eq!(
        read(
            r#"[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]"#
        ),
        said("", &[call, ("now", "{}")])
    );
    assert_eq!(
        read(r#"Ok.[TOOL_CALLS][{"arguments": {"city": "Paris"}, "name": "get_weather"}]"#),
        said("Ok.", &[call])
    );
    assert_eq!(read(r#"[TOOL_CALLS]{"name": "get_weather", "arguments": {"city": "Paris"}}"#), said("", &[call]));
    // Since version 11 of the tokenizer.
    assert_eq!(
        read(r#"[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}"#),
        said("", &[call, ("now", "{}")])
    );
    assert_eq!(
        read("[TOOL_CALLS] get_weather {\"city\": \"Paris\"}\n[TOOL_CALLS]now{}"),
        said("", &[call, ("now", "{}")])
    );
    let with_id =
        read(r#"[TOOL_CALLS]now[CALL_ID]VvvODy9mT[ARGS]{} [TOOL_CALLS][{"id": "a1", "name": "f", "arguments": {}}]"#);
    let id = |id: &str| Some(id.to_string());
    assert_eq!(with_id.calls[0], (id("VvvODy9mT"), "now".to_string(), "{}".to_string()));
    assert_eq!(with_id.calls[1], (id("a1"), "f".to_string(), "{}".to_string()));
    assert_eq!(with_id.content, "");
    for text in [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] Hello, you",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS]f[ARGS]3",
        "[TOOL_CALLS]f g{}",
        "[TOOL_CALLS][ARGS]{}",
        "[TOOL_CALLS]f[ARGS",
        "[TOOL_CALLS]f[ARx",
        "[TOOL_CALLS]f[CALL_ID][ARGS]{}",
        "[TOOL",
        "a[b]c",
    ] {
        assert_eq!(read(text), said(text, &[]));
    }
}

#[test]
fn glm45() {
    let read = |text: &str| calls(ToolFormat::Glm45, text);
    let text = "Looking.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>12 \"a\"\nb</arg_value>\n<arg_key>days</arg_key>\n\
                <arg_value>3</arg_value>\n<arg_key>where</arg_key>\n<arg_value>{\"x\": 1.50}</arg_value>\n</tool_call>\n\
                <tool_call>now\n</tool_call>";
    let weather = ("get_weather", r#"{"city": "12 \"a\"\nb", "days": 3, "where": {"x": 1.50}}"#);
    assert_eq!(read(text), said("Looking.\n", &[weather, ("now", "{}")]));
    // All in one line, as GLM-4.7 has it. What has no schema is JSON where it can be, else a string.
    let text = "<tool_call>f<arg_key>a</arg_key><arg_value>[1]</arg_value><arg_key>b</arg_key><arg_value>[1</arg_value>\
                <arg_key>c</arg_key><arg_value>True</arg_value><arg_key>d</arg_key><arg_value></arg_value></tool_call>";
    assert_eq!(read(text), said("", &[("f", r#"{"a": [1], "b": "[1", "c": true, "d": ""}"#)]));
    // A string by its schema is one whatever it looks like; where `null` is allowed, that is none.
    let text = |key: &str, value: &str| {
        format!("<tool_call>get_weather<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>")
    };
    let cases =
        [("city", "3", "\"3\""), ("city", "null", "\"null\""), ("unit", "true", "\"true\""), ("note", "null", "null")];
    for (key, value, json) in cases.into_iter().chain([("note", "3", "\"3\""), ("days", "many", "\"many\"")]) {
        assert_eq!(read(&text(key, value)), said("", &[("get_weather", &format!("{{\"{key}\": {json}}}"))]));
    }
    for text in [
        "<tool_call></tool_call>",
        "<tool_call>{\"name\": 1}</tool_call>",
        "<tool_call>two words<arg_key>",
        "<tool_call>f",
    ] {
        assert_eq!(read(text), said(text, &[]));
    }
}

#[test]
fn qwen3_coder() {
    let read = |text: &str| calls(ToolFormat::Qwen3Coder, text);
    let body = "<function=get_weather>\n<parameter=city>\n New\n\nYork\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>";
    let weather = ("get_weather", r#"{"city": " New\n\nYork", "days": 3}"#);
    assert_eq!(read(&format!("Ok.\n<tool_call>\n{body}\n</tool_call>")), said("Ok.\n", &[weather]));
    assert_eq!(read(&format!("<tool_call>\n{body}\n{body}\n</tool_call>\n\n")), said("", &[weather, weather]));
    assert_eq!(read(body), said("", &[weather]), "without the outer tags");
    assert_eq!(read("<tool_call><function=now></function></tool_call>."), said(".", &[("now", "{}")]));
    assert_eq!(
        read("<function=get_weather><parameter=city>\n</parameter><parameter=note>a</b</parameter></function>"),
        said("", &[("get_weather", r#"{"city": "", "note": "a</b"}"#)])
    );
    for text in ["<tool_call>\nf", "<function=>", "<tool_call>{}</tool_call>", "<function=a b>", "<function=f"] {
        assert_eq!(read(text), said(text, &[]));
    }
}

/// What is no call is content, to the last character; what was told of a call stays.
#[test]
fn malformed_calls_are_not_lost() {
    let read = |text: &str| calls(ToolFormat::Hermes, text);
    for text in [
        "<tool_call>",
        "<tool_cal",
        "<tool_call>none</tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call>\"f\"</tool_call>",
        "<tool_call>3",
        "<tool_call>{}</tool_call>",
        r#"<tool_call>{"arguments": {"a": 1}}</tool_call>"#,
        r#"<tool_call>{"name": "f", "arguments": "{}"}</tool_call>"#,
        r#"<tool_call>{"name": ["f"], "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "f" "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "\x", "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>"#,
        "</tool_call>",
    ] {
        assert_eq!(read(text), said(text, &[]));
    }
    assert_eq!(
        read("<tool_call>no <tool_call>{\"name\": \"now\"}</tool_call>"),
        said("<tool_call>no ", &[("now", "{}")]),
        "the next is read"
    );
    let open = r#"<tool_call>{"name": "f", "arguments": {"a": "#;
    assert_eq!(read(&format!("{open}01}}}}")), said("1}}", &[("f", "{\"a\": 0")]), "no JSON from there on");
    assert_eq!(read(open), said("", &[("f", "{\"a\": ")]), "the text ended");
    assert_eq!(
        read(r#"<tool_call>{"name": "f", "arguments": {}, "b": x}"#),
        said(", \"b\": x}", &[("f", "{}")]),
        "behind the arguments"
    );
    assert_eq!(
        read(r#"<tool_call>{"name": "f", "arguments": {}}}</tool_call>"#),
        said("}</tool_call>", &[("f", "{}")])
    );
    // Tags: what was told stays open, so that nobody takes half the arguments for all of them.
    assert_eq!(
        calls(ToolFormat::Glm45, "<tool_call>f<arg_key>a</arg_key>1</tool_call>"),
        said("1</tool_call>", &[("f", "{\"a\": ")])
    );
    assert_eq!(calls(ToolFormat::Glm45, "<tool_call>f<arg_key></arg_key>"), said("<arg_key></arg_key>", &[("f", "{")]));
}

#[test]
fn memory_and_depth_are_bounded() {
    for format in ToolFormat::ALL {
        let opened = match format {
            ToolFormat::Hermes => "<tool_call>{\"x\": \"",
            ToolFormat::Llama3Json => "{\"name\": \"",
            ToolFormat::Mistral => "[TOOL_CALLS][{\"x\": \"",
            ToolFormat::Glm45 => "<tool_call>",
            ToolFormat::Qwen3Coder => "<tool_call>",
        };
        for filler in ["a", " ", "\n"] {
            let mut parser = parser(None, Some(format), false);
            let mut told: usize = parser.push(opened).len();
            for _ in 0..20 {
                told += parser.push(&filler.repeat(10_000)).len();
            }
            assert!(told > 0, "{format} holds more than 64 KiB of {filler:?}");
        }
    }
    let deep = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {{\"a\": {}", "[".repeat(100_000));
    let reply = read_pieces(parser(None, Some(ToolFormat::Hermes), false), [deep.as_str()]);
    assert_eq!(
        reply.calls[0].2,
        format!("{{\"a\": {}", "[".repeat(126)),
        "as deep as serde_json reads: 128 with the two objects"
    );
    assert_eq!(reply.content.len(), 100_000 - 126);
    // A value of tags without a schema, too long to be held, becomes a string.
    let long = "1".repeat(100_000);
    let text = format!("<tool_call>f<arg_key>a</arg_key><arg_value>{long}</arg_value></tool_call>");
    let reply = read_pieces(parser(None, Some(ToolFormat::Glm45), false), [text.as_str()]);
    assert_eq!(reply.calls[0].2, format!("{{\"a\": \"{long}\"}}"));
}

/// Nothing but the start of a marker is held back, and of a call what comes before its arguments.
#[test]
fn parts_come_as_soon_as_they_are_certain() {
    let content = |text: &str| vec![ReplyPart::Content(text.to_string())];
    let arguments = |delta: &str| ReplyPart::ToolArguments { index: 0, delta: delta.to_string() };
    let call = ReplyPart::ToolCall { index: 0, id: None, name: "f".to_string() };
    let mut hermes = parser(None, Some(ToolFormat::Hermes), false);
    assert_eq!(hermes.push("a < b <"), content("a < b "));
    assert_eq!(hermes.push("tool"), []);
    assert_eq!(hermes.push("s> <tool_call"), content("<tools> "));
    assert_eq!(hermes.push(">\n{\"name\": \"f\""), []);
    assert_eq!(hermes.push(", \"arguments\": {"), [call.clone(), arguments("{")]);
    assert_eq!(hermes.push("\"a\": \"x"), [arguments("\"a\": \"x")]);
    assert_eq!(hermes.push("y\"}"), [arguments("y\"}")]);
    assert_eq!(hermes.push("}\n</tool_call>\nb"), content("b"));
    let mut glm = parser(None, Some(ToolFormat::Glm45), false);
    assert_eq!(glm.push("<tool_call>f\n<arg_key>"), [call, arguments("{")]);
    assert_eq!(glm.push("city</arg_key>\n<arg_value>3"), [arguments("\"city\": ")], "f has no schema");
    assert_eq!(glm.push("</arg_value>"), [arguments("3")]);
    let mut coder = parser(None, Some(ToolFormat::Qwen3Coder), false);
    coder.push("<function=get_weather>\n<parameter=city>\n");
    assert_eq!(coder.push("Par\n"), [arguments("\"Par")], "a string comes as it is written");
    assert_eq!(coder.push("is"), [arguments("\\nis")]);
}

proptest! {
    /// Whatever a model writes: no panic, the same however it is cut, and text without markers comes through.
    #[test]
    fn the_same_wherever_text_is_cut(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<function=", ">", "</function>",
            "<parameter=", "</parameter>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>",
            "{\"name\": \"f\"", ", \"arguments\": {", ", \"parameters\": {", "}", "}", "{", "[", "]", "\"", "\\", ":", ",", "0", "e", "-", "é", " ",
            "\n", "f", "null", "city", ";", "x", "[AR", "<arg_", "<func", "\n</para",
        ]), 0..30),
        format in prop::sample::select(ToolFormat::ALL.to_vec()),
        inside: bool,
    ) {
        use lowbit::text::ReasoningFormat::Think;
        let text = pieces.concat();
        let make = || parser(Some(Think), Some(format), inside);
        let whole = super::read(make, &text);
        if whole.calls.is_empty() && !inside && !text.contains("think>") {
            prop_assert_eq!(&whole.content, &text, "nothing is lost");
        }
        prop_assert_eq!(read_pieces(make(), pieces), whole);
    }

    /// Every call that is written is read, with the arguments that were written.
    #[test]
    fn calls_come_back(arguments in "\\{(\"[a-zé\\\\\"<>]{1,3}\": (1|\"x\"|\\[\\]))?\\}", name in "[a-z_]{1,8}", content in "[a-z <]{0,9}") {
        prop_assume!(serde_json::from_str::<serde_json::Value>(&arguments).is_ok());
        let texts = [
            (ToolFormat::Hermes, format!("{content}<tool_call>{{\"name\": \"{name}\", \"arguments\": {arguments}}}</tool_call>")),
            (ToolFormat::Mistral, format!("{content}[TOOL_CALLS]{name}[ARGS]{arguments}")),
            (ToolFormat::Llama3Json, format!("{content}<|python_tag|>{{\"name\": \"{name}\", \"parameters\": {arguments}}}")),
        ];
        for (format, text) in texts {
            prop_assert_eq!(calls(format, &text), said(&content, &[(&name, &arguments)]));
        }
    }
}

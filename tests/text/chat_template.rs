//! Chat templates against transformers (tests/fixtures/chat/generate.py), and hostile ones.

use std::collections::BTreeMap;
use std::fs;

use lowbit::error::Error;
use lowbit::text::{ChatInput, ChatTemplate};
use serde_json::{Value, json};

fn input(case: &Value, now: u64) -> ChatInput {
    let list = |name: &str| case.get(name).and_then(Value::as_array).cloned();
    let flag = |name: &str| case.get(name).and_then(Value::as_bool).unwrap_or(false);
    ChatInput {
        messages: list("messages").expect("messages"),
        tools: list("tools"),
        documents: list("documents"),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        extra: case.get("extra").and_then(Value::as_object).cloned().unwrap_or_default(),
        now: Some(now),
    }
}

fn user(content: &str) -> ChatInput {
    ChatInput { messages: vec![json!({"role": "user", "content": content})], ..ChatInput::default() }
}

#[test]
fn renders_as_transformers() {
    let golden: Value = serde_json::from_slice(&fs::read("tests/fixtures/chat/golden.json").unwrap()).unwrap();
    let special: BTreeMap<String, String> = serde_json::from_value(golden["special"].clone()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 30);
    let mut wrong = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let name = case["template"].as_str().unwrap();
        let source = fs::read_to_string(format!("tests/fixtures/chat/{name}.jinja")).unwrap();
        let template = ChatTemplate::from_source(&source, special.clone()).unwrap();
        let got = template.render(&input(&case["input"], golden["now"].as_u64().unwrap()));
        match (&case["expected"], &got) {
            (Value::String(expected), Ok(got)) if expected == got => {}
            // Refusals carry the template's own words.
            (Value::Null, Err(Error::Input { reason, .. })) if reason.contains(case["error"].as_str().unwrap()) => {}
            (expected, got) => wrong.push(format!("case {i} of {name}\nexpected {expected}\ngot      {got:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// Python's string methods, Jinja's filters and functions, and `%`: each line against Jinja2 (tests/fixtures/chat/methods.py).
#[test]
fn methods_and_filters_are_jinjas() {
    let golden: Vec<(String, String)> =
        serde_json::from_slice(&fs::read("tests/fixtures/chat/methods.json").unwrap()).unwrap();
    assert!(golden.len() >= 15);
    let mut wrong = Vec::new();
    for (template, expected) in golden {
        let got = ChatTemplate::from_source(&template, BTreeMap::new()).and_then(|t| t.render(&user("hi")));
        if got.as_ref().ok() != Some(&expected) {
            wrong.push(format!("{template}\nexpected {expected:?}\ngot      {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn methods_that_cannot_be_end_in_an_error() {
    let refused = |template: &str| match ChatTemplate::from_source(template, BTreeMap::new())
        .and_then(|t| t.render(&user("hi")))
    {
        Err(Error::Text { reason, .. }) => reason,
        other => panic!("{template}: {other:?}"),
    };
    for (template, part) in [
        ("{{ 'a'.index('b') }}", "not found"),
        ("{{ 'a'.split('') }}", "separator is empty"),
        ("{{ 'a'.partition('') }}", "separator is empty"),
        ("{{ 'a'.zfill(10000000000) }}", "65536"),
        ("{{ 'a'.center(100000) }}", "65536"),
        ("{{ [1].append(2) }}", "would change a list"),
        ("{{ 'a'|truncate(2) }}", "3 or more"),
        ("{{ ['a']|sum }}", "cannot add"),
        ("{{ '%d' % 'a' }}", ""),
        ("{{ 'a'.nonsense() }}", "nonsense"),
        ("{{ 'a' % ", "syntax"),
    ] {
        let reason = refused(template);
        assert!(reason.contains(part), "{template}: {reason}");
    }
}

#[test]
fn hostile_templates_end_in_an_error() {
    let cases = [
        ("endless loop", "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}"),
        ("huge range", "{% for i in range(1000000000) %}x{% endfor %}"),
        ("recursion", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"),
        ("output", "{% for i in range(100000) %}{{ 'x' * 100000 }}{% endfor %}"),
        ("repetition", "{{ 'x' * 1000000000000 }}"),
        (
            "set blocks",
            "{% for i in range(100000) %}{% set x %}{{ messages[0].content * 100000 }}{% endset %}{% endfor %}",
        ),
        ("unknown filter", "{{ messages | nonsense }}"),
        ("unknown function", "{{ open('/etc/passwd') }}"),
        ("include", "{% include '/etc/passwd' %}"),
        ("attribute of undefined", "{{ nothing.at.all }}"),
        ("no JSON", "{{ raise_exception | tojson }}"),
    ];
    for (what, source) in cases {
        let rendered = ChatTemplate::from_source(source, BTreeMap::new()).and_then(|t| t.render(&user("hi")));
        match rendered {
            Err(Error::Text { reason, .. }) => assert!(reason.contains("chat template"), "{what}: {reason}"),
            other => panic!("{what}: {:?}", other.map(|text| text.len())),
        }
    }
    for source in ["{% if %}", "{{ (((", "{% for x in %}", &"{{ ".repeat(1 << 20), &"(".repeat(100_000)] {
        let broken = format!("{{{{ {source}");
        assert!(matches!(ChatTemplate::from_source(&broken, BTreeMap::new()), Err(Error::Text { .. })));
    }
}

#[test]
fn inputs_of_the_request_cannot_be_replaced() {
    let template = ChatTemplate::from_source("{{ messages }}", BTreeMap::from([("bos_token".into(), "<s>".into())]));
    let template = template.unwrap();
    for name in ["messages", "tools", "bos_token"] {
        let input = ChatInput { extra: json!({name: 1}).as_object().unwrap().clone(), ..user("x") };
        assert!(matches!(template.render(&input), Err(Error::Input { .. })), "{name}");
    }
    let input = ChatInput { messages: vec![json!("text")], ..ChatInput::default() };
    assert!(matches!(template.render(&input), Err(Error::Input { .. })));
    let input = ChatInput { continue_final_message: true, ..ChatInput::default() };
    assert!(matches!(template.render(&input), Err(Error::Input { .. })));
}

#[test]
fn sources_in_order_of_precedence() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    let render = |input: &ChatInput| ChatTemplate::load(dir.path()).unwrap().map(|t| t.render(input).unwrap());
    assert_eq!(render(&user("x")), None);
    write("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}}"#);
    assert_eq!(render(&user("x")), None);

    let named =
        json!([{"name": "default", "template": "plain {{ eos_token }}"}, {"name": "tool_use", "template": "tools"}]);
    write("tokenizer_config.json", &json!({"eos_token": {"content": "</s>"}, "chat_template": named}).to_string());
    assert_eq!(render(&user("x")).unwrap(), "plain </s>");
    assert_eq!(render(&ChatInput { tools: Some(vec![]), ..user("x") }).unwrap(), "tools");
    let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
    assert_eq!(template.source(), "plain {{ eos_token }}tools");
    write("chat_template.json", r#"{"chat_template": "from json"}"#);
    assert_eq!(render(&user("x")).unwrap(), "from json");
    write("chat_template.jinja", "from jinja");
    assert_eq!(render(&user("x")).unwrap(), "from jinja");

    for bad in ["[1]", "{", r#"{"chat_template": 5}"#, r#"{"chat_template": [{"name": "a"}]}"#] {
        fs::remove_file(dir.path().join("chat_template.jinja")).ok();
        write("chat_template.json", bad);
        let error = ChatTemplate::load(dir.path());
        assert!(matches!(&error, Err(Error::Text { what, .. }) if what.contains("chat_template.json")), "{error:?}");
    }
}

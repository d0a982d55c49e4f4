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

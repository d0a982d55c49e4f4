//! Tools, grammars and the other APIs. A demo model that knows no tools calls one where a grammar makes it.

use std::sync::OnceLock;

use serde_json::{Value, json};

use super::{Answer, Server};

/// A server that reads calls as Hermes models write them.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&["--max-num-seqs", "8", "--tool-call-parser", "hermes"]))
}

fn tools() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": { "city": { "enum": ["Rome", "Oslo"] }, "days": { "type": "integer", "minimum": 1, "maximum": 7 } },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    json!([
        { "type": "function", "function": { "name": "weather", "description": "Tells it.", "parameters": parameters } },
        { "type": "function", "function": { "name": "clock", "parameters": { "type": "object", "properties": {}, "additionalProperties": false } } },
    ])
}

fn chat(extra: Value) -> Value {
    let mut request = json!({
        "messages": [{ "role": "user", "content": "How is the weather in Rome?" }],
        "max_tokens": 200,
        "temperature": 0.7,
        "seed": 11,
    });
    extra.as_object().expect("an object").iter().for_each(|(name, value)| request[name] = value.clone());
    request
}

fn check_weather(arguments: &str) {
    let arguments: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {arguments}"));
    assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().expect("a text")), "{arguments}");
    assert!((1..=7).contains(&arguments["days"].as_i64().expect("a number")), "{arguments}");
    assert_eq!(arguments.as_object().map(serde_json::Map::len), Some(2));
}

#[test]
fn a_named_function_is_called() {
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    let request = chat(json!({ "tools": tools(), "tool_choice": named, "parallel_tool_calls": false }));
    let got = server().post("/v1/chat/completions", &request).ok();
    let choice = &got["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    let calls = choice["message"]["tool_calls"].as_array().expect("calls");
    assert_eq!(
        (calls.len(), &calls[0]["type"], &calls[0]["function"]["name"]),
        (1, &json!("function"), &json!("weather"))
    );
    let arguments = calls[0]["function"]["arguments"].as_str().expect("a text");
    check_weather(arguments);

    // The same seed streams the same call.
    let mut request = request;
    request["stream"] = json!(true);
    let events = server().post("/v1/chat/completions", &request).events();
    let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"][0].as_object());
    let streamed: String = deltas.clone().filter_map(|call| call["function"]["arguments"].as_str()).collect();
    assert_eq!(streamed, arguments);
    let names: Vec<&Value> = deltas.filter_map(|call| call["function"].get("name")).collect();
    assert_eq!(names, [&json!("weather")]);
    assert_eq!(events.last().expect("events")["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn some_function_is_called() {
    for seed in 0..4 {
        let request =
            chat(json!({ "tools": tools(), "tool_choice": "required", "seed": seed, "parallel_tool_calls": false }));
        let got = server().post("/v1/chat/completions", &request).ok();
        let call = &got["choices"][0]["message"]["tool_calls"][0]["function"];
        match call["name"].as_str() {
            Some("weather") => check_weather(call["arguments"].as_str().expect("a text")),
            Some("clock") => assert_eq!(call["arguments"].as_str().map(str::trim), Some("{}")),
            other => panic!("{other:?}"),
        }
    }
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 12 }, "age": { "type": "integer", "minimum": 0, "maximum": 120 } },
        "required": ["name", "age"],
        "additionalProperties": false,
    })
}

fn check_person(text: &str) {
    let person: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(person["name"].as_str().is_some_and(|name| name.chars().count() <= 12), "{person}");
    assert!((0..=120).contains(&person["age"].as_i64().expect("a number")), "{person}");
}

#[test]
fn outputs_follow_grammars() {
    let text = |answer: &Answer| answer.ok()["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
    let ask = |extra: Value| text(&server().post("/v1/chat/completions", &chat(extra)));
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "person", "schema": schema(), "strict": true } });
    check_person(&ask(json!({ "response_format": format })));
    check_person(&ask(json!({ "structured_outputs": { "json": schema() } })));
    check_person(&ask(json!({ "guided_json": schema().to_string() })));
    let choice = ask(json!({ "structured_outputs": { "choice": ["yes", "no", "maybe"] } }));
    assert!(["yes", "no", "maybe"].contains(&choice.as_str()), "{choice}");
    let date = ask(json!({ "structured_outputs": { "regex": "20[0-9]{2}-(0[1-9]|1[0-2])" } }));
    let (year, month) = date.split_once('-').expect("a dash");
    assert!(
        year.starts_with("20") && year.len() == 4 && (1..=12).contains(&month.parse::<u32>().expect("a month")),
        "{date}"
    );
    let lark = ask(json!({ "guided_grammar": "start: \"a\"+ \"b\"", "logit_bias": {}, "temperature": 1.5 }));
    assert!(lark.ends_with('b') && lark[..lark.len() - 1].chars().all(|c| c == 'a') && lark.len() > 1, "{lark}");
    let completion =
        json!({ "prompt": "The answer is", "max_tokens": 50, "structured_outputs": { "choice": ["one", "two"] } });
    let got = server().post("/v1/completions", &completion).ok();
    assert!(["one", "two"].contains(&got["choices"][0]["text"].as_str().expect("text")), "{got}");
    assert_eq!(got["choices"][0]["finish_reason"], "stop");
}

/// Schemas that would take for ever, or that say nothing that can be followed, are refused by name and hold up nobody.
#[test]
fn hostile_grammars() {
    let deep = (0..2000).fold(json!(true), |inner, _| json!({ "not": inner }));
    let alternatives: Vec<Value> = (0..3000).map(|i| json!({ "const": format!("{i}").repeat(200) })).collect();
    for (name, value, field) in [
        ("structured_outputs", json!({ "regex": "(a+" }), "structured_outputs.regex"),
        ("structured_outputs", json!({ "grammar": "start: nothing" }), "structured_outputs.grammar"),
        ("structured_outputs", json!({ "choice": [] }), "structured_outputs.choice"),
        ("structured_outputs", json!({ "json": { "type": "string", "pattern": 7 } }), "structured_outputs.json"),
        ("structured_outputs", json!({ "json": { "$ref": "https://example.com/schema" } }), "structured_outputs.json"),
        ("structured_outputs", json!({ "json": { "anyOf": alternatives } }), "structured_outputs.json"),
        ("guided_json", json!("{"), "guided_json"),
        (
            "guided_json",
            json!({ "allOf": [{ "type": "integer", "multipleOf": 9973 }, { "multipleOf": 9967 }] }),
            "guided_json",
        ),
        (
            "guided_grammar",
            json!("start: %json {\"type\": \"integer\", \"multiple\\u004ff\": 99999989}"),
            "guided_grammar",
        ),
    ] {
        let answer = server().post("/v1/chat/completions", &chat(json!({ name: value })));
        assert_eq!(answer.refused(), (400, field.to_owned()), "{}", answer.body);
    }
    // Deeper than any parser of JSON goes.
    let answer = server().post("/v1/chat/completions", &chat(json!({ "guided_json": deep })));
    assert_eq!(answer.status, 400);
    assert_eq!(server().get("/health").status, 200);
}

#[test]
fn responses() {
    let request =
        json!({ "input": "Tell me a story.", "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0 });
    let got = server().post("/v1/responses", &request).ok();
    assert_eq!((&got["object"], &got["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(got["incomplete_details"]["reason"], "max_output_tokens");
    let item = &got["output"][0];
    assert_eq!((&item["type"], &item["content"][0]["type"]), (&json!("message"), &json!("output_text")));
    let messages =
        json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "Tell me a story." }]);
    let chat = json!({ "messages": messages, "max_tokens": 12, "temperature": 0 });
    let chat = server().post("/v1/chat/completions", &chat).ok();
    assert_eq!(item["content"][0]["text"], chat["choices"][0]["message"]["content"]);
    assert_eq!(got["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
    assert_eq!(got["usage"]["output_tokens"], 12);

    let mut request = request;
    request["stream"] = json!(true);
    let events = named_events(&server().post("/v1/responses", &request));
    let names: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a name")).collect();
    assert_eq!(
        names[..4],
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    assert_eq!(
        names[names.len() - 4..],
        ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"]
    );
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence_number"].as_u64().expect("a number")).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let streamed: String = deltas.map(|event| event["delta"].as_str().expect("text")).collect();
    assert_eq!(streamed, item["content"][0]["text"].as_str().expect("text"));
    assert_eq!(events.last().expect("events")["response"]["usage"], got["usage"]);

    let flat: Value = tools().as_array().expect("a list").iter().map(flattened).collect();
    let request = json!({
        "input": [{ "role": "user", "content": [{ "type": "input_text", "text": "weather?" }] }],
        "tools": flat, "tool_choice": { "type": "function", "name": "weather" }, "parallel_tool_calls": false,
        "text": { "format": { "type": "text" } },
    });
    let got = server().post("/v1/responses", &request).ok();
    assert_eq!((&got["status"], &got["output"][0]["type"]), (&json!("completed"), &json!("function_call")));
    check_weather(got["output"][0]["arguments"].as_str().expect("a text"));
    for (name, value) in
        [("previous_response_id", json!("resp_1")), ("background", json!(true)), ("include", json!(["x"]))]
    {
        let request = json!({ "input": "x", name: value });
        assert_eq!(server().post("/v1/responses", &request).refused(), (400, name.to_owned()));
    }
}

/// A tool in the shape of the Responses API.
fn flattened(tool: &Value) -> Value {
    let mut flat = tool["function"].clone();
    flat["type"] = json!("function");
    flat
}

/// Events whose names are told twice.
fn named_events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut all = Vec::new();
    for event in answer.body.split("\n\n").filter(|event| event.contains("data:")) {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).expect("a field").trim();
        let data: Value = serde_json::from_str(field("data:")).expect("JSON");
        assert_eq!(data["type"], field("event:"));
        all.push(data);
    }
    all
}

#[test]
fn messages() {
    let prompt = json!({ "system": "Be brief.", "messages": [{ "role": "user", "content": "Tell me a story." }] });
    let count = server().post("/v1/messages/count_tokens", &prompt).ok()["input_tokens"].clone();
    let mut request = prompt;
    request["max_tokens"] = json!(12);
    request["temperature"] = json!(0);
    let got = server().post("/v1/messages", &request).ok();
    assert_eq!(
        (&got["type"], &got["role"], &got["stop_reason"]),
        (&json!("message"), &json!("assistant"), &json!("max_tokens"))
    );
    let usage = &got["usage"];
    let input = usage["input_tokens"].as_u64().expect("a number")
        + usage["cache_read_input_tokens"].as_u64().expect("a number");
    assert_eq!((json!(input), &usage["output_tokens"]), (count, &json!(12)));
    let text = got["content"][0]["text"].as_str().expect("text").to_owned();
    request["stream"] = json!(true);
    let events = named_events(&server().post("/v1/messages", &request));
    let names: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a name")).collect();
    assert_eq!(names[..2], ["message_start", "content_block_start"]);
    assert_eq!(names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let streamed: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(streamed, text);

    let tools: Value = tools()
        .as_array()
        .expect("a list")
        .iter()
        .map(|tool| json!({ "name": tool["function"]["name"], "input_schema": tool["function"]["parameters"] }))
        .collect();
    request["stream"] = json!(false);
    request["max_tokens"] = json!(200);
    request["tools"] = tools;
    request["tool_choice"] = json!({ "type": "tool", "name": "weather", "disable_parallel_tool_use": true });
    let got = server().post("/v1/messages", &request).ok();
    assert_eq!((&got["stop_reason"], &got["content"][0]["type"]), (&json!("tool_use"), &json!("tool_use")));
    check_weather(&got["content"][0]["input"].to_string());
    // Its own envelope of errors.
    request["messages"] = json!([{ "role": "user", "content": [{ "type": "image" }] }]);
    let answer = server().post("/v1/messages", &request);
    assert_eq!((answer.status, &answer.json()["type"]), (400, &json!("error")));
    assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
}

//! What each route answers.

use serde_json::{Value, json};

use super::{alone, greedy, shared};

const PROMPT: &str = "It was a dark night, and the old man";

#[test]
fn completions_are_those_of_the_command_line() {
    let expected = alone(PROMPT, 24);
    let mut request = greedy(PROMPT, 24);
    request["logprobs"] = json!(0);
    let got = shared().post("/v1/completions", &request).ok();
    let choice = &got["choices"][0];
    assert_eq!(choice["text"], expected["text"]);
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &Value::Null));
    // There the host works them out, here the device.
    let numbers = |list: &Value| -> Vec<f64> { serde_json::from_value(list.clone()).expect("numbers") };
    let (told, wanted) = (numbers(&choice["logprobs"]["token_logprobs"]), numbers(&expected["logprobs"]));
    assert_eq!(told.len(), wanted.len());
    assert!(told.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-5), "{told:?} {wanted:?}");
    let prompt_tokens = expected["prompt_ids"].as_array().expect("ids").len();
    let usage = &got["usage"];
    assert_eq!(
        [&usage["prompt_tokens"], &usage["completion_tokens"], &usage["total_tokens"]],
        [&json!(prompt_tokens), &json!(24), &json!(prompt_tokens + 24)]
    );
    assert_eq!((&got["object"], &got["model"]), (&json!("text_completion"), &json!(super::DEMO)));
    // The same prompt as ids.
    request["prompt"] = expected["prompt_ids"].clone();
    assert_eq!(shared().post("/v1/completions", &request).ok()["choices"][0]["text"], expected["text"]);
}

/// The pieces of a stream are the text, whatever the stop string cuts off.
#[test]
fn streams_hold_the_same_text() {
    let whole = shared().post("/v1/completions", &greedy(PROMPT, 40)).ok();
    let text = whole["choices"][0]["text"].as_str().expect("text").to_owned();
    let stop: String = text.chars().skip(30).take(5).collect();
    for stop in [None, Some(stop)] {
        let mut request = greedy(PROMPT, 40);
        request["stop"] = json!(stop);
        let whole = shared().post("/v1/completions", &request).ok();
        request["stream"] = json!(true);
        request["stream_options"] = json!({ "include_usage": true });
        let answer = shared().post("/v1/completions", &request);
        assert_eq!(answer.header("content-type"), Some("text/event-stream"));
        let events = answer.events();
        let (usage, pieces) = events.split_last().expect("events");
        let streamed: String = pieces.iter().map(|e| e["choices"][0]["text"].as_str().expect("text")).collect();
        assert_eq!(streamed, whole["choices"][0]["text"].as_str().expect("text"));
        assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole["usage"]));
        let last = &pieces.last().expect("pieces")["choices"][0];
        assert_eq!(
            (&last["finish_reason"], &last["stop_reason"]),
            (&whole["choices"][0]["finish_reason"], &whole["choices"][0]["stop_reason"])
        );
        assert!(stop.is_none() || last["stop_reason"] == json!(stop));
        assert!(stop.is_none_or(|stop| !streamed.contains(&stop)));
    }
}

#[test]
fn chat_follows_the_template() {
    let messages = json!([{ "role": "user", "content": [{ "type": "text", "text": PROMPT }] }]);
    let request =
        json!({ "messages": messages, "max_tokens": 16, "temperature": 0, "logprobs": true, "top_logprobs": 3 });
    let got = shared().post("/v1/chat/completions", &request).ok();
    let choice = &got["choices"][0];
    let tokens = shared().post("/tokenize", &json!({ "messages": messages })).ok()["tokens"].clone();
    let expected =
        shared().post("/v1/completions", &json!({ "prompt": tokens, "max_tokens": 16, "temperature": 0 })).ok();
    assert_eq!(choice["message"]["role"], "assistant");
    // A text that begins an answer loses the blank that one that goes on keeps.
    let text = choice["message"]["content"].as_str().expect("text");
    assert_eq!(text.trim_start(), expected["choices"][0]["text"].as_str().expect("text").trim_start());
    let logprobs = choice["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(logprobs.len(), 16);
    for entry in logprobs {
        let top = entry["top_logprobs"].as_array().expect("a list");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["logprob"], entry["logprob"], "greedy takes the best");
        let bytes: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).expect("bytes");
        assert_eq!(String::from_utf8(bytes).expect("UTF-8"), entry["token"].as_str().expect("text"));
    }

    let mut request = request;
    request["stream"] = json!(true);
    let events = shared().post("/v1/chat/completions", &request).events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let streamed: String =
        events.iter().map(|e| e["choices"][0]["delta"]["content"].as_str().unwrap_or_default()).collect();
    assert_eq!(streamed, text);
    let told: Vec<&Value> =
        events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).flatten().collect();
    assert_eq!(told, logprobs.iter().collect::<Vec<_>>());
}

/// Several prompts with several choices each: number `prompt * n + choice`, each what it is alone.
#[test]
fn prompts_and_choices_have_numbers() {
    let prompts = ["The sea was", "A little girl", "In the morning"];
    let request = json!({ "prompt": prompts, "n": 2, "max_tokens": 8, "temperature": 1, "seed": 7 });
    let got = shared().post("/v1/completions", &request).ok();
    let choices = got["choices"].as_array().expect("choices");
    assert_eq!(
        choices.iter().map(|choice| choice["index"].as_u64()).collect::<Vec<_>>(),
        (0..6).map(Some).collect::<Vec<_>>()
    );
    for (index, prompt) in prompts.iter().enumerate() {
        for choice in 0..2 {
            let request = json!({ "prompt": prompt, "max_tokens": 8, "temperature": 1, "seed": 7 + choice });
            let alone = shared().post("/v1/completions", &request).ok();
            assert_eq!(choices[index * 2 + choice]["text"], alone["choices"][0]["text"], "{prompt} {choice}");
        }
    }
    let mut request = request;
    request["stream"] = json!(true);
    let mut texts = vec![String::new(); 6];
    for event in shared().post("/v1/completions", &request).events() {
        let choice = &event["choices"][0];
        texts[choice["index"].as_u64().expect("a number") as usize].push_str(choice["text"].as_str().expect("text"));
    }
    assert_eq!(texts, choices.iter().map(|choice| choice["text"].as_str().expect("text")).collect::<Vec<_>>());
}

/// `echo` with log-probabilities is how lm-eval scores texts: those of a text are the ones that its tokens had as they were generated.
#[test]
fn echo_scores_a_text() {
    let mut request = greedy(PROMPT, 12);
    request["logprobs"] = json!(2);
    let generated = shared().post("/v1/completions", &request).ok();
    let ids = shared().post("/tokenize", &json!({ "prompt": PROMPT })).ok()["tokens"].clone();
    let continuation = generated["choices"][0]["text"].as_str().expect("text").to_owned();
    let whole = format!("{PROMPT}{continuation}");
    let request = json!({ "prompt": whole, "max_tokens": 0, "echo": true, "logprobs": 2 });
    let scored = shared().post("/v1/completions", &request).ok();
    let choice = &scored["choices"][0];
    assert_eq!(choice["text"].as_str().expect("text").trim_start(), whole);
    let got = choice["logprobs"]["token_logprobs"].as_array().expect("a list");
    assert_eq!(got[0], Value::Null);
    let start = ids.as_array().expect("ids").len();
    let expected = generated["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("a list");
    assert_eq!(got.len(), start + expected.len());
    for (got, expected) in got[start..].iter().zip(expected) {
        let (got, expected) = (got.as_f64().expect("a number"), expected.as_f64().expect("a number"));
        assert!((got - expected).abs() < 1e-3, "{got} {expected}");
    }
    let tokens = choice["logprobs"]["tokens"].as_array().expect("a list");
    assert_eq!(tokens.len(), got.len());
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[test]
fn embeddings_have_length_one() {
    let ask = |request: Value| shared().post("/v1/embeddings", &request).ok();
    let got = ask(json!({ "input": ["the sea", "the ocean", "a ledger of debts"], "pooling": "mean" }));
    let vectors: Vec<Vec<f32>> = got["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|entry| serde_json::from_value(entry["embedding"].clone()).expect("numbers"))
        .collect();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    for vector in &vectors {
        assert!((dot(vector, vector) - 1.0).abs() < 1e-4);
    }
    assert!(dot(&vectors[0], &vectors[1]) < 0.9999, "different texts differ");
    let alone = ask(json!({ "input": "the ocean", "pooling": "mean", "encoding_format": "base64" }));
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(alone["data"][0]["embedding"].as_str().expect("text"));
    let decoded: Vec<f32> =
        bytes.expect("base64").chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect();
    assert_eq!(decoded, vectors[1], "the same alone as in a batch");
}

#[test]
fn what_the_server_says_of_itself() {
    let server = shared();
    assert_eq!(server.get("/health").ok(), json!({ "status": "ok" }));
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    let models = server.get("/v1/models").ok();
    assert_eq!(models["data"][0]["id"], super::DEMO);
    assert_eq!(models["data"][0]["max_model_len"], 512);
    assert_eq!(server.get(&format!("/v1/models/{}", super::DEMO)).ok()["id"], super::DEMO);
    assert_eq!(server.get("/v1/models/other").status, 404);
    assert_eq!(server.get("/v1/models/%ff").refused(), (400, "model".to_owned()));
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get("/v1/completions").status, 405);
    let text = "Über 3 Sätze 🙂";
    let tokens =
        server.post("/tokenize", &json!({ "prompt": text, "add_special_tokens": false })).ok()["tokens"].clone();
    assert_eq!(server.post("/detokenize", &json!({ "tokens": tokens })).ok()["prompt"], text);
    let answer = server.send("GET", "/health", &[("x-request-id", "my-id.7")], b"");
    assert_eq!(answer.header("x-request-id"), Some("my-id.7"));
    assert_ne!(server.send("GET", "/health", &[("x-request-id", "a b")], b"").header("x-request-id"), Some("a b"));
    assert!(server.metric("lowbit:num_requests_running") >= 0.0);
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("http_requests_total{method=\"GET\",handler=\"/health\",status=\"200\"}"), "{metrics}");
}

/// A field that is wrong, or not known, is named; nothing is dropped silently.
#[test]
fn wrong_fields_are_named() {
    let refused = |extra: Value| {
        let mut request = greedy("x", 4);
        extra.as_object().expect("an object").iter().for_each(|(name, value)| request[name] = value.clone());
        shared().post("/v1/completions", &request).refused()
    };
    for (extra, param) in [
        (json!({ "temperature": -1 }), "temperature"),
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "top_p": 0 }), "top_p"),
        (json!({ "top_p": 1.1 }), "top_p"),
        (json!({ "top_k": -2 }), "top_k"),
        (json!({ "min_p": 2 }), "min_p"),
        (json!({ "n": 0 }), "n"),
        (json!({ "n": 1000 }), "n"),
        (json!({ "n": -1 }), "n"),
        (json!({ "best_of": 3 }), "best_of"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "max_tokens": -1 }), "max_tokens"),
        (json!({ "logprobs": 21 }), "logprobs"),
        (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
        (json!({ "logit_bias": { "99999999": 1 } }), "logit_bias"),
        (json!({ "logit_bias": { "1": 1000 } }), "logit_bias"),
        (json!({ "stop": "" }), "stop"),
        (json!({ "stop": vec!["a"; 100] }), "stop"),
        (json!({ "stop_token_ids": [99_999_999] }), "stop_token_ids"),
        (json!({ "presence_penalty": 3 }), "presence_penalty"),
        (json!({ "repetition_penalty": 0 }), "repetition_penalty"),
        (json!({ "seed": 1.5 }), "seed"),
        (json!({ "prompt": [] }), "prompt"),
        (json!({ "prompt": [99_999_999] }), "prompt"),
        (json!({ "prompt": { "a": 1 } }), "prompt"),
        (json!({ "prompt": "x ".repeat(2000) }), "prompt"),
        (json!({ "suffix": "x" }), "suffix"),
        (json!({ "max_token": 7 }), "max_token"),
        (json!({ "stream_options": {} }), "stream_options"),
        (json!({ "bad_words": [" "] }), "bad_words"),
        (json!({ "bad_words": ["x".repeat(300)] }), "bad_words"),
        (json!({ "stop_token_ids": vec![1; 2000] }), "stop_token_ids"),
    ] {
        assert_eq!(refused(extra.clone()), (400, param.to_owned()), "{extra}");
    }
    assert_eq!(refused(json!({ "model": "gpt-4" })), (404, "model".to_owned()));
    let chat = |body: Value| shared().post("/v1/chat/completions", &body).refused();
    assert_eq!(chat(json!({})), (400, "messages".to_owned()));
    assert_eq!(chat(json!({ "messages": [] })), (400, "messages".to_owned()));
    let user = json!([{ "role": "user", "content": "x" }]);
    assert_eq!(chat(json!({ "messages": user, "top_logprobs": 2 })), (400, "top_logprobs".to_owned()));
    let extra = json!({ "messages": user, "chat_template_kwargs": { "messages": [] } });
    assert_eq!(chat(extra), (400, "chat_template_kwargs.messages".to_owned()));
}

/// A prompt of exactly the context's length has no room; one less has room for one token.
#[test]
fn the_context_ends_where_it_ends() {
    let ask = |len: usize| {
        shared().post("/v1/completions", &json!({ "prompt": vec![5; len], "max_tokens": 9, "temperature": 0 }))
    };
    assert_eq!(ask(511).ok()["usage"]["completion_tokens"], 1);
    let full = ask(512);
    assert_eq!(full.refused(), (400, "prompt".to_owned()));
    assert_eq!(full.json()["error"]["code"], "context_length_exceeded");
    let cut = json!({ "prompt": vec![5; 600], "max_tokens": 2, "temperature": 0, "truncate_prompt_tokens": 100 });
    assert_eq!(shared().post("/v1/completions", &cut).ok()["usage"]["prompt_tokens"], 100);
}

#[test]
fn stops_and_bans() {
    let text = shared().post("/v1/completions", &greedy(PROMPT, 30)).ok()["choices"][0]["text"].clone();
    let text = text.as_str().expect("text").to_owned();
    let word = text.split_whitespace().nth(3).expect("words").to_owned();
    let mut request = greedy(PROMPT, 30);
    request["stop"] = json!([word]);
    request["include_stop_str_in_output"] = json!(true);
    let got = shared().post("/v1/completions", &request).ok();
    let end = text.find(&word).expect("it is there") + word.len();
    assert_eq!(got["choices"][0]["text"], text[..end]);
    let mut request = greedy(PROMPT, 30);
    request["bad_words"] = json!([word]);
    let got = shared().post("/v1/completions", &request).ok();
    assert!(!got["choices"][0]["text"].as_str().expect("text").split_whitespace().any(|other| other == word));
    // A stop id ends the text before itself.
    let mut request = greedy(PROMPT, 30);
    request["logprobs"] = json!(0);
    request["return_tokens_as_token_ids"] = json!(true);
    let got = shared().post("/v1/completions", &request).ok();
    let third = got["choices"][0]["logprobs"]["tokens"][2].as_str().expect("a name").to_owned();
    let id: u32 = third.strip_prefix("token_id:").expect("an id").parse().expect("a number");
    let mut request = greedy(PROMPT, 30);
    request["stop_token_ids"] = json!([id]);
    let got = shared().post("/v1/completions", &request).ok();
    assert_eq!(got["choices"][0]["stop_reason"], id);
    assert_eq!(got["usage"]["completion_tokens"], 3);
    assert!(text.starts_with(got["choices"][0]["text"].as_str().expect("text")));
}

#[test]
fn the_page_loads_nothing_from_elsewhere() {
    let page = shared().get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").is_some_and(|policy| policy.starts_with("default-src 'self'")));
    // Every file that it names is there.
    let names = page
        .body
        .split(['"', '\''])
        .filter(|name| name.ends_with(".js") || name.ends_with(".css") || name.ends_with(".svg"));
    let mut found = 0;
    for name in names {
        let answer = shared().get(&format!("/{}", name.trim_start_matches(['.', '/'])));
        assert_eq!(answer.status, 200, "{name}");
        found += 1;
    }
    assert!(found >= 3, "{found}");
}

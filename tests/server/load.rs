//! Many clients at once: each gets what it gets alone, and nothing is left behind.

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::{Server, greedy};

const PROMPTS: [&str; 5] = [
    "The sea was",
    "It was a dark night, and",
    "In the garden there stood",
    "It was a dark night, or",
    "She said that",
];

/// Greedy and seeded requests with streams, choices, log-probabilities and shared prefixes, a fifth of them aborted and a twentieth bad.
#[test]
fn many_requests_at_once() {
    let server = Server::start(&["--max-num-seqs", "8", "--kv-cache-memory-bytes", "4M", "--access-log", "off"]);
    let request = |index: usize| {
        let mut request = greedy(PROMPTS[index % PROMPTS.len()], 4 + index % 23);
        match index % 4 {
            1 => request["stream"] = json!(true),
            2 => request["logprobs"] = json!(2),
            3 => request["n"] = json!(2),
            _ => {}
        }
        request
    };
    let texts = |answer: &super::Answer, is_stream: bool| -> Vec<String> {
        if !is_stream {
            let choices = answer.ok()["choices"].as_array().expect("choices").clone();
            return choices.iter().map(|choice| choice["text"].as_str().expect("text").to_owned()).collect();
        }
        let pieces = answer.events();
        vec![pieces.iter().map(|event| event["choices"][0]["text"].as_str().expect("text")).collect()]
    };
    let alone: Vec<(Value, Vec<String>)> = (0..40)
        .map(|index| {
            let request = request(index);
            let answer = server.post("/v1/completions", &request);
            let texts = texts(&answer, request["stream"] == true);
            (request, texts)
        })
        .collect();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    for round in 0..2 {
        next.store(0, Ordering::Relaxed);
        std::thread::scope(|scope| {
            for _ in 0..32 {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= 200 {
                            return;
                        }
                        let (request, expected) = &alone[index % alone.len()];
                        if index % 5 == 4 {
                            abort(&server, request);
                        } else if index % 20 == 3 {
                            let mut bad = request.clone();
                            bad["temperature"] = json!(-1);
                            assert_eq!(server.post("/v1/completions", &bad).status, 400);
                        } else {
                            let answer = server.post("/v1/completions", request);
                            let got = texts(&answer, request["stream"] == true);
                            if got != *expected {
                                wrong.lock().expect("no panic").push((round, request.clone(), got));
                            }
                        }
                    }
                });
            }
        });
    }
    assert!(wrong.lock().expect("no panic").is_empty(), "{wrong:?}");
    server.wait_until_idle();
}

/// Sends a request and goes away.
fn abort(server: &Server, request: &Value) {
    let body = request.to_string();
    let mut stream = server.connect();
    let head = server.head("POST", "/v1/completions", &[("content-type", "application/json")], body.len());
    let _ = stream.write_all(&[head, body.into_bytes()].concat());
}

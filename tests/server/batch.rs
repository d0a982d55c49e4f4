//! `lowbit run-batch`: a file of requests and a file of answers.

use std::process::Command;

use serde_json::{Value, json};

use super::{DEMO, alone, binary};

fn run(input: &std::path::Path, output: &std::path::Path) -> (Option<i32>, String) {
    let files = ["-i".as_ref(), input.as_os_str(), "-o".as_ref(), output.as_os_str()];
    let args = ["run-batch", DEMO, "--device", "cpu", "--max-model-len", "256", "--max-num-seqs", "4"];
    let done = Command::new(binary()).args(args).args(files).env("HF_HUB_OFFLINE", "1").output().expect("it runs");
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
}

fn line(id: usize, url: &str, body: &Value) -> String {
    format!("{}\n", json!({ "custom_id": id.to_string(), "method": "POST", "url": url, "body": body }))
}

/// Answers are those of the command line; a run that was cut off in the middle of a line goes on there.
#[test]
fn answers_and_resumes() {
    let dir = tempfile::tempdir().expect("a directory");
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let mut lines = String::new();
    for id in 0..6 {
        lines +=
            &line(id, "/v1/completions", &json!({ "prompt": "The sea was", "max_tokens": 4 + id, "temperature": 0 }));
    }
    lines += &line(6, "/v1/completions", &json!({ "prompt": "x", "temperature": -1 }));
    lines += &line(7, "/v1/embeddings", &json!({ "input": "x" }));
    std::fs::write(&input, &lines).expect("written");
    let written =
        json!({ "id": "a", "custom_id": "2", "response": { "status_code": 200, "body": "kept" }, "error": null });
    std::fs::write(dir.path().join("out.jsonl.part"), format!("{written}\n{{\"custom_id\": \"3")).expect("written");
    let (code, log) = run(&input, &output);
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("6 answered, 1 failed, 1 from an earlier run"), "{log}");
    let text = std::fs::read_to_string(&output).expect("text");
    let answers: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(answers.len(), 8);
    let of = |id: &str| answers.iter().find(|answer| answer["custom_id"] == id).expect("an answer");
    assert_eq!(of("2")["response"]["body"], "kept");
    let expected = alone("The sea was", 7);
    assert_eq!(of("3")["response"]["body"]["choices"][0]["text"], expected["text"]);
    assert_eq!(of("6")["response"]["status_code"], 400);
    assert!(of("7")["response"]["body"]["data"][0]["embedding"].is_array());
    let (code, log) = run(&input, &output);
    assert_eq!(code, Some(2), "answers are not overwritten: {log}");
}

#[test]
fn wrong_lines_are_named_before_any_work() {
    let dir = tempfile::tempdir().expect("a directory");
    let (input, output) = (dir.path().join("in.jsonl"), dir.path().join("out.jsonl"));
    let good = line(0, "/v1/completions", &json!({ "prompt": "x" }));
    for (bad, named) in [
        ("{".to_owned(), "in.jsonl:2"),
        (good.clone(), "twice"),
        (line(1, "/v1/files", &json!({})), "/v1/files"),
        (line(1, "/v1/completions", &json!({ "prompt": "x", "stream": true })), "stream"),
    ] {
        std::fs::write(&input, format!("{good}{bad}")).expect("written");
        let (code, log) = run(&input, &output);
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(named), "{log}");
        assert!(!output.exists());
    }
    // What another program left is not written over.
    std::fs::write(&input, &good).expect("written");
    let part = dir.path().join("out.jsonl.part");
    for foreign in ["my notes, precious", "my notes, precious\n", "{\"custom_id\": \"0\"}\n"] {
        std::fs::write(&part, foreign).expect("written");
        let (code, log) = run(&input, &output);
        assert_eq!(code, Some(2), "{log}");
        assert_eq!(std::fs::read_to_string(&part).expect("text"), foreign);
    }
}

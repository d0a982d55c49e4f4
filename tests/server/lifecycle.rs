//! How a server starts and ends.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::{DEMO, Server, greedy, read_answer};

/// What is wrong with flags or files is told at once, with the exit code of its kind.
#[test]
fn what_cannot_be_served_is_refused() {
    let refused = |args: &[&str]| {
        let output = Command::new(super::binary()).arg("serve").args(args).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, error) = refused(&["no/such/model", "--port", "0"]);
    assert!(code == Some(8) || code == Some(3) || code == Some(2), "{code:?} {error}");
    let taken = Server::start(&[]);
    let port = taken.address.rsplit(':').next().expect("a port");
    let (code, error) = refused(&[DEMO, "--device", "cpu", "--port", port]);
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains(port) && error.contains("in use"), "{error}");
    let (code, error) =
        refused(&[DEMO, "--device", "cpu", "--port", "0", "--max-model-len", "512", "--kv-cache-memory-bytes", "1K"]);
    assert_eq!(code, Some(6), "{error}");
    assert!(error.contains("--kv-cache-memory-bytes"), "{error}");
    assert_eq!(refused(&["--dummy", "llama-1.1b"]).0, Some(2), "random weights need a tokenizer");
    let (code, error) = refused(&[DEMO, "--tls-cert", "/nope", "--tls-key", "/nope", "--port", "0"]);
    assert_eq!(code, Some(3), "{error}");
}

/// A signal lets requests end, refuses new ones, and the exit code is 0.
#[test]
fn sigterm_drains() {
    let mut server = Server::start(&["--threads", "1"]);
    let mut request = greedy("Once upon a time", 450);
    request["ignore_eos"] = json!(true);
    request["stream"] = json!(true);
    let body = request.to_string();
    let mut running = server.connect();
    let head = server.head("POST", "/v1/completions", &[("content-type", "application/json")], body.len());
    running.write_all(&[head, body.into_bytes()].concat()).expect("sent");
    let mut first = [0; 15];
    running.peek(&mut first).expect("it has begun");
    server.signal("-TERM");
    let answer = read_answer(&mut running);
    let events = answer.events();
    assert_eq!(events.last().expect("events")["choices"][0]["finish_reason"], "length");
    assert_eq!(server.exit_code(), Some(0));
}

/// A request that takes longer than the deadline is cut off, and the server ends all the same.
#[test]
fn the_deadline_ends_what_does_not_end() {
    let mut server = Server::start(&["--shutdown-timeout", "0", "--threads", "1", "--max-num-seqs", "64"]);
    let mut request = greedy("Once upon a time", 450);
    request["ignore_eos"] = json!(true);
    request["n"] = json!(64);
    let body = request.to_string();
    let mut running = server.connect();
    let head = server.head("POST", "/v1/completions", &[("content-type", "application/json")], body.len());
    running.write_all(&[head, body.into_bytes()].concat()).expect("sent");
    std::thread::sleep(Duration::from_millis(200));
    server.signal("-TERM");
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn a_unix_socket() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("lowbit.sock");
    let path_text = path.to_str().expect("UTF-8");
    let mut server = Server::spawn(&["serve", DEMO, "--device", "cpu", "--max-model-len", "256", "--uds", path_text]);
    let mut stream = UnixStream::connect(&path).expect("it listens");
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: any\r\nconnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.signal("-INT");
    assert_eq!(server.exit_code(), Some(0));
    assert!(!path.exists(), "the socket goes with the server");
    // Any other file is somebody's.
    std::fs::write(&path, "precious").expect("written");
    let output = Command::new(super::binary()).args(["serve", DEMO, "--device", "cpu", "--uds", path_text]).output();
    let output = output.expect("it runs");
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_to_string(&path).expect("text"), "precious");
}

/// A file of flags, which the command line overrides.
#[test]
fn a_config_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("serve.toml");
    let text = format!(
        "model = \"{DEMO}\"\ndevice = \"cpu\"\nport = 0\nmax-model-len = 128\nserved-model-name = [\"a\", \"b\"]\n"
    );
    std::fs::write(&path, text).expect("written");
    let server = Server::spawn(&["serve", "--config", path.to_str().expect("UTF-8"), "--max-model-len", "256"]);
    server.wait_until_ready();
    let models = server.get("/v1/models").ok();
    let names: Vec<&str> = models["data"].as_array().expect("a list").iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!((names, &models["data"][0]["max_model_len"]), (vec!["a", "b"], &json!(256)));
    std::fs::write(&path, "prot = 1\n").expect("written");
    let output =
        Command::new(super::binary()).args(["serve", "--config", path.to_str().expect("UTF-8"), DEMO]).output();
    let output = output.expect("it runs");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && error.contains("`prot` is no flag of `lowbit serve`"), "{error}");
}

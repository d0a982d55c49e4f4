//! Clients that do what they should not: hostile bodies, slow or vanished readers, wrong keys, too much at once.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Server, greedy, read_answer, shared};

#[test]
fn malformed_bodies() {
    let post = |body: &[u8]| shared().send("POST", "/v1/completions", &[("content-type", "application/json")], body);
    let deep = format!("{{\"prompt\": {}", "[".repeat(100_000));
    for body in [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": \"x\", \"temperature\": NaN}",
        b"{\"prompt\": \"x\", \"seed\": 99999999999999999999999}",
        b"{\"prompt\": \"x\", \"prompt\": \"y\"}",
        deep.as_bytes(),
    ] {
        let answer = post(body);
        assert_eq!(answer.status, 400, "{:?}: {}", &body[..body.len().min(40)], answer.body);
        answer.refused();
    }
    let answer = shared().send("POST", "/v1/completions", &[("content-type", "text/plain")], b"{\"prompt\": \"x\"}");
    assert_eq!(answer.status, 415);
    // Text that looks like special tokens is tokenized, and is no crash.
    assert_eq!(shared().post("/v1/completions", &greedy("<|endoftext|><s></s>\0\u{fffd}", 2)).status, 200);
}

#[test]
fn bodies_and_headers_have_limits() {
    let server = Server::start(&["--max-body-mib", "1"]);
    let body = vec![b' '; (1 << 20) + 1];
    assert_eq!(server.send("POST", "/v1/completions", &[("content-type", "application/json")], &body).status, 413);
    let huge = "x".repeat(1 << 20);
    let mut stream = server.connect();
    let _ = stream.write_all(&server.head("GET", "/health", &[("x-huge", &huge)], 0));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(server.get("/health").status, 200);
}

/// A body that comes byte by byte is read; one that stops coming holds up nobody.
#[test]
fn slow_bodies() {
    let server = shared();
    let body = greedy("slow", 2).to_string();
    let mut stalled = server.connect();
    let head = server.head("POST", "/v1/completions", &[("content-type", "application/json")], body.len());
    stalled.write_all(&head).expect("a head");
    stalled.write_all(&body.as_bytes()[..5]).expect("a part");
    let mut slow = server.connect();
    slow.write_all(&head).expect("a head");
    for byte in body.as_bytes() {
        slow.write_all(&[*byte]).expect("it reads on");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read_answer(&mut slow).status, 200);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn keys() {
    let server = Server::start(&["--api-key", "sesame,open"]);
    let ask = |headers: &[(&str, &str)], path: &str| server.send("GET", path, headers, b"").status;
    for path in ["/v1/models", "/metrics", "/version", "/nowhere", "/tokenize"] {
        assert_eq!(ask(&[], path), 401, "{path}");
        assert_eq!(ask(&[("authorization", "Bearer sesam")], path), 401, "{path}");
    }
    assert_eq!(ask(&[("authorization", "Bearer open")], "/v1/models"), 200);
    assert_eq!(ask(&[("x-api-key", "sesame")], "/v1/models"), 200);
    assert_eq!((ask(&[], "/health"), ask(&[], "/ready")), (200, 200));
    let log = server.log.lock().expect("no panic").join("\n");
    assert!(log.contains("key=key2") && !log.contains("sesam"), "logs name keys and never hold them: {log}");
}

#[test]
fn other_hosts_are_refused() {
    let mut stream = shared().connect();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n").expect("sent");
    assert_eq!(read_answer(&mut stream).status, 403);
    assert_eq!(shared().send("GET", "/health", &[("host", "evil.example")], b"").status, 403, "two hosts");
    assert_eq!(shared().send("GET", "/health", &[("origin", "https://evil.example")], b"").status, 403);
}

/// Clients that go away in each phase leave nothing behind.
#[test]
fn vanished_clients() {
    let server = Server::start(&["--max-num-seqs", "2"]);
    for stream in [true, false] {
        for read in [0, 1, 400] {
            let mut request = greedy("A long story about", 400);
            request["ignore_eos"] = json!(true);
            request["stream"] = json!(stream);
            let body = request.to_string();
            let mut connection = server.connect();
            let head = server.head("POST", "/v1/completions", &[("content-type", "application/json")], body.len());
            connection.write_all(&[head, body.into_bytes()].concat()).expect("sent");
            if stream {
                let mut some = vec![0; read];
                connection.read_exact(&mut some).expect("it streams");
            } else {
                std::thread::sleep(Duration::from_millis(read as u64 / 10));
            }
        }
    }
    server.wait_until_idle();
    assert_eq!(server.post("/v1/completions", &greedy("x", 2)).status, 200);
}

/// One runs, one waits; the third is told to come back.
#[test]
fn a_full_queue_answers_429() {
    let server = Server::start(&["--max-num-seqs", "1", "--max-queued", "1"]);
    let too_many = json!({ "prompt": ["a", "b", "c"], "max_tokens": 1 });
    assert_eq!(
        server.post("/v1/completions", &too_many).refused(),
        (400, "n".to_owned()),
        "there is never room for it"
    );
    let mut request = greedy("Once upon a time", 450);
    request["ignore_eos"] = json!(true);
    let statuses: Vec<(u16, Option<String>)> = std::thread::scope(|scope| {
        let ask = || {
            let answer = server.post("/v1/completions", &request);
            (answer.status, answer.header("retry-after").map(str::to_owned))
        };
        let asking: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let count = |status| statuses.iter().filter(|(got, _)| *got == status).count();
    assert_eq!(count(200) + count(429), 6, "{statuses:?}");
    assert!(count(200) >= 2 && count(429) >= 1, "{statuses:?}");
    assert!(statuses.iter().all(|(status, retry)| *status == 200 || retry.is_some()));
    server.wait_until_idle();
}

/// Connections that say nothing cost little, and requests pass between them.
#[test]
fn idle_connections() {
    let server = shared();
    let before = server.resident_bytes();
    let idle: Vec<_> = (0..400).map(|_| server.connect()).collect();
    let start = Instant::now();
    assert_eq!(server.get("/health").status, 200);
    assert!(start.elapsed() < Duration::from_secs(10));
    let each = server.resident_bytes().saturating_sub(before) / idle.len() as u64;
    assert!(each < 128 << 10, "{each} bytes each");
}

#[test]
fn requests_may_take_only_so_long() {
    let server = Server::start(&["--request-timeout", "1", "--threads", "1", "--max-num-seqs", "64"]);
    let mut request = greedy("Once upon a time", 450);
    request["ignore_eos"] = json!(true);
    request["n"] = json!(64);
    let answer = server.post("/v1/completions", &request);
    // A fast machine is done in time.
    if answer.status != 200 {
        assert_eq!(answer.status, 504, "{}", answer.body);
        server.wait_until_idle();
    }
}

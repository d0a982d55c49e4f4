//! `lowbit serve` as its clients see it: the built binary with the demo model, over loopback.

mod abuse;
mod api;
mod batch;
mod lifecycle;
mod load;
mod replies;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::{binary, command};

const DEMO: &str = "assets/books-6m-gptq";

/// A server that ends with its handle.
pub struct Server {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub address: String,
    /// Lines on standard error so far.
    pub log: Arc<Mutex<Vec<String>>>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The JSON of an answer that is 200.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Status and `param` of an error.
    pub fn refused(&self) -> (u16, String) {
        let error = &self.json()["error"];
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{}", self.body);
        (self.status, error["param"].as_str().unwrap_or_default().to_owned())
    }

    /// The data of each server-sent event; the last one, `[DONE]`, is taken off.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.iter().map(|data| serde_json::from_str(data).expect("JSON")).collect()
    }
}

impl Server {
    /// The demo model on the CPU on a free port, with further flags.
    pub fn start(flags: &[&str]) -> Server {
        let mut args = vec!["serve", DEMO, "--device", "cpu", "--port", "0", "--max-model-len", "512"];
        args.extend(flags);
        let server = Server::spawn(&args);
        server.wait_until_ready();
        server
    }

    /// Starts the binary and waits until it listens.
    pub fn spawn(args: &[&str]) -> Server {
        let mut command = command(args);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut address = None;
        while address.is_none() {
            let line = lines.next().expect("it listens before it ends").expect("UTF-8");
            address = line.strip_prefix("listening on ").map(|at| at.trim_start_matches("http://").to_owned());
            log.lock().expect("no panic").push(line);
        }
        let rest = Arc::clone(&log);
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| rest.lock().expect("no panic").push(line))
        });
        Server { child, address: address.expect("found"), log }
    }

    pub fn wait_until_ready(&self) {
        let start = Instant::now();
        while self.get("/ready").status != 200 {
            assert!(start.elapsed() < Duration::from_secs(60), "it is never ready: {:?}", self.log);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// A request on a connection of its own.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(&self.head(method, path, headers, body.len())).expect("it reads the head");
        // A server that refuses a body need not read it.
        let _ = stream.write_all(body);
        read_answer(&mut stream)
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        stream
    }

    /// The head of a request after which the connection is closed.
    pub fn head(&self, method: &str, path: &str, headers: &[(&str, &str)], len: usize) -> Vec<u8> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        head.push_str(&format!("content-length: {len}\r\n\r\n"));
        head.into_bytes()
    }

    /// The value of a metric without labels but the model's name.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line =
            text.lines().find(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} ")));
        let value = line.and_then(|line| line.rsplit(' ').next()).and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("no metric {name}:\n{text}"))
    }

    /// Waits until nothing runs or waits and no KV block is held.
    pub fn wait_until_idle(&self) {
        let start = Instant::now();
        let is_idle = || {
            let names = ["lowbit:num_requests_running", "lowbit:num_requests_waiting", "lowbit:kv_cache_usage_perc"];
            names.iter().all(|name| self.metric(name) == 0.0)
        };
        while !is_idle() {
            assert!(start.elapsed() < Duration::from_secs(30), "it is never idle:\n{}", self.get("/metrics").body);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().expect("kill is there");
        assert!(status.success());
    }

    /// Its exit code, when it has ended by itself.
    pub fn exit_code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                return status.code();
            }
            assert!(start.elapsed() < Duration::from_secs(60), "it does not end: {:?}", self.log);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).expect("procfs");
        text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("a number") * 4096
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One server for all tests that change nothing about it.
pub fn shared() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(&["--max-num-seqs", "8"]))
}

/// Reads an answer to its end, chunked or not.
pub fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).expect("a status line");
    let status =
        line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no status: {line:?}"));
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).expect("a header");
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    let mut body = Vec::new();
    if headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked") {
        loop {
            line.clear();
            reader.read_line(&mut line).expect("a chunk's size");
            let size = usize::from_str_radix(line.trim_end(), 16).expect("a hexadecimal size");
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).expect("the chunk");
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                break;
            }
        }
    } else {
        reader.read_to_end(&mut body).expect("the body");
    }
    Answer { status, headers, body: String::from_utf8(body).expect("UTF-8") }
}

/// What the command line generates greedily after `prompt`: ids, text, log-probabilities.
pub fn alone(prompt: &str, max_tokens: usize) -> Value {
    let output = Command::new(binary())
        .args(["generate", "-m", DEMO, "--device", "cpu", "--temperature", "0", "--json", "-p", prompt])
        .args(["-n", &max_tokens.to_string()])
        .stderr(Stdio::null())
        .output()
        .expect("it runs");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A greedy completion request.
pub fn greedy(prompt: &str, max_tokens: usize) -> Value {
    json!({ "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 })
}

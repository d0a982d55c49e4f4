//! `bench serve` against a server of the tests' own, which streams what a script says.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Run, command, finish};

#[derive(Debug, Clone)]
struct Request {
    path: String,
    head: String,
    body: Value,
}

/// What the server does next.
#[derive(Debug, Clone)]
enum Step {
    Wait(u64),
    /// One chunk of the body.
    Send(Vec<u8>),
    /// Closes the connection in the middle of the body.
    HangUp,
}

enum Answer {
    Plain(u16, String),
    Stream(Vec<Step>),
}

struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Request>>>,
    most_at_once: Arc<AtomicUsize>,
}

impl Server {
    /// Answers each completion by `answer`, of the request and how many came before, until the test binary ends.
    fn start(answer: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let most_at_once = Arc::new(AtomicUsize::new(0));
        let (log, most, now) = (Arc::clone(&asked), Arc::clone(&most_at_once), Arc::new(AtomicUsize::new(0)));
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, most, now) = (Arc::clone(&log), Arc::clone(&most), Arc::clone(&now));
                let answer = Arc::clone(&answer);
                std::thread::spawn(move || {
                    let stream = stream.unwrap();
                    stream.set_nodelay(true).unwrap();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    while let Some(request) = read(&mut reader) {
                        if request.path == "/v1/models" {
                            let _ = reply(&stream, Answer::Plain(200, json!({"data": [{"id": "tiny"}]}).to_string()));
                            continue;
                        }
                        let before = {
                            let mut log = log.lock().unwrap();
                            log.push(request.clone());
                            log.len() - 1
                        };
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        let answer = answer(&request, before);
                        let done = reply_with(&stream, answer, || now.fetch_sub(1, Ordering::SeqCst));
                        if done.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Server { url, asked, most_at_once }
    }

    /// Runs `lowbit bench serve` against it.
    fn bench(&self, args: &[&str]) -> Run {
        finish(self.command(args), b"")
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = command(&[&["bench", "serve", "--base-url", &self.url], args].concat());
        command.env_remove("OPENAI_API_KEY");
        command
    }

    fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    let path = head.split(' ').nth(1)?.to_string();
    Some(Request { path, head, body: serde_json::from_slice(&body).unwrap_or_default() })
}

fn reply(stream: &TcpStream, answer: Answer) -> std::io::Result<()> {
    reply_with(stream, answer, || 0)
}

/// Sends an answer; `before_end` is called before the client can know that it is over.
fn reply_with(mut stream: &TcpStream, answer: Answer, before_end: impl Fn() -> usize) -> std::io::Result<()> {
    match answer {
        Answer::Plain(status, body) => {
            before_end();
            write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        }
        Answer::Stream(steps) => {
            stream.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            for step in steps {
                match step {
                    Step::Wait(ms) => std::thread::sleep(Duration::from_millis(ms)),
                    Step::Send(bytes) => {
                        let chunk = [format!("{:x}\r\n", bytes.len()).as_bytes(), &bytes, b"\r\n"].concat();
                        stream.write_all(&chunk)?;
                    }
                    Step::HangUp => {
                        before_end();
                        stream.shutdown(std::net::Shutdown::Both)?;
                        return Err(std::io::ErrorKind::ConnectionAborted.into());
                    }
                }
            }
            before_end();
            stream.write_all(b"0\r\n\r\n")
        }
    }
}

fn event(data: &Value) -> Vec<u8> {
    format!("data: {data}\n\n").into_bytes()
}

fn token(text: &str) -> Value {
    json!({"choices": [{"index": 0, "text": text, "finish_reason": null}], "usage": null})
}

/// Waits, then four tokens with a wait between each; the last event is cut in two. Usage counts the ids of the prompt.
fn completion(request: &Request, first: u64, next: u64) -> Answer {
    let end = json!({"choices": [{"index": 0, "text": "d", "finish_reason": "length"}]});
    let prompt = request.body["prompt"].as_array().map_or(0, Vec::len);
    let usage = json!({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": 4}});
    let (last, half) = (event(&end), 20);
    Answer::Stream(vec![
        Step::Wait(first),
        Step::Send(event(&token("a"))),
        Step::Wait(next),
        Step::Send(event(&token("b"))),
        Step::Wait(next),
        Step::Send(event(&token(""))),
        Step::Send(last[..half].to_vec()),
        Step::Wait(next),
        Step::Send(last[half..].to_vec()),
        Step::Send([event(&usage), b"data: [DONE]\n\n".to_vec()].concat()),
    ])
}

fn number(json: &Value, key: &str) -> f64 {
    json[key].as_f64().unwrap_or_else(|| panic!("{key} in {json}"))
}

fn seconds(json: &Value) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Counts are exact. Times can only be longer than the script's.
#[test]
fn completions_are_counted_and_timed() {
    let server = Server::start(|request, _| completion(request, 30, 20));
    let run = server.bench(&[
        "--num-prompts",
        "6",
        "--max-concurrency",
        "2",
        "--random-input-len",
        "5",
        "--random-prefix-len",
        "3",
        "--random-output-len",
        "4",
        "--api-key",
        "secret",
        "--header",
        "x-a=b=c",
        "x-d=e",
        "--temperature",
        "0",
        "--extra-body",
        "{\"min_p\": 0.5}",
        "--goodput",
        "ttft:60000",
        "tpot:60000",
        "--save-detailed",
        "--json",
        "--metric-percentiles",
        "25,99.9",
        "--label",
        "mine",
    ]);
    let result = run.json();
    assert_eq!((&result["completed"], &result["failed"]), (&json!(6), &json!(0)));
    assert_eq!((&result["total_input_tokens"], &result["total_output_tokens"]), (&json!(48), &json!(24)));
    assert_eq!(result["model_id"], "tiny");
    assert_eq!((&result["request_rate"], &result["max_concurrency"]), (&json!("inf"), &json!(2)));
    assert_eq!((&result["label"], &result["tokens_counted_by_server"]), (&json!("mine"), &json!(true)));
    // Three rounds of two requests, each at least 30 + 3 * 20 ms.
    let duration = number(&result, "duration");
    assert!(duration >= 0.27, "{duration}");
    for (key, count) in [("request_throughput", 6.0), ("output_throughput", 24.0), ("total_token_throughput", 72.0)] {
        assert!((number(&result, key) - count / duration).abs() < 1e-9, "{key}: {result}");
    }
    assert_eq!(result["request_goodput"], result["request_throughput"], "all keep a minute");
    assert!(number(&result, "mean_ttft_ms") >= 30.0 && number(&result, "p25_ttft_ms") >= 30.0);
    assert!(number(&result, "median_e2el_ms") >= 90.0 && number(&result, "p99.9_e2el_ms") >= 90.0);
    let (tpot, itl) = (number(&result, "mean_tpot_ms"), number(&result, "mean_itl_ms"));
    assert!((tpot - itl).abs() < 1e-6, "four tokens in four events each: {tpot} {itl}");
    assert!(number(&result, "std_itl_ms") > 0.0, "the third event comes with the half of the fourth");
    let (ttfts, itls) = (seconds(&result["ttfts"]), result["itls"].as_array().unwrap());
    assert!(ttfts.len() == 6 && ttfts.iter().all(|&ttft| ttft >= 0.03));
    assert_eq!(itls.len(), 6);
    for (itl, ttft) in itls.iter().map(seconds).zip(&ttfts) {
        assert_eq!(itl.len(), 3);
        assert!(ttft + itl.iter().sum::<f64>() >= 0.09, "{itl:?}");
    }
    assert_eq!(result["output_lens"], json!([4, 4, 4, 4, 4, 4]));
    assert_eq!(result["max_concurrent_requests"], 2);
    assert_eq!(server.most_at_once.load(Ordering::SeqCst), 2);

    let asked = server.asked();
    assert_eq!(asked.len(), 7, "one to warm up");
    let prefix = |request: &Request| request.body["prompt"].as_array().unwrap()[..3].to_vec();
    for request in &asked[1..] {
        assert_eq!(request.path, "/v1/completions");
        assert_eq!(request.body["prompt"].as_array().unwrap().len(), 8);
        assert_eq!(prefix(request), prefix(&asked[1]));
        let fields = json!({"model": "tiny", "max_tokens": 4, "stream": true, "stream_options": {"include_usage": true},
            "ignore_eos": true, "temperature": 0.0, "min_p": 0.5});
        for (name, value) in fields.as_object().unwrap() {
            assert_eq!(&request.body[name], value, "{name}");
        }
        let head = request.head.to_lowercase();
        for line in ["authorization: bearer secret", "x-a: b=c", "x-d: e", "content-type: application/json"] {
            assert!(head.lines().any(|l| l == line), "{line} in {head}");
        }
    }
    assert_ne!(prefix(&asked[0]), prefix(&asked[1]), "the warm-up fills no cache");
    assert_ne!(asked[1].body["prompt"], asked[2].body["prompt"]);
}

/// A chat whose stream opens with a role, keeps the line alive, and says nothing of its tokens, byte by byte.
#[test]
fn chats_are_read_whatever_the_stream_looks_like() {
    let server = Server::start(|_, _| {
        let delta = |delta: Value| json!({"choices": [{"delta": delta}]});
        let role = format!("data: {}\r\n\r\n", delta(json!({"role": "assistant", "content": ""})));
        let rest = format!(
            ": ping\r\n\r\ndata:{}\r\n\r\nevent: message\ndata: {}\n\ndata: {}\n\ndata: [DONE]",
            delta(json!({"reasoning_content": "é"})),
            delta(json!({"content": ""})),
            json!({"choices": [{"delta": {}, "finish_reason": "stop"}]}),
        );
        let bytes = rest.into_bytes();
        let cut = bytes.iter().map(|&b| Step::Send(vec![b]));
        Answer::Stream([Step::Send(role.into_bytes()), Step::Wait(40)].into_iter().chain(cut).collect())
    });
    let result = server.bench(&[
        "--backend",
        "openai-chat",
        "--num-prompts",
        "3",
        "--random-input-len",
        "7",
        "--random-output-len",
        "9",
        "--no-ignore-eos",
        "--num-warmups",
        "0",
        "--model",
        "other",
        "--json",
        "--save-detailed",
    ]);
    let result = result.json();
    assert_eq!((&result["completed"], &result["total_output_tokens"]), (&json!(3), &json!(9)), "events are counted");
    assert_eq!(result["total_input_tokens"], 21, "words are");
    assert_eq!(result["tokens_counted_by_server"], false);
    assert!(seconds(&result["ttfts"]).iter().all(|&ttft| ttft >= 0.04), "a role is no token: {result}");
    let asked = server.asked();
    assert_eq!(asked.len(), 3);
    for request in asked {
        assert_eq!((request.path.as_str(), &request.body["model"]), ("/v1/chat/completions", &json!("other")));
        assert_eq!(request.body["max_completion_tokens"], 9);
        assert_eq!(request.body.get("ignore_eos"), None);
        let message = &request.body["messages"][0];
        assert_eq!((&message["role"], message["content"].as_str().unwrap().split(' ').count()), (&json!("user"), 7));
    }
}

#[test]
fn failures_are_counted_by_kind() {
    let server = Server::start(|request, i| match i % 6 {
        0 => Answer::Plain(429, json!({"error": {"message": "too many"}}).to_string()),
        1 => Answer::Stream(vec![Step::Send(event(&token("a"))), Step::Wait(5), Step::HangUp]),
        2 => Answer::Stream(vec![Step::Send(event(&json!({"error": {"message": "out of memory"}})))]),
        3 => Answer::Stream(vec![Step::Send(event(&token("a")))]),
        4 => Answer::Stream(vec![Step::Send(b"data: {\n\n".to_vec())]),
        _ => completion(request, 0, 0),
    });
    let args = ["--num-prompts", "12", "--max-concurrency", "1", "--random-input-len", "2", "--num-warmups", "0"];
    let result = server.bench(&[&args[..], &["--json"]].concat()).json();
    assert_eq!((&result["completed"], &result["failed"]), (&json!(2), &json!(10)));
    assert_eq!((&result["total_input_tokens"], &result["total_output_tokens"]), (&json!(4), &json!(8)));
    let errors = result["error_counts"].as_object().unwrap();
    assert_eq!(errors.len(), 5, "{errors:?}");
    assert!(errors.values().all(|count| count == 2), "{errors:?}");
    for kind in ["HTTP 429: too many", "out of memory", "the stream ended before the answer did"] {
        assert!(errors.contains_key(kind), "{kind} in {errors:?}");
    }
    for start in ["the stream broke off: ", "sent an event that is no chunk of a completion: {"] {
        assert!(errors.keys().any(|error| error.starts_with(start)), "{start} in {errors:?}");
    }
    let text = server.bench(&args);
    assert_eq!(text.code, Some(0));
    assert!(text.stdout.contains("\n2 failed: HTTP 429: too many\n"), "{}", text.stdout);
}

#[test]
fn a_server_that_answers_nothing_is_an_error() {
    let refusing = Server::start(|_, _| Answer::Plain(400, json!({"message": "no such model"}).to_string()));
    let run = refusing.bench(&["--num-prompts", "3"]);
    assert_eq!(run.code, Some(8));
    let expected = "/v1/completions: the warm-up request failed: HTTP 400: no such model. --num-warmups 0 sends none";
    assert!(run.stderr.contains(expected), "{}", run.stderr);
    assert_eq!(refusing.asked().len(), 1);
    let run = refusing.bench(&["--num-prompts", "3", "--num-warmups", "0", "--json"]);
    assert_eq!(run.code, Some(8));
    assert!(run.stderr.contains("all 3 requests failed: HTTP 400: no such model"), "{}", run.stderr);
    let result: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&result["failed"], &result["mean_ttft_ms"]), (&json!(3), &json!(0.0)), "what there is, is told");

    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let start = Instant::now();
    let run = finish(command(&["bench", "serve", "--base-url", &format!("http://{free}/"), "--model", "m"]), b"");
    assert_eq!(run.code, Some(8));
    assert!(run.stderr.contains(&format!("server http://{free}/v1/models: nothing listens there")), "{}", run.stderr);
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn requests_arrive_at_their_rate() {
    let server = Server::start(|request, _| completion(request, 0, 0));
    let args = ["--num-prompts", "10", "--request-rate", "50", "--random-input-len", "2", "--json"];
    for burstiness in ["inf", "1", "0.5"] {
        let result = server.bench(&[&args[..], &["--burstiness", burstiness]].concat()).json();
        // The last is sent after 10 / 50 seconds.
        assert!(number(&result, "duration") >= 0.2, "{result}");
        assert_eq!((&result["completed"], &result["request_rate"]), (&json!(10), &json!(50.0)));
    }
}

#[test]
fn results_and_plots_are_written() {
    let server = Server::start(|request, _| completion(request, 1, 1));
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let args = ["--num-prompts", "4", "--random-input-len", "3", "--random-output-len", "4", "--save-result"];
    let (results, plot, picture) = (path("a/b"), path("plots"), path("c/d.svg"));
    let run = server.bench(&[&args[..], &["--result-dir", &results, "--plot", &plot, "--label", "x/y"]].concat());
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for line in [
        "Successful requests:                     4\n",
        "Total input tokens:                      12\n",
        "| TTFT ",
        "| E2EL ",
    ] {
        assert!(run.stdout.contains(line), "{line} in {}", run.stdout);
    }
    let files: Vec<_> = fs::read_dir(&results).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1);
    let name = files[0].file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("x_y-infqps-tiny-2") && name.ends_with(".json"), "{name}");
    let saved: Value = serde_json::from_slice(&fs::read(&files[0]).unwrap()).unwrap();
    assert_eq!((&saved["completed"], &saved["ttfts"]), (&json!(4), &Value::Null));
    let svg = fs::read_to_string(format!("{plot}/serve.svg")).unwrap();
    for label in ["time to first token (ms)", "inter-token latency (ms)", "tokens a second", "tiny at http://127.0.0.1"]
    {
        assert!(svg.contains(label), "{label}");
    }
    assert!(svg.matches("<rect").count() > 3, "bars");
    let named = ["--result-dir", &results, "--result-filename", "r.json", "--plot", &picture];
    assert_eq!(server.bench(&[&args[..], &named].concat()).code, Some(0));
    assert!(fs::read_to_string(&picture).unwrap().starts_with("<svg"));
    assert!(fs::exists(format!("{results}/r.json")).unwrap());
}

#[test]
fn bad_flags_are_named_before_anything_is_sent() {
    let server = Server::start(|request, _| completion(request, 0, 0));
    for (args, expected) in [
        (&["--request-rate", "0"][..], "--request-rate: 0"),
        (&["--burstiness", "nan"], "--burstiness: NaN"),
        (&["--max-concurrency", "5000"], "--max-concurrency: 5000: expected 1 to 4096"),
        (&["--num-prompts", "0"], "--num-prompts: 0"),
        (&["--random-range-ratio", "1"], "--random-range-ratio: 1"),
        (&["--metric-percentiles", "101"], "--metric-percentiles: 101"),
        (&["--percentile-metrics", "ttft,latency"], "expected ttft, tpot, itl or e2el"),
        (&["--goodput", "itl:5"], "expected ttft:MS, tpot:MS or e2el:MS"),
        (&["--header", "x"], "--header: expected KEY=VALUE"),
        (&["--extra-body", "[]"], "--extra-body: expected a JSON object"),
        (&["--endpoint", "v1"], "--endpoint: `v1`"),
        (&["--base-url", "localhost:8000"], "--base-url: `localhost:8000`: expected http://"),
    ] {
        let run = match args {
            ["--base-url", ..] => finish(command(&[&["bench", "serve"], args].concat()), b""),
            _ => server.bench(args),
        };
        assert_eq!(run.code, Some(2), "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{expected} in {}", run.stderr);
    }
    assert!(server.asked().is_empty());
}

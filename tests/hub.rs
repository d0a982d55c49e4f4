//! Hub ids against a local server: the answers of a real hub, and those of a broken or hostile one.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lowbit::checkpoint::hub::{Hub, resolve};
use lowbit::error::Error;
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const CONFIG: &str = "{\"model_type\": \"llama\"}";
/// SHA-256 of `weights()`, by sha256sum: 70,000 bytes, byte i being i modulo 251.
const WEIGHTS_SHA256: &str = "9dc177c2fde29dea8e7c29f7ddf147b7c449c99d049c62f3aac0a5933ecf76a3";

fn weights() -> Vec<u8> {
    (0..70_000).map(|i| (i % 251) as u8).collect()
}

#[derive(Debug, Clone)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

#[derive(Debug, Clone)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body to send before hanging up.
    cut: usize,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status, headers: Vec::new(), body: body.into(), cut: usize::MAX }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Answer {
        self.headers.push((name, value.into()));
        self
    }
}

struct Server {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers every request on a thread of its own until the test binary ends.
    fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (Arc::clone(&requests), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream.unwrap(), &log, &*answer));
            }
        });
        Server { address, requests }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub {
            endpoint: self.address.clone(),
            cache: cache.to_path_buf(),
            token: Some("secret".to_string()),
            offline: false,
            retry_delay: Duration::from_millis(1),
        }
    }

    fn requests(&self, path: &str) -> Vec<Request> {
        self.requests.lock().unwrap().iter().filter(|r| r.path.contains(path)).cloned().collect()
    }
}

fn serve(stream: TcpStream, log: &Mutex<Vec<Request>>, answer: &(dyn Fn(&Request) -> Answer + Send + Sync)) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap().to_string();
    let headers = lines
        .map_while(|line| line.ok().filter(|l| !l.is_empty()))
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_string())))
        .collect();
    let request = Request { path, headers };
    log.lock().unwrap().push(request.clone());
    let answer = answer(&request);
    let mut head =
        format!("HTTP/1.1 {} X\r\nContent-Length: {}\r\nConnection: close\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut stream = stream;
    let _ = stream.write_all(format!("{head}\r\n").as_bytes());
    let _ = stream.write_all(&answer.body[..answer.cut.min(answer.body.len())]);
}

fn listing() -> Value {
    json!({"sha": COMMIT, "siblings": [
        {"rfilename": "config.json", "size": CONFIG.len(), "blobId": "a".repeat(40)},
        {"rfilename": "model.safetensors", "size": 70_000, "blobId": "b".repeat(40),
         "lfs": {"sha256": WEIGHTS_SHA256, "size": 70_000}},
        {"rfilename": "pytorch_model.bin", "size": 5, "blobId": "c".repeat(40)},
        {"rfilename": "modeling.py", "size": 5, "blobId": "d".repeat(40)},
        {"rfilename": "onnx/model.safetensors", "size": 5, "blobId": "e".repeat(40)},
    ]})
}

/// A well-behaved hub, ranges included.
fn good(request: &Request) -> Answer {
    if request.path.starts_with("/api/") {
        return Answer::new(200, listing().to_string());
    }
    if request.path.ends_with("/config.json") {
        return Answer::new(200, CONFIG);
    }
    assert!(request.path.ends_with("/model.safetensors"), "{}", request.path);
    match request.headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok())
    {
        Some(from) => Answer::new(206, &weights()[from..]).header("Content-Range", format!("bytes {from}-69999/70000")),
        None => Answer::new(200, weights()),
    }
}

fn hub_error(result: lowbit::error::Result<std::path::PathBuf>) -> String {
    match result {
        Err(Error::Hub { reason, .. }) => reason,
        other => panic!("expected a hub error, got {other:?}"),
    }
}

#[test]
fn fetches_what_is_needed_once() {
    let (cache, server) = (tempfile::tempdir().unwrap(), Server::start(good));
    let hub = server.hub(cache.path());
    let dir = hub.resolve("org/name").unwrap();
    assert_eq!(dir, cache.path().join("models--org--name/snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(dir.join("config.json")).unwrap(), CONFIG);
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
    let reference = fs::read_to_string(cache.path().join("models--org--name/refs/main")).unwrap();
    assert_eq!(reference, COMMIT);
    assert_eq!(server.requests("/api/models/org/name/revision/main")[0].headers["authorization"], "Bearer secret");

    assert_eq!(hub.resolve("org/name").unwrap(), dir);
    assert_eq!(server.requests("/resolve/").len(), 2, "the second time nothing is fetched");
    // By commit, without a reference of that name, offline.
    let offline = Hub { offline: true, ..hub };
    assert_eq!(offline.resolve("org/name").unwrap(), dir);
    assert_eq!(offline.resolve(&format!("org/name@{COMMIT}")).unwrap(), dir);
    assert!(hub_error(offline.resolve("org/name@other")).contains("HF_HUB_OFFLINE"));
    assert!(hub_error(offline.resolve("org/absent")).contains("HF_HUB_OFFLINE"));
    assert_eq!(server.requests("").len(), 4);
}

#[test]
fn revision_is_part_of_the_request() {
    let (cache, server) = (tempfile::tempdir().unwrap(), Server::start(good));
    server.hub(cache.path()).resolve("org/name@refs/pr/1").unwrap();
    assert_eq!(server.requests("/api/models/org/name/revision/refs%2Fpr%2F1").len(), 1);
    assert!(cache.path().join("models--org--name/refs/refs/pr/1").is_file());
}

#[test]
fn continues_after_a_broken_transfer() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request| {
        let mut answer = good(request);
        if request.path.ends_with("/model.safetensors") && !request.headers.contains_key("range") {
            answer.cut = 33_333;
        }
        answer
    });
    let dir = server.hub(cache.path()).resolve("org/name").unwrap();
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<_> = server.requests("model.safetensors").iter().map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges, [None, Some("bytes=33333-".to_string())]);
}

#[test]
fn starts_over_where_ranges_are_ignored_or_the_rest_is_wrong() {
    for ignore_ranges in [true, false] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(move |request| match request.headers.get("range") {
            Some(_) if ignore_ranges => Answer::new(200, weights()),
            _ => good(request),
        });
        // What an earlier run left: right bytes in one case, wrong ones in the other.
        let blobs = cache.path().join("models--org--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let left = if ignore_ranges { weights()[..1000].to_vec() } else { vec![0xee; 1000] };
        fs::write(blobs.join(format!("{WEIGHTS_SHA256}.incomplete")), left).unwrap();
        let dir = server.hub(cache.path()).resolve("org/name").unwrap();
        assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    }
}

#[test]
fn refuses_wrong_content() {
    for (content, says) in
        [(vec![1; 70_000], "SHA-256"), (vec![1; 70_001], "longer"), (vec![1; 69_999], "69999 of 70000")]
    {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(move |request| match request.path.ends_with("/model.safetensors") {
            true => Answer::new(200, content.clone()),
            false => good(request),
        });
        let reason = hub_error(server.hub(cache.path()).resolve("org/name"));
        assert!(reason.contains(says), "{reason}");
        let snapshot = cache.path().join("models--org--name/snapshots").join(COMMIT);
        assert!(!snapshot.join("model.safetensors").exists());
        assert!(!cache.path().join("models--org--name/blobs").join(WEIGHTS_SHA256).exists());
    }
}

#[test]
fn token_stays_with_the_hub() {
    let cache = tempfile::tempdir().unwrap();
    let cdn = Server::start(good);
    let to = cdn.address.clone();
    let server = Server::start(move |request| {
        if request.path.ends_with("/model.safetensors") {
            return Answer::new(302, "").header("Location", format!("{to}/cdn/model.safetensors"));
        }
        if request.path.ends_with("resolve/0123456789abcdef0123456789abcdef01234567/config.json") {
            return Answer::new(307, "").header("Location", "/renamed/config.json");
        }
        good(request)
    });
    let dir = server.hub(cache.path()).resolve("org/name").unwrap();
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    assert_eq!(cdn.requests("").len(), 1);
    assert_eq!(cdn.requests("")[0].headers.get("authorization"), None);
    assert_eq!(server.requests("/renamed/config.json")[0].headers["authorization"], "Bearer secret");
}

#[test]
fn endless_redirects_end() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|_| Answer::new(302, "").header("Location", "/again"));
    assert!(hub_error(server.hub(cache.path()).resolve("org/name")).contains("redirects"));
}

#[test]
fn says_what_the_hub_answers() {
    for (status, says, tries) in [
        (401, "HF_TOKEN", 1),
        (403, "terms", 1),
        (404, "no such repository", 1),
        (429, "too many requests", 5),
        (500, "try again later", 5),
        (503, "try again later", 5),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(move |_| Answer::new(status, "x").header("X-Error-Message", "in its own words"));
        let reason = hub_error(server.hub(cache.path()).resolve("org/name"));
        assert!(reason.contains(says) && reason.contains(&status.to_string()), "{reason}");
        assert!(reason.contains("in its own words"), "{reason}");
        assert_eq!(server.requests("").len(), tries, "{status}");
    }
}

#[test]
fn recovers_from_passing_failures() {
    let cache = tempfile::tempdir().unwrap();
    let count = Mutex::new(0);
    let server = Server::start(move |request| {
        let mut count = count.lock().unwrap();
        *count += 1;
        match *count % 3 {
            1 => Answer::new(503, ""),
            2 => Answer::new(429, "").header("Retry-After", "0"),
            _ => good(request),
        }
    });
    let dir = server.hub(cache.path()).resolve("org/name").unwrap();
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn refuses_hostile_listings() {
    let cases = [
        json!({"rfilename": "../../evil.json", "size": 1, "blobId": "a".repeat(40)}),
        json!({"rfilename": "/etc/evil.json", "size": 1, "blobId": "a".repeat(40)}),
        json!({"rfilename": "a/../../evil.json", "size": 1, "blobId": "a".repeat(40)}),
        json!({"rfilename": "C:\\evil.json", "size": 1, "blobId": "a".repeat(40)}),
        json!({"rfilename": "", "size": 1, "blobId": "a".repeat(40)}),
        json!({"rfilename": "tokenizer.json", "size": 1, "blobId": "../../evil"}),
        json!({"rfilename": "tokenizer.json", "size": 1, "blobId": "a".repeat(40), "lfs": {"sha256": "../x", "size": 1}}),
    ];
    for case in cases {
        let cache = tempfile::tempdir().unwrap();
        let mut list = listing();
        list["siblings"].as_array_mut().unwrap().push(case.clone());
        let server = Server::start(move |_| Answer::new(200, list.to_string()));
        let reason = hub_error(server.hub(cache.path()).resolve("org/name"));
        assert!(reason.contains("refused"), "{case}: {reason}");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0, "{case}");
    }
    for (body, says) in [
        ("not json".to_string(), "malformed"),
        (json!({"sha": "../..", "siblings": []}).to_string(), "commit"),
        (json!({"sha": COMMIT, "siblings": []}).to_string(), "config.json"),
        (
            json!({"sha": COMMIT, "siblings": [{"rfilename": "config.json"}, {"rfilename": "m.bin"}]}).to_string(),
            ".bin",
        ),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(move |_| Answer::new(200, body.clone()));
        let reason = hub_error(server.hub(cache.path()).resolve("org/name"));
        assert!(reason.contains(says), "{reason}");
    }
}

#[test]
fn concurrent_downloads_share_one_transfer() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(|request| {
        std::thread::sleep(Duration::from_millis(50));
        good(request)
    });
    let hub = server.hub(cache.path());
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| hub.resolve("org/name").unwrap())).collect();
        for one in all {
            let dir = one.join().unwrap();
            assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
        }
    });
    assert_eq!(server.requests("model.safetensors").len(), 1);
}

#[test]
fn an_unreachable_hub_leaves_the_cache() {
    let (cache, server) = (tempfile::tempdir().unwrap(), Server::start(good));
    let hub = server.hub(cache.path());
    let dir = hub.resolve("org/name").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = Hub { endpoint: format!("http://{closed}"), ..hub };
    assert_eq!(unreachable.resolve("org/name").unwrap(), dir);
    assert!(hub_error(unreachable.resolve("org/absent")).contains("cannot reach"));
}

#[test]
fn a_directory_is_itself_and_a_wrong_name_says_both_readings() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(resolve(dir.path().to_str().unwrap()).unwrap(), dir.path());
    for name in [
        "./no/such",
        "/no/such/dir",
        "name",
        "a/b/c",
        "../x/y",
        "org/..",
        "org/na me",
        "org/name@",
        "org/name@a/../b",
        "",
    ] {
        let reason = hub_error(resolve(name));
        assert!(reason.contains("no such directory") && reason.contains("org/name"), "{name}: {reason}");
    }
}

//! Transfers from the hub: redirects, retries, continued and checked downloads.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::ProgressBar;
use ring::digest::{Context, SHA256};
use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body};

use crate::error::{Error, Result};

/// Tries of one request that bring nothing new.
const TRIES: u32 = 5;
/// Redirects followed for one request.
const REDIRECTS: usize = 10;
/// Longest wait that a server may ask for.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// Largest answer that is not a file.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// A client of one hub.
pub(super) struct Fetch<'a> {
    agent: Agent,
    endpoint: &'a str,
    token: Option<&'a str>,
    retry_delay: Duration,
}

/// Why a transfer failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The hub's answer.
    Status { code: u16, message: String, wait: Option<Duration> },
    /// No answer, or one that broke off.
    Network(String),
    /// The content is not what the hub lists.
    Content(String),
    /// This machine's side.
    Local(Error),
}

impl Failure {
    /// Whether the same request may work later.
    fn transient(&self) -> bool {
        match self {
            Failure::Status { code, .. } => matches!(code, 408 | 416 | 429 | 500..),
            Failure::Network(_) | Failure::Content(_) => true,
            Failure::Local(_) => false,
        }
    }

    /// The error to show for `model`, whose page is `endpoint/id`.
    pub(super) fn explain(self, model: &str, endpoint: &str, id: &str) -> Error {
        let reason = match self {
            Failure::Local(error) => return error,
            Failure::Network(reason) | Failure::Content(reason) => reason,
            Failure::Status { code, message, .. } => {
                let advice = match code {
                    401 => "no such repository, or it is private or gated: set HF_TOKEN to a token that may read it",
                    403 => "access denied: accept the model's terms on its page, and set HF_TOKEN to your token",
                    404 => "no such repository, revision or file",
                    429 => "too many requests: wait, or set HF_TOKEN for a higher limit",
                    500.. => "the hub has a problem: try again later",
                    _ => "unexpected answer",
                };
                let message = if message.is_empty() { message } else { format!(" ({message})") };
                format!("{advice} [HTTP {code} from {endpoint}/{id}]{message}")
            }
        };
        Error::Hub { model: model.to_string(), reason }
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Failure {
        Failure::Network(format!("cannot reach the hub: {error}"))
    }
}

impl<'a> Fetch<'a> {
    pub(super) fn new(endpoint: &'a str, token: Option<&'a str>, retry_delay: Duration) -> Fetch<'a> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .accept_encoding("identity")
            .user_agent(concat!("lowbit/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build();
        Fetch { agent: config.new_agent(), endpoint, token, retry_delay }
    }

    /// The answer to a request, as text.
    pub(super) fn text(&self, url: &str) -> Result<String, Failure> {
        self.retry(|_| {
            let mut text = String::new();
            let body = self.get(url, 0)?.into_body().into_reader();
            body.take(MAX_TEXT_BYTES).read_to_string(&mut text).map_err(|e| Failure::Network(e.to_string()))?;
            Ok(text)
        })
    }

    /// Downloads to `target`, which appears only when it is complete and, where they are known, of the right size
    /// and hash. What earlier tries left in `target.incomplete` is continued; a lock on that file makes concurrent
    /// downloads of it, from any process, wait for the first.
    pub(super) fn file(
        &self,
        url: &str,
        target: &Path,
        size: Option<u64>,
        sha256: Option<&str>,
        progress: &ProgressBar,
    ) -> Result<(), Failure> {
        let folder = target.parent().unwrap_or(target);
        std::fs::create_dir_all(folder).map_err(local(folder))?;
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(".incomplete");
        let part = target.with_file_name(name);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&part).map_err(local(&part))?;
        file.lock().map_err(local(&part))?;
        if target.exists() {
            // Another process finished it. The file opened here may be a new, empty one.
            let _ = std::fs::remove_file(&part);
            return Ok(());
        }
        let before = progress.position();
        let mut most = 0;
        self.retry(|advanced| {
            let mut download = Download { file: &mut file, path: &part, have: 0, hash: Context::new(&SHA256) };
            let result = self.download(url, &mut download, size, |have| progress.set_position(before + have));
            *advanced = download.have > most;
            most = most.max(download.have);
            let reason = match (result, size, sha256) {
                (Err(failure), _, _) => {
                    // A range that the server does not have: start over.
                    if matches!(failure, Failure::Status { code: 416, .. }) {
                        download.restart()?;
                    }
                    return Err(failure);
                }
                (Ok(()), Some(size), _) if download.have < size => {
                    return Err(Failure::Network(format!("broke off after {} of {size} bytes", download.have)));
                }
                (Ok(()), Some(size), _) if download.have > size => format!("is longer than the {size} bytes listed"),
                (Ok(()), _, Some(listed)) => match hex(download.hash.clone().finish().as_ref()) {
                    got if got == listed.to_lowercase() => return Ok(()),
                    got => format!("has SHA-256 {got}, the hub lists {listed}"),
                },
                (Ok(()), _, None) => return Ok(()),
            };
            *advanced = false;
            download.restart()?;
            Err(Failure::Content(reason))
        })?;
        file.sync_all().map_err(local(&part))?;
        std::fs::rename(&part, target).map_err(local(target))
    }

    /// Appends what the file lacks, in one request.
    fn download(
        &self,
        url: &str,
        download: &mut Download,
        size: Option<u64>,
        progress: impl Fn(u64),
    ) -> Result<(), Failure> {
        download.read_back()?;
        progress(download.have);
        if size.is_some_and(|size| download.have >= size) {
            return Ok(());
        }
        let response = self.get(url, download.have)?;
        if download.have > 0 {
            let from = response.headers().get("content-range").and_then(|range| range.to_str().ok());
            let continues = from.is_some_and(|range| range.starts_with(&format!("bytes {}-", download.have)));
            if response.status() != StatusCode::PARTIAL_CONTENT || !continues {
                download.restart()?;
            }
            if response.status() == StatusCode::PARTIAL_CONTENT && !continues {
                return Err(Failure::Network("the hub answers with another part than asked for".to_string()));
            }
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) => return Err(Failure::Network(format!("broke off after {} bytes: {e}", download.have))),
            };
            download.append(&buffer[..n])?;
            progress(download.have);
            if size.is_some_and(|size| download.have > size) {
                return Ok(());
            }
        }
    }

    /// The answer to a request from byte `from` on, redirects followed. The token goes to the hub itself only: the
    /// same scheme, host and port.
    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let parse = |url: &str| url.parse::<Uri>().map_err(|e| Failure::Network(format!("malformed URL `{url}`: {e}")));
        let hub = origin(&parse(self.endpoint)?);
        let mut uri = parse(url)?;
        for _ in 0..=REDIRECTS {
            let mut request = self.agent.get(uri.clone());
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            if let Some(token) = self.token.filter(|_| origin(&uri) == hub) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call()?;
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            match (response.status(), header("location")) {
                (status, _) if status.is_success() => return Ok(response),
                (status, Some(location)) if status.is_redirection() => {
                    uri = parse(&match location.strip_prefix('/') {
                        Some(path) if !path.starts_with('/') => format!("{}{location}", origin(&uri)),
                        _ => location.to_string(),
                    })?;
                    if uri.scheme_str() != Some("https") && hub.starts_with("https:") {
                        return Err(Failure::Network(format!("refused: the hub redirects to `{location}`")));
                    }
                }
                (status, _) => {
                    let wait = header("retry-after").and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
                    let message = header("x-error-message").unwrap_or_default().chars().take(300).collect();
                    return Err(Failure::Status { code: status.as_u16(), message, wait });
                }
            }
        }
        Err(Failure::Network(format!("more than {REDIRECTS} redirects")))
    }

    /// Tries until it works, the failure is final, or [`TRIES`] in a row bring nothing new.
    fn retry<T>(&self, mut attempt: impl FnMut(&mut bool) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut failures = 0;
        loop {
            let mut advanced = false;
            let failure = match attempt(&mut advanced) {
                Err(failure) if failure.transient() => failure,
                done => return done,
            };
            failures = if advanced { 1 } else { failures + 1 };
            if failures == TRIES {
                return Err(failure);
            }
            let delay = self.retry_delay * 2u32.pow(failures - 1);
            let asked = if let Failure::Status { wait: Some(wait), .. } = failure { wait } else { delay };
            tracing::debug!("retrying: {failure:?}");
            std::thread::sleep(asked.max(delay).min(MAX_WAIT));
        }
    }
}

/// A file on its way: its first `have` bytes, and their hash.
struct Download<'a> {
    file: &'a mut File,
    path: &'a Path,
    have: u64,
    hash: Context,
}

impl Download<'_> {
    /// Hashes what is there already.
    fn read_back(&mut self) -> Result<(), Failure> {
        self.file.seek(SeekFrom::Start(0)).map_err(local(self.path))?;
        (self.have, self.hash) = (0, Context::new(&SHA256));
        let mut buffer = vec![0; 1 << 20];
        loop {
            match self.file.read(&mut buffer).map_err(local(self.path))? {
                0 => return Ok(()),
                n => {
                    self.hash.update(&buffer[..n]);
                    self.have += n as u64;
                }
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all(bytes).map_err(local(self.path))?;
        self.hash.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), Failure> {
        self.file.set_len(0).map_err(local(self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(local(self.path))?;
        (self.have, self.hash) = (0, Context::new(&SHA256));
        Ok(())
    }
}

/// A failed operation on the file at `path`.
fn local(path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let to_error = Error::io(path);
    move |e| Failure::Local(to_error(e))
}

/// Scheme, host and port.
fn origin(uri: &Uri) -> String {
    let scheme = uri.scheme_str().unwrap_or_default();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    format!("{scheme}://{}:{port}", uri.host().unwrap_or_default().to_lowercase())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

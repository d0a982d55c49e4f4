//! A file of requests in OpenAI's batch format, answered by the routes of the server without a socket.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, header};
use futures_util::StreamExt;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tower::ServiceExt;

use crate::error::{Error, Result};

use super::app::unique_id;
use super::{Server, ServerOptions, Service, api};

/// Routes that a batch may ask.
const ROUTES: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];

/// One line of the input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    custom_id: String,
    method: String,
    url: String,
    body: Map<String, Value>,
}

/// How a batch went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchSummary {
    /// Requests that were answered 200, and those that were not.
    pub completed: usize,
    /// Requests that were answered with an error.
    pub failed: usize,
    /// Requests whose answers an earlier run had written.
    pub resumed: usize,
}

/// Answers every request of `input` and writes a line for each to `output`, in the order in which they end. An interrupted run leaves
/// `output` with `.part` behind its name, and goes on there when it is started again. `progress` is told of requests done and in all.
///
/// # Errors
/// `Input` naming the line that is wrong, before any work; `Io`; those of `load`.
pub fn run_batch(
    options: &ServerOptions,
    load: impl FnOnce() -> Result<Service>,
    (input, output): (&Path, &Path),
    progress: &mut dyn FnMut(usize, usize),
) -> Result<BatchSummary> {
    let ids = check(input)?;
    let (all, (mut file, done)) = (ids.len(), open_part(&part_of(output), &ids)?);
    let service = load()?;
    let at_once = 2 * service.engine.runner().limits().max_seqs;
    let runtime = super::runtime()?;
    let summary = runtime.block_on(async {
        let server = Arc::new(Server::new(options));
        let (app, thread) = super::start(service, options)?;
        server.serve_model(Arc::clone(&app))?;
        let router = api::router(server, false);
        let mut summary = BatchSummary { resumed: done.len(), ..BatchSummary::default() };
        progress(summary.resumed, all);
        let lines = BufReader::new(File::open(input).map_err(Error::io(input))?).lines();
        let wanted = lines.map_while(Result::ok).filter(|line| !line.trim().is_empty());
        let left = wanted
            .filter_map(|line| serde_json::from_str::<Line>(&line).ok())
            .filter(|line| !done.contains(&line.custom_id));
        let mut answers =
            futures_util::stream::iter(left).map(|line| answer(router.clone(), line)).buffer_unordered(at_once);
        while let Some(answer) = answers.next().await {
            match answer["response"]["status_code"] == 200 {
                true => summary.completed += 1,
                false => summary.failed += 1,
            }
            file.write_all(format!("{answer}\n").as_bytes()).map_err(Error::io(output))?;
            progress(summary.resumed + summary.completed + summary.failed, all);
        }
        // The device must not be used while the process ends.
        app.engine.stop();
        let _ = thread.join();
        Ok(summary)
    });
    runtime.shutdown_background();
    let summary = summary?;
    let answered = summary.resumed + summary.completed + summary.failed;
    if answered != all {
        let reason = format!("changed while it was read: {answered} of {all} requests were answered; start again");
        return Err(Error::input(input.display().to_string(), reason));
    }
    file.sync_all().map_err(Error::io(output))?;
    std::fs::rename(part_of(output), output).map_err(Error::io(output))?;
    Ok(summary)
}

fn part_of(output: &Path) -> PathBuf {
    let mut part = output.as_os_str().to_owned();
    part.push(".part");
    part.into()
}

/// Checks every line; the ids of all.
fn check(input: &Path) -> Result<HashSet<String>> {
    if !std::fs::metadata(input).map_err(Error::io(input))?.is_file() {
        // It is read twice, so that nothing is computed before a wrong line is found.
        return Err(Error::input(input.display().to_string(), "is no regular file; write the requests to one first"));
    }
    let mut ids = HashSet::new();
    for (number, line) in BufReader::new(File::open(input).map_err(Error::io(input))?).lines().enumerate() {
        let line = line.map_err(Error::io(input))?;
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |reason: String| Error::input(format!("{}:{}", input.display(), number + 1), reason);
        let Line { custom_id, method, url, body } = serde_json::from_str(&line).map_err(|e| wrong(e.to_string()))?;
        if !method.eq_ignore_ascii_case("POST") || !ROUTES.contains(&url.as_str()) {
            return Err(wrong(format!("`{method} {url}`: expected POST and one of {}", ROUTES.join(", "))));
        }
        if body.get("stream") == Some(&json!(true)) {
            return Err(wrong("`stream` has no meaning in a batch".into()));
        }
        if !ids.insert(custom_id.clone()) {
            return Err(wrong(format!("custom_id `{custom_id}` stands there twice")));
        }
    }
    match ids.is_empty() {
        true => Err(Error::input(input.display().to_string(), "holds no request")),
        false => Ok(ids),
    }
}

/// The output as far as an earlier run came, with the ids of its lines; a last line that was cut off is taken off. The file is locked until
/// it is closed.
///
/// # Errors
/// `Input` where another run writes it, or a line is no answer to one of `ids`: then it is not ours to write.
fn open_part(part: &Path, ids: &HashSet<String>) -> Result<(File, HashSet<String>)> {
    let wrong = |reason: String| Error::input(part.display().to_string(), reason);
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(part).map_err(Error::io(part))?;
    if file.try_lock().is_err() {
        return Err(wrong("another run is writing it".into()));
    }
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(Error::io(part))?;
    let end = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    let mut done = HashSet::new();
    for (number, line) in text[..end].split_inclusive(|&byte| byte == b'\n').enumerate() {
        let answer: Value = serde_json::from_slice(line).unwrap_or_default();
        let is_answer = answer.get("response").is_some() && answer.get("error").is_some();
        match answer["custom_id"].as_str().filter(|id| is_answer && ids.contains(*id)) {
            Some(id) => done.insert(id.to_owned()),
            None => {
                let reason = "is no answer to a request of the input; remove the file, or name another output";
                return Err(wrong(format!("line {} {reason}", number + 1)));
            }
        };
    }
    if end == 0 && !text.is_empty() && !text.starts_with(b"{") {
        return Err(wrong("is no output of an earlier run; remove it, or name another output".into()));
    }
    file.set_len(end as u64).and_then(|()| file.seek(std::io::SeekFrom::Start(end as u64))).map_err(Error::io(part))?;
    Ok((file, done))
}

/// Asks the router; where the queue is full, again until it is not.
async fn answer(router: Router, line: Line) -> Value {
    let body = Value::Object(line.body).to_string();
    loop {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&line.url)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body.clone()));
        let failed = |message: String| {
            let error = json!({ "code": "internal", "message": message });
            json!({ "id": unique_id("batch_req_"), "custom_id": line.custom_id, "response": null, "error": error })
        };
        let request = match request {
            Ok(request) => request,
            Err(error) => return failed(error.to_string()),
        };
        let response = match router.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let status = response.status().as_u16();
        if status == 429 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            continue;
        }
        let id = response.headers().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
        let bytes = match response.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return failed(error.to_string()),
        };
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        return json!({
            "id": unique_id("batch_req_"),
            "custom_id": line.custom_id,
            "response": { "status_code": status, "request_id": id, "body": body },
            "error": null,
        });
    }
}

//! One line for each request that was answered: never what it asked.

use std::io::Write;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessLogFormat {
    /// Nothing.
    Off,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Lines that wait to be written; where standard error does not take them, further ones are dropped.
const WAITING_LINES: usize = 4096;

/// What is known of a request.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) id: &'a str,
    pub(super) method: &'a str,
    /// The route's pattern.
    pub(super) route: &'a str,
    pub(super) status: u16,
    /// Until the response began.
    pub(super) took: Duration,
    /// Name of the key.
    pub(super) key: Option<&'a str>,
}

/// Writes lines to standard error, on a thread of its own: a reader that stalls does not stall requests.
#[derive(Debug)]
pub(super) struct AccessLog {
    format: AccessLogFormat,
    lines: SyncSender<String>,
}

impl AccessLog {
    /// A log in that format.
    pub(super) fn new(format: AccessLogFormat) -> AccessLog {
        let (lines, inbox) = sync_channel::<String>(WAITING_LINES);
        if format != AccessLogFormat::Off {
            std::thread::spawn(move || {
                for line in inbox {
                    let mut out = std::io::stderr().lock();
                    if out.write_all(line.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
        AccessLog { format, lines }
    }

    /// Writes a line.
    pub(super) fn write(&self, entry: &Entry<'_>) {
        let line = match self.format {
            AccessLogFormat::Off => return,
            AccessLogFormat::Text => entry.text(),
            AccessLogFormat::Json => entry.json(),
        };
        let _ = self.lines.try_send(line);
    }
}

impl Entry<'_> {
    fn text(&self) -> String {
        let Entry { id, method, route, status, took, key } = self;
        let key = key.map(|key| format!(" key={key}")).unwrap_or_default();
        format!("{method} {route} {status} {:.1} ms {id}{key}\n", took.as_secs_f64() * 1e3)
    }

    fn json(&self) -> String {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let line = json!({
            "time": (time * 1e3).round() / 1e3,
            "request_id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "ms": (self.took.as_secs_f64() * 1e4).round() / 10.0,
            "key": self.key,
        });
        format!("{line}\n")
    }
}

//! Writing results: stdout without panics on a closed pipe, progress on a terminal, numbers as people read them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::error::{Error, Result};

/// Writes text to stdout and flushes it.
pub(super) fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("stdout"))
}

/// Writes a line to stderr, for verbs that go on whoever reads it: a pipe that was closed is no reason to end.
pub(super) fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Writes one JSON value on one line to stdout.
pub(super) fn write_json(value: &Value) -> Result<()> {
    write(&format!("{value}\n"))
}

/// Writes a file beside its place and renames it there.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".part");
    let aside = PathBuf::from(aside);
    std::fs::write(&aside, bytes).map_err(Error::io(path))?;
    std::fs::rename(&aside, path).map_err(Error::io(path))
}

/// A progress bar on stderr, hidden when that is no terminal.
pub(super) fn progress(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {elapsed}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_message(what)
}

/// A moment as `2026-11-22T01:20:33Z`.
pub(super) fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years from March on, so that a leap day is a year's last: 1970-01-01 is 306 days into the 1969 that began then.
    let mut day = days + 719_468; // since 0000-03-01
    let era = day / 146_097; // 400 years
    day %= 146_097;
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, january) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + january;
    format!("{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Bytes in binary units: `512 B`, `3.5 MiB`.
pub(super) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.2} {unit}") }
}

/// A count in decimal units: `950`, `5.77 M`, `8.03 B`.
pub(super) fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.2} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

/// `count / time`, 0 for no time at all.
pub(super) fn per_second(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// SHA-256 in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// A number with as many decimals as JSON readers need of a measurement.
pub(super) fn rounded(x: f64) -> Value {
    serde_json::json!((x * 1e6).round() / 1e6)
}

/// Rows as a Markdown table, columns aligned; those in `right` to the right.
pub(super) fn table(header: &[&str], rows: &[Vec<String>], right: &[&str]) -> String {
    let width = |c: usize| rows.iter().map(|row| row[c].chars().count()).chain([header[c].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cells = cells.iter().zip(header).zip(&widths).map(|((cell, name), &w)| match right.contains(name) {
            true => format!(" {cell:>w$} "),
            false => format!(" {cell:<w$} "),
        });
        format!("|{}|\n", cells.collect::<Vec<_>>().join("|"))
    };
    let rule = header.iter().zip(&widths).map(|(name, &w)| match right.contains(name) {
        true => format!("{}:", "-".repeat(w + 1)),
        false => "-".repeat(w + 2),
    });
    let mut text = line(header.to_vec());
    text.push_str(&format!("|{}|\n", rule.collect::<Vec<_>>().join("|")));
    rows.iter().for_each(|row| text.push_str(&line(row.iter().map(String::as_str).collect())));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `date -u -d @N +%FT%TZ`.
    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn units() {
        assert_eq!([bytes(0), bytes(1023), bytes(1024), bytes(5 << 30)], ["0 B", "1023 B", "1.00 KiB", "5.00 GiB"]);
        assert_eq!([count(999_999), count(5_770_000), count(8_030_000_000)], ["999999", "5.77 M", "8.03 B"]);
        assert_eq!(per_second(3, Duration::ZERO), 0.0);
    }

    #[test]
    fn tables_align() {
        let rows = [vec!["pp512".to_string(), "1.5".to_string()]];
        assert_eq!(table(&["test", "t/s"], &rows, &["t/s"]), "| test  | t/s |\n|-------|----:|\n| pp512 | 1.5 |\n");
    }
}

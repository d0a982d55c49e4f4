//! All requests of a run: each sent when it is due, so many at once.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::client::{Client, Reply};
use super::load::Load;
use crate::error::{Error, Result};

/// Stack of a thread that waits for one stream.
const STACK: usize = 512 << 10;

/// What a run left behind.
#[derive(Debug)]
pub(super) struct Run {
    /// One for each prompt, in their order.
    pub(super) replies: Vec<Reply>,
    pub(super) duration: Duration,
    /// Seconds of processor time that this process took; `None` where the system does not say.
    pub(super) cpu_seconds: Option<f64>,
}

/// Sends all prompts of `load` to `model`, prompt `i` not before `arrivals[i]` seconds, in their order and at most `concurrency` at
/// once.
///
/// # Errors
/// [`Error::Io`] when the system refuses so many threads.
pub(super) fn drive(
    client: &Client,
    model: &str,
    load: &Load,
    arrivals: &[f64],
    concurrency: usize,
    bar: &ProgressBar,
) -> Result<Run> {
    let threads = concurrency.min(arrivals.len());
    let next = AtomicUsize::new(0);
    // Held until all threads are there, each with its first prompt; empty when they are to go home.
    let start: RwLock<Option<Instant>> = RwLock::new(None);
    let work = || {
        let mut replies = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(&at) = arrivals.get(i) else { return replies };
            let body = client.body(model, load, i);
            let Some(start) = *start.read().unwrap_or_else(PoisonError::into_inner) else { return replies };
            let due = start + Duration::from_secs_f64(at);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            replies.push((i, client.ask(&body, load.input_len(i))));
            bar.inc(1);
        }
    };
    thread::scope(|scope| {
        let mut begin = start.write().unwrap_or_else(PoisonError::into_inner);
        let spawn = |_| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let handles = (0..threads).map(spawn).collect::<std::io::Result<Vec<_>>>();
        let handles = handles.map_err(Error::io(format!("{threads} threads (--max-concurrency)")))?;
        let (cpu, now) = (cpu_seconds(), Instant::now());
        *begin = Some(now);
        drop(begin);
        let join = |handle: thread::ScopedJoinHandle<'_, _>| handle.join().unwrap_or_else(|panic| resume_unwind(panic));
        let mut replies: Vec<(usize, Reply)> = handles.into_iter().flat_map(join).collect();
        let duration = now.elapsed();
        let cpu_seconds = cpu.zip(cpu_seconds()).map(|(before, after)| after - before);
        replies.sort_unstable_by_key(|(i, _)| *i);
        Ok(Run { replies: replies.into_iter().map(|(_, reply)| reply).collect(), duration, cpu_seconds })
    })
}

/// Processor time of this process and its threads so far: fields 14 and 15 of /proc/self/stat (proc(5)), in hundredths of a
/// second, which Linux tells programs on every machine.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in the second field may hold blanks; the third follows its closing bracket.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<f64>().ok());
    Some((ticks.next()?? + ticks.next()??) / 100.0)
}

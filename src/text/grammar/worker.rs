//! Threads that compile, each with a stack for deep recursion, and nobody waits for one longer than a time.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::text::panics::guard;

/// Longest time that a source is compiled, waiting for its turn included.
pub const MAX_SECONDS: u64 = 10;

/// Most sources that are compiled at once, those included that nobody waits for any more.
const MAX_RUNNING: usize = 4;

/// Bytes of address space. The parser's recursion is bounded by the length of a source, not more tightly.
const STACK_BYTES: usize = 256 << 20;

/// What is said of a source that makes the parser panic.
pub(super) const FAILED: &str = "is not understood: the grammar parser failed on it";

/// How many run.
#[derive(Debug, Default)]
pub(super) struct Workers {
    running: Arc<(Mutex<usize>, Condvar)>,
}

/// A place among those that run, given back when it is dropped.
struct Place(Arc<(Mutex<usize>, Condvar)>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.1.notify_one();
    }
}

impl Workers {
    /// Runs `work` and waits for it; a panic of it is an error, too.
    ///
    /// # Errors
    /// [`Error::Engine`] when there was no place for it in time, or no thread. What is wrong with the work is the inner error: what it says
    /// itself, that it panicked, or that it takes too long. It then goes on, and keeps its place.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<Result<T, String>> {
        let deadline = Instant::now() + Duration::from_secs(MAX_SECONDS);
        let place = self.place(deadline)?;
        let (done, outcome) = sync_channel(1);
        let body = move || {
            let result = guard(work).unwrap_or_else(|| Err(FAILED.to_string()));
            // Nobody may wait any more.
            let _gone = done.send(result);
            drop(place);
        };
        let thread = std::thread::Builder::new().name("grammar".to_string()).stack_size(STACK_BYTES).spawn(body);
        thread.map_err(|e| Error::Engine { reason: format!("no thread to compile a grammar: {e}") })?;
        Ok(match outcome.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("is too complex: it is not compiled after {MAX_SECONDS} seconds"))
            }
            Err(RecvTimeoutError::Disconnected) => Err(FAILED.to_string()),
        })
    }

    fn place(&self, deadline: Instant) -> Result<Place> {
        let (running, freed) = &*self.running;
        let left = deadline.saturating_duration_since(Instant::now());
        let guard = running.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = freed.wait_timeout_while(guard, left, |running| *running >= MAX_RUNNING);
        let (mut running, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            let reason = format!("all {MAX_RUNNING} grammar compilers are busy; send the request again later");
            return Err(Error::Engine { reason });
        }
        *running += 1;
        Ok(Place(Arc::clone(&self.running)))
    }
}

//! Work that must end in time: a thread cancels what does not.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llguidance::CancellationHandle;

/// How late the thread may be.
const TOLERANCE: Duration = Duration::from_millis(20);

static WATCH: Watch = Watch { state: Mutex::new(Watched::new()), woken: Condvar::new() };

struct Watch {
    state: Mutex<Watched>,
    woken: Condvar,
}

struct Watched {
    next: u64,
    /// What runs, by the time when it is to be cancelled.
    running: BTreeMap<(Instant, u64), CancellationHandle>,
    has_thread: bool,
    /// The thread waits for something to run.
    is_asleep: bool,
}

impl Watched {
    const fn new() -> Watched {
        Watched { next: 0, running: BTreeMap::new(), has_thread: false, is_asleep: false }
    }
}

/// Takes work off the list of what runs.
struct Running((Instant, u64));

impl Drop for Running {
    fn drop(&mut self) {
        WATCH.lock().running.remove(&self.0);
    }
}

/// Runs `work`, which `handle` cancels, and cancels it after `time`.
pub(super) fn within<T>(time: Duration, handle: &CancellationHandle, work: impl FnOnce() -> T) -> T {
    let _running = WATCH.begin(Instant::now() + time, handle.clone());
    work()
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&'static self, end: Instant, handle: CancellationHandle) -> Running {
        let mut state = self.lock();
        let key = (end, state.next);
        state.next += 1;
        state.running.insert(key, handle);
        if !state.has_thread {
            let thread = std::thread::Builder::new().name("deadlines".to_string());
            // Without a thread the parser's own limits are what is left.
            state.has_thread = thread.spawn(|| self.watch()).is_ok();
        } else if std::mem::take(&mut state.is_asleep) {
            self.woken.notify_one();
        }
        Running(key)
    }

    fn watch(&self) {
        loop {
            let mut state = self.lock();
            while state.running.is_empty() {
                state.is_asleep = true;
                state = self.woken.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let now = Instant::now();
            while let Some(first) = state.running.first_entry().filter(|first| first.key().0 <= now) {
                first.remove().cancel();
            }
            drop(state);
            // Most work is done long before: looking at it now and then costs less than being told of each.
            std::thread::sleep(TOLERANCE);
        }
    }
}

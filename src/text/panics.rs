//! Calls into libraries that panic on some malformed input: the panic becomes an error, its text goes to the log alone.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// A call of this thread is guarded.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `call`; `None` when it panics.
pub(super) fn guard<T>(call: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |panic| match GUARDED.get() {
            true => tracing::debug!("{panic}"),
            false => usual(panic),
        }));
    });
    let outer = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(outer);
    result.ok()
}

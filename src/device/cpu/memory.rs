//! How much memory the host has: the machine's, or the container's limit where that is lower.

use crate::error::{Error, Result};

/// Bytes that can be allocated without swapping, and bytes in all.
///
/// # Errors
/// `Io` where the system does not tell (`/proc/meminfo`, Linux).
pub(crate) fn free_and_total() -> Result<(u64, u64)> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let (Some(free), Some(total)) = (field("MemAvailable"), field("MemTotal")) else {
        return Err(Error::file(path, "expected lines `MemAvailable: n kB` and `MemTotal: n kB`"));
    };
    let control_group = |file: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse().ok()
    };
    Ok(match (control_group("memory.max"), control_group("memory.current")) {
        (Some(limit), Some(used)) if limit < total => (free.min(limit.saturating_sub(used)), limit),
        _ => (free, total),
    })
}

//! The driver's errors as ours.

use std::ffi::CStr;

use cudarc::driver::result::DriverError;

use crate::error::Error;

/// `error`, which `op` met, in the driver's own words.
pub(super) fn failure(op: &str, error: DriverError) -> Error {
    let text = |r: Result<&CStr, DriverError>| r.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Error::Cuda { op: op.into(), reason: format!("{} ({})", text(error.error_string()), text(error.error_name())) }
}

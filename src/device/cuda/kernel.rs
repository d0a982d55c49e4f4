//! Kernels ready to be launched, the shape of a launch, and the names of what is enqueued.
#![allow(unsafe_code)] // handles of the driver

use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use crate::error::{Error, Result};

/// A kernel of a loaded module. Made once by [`super::module::Modules`], launched often; valid as long as the device lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    pub(super) handle: sys::CUfunction,
    /// What errors call it by.
    pub(super) op: OpId,
}

// SAFETY: a function handle belongs to a context, not to a thread; every launch binds that context first.
unsafe impl Send for Kernel {}
// SAFETY: as above; the driver's functions that take one may be called from any thread.
unsafe impl Sync for Kernel {}

/// How the blocks of a launch lie, and how it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) blocks: [u32; 3],
    pub(super) threads: u32,
    /// Dynamic shared memory of a block.
    pub(super) shared_bytes: u32,
    /// Blocks, next to each other along x, that run together and see each other's shared memory; divides `blocks[0]`.
    /// Above 1 from sm_90 on.
    pub(super) cluster: u32,
    /// Starts before the kernel before it ends (programmatic dependent launch, sm_90 and newer).
    pub(super) overlaps: bool,
}

impl Grid {
    /// Blocks on their own, after all that came before.
    pub(super) fn new(blocks: [u32; 3], threads: u32, shared_bytes: u32) -> Self {
        Grid { blocks, threads, shared_bytes, cluster: 1, overlaps: false }
    }
}

/// What was enqueued, as a number that a launch can leave behind without formatting or locking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpId(pub(super) u32);

/// Ops that are no kernels, in the order of [`OpId`]'s constants.
const HOST_OPS: [&str; 8] =
    ["open", "allocate", "write", "fill", "duplicate", "download", "graph capture or replay", "linear (cuBLASLt)"];

impl OpId {
    pub(super) const OPEN: OpId = OpId(0);
    pub(super) const ALLOCATE: OpId = OpId(1);
    pub(super) const WRITE: OpId = OpId(2);
    pub(super) const FILL: OpId = OpId(3);
    pub(super) const DUPLICATE: OpId = OpId(4);
    pub(super) const DOWNLOAD: OpId = OpId(5);
    pub(super) const GRAPH: OpId = OpId(6);
    pub(super) const CUBLASLT: OpId = OpId(7);
}

/// Names behind [`OpId`]s: those of the host's ops, then kernels in the order in which they were first needed. Locked when a
/// kernel is resolved and when an error is reported, never by a launch.
#[derive(Debug, Default)]
pub(super) struct OpNames {
    kernels: Mutex<Vec<String>>,
}

impl OpNames {
    /// A number for `name`.
    pub(super) fn add(&self, name: &str) -> OpId {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        kernels.push(name.to_owned());
        OpId((HOST_OPS.len() + kernels.len() - 1) as u32)
    }

    /// The name that `id` was made for.
    pub(super) fn name(&self, id: OpId) -> String {
        let at = id.0 as usize;
        if let Some(name) = HOST_OPS.get(at) {
            return (*name).to_owned();
        }
        let kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        kernels.get(at - HOST_OPS.len()).cloned().unwrap_or_default()
    }
}

/// `n` as the 32-bit size that kernels take.
pub(super) fn u32_of(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::unsupported(format!("a dimension of {n}"), "Kernels index with 32 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_by_their_numbers() {
        let names = OpNames::default();
        let (a, b) = (names.add("rms_norm_bf16"), names.add("embed_f32"));
        assert_eq!((names.name(a), names.name(b)), ("rms_norm_bf16".into(), "embed_f32".into()));
        assert_eq!((names.name(OpId::OPEN), names.name(OpId::CUBLASLT)), ("open".into(), "linear (cuBLASLt)".into()));
        assert_eq!(names.name(OpId(99)), "");
    }
}

//! Embedded modules: loaded at first use, kernels resolved by name once.
#![allow(unsafe_code)] // the driver API

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUfunction_attribute as FunctionAttribute, CUjit_option as JitOption};

use super::driver_error::failure;
use super::embedded;
use super::kernel::{Kernel, OpId, OpNames};
use crate::error::{Error, Result};

/// Modules of one device, loaded in its context.
#[derive(Debug)]
pub(super) struct Modules {
    /// Compile the embedded PTX even where there is machine code for the GPU.
    force_ptx: bool,
    /// Opt-in limit of shared memory per block, bytes.
    max_shared: i32,
    loaded: Mutex<HashMap<&'static str, Module>>,
    names: OpNames,
}

#[derive(Debug)]
struct Module {
    handle: sys::CUmodule,
    kernels: HashMap<String, Kernel>,
}

// SAFETY: module and function handles belong to a context, not to a thread; every use binds that context first.
unsafe impl Send for Module {}

impl Modules {
    pub(super) fn new(force_ptx: bool, max_shared: i32) -> Self {
        Modules { force_ptx, max_shared, loaded: Mutex::default(), names: OpNames::default() }
    }

    /// Name of what was enqueued as `op`.
    pub(super) fn op_name(&self, op: OpId) -> String {
        self.names.name(op)
    }

    /// The kernel `function` of the embedded module `name`. The device's context must be current.
    ///
    /// # Errors
    /// `Cuda` when the module does not load or has no such function.
    pub(super) fn kernel(&self, name: &'static str, function: &str) -> Result<Kernel> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if !loaded.contains_key(name) {
            let handle = self.load(name)?;
            loaded.insert(name, Module { handle, kernels: HashMap::new() });
        }
        let module = loaded.get_mut(name).expect("inserted above");
        if let Some(&kernel) = module.kernels.get(function) {
            return Ok(kernel);
        }
        let kernel = Kernel { handle: self.resolve(module.handle, function)?, op: self.names.add(function) };
        module.kernels.insert(function.to_owned(), kernel);
        Ok(kernel)
    }

    /// Unloads all. The device's context must be current, and nothing of theirs may still run.
    pub(super) fn unload(&mut self) {
        let loaded = self.loaded.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (_, module) in loaded.drain() {
            // SAFETY: loaded once, removed here; an error means that the context is already gone.
            let _ = unsafe { result::module::unload(module.handle) };
        }
    }

    fn load(&self, name: &str) -> Result<sys::CUmodule> {
        let Some((_, image)) = embedded::MODULES.iter().find(|(n, _)| *n == name) else {
            return Err(Error::Cuda { op: name.into(), reason: "no such module is embedded in this binary".into() });
        };
        let ptx_only;
        let image = if self.force_ptx {
            ptx_only = keep_ptx(image).ok_or_else(|| Error::Cuda {
                op: name.into(),
                reason: "LOWBIT_FORCE_SM=80: the embedded module holds no PTX".into(),
            })?;
            ptx_only.as_ptr().cast::<c_void>()
        } else {
            image.as_ptr().cast::<c_void>()
        };
        tracing::debug!(module = name, ptx = self.force_ptx, "loading kernels");
        let mut log = vec![0u8; 8192];
        let mut options = [JitOption::CU_JIT_ERROR_LOG_BUFFER, JitOption::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
        let mut handle = std::ptr::null_mut();
        // SAFETY: image is a whole fatbin; the log buffer is as long as its option says.
        let status = unsafe {
            sys::cuModuleLoadDataEx(&mut handle, image, options.len() as u32, options.as_mut_ptr(), values.as_mut_ptr())
        };
        status.result().map_err(|e| {
            let Error::Cuda { op, mut reason } = failure(&format!("loading kernels `{name}`"), e) else {
                unreachable!("failure makes Error::Cuda")
            };
            if status == sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
                reason.push_str(&format!(". The binary holds kernels for {}", embedded::ARCHS.join(", ")));
            }
            if status == sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION {
                let nvcc = embedded::NVCC_VERSION;
                reason.push_str(&format!(
                    ". The kernels were compiled by nvcc {nvcc}: update the driver, or rebuild with an older nvcc"
                ));
            }
            if let Ok(log) = CStr::from_bytes_until_nul(&log)
                && !log.is_empty()
            {
                reason.push_str(": ");
                reason.push_str(log.to_string_lossy().trim());
            }
            Error::Cuda { op, reason }
        })?;
        Ok(handle)
    }

    fn resolve(&self, module: sys::CUmodule, function: &str) -> Result<sys::CUfunction> {
        let name = CString::new(function)
            .map_err(|_| Error::Cuda { op: function.into(), reason: "a NUL in the name".into() })?;
        let resolve = || {
            // SAFETY: the module is loaded.
            let handle = unsafe { result::module::get_function(module, name) }?;
            // SAFETY: as above, here and below.
            let attribute = |a| unsafe { result::function::get_function_attribute(handle, a) };
            let dynamic = self.max_shared - attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
            let limit = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: as above.
            unsafe { result::function::set_function_attribute(handle, limit, dynamic) }?;
            Ok((handle, attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?))
        };
        let (handle, ptx_version) = resolve().map_err(|e| failure(function, e))?;
        if self.force_ptx && ptx_version != 80 {
            let reason = format!("LOWBIT_FORCE_SM=80: the driver took code for {ptx_version} instead of the PTX");
            return Err(Error::Cuda { op: function.into(), reason });
        }
        Ok(handle)
    }
}

/// `fatbin` without its machine code, so that the driver has to compile the PTX; `None` when there is no PTX or the
/// container is not the one known.
///
/// A fatbin is a header (magic, version, header bytes, payload bytes) and entries (kind, version, header bytes,
/// payload bytes, ...); kind 1 is PTX, kind 2 machine code. Headers say their own length, so fields unknown here
/// travel along.
fn keep_ptx(fatbin: &[u8]) -> Option<Vec<u64>> {
    const MAGIC: u32 = 0xBA55_ED50;
    const PTX: u16 = 1;
    let u16_at = |at: usize| Some(u16::from_le_bytes(fatbin.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(fatbin.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(fatbin.get(at..at + 8)?.try_into().ok()?));
    if u32_at(0)? != MAGIC {
        return None;
    }
    let header_bytes = usize::from(u16_at(6)?);
    let end = header_bytes + usize::try_from(u64_at(8)?).ok()?;
    let mut kept = fatbin.get(..header_bytes)?.to_vec();
    let mut at = header_bytes;
    while at < end {
        let bytes = u32_at(at + 4)? as usize + usize::try_from(u64_at(at + 8)?).ok()?;
        let entry = fatbin.get(at..at + bytes)?;
        if u16_at(at)? == PTX {
            kept.extend_from_slice(entry);
        }
        at += bytes.max(16);
    }
    let payload = kept.len() - header_bytes;
    kept[8..16].copy_from_slice(&(payload as u64).to_le_bytes());
    // As words: the driver reads a fatbin by 64 bits, an alignment that bytes lack.
    let words = kept.chunks(8).map(|word| {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        u64::from_le_bytes(bytes)
    });
    (payload > 0).then(|| words.collect())
}

#[cfg(test)]
mod tests {
    use super::{embedded, keep_ptx};

    /// Files of Hopper's own instructions have no PTX; every other module does, beside its machine code.
    #[test]
    fn ptx_is_kept_and_machine_code_dropped() {
        if !embedded::ARCHS.contains(&"compute_80") {
            return; // a developer's build of fewer architectures
        }
        for (name, fatbin) in embedded::MODULES {
            let kept = keep_ptx(fatbin);
            assert_eq!(kept.is_none(), name.ends_with("sm90"), "{name}");
            let Some(kept) = kept else { continue };
            assert!(kept.len() * 8 < fatbin.len(), "{name}: nothing was dropped");
            let bytes: Vec<u8> = kept.iter().flat_map(|word| word.to_le_bytes()).collect();
            assert_eq!(keep_ptx(&bytes), Some(kept), "{name}: the result is not a fatbin of PTX alone");
        }
    }

    #[test]
    fn what_is_no_fatbin_is_refused() {
        let fatbin = embedded::MODULES[0].1;
        for bad in [&[] as &[u8], &[0; 64], &fatbin[..8], &fatbin[..20], &fatbin[..fatbin.len() - 1]] {
            assert_eq!(keep_ptx(bad), None);
        }
    }
}

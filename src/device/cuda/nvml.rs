//! Clocks, power and temperature of a GPU from the driver's management library (NVML), where there is one.
#![allow(unsafe_code)] // NVML

use std::ffi::{c_char, c_int, c_uint, c_void};

use cudarc::driver::sys;
use libloading::Library;

use super::context::CudaDevice;

const NAME: &str = "libnvidia-ml.so.1";
/// nvmlClockType_t.
const SM: c_uint = 1;
const MEMORY: c_uint = 2;
/// nvmlTemperatureSensors_t: that of the die.
const DIE: c_uint = 0;

type Handle = *mut c_void;
type GetValue = unsafe extern "C" fn(Handle, *mut c_uint) -> c_int;
type GetValueOf = unsafe extern "C" fn(Handle, c_uint, *mut c_uint) -> c_int;

/// One GPU as NVML knows it.
#[derive(Debug)]
pub struct Nvml {
    device: Handle,
    clock: GetValueOf,
    temperature: GetValueOf,
    power: GetValue,
    power_limit: GetValue,
    shutdown: unsafe extern "C" fn() -> c_int,
    /// Holds the functions above; dropped after them.
    _library: Library,
}

// SAFETY: NVML may be called from any thread (its documentation: "thread-safe"); the handle is an opaque name.
unsafe impl Send for Nvml {}
// SAFETY: as above.
unsafe impl Sync for Nvml {}

/// What NVML shows at one moment; `None` for what this GPU does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reading {
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: Option<u32>,
    /// Clock of the memory, MHz.
    pub memory_mhz: Option<u32>,
    /// Power drawn, watts; newer GPUs give the mean of the last second.
    pub power_w: Option<f64>,
    /// Temperature of the die, degrees Celsius.
    pub temperature_c: Option<u32>,
}

impl CudaDevice {
    /// This GPU in NVML; `None` where the library or the GPU is not found.
    pub fn nvml(&self) -> Option<Nvml> {
        let mut bus_id: [c_char; 32] = [0; 32];
        // SAFETY: room for that many characters; the device was opened by this context.
        let named =
            unsafe { sys::cuDeviceGetPCIBusId(bus_id.as_mut_ptr(), bus_id.len() as c_int, self.context().cu_device()) };
        named.result().ok()?;
        Nvml::open(&bus_id)
    }
}

impl Nvml {
    fn open(bus_id: &[c_char; 32]) -> Option<Nvml> {
        // SAFETY: loading NVML runs its initializers, which have no preconditions.
        let library = unsafe { Library::new(NAME) }.ok()?;
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: what it is assigned to has the function's type in nvml.h.
                *unsafe { library.get($name) }.ok()?
            };
        }
        let init: unsafe extern "C" fn() -> c_int = symbol!(b"nvmlInit_v2");
        let find: unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int =
            symbol!(b"nvmlDeviceGetHandleByPciBusId_v2");
        let mut nvml = Nvml {
            device: std::ptr::null_mut(),
            clock: symbol!(b"nvmlDeviceGetClockInfo"),
            temperature: symbol!(b"nvmlDeviceGetTemperature"),
            power: symbol!(b"nvmlDeviceGetPowerUsage"),
            power_limit: symbol!(b"nvmlDeviceGetEnforcedPowerLimit"),
            shutdown: symbol!(b"nvmlShutdown"),
            _library: library,
        };
        // SAFETY: no preconditions. When it fails, the shutdown in `drop` answers that nothing was begun, no more.
        if unsafe { init() } != 0 {
            return None;
        }
        // SAFETY: the name ends with a NUL, the driver wrote it; an out parameter.
        let found = unsafe { find(bus_id.as_ptr(), &mut nvml.device) };
        (found == 0).then_some(nvml)
    }

    /// Clocks, power and temperature now.
    pub fn read(&self) -> Reading {
        Reading {
            sm_mhz: self.value_of(self.clock, SM),
            memory_mhz: self.value_of(self.clock, MEMORY),
            power_w: self.value(self.power).map(watts),
            temperature_c: self.value_of(self.temperature, DIE),
        }
    }

    /// Most power that the GPU may draw, watts.
    pub fn power_limit_w(&self) -> Option<f64> {
        self.value(self.power_limit).map(watts)
    }

    fn value(&self, get: GetValue) -> Option<c_uint> {
        let mut value = 0;
        // SAFETY: the handle is NVML's own; an out parameter.
        let status = unsafe { get(self.device, &mut value) };
        (status == 0).then_some(value)
    }

    fn value_of(&self, get: GetValueOf, what: c_uint) -> Option<c_uint> {
        let mut value = 0;
        // SAFETY: as above.
        let status = unsafe { get(self.device, what, &mut value) };
        (status == 0).then_some(value)
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: begun in `open`, ended once.
        unsafe { (self.shutdown)() };
    }
}

fn watts(milliwatts: c_uint) -> f64 {
    f64::from(milliwatts) / 1e3
}

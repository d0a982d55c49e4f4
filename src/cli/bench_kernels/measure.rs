//! How `bench kernels` times one op, and the conditions of a run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use indicatif::ProgressBar;

use crate::device::Device;
use crate::device::cuda::{self, CudaDevice, Nvml, Reading};
use crate::error::Result;

use super::super::output;
use super::report::{Ceiling, Ceilings, Conditions, Measurement, Report, Spread, Timing};

/// Weights and outputs of a measurement: over five times the largest L2 cache (50 MB).
pub(super) const COLD_BYTES: u64 = 256 << 20;
/// Copies of one op's weights and outputs; ops too small for as many to exceed the caches stay in them.
const MAX_COPIES: u64 = 512;
/// What one replay lasts at least, as far as [`MAX_OPS`] allows.
const REPLAY: Duration = Duration::from_millis(3);
const MAX_OPS: usize = 4096;
/// Timed replays: the first number, fewer where they would last longer than [`ENOUGH`], at least the second.
const REPLAYS: (usize, usize) = (15, 5);
const ENOUGH: Duration = Duration::from_millis(500);
/// A GPU that had nothing to do for the first lowers its clocks, and takes up to the second to raise them again.
const IDLE: Duration = Duration::from_millis(50);
const WARM_UP: Duration = Duration::from_millis(500);
/// Between two looks at the clocks.
const WATCH: Duration = Duration::from_millis(5);

/// Copies of what `bytes` of weights and outputs take, so that no op finds its own in a cache.
pub(super) fn copies(bytes: usize) -> usize {
    COLD_BYTES.div_ceil(bytes.max(1) as u64).clamp(2, MAX_COPIES) as usize
}

/// Ops of a graph that lasts `least`, as far as `most` of them do, where a `round` of one for each of `copies` lasts so long.
pub(super) fn ops_of_replay(copies: usize, round: Duration, least: Duration, most: usize) -> usize {
    let rounds = (least.as_secs_f64() / round.as_secs_f64().max(1e-9)).ceil() as usize;
    copies.max((copies * rounds.max(1)).min(most))
}

/// What a run holds.
pub(super) struct Bench {
    pub(super) device: Device,
    pub(super) gpu: CudaDevice,
    nvml: Option<Nvml>,
    readings: Vec<Reading>,
    /// End of the last measurement.
    busy: Option<Instant>,
    pub(super) ceilings: Ceilings,
    pub(super) measurements: Vec<Measurement>,
    progress: ProgressBar,
}

impl Bench {
    /// Nothing measured yet but the speed of a copy.
    pub(super) fn new(gpu: &CudaDevice, copy: Ceiling, progress: ProgressBar) -> Bench {
        Bench {
            device: Device::Cuda(gpu.clone()),
            gpu: gpu.clone(),
            nvml: gpu.nvml(),
            readings: Vec::new(),
            busy: None,
            measurements: Vec::new(),
            ceilings: Ceilings { copy, int8: None, float16: None },
            progress,
        }
    }

    /// What was measured, in a run that began at `start`.
    pub(super) fn finish(self, start: SystemTime) -> Report {
        self.progress.finish_and_clear();
        let conditions = self.conditions(output::utc(start));
        Report::new(conditions, self.ceilings, self.measurements)
    }

    /// Time of `op`, which takes the number of the copy to work on, below `copies`.
    pub(super) fn time(&mut self, copies: usize, mut op: impl FnMut(usize) -> Result<()>) -> Result<Timing> {
        op(0)?; // loads the kernel
        self.device.synchronize()?;
        let round = {
            let graph = self.gpu.capture(|| (0..copies).try_for_each(&mut op))?;
            graph.launch()?;
            self.gpu.time(|| graph.launch())?
        };
        let ops = ops_of_replay(copies, round, REPLAY, MAX_OPS);
        let graph = self.gpu.capture(|| (0..ops).try_for_each(|i| op(i % copies)))?;
        let (gpu, nvml) = (&self.gpu, self.nvml.as_ref());
        if self.busy.is_none_or(|busy| busy.elapsed() > IDLE) {
            let start = Instant::now();
            while start.elapsed() < WARM_UP {
                gpu.time(|| graph.launch())?;
            }
        }
        let (seconds, readings) = watch(nvml, || {
            graph.launch()?;
            let replay = || gpu.time(|| graph.launch()).map(|time| time.as_secs_f64());
            let replays = (ENOUGH.as_secs_f64() / replay()?.max(1e-9)) as usize;
            (0..replays.clamp(REPLAYS.1, REPLAYS.0)).map(|_| replay()).collect::<Result<Vec<f64>>>()
        });
        let seconds = seconds?;
        let clocks = values(&readings, |reading| reading.sm_mhz.map(f64::from));
        self.readings.extend(readings);
        self.busy = Some(Instant::now());
        self.progress.inc(1);
        Ok(Timing::of(&seconds, ops, Spread::of(&clocks).map(|clocks| clocks.median)))
    }

    fn conditions(&self, date: String) -> Conditions {
        let probe = cuda::probe();
        let spread = |get: fn(&Reading) -> Option<f64>| Spread::of(&values(&self.readings, get));
        Conditions {
            lowbit: env!("CARGO_PKG_VERSION").into(),
            date,
            gpu: self.gpu.name().into(),
            sm: self.gpu.sm(),
            dtype: self.gpu.dtype().name().into(),
            driver: probe.driver,
            nvcc: probe.nvcc,
            cublaslt: self.gpu.blas_name(),
            rotated_bytes: COLD_BYTES,
            power_limit_w: self.nvml.as_ref().and_then(Nvml::power_limit_w),
            sm_mhz: spread(|reading| reading.sm_mhz.map(f64::from)),
            memory_mhz: spread(|reading| reading.memory_mhz.map(f64::from)),
            power_w: spread(|reading| reading.power_w),
            temperature_c: spread(|reading| reading.temperature_c.map(f64::from)),
        }
    }
}

/// What `work` returns, and what NVML showed while it ran.
fn watch<T>(nvml: Option<&Nvml>, work: impl FnOnce() -> T) -> (T, Vec<Reading>) {
    let Some(nvml) = nvml else { return (work(), Vec::new()) };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut readings = Vec::new();
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(WATCH);
                readings.push(nvml.read());
            }
            readings
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, watcher.join().unwrap_or_default())
    })
}

fn values(readings: &[Reading], get: impl Fn(&Reading) -> Option<f64>) -> Vec<f64> {
    readings.iter().filter_map(get).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_exceed_the_caches() {
        assert_eq!(copies(4096 * 4096), 16);
        assert_eq!(copies(57344 * 8192), 2);
        assert_eq!(copies(0), MAX_COPIES as usize);
    }

    #[test]
    fn a_replay_is_long_enough_or_has_the_most_ops() {
        let of = |copies, us| ops_of_replay(copies, Duration::from_micros(us), Duration::from_millis(3), 100);
        assert_eq!((of(16, 1000), of(16, 1001)), (48, 48));
        assert_eq!((of(16, 5000), of(16, 1)), (16, 100));
        assert_eq!(of(512, 1), 512, "each copy once");
    }
}

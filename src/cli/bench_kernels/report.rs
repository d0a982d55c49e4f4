//! Results of `bench kernels`: what was measured under which conditions, as a table and as JSON.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::output;
use crate::error::{Error, Result};

use super::Op;

/// All that a run found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) conditions: Conditions,
    pub(super) ceilings: Ceilings,
    pub(super) measurements: Vec<Measurement>,
}

/// What a number is worth nothing without.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Conditions {
    /// Version of this program.
    pub(super) lowbit: String,
    /// Start of the run, UTC.
    pub(super) date: String,
    pub(super) gpu: String,
    /// Compute capability that kernels were chosen for: 90, or 80 under `LOWBIT_FORCE_SM=80`.
    pub(super) sm: u32,
    /// 16-bit type of activations and outputs.
    pub(super) dtype: String,
    pub(super) driver: Option<String>,
    pub(super) nvcc: String,
    /// The library found, and its version.
    pub(super) cublaslt: Option<String>,
    /// Weights and outputs of a measurement together have at least these bytes.
    pub(super) rotated_bytes: u64,
    pub(super) power_limit_w: Option<f64>,
    /// While measuring, as are those below.
    pub(super) sm_mhz: Option<Spread>,
    pub(super) memory_mhz: Option<Spread>,
    pub(super) power_w: Option<Spread>,
    pub(super) temperature_c: Option<Spread>,
}

/// Smallest, middle and largest of some readings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) median: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` of no readings.
    pub(super) fn of(readings: &[f64]) -> Option<Spread> {
        let at = |fraction| percentile(readings, fraction);
        Some(Spread { min: at(0.0)?, median: at(0.5)?, max: at(1.0)? })
    }
}

/// What the GPU reached in this run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Ceilings {
    /// Bytes a second, read plus written.
    pub(super) copy: Ceiling,
    /// Operations a second of int8 and of 16-bit matrix products.
    pub(super) int8: Option<Ceiling>,
    pub(super) float16: Option<Ceiling>,
}

/// A rate, and what reached it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Ceiling {
    pub(super) per_s: f64,
    pub(super) source: String,
}

impl Ceilings {
    pub(super) fn tensor(&self, unit: Unit) -> Option<&Ceiling> {
        match unit {
            Unit::Int8 => self.int8.as_ref(),
            Unit::Float16 => self.float16.as_ref(),
        }
    }

    /// Raises the ceiling of `unit` to `per_s` where that is higher.
    pub(super) fn raise(&mut self, unit: Unit, per_s: f64, source: impl FnOnce() -> String) {
        let ceiling = match unit {
            Unit::Int8 => &mut self.int8,
            Unit::Float16 => &mut self.float16,
        };
        if ceiling.as_ref().is_none_or(|known| known.per_s < per_s) {
            *ceiling = Some(Ceiling { per_s, source: source() });
        }
    }
}

/// What multiplies: the tensor cores on int8, or on 16-bit floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    Int8,
    Float16,
}

/// Time of one op in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Timing {
    pub(super) median_us: f64,
    pub(super) p10_us: f64,
    pub(super) p90_us: f64,
    /// Timed replays of a graph, and ops in it.
    pub(super) replays: usize,
    pub(super) ops: usize,
    /// Median clock of the multiprocessors meanwhile.
    pub(super) sm_mhz: Option<f64>,
}

impl Timing {
    /// From the seconds that replays of `ops` ops took, at least one.
    pub(super) fn of(seconds: &[f64], ops: usize, sm_mhz: Option<f64>) -> Timing {
        let at = |fraction| percentile(seconds, fraction).unwrap_or(f64::NAN) * 1e6 / ops as f64;
        Timing { median_us: at(0.5), p10_us: at(0.1), p90_us: at(0.9), replays: seconds.len(), ops, sm_mhz }
    }

    /// Of `count` things in one op, how many a second.
    pub(super) fn per_s(&self, count: u64) -> f64 {
        count as f64 / self.median_us * 1e6
    }
}

/// Value below which `fraction` of the values lie, interpolated between neighbours; `None` of no values.
pub(super) fn percentile(values: &[f64], fraction: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = fraction * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

/// One op at one shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Measurement {
    pub(super) op: Op,
    /// `28672x4096` of a linear op; in words of others.
    pub(super) shape: String,
    /// Rows.
    pub(super) m: usize,
    /// Kernel and configuration that ran.
    pub(super) kernel: String,
    /// What multiplies; absent where memory alone decides.
    pub(super) unit: Option<Unit>,
    /// Bytes that must move through device memory.
    pub(super) bytes: u64,
    /// Multiplications and additions of matrix products.
    pub(super) operations: u64,
    pub(super) time: Timing,
    /// The same product by cuBLASLt.
    pub(super) peers: Vec<Peer>,
    /// Against the run's ceilings.
    pub(super) rates: Rates,
}

/// cuBLASLt beside a measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Peer {
    /// Type of the matrices that it multiplied.
    pub(super) unit: Unit,
    pub(super) time: Timing,
    /// Its time over ours: above 1 ours is faster.
    pub(super) speedup: f64,
}

impl Peer {
    pub(super) fn new(unit: Unit, time: Timing, ours: &Timing) -> Peer {
        Peer { unit, speedup: time.median_us / ours.median_us, time }
    }
}

/// Speed of a measurement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Rates {
    pub(super) bytes_per_s: f64,
    pub(super) operations_per_s: f64,
    /// Fraction of the copy rate.
    pub(super) of_copy: f64,
    /// Fraction of the tensor ceiling.
    pub(super) of_tensor: Option<f64>,
}

impl Report {
    /// Raises the ceilings to what the measurements reached, and fills in their rates.
    pub(super) fn new(conditions: Conditions, mut ceilings: Ceilings, mut measurements: Vec<Measurement>) -> Report {
        for found in &measurements {
            let at = || format!("{}, m = {}", found.shape, found.m);
            if let Some(unit) = found.unit {
                let source = || format!("{} {} ({})", found.op.name(), at(), found.kernel);
                ceilings.raise(unit, found.time.per_s(found.operations), source);
            }
            for peer in &found.peers {
                ceilings.raise(peer.unit, peer.time.per_s(found.operations), || format!("cuBLASLt {}", at()));
            }
        }
        for found in &mut measurements {
            let (bytes_per_s, operations_per_s) = (found.time.per_s(found.bytes), found.time.per_s(found.operations));
            let tensor = found.unit.and_then(|unit| ceilings.tensor(unit));
            found.rates = Rates {
                bytes_per_s,
                operations_per_s,
                of_copy: bytes_per_s / ceilings.copy.per_s,
                of_tensor: tensor.map(|ceiling| operations_per_s / ceiling.per_s),
            };
        }
        Report { conditions, ceilings, measurements }
    }

    /// The measurement of the op that `found`'s differs from in one thing, at the same shape.
    fn plain(&self, found: &Measurement) -> Option<&Measurement> {
        let op = found.op.plain()?;
        self.measurements.iter().find(|other| (other.op, &other.shape, other.m) == (op, &found.shape, found.m))
    }

    /// What [`Self::json`] wrote to `file`.
    pub(super) fn read(file: &Path) -> Result<Report> {
        let text = std::fs::read_to_string(file).map_err(Error::io(file))?;
        serde_json::from_str(&text).map_err(|e| Error::file(file, format!("not results of bench kernels --json: {e}")))
    }

    /// One JSON object.
    pub(super) fn json(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|e| Error::Text { what: "report".into(), reason: e.to_string() })
    }

    /// The conditions, the ceilings and a table.
    pub(super) fn text(&self) -> String {
        let header = [
            "op",
            "shape",
            "m",
            "kernel",
            "us",
            "p10-p90",
            "TB/s",
            "of copy",
            "TOPS",
            "of tensor",
            "x int8",
            "x 16-bit",
            "x plain",
        ];
        let rows: Vec<_> = self.measurements.iter().map(|found| row(found, self.plain(found))).collect();
        let right = [&header[2..3], &header[4..]].concat();
        format!("{}\n{}", self.conditions.text(&self.ceilings), output::table(&header, &rows, &right))
    }
}

fn row(found: &Measurement, plain: Option<&Measurement>) -> Vec<String> {
    let dash = || "-".to_owned();
    let rates = found.rates;
    let peer = |unit| {
        let peer = found.peers.iter().find(|peer| peer.unit == unit);
        peer.map_or_else(dash, |peer| format!("{:.2}", peer.speedup))
    };
    vec![
        found.op.name(),
        found.shape.clone(),
        found.m.to_string(),
        found.kernel.clone(),
        digits(found.time.median_us),
        format!("{}-{}", digits(found.time.p10_us), digits(found.time.p90_us)),
        format!("{:.2}", rates.bytes_per_s / 1e12),
        format!("{:.0} %", 100.0 * rates.of_copy),
        found.unit.map_or_else(dash, |_| digits(rates.operations_per_s / 1e12)),
        rates.of_tensor.map_or_else(dash, |fraction| format!("{:.0} %", 100.0 * fraction)),
        peer(Unit::Int8),
        peer(Unit::Float16),
        plain.map_or_else(dash, |plain| format!("{:.2}", plain.time.median_us / found.time.median_us)),
    ]
}

/// A positive number in at least four digits, without more decimals than those need.
fn digits(x: f64) -> String {
    let decimals = if x < 10.0 { 2 } else { usize::from(x < 1000.0) };
    format!("{x:.decimals$}")
}

impl Conditions {
    fn text(&self, ceilings: &Ceilings) -> String {
        let unknown = || "not found".to_owned();
        let watched = |unit: &str, spread: &Option<Spread>| {
            let words = |s: &Spread| format!("{:.0} {unit} ({:.0} to {:.0})", s.median, s.min, s.max);
            spread.as_ref().map_or_else(|| format!("unknown {unit}"), words)
        };
        let tensor = |ceiling: &Option<Ceiling>, unit: &str| match ceiling {
            Some(c) => format!("{:.0} {unit}, {}", c.per_s / 1e12, c.source),
            None => "not measured".into(),
        };
        let limit = self.power_limit_w.map(|limit| format!(" of {limit:.0} W")).unwrap_or_default();
        let lines = [
            ("GPU", format!("{}, kernels for sm_{}, {}", self.gpu, self.sm, self.dtype)),
            ("driver", self.driver.clone().unwrap_or_else(unknown)),
            ("cuBLASLt", self.cublaslt.clone().unwrap_or_else(unknown)),
            ("lowbit", format!("{}, kernels compiled by nvcc {}, {}", self.lowbit, self.nvcc, self.date)),
            ("clocks", format!("SM {}, memory {}", watched("MHz", &self.sm_mhz), watched("MHz", &self.memory_mhz))),
            ("power", format!("{}{limit}, {}", watched("W", &self.power_w), watched("°C", &self.temperature_c))),
            ("copy", format!("{:.2} TB/s, {}", ceilings.copy.per_s / 1e12, ceilings.copy.source)),
            ("int8", tensor(&ceilings.int8, "TOPS")),
            ("16-bit", tensor(&ceilings.float16, "TFLOP/s")),
        ];
        lines.iter().map(|(name, text)| format!("{name:<10}{text}\n")).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn timing(median_us: f64) -> Timing {
        Timing::of(&[median_us * 3e-6 * 0.9, median_us * 3e-6, median_us * 3e-6 * 1.1], 3, Some(1980.0))
    }

    /// W8A8 on `[n, k]` in `median_us`, cuBLASLt's int8 product in four times as long.
    fn w8a8([m, n, k]: [u64; 3], median_us: f64) -> Measurement {
        let time = timing(median_us);
        Measurement {
            op: Op::W8a8,
            shape: format!("{n}x{k}"),
            m: m as usize,
            kernel: "gemm_w8a8/sm80 16x32x256".into(),
            unit: Some(Unit::Int8),
            bytes: n * k + m * k + 2 * m * n,
            operations: 2 * m * n * k,
            peers: vec![Peer::new(Unit::Int8, timing(4.0 * median_us), &time)],
            time,
            rates: Rates::default(),
        }
    }

    /// Two shapes and an op that only moves memory.
    pub(in super::super) fn synthetic() -> Report {
        let conditions = Conditions {
            lowbit: "0.1.0".into(),
            date: "2026-11-22T01:20:33Z".into(),
            gpu: "NVIDIA H200".into(),
            sm: 90,
            dtype: "bf16".into(),
            driver: Some("580.159.04".into()),
            nvcc: "13.0.88".into(),
            cublaslt: None,
            rotated_bytes: 256 << 20,
            power_limit_w: Some(700.0),
            sm_mhz: Spread::of(&[1755.0, 1980.0, 1980.0]),
            memory_mhz: Spread::of(&[3201.0]),
            power_w: None,
            temperature_c: None,
        };
        let ceilings = Ceilings {
            copy: Ceiling { per_s: 4e12, source: "a copy".into() },
            int8: Some(Ceiling { per_s: 8e14, source: "cuBLASLt 8192x8192, m = 8192".into() }),
            float16: None,
        };
        let mut norm = w8a8([64, 4096, 4096], 2.0);
        (norm.op, norm.shape, norm.unit) = (Op::RmsNorm, "4096 to i8".into(), None);
        (norm.bytes, norm.operations, norm.peers) = (4_000_000, 0, Vec::new());
        let measurements = vec![
            norm,
            w8a8([1, 8192, 8192], 20.0),
            w8a8([64, 8192, 8192], 22.0),
            w8a8([4096, 8192, 8192], 500.0),
            w8a8([1, 4096, 4096], 8.0),
            w8a8([64, 4096, 4096], 9.0),
        ];
        Report::new(conditions, ceilings, measurements)
    }

    #[test]
    fn percentiles() {
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(percentile(&[7.0], 0.9), Some(7.0));
        assert_eq!(percentile(&[3.0, 1.0], 0.5), Some(2.0));
        // Those of numpy.percentile([1, 2, 4, 8, 16], [0, 10, 50, 90, 100]).
        let values = [8.0, 1.0, 16.0, 2.0, 4.0];
        for (fraction, expected) in [(0.0, 1.0), (0.1, 1.4), (0.5, 4.0), (0.9, 12.8), (1.0, 16.0)] {
            let got = percentile(&values, fraction).expect("there are values");
            assert!((got - expected).abs() < 1e-12, "{fraction}: {got}");
        }
        assert_eq!(Spread::of(&values), Some(Spread { min: 1.0, median: 4.0, max: 16.0 }));
    }

    #[test]
    fn times_are_those_of_one_op() {
        let time = Timing::of(&[4e-3, 2e-3, 3e-3], 1000, None);
        assert_eq!((time.median_us, time.replays, time.ops), (3.0, 3, 1000));
        assert!((time.p10_us - 2.2).abs() < 1e-9 && (time.p90_us - 3.8).abs() < 1e-9, "{time:?}");
        assert!((time.per_s(6_000_000) - 2e12).abs() < 1.0, "6 MB in 3 us are 2 TB/s");
    }

    #[test]
    fn rates_are_against_the_ceilings_and_ceilings_are_never_passed() {
        let report = synthetic();
        // 2 * 4096 * 8192 * 8192 operations in 500 us pass the 800 TOPS of cuBLASLt.
        let int8 = report.ceilings.int8.as_ref().expect("given");
        assert!((int8.per_s - 1.099_511_627_776e15).abs() < 1e6, "{int8:?}");
        assert_eq!(int8.source, "w8a8 8192x8192, m = 4096 (gemm_w8a8/sm80 16x32x256)");
        let [norm, one, ..] = &report.measurements[..] else { panic!("six measurements") };
        assert!((norm.rates.of_copy - 0.5).abs() < 1e-9 && norm.rates.of_tensor.is_none(), "{:?}", norm.rates);
        let bytes = 8192.0 * 8192.0 + 8192.0 + 2.0 * 8192.0;
        assert!((one.rates.of_copy - bytes / 20e-6 / 4e12).abs() < 1e-9);
        assert!((one.rates.of_tensor.expect("int8") - 2.0 * 8192.0 * 8192.0 / 20e-6 / int8.per_s).abs() < 1e-9);
        assert!((one.peers[0].speedup - 4.0).abs() < 1e-9);
        assert!(report.measurements.iter().all(|found| found.rates.of_tensor.unwrap_or(0.0) <= 1.0));
    }

    #[test]
    fn json_holds_everything() {
        let report = synthetic();
        let json = report.json().expect("serializes");
        assert_eq!(json["conditions"]["gpu"], "NVIDIA H200");
        assert_eq!(json["conditions"]["sm_mhz"]["median"], 1980.0);
        assert_eq!(json["ceilings"]["copy"]["per_s"], 4e12);
        let first = &json["measurements"][1];
        assert_eq!((&first["op"], &first["m"], &first["unit"]), (&"w8a8".into(), &1.into(), &"int8".into()));
        assert_eq!(first["operations"], 2 * 8192 * 8192);
        let text = json.to_string();
        assert_eq!(serde_json::from_str::<Report>(&text).expect("parses"), report);
    }

    #[test]
    fn the_table_says_what_cannot_be_compared() {
        let text = synthetic().text();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_owned();
        assert!(line("GPU").ends_with("NVIDIA H200, kernels for sm_90, bf16"), "{text}");
        assert!(line("clocks").ends_with("SM 1980 MHz (1755 to 1980), memory 3201 MHz (3201 to 3201)"), "{text}");
        assert!(line("16-bit").ends_with("not measured"), "{text}");
        let cells = |start: &str| line(start).split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        let norm = cells("| rms_norm");
        assert_eq!(norm[1..=4], ["rms_norm", "4096 to i8", "64", "gemm_w8a8/sm80 16x32x256"]);
        assert_eq!(norm[5..=12], ["2.00", "1.84-2.16", "2.00", "50 %", "-", "-", "-", "-"]);
        let large = cells("| w8a8     | 8192x8192  | 4096");
        assert_eq!(large[5..=13], ["500.0", "460.0-540.0", "0.34", "8 %", "1100", "100 %", "4.00", "-", "-"]);
    }

    #[test]
    fn an_op_is_beside_the_one_that_it_differs_from() {
        let mut report = synthetic();
        let mut swiglu = w8a8([64, 8192, 8192], 22.44);
        swiglu.op = Op::W8a8Swiglu;
        report.measurements.push(swiglu.clone());
        swiglu.m = 63;
        report.measurements.push(swiglu);
        let text = report.text();
        let of = |m: &str| {
            let start = format!("| w8a8_swiglu | 8192x8192  | {m:>4} ");
            let line = text.lines().find(|line| line.starts_with(&start)).expect("a line");
            line.split('|').map(str::trim).nth(13).map(str::to_owned)
        };
        assert_eq!((of("64").as_deref(), of("63").as_deref()), (Some("0.98"), Some("-")), "{text}");
    }
}

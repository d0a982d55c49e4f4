//! `--tune`: the fastest configuration for every weight and number of rows, measured and written as a table for `--tuned`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::output;
use crate::device::cuda::{Choice, CudaDevice, Graph, Tuned};
use crate::device::{Columns, Device, LinearInput, PackedWeight, Tensor, Write};
use crate::error::{Error, Result};

use super::linear::{self, Layer, most};
use super::measure::ops_of_replay;
use super::report::percentile;
use super::{Op, Selection, Shape, TUNE_OPS};

/// What a replay lasts at least with the configuration of the cost model, as far as [`MAX_OPS`] allows.
const REPLAY: Duration = Duration::from_millis(1);
const MAX_OPS: usize = 512;
/// Packing a weight leaves the GPU idle long enough that it lowers its clocks.
const WARM_UP: Duration = Duration::from_millis(200);
/// After each round, in which every configuration left is replayed once: those slower than the fastest by more are dropped.
const ROUNDS: [f64; 9] = [1.5, 1.25, 1.15, 1.1, 1.05, 1.05, 1.05, 1.05, 1.05];
/// A configuration must be faster than the cost model's by this much, or that stays: less is within what runs differ by.
const GAIN: f64 = 1.01;

/// What was the fastest for one weight and number of rows.
struct Found {
    choice: Choice,
    us: f64,
    /// The cost model's configuration.
    model: String,
    model_us: f64,
    /// Configurations measured.
    tried: usize,
}

/// Measures what is selected, updates the table in `file` and prints what it gains.
pub(super) fn run(gpu: &CudaDevice, selection: &Selection, file: Option<&Path>, json: bool) -> Result<()> {
    let file = file.map_or_else(|| default_file(gpu.name()), Path::to_path_buf);
    let mut table = Tuned::new(gpu.name());
    if file.exists() {
        table.add(&Tuned::read(&file)?)?;
    }
    linear::check_memory(&Device::Cuda(gpu.clone()), selection)?;
    let progress = output::progress("tune");
    progress.set_length((selection.shapes.len() * selection.ops.len() * selection.rows.len()) as u64);
    let mut found = Vec::new();
    for &shape in &selection.shapes {
        for &op in &selection.ops {
            let first = found.len();
            tune(gpu, op, shape, &selection.rows, |new| {
                found.push(new);
                progress.inc(1);
            })?;
            let choices: Vec<Choice> = found[first..].iter().map(|found: &Found| found.choice.clone()).collect();
            table.replace(&choices);
            output::write_file(&file, table.to_string().as_bytes())?;
        }
    }
    progress.finish_and_clear();
    match json {
        true => output::write_json(&as_json(gpu.name(), &file, &found)),
        false => output::write(&format!("{}\n{}\n", as_text(&found), summary(&file, &found))),
    }
}

/// `NVIDIA H200` to `nvidia-h200.txt`.
fn default_file(gpu: &str) -> PathBuf {
    let name: String =
        gpu.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    format!("{name}.txt").into()
}

/// The fastest configurations of one weight.
fn tune(gpu: &CudaDevice, op: Op, shape: Shape, rows: &[usize], mut found: impl FnMut(Found)) -> Result<()> {
    let nothing = || {
        let others = TUNE_OPS.map(Op::name).join(", ");
        let reason =
            format!("`{}` has no configurations to choose from on this GPU; expected one of {others}", op.name());
        Error::input("--op", reason)
    };
    let layer = Layer::of(op).filter(Layer::is_tunable).ok_or_else(nothing)?;
    let device = Device::Cuda(gpu.clone());
    let weights = linear::weights(gpu, &layer, shape)?;
    if gpu.candidates(&weights[0], 1).is_empty() {
        return Err(nothing());
    }
    let mut input = match linear::own_input(&device, &layer, shape.k, most(rows))? {
        Some(input) => input,
        None => linear::plain_input(&device, shape.k, most(rows))?,
    };
    input.record(weights[0].input_format(), most(rows), shape.k);
    let outs = linear::outputs(&device, device.activation_dtype(), weights.len(), shape.n, rows)?;
    let work = Work { gpu, device, input, weights: RefCell::new(weights), outs: RefCell::new(outs) };
    for (i, &m) in rows.iter().enumerate() {
        found(work.fastest(m, i == 0)?);
    }
    Ok(())
}

/// A layer to run: copies of its weight, each with an output.
struct Work<'a> {
    gpu: &'a CudaDevice,
    device: Device,
    input: LinearInput,
    weights: RefCell<Vec<PackedWeight>>,
    outs: RefCell<Vec<Tensor>>,
}

/// A configuration under measurement.
struct Entry<'a> {
    choice: Choice,
    graph: Graph<'a>,
    /// Of each replay.
    seconds: Vec<f64>,
}

impl Entry<'_> {
    fn seconds(&self) -> f64 {
        percentile(&self.seconds, 0.5).unwrap_or(f64::INFINITY)
    }
}

impl Work<'_> {
    /// The fastest configuration for `m` rows; `cold`: the GPU had nothing to do before.
    fn fastest(&self, m: usize, cold: bool) -> Result<Found> {
        let candidates = self.gpu.candidates(&self.weights.borrow()[0], m);
        let copies = self.weights.borrow().len();
        let model = self.capture(&candidates[0], m, copies)?;
        let start = Instant::now();
        while cold && start.elapsed() < WARM_UP {
            self.gpu.time(|| model.launch())?;
        }
        model.launch()?;
        let round = self.gpu.time(|| model.launch())?;
        let ops = ops_of_replay(copies, round, REPLAY, MAX_OPS);
        let tried = candidates.len();
        let left = self.race(candidates, m, ops)?;
        let us = |entry: &Entry<'_>| entry.seconds() * 1e6 / ops as f64;
        let model = &left[0];
        let fastest = left.iter().min_by(|a, b| a.seconds().total_cmp(&b.seconds())).unwrap_or(model);
        let fastest = if model.seconds() < fastest.seconds() * GAIN { model } else { fastest };
        Ok(Found {
            us: us(fastest),
            choice: fastest.choice.clone(),
            model: model.choice.config.clone(),
            model_us: us(model),
            tried,
        })
    }

    /// The first of `candidates`, and those of the others that are left after all [`ROUNDS`].
    fn race(&self, candidates: Vec<Choice>, m: usize, ops: usize) -> Result<Vec<Entry<'_>>> {
        // Each is dropped at once where its first replay is far slower than the fastest so far.
        let mut left: Vec<Entry<'_>> = Vec::new();
        let mut best = f64::INFINITY;
        for choice in candidates {
            let entry = Entry { graph: self.capture(&choice, m, ops)?, choice, seconds: Vec::new() };
            entry.graph.launch()?;
            let seconds = self.gpu.time(|| entry.graph.launch())?.as_secs_f64();
            best = best.min(seconds);
            if left.is_empty() || seconds <= best * ROUNDS[0] {
                left.push(entry);
            }
        }
        for limit in ROUNDS {
            for entry in &mut left {
                let graph = &entry.graph;
                entry.seconds.push(self.gpu.time(|| graph.launch())?.as_secs_f64());
            }
            let best = left.iter().map(Entry::seconds).fold(f64::INFINITY, f64::min);
            let mut is_first = true;
            left.retain(|entry| std::mem::take(&mut is_first) || entry.seconds() <= best * limit);
        }
        Ok(left)
    }

    /// A graph of `ops` ops in the configuration of `choice`, on one copy after the other.
    fn capture(&self, choice: &Choice, m: usize, ops: usize) -> Result<Graph<'_>> {
        self.weights.borrow_mut().iter_mut().for_each(|weight| self.gpu.fix(weight, choice));
        let op = move |i: usize| {
            let (weights, mut outs) = (self.weights.borrow(), self.outs.borrow_mut());
            let i = i % weights.len();
            let columns = Columns { offset: 0, stride: weights[i].n };
            self.device.linear(&mut outs[i], columns, &self.input, &weights[i], Write::Store, m)
        };
        op(0)?; // loads the kernel
        self.device.synchronize()?;
        self.gpu.capture(move || (0..ops).try_for_each(op))
    }
}

fn as_text(found: &[Found]) -> String {
    let header = ["kernels", "shape", "m", "fastest", "us", "of the cost model", "us", "faster by", "tried"];
    let row = |found: &Found| {
        let Choice { family, n, k, m, config } = &found.choice;
        let gain = 100.0 * (found.model_us / found.us - 1.0);
        vec![
            family.clone(),
            format!("{n}x{k}"),
            m.to_string(),
            config.clone(),
            format!("{:.2}", found.us),
            found.model.clone(),
            format!("{:.2}", found.model_us),
            if *config == found.model { "-".into() } else { format!("{gain:.1} %") },
            found.tried.to_string(),
        ]
    };
    let rows: Vec<_> = found.iter().map(row).collect();
    output::table(&header, &rows, &["m", "us", "faster by", "tried"])
}

fn summary(file: &Path, found: &[Found]) -> String {
    let gains: Vec<f64> = found.iter().map(|found| 100.0 * (found.model_us / found.us - 1.0)).collect();
    let changed = found.iter().filter(|found| found.choice.config != found.model).count();
    format!(
        "{}: {} choices; {changed} are not the cost model's. Faster than those by {:.1} % on average, {:.1} % at most.",
        file.display(),
        found.len(),
        gains.iter().sum::<f64>() / gains.len().max(1) as f64,
        gains.iter().copied().fold(0.0, f64::max),
    )
}

fn as_json(gpu: &str, file: &Path, found: &[Found]) -> Value {
    let one = |found: &Found| {
        let Choice { family, n, k, m, config } = &found.choice;
        json!({"family": family, "n": n, "k": k, "m": m, "config": config, "us": output::rounded(found.us),
               "model": found.model, "model_us": output::rounded(found.model_us), "tried": found.tried})
    };
    json!({"gpu": gpu, "file": file, "choices": found.iter().map(one).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(config: &str, us: f64) -> Found {
        let choice = Choice { family: "w8a8/sm90".into(), n: 4096, k: 14336, m: 4, config: config.into() };
        Found { choice, us, model: "64x8 split 2".into(), model_us: 16.8, tried: 14 }
    }

    #[test]
    fn gains_are_over_the_cost_model() {
        let both = [found("64x16 split 2", 16.0), found("64x8 split 2", 16.8)];
        let text = as_text(&both);
        let cells = |line: usize| -> Vec<&str> {
            text.lines().nth(line).expect("a line").split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect()
        };
        let shape = ["w8a8/sm90", "4096x14336", "4"];
        assert_eq!(
            cells(2),
            [&shape[..], &["64x16 split 2", "16.00", "64x8 split 2", "16.80", "5.0 %", "14"]].concat()
        );
        assert_eq!(cells(3), [&shape[..], &["64x8 split 2", "16.80", "64x8 split 2", "16.80", "-", "14"]].concat());
        let summary = summary(Path::new("a.txt"), &both);
        assert_eq!(
            summary,
            "a.txt: 2 choices; 1 are not the cost model's. Faster than those by 2.5 % on average, 5.0 % at most."
        );
        assert!(super::summary(Path::new("a.txt"), &[]).contains("0 choices"));
        let json = as_json("G", Path::new("a.txt"), &both);
        assert_eq!(
            (&json["choices"][0]["config"], &json["choices"][1]["model_us"]),
            (&"64x16 split 2".into(), &16.8.into())
        );
    }

    #[test]
    fn a_table_is_named_like_its_gpu() {
        assert_eq!(default_file("NVIDIA H100 80GB HBM3"), Path::new("nvidia-h100-80gb-hbm3.txt"));
    }
}

//! `quantize --method qat`: its flags, and the run that trains.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Written;
use crate::error::{Error, Result};
use crate::models::quantize::Recipe;

use super::super::Outcome;
use super::super::options::parse_number;

/// Flags of `--method qat` alone.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Quantization-aware training (--method qat)")]
pub(super) struct Args {
    /// Updates of the weights [default: 300].
    #[arg(long, env = "LOWBIT_STEPS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,

    /// Windows of an update [default: 4].
    #[arg(long, env = "LOWBIT_BATCH", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Option<u16>,

    /// Largest learning rate of weights, norms and biases, after a warmup of a twentieth of the steps and before a cosine
    /// [default: 0.001].
    #[arg(long, env = "LOWBIT_LR", value_name = "X", value_parser = parse_rate)]
    lr: Option<f32>,

    /// The same of quantization steps, in units of their first sizes [default: 0.001].
    #[arg(long, env = "LOWBIT_STEP_LR", value_name = "X", value_parser = parse_rate)]
    step_lr: Option<f32>,

    /// Seed of the order of windows [default: 0].
    #[arg(long, env = "LOWBIT_SEED", value_name = "N")]
    seed: Option<u64>,

    /// Updates between snapshots, from which a run goes on after a kill [default: 50].
    #[arg(long, env = "LOWBIT_SAVE_EVERY", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    save_every: Option<u32>,
}

fn parse_rate(text: &str) -> Result<f32, String> {
    parse_number(text, "a number from 0 to 1", |x| (0.0..=1.0).contains(x))
}

impl Args {
    /// Fails when a flag was given: for methods that do not train.
    pub(super) fn refuse(&self, method: &str) -> Result<()> {
        let given = [
            ("--steps", self.steps.is_some()),
            ("--batch", self.batch.is_some()),
            ("--lr", self.lr.is_some()),
            ("--step-lr", self.step_lr.is_some()),
            ("--seed", self.seed.is_some()),
            ("--save-every", self.save_every.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Error::input(*flag, format!("not with --method {method}; only with qat"))),
            None => Ok(()),
        }
    }
}

#[cfg(not(feature = "qat"))]
pub(super) fn run(_: &super::Args, _: &Checkpoint, _: &Recipe, _: &Written) -> Outcome {
    Err(Error::unsupported("--method qat in this build", "Build with `cargo build --release --features qat`"))
}

#[cfg(feature = "qat")]
pub(super) use with_autograd::run;

#[cfg(feature = "qat")]
mod with_autograd {
    use std::process::ExitCode;
    use std::time::Instant;

    use super::super::calibration::{encode, fingerprint};
    use super::super::words::{dry_run, in_words, tell};
    use super::*;
    use crate::checkpoint::write::Output;
    use crate::cli::output;
    use crate::models::quantize::qat::{QatOptions, estimate, qat};
    use crate::models::quantize::{Calibration, check_values};

    impl Args {
        fn options(&self) -> QatOptions {
            QatOptions {
                steps: self.steps.unwrap_or(300) as usize,
                batch: usize::from(self.batch.unwrap_or(4)),
                rate: self.lr.unwrap_or(1e-3),
                step_rate: self.step_lr.unwrap_or(1e-3),
                seed: self.seed.unwrap_or(0),
                save_every: self.save_every.unwrap_or(50) as usize,
            }
        }
    }

    pub(in super::super) fn run(
        args: &super::super::Args,
        source: &Checkpoint,
        recipe: &Recipe,
        written: &Written,
    ) -> Outcome {
        let options = args.qat.options();
        let context = args.context(source)?;
        let estimate = estimate(source, recipe, &options, context);
        if args.dry_run {
            return dry_run(args, recipe, written, &estimate);
        }
        let Some(path) = &args.calib else {
            return Err(Error::input("--calib", "missing: a UTF-8 text to train on"));
        };
        let (mut ids, text_sha256) = encode(path, source, context)?;
        ids.truncate(ids.len() / context * context);
        let text = Calibration { ids, context, text_sha256 };
        check_values(source, recipe)?;
        let mut fingerprint = fingerprint(source, recipe, Some(&text))?;
        fingerprint["qat"] = options.json();
        let output = Output::begin(&args.destination, &fingerprint)?;
        eprintln!("about {}", in_words(&estimate));
        let bar = output::progress("training");
        bar.set_length(options.steps as u64);
        let mut began: Option<(Instant, usize)> = None;
        let report = qat(source, recipe, &options, &text, output, &mut |at| {
            let (since, first) = *began.get_or_insert_with(|| (Instant::now(), at.step));
            let each = since.elapsed().as_secs_f64() / (at.step - first).max(1) as f64;
            let left = each * (options.steps - at.step) as f64;
            bar.set_position(at.step as u64);
            bar.set_message(format!("loss {:.4}, {left:.0} s left", at.loss));
            if let Some(held_out) = at.held_out {
                let line = format!("step {}/{}: loss {:.4}, held out {held_out:.4}", at.step, options.steps, at.loss);
                bar.suspend(|| eprintln!("{line}, {left:.0} s left"));
            }
        })?;
        bar.finish_and_clear();
        let held_out = |i: usize| report["qat"]["held_out"][i][1].as_f64().unwrap_or(f64::NAN);
        let best = report["qat"]["held_out"].as_array().map_or(0, Vec::len).saturating_sub(1);
        let least = (0..=best).map(held_out).fold(f64::INFINITY, f64::min);
        tell(args, &report, &format!("held-out divergence {:.4} to {least:.4}", held_out(0)))?;
        Ok(ExitCode::SUCCESS)
    }
}

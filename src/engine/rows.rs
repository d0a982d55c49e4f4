//! What tokens are chosen from: a pass's logits, as much of them as is needed on the host.

use crate::device::SampleRow;
use crate::error::Result;
use crate::models::{Drawn, Logits, LogitsStats};

/// Rows of logits in the order of their sequences.
#[derive(Debug)]
pub(super) enum Rows {
    /// The best id of each.
    Best(Vec<LogitsStats>),
    /// The id that the device drew of each.
    Drawn(Vec<Drawn>),
    /// All of them, and the length of one.
    Logits(Vec<f32>, usize),
}

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Row<'a> {
    /// Its best id, and how likely that is.
    Best(LogitsStats),
    /// What the device drew.
    Drawn(Drawn),
    /// `[vocab]`.
    Logits(&'a [f32]),
}

impl Rows {
    /// Where `draws` says how each is drawn, only ids leave the device; the best ones, where nothing but these is asked for.
    ///
    /// # Errors
    /// The device's failure.
    pub(super) fn read(mut logits: Logits<'_>, draws: Option<&[SampleRow]>) -> Result<Rows> {
        match draws {
            Some(draws) if draws.iter().all(|row| row.temperature == 0.0) => Ok(Rows::Best(logits.stats(&[])?)),
            Some(draws) => Ok(Rows::Drawn(logits.sample(draws)?)),
            None => Ok(Rows::Logits(logits.read()?, logits.vocab_size())),
        }
    }

    /// Number `index`.
    pub(super) fn get(&self, index: usize) -> Row<'_> {
        match self {
            Rows::Best(all) => Row::Best(all[index]),
            Rows::Drawn(all) => Row::Drawn(all[index]),
            Rows::Logits(all, vocab) => Row::Logits(&all[index * vocab..(index + 1) * vocab]),
        }
    }
}

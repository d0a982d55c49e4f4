//! What tokens are chosen from: a pass's logits, as much of them as is needed on the host.

use crate::error::Result;
use crate::models::{Logits, LogitsStats};

/// Rows of logits in the order of their sequences.
#[derive(Debug)]
pub(super) enum Rows {
    /// The best id of each.
    Best(Vec<LogitsStats>),
    /// All of them, and the length of one.
    Logits(Vec<f32>, usize),
}

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Row<'a> {
    /// Its best id, and how likely that is.
    Best(LogitsStats),
    /// `[vocab]`.
    Logits(&'a [f32]),
}

impl Rows {
    /// Where all sequences take the best id only that leaves the device.
    ///
    /// # Errors
    /// The device's failure.
    pub(super) fn read(mut logits: Logits<'_>, is_greedy: bool) -> Result<Rows> {
        if is_greedy {
            return Ok(Rows::Best(logits.stats(&[])?));
        }
        Ok(Rows::Logits(logits.read()?, logits.vocab_size()))
    }

    /// Number `index`.
    pub(super) fn get(&self, index: usize) -> Row<'_> {
        match self {
            Rows::Best(all) => Row::Best(all[index]),
            Rows::Logits(all, vocab) => Row::Logits(&all[index * vocab..(index + 1) * vocab]),
        }
    }
}

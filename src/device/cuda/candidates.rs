//! The configurations that may run a problem, in all families of kernels: what is measured to fill a table of choices
//! ([`super::tuned`]), and how a line of it becomes a launch again.

use super::choose::{self, Launch, Problem};
use super::pack::Layout;
use super::{choose_sm80, choose_sm90, choose_w4a8, choose_w4a16};

/// One configuration of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Config {
    /// Index into the family's table of tiles.
    pub(super) tile: usize,
    /// Parts of k, where the tile's kernel divides it; else 0.
    pub(super) splits: usize,
}

/// What tables call the kernels of a problem, by op and architecture. Groups, zero points and the 16-bit type of a weight are
/// not told apart: they change its bytes by some percent. `None` where there is nothing to choose.
pub(super) fn family(p: &Problem) -> Option<&'static str> {
    Some(match p.layout {
        Layout::Blocks8 if p.outliers => "llm_int8/sm90",
        Layout::Blocks8 => "w8a8/sm90",
        Layout::Rows8 if p.outliers => "llm_int8/sm80",
        Layout::Rows8 => "w8a8/sm80",
        Layout::Blocks4(shape) if shape.bits == 2 => "w2a8/sm90",
        Layout::Blocks4(shape) if shape.factors => "w4a8_factored/sm90",
        Layout::Blocks4(_) => "w4a8/sm90",
        Layout::Fragments8Bit { bits: 4 } => "w4a8/sm80",
        Layout::Fragments8Bit { .. } => "w8a8_groups/sm80",
        Layout::Blocks16(shape) if shape.bits == 4 => "w4a16/sm90",
        Layout::Blocks16(_) => "w8a16/sm90",
        Layout::Fragments16Bit { bits: 4 } => "w4a16/sm80",
        Layout::Fragments16Bit { .. } => "w8a16/sm80",
        Layout::FragmentsCodebook => "c4a16/sm80",
        Layout::Dense { .. } | Layout::Canonical { .. } | Layout::CanonicalCodebook => return None,
    })
}

/// Configurations among which the fastest for `m` rows should be, each valid for as many rows or fewer; none where [`family`]
/// is `None`.
pub(super) fn candidates(p: &Problem, m: usize) -> Vec<Config> {
    match p.layout {
        _ if family(p).is_none() => Vec::new(),
        Layout::Blocks8 => choose_sm90::candidates(p, m),
        Layout::Blocks16(shape) => choose_w4a16::candidates(p, shape, m),
        Layout::Blocks4(shape) => choose_w4a8::candidates(p, shape, m),
        Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook => choose_sm80::candidates(p, m),
        _ => choose::candidates(p),
    }
}

/// The launch of `config`, one of [`candidates`] of `p` and `m` rows or more, for `m` rows, `m` at least 1.
pub(super) fn launch(p: &Problem, config: Config, m: usize) -> Launch {
    match p.layout {
        Layout::Blocks8 => choose_sm90::with_config(p, config, m),
        Layout::Blocks16(shape) => choose_w4a16::with_config(p, shape, config, m),
        Layout::Blocks4(shape) => choose_w4a8::with_config(p, shape, config, m),
        Layout::Fragments16Bit { .. } | Layout::FragmentsCodebook => choose_sm80::with_config(p, config, m),
        _ => choose::with_config(p, config, m),
    }
}

/// Whether to try tiles of `rows` of w by `tokens` of x with k, of `slices` slices, in `splits` parts: those in which most rows
/// of x are rows of the batch, one or two below each other, or more where all tiles run at once; k is split only there.
pub(super) fn is_plausible(p: &Problem, m: usize, [rows, tokens]: [usize; 2], slices: usize, splits: usize) -> bool {
    let blocks = p.n.div_ceil(rows) * m.div_ceil(tokens) * splits;
    let at_once = blocks <= 2 * p.sm_count as usize;
    let fills = tokens <= 2 * m.next_power_of_two().max(8);
    fills && (2 * tokens >= m || at_once) && (splits == 1 || at_once) && splits <= slices
}

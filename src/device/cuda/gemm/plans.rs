//! Launches of one weight, resolved once for each number of rows and found again without a lock.

use std::sync::OnceLock;

use super::family::Plan;

/// Entries of a page, and pages: what is allocated is a page for each range of rows that occurs.
const PAGE: usize = 64;
const PAGES: usize = 64;
/// Rows up to which each number has a plan of its own; above, as many as [`STEP`] share one.
const EXACT_ROWS: usize = 256;
/// All tiles hold multiples of 8 rows, so that as many numbers of rows have the same grid.
const STEP: usize = 8;

/// A plan, once it is made: most rows of most pages never occur.
type Slot<P> = OnceLock<Box<Plan<P>>>;

/// The plans.
#[derive(Debug)]
pub(super) struct Plans<P> {
    pages: [OnceLock<Box<[Slot<P>]>>; PAGES],
}

impl<P> Default for Plans<P> {
    fn default() -> Self {
        Plans { pages: [const { OnceLock::new() }; PAGES] }
    }
}

impl<P> Plans<P> {
    /// Rows to make a plan for where `m` are to run: it fits those, and all that find the same.
    pub(super) fn rows(m: usize) -> usize {
        if m <= EXACT_ROWS { m } else { m.next_multiple_of(STEP) }
    }

    /// Where the plan for `m` rows, `m` at least 1, is or goes; `None` beyond what is kept (30,976 rows).
    pub(super) fn slot(&self, m: usize) -> Option<&Slot<P>> {
        let index = if m <= EXACT_ROWS { m - 1 } else { EXACT_ROWS - 1 + (m - EXACT_ROWS).div_ceil(STEP) };
        let page = self.pages.get(index / PAGE)?;
        let page = page.get_or_init(|| (0..PAGE).map(|_| OnceLock::new()).collect());
        page.get(index % PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_share_a_slot_share_a_grid() {
        let plans = Plans::<()>::default();
        let address = |m: usize| plans.slot(m).map(|slot| std::ptr::from_ref(slot) as usize);
        for m in 1..4000 {
            let rows = Plans::<()>::rows(m);
            assert!(rows >= m && address(rows) == address(m), "{m}");
            assert!([8, 16, 64, 128, 256].iter().all(|tile| m.div_ceil(*tile) == rows.div_ceil(*tile)), "{m}");
            assert_eq!(address(m) == address(m + 1), rows == Plans::<()>::rows(m + 1), "{m}");
        }
        assert!(address(EXACT_ROWS + STEP * (PAGES * PAGE - EXACT_ROWS)).is_some());
        assert!(address(EXACT_ROWS + STEP * (PAGES * PAGE - EXACT_ROWS) + 1).is_none());
    }
}

//! What pictures share: colours, letters, ticks, and labels that do not cover one another.

use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{IntoTextStyle, RGBColor, TextStyle};

pub(super) const TEXT: RGBColor = RGBColor(40, 40, 40);
pub(super) const QUIET: RGBColor = RGBColor(110, 110, 110);
pub(super) const GRID: RGBColor = RGBColor(232, 232, 232);
/// Radius of a point.
pub(super) const DOT: i32 = 4;
/// Pixels of a label's letter, wide and high.
pub(super) const LETTER: (i32, i32) = (7, 13);

pub(super) type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Why something was not drawn.
pub(super) fn reason(error: DrawingAreaErrorKind<std::io::Error>) -> String {
    error.to_string()
}

/// Rectangles in use: left, top, right, bottom.
pub(super) struct Labels {
    area: [i32; 4],
    dots: Vec<[i32; 4]>,
    placed: Vec<[i32; 4]>,
}

impl Labels {
    /// In `area`, around `points`.
    pub(super) fn new(area: [i32; 4], points: impl Iterator<Item = (i32, i32)>) -> Labels {
        let dots = points.map(|(x, y)| [x - DOT, y - DOT, x + DOT, y + DOT]).collect();
        Labels { area, dots, placed: Vec::new() }
    }

    /// Middle of the top of a label of `letters` letters under `from`: where nothing else is, as near as that allows, and
    /// rather further away than with other labels in between. `None` where the plot has no room.
    pub(super) fn place_below(&mut self, from: (i32, i32), letters: i32) -> Option<(i32, i32)> {
        let tops = (from.1 + DOT + 3..self.area[3] - LETTER.1).step_by(3);
        let candidates = tops.flat_map(|top| [0, 24, -24, 48, -48, 72].map(|aside| (from.0 + aside, top)));
        self.place(from, letters, candidates.collect(), |to, _| (to, distance(from, to)))
    }

    /// The same anywhere around `from`, beside it first.
    pub(super) fn place_around(&mut self, from: (i32, i32), letters: i32) -> Option<(i32, i32)> {
        let (half, high) = (half_width(letters), LETTER.1);
        let gaps = (DOT + 2..240).step_by(6);
        let candidates = gaps.flat_map(|gap| {
            let (beside, mid) = (half + gap, from.1 - high / 2);
            let (above, below) = (from.1 - gap - high, from.1 + gap);
            [
                (from.0 + beside, mid),
                (from.0 - beside, mid),
                (from.0, above),
                (from.0, below),
                (from.0 + half, above),
                (from.0 + half, below),
                (from.0 - half, above),
                (from.0 - half, below),
            ]
        });
        let to =
            self.place(from, letters, candidates.collect(), |to, own| (nearest(from, to, letters).0, away(from, own)))?;
        // What comes later stays off the line between the two.
        let (edge, gap) = nearest(from, to, letters);
        self.dots.extend((2..(gap / 4).max(2)).map(|i| along(from, edge, i, gap / 4)));
        Some(to)
    }

    /// The best of the candidates that is free, by `cost`: the end of the line to its point, and how bad it is. Crossing
    /// other labels on the way costs too.
    fn place(
        &mut self,
        from: (i32, i32),
        letters: i32,
        candidates: Vec<(i32, i32)>,
        cost: impl Fn((i32, i32), [i32; 4]) -> ((i32, i32), i32),
    ) -> Option<(i32, i32)> {
        let half = half_width(letters);
        let own = |(x, top): (i32, i32)| [x - half, top, x + half, top + LETTER.1];
        let free = candidates.into_iter().filter(|&to| {
            let (own, area) = (own(to), self.area);
            let is_inside = own[0] > area[0] && own[2] < area[2] && own[1] > area[1] && own[3] < area[3];
            is_inside && self.dots.iter().chain(&self.placed).all(|used| !overlap(&own, used))
        });
        let crossed = |end| {
            let is_crossed = |label: &&[i32; 4]| (0..32).any(|i| overlap(&along(from, end, i, 32), label));
            self.placed.iter().filter(is_crossed).count() as i32
        };
        let to = free.min_by_key(|&to| {
            let (end, cost) = cost(to, own(to));
            cost + 60 * crossed(end)
        })?;
        self.placed.push(own(to));
        Some(to)
    }
}

/// Half of what `letters` letters take, with a margin.
pub(super) fn half_width(letters: i32) -> i32 {
    letters * LETTER.0 / 2 + 2
}

fn overlap(a: &[i32; 4], b: &[i32; 4]) -> bool {
    a[2] >= b[0] && a[0] <= b[2] && a[3] >= b[1] && a[1] <= b[3]
}

/// The point `step` of `steps` on the way between two.
fn along(from: (i32, i32), to: (i32, i32), step: i32, steps: i32) -> [i32; 4] {
    let between = |a: i32, b: i32| a + (b - a) * step / steps;
    let (x, y) = (between(from.0, to.0), between(from.1, to.1));
    [x, y, x, y]
}

/// How far a label is from its point: from the middle of its top across, from its nearer edge up or down.
fn away(from: (i32, i32), label: [i32; 4]) -> i32 {
    let (dx, dy) = gap(from, label);
    dx + dy + ((label[0] + label[2]) / 2 - from.0).abs() / 8
}

/// Pixels between a point and a rectangle, across and down; 0 where they meet.
fn gap(from: (i32, i32), [left, top, right, bottom]: [i32; 4]) -> (i32, i32) {
    ((left - from.0).max(from.0 - right).max(0), (top - from.1).max(from.1 - bottom).max(0))
}

/// The point of a placed label, given as the middle of its top, that is nearest to `from`, and how far away it is.
pub(super) fn nearest(from: (i32, i32), to: (i32, i32), letters: i32) -> ((i32, i32), i32) {
    let half = half_width(letters);
    let (dx, dy) = gap(from, [to.0 - half, to.1, to.0 + half, to.1 + LETTER.1]);
    ((from.0.clamp(to.0 - half, to.0 + half), from.1.clamp(to.1, to.1 + LETTER.1)), dx.max(dy))
}

/// How far a label is from its point.
pub(super) fn distance(from: (i32, i32), to: (i32, i32)) -> i32 {
    (to.1 - from.1).abs() + (to.0 - from.0).abs()
}

/// Sans-serif letters.
pub(super) fn style(size: u32, color: &'static RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).with_color(*color).into_text_style(&(0, 0))
}

/// The same, from an edge or a corner.
pub(super) fn anchored(size: u32, color: &'static RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    style(size, color).pos(Pos::new(h, v))
}

/// A tick: `0.01`, `1`, `1000`.
pub(super) fn plain(x: f64) -> String {
    let decimals = (-x.log10().round()).max(0.0) as usize;
    format!("{x:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apart(labels: &Labels) {
        for (i, a) in labels.placed.iter().enumerate() {
            for b in labels.placed[..i].iter().chain(&labels.dots[..2]) {
                assert!(a[0] > b[2] || a[2] < b[0] || a[1] > b[3] || a[3] < b[1], "{a:?} and {b:?}");
            }
        }
    }

    #[test]
    fn labels_do_not_overlap() {
        let labels = || Labels::new([80, 76, 850, 614], [(200, 200), (202, 230)].into_iter());
        let mut below = labels();
        let places: Vec<(i32, i32)> = (0..20).filter_map(|_| below.place_below((200, 200), 6)).collect();
        assert_eq!(places.len(), 20);
        apart(&below);
        assert!((0..200).any(|_| below.place_below((200, 200), 6).is_none()), "the plot ends somewhere");
        let mut around = labels();
        let first = around.place_around((200, 200), 6).expect("room");
        assert!(nearest((200, 200), first, 6).1 <= DOT + 3, "next to its point");
        assert!((0..20).all(|_| around.place_around((200, 200), 6).is_some()));
        apart(&around);
        assert!((0..2000).any(|_| around.place_around((200, 200), 6).is_none()), "the plot ends somewhere");
    }
}

//! Codebook weights (NF4, FP4): codes stay packed in memory, are looked up in registers and meet f32 activations.
//!
//! Outputs come in tiles of 16, a tile in 64-byte lines as in `int_weight`, but here a line is eight columns of 4-bit codes
//! and 32-bit word `j` of it belongs to output `j`: column `i` is nibble `i`, lowest first. So shifting the words brings
//! the next column of all outputs to the low bits, which is what a table lookup takes.
#![allow(unsafe_code)] // threads write disjoint columns
#![allow(clippy::needless_range_loop)] // arrays of registers, several indexed together

use std::ops::Range;

use rayon::prelude::*;

use super::super::Level;
use super::super::simd::{Kernel, Simd};
use super::int_weight::{Line, Segment, Vectors, segments};
use super::memory_hints::prefetch;
use super::{Destination, pieces};
use crate::quant::{Codebook, QuantWeight};

/// Columns of a line.
const COLUMNS: usize = 8;
/// Rows of one call of the kernel; of a single row so many tiles instead, whose sums need not wait for each other.
const ROWS: usize = 8;
const TILES: usize = 4;
/// How far ahead weights are fetched, as in `int_kernel`.
const PREFETCH_LINES: usize = 48;

/// A codebook weight in the layout of the kernel below.
#[derive(Debug)]
pub(crate) struct CodebookWeight {
    pub(super) n: usize,
    k: usize,
    codebook: Codebook,
    groups: usize,
    segments: Vec<Segment>,
    /// Lines of a tile.
    tile_lines: usize,
    pub(super) lines: Vec<Line>,
    scales: Vectors,
    /// `[tiles, 16]`
    bias: Option<Vec<[f32; 16]>>,
}

impl CodebookWeight {
    pub(super) fn pack(q: &QuantWeight, codebook: Codebook, bias: Option<Vec<f32>>) -> Self {
        let segments = segments(q, q.k, COLUMNS);
        let tile_lines: usize = segments.iter().map(|s| s.lines).sum();
        let (tiles, groups) = (q.n.div_ceil(16), q.groups());
        let mut lines = vec![Line([0; 64]); tiles * tile_lines];
        lines.par_chunks_exact_mut(tile_lines).zip(q.codes.par_chunks(16 * q.k)).for_each(|(tile, codes)| {
            for (r, codes) in codes.chunks_exact(q.k).enumerate() {
                for segment in &segments {
                    for (i, &code) in codes[segment.start..][..segment.len].iter().enumerate() {
                        let column = segment.padded_start + i;
                        let byte = &mut tile[column / COLUMNS].0[r * 4 + column % COLUMNS / 2];
                        *byte |= if column % 2 == 0 { code } else { code << 4 };
                    }
                }
            }
        });
        CodebookWeight {
            n: q.n,
            k: q.k,
            codebook,
            groups,
            segments,
            tile_lines,
            lines,
            scales: Vectors::by_tile(q.n, groups, |r, g| q.scales[r * groups + g]),
            bias: bias.map(|bias| {
                let at = |o: usize| bias.get(o).copied().unwrap_or(0.0);
                (0..tiles).map(|t| std::array::from_fn(|lane| at(t * 16 + lane))).collect()
            }),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
            + self.scales.bytes()
            + self.bias.as_ref().map_or(0, |v| size_of_val(v.as_slice()))
    }

    pub(super) fn name(&self) -> &'static str {
        self.codebook.name()
    }
}

/// `x * w^T + bias` into `to`, `m` rows.
pub(super) fn run(level: Level, w: &CodebookWeight, x: &[f32], to: Destination<'_>, m: usize) {
    let tiles = w.n.div_ceil(16);
    if w.n * w.k * m < 1 << 15 {
        return level.run(Tiles { w, x, to, m, tiles: 0..tiles });
    }
    pieces(tiles).for_each(|tiles| level.run(Tiles { w, x, to, m, tiles }));
}

/// All rows of some tiles.
struct Tiles<'a> {
    w: &'a CodebookWeight,
    x: &'a [f32],
    to: Destination<'a>,
    m: usize,
    tiles: Range<usize>,
}

impl Kernel for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for first in self.tiles.clone().step_by(TILES) {
            let tiles = first..(first + TILES).min(self.tiles.end);
            let mut row = 0;
            while row < self.m {
                row += match self.m - row {
                    1..4 => self.block::<S, 1, TILES>(s, tiles.clone(), row),
                    4..ROWS => tiles.clone().fold(0, |_, tile| self.block::<S, 4, 1>(s, tile..tile + 1, row)),
                    _ => tiles.clone().fold(0, |_, tile| self.block::<S, ROWS, 1>(s, tile..tile + 1, row)),
                };
            }
        }
    }
}

impl Tiles<'_> {
    /// Up to `T` tiles of 16 outputs, `M` rows from `row` on; returns `M`. Tiles behind the last repeat it and are dropped.
    ///
    /// Each sum takes its columns line by line, whatever the block, so that a row does not depend on its batch.
    #[inline(always)]
    fn block<S: Simd, const M: usize, const T: usize>(&self, s: S, tiles: Range<usize>, row: usize) -> usize {
        let w = self.w;
        let tile: [usize; T] = std::array::from_fn(|t| (tiles.start + t).min(tiles.end - 1));
        let lines: [&[Line]; T] = std::array::from_fn(|t| &w.lines[tile[t] * w.tile_lines..][..w.tile_lines]);
        let x: [&[f32]; M] = std::array::from_fn(|r| &self.x[(row + r) * w.k..][..w.k]);
        let table = s.load(&w.codebook.0);
        let mut y = [[s.splat(0.0); M]; T];
        let mut line = 0;
        for segment in &w.segments {
            let mut sums = [[s.splat(0.0); M]; T];
            for l in 0..segment.lines {
                let mut codes = [s.load_bytes(&lines[0][line].0); T];
                for t in 0..T {
                    codes[t] = s.load_bytes(&lines[t][line].0);
                    if M == 1 {
                        prefetch(lines[t].as_ptr().wrapping_add(line + PREFETCH_LINES));
                    }
                }
                line += 1;
                let first = segment.start + l * COLUMNS;
                let columns = COLUMNS.min(segment.len - l * COLUMNS);
                let x: [&[f32]; M] = std::array::from_fn(|r| &x[r][first..first + columns]);
                let mut of_line = [[s.splat(0.0); M]; T];
                let mut column = |i: usize| {
                    for t in 0..T {
                        let weights = s.lookup(table, codes[t]);
                        codes[t] = s.shift_right_4(codes[t]);
                        for r in 0..M {
                            of_line[t][r] = s.mul_add(weights, s.splat(x[r][i]), of_line[t][r]);
                        }
                    }
                };
                if columns == COLUMNS {
                    for i in 0..COLUMNS {
                        column(i);
                    }
                } else {
                    (0..columns).for_each(column);
                }
                for t in 0..T {
                    for r in 0..M {
                        sums[t][r] = s.add(sums[t][r], of_line[t][r]);
                    }
                }
            }
            for t in 0..T {
                let scale = w.scales.load(s, tile[t] * w.groups + segment.group);
                for r in 0..M {
                    y[t][r] = s.mul_add(sums[t][r], scale, y[t][r]);
                }
            }
        }
        for t in 0..tiles.len() {
            for r in 0..M {
                let y = match &w.bias {
                    Some(bias) => s.add(y[t][r], s.load(&bias[tile[t]])),
                    None => y[t][r],
                };
                let mut values = [0.0; 16];
                s.store(y, &mut values);
                // SAFETY: `row + r` is below `m`; a tile belongs to one thread.
                unsafe { self.to.write(row + r, tile[t] * 16, &values) };
            }
        }
        M
    }
}

//! Weights whose codes stand for floating-point values (codebooks, FP8): codes stay packed in memory, are decoded in
//! registers and meet f32 activations.
//!
//! Outputs come in tiles of 16, a tile in 64-byte lines as in `int_weight`. How a line holds its columns is what decodes it
//! fastest: see [`Decoder`].
#![allow(unsafe_code)] // threads write disjoint columns
#![allow(clippy::needless_range_loop)] // arrays of registers, several indexed together

use std::ops::Range;

use rayon::prelude::*;

use super::super::Level;
use super::super::simd::{Kernel, Simd};
use super::int_weight::{Line, Segment, Vectors, segments};
use super::memory_hints::prefetch;
use super::{Destination, pieces};
use crate::quant::{Codebook, Encoding, QuantWeight};

/// Rows of one call of the kernel; of a single row so many tiles instead, whose sums need not wait for each other.
const ROWS: usize = 8;
const TILES: usize = 4;
/// How far ahead weights are fetched, as in `int_kernel`.
const PREFETCH_LINES: usize = 48;

/// How lines hold codes, and what these stand for.
trait Decoder: Copy + Sync {
    /// Columns of a line.
    const COLUMNS: usize;
    /// Lines whose products are summed before they are added to the rest: the shorter the sums, the less is rounded off.
    const LINES: usize;
    /// Decoded values times this are the true ones.
    const FACTOR: f32;
    /// Puts a code into a line that is still zero there.
    fn put(line: &mut Line, output: usize, column: usize, code: u8);
    /// The columns of a line as vectors of 16 outputs, in ascending order.
    type Columns<S: Simd>: AsRef<[S::F]>;
    /// What decoding needs in a register.
    fn table<S: Simd>(&self, s: S) -> S::F;
    fn decode<S: Simd>(s: S, table: S::F, line: &Line) -> Self::Columns<S>;
}

/// 32-bit word `j` of a line belongs to output `j`; column `i` is nibble `i`, lowest first. So shifting the words brings
/// the next column of all outputs to the low bits, which is what a table lookup takes.
impl Decoder for &Codebook {
    const COLUMNS: usize = 8;
    const LINES: usize = 1;
    const FACTOR: f32 = 1.0;
    type Columns<S: Simd> = [S::F; 8];

    fn put(line: &mut Line, output: usize, column: usize, code: u8) {
        line.0[output * 4 + column / 2] |= if column.is_multiple_of(2) { code } else { code << 4 };
    }

    #[inline(always)]
    fn table<S: Simd>(&self, s: S) -> S::F {
        s.load(&self.0)
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, table: S::F, line: &Line) -> Self::Columns<S> {
        let mut columns = [table; 8];
        let mut codes = s.load_bytes(&line.0);
        for column in &mut columns {
            *column = s.lookup(table, codes);
            codes = s.shift_right_4(codes);
        }
        columns
    }
}

/// FP8 `e4m3fn` as [`Simd::load_e4m3`] takes it: pairs of columns, each with all outputs.
#[derive(Debug, Clone, Copy)]
struct E4m3;

impl Decoder for E4m3 {
    const COLUMNS: usize = 4;
    const LINES: usize = 4;
    const FACTOR: f32 = 256.0;
    type Columns<S: Simd> = [S::F; 4];

    fn put(line: &mut Line, output: usize, column: usize, code: u8) {
        line.0[column / 2 * 32 + output * 2 + column % 2] = code;
    }

    #[inline(always)]
    fn table<S: Simd>(&self, s: S) -> S::F {
        s.splat(0.0)
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, _: S::F, line: &Line) -> Self::Columns<S> {
        s.load_e4m3(&line.0)
    }
}

/// A weight of such codes in the layout of the kernel below.
#[derive(Debug)]
pub(crate) struct FloatCodeWeight {
    pub(super) n: usize,
    k: usize,
    encoding: Encoding,
    groups: usize,
    segments: Vec<Segment>,
    /// Lines of a tile.
    tile_lines: usize,
    pub(super) lines: Vec<Line>,
    scales: Vectors,
    /// `[tiles, 16]`
    bias: Option<Vec<[f32; 16]>>,
}

impl FloatCodeWeight {
    /// Packs a weight that is not [`Encoding::Affine`].
    pub(super) fn pack(q: &QuantWeight, bias: Option<Vec<f32>>) -> Self {
        match &q.encoding {
            Encoding::Codebook(_) => Self::pack_as::<&Codebook>(q, bias),
            Encoding::E4m3 => Self::pack_as::<E4m3>(q, bias),
            Encoding::Affine => unreachable!("integers have a kernel of their own"),
        }
    }

    fn pack_as<D: Decoder>(q: &QuantWeight, bias: Option<Vec<f32>>) -> Self {
        let segments = segments(q.k, q.group_size, q.k, D::COLUMNS);
        let tile_lines: usize = segments.iter().map(|s| s.lines).sum();
        let (tiles, groups) = (q.n.div_ceil(16), q.groups());
        let mut lines = vec![Line([0; 64]); tiles * tile_lines];
        lines.par_chunks_exact_mut(tile_lines).zip(q.codes.par_chunks(16 * q.k)).for_each(|(tile, codes)| {
            for (r, codes) in codes.chunks_exact(q.k).enumerate() {
                for segment in &segments {
                    for (i, &code) in codes[segment.start..][..segment.len].iter().enumerate() {
                        let column = segment.padded_start + i;
                        D::put(&mut tile[column / D::COLUMNS], r, column % D::COLUMNS, code);
                    }
                }
            }
        });
        FloatCodeWeight {
            n: q.n,
            k: q.k,
            encoding: q.encoding,
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

    /// Bytes of a packed weight `[n, k]` of such an encoding in groups of `group_size`.
    pub(super) fn packed_bytes(encoding: &Encoding, n: usize, k: usize, group_size: usize, bias: bool) -> usize {
        let columns = match encoding {
            Encoding::E4m3 => E4m3::COLUMNS,
            Encoding::Codebook(_) | Encoding::Affine => <&Codebook>::COLUMNS,
        };
        let lines: usize = segments(k, group_size, k, columns).iter().map(|s| s.lines).sum();
        let vectors = k.div_ceil(group_size) + usize::from(bias);
        n.div_ceil(16) * (lines * size_of::<Line>() + vectors * size_of::<[f32; 16]>())
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
            + self.scales.bytes()
            + self.bias.as_ref().map_or(0, |v| size_of_val(v.as_slice()))
    }

    /// What the codes are, for reports.
    pub(super) fn name(&self) -> String {
        match &self.encoding {
            Encoding::Codebook(codebook) => format!("{} table", codebook.name()),
            _ => "fp8 codes".to_owned(),
        }
    }
}

/// `x * w^T + bias` into `to`, `m` rows.
pub(super) fn run(level: Level, w: &FloatCodeWeight, x: &[f32], to: Destination<'_>, m: usize) {
    match &w.encoding {
        Encoding::Codebook(codebook) => run_as(level, w, codebook, x, to, m),
        Encoding::E4m3 => run_as(level, w, E4m3, x, to, m),
        Encoding::Affine => unreachable!("`pack` takes no such weight"),
    }
}

fn run_as<D: Decoder>(level: Level, w: &FloatCodeWeight, decoder: D, x: &[f32], to: Destination<'_>, m: usize) {
    let tiles = w.n.div_ceil(16);
    if w.n * w.k * m < 1 << 15 {
        return level.run(Tiles { w, decoder, x, to, m, tiles: 0..tiles });
    }
    pieces(tiles).for_each(|tiles| level.run(Tiles { w, decoder, x, to, m, tiles }));
}

/// All rows of some tiles.
struct Tiles<'a, D> {
    w: &'a FloatCodeWeight,
    decoder: D,
    x: &'a [f32],
    to: Destination<'a>,
    m: usize,
    tiles: Range<usize>,
}

impl<D: Decoder> Kernel for Tiles<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for first in self.tiles.clone().step_by(TILES) {
            let tiles = first..(first + TILES).min(self.tiles.end);
            let mut row = 0;
            while row < self.m {
                row += match self.m - row {
                    1..4 => self.block::<S, 1, TILES>(s, tiles.clone(), row),
                    4..ROWS => self.one_by_one::<S, 4>(s, tiles.clone(), row),
                    _ => self.one_by_one::<S, ROWS>(s, tiles.clone(), row),
                };
            }
        }
    }
}

impl<D: Decoder> Tiles<'_, D> {
    /// A block of each tile; returns `M`.
    #[inline(always)]
    fn one_by_one<S: Simd, const M: usize>(&self, s: S, tiles: Range<usize>, row: usize) -> usize {
        for tile in tiles {
            self.block::<S, M, 1>(s, tile..tile + 1, row);
        }
        M
    }

    /// Up to `T` tiles of 16 outputs, `M` rows from `row` on; returns `M`. Tiles behind the last repeat it and are dropped.
    ///
    /// Each sum takes its columns line by line, whatever the block, so that a row does not depend on its batch.
    #[inline(always)]
    fn block<S: Simd, const M: usize, const T: usize>(&self, s: S, tiles: Range<usize>, row: usize) -> usize {
        let w = self.w;
        let tile: [usize; T] = std::array::from_fn(|t| (tiles.start + t).min(tiles.end - 1));
        let lines: [&[Line]; T] = std::array::from_fn(|t| &w.lines[tile[t] * w.tile_lines..][..w.tile_lines]);
        let x: [&[f32]; M] = std::array::from_fn(|r| &self.x[(row + r) * w.k..][..w.k]);
        let table = self.decoder.table(s);
        let mut y = [[s.splat(0.0); M]; T];
        let mut line = 0;
        for segment in &w.segments {
            let mut sums = [[s.splat(0.0); M]; T];
            for start in (0..segment.lines).step_by(D::LINES) {
                let mut of_lines = [[s.splat(0.0); M]; T];
                for l in start..(start + D::LINES).min(segment.lines) {
                    let first = segment.start + l * D::COLUMNS;
                    let columns = D::COLUMNS.min(segment.len - l * D::COLUMNS);
                    let x: [&[f32]; M] = std::array::from_fn(|r| &x[r][first..first + columns]);
                    for t in 0..T {
                        if M == 1 {
                            prefetch(lines[t].as_ptr().wrapping_add(line + PREFETCH_LINES));
                        }
                        let weights = D::decode(s, table, &lines[t][line]);
                        let weights = weights.as_ref();
                        // Whole lines have a loop of a known length, which leaves the vectors in registers.
                        if columns == D::COLUMNS {
                            add_columns(s, &mut of_lines[t], weights, x);
                        } else {
                            add_columns(s, &mut of_lines[t], &weights[..columns], x);
                        }
                    }
                    line += 1;
                }
                for t in 0..T {
                    for r in 0..M {
                        sums[t][r] = s.add(sums[t][r], of_lines[t][r]);
                    }
                }
            }
            for t in 0..T {
                let scale = w.scales.load(s, tile[t] * w.groups + segment.group);
                for r in 0..M {
                    y[t][r] = s.mul_add(s.mul(sums[t][r], s.splat(D::FACTOR)), scale, y[t][r]);
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

/// Adds the products of some columns to the sums of `M` rows.
#[inline(always)]
fn add_columns<S: Simd, const M: usize>(s: S, sums: &mut [S::F; M], weights: &[S::F], x: [&[f32]; M]) {
    for (i, &weights) in weights.iter().enumerate() {
        for r in 0..M {
            sums[r] = s.mul_add(weights, s.splat(x[r][i]), sums[r]);
        }
    }
}

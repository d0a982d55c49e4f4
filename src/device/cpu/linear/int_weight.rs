//! Layout of quantized weights in memory.
//!
//! Outputs come in tiles of 16. A tile is a run of 64-byte lines; byte `4 j + i` of a line belongs to output `j` and to
//! the `i`-th of four neighbouring columns. Codes of 5 to 8 bits take a byte: a line is 4 columns. Codes of 2 to 4 bits
//! take a nibble: a line is 8 columns, the first four in the low nibbles. Columns are cut into segments, each within
//! one group and padded with code 0 to whole lines.

use half::{bf16, f16};
use rayon::prelude::*;

use super::super::reference::INT16_BLOCK;
use super::super::simd::Simd;
use crate::quant::{ActQuant, QuantWeight, Scheme};

/// 64 bytes on a cache line of their own.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

/// Columns that are summed as integers before a scale is applied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// First column and number of columns.
    pub(super) start: usize,
    pub(super) len: usize,
    /// First column in padded order; a multiple of a line's columns.
    pub(super) padded_start: usize,
    /// Lines it takes.
    pub(super) lines: usize,
    pub(super) group: usize,
}

/// `[tiles, groups, 16]` values, in the narrowest type that holds all of them exactly.
#[derive(Debug)]
pub(super) enum Vectors {
    F16(Vec<[f16; 16]>),
    BF16(Vec<[bf16; 16]>),
    F32(Vec<[f32; 16]>),
}

impl Vectors {
    fn new(values: Vec<[f32; 16]>) -> Self {
        let all = |exact: fn(f32) -> bool| values.iter().flatten().all(|&x| exact(x));
        if all(|x| f16::from_f32(x).to_f32() == x) {
            Vectors::F16(values.iter().map(|v| v.map(f16::from_f32)).collect())
        } else if all(|x| bf16::from_f32(x).to_f32() == x) {
            Vectors::BF16(values.iter().map(|v| v.map(bf16::from_f32)).collect())
        } else {
            Vectors::F32(values)
        }
    }

    #[inline(always)]
    pub(super) fn load<S: Simd>(&self, s: S, i: usize) -> S::F {
        match self {
            Vectors::F16(v) => s.load_f16(&v[i]),
            Vectors::BF16(v) => s.load_bf16(&v[i]),
            Vectors::F32(v) => s.load(&v[i]),
        }
    }

    fn get(&self, i: usize) -> [f32; 16] {
        match self {
            Vectors::F16(v) => v[i].map(f16::to_f32),
            Vectors::BF16(v) => v[i].map(bf16::to_f32),
            Vectors::F32(v) => v[i],
        }
    }

    /// `value(output, group)` by tiles of 16 outputs; 0 behind the last.
    pub(super) fn by_tile(n: usize, groups: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let at = |i: usize, lane: usize| {
            let r = i / groups * 16 + lane;
            if r < n { value(r, i % groups) } else { 0.0 }
        };
        Vectors::new((0..n.div_ceil(16) * groups).map(|i| std::array::from_fn(|lane| at(i, lane))).collect())
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Vectors::F16(v) => size_of_val(v.as_slice()),
            Vectors::BF16(v) => size_of_val(v.as_slice()),
            Vectors::F32(v) => size_of_val(v.as_slice()),
        }
    }
}

/// A quantized weight in the layout of the integer kernels.
#[derive(Debug)]
pub(crate) struct IntWeight {
    pub(super) n: usize,
    pub(super) k: usize,
    /// Codes in nibbles rather than bytes.
    pub(super) nibbles: bool,
    pub(super) activation: ActQuant,
    pub(super) segments: Vec<Segment>,
    pub(super) groups: usize,
    /// Columns with padding.
    pub(super) padded_k: usize,
    /// Lines of a tile.
    pub(super) tile_lines: usize,
    pub(super) lines: Vec<Line>,
    pub(super) scales: Vectors,
    /// The middle code, zero point of symmetric weights.
    pub(super) middle: i32,
    /// Zero points less `middle`, where one differs from it.
    pub(super) zeros: Option<Vectors>,
    /// `[tiles, groups, 16]` sums of codes, for activations with zero points.
    pub(super) code_sums: Option<Vec<[i32; 16]>>,
    /// `[tiles, 16]`
    pub(super) bias: Option<Vec<[f32; 16]>>,
}

impl IntWeight {
    pub(super) fn pack(q: &QuantWeight, bias: Option<Vec<f32>>, activation: ActQuant) -> Self {
        let (nibbles, line_columns) = (q.bits <= 4, line_columns(q.bits));
        let segments = segments(q.k, q.group_size, longest_segment(q.k, activation), line_columns);
        let tile_lines: usize = segments.iter().map(|s| s.lines).sum();
        let (tiles, groups) = (q.n.div_ceil(16), q.groups());
        let middle = 1 << (q.bits - 1);

        let mut lines = vec![Line([0; 64]); tiles * tile_lines];
        lines.par_chunks_exact_mut(tile_lines).zip(q.codes.par_chunks(16 * q.k)).for_each(|(tile, codes)| {
            for (r, codes) in codes.chunks_exact(q.k).enumerate() {
                for segment in &segments {
                    for (i, &code) in codes[segment.start..][..segment.len].iter().enumerate() {
                        let column = segment.padded_start + i;
                        let byte = &mut tile[column / line_columns].0[r * 4 + column % 4];
                        *byte |= if column % line_columns < 4 { code } else { code << 4 };
                    }
                }
            }
        });

        let vectors = |values: &[f32], less: f32| Vectors::by_tile(q.n, groups, |r, g| values[r * groups + g] - less);
        let zeros = (!q.is_symmetric()).then(|| vectors(&q.zeros, middle as f32));
        let code_sums = has_code_sums(activation).then(|| {
            let sum = |i: usize, lane: usize| -> i32 {
                let (r, g) = (i / groups * 16 + lane, i % groups);
                if r >= q.n {
                    return 0;
                }
                let columns = g * q.group_size..((g + 1) * q.group_size).min(q.k);
                q.codes[r * q.k..][columns].iter().map(|&c| i32::from(c)).sum()
            };
            (0..tiles * groups).map(|i| std::array::from_fn(|lane| sum(i, lane))).collect()
        });
        let bias = bias.map(|bias| {
            (0..tiles).map(|t| std::array::from_fn(|lane| bias.get(t * 16 + lane).copied().unwrap_or(0.0))).collect()
        });
        IntWeight {
            n: q.n,
            k: q.k,
            nibbles,
            activation,
            groups,
            padded_k: tile_lines * line_columns,
            tile_lines,
            lines,
            scales: vectors(&q.scales, 0.0),
            middle,
            zeros,
            code_sums,
            bias,
            segments,
        }
    }

    /// Codes less their zero points of 16 outputs at one column of the layer, exact; of a weight with one group.
    pub(super) fn steps(&self, tile: usize, column: usize) -> [f32; 16] {
        let line_columns = if self.nibbles { 8 } else { 4 };
        let line = &self.lines[tile * self.tile_lines + column / line_columns].0;
        let shift = if column % line_columns < 4 { 0 } else { 4 };
        let mask = if self.nibbles { 15 } else { 255 };
        let zeros = self.zeros.as_ref().map(|zeros| zeros.get(tile));
        std::array::from_fn(|lane| {
            let code = line[4 * lane + column % 4] >> shift & mask;
            (i32::from(code) - self.middle) as f32 - zeros.map_or(0.0, |zeros| zeros[lane])
        })
    }

    /// Bits a code takes in memory.
    pub(super) fn stored_bits(&self) -> u8 {
        if self.nibbles { 4 } else { 8 }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
            + self.scales.bytes()
            + self.zeros.as_ref().map_or(0, Vectors::bytes)
            + self.code_sums.as_ref().map_or(0, |v| size_of_val(v.as_slice()))
            + self.bias.as_ref().map_or(0, |v| size_of_val(v.as_slice()))
    }
}

/// Columns of a line of codes of `bits`.
fn line_columns(bits: u8) -> usize {
    if bits <= 4 { 8 } else { 4 }
}

/// Most columns that are summed as integers: weights that meet floats meet them in blocks of 16-bit integers.
fn longest_segment(k: usize, activation: ActQuant) -> usize {
    if activation == ActQuant::None { INT16_BLOCK } else { k }
}

fn has_code_sums(activation: ActQuant) -> bool {
    activation.zero_point() != 0 || activation == ActQuant::DynamicAsymmetric
}

/// Bytes of a packed weight `[n, k]` of `scheme`, its scales and zero points being exact in 16 bits.
pub(super) fn packed_bytes(scheme: &Scheme, n: usize, k: usize, bias: bool) -> usize {
    let (group_size, tiles) = (scheme.group_size.unwrap_or(k), n.div_ceil(16));
    let longest = longest_segment(k, scheme.activation);
    let segments = segments(k, group_size, longest, line_columns(scheme.weight_bits));
    let (lines, groups) = (segments.iter().map(|s| s.lines).sum::<usize>(), k.div_ceil(group_size));
    let vectors = if scheme.symmetric { 1 } else { 2 };
    let sums = if has_code_sums(scheme.activation) { size_of::<[i32; 16]>() } else { 0 };
    let bias = if bias { size_of::<[f32; 16]>() } else { 0 };
    tiles * (lines * size_of::<Line>() + groups * (vectors * size_of::<[f16; 16]>() + sums) + bias)
}

/// Every group of `group_size` of the `k` columns in runs of at most `longest`.
pub(super) fn segments(k: usize, group_size: usize, longest: usize, line_columns: usize) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut padded_start = 0;
    for group in 0..k.div_ceil(group_size) {
        let end = ((group + 1) * group_size).min(k);
        for start in (group * group_size..end).step_by(longest) {
            let len = (end - start).min(longest);
            let lines = len.div_ceil(line_columns);
            segments.push(Segment { start, len, padded_start, lines, group });
            padded_start += lines * line_columns;
        }
    }
    segments
}

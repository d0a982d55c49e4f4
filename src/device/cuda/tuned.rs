//! Tables of choices that were measured: for a weight and a number of rows the configuration that was the fastest.
//!
//! A table is a text file of one GPU; `bench kernels --tune` writes it. Its first line names the GPU, each other one a family of
//! kernels, outputs x inputs of a weight, numbers of rows, and a configuration as reports name it; `#` starts a comment:
//!
//! ```text
//! gpu NVIDIA H200
//! w4a16/sm90 28672x4096 1,2,4,8 w4 64x8/12 split 1
//! ```
//!
//! Weights not in it, and rows between those in it, are the cost models' ([`super::choose`]).

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use super::CudaDevice;
use super::candidates::{Config, candidates, family, launch};
use super::choose::{Launch, Problem, choose};
use crate::device::{PackedBody, PackedWeight};
use crate::error::{Error, Result};

/// The tables of this repository.
const BUILT_IN: [&str; 1] = [include_str!("tuned/nvidia-h200.txt")];

/// A table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tuned {
    /// Product name of the GPU that it was measured on.
    pub gpu: String,
    /// In order, one for each family, weight and number of rows.
    choices: Vec<Choice>,
}

/// One line of a table, for one number of rows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    /// Kernels, by op and architecture: `w4a16/sm90`.
    pub family: String,
    /// Outputs of the weight.
    pub n: usize,
    /// Its inputs.
    pub k: usize,
    /// Rows.
    pub m: usize,
    /// The configuration, as [`PackedWeight::kernel`] names it after the kernel.
    pub config: String,
}

impl Choice {
    fn is_for(&self, other: &Choice) -> bool {
        (&self.family, self.n, self.k, self.m) == (&other.family, other.n, other.k, other.m)
    }
}

impl Tuned {
    /// An empty table of `gpu`.
    pub fn new(gpu: &str) -> Tuned {
        Tuned { gpu: gpu.into(), choices: Vec::new() }
    }

    /// This repository's table of `gpu`; an empty one where it has none.
    pub fn built_in(gpu: &str) -> Tuned {
        let tables = BUILT_IN.iter().filter_map(|text| Tuned::parse(text).ok());
        tables.into_iter().find(|table| table.gpu == gpu).unwrap_or_else(|| Tuned::new(gpu))
    }

    /// The table in `file`.
    ///
    /// # Errors
    /// `Io`; `Checkpoint` with file and line where it is malformed.
    pub fn read(file: &Path) -> Result<Tuned> {
        let text = std::fs::read_to_string(file).map_err(Error::io(file))?;
        Tuned::parse(&text).map_err(|reason| Error::file(file, reason))
    }

    /// What a file of `text` holds; else what is wrong in which line.
    fn parse(text: &str) -> Result<Tuned, String> {
        let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.split('#').next().unwrap_or("").trim()));
        let mut lines = lines.filter(|(_, line)| !line.is_empty());
        let gpu = lines.next().and_then(|(_, line)| line.strip_prefix("gpu ")).map(str::trim);
        let mut known = HashSet::new();
        let mut table = Tuned::new(gpu.ok_or("expected a first line `gpu NAME`, the GPU that the table is for")?);
        for (number, line) in lines {
            let choices = parse_line(line).ok_or_else(|| {
                format!(
                    "line {number}: `{line}`: expected family, outputs x inputs, rows and configuration, as in \
                     `w4a16/sm90 28672x4096 1,2,4,8 w4 64x8/12 split 1`"
                )
            })?;
            for choice in choices {
                let Choice { family, n, k, m, .. } = &choice;
                if !known.insert((family.clone(), *n, *k, *m)) {
                    return Err(format!("line {number}: a second configuration of {family} {n}x{k} at {m} rows"));
                }
                table.choices.push(choice);
            }
        }
        table.choices.sort();
        Ok(table)
    }

    /// Adds those of `other`, in place of what there was for the same weights and rows.
    ///
    /// # Errors
    /// `Input` for a table of another GPU.
    pub fn add(&mut self, other: &Tuned) -> Result<()> {
        if self.gpu != other.gpu {
            let reason = format!("a table of choices for `{}`, and this is `{}`", other.gpu, self.gpu);
            return Err(Error::input("--tuned", format!("{reason}; make one with `lowbit bench kernels --tune FILE`")));
        }
        self.replace(&other.choices);
        Ok(())
    }

    /// Adds `choices`, in place of what there was for the same weights and rows.
    pub fn replace(&mut self, choices: &[Choice]) {
        self.choices.retain(|known| !choices.iter().any(|new| new.is_for(known)));
        self.choices.extend_from_slice(choices);
        self.choices.sort();
    }

    /// What holds for a problem: rows, ascending, and configuration. Lines that name no configuration of it are none of it, with a
    /// warning: kernels have changed since.
    pub(super) fn of(&self, p: &Problem) -> Vec<(usize, Config)> {
        let Some(family) = family(p) else { return Vec::new() };
        let ours =
            self.choices.iter().filter(|choice| (choice.family.as_str(), choice.n, choice.k) == (family, p.n, p.k));
        let resolve = |choice: &Choice| {
            let found = candidates(p, choice.m).into_iter().find(|&c| launch(p, c, choice.m).config == choice.config);
            if found.is_none() {
                let Choice { n, k, m, config, .. } = choice;
                tracing::warn!("tuned: {family} {n}x{k} at {m} rows: no kernel has the configuration `{config}`");
            }
            found.map(|config| (choice.m, config))
        };
        ours.filter_map(resolve).collect()
    }
}

fn parse_line(line: &str) -> Option<Vec<Choice>> {
    let mut words = line.splitn(4, ' ').map(str::trim);
    let (family, shape, rows, config) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let (n, k) = shape.split_once('x')?;
    let number = |text: &str| text.parse().ok().filter(|&number| number > 0);
    let (n, k) = (number(n)?, number(k)?);
    let choice = |m: &str| Some(Choice { family: family.into(), n, k, m: number(m)?, config: config.into() });
    rows.split(',').map(choice).collect()
}

/// As [`Tuned::read`] takes it: neighbouring rows with the same configuration in one line.
impl fmt::Display for Tuned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "gpu {}", self.gpu)?;
        let same = |a: &Choice, b: &Choice| (&a.family, a.n, a.k, &a.config) == (&b.family, b.n, b.k, &b.config);
        for run in self.choices.chunk_by(same) {
            let Choice { family, n, k, config, .. } = &run[0];
            let rows: Vec<String> = run.iter().map(|choice| choice.m.to_string()).collect();
            writeln!(f, "{family} {n}x{k} {} {config}", rows.join(","))?;
        }
        Ok(())
    }
}

/// The configuration for `m` rows, of what [`Tuned::of`] gave: that of the next number of rows which was measured, where tiles are
/// the same for both.
pub(super) fn config(choices: &[(usize, Config)], m: usize) -> Option<Config> {
    let &(measured, config) = choices.get(choices.partition_point(|&(measured, _)| measured < m))?;
    (covered(measured) == covered(m)).then_some(config)
}

/// Rows that the tiles for `m` cover: tiles hold 8, 16, 32, 64 or 128 of them.
fn covered(m: usize) -> usize {
    if m <= 128 { m.next_power_of_two().max(8) } else { m.next_multiple_of(128) }
}

/// Measuring them.
impl CudaDevice {
    /// Configurations of `weight`'s kernels among which the fastest for `m` rows should be, that of the cost model first. Empty
    /// where there is nothing to choose.
    pub fn candidates(&self, weight: &PackedWeight, m: usize) -> Vec<Choice> {
        let PackedBody::Cuda(packed) = &weight.body else { return Vec::new() };
        let p = packed.problem(false);
        let Some(family) = family(&p) else { return Vec::new() };
        let choice = |launch: Launch| Choice { family: family.into(), n: p.n, k: p.k, m, config: launch.config };
        let model = choice(choose(&p, m));
        let all = candidates(&p, m).into_iter().map(|config| choice(launch(&p, config, m)));
        let others: Vec<Choice> = all.filter(|choice| choice.config != model.config).collect();
        std::iter::once(model).chain(others).collect()
    }

    /// Makes `weight` run `choice.m` rows in that configuration, one of [`Self::candidates`], and no other number as any table says.
    pub fn fix(&self, weight: &mut PackedWeight, choice: &Choice) {
        if let PackedBody::Cuda(packed) = &mut weight.body {
            let table = Tuned { gpu: String::new(), choices: vec![choice.clone()] };
            packed.tuned = table.of(&packed.problem(false));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::problem;
    use super::super::pack::Layout;
    use super::super::pack_blocks::BlockShape;
    use super::super::pack_w4a8::NibbleShape;
    use super::*;
    use crate::device::{Activation, Epilogue, Output};

    /// An `[n, k]` weight in every layout that leaves a choice.
    fn problems(n: usize, k: usize) -> Vec<Problem> {
        let blocks16 = |bits| Layout::Blocks16(BlockShape { bits, groups: 1, low_scales: false, zeros: false });
        let layouts = [
            blocks16(4),
            blocks16(8),
            Layout::Blocks16(BlockShape { bits: 8, groups: 4, low_scales: true, zeros: true }),
            Layout::Blocks8,
            Layout::Blocks4(NibbleShape { bits: 4, one_group: false, factors: false, parts: 1, group_blocks: 1 }),
            Layout::Blocks4(NibbleShape {
                bits: 2,
                one_group: true,
                factors: false,
                parts: 1,
                group_blocks: k.div_ceil(128),
            }),
            Layout::Blocks4(NibbleShape {
                bits: 4,
                one_group: true,
                factors: true,
                parts: 1,
                group_blocks: k.div_ceil(128),
            }),
            Layout::Rows8,
            Layout::Fragments8Bit { bits: 4 },
            Layout::Fragments8Bit { bits: 8 },
            Layout::Fragments16Bit { bits: 4 },
            Layout::Fragments16Bit { bits: 8 },
            Layout::FragmentsCodebook,
        ];
        let of_one_type = layouts.map(|layout| problem(layout, n, k));
        let two_types =
            [Layout::Rows8, Layout::Blocks8].map(|layout| Problem { outliers: true, ..problem(layout, n, k) });
        of_one_type.into_iter().chain(two_types).collect()
    }

    /// A table that names a configuration which is no more, or a family, is stale: make it again.
    #[test]
    fn built_in_tables_hold_configurations_of_the_kernels() {
        for text in BUILT_IN {
            let table = Tuned::parse(text).expect("a table");
            assert_eq!(table, Tuned::built_in(&table.gpu), "two tables of one GPU");
            let mut resolved = 0;
            let mut shapes: Vec<(usize, usize)> = table.choices.iter().map(|choice| (choice.n, choice.k)).collect();
            shapes.sort_unstable();
            shapes.dedup();
            for (n, k) in shapes {
                let mut families: Vec<(&str, Problem)> = Vec::new();
                for p in problems(n, k) {
                    let family = family(&p).expect("has choices");
                    if !families.iter().any(|(known, _)| *known == family) {
                        families.push((family, p));
                    }
                }
                resolved += families.iter().map(|(_, p)| table.of(p).len()).sum::<usize>();
            }
            assert_eq!(resolved, table.choices.len(), "{}: a line names what is not there", table.gpu);
        }
        assert_eq!(Tuned::built_in("NVIDIA A1"), Tuned::new("NVIDIA A1"));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let text = "# made by hand\ngpu NVIDIA H200 # 132 multiprocessors\n\nb/sm90 8x16 4 w4 1x2 split 3\na 8x16 16,2,1 c\na 8x16 64 d e\n";
        let table = Tuned::parse(text).expect("parses");
        let written = "gpu NVIDIA H200\na 8x16 1,2,16 c\na 8x16 64 d e\nb/sm90 8x16 4 w4 1x2 split 3\n";
        assert_eq!(table.to_string(), written);
        assert_eq!(Tuned::parse(written).as_ref(), Ok(&table));
        let mut sum = Tuned::new("NVIDIA H200");
        sum.add(&table).expect("of the same GPU");
        sum.replace(&[Choice { config: "f".into(), ..table.choices[1].clone() }]);
        assert_eq!(sum.to_string(), written.replace("a 8x16 1,2,16 c", "a 8x16 1 c\na 8x16 2 f\na 8x16 16 c"));
        let of_another = Tuned::new("NVIDIA H100 80GB HBM3").add(&table).expect_err("another GPU").to_string();
        assert!(of_another.contains("`NVIDIA H200`") && of_another.contains("H100 80GB"), "{of_another}");
    }

    #[test]
    fn malformed_lines_are_named() {
        for (text, line) in [
            ("", "gpu NAME"),
            ("w8a8/sm90 8x16 1 c", "gpu NAME"),
            ("gpu G\nw8a8/sm90 8x16 1", "line 2: `w8a8/sm90 8x16 1`"),
            ("gpu G\n\n# c\na 8x16 1 c\na 8 1 c", "line 5"),
            ("gpu G\na 8x0 1 c", "line 2"),
            ("gpu G\na 8x16 1,,2 c", "line 2"),
            ("gpu G\na 8x16 0 c", "line 2"),
            ("gpu G\na 8x99999999999999999999 1 c", "line 2"),
            ("gpu G\na 8x16 1,2 c\na 8x16 2 d", "line 3: a second configuration of a 8x16 at 2 rows"),
        ] {
            let error = Tuned::parse(text).expect_err(text);
            assert!(error.contains(line), "{error}");
        }
    }

    #[test]
    fn rows_between_take_the_next_measured_with_the_same_tiles() {
        let at = |tile| Config { tile, splits: 1 };
        let choices = [(1, at(1)), (4, at(4)), (16, at(16)), (64, at(64)), (256, at(256)), (1024, at(1024))];
        for (m, expected) in [
            (1, Some(1)),
            (2, Some(4)),
            (5, None), // 8 rows were not measured, and sixteen are another tile
            (9, Some(16)),
            (17, None),
            (33, Some(64)),
            (65, None),
            (129, Some(256)),
            (257, None),
            (896, None),
            (897, Some(1024)),
            (1025, None),
        ] {
            assert_eq!(config(&choices, m), expected.map(at), "{m}");
        }
        assert_eq!(config(&[], 1), None);
    }

    #[test]
    fn stale_lines_are_left_out() {
        let text = "gpu G\nw4a16/sm90 4096x4096 1 w4 1x2\nw4a16/sm90 4096x4096 2 w4 64x8/8 split 2\nw4a16/sm90 4096x4096 4 w4 128x128\n";
        let found = Tuned::parse(text).expect("parses").of(&problems(4096, 4096)[0]);
        assert_eq!(found.iter().map(|(m, _)| *m).collect::<Vec<_>>(), [2], "and 4 rows do not take tiles of 128");
    }

    /// Each by a name of its own, one the model's, and all within what an H100 or H200 takes, also for fewer rows.
    #[test]
    fn candidates_are_launches_that_the_gpu_takes() {
        for (n, k) in [(1, 16), (64, 128), (520, 1040), (4096, 4096), (6144, 4096), (4096, 14336), (57344, 8192)] {
            for p in problems(n, k) {
                for m in [1, 2, 8, 9, 16, 17, 33, 64, 65, 128, 129, 257, 512, 1024, 4096] {
                    let all = candidates(&p, m);
                    let mut names: Vec<String> = all.iter().map(|&c| launch(&p, c, m).config).collect();
                    let what = format!("{:?} {n}x{k} m={m}: {names:?}", p.layout);
                    assert!(names.contains(&choose(&p, m).config), "{what}: no {}", choose(&p, m).config);
                    names.sort();
                    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{what}");
                    for (config, rows) in all.iter().flat_map(|&config| [(config, m), (config, m.div_ceil(2))]) {
                        let launch = launch(&p, config, rows);
                        let grid = launch.grid;
                        assert!(grid.shared_bytes <= 227 << 10 && grid.threads <= 640, "{launch:?}");
                        assert!(grid.blocks.iter().all(|&blocks| blocks > 0) && grid.blocks[1] < 65536, "{launch:?}");
                        assert!(grid.cluster <= 8 && grid.blocks[0].is_multiple_of(grid.cluster), "{launch:?}");
                        assert!(grid.cluster as usize <= k.div_ceil(128), "{launch:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn groups_of_outputs_restrict_the_candidates() {
        for (layout, activation, least) in [
            (Layout::Blocks8, Activation::None, 128),
            (Layout::Blocks8, Activation::SwiGlu, 256),
            (Layout::Rows8, Activation::None, 128),
            (Layout::Rows8, Activation::SwiGlu, 256),
        ] {
            let epilogue = Epilogue { activation, output: Output::Groups };
            let p = Problem { epilogue, ..problem(layout, 6144, 4096) };
            for m in [1, 64, 4096] {
                let names: Vec<String> = candidates(&p, m).iter().map(|&c| launch(&p, c, m).config).collect();
                let width = |name: &String| name.split(['x', ' ']).nth(1).and_then(|n| n.parse::<usize>().ok());
                let whole = |name: &String| width(name).is_some_and(|width| width.is_multiple_of(least));
                assert!(!names.is_empty() && names.iter().all(whole), "{names:?}");
                assert!(!names.iter().any(|name| name.contains("split")), "{names:?}");
            }
        }
    }
}

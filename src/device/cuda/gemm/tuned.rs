//! Tables of measured choices as configurations of a family, and which one holds for a number of rows.

use super::family::{GemmFamily, Problem};
use super::table::{Choice, Tuned};

/// What of `table` holds for a problem of `family`: rows, ascending, and configuration. Lines that name no configuration of it are
/// none of it, with a warning: kernels have changed since.
pub(super) fn resolve<F: GemmFamily>(table: &Tuned, family: &F, p: &Problem) -> Vec<(usize, F::Config)> {
    let Some(name) = family.table_name() else { return Vec::new() };
    let resolve = |choice: &Choice| {
        let mut all = family.configs(p, choice.m).into_iter();
        let found = all.find(|&config| family.config_name(config) == choice.config);
        if found.is_none() {
            let Choice { n, k, m, config, .. } = choice;
            tracing::warn!("tuned: {name} {n}x{k} at {m} rows: no kernel has the configuration `{config}`");
        }
        found.map(|config| (choice.m, config))
    };
    table.of(name, p.n, p.k).filter_map(resolve).collect()
}

/// The configuration for `m` rows, of what [`resolve`] gave: that of the next number of rows which was measured, where tiles are
/// the same for both.
pub(super) fn config<C: Copy>(choices: &[(usize, C)], m: usize) -> Option<C> {
    let &(measured, config) = choices.get(choices.partition_point(|&(measured, _)| measured < m))?;
    (covered(measured) == covered(m)).then_some(config)
}

/// Rows that the tiles for `m` cover: tiles hold 8, 16, 32, 64 or 128 of them.
fn covered(m: usize) -> usize {
    if m <= 128 { m.next_power_of_two().max(8) } else { m.next_multiple_of(128) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::gemm::family::h200_problem;
    use crate::device::cuda::gemm::table::BUILT_IN;
    use crate::device::cuda::gemm::w4a8::blocks::NibbleShape;
    use crate::device::cuda::gemm::w4a8::sm80::W4A8Sm80;
    use crate::device::cuda::gemm::w4a8::sm90::W4A8Sm90;
    use crate::device::cuda::gemm::w4a16::blocks::BlockShape;
    use crate::device::cuda::gemm::w4a16::codes::Codes;
    use crate::device::cuda::gemm::w4a16::scale_parts::ScaleParts;
    use crate::device::cuda::gemm::w4a16::sm80::W4A16Sm80;
    use crate::device::cuda::gemm::w4a16::sm90::W4A16Sm90;
    use crate::device::cuda::gemm::w8a8::sm80::W8A8Sm80;
    use crate::device::cuda::gemm::w8a8::sm90::W8A8Sm90;
    use crate::device::{Activation, Epilogue, Output};

    const BLOCK: BlockShape = BlockShape { codes: Codes::Uint4, groups: 1, low_scales: false, zero_points: false };
    const FULL_BLOCK: BlockShape = BlockShape { codes: Codes::Uint8, groups: 4, low_scales: true, zero_points: true };

    /// Shapes of 4-bit blocks, of `k` columns.
    fn nibbles(k: usize) -> [NibbleShape; 3] {
        let groups = NibbleShape { bits: 4, one_group: false, factors: false, groups: 1, group_blocks: 1 };
        let row = NibbleShape { one_group: true, group_blocks: k.div_ceil(128), ..groups };
        [groups, NibbleShape { bits: 2, ..row }, NibbleShape { factors: true, ..row }]
    }

    /// Runs the macro `$f` on a layout of every family that leaves a choice, `$k` being columns of the weight.
    macro_rules! for_each_family {
        ($k:expr, $f:ident) => {{
            let [nibbles, ternary, factored] = nibbles($k);
            for shape in [BLOCK, BlockShape { codes: Codes::Uint8, ..BLOCK }, FULL_BLOCK] {
                $f!(&W4A16Sm90 { shape });
            }
            for shape in [nibbles, ternary, factored] {
                $f!(&W4A8Sm90 { shape });
            }
            for outliers in [false, true] {
                $f!(&W8A8Sm90 { outliers });
                $f!(&W8A8Sm80 { outliers });
            }
            for bits in [4, 8] {
                $f!(&W4A8Sm80 { bits, asymmetric: false });
            }
            for codes in [Codes::Uint4, Codes::Uint8, Codes::Codebook4] {
                $f!(&W4A16Sm80 { codes, scale_parts: ScaleParts::One });
            }
        }};
    }

    /// A table that names a configuration which is no more, or a family, is stale: make it again.
    #[test]
    fn built_in_tables_hold_configurations_of_the_kernels() {
        /// Choices of `table` for weights `[n, k]` of a family that was not `seen` yet.
        fn count<F: GemmFamily>(
            family: &F,
            table: &Tuned,
            (n, k): (usize, usize),
            seen: &mut Vec<&'static str>,
        ) -> usize {
            let name = family.table_name().expect("has choices");
            if seen.contains(&name) {
                return 0;
            }
            seen.push(name);
            resolve(table, family, &h200_problem(n, k)).len()
        }
        for text in BUILT_IN {
            let table = Tuned::parse(text).expect("a table");
            assert_eq!(table, Tuned::built_in(&table.gpu), "two tables of one GPU");
            let mut shapes: Vec<(usize, usize)> = table.choices().iter().map(|choice| (choice.n, choice.k)).collect();
            shapes.sort_unstable();
            shapes.dedup();
            let mut resolved = 0;
            for (n, k) in shapes {
                let mut seen = Vec::new();
                macro_rules! add {
                    ($family:expr) => {
                        resolved += count($family, &table, (n, k), &mut seen)
                    };
                }
                let [nibbles, ternary, factored] = nibbles(k);
                add!(&W4A16Sm90 { shape: BLOCK });
                add!(&W4A16Sm90 { shape: BlockShape { codes: Codes::Uint8, ..BLOCK } });
                add!(&W4A8Sm90 { shape: nibbles });
                add!(&W4A8Sm90 { shape: ternary });
                add!(&W4A8Sm90 { shape: factored });
                add!(&W8A8Sm90 { outliers: false });
                add!(&W8A8Sm90 { outliers: true });
            }
            assert_eq!(resolved, table.choices().len(), "{}: a line names what is not there", table.gpu);
        }
        assert_eq!(Tuned::built_in("NVIDIA A1"), Tuned::new("NVIDIA A1"));
    }

    #[test]
    fn rows_between_take_the_next_measured_with_the_same_tiles() {
        let choices = [(1, 1), (4, 4), (16, 16), (64, 64), (256, 256), (1024, 1024)];
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
            assert_eq!(config(&choices, m), expected, "{m}");
        }
        assert_eq!(config::<usize>(&[], 1), None);
    }

    #[test]
    fn stale_lines_are_left_out() {
        let text = "gpu G\nw4a16/sm90 4096x4096 1 w4 1x2\nw4a16/sm90 4096x4096 2 w4 64x8/8 split 2\nw4a16/sm90 4096x4096 4 w4 128x128\n";
        let table = Tuned::parse(text).expect("parses");
        let found = resolve(&table, &W4A16Sm90 { shape: BLOCK }, &h200_problem(4096, 4096));
        assert_eq!(found.iter().map(|(m, _)| *m).collect::<Vec<_>>(), [2], "and 4 rows do not take tiles of 128");
    }

    /// Each by a name of its own, one the model's, and all within what an H100 or H200 takes, also for fewer rows.
    #[test]
    fn configurations_are_launches_that_the_gpu_takes() {
        fn check<F: GemmFamily>(family: &F, p: &Problem, m: usize) {
            let all = family.configs(p, m);
            let mut names: Vec<String> = all.iter().map(|&config| family.config_name(config)).collect();
            let what = format!("{family:?} {}x{} m={m}: {names:?}", p.n, p.k);
            let model = family.config_name(family.choose(p, m));
            assert!(names.contains(&model), "{what}: no {model}");
            names.sort();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{what}");
            for (config, rows) in all.iter().flat_map(|&config| [(config, m), (config, m.div_ceil(2))]) {
                let launch = family.launch(p, config, rows);
                let grid = launch.grid;
                assert!(grid.shared_bytes <= 227 << 10 && grid.threads <= 640, "{launch:?}");
                assert!(grid.blocks.iter().all(|&blocks| blocks > 0) && grid.blocks[1] < 65536, "{launch:?}");
                assert!(grid.cluster <= 8 && grid.blocks[0].is_multiple_of(grid.cluster), "{launch:?}");
                assert!(grid.cluster as usize <= p.k.div_ceil(128), "{launch:?}");
            }
        }
        for (n, k) in [(1, 16), (64, 128), (520, 1040), (4096, 4096), (6144, 4096), (4096, 14336), (57344, 8192)] {
            for m in [1, 2, 8, 9, 16, 17, 33, 64, 65, 128, 129, 257, 512, 1024, 4096] {
                macro_rules! check_it {
                    ($family:expr) => {
                        check($family, &h200_problem(n, k), m)
                    };
                }
                for_each_family!(k, check_it);
            }
        }
    }

    #[test]
    fn groups_of_outputs_restrict_the_configurations() {
        fn check<F: GemmFamily>(family: &F, activation: Activation, least: usize) {
            let epilogue = Epilogue { activation, output: Output::Groups };
            let p = Problem { epilogue, ..h200_problem(6144, 4096) };
            for m in [1, 64, 4096] {
                let names: Vec<String> =
                    family.configs(&p, m).into_iter().map(|config| family.config_name(config)).collect();
                let width = |name: &String| name.split(['x', ' ']).nth(1).and_then(|n| n.parse::<usize>().ok());
                let whole = |name: &String| width(name).is_some_and(|width| width.is_multiple_of(least));
                assert!(!names.is_empty() && names.iter().all(whole), "{names:?}");
                assert!(!names.iter().any(|name| name.contains("split")), "{names:?}");
            }
        }
        for (activation, least) in [(Activation::None, 128), (Activation::SwiGlu, 256)] {
            check(&W8A8Sm90 { outliers: false }, activation, least);
            check(&W8A8Sm80 { outliers: false }, activation, least);
        }
    }
}

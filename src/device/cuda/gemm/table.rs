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
//! Weights not in it, and rows between those in it, are the cost models' ([`super::family::GemmFamily::choose`]).

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};

/// The tables of this repository.
pub(super) const BUILT_IN: [&str; 1] = [include_str!("tuned/nvidia-h200.txt")];

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
    /// The configuration, as [`crate::device::PackedWeight::kernel`] names it after the kernel.
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
    pub(super) fn parse(text: &str) -> Result<Tuned, String> {
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

    /// The one line `choice`, of whatever GPU.
    pub(super) fn only(choice: &Choice) -> Tuned {
        Tuned { gpu: String::new(), choices: vec![choice.clone()] }
    }

    /// Choices for the weights `[n, k]` of a family, rows ascending.
    pub(super) fn of<'a>(&'a self, family: &'a str, n: usize, k: usize) -> impl Iterator<Item = &'a Choice> {
        self.choices.iter().filter(move |choice| (choice.family.as_str(), choice.n, choice.k) == (family, n, k))
    }

    /// All choices, in order.
    #[cfg(test)]
    pub(super) fn choices(&self) -> &[Choice] {
        &self.choices
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

#[cfg(test)]
mod tests {
    use super::*;

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
}

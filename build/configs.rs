//! `kernels/FAMILY/configs.h` as Rust: the lists of which the `.cu` files make kernels, as constants of the same numbers.
//!
//! A file holds comments, `#pragma once` and lists, in exactly this form; lists of one kind share its fields:
//! ```c
//! /* One sentence or more. */
//! #define FAMILY_KIND(X) /* rows, bool flag */ \
//!   X(8, 0)                                    \
//!   X(16, 1)
//!
//! #define FAMILY_OTHER(X) /* as FAMILY_KIND */ \
//!   X(8, 1)
//! ```
//! of which comes
//! ```
//! pub mod family {
//!     pub struct Kind { pub rows: usize, pub flag: bool }
//!     pub const KIND: [Kind; 2] = [Kind { rows: 8, flag: false }, Kind { rows: 16, flag: true }];
//!     pub const OTHER: [Kind; 1] = [Kind { rows: 8, flag: true }];
//! }
//! ```

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{fs, iter};

use anyhow::{Context, Result, bail, ensure};

/// Source of `configs.rs`: a module of each of `files`, named by its folder.
///
/// # Errors
/// Names file and line of the first that is not of the form.
pub(crate) fn generate(files: &[PathBuf]) -> Result<String> {
    let mut source = String::new();
    for file in files {
        let family = file.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        let family = family.context("folders of kernels have names in UTF-8")?;
        let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        source += &module(family, &text, &file.display().to_string())?;
    }
    Ok(source)
}

/// One list: what it is called in Rust, the kind whose fields it has, its lines.
struct List {
    doc: String,
    name: String,
    kind: String,
    rows: Vec<Vec<usize>>,
}

/// A field and whether it is a bool.
type Field = (String, bool);

fn module(family: &str, text: &str, file: &str) -> Result<String> {
    let mut kinds: Vec<(String, Vec<Field>)> = Vec::new();
    let mut lists: Vec<List> = Vec::new();
    let mut doc = String::new();
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let at = || format!("{file}:{}", index + 1);
        if line.is_empty() || line == "#pragma once" {
            doc.clear();
        } else if line.starts_with("/*") {
            doc = comment(line, &mut lines).with_context(at)?;
        } else if let Some(head) = line.strip_prefix("#define ") {
            let prefix = format!("{}_", family.to_uppercase());
            let (name, fields) = head_of(head, &prefix).with_context(at)?;
            let kind = match fields.strip_prefix("as ") {
                None => {
                    let fields = fields.split(", ").map(field).collect::<Result<_>>().with_context(at)?;
                    kinds.push((name.clone(), fields));
                    name.clone()
                }
                Some(other) => other.strip_prefix(&prefix).unwrap_or(other).to_owned(),
            };
            let known = kinds.iter().find(|(known, _)| *known == kind);
            let (_, fields) = known.with_context(|| format!("no list {prefix}{kind} above")).with_context(at)?;
            let is_new = lists.iter().all(|list| list.name != name);
            ensure!(is_new && !doc.is_empty(), "{}: a list of a new name under a comment is expected", at());
            let mut rows = Vec::new();
            let mut continues = true;
            while continues {
                let Some((index, line)) = lines.next() else { bail!("{file}: the last line continues") };
                continues = line.ends_with('\\');
                let row = row(line.trim_end_matches('\\').trim(), fields);
                rows.push(row.with_context(|| format!("{file}:{}", index + 1))?);
            }
            lists.push(List { doc: std::mem::take(&mut doc), name, kind, rows });
        } else {
            bail!("{}: a comment, `#pragma once` or a list is expected, not {line:?}", at());
        }
    }
    ensure!(!lists.is_empty(), "{file}: there is no list");
    Ok(source(family, &kinds, &lists))
}

/// The text of a comment that begins with `first` and ends with a line.
fn comment<'a>(first: &'a str, lines: &mut impl Iterator<Item = (usize, &'a str)>) -> Result<String> {
    let mut text = String::new();
    for line in iter::once(first).chain(iter::from_fn(|| lines.next().map(|(_, line)| line))) {
        text += line.trim_end_matches("*/").trim_start_matches("/*").trim_start_matches(" *").trim();
        if line.ends_with("*/") {
            return Ok(text);
        }
        text.push(' ');
    }
    bail!("this comment does not end with a line")
}

/// Name, without the family's prefix, and fields of `NAME(X) /* fields */ \`.
fn head_of(head: &str, prefix: &str) -> Result<(String, String)> {
    let parts = head.split_once("(X) /* ").and_then(|(name, rest)| {
        let fields = rest.strip_suffix('\\')?.trim_end().strip_suffix(" */")?;
        Some((name.strip_prefix(prefix)?, fields))
    });
    let (name, fields) = parts.with_context(|| format!("`#define {prefix}KIND(X) /* fields */ \\` is expected"))?;
    let is_upper = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    ensure!(name.starts_with(|c: char| c.is_ascii_uppercase()) && name.chars().all(is_upper), "{name:?} is no name");
    Ok((name.to_owned(), fields.to_owned()))
}

fn field(text: &str) -> Result<Field> {
    let name = text.strip_prefix("bool ").unwrap_or(text);
    let is_lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    ensure!(name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(is_lower), "{text:?} is no field");
    Ok((name.to_owned(), name != text))
}

/// The numbers of `X(1, 2)`, one for each field.
fn row(text: &str, fields: &[Field]) -> Result<Vec<usize>> {
    let inner = text.strip_prefix("X(").and_then(|rest| rest.strip_suffix(')'));
    let numbers: Option<Vec<usize>> = inner.and_then(|inner| inner.split(", ").map(|x| x.parse().ok()).collect());
    let fits = |numbers: &Vec<usize>| {
        let are_bools = fields.iter().zip(numbers).all(|((_, is_bool), &number)| !is_bool || number < 2);
        numbers.len() == fields.len() && are_bools
    };
    numbers.filter(fits).with_context(|| {
        let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
        format!("`X({})` in numbers is expected, bools as 0 or 1, not {text:?}", names.join(", "))
    })
}

/// `SM90_SPLIT_K` as `Sm90SplitK`.
fn camel_case(name: &str) -> String {
    let words = name.split('_').map(|word| {
        let (first, rest) = word.split_at(word.len().min(1));
        first.to_owned() + &rest.to_lowercase()
    });
    words.collect()
}

fn source(family: &str, kinds: &[(String, Vec<Field>)], lists: &[List]) -> String {
    let mut out = format!("/// Configurations of `{family}`.\npub mod {family} {{\n");
    let fields_of = |kind: &str| kinds.iter().find(|(name, _)| name == kind).map_or(&[][..], |(_, fields)| fields);
    // Writing to a string does not fail.
    for (name, fields) in kinds {
        let _ = writeln!(out, "    /// One of [`{name}`].");
        let _ =
            writeln!(out, "    #[derive(Debug, Clone, Copy, PartialEq, Eq)]\n    pub struct {} {{", camel_case(name));
        for (field, is_bool) in fields {
            let _ = writeln!(out, "        pub {field}: {},", if *is_bool { "bool" } else { "usize" });
        }
        out += "    }\n";
    }
    for List { doc, name, kind, rows } in lists {
        let kind_name = camel_case(kind);
        let _ = writeln!(out, "    /// {doc}\n    pub const {name}: [{kind_name}; {}] = [", rows.len());
        for row in rows {
            let value = |((field, is_bool), number): (&Field, &usize)| {
                if *is_bool { format!("{field}: {}", *number == 1) } else { format!("{field}: {number}") }
            };
            let values: Vec<String> = fields_of(kind).iter().zip(row).map(value).collect();
            let _ = writeln!(out, "        {kind_name} {{ {} }},", values.join(", "));
        }
        out += "    ];\n";
    }
    out + "}\n"
}

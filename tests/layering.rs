//! The shape of the source tree: modules of `src/` use only those before them, files import each other in no circle,
//! and stay small.

mod circles;

use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the crate, lowest first.
const ORDER: [&str; 11] =
    ["error", "dtype", "quant", "checkpoint", "device", "layers", "models", "engine", "text", "server", "cli"];
const MAX_LINES: usize = 600;

#[test]
fn modules_use_only_those_before_them() {
    let mut violations = Vec::new();
    for path in sources(Path::new("src")) {
        let text = fs::read_to_string(&path).unwrap();
        violations.extend(upward_uses(&path, &text).into_iter().map(|to| format!("{} uses {to}", path.display())));
    }
    assert!(violations.is_empty(), "upward use of a module (order: {ORDER:?}):\n{}", violations.join("\n"));
}

#[test]
fn every_module_has_its_place() {
    let lib = fs::read_to_string("src/lib.rs").unwrap();
    let declared: Vec<&str> = lib
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    let expected: Vec<&str> = ORDER.into_iter().filter(|module| declared.contains(module)).collect();
    assert_eq!(declared, expected, "src/lib.rs declares its modules in the order of tests/layering.rs, and no other");
}

#[test]
fn files_stay_small() {
    let long: Vec<String> = ["src", "kernels"]
        .iter()
        .flat_map(|dir| sources(Path::new(dir)))
        .filter_map(|path| {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            (lines > MAX_LINES).then(|| format!("{}: {lines} lines", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "files over {MAX_LINES} lines, to be split by idea:\n{}", long.join("\n"));
}

#[test]
fn a_planted_violation_is_caught() {
    let uses = |path: &str, text: &str| upward_uses(Path::new(path), text);
    assert_eq!(uses("src/device/cpu/ops.rs", "use crate::layers::Linear;"), ["layers"]);
    assert_eq!(uses("src/dtype.rs", "let x = crate::cli::run();"), ["cli"]);
    assert_eq!(
        uses("src/quant/mod.rs", "use crate::{\n    error::{Error, Result},\n    engine::Engine,\n};"),
        ["engine"]
    );
    assert_eq!(uses("src/text/mod.rs", "use super::{server, error};"), ["server"]);
    assert_eq!(uses("src/quant/gptq.rs", "use super::super::models::Model;"), ["models"]);
    assert_eq!(uses("src/error.rs", "pub use crate :: text::Tokenizer;"), ["text"]);
    assert_eq!(uses("src/error.rs", "fn f() { /* crate::x */ crate::text::g() }"), ["text"]);
}

#[test]
fn downward_uses_and_comments_are_fine() {
    let uses = |path: &str, text: &str| upward_uses(Path::new(path), text);
    assert!(uses("src/cli/run.rs", "use crate::{engine::Engine, text};").is_empty());
    assert!(uses("src/device/mod.rs", "use crate::device::cpu;\nuse crate::quant::{Scheme, text};").is_empty());
    assert!(uses("src/quant/mod.rs", "/// See [`crate::cli`].\n// crate::engine\n/* crate::models */").is_empty());
    assert!(uses("src/main.rs", "lowbit::cli::main()").is_empty());
}

/// Modules above its own that the file names through `crate::` or `super::`. `lib.rs` and `main.rs` may name any.
fn upward_uses(path: &Path, text: &str) -> Vec<String> {
    let rank = |module: &str| ORDER.iter().position(|known| *known == module);
    let own = path.strip_prefix("src").unwrap().components().next().unwrap();
    let Some(own) = rank(Path::new(&own).file_stem().unwrap().to_str().unwrap()) else { return Vec::new() };
    let code: String = without_comments(text).split_whitespace().collect();
    let mut found = Vec::new();
    for prefix in ["crate::", "super::"] {
        for (start, _) in code.match_indices(prefix) {
            let named = first_names(&code[start + prefix.len()..]);
            found.extend(named.into_iter().filter(|name| rank(name).is_some_and(|rank| rank > own)).map(str::to_owned));
        }
    }
    found
}

/// The names that a path can begin with: `a` of `a::b`, `a` and `d` of `{a::{b, c}, d}`.
fn first_names(path: &str) -> Vec<&str> {
    let name = |text: &'_ str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let Some(group) = path.strip_prefix('{') else { return vec![&path[..name(path)]] };
    let mut names = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            ',' if depth == 0 => {
                names.push(&group[start..start + name(&group[start..])]);
                start = at + 1;
            }
            '}' if depth == 0 => {
                names.push(&group[start..start + name(&group[start..])]);
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names
}

/// Drops `//` and `/* */` comments. (It would also cut a string with `//` in it, which hides no path worth finding.)
fn without_comments(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        code.push_str(&rest[..at]);
        let end = if rest[at..].starts_with("//") { "\n" } else { "*/" };
        rest = rest[at + 2..].split_once(end).map_or("", |(_, after)| after);
        code.push('\n');
    }
    code + rest
}

/// Files of a folder and those below it, sorted.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if ["rs", "cu", "cuh", "h"].iter().any(|kind| path.extension().is_some_and(|found| found == *kind)) {
            files.push(path);
        }
    }
    files.sort();
    files
}

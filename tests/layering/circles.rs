//! No files of `src/` import each other in a circle.
//!
//! **The rule.** File A imports file B where a path in A (in a `use`, or anywhere in its code) leads to B: to an item
//! that B defines, or to B as a module. A name that a module re-exports, or imports itself, leads to the file that
//! defines it, so that a detour through `mod.rs` hides nothing. The files of a circle have one smallest folder that
//! holds them all (the folder of `x/mod.rs`, and of `x.rs` beside `x/`, is `x`). The circle is allowed if it goes
//! through the `mod.rs` of that folder, which may use its children and lend them its types; every other one is an error.
//! Modules `#[cfg(test)]` are left out: a test may build what it tests with whatever it likes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::sources;

/// Circles that are still there, each by its files, or by a folder (`/` at its end) that they lie in. One that has
/// shrunk passes, one that is gone must be removed here, and nothing is ever added.
const KNOWN: &[&[&str]] = &[];

#[test]
fn no_circles_between_files() {
    let files = sources(Path::new("src")).into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "rs"));
    let texts: Vec<(String, String)> =
        files.map(|path| (path.to_str().unwrap().to_owned(), fs::read_to_string(&path).unwrap())).collect();
    let imports = Tree::new(texts.iter().map(|(path, text)| (path.as_str(), text.as_str()))).imports();
    let found = circles(&imports);
    let new: Vec<_> = found.iter().filter(|circle| !KNOWN.iter().any(|known| covers(known, circle))).collect();
    assert!(
        new.is_empty(),
        "files that import each other in a circle (each with what it imports of the others):\n{:#?}",
        new.into_iter().map(|circle| inside(circle, &imports)).collect::<Vec<_>>()
    );
    let gone: Vec<_> = KNOWN.iter().filter(|known| !found.iter().any(|circle| covers(known, circle))).collect();
    assert!(gone.is_empty(), "circles that are gone, to be removed from KNOWN:\n{gone:#?}");
}

/// True where all files of a circle are among the known ones, and its smallest folder is theirs.
fn covers(known: &[&str], circle: &BTreeSet<String>) -> bool {
    let among =
        |file: &String| known.iter().any(|known| file == known || known.ends_with('/') && file.starts_with(known));
    let files = || known.iter().map(|known| known.trim_end_matches('/'));
    let folder = match known {
        [folder] => folder.trim_end_matches('/'),
        _ => common(files()),
    };
    circle.iter().all(among) && common(circle.iter().map(String::as_str)) == folder
}

/// The folder that some files or folders have in common.
fn common<'a>(mut paths: impl Iterator<Item = &'a str> + Clone) -> &'a str {
    let first = paths.next().unwrap();
    let folders = first.match_indices('/').map(|(at, _)| &first[..at]);
    folders.rev().find(|folder| paths.clone().all(|path| path.starts_with(&format!("{folder}/")))).unwrap()
}

/// Each file of a circle with what it imports of the others.
fn inside<'a>(
    circle: &'a BTreeSet<String>,
    imports: &'a BTreeMap<String, BTreeSet<String>>,
) -> BTreeMap<&'a String, BTreeSet<&'a String>> {
    circle.iter().map(|file| (file, imports[file].intersection(circle).collect())).collect()
}

/// Files by path, each with its tokens, and what each module's names stand for.
struct Tree {
    /// Module path (`device::cpu`; the crate's root is empty) to its file.
    modules: BTreeMap<Vec<String>, String>,
    /// What a module's `use` declarations bind: name to absolute path.
    bindings: BTreeMap<Vec<String>, BTreeMap<String, Vec<String>>>,
    /// Every path in the code, absolute, with the file that it stands in.
    paths: Vec<(String, Vec<String>)>,
    /// Modules `#[cfg(test)]`, which may be files.
    tests: BTreeSet<Vec<String>>,
}

impl Tree {
    fn new<'a>(files: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Tree {
        let mut tree =
            Tree { modules: BTreeMap::new(), bindings: BTreeMap::new(), paths: Vec::new(), tests: BTreeSet::new() };
        tree.modules.extend(files.clone().map(|(path, _)| (module_of(path), path.to_owned())));
        for (path, text) in files {
            tree.read(path, &tokens(text));
        }
        tree
    }

    /// Notes the bindings and the paths of one file, inline modules included.
    fn read(&mut self, file: &str, tokens: &[String]) {
        let mut module = module_of(file);
        let mut inline = Vec::new(); // depths of braces at which inline modules began
        let (mut at, mut depth) = (0, 0);
        let token = |at: usize| tokens.get(at).map_or("", String::as_str);
        while at < tokens.len() {
            match token(at) {
                "#" if tokens[at..].starts_with(&["#", "[", "cfg", "(", "test", ")", "]"].map(str::to_owned)) => {
                    while token(at) == "#" {
                        at += 1 + tokens[at..].iter().position(|token| token == "]").unwrap();
                    }
                    if token(at) == "mod" {
                        self.tests.insert([&module[..], &[token(at + 1).to_owned()]].concat());
                        at = skip_item(tokens, at);
                    }
                    continue;
                }
                "{" => depth += 1,
                "}" => {
                    depth -= 1;
                    if inline.last() == Some(&depth) {
                        inline.pop();
                        module.pop();
                    }
                }
                "mod" if token(at + 2) == "{" => {
                    module.push(token(at + 1).to_owned());
                    self.modules.insert(module.clone(), file.to_owned());
                    inline.push(depth);
                    depth += 1;
                    at += 2;
                }
                "use" if token(at + 1) != "<" => {
                    let end = at + tokens[at..].iter().position(|token| token == ";").unwrap();
                    for (path, name) in use_tree(&tokens[at + 1..end]) {
                        let path = self.absolute(&module, path);
                        self.paths.push((file.to_owned(), path.clone()));
                        self.bindings.entry(module.clone()).or_default().insert(name, path);
                    }
                    at = end;
                }
                // Who may see an item (`pub(in crate::device)`) is no import.
                "in" if at > 0 && token(at - 1) == "(" && token(at + 2) == "::" => {
                    while token(at + 1) != ")" && is_path(token(at + 1)) {
                        at += 1;
                    }
                }
                first if token(at + 1) == "::" && at.checked_sub(1).is_none_or(|before| token(before) != "::") => {
                    let mut path = vec![first.to_owned()];
                    while token(at + 1) == "::" && is_name(token(at + 2)) {
                        path.push(token(at + 2).to_owned());
                        at += 2;
                    }
                    self.paths.push((file.to_owned(), self.absolute(&module, path)));
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// The path from the crate's root. A first name that is neither `crate`, `self` nor `super` is one of the module's
    /// own children or bindings, which `file_of` finds, or foreign, which it does not.
    fn absolute(&self, module: &[String], path: Vec<String>) -> Vec<String> {
        let mut base = module.to_vec();
        let mut names = path.into_iter().peekable();
        if names.next_if(|name| name == "crate").is_some() {
            base.clear();
        }
        while let Some(name) = names.next_if(|name| name == "self" || name == "super") {
            if name == "super" {
                base.pop();
            }
        }
        base.extend(names);
        base
    }

    /// The file that a path leads to: modules as far as they go, through what they re-export. `None` where its first
    /// name is not of this crate; `steps` bounds a chain of re-exports.
    fn file_of(&self, path: &[String], steps: usize) -> Option<&str> {
        let known = (0..=path.len()).rev().find(|length| self.modules.contains_key(&path[..*length]))?;
        let (module, rest) = path.split_at(known);
        let bound = rest.first().and_then(|name| self.bindings.get(module)?.get(name));
        if let (Some(target), true) = (bound, steps > 0) {
            let target: Vec<String> = target.iter().chain(&rest[1..]).cloned().collect();
            return self.file_of(&target, steps - 1);
        }
        self.modules.get(module).map(String::as_str)
    }

    /// File to the files that it imports. Names that a path begins with and that are no module, binding or item of
    /// another file (`Vec::new`, `std::fs`) lead to the file itself, and are dropped as such.
    fn imports(&self) -> BTreeMap<String, BTreeSet<String>> {
        let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (file, path) in self.paths.iter().filter(|(file, _)| !self.tests.contains(&module_of(file))) {
            let to = self.file_of(path, 8).filter(|to| to != file);
            imports.entry(file.clone()).or_default().extend(to.map(str::to_owned));
        }
        imports
    }
}

/// `src/device/cpu/mod.rs` is `device::cpu`, `src/dtype.rs` is `dtype`; `lib.rs` and `main.rs` are the root's.
fn module_of(file: &str) -> Vec<String> {
    let path = file.strip_prefix("src/").unwrap().strip_suffix(".rs").unwrap();
    let mut names: Vec<String> = path.split('/').map(str::to_owned).collect();
    match names.last().unwrap().as_str() {
        "mod" | "lib" => drop(names.pop()),
        "main" => names = vec!["main".to_owned()],
        _ => {}
    }
    names
}

/// The circles of a graph that the rule forbids, each by its files.
fn circles(imports: &BTreeMap<String, BTreeSet<String>>) -> Vec<BTreeSet<String>> {
    let files: BTreeSet<&String> = imports.iter().flat_map(|(from, to)| to.iter().chain([from])).collect();
    let folders: BTreeSet<Vec<String>> = files
        .iter()
        .flat_map(|file| {
            let module = module_of(file);
            (0..module.len()).map(move |length| module[..length].to_vec())
        })
        .collect();
    let mut found = Vec::new();
    for folder in folders {
        // What lies below the folder, without the folder's own file: what is still a circle does not go through it.
        let below = |file: &str| {
            let module = module_of(file);
            (module.len() > folder.len() && module.starts_with(&folder)).then(|| module[folder.len()].clone())
        };
        let mut left: BTreeSet<&String> = files.iter().copied().filter(|file| below(file).is_some()).collect();
        while let Some(first) = left.pop_first() {
            let all = |file: &str| left.contains(&file.to_owned()) || file == first;
            let to = reachable(first, |file| imports.get(file).into_iter().flatten().filter(|to| all(to)).collect());
            let from = reachable(first, |file| {
                imports.iter().filter(|(from, to)| all(from) && to.contains(file)).map(|(from, _)| from).collect()
            });
            let circle: BTreeSet<String> = to.intersection(&from).map(|file| (*file).clone()).collect();
            left.retain(|file| !circle.contains(*file));
            let entries: BTreeSet<_> = circle.iter().filter_map(|file| below(file)).collect();
            if entries.len() > 1 {
                found.push(circle);
            }
        }
    }
    found
}

/// Files to be reached from one, itself included.
fn reachable<'a>(first: &'a String, next: impl Fn(&str) -> Vec<&'a String>) -> BTreeSet<&'a String> {
    let mut seen = BTreeSet::from([first]);
    let mut waiting = vec![first];
    while let Some(file) = waiting.pop() {
        waiting.extend(next(file).into_iter().filter(|file| seen.insert(file)));
    }
    seen
}

/// Names, `::` and single characters of punctuation; comments, strings, characters and lifetimes are dropped.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let mut length = c.len_utf8();
        if is_name(&rest[..length]) {
            length = rest.find(|c: char| !is_name(c.encode_utf8(&mut [0; 4]))).unwrap_or(rest.len());
            tokens.push(rest[..length].to_owned());
        } else if rest.starts_with("//") {
            length = rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            length = rest.find("*/").map_or(rest.len(), |at| at + 2);
        } else if rest.starts_with("::") {
            length = 2;
            tokens.push("::".to_owned());
        } else if c == '"' {
            let hashes = tokens.iter().rev().take_while(|token| *token == "#").count();
            let prefix = tokens.iter().rev().nth(hashes);
            let raw = prefix.is_some_and(|prefix| prefix == "r" || prefix == "br");
            length = string_length(rest, raw.then_some(hashes));
        } else if c == '\'' {
            length = char_length(rest);
        } else if !c.is_whitespace() {
            tokens.push(c.to_string());
        }
        rest = &rest[length..];
    }
    tokens
}

/// Bytes of the string literal that `rest` begins with; a raw one ends in a quotation mark and its hashes.
fn string_length(rest: &str, raw: Option<usize>) -> usize {
    if let Some(hashes) = raw {
        let end = format!("\"{}", "#".repeat(hashes));
        return rest[1..].find(&end).map_or(rest.len(), |at| 1 + at + end.len());
    }
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            '"' if !escaped => return at + 1,
            _ => escaped = c == '\\' && !escaped,
        }
    }
    rest.len()
}

/// Bytes of the character literal that `rest` begins with; 1 where it is a lifetime.
fn char_length(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => rest[3..].find('\'').map_or(rest.len(), |at| 3 + at + 1),
        _ => chars.next().filter(|(_, c)| *c == '\'').map_or(1, |(at, _)| at + 1),
    }
}

fn is_name(token: &str) -> bool {
    !token.is_empty() && token.chars().all(|c| c.is_alphanumeric() || c == '_')
}

/// A part of a path.
fn is_path(token: &str) -> bool {
    token == "::" || is_name(token)
}

/// The index after an item that ends in `;` or in its braces.
fn skip_item(tokens: &[String], mut at: usize) -> usize {
    let mut depth = 0;
    while at < tokens.len() {
        match tokens[at].as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 && matches!(tokens[at - 1].as_str(), "}" | ";") {
            break;
        }
    }
    at
}

/// Paths of a `use` declaration, each with the name that it binds: `a::{self, b as c}` gives `a` as `a` and `a::b` as
/// `c`; what `*` binds is not known, so that it leads to the module alone.
fn use_tree(tokens: &[String]) -> Vec<(Vec<String>, String)> {
    let mut prefixes: Vec<Vec<String>> = vec![Vec::new()];
    let mut path: Vec<String> = Vec::new();
    let mut found: Vec<(Vec<String>, String)> = Vec::new();
    let mut end = |path: &mut Vec<String>, from: &[String], alias: &mut Option<String>| {
        if path.len() > from.len() {
            let mut path = path.clone();
            if path.len() > 1 {
                path.pop_if(|name| name == "self" || name == "*");
            }
            let name = alias.take().unwrap_or_else(|| path.last().unwrap().clone());
            found.push((path, name));
        }
        *path = from.to_vec();
    };
    let mut alias = None;
    let mut at = 0;
    while at < tokens.len() {
        match tokens[at].as_str() {
            "::" => {}
            "{" => prefixes.push(path.clone()),
            "}" => {
                let inner = prefixes.pop().unwrap();
                end(&mut path, &inner, &mut alias);
                path = prefixes.last().unwrap().clone();
            }
            "," => end(&mut path, prefixes.last().unwrap(), &mut alias),
            "as" => {
                alias = Some(tokens[at + 1].clone());
                at += 1;
            }
            name => path.push(name.to_owned()),
        }
        at += 1;
    }
    end(&mut path, &[], &mut alias);
    found
}

/// Circles of a tree of files that a test plants.
fn planted(files: &[(&str, &str)]) -> Vec<Vec<String>> {
    circles(&Tree::new(files.iter().copied()).imports())
        .into_iter()
        .map(|circle| circle.into_iter().collect())
        .collect()
}

#[test]
fn planted_circles_are_found() {
    let pair = vec![vec!["src/m/a.rs".to_owned(), "src/m/b.rs".to_owned()]];
    let m = ("src/m/mod.rs", "mod a;\nmod b;\npub use b::{inner::Deep, B as Other};");
    assert_eq!(planted(&[m, ("src/m/a.rs", "use super::b::B;"), ("src/m/b.rs", "use crate::m::a::A;")]), pair);
    // Through code, not a `use`; through a name that the parent re-exports; through a module bound by a `use`.
    assert_eq!(planted(&[m, ("src/m/a.rs", "fn f() { super::b::g(); }"), ("src/m/b.rs", "use super::a;")]), pair);
    assert_eq!(planted(&[m, ("src/m/a.rs", "use super::Other;"), ("src/m/b.rs", "use super::{a::{self}};")]), pair);
    assert_eq!(
        planted(&[m, ("src/m/a.rs", "use crate::m;\nfn f() { m::b::g() }"), ("src/m/b.rs", "use super::a::*;")]),
        pair
    );
    assert_eq!(
        planted(&[
            m,
            ("src/m/a.rs", "mod t { fn f() { super::super::b::g() } }"),
            ("src/m/b.rs", "fn f() -> super::a::A {}")
        ]),
        pair
    );
    // Three files in a row.
    let three = [("src/a.rs", "use crate::b::B;"), ("src/b.rs", "use crate::c::C;"), ("src/c.rs", "use crate::a::A;")];
    assert_eq!(planted(&three), [["src/a.rs", "src/b.rs", "src/c.rs"]]);
    // Out of a folder and back into it, through its mod.rs, which is not the mod.rs of both.
    let folder = [
        ("src/v/x.rs", "use super::y::run;"),
        ("src/v/y/mod.rs", "mod z;\nuse z::Z;"),
        ("src/v/y/z.rs", "use crate::v::x::X;"),
    ];
    assert_eq!(planted(&folder), [["src/v/x.rs", "src/v/y/mod.rs", "src/v/y/z.rs"]]);
    // A file beside the folder of the same name is that folder's mod.rs, and no more than that.
    let beside = [
        ("src/h.rs", "mod f;\nuse f::F;"),
        ("src/h/f.rs", "use super::H;\nuse crate::g::G;"),
        ("src/g.rs", "use crate::h::H;"),
    ];
    assert_eq!(planted(&beside), [["src/g.rs", "src/h.rs", "src/h/f.rs"]]);
}

#[test]
fn a_mod_and_its_children_may_use_each_other() {
    let none: [Vec<String>; 0] = [];
    let m = ("src/m/mod.rs", "mod a;\nmod b;\npub use b::B;\nfn f() { a::f(b::g()) }\nstruct M;");
    assert_eq!(planted(&[m, ("src/m/a.rs", "use super::{M, b::B};"), ("src/m/b.rs", "use crate::m::M;")]), none);
    // A grandchild, too; and two folders below one that use different files of each other's parent.
    let deep = [
        m,
        ("src/m/a.rs", ""),
        ("src/m/b/mod.rs", "mod c;\nuse super::M;"),
        ("src/m/b/c.rs", "use super::super::M;\nuse super::B;"),
    ];
    assert_eq!(planted(&deep), none);
    // Who may see an item is no import.
    let visible = [m, ("src/m/a.rs", "pub(in crate::m::b) fn f() {}"), ("src/m/b.rs", "use super::a::f;")];
    assert_eq!(planted(&visible), none);
    // Comments, strings, characters, tests and foreign crates name nothing.
    let a = "// crate::m::b\n/* super::b */\nconst S: &str = \"super::b \\\" super::b\";\nconst R: &str = r#\"\"super::b\"#;\n\
             const Q: char = '\"';\nfn f<'a>(x: &'a str) {}\n#[cfg(test)]\nmod tests {\n    use super::super::b::B;\n}\nuse std::b;";
    assert_eq!(planted(&[m, ("src/m/a.rs", a), ("src/m/b.rs", "use super::a::A;")]), none);
}

#[test]
fn a_known_circle_may_shrink_but_not_grow_or_move() {
    let circle = |files: &[&str]| files.iter().map(|file| (*file).to_owned()).collect::<BTreeSet<_>>();
    let known = ["src/m/a.rs", "src/m/b.rs", "src/m/c/"];
    assert!(covers(&known, &circle(&["src/m/a.rs", "src/m/b.rs"])));
    assert!(covers(&known, &circle(&["src/m/a.rs", "src/m/c/x.rs", "src/m/c/mod.rs"])));
    assert!(!covers(&known, &circle(&["src/m/a.rs", "src/m/d.rs"])));
    assert!(!covers(&known, &circle(&["src/m/c/x.rs", "src/m/c/y.rs"])));
    assert!(covers(&["src/m/c/"], &circle(&["src/m/c/x.rs", "src/m/c/y.rs"])));
    assert!(!covers(&["src/m/c/"], &circle(&["src/m/c/x.rs", "src/m/cc.rs"])));
}

//! `--config FILE`: flags of a verb as TOML, which the command line and the environment override.

use std::ffi::OsString;
use std::path::Path;

use clap::{Arg, Command};
use toml::Value;

use crate::error::{Error, Result};

use super::read_text;

/// A command line with the flags of the file that its `--config` names put before its end, but for those that it gives itself or the
/// environment does. `command` is the verb's parser.
///
/// # Errors
/// `Io`, or `Input` naming the file and the key that is no flag.
pub(super) fn expanded(mut args: Vec<OsString>, command: &Command) -> Result<Vec<OsString>> {
    let Some(path) = path_of(&args) else { return Ok(args) };
    let path = Path::new(&path);
    let wrong = |reason: String| Error::input("--config", format!("{}: {reason}", path.display()));
    let table: toml::Table = read_text(path)?.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
    // What follows `--` is positional.
    let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    let mut added: Vec<OsString> = Vec::new();
    for (key, value) in table {
        let name = key.replace('_', "-");
        if name == "model" {
            let Value::String(model) = value else { return Err(wrong("model: expected a text".into())) };
            if !has_positional(&args[..end], command) {
                added.push(model.into());
            }
            continue;
        }
        let flag = command.get_arguments().find(|arg| arg.get_long() == Some(&name) && name != "config");
        let Some(flag) = flag else {
            return Err(wrong(format!("`{key}` is no flag of `lowbit {}`", command.get_name())));
        };
        if is_given(&args[..end], flag) {
            continue;
        }
        for text in
            texts(value).ok_or_else(|| wrong(format!("`{key}`: expected a text, a number, true or a list of these")))?
        {
            match (flag.get_action().takes_values(), text.as_str()) {
                (true, text) => added.push(format!("--{name}={text}").into()),
                (false, "true") => added.push(format!("--{name}").into()),
                (false, "false") => {}
                (false, _) => return Err(wrong(format!("`{key}`: expected true or false"))),
            }
        }
    }
    args.splice(end..end, added);
    Ok(args)
}

fn path_of(args: &[OsString]) -> Option<OsString> {
    let mut args = args.iter().take_while(|arg| *arg != "--");
    while let Some(arg) = args.next() {
        let text = arg.to_str().unwrap_or_default();
        if text == "--config" {
            return args.next().cloned();
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(path.into());
        }
    }
    std::env::var_os("LOWBIT_CONFIG")
}

fn is_given(args: &[OsString], flag: &Arg) -> bool {
    let long = format!("--{}", flag.get_long().unwrap_or_default());
    let short = flag.get_short().map(|short| format!("-{short}"));
    let names = |arg: &str| {
        arg == long || arg.strip_prefix(&long).is_some_and(|rest| rest.starts_with('='))
            // `-t4` too.
            || short.as_ref().is_some_and(|short| arg.starts_with(short.as_str()) && !arg.starts_with("--"))
    };
    args.iter().any(|arg| arg.to_str().is_some_and(names))
        || flag.get_env().is_some_and(|name| std::env::var_os(name).is_some())
}

/// Whether a positional stands among the arguments: one that neither is a flag nor follows a flag that takes a value.
fn has_positional(args: &[OsString], command: &Command) -> bool {
    let takes_value = |arg: &str| {
        let of = |flag: &&Arg| {
            flag.get_long().is_some_and(|long| arg == format!("--{long}"))
                || flag.get_short().is_some_and(|short| arg == format!("-{short}"))
        };
        command.get_arguments().find(of).is_some_and(|flag| flag.get_action().takes_values())
    };
    // The program and the verb come first.
    let mut args =
        args.iter().skip_while(|arg| *arg != command.get_name()).skip(1).map(|arg| arg.to_str().unwrap_or_default());
    while let Some(arg) = args.next() {
        if !arg.starts_with('-') {
            return true;
        }
        if takes_value(arg) {
            args.next();
        }
    }
    false
}

fn texts(value: Value) -> Option<Vec<String>> {
    let one = |value: Value| match value {
        Value::String(text) => Some(text),
        Value::Integer(n) => Some(n.to_string()),
        Value::Float(x) => Some(x.to_string()),
        Value::Boolean(b) => Some(b.to_string()),
        _ => None,
    };
    match value {
        Value::Array(values) => values.into_iter().map(one).collect(),
        value => one(value).map(|text| vec![text]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ArgAction;

    fn expand(file: &str, args: &[&str]) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.toml");
        std::fs::write(&path, file).unwrap();
        let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::Set);
        let command = Command::new("serve")
            .arg(Arg::new("model"))
            .args(["config", "port", "api-key"].map(flag))
            .arg(flag("threads").short('t'))
            .arg(Arg::new("web").long("no-web").action(ArgAction::SetTrue));
        let config = format!("--config={}", path.display());
        let all = ["lowbit", "serve", &config].iter().chain(args).map(OsString::from).collect();
        let expanded = expanded(all, &command)?;
        Ok(expanded.into_iter().skip(3).map(|arg| arg.into_string().unwrap()).collect())
    }

    #[test]
    fn the_command_line_wins() {
        let file = "model = \"m\"\nport = 9000\nthreads = 2\napi_key = [\"a\", \"b\"]\nno-web = true\n";
        let got = expand(file, &[]).unwrap();
        // In the order of the keys' names.
        assert_eq!(got, ["--api-key=a", "--api-key=b", "m", "--no-web", "--port=9000", "--threads=2"]);
        let got = expand(file, &["other", "--port", "1", "-t4"]).unwrap();
        assert_eq!(got, ["other", "--port", "1", "-t4", "--api-key=a", "--api-key=b", "--no-web"]);
        assert_eq!(expand(file, &["--port", "1", "x"]).unwrap()[..3], ["--port", "1", "x"]);
        assert_eq!(expand("no-web = false", &["x"]).unwrap(), ["x"]);
    }

    #[test]
    fn errors_name_file_and_key() {
        for (file, named) in [
            ("prot = 1", "prot"),
            ("port = {}", "port"),
            ("port", "serve.toml"),
            ("no-web = 3", "no-web"),
            ("config = \"x\"", "config"),
        ] {
            let error = expand(file, &[]).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("serve.toml"), "{error}");
        }
    }
}

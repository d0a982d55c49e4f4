//! Methods of Python's strings and lists as templates call them: those that minijinja-contrib lacks, and those in which it
//! differs (places are counted in characters, an empty string is no digit).

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Widest field that a method fills: far more than any template's, and no way to fill memory.
const MAX_WIDTH: usize = 1 << 16;

/// Calls a method of a value.
pub(super) fn method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let found = match value.as_str() {
        Some(text) => of_string(text, method, args)?,
        None if value.kind() == ValueKind::Seq => of_list(value, method, args)?,
        None if value.kind() == ValueKind::Map => of_map(value, method, args)?,
        None => None,
    };
    match found {
        Some(found) => Ok(found),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn failed(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// `None` for a method that is left to minijinja-contrib.
fn of_string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found: Value = match method {
        "removeprefix" | "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            let rest = if method == "removeprefix" { text.strip_prefix(part) } else { text.strip_suffix(part) };
            rest.unwrap_or(text).into()
        }
        "split" | "rsplit" => {
            let (separator, most) = split_args(args)?;
            split(text, separator.as_deref(), most, method == "rsplit")?
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(failed(format!("{method}: the separator is empty")));
            }
            let parts = match method {
                "partition" => text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b]),
                _ => text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b]),
            };
            parts.into_iter().collect()
        }
        "splitlines" => {
            let kwargs: (Rest<Value>, Kwargs) = from_args(args)?;
            let keep = kwargs.0.first().cloned().or(kwargs.1.get::<Option<Value>>("keepends")?);
            kwargs.1.assert_all_used()?;
            lines(text, keep.is_some_and(|keep| keep.is_true())).into_iter().collect()
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let (window, skipped) = window(text, start, end);
            let at = if method.starts_with('r') { window.rfind(part) } else { window.find(part) };
            match at {
                Some(at) => (skipped + window[..at].chars().count()).into(),
                None if method.ends_with("index") => return Err(failed(format!("{method}: substring not found"))),
                None => (-1).into(),
            }
        }
        "count" => {
            let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let (window, _) = window(text, start, end);
            if part.is_empty() { (window.chars().count() + 1).into() } else { window.matches(part).count().into() }
        }
        "center" | "ljust" | "rjust" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            let pad = padding(text, width)?;
            let left = match method {
                "ljust" => 0,
                "rjust" => pad,
                // Where it cannot be even, CPython puts the odd one right of texts of even width.
                _ => pad / 2 + (pad & 1 & usize::try_from(width).unwrap_or(0)),
            };
            let fill = |n: usize| fill.unwrap_or(' ').to_string().repeat(n);
            format!("{}{text}{}", fill(left), fill(pad - left)).into()
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(padding(text, width)?)).into()
        }
        "expandtabs" => {
            let (size,): (Option<i64>,) = from_args(args)?;
            expand_tabs(text, usize::try_from(size.unwrap_or(8)).unwrap_or(0).min(MAX_WIDTH)).into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            text.chars().map(swap).collect::<String>().into()
        }
        "casefold" => {
            let () = from_args(args)?;
            text.to_lowercase().replace('ß', "ss").into()
        }
        "title" => {
            let () = from_args(args)?;
            title(text, char::is_alphabetic).into()
        }
        "isdigit" | "isdecimal" | "isnumeric" => all(text, args, char::is_numeric)?,
        "isalpha" => all(text, args, char::is_alphabetic)?,
        "isalnum" => all(text, args, char::is_alphanumeric)?,
        "isspace" => all(text, args, char::is_whitespace)?,
        "islower" | "isupper" => {
            let () = from_args(args)?;
            let (lower, upper) = (text.chars().any(char::is_lowercase), text.chars().any(char::is_uppercase));
            (lower != upper && lower == (method == "islower")).into()
        }
        "istitle" => {
            let () = from_args(args)?;
            (text.chars().any(char::is_alphabetic) && title(text, char::is_alphabetic) == text).into()
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

fn of_list(list: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let (item,): (Value,) = from_args(args)?;
            let at = list.try_iter()?.position(|x| x == item);
            at.map(|at| Some(at.into())).ok_or_else(|| failed("index: the value is not in the list"))
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(list.clone()))
        }
        "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "sort" | "reverse" => {
            Err(failed(format!("`{method}` would change a list, which templates may not do; use `+` and `set`")))
        }
        _ => Ok(None),
    }
}

/// A key of that name goes before a method, as it does in a template.
fn of_map(map: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(map.clone()))
        }
        "update" | "pop" | "popitem" | "setdefault" | "clear" => Err(failed(format!(
            "`{method}` would change a mapping, which templates may not do; use `namespace` or `dict`"
        ))),
        _ => Ok(None),
    }
}

/// Whether there is a character, and all pass.
fn all(text: &str, args: &[Value], passes: impl Fn(char) -> bool) -> Result<Value, Error> {
    let () = from_args(args)?;
    Ok((!text.is_empty() && text.chars().all(passes)).into())
}

/// Words with a first letter of their own, where words begin after a character that is none of `inner`.
pub(super) fn title(text: &str, inner: impl Fn(char) -> bool) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = inner(c);
    }
    out
}

/// Characters that a field of `width` needs beside `text`.
fn padding(text: &str, width: i64) -> Result<usize, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    match width <= MAX_WIDTH {
        true => Ok(width.saturating_sub(text.chars().count())),
        false => Err(failed(format!("a field of {width} characters; expected at most {MAX_WIDTH}"))),
    }
}

/// `text[start:end]` with the number of characters before it.
fn window(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    if (start, end) == (None, None) {
        return (text, 0);
    }
    let len = text.chars().count() as i64;
    let place = |at: i64| (if at < 0 { at + len } else { at }).clamp(0, len) as usize;
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(len)));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (&text[byte(start)..byte(end.max(start))], start)
}

/// Separator and the most splits, -1 for all.
fn split_args(args: &[Value]) -> Result<(Option<String>, i64), Error> {
    let (positional, kwargs): (Rest<Value>, Kwargs) = from_args(args)?;
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let named = kwargs.get::<Option<Value>>(name)?;
        Ok(positional.get(at).cloned().or(named).filter(|value| !value.is_none()))
    };
    let separator = match argument(0, "sep")? {
        Some(value) => Some(value.as_str().ok_or_else(|| failed("split: expected a string as separator"))?.to_owned()),
        None => None,
    };
    let most = argument(1, "maxsplit")?.map_or(Ok(-1), i64::try_from)?;
    kwargs.assert_all_used()?;
    Ok((separator, most))
}

fn split(text: &str, separator: Option<&str>, most: i64, from_end: bool) -> Result<Value, Error> {
    let parts = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
    let Some(separator) = separator else {
        // Blanks go where a split looks: what is left in the end keeps those on its other side.
        let mut rest = if from_end { text.trim_end() } else { text.trim_start() };
        let mut found = Vec::new();
        while !rest.is_empty() {
            let cut = if from_end { rest.rfind(char::is_whitespace) } else { rest.find(char::is_whitespace) };
            match cut.filter(|_| found.len() + 1 < parts) {
                Some(at) if from_end => {
                    found.push(rest[at..].trim_start());
                    rest = rest[..at].trim_end();
                }
                Some(at) => {
                    found.push(&rest[..at]);
                    rest = rest[at..].trim_start();
                }
                None => {
                    found.push(rest);
                    rest = "";
                }
            }
        }
        if from_end {
            found.reverse();
        }
        return Ok(found.into_iter().collect());
    };
    if separator.is_empty() {
        return Err(failed("split: the separator is empty"));
    }
    if from_end {
        let mut found: Vec<&str> = text.rsplitn(parts, separator).collect();
        found.reverse();
        return Ok(found.into_iter().collect());
    }
    Ok(text.splitn(parts, separator).collect())
}

/// Lines by Python's ends of lines.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end =
        |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut found = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(is_end) else {
            found.push(rest);
            break;
        };
        let end = match rest[at..].starts_with("\r\n") {
            true => at + 2,
            false => at + rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        found.push(if keep { &rest[..end] } else { &rest[..at] });
        rest = &rest[end..];
    }
    found
}

fn expand_tabs(text: &str, size: usize) -> String {
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let blanks = size - column % size;
                out.push_str(&" ".repeat(blanks));
                column += blanks;
            }
            '\t' => {}
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
}

//! Filters, functions and tests of Jinja2 3.1 that minijinja lacks, or whose arguments it takes otherwise.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, FormatStyle, State, Value};

use super::jinja_strings;
use super::jinja_values::{python_repr, python_str};

/// Adds all of them.
pub(super) fn add_to(env: &mut Environment<'static>) {
    env.add_filter("center", |state: &State, value: &Value, width: Option<i64>| {
        jinja_strings::method(state, &python_str(value).into(), "center", &[width.unwrap_or(80).into()])
    });
    env.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    env.add_filter("float", |value: &Value, args: Rest<Value>| number(value, args, 0.0.into(), float));
    env.add_filter("format", format);
    env.add_filter("forceescape", minijinja::filters::escape);
    env.add_filter("int", |value: &Value, args: Rest<Value>| number(value, args, 0.into(), int));
    env.add_filter("join", join);
    env.add_filter("round", round);
    env.add_filter("striptags", striptags);
    env.add_filter("sum", sum);
    env.add_filter("title", |value: &Value| {
        jinja_strings::title(&python_str(value), |c| !(c.is_whitespace() || matches!(c, '-' | '(' | '{' | '[' | '<')))
    });
    env.add_filter("truncate", truncate);
    env.add_filter("wordcount", |value: &Value| {
        python_str(value).split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count()
    });
    env.add_function("cycler", |items: Rest<Value>| match items.is_empty() {
        true => Err(failed("cycler: expected one item or more")),
        false => Ok(Value::from_object(Cycler { items: items.0, at: AtomicUsize::new(0) })),
    });
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// `cycler`: items in turn.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = self.at.load(Ordering::Relaxed) % self.items.len();
        (key.as_str() == Some("current")).then(|| self.items[at].clone())
    }

    fn call_method(self: &Arc<Self>, _: &State<'_, '_>, method: &str, args: &[Value]) -> Result<Value, Error> {
        let () = from_args(args)?;
        match method {
            "next" => Ok(self.items[self.at.fetch_add(1, Ordering::Relaxed) % self.items.len()].clone()),
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// printf's way of formatting; `%r`, which minijinja lacks, is `%s` of what Python's `repr` gives.
fn format(text: &str, args: Rest<Value>) -> Result<String, Error> {
    let mut args = args.0;
    let (mut spec, mut next) = (String::with_capacity(text.len()), 0);
    let mut rest = text;
    while let Some(start) = rest.find('%') {
        let (before, conversion) = rest.split_at(start);
        let end = conversion.char_indices().skip(1).find(|(_, c)| c.is_alphabetic() || matches!(c, '%' | '('));
        let Some((end, kind)) = end else { break };
        spec.push_str(before);
        spec.push_str(&conversion[..end]);
        if kind == 'r'
            && let Some(arg) = args.get_mut(next)
        {
            *arg = python_repr(arg).into();
        }
        spec.push(if kind == 'r' { 's' } else { kind });
        next += usize::from(kind != '%');
        rest = &conversion[end + kind.len_utf8()..];
    }
    minijinja::format_filter(FormatStyle::Printf, &(spec + rest), &args)
}

fn failed(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Arguments by place or by name, as Python takes them.
struct Args {
    positional: Rest<Value>,
    kwargs: Kwargs,
}

impl Args {
    fn new(args: &[Value]) -> Result<Args, Error> {
        let (positional, kwargs) = from_args(args)?;
        Ok(Args { positional, kwargs })
    }

    fn get(&self, at: usize, name: &str) -> Result<Option<Value>, Error> {
        let named = self.kwargs.get::<Option<Value>>(name)?;
        Ok(self.positional.get(at).cloned().or(named).filter(|value| !value.is_none() && !value.is_undefined()))
    }

    /// Fails when an argument is there that nobody asked for; `most` may be given by place.
    fn finish(&self, most: usize) -> Result<(), Error> {
        if self.positional.len() > most {
            return Err(failed(format!("{} arguments; expected at most {most}", self.positional.len())));
        }
        self.kwargs.assert_all_used()
    }
}

/// `a.b.0` of a value.
fn attribute(value: &Value, path: &Value) -> Result<Value, Error> {
    let Some(path) = path.as_str() else { return value.get_item(path) };
    path.split('.').try_fold(value.clone(), |value, part| match part.parse::<usize>() {
        Ok(index) => value.get_item(&index.into()),
        Err(_) => value.get_attr(part),
    })
}

/// `int` and `float`: what `parse` makes of the value, else the default.
fn number(
    value: &Value,
    args: Rest<Value>,
    otherwise: Value,
    parse: fn(&Value, i64) -> Option<Value>,
) -> Result<Value, Error> {
    let args = Args::new(&args)?;
    let (default, base) = (args.get(0, "default")?, args.get(1, "base")?);
    args.finish(2)?;
    let base = base.map_or(Ok(10), i64::try_from)?;
    Ok(parse(value, base).unwrap_or_else(|| default.unwrap_or(otherwise)))
}

fn float(value: &Value, _: i64) -> Option<Value> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => text.trim().replace('_', "").parse::<f64>().ok().map(Value::from),
        (None, ValueKind::Bool) => Some(f64::from(u8::from(value.is_true())).into()),
        _ => f64::try_from(value.clone()).ok().map(Value::from),
    }
}

fn int(value: &Value, base: i64) -> Option<Value> {
    let Some(text) = value.as_str() else {
        return match value.kind() {
            ValueKind::Number if value.is_integer() => Some(value.clone()),
            _ => Some((f64::try_from(float(value, 10)?).ok()?.trunc() as i64).into()),
        };
    };
    let text = text.trim().replace('_', "").to_lowercase();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefix = match base {
        2 => "0b",
        8 => "0o",
        16 => "0x",
        _ => "",
    };
    let radix = u32::try_from(base).ok().filter(|base| (2..=36).contains(base))?;
    match i64::from_str_radix(digits.strip_prefix(prefix).unwrap_or(digits), radix) {
        Ok(n) => Some((sign * n).into()),
        Err(_) => Some((f64::try_from(float(&text.into(), 10)?).ok()?.trunc() as i64).into()),
    }
}

/// `join(d='', attribute=None)`.
fn join(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let args = Args::new(&args)?;
    let (between, path) = (args.get(0, "d")?.map_or_else(String::new, |d| python_str(&d)), args.get(1, "attribute")?);
    args.finish(2)?;
    let mut out = String::new();
    for (i, item) in value.try_iter()?.enumerate() {
        if i > 0 {
            out.push_str(&between);
        }
        let item = path.as_ref().map_or(Ok(item.clone()), |path| attribute(&item, path))?;
        out.push_str(&python_str(&item));
    }
    Ok(out.into())
}

/// `round(precision=0, method='common')`: to the nearest, ties to even as Python has it.
fn round(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let args = Args::new(&args)?;
    let (precision, method) = (args.get(0, "precision")?, args.get(1, "method")?);
    args.finish(2)?;
    let precision = precision.map_or(Ok(0), i32::try_from)?.clamp(-300, 300);
    if value.is_integer() && precision >= 0 && method.is_none() {
        return Ok(value.clone());
    }
    let x = float(value, 10).and_then(|x| f64::try_from(x).ok()).ok_or_else(|| failed("round: expected a number"))?;
    let scale = 10f64.powi(precision);
    let rounded = match method.as_ref().map_or(Some("common"), |method| method.as_str()) {
        Some("common") if precision >= 0 => format!("{x:.*}", precision as usize).parse().unwrap_or(x),
        Some("common") => (x * scale).round_ties_even() / scale,
        Some("ceil") => (x * scale).ceil() / scale,
        Some("floor") => (x * scale).floor() / scale,
        _ => return Err(failed("round: expected the method `common`, `ceil` or `floor`")),
    };
    Ok(rounded.into())
}

/// Takes tags and comments out and makes blanks single.
fn striptags(value: &Value) -> String {
    let mut out = String::new();
    let text = python_str(value);
    let mut rest = text.as_str();
    while let Some(start) = rest.find('<') {
        let (before, tag) = rest.split_at(start);
        let end =
            if tag.starts_with("<!--") { tag.find("-->").map(|at| at + 3) } else { tag.find('>').map(|at| at + 1) };
        let Some(end) = end else { break };
        out.push_str(before);
        rest = &tag[end..];
    }
    out.push_str(rest);
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `sum(attribute=None, start=0)` of numbers or of lists.
fn sum(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let args = Args::new(&args)?;
    let (path, start) = (args.get(0, "attribute")?, args.get(1, "start")?.unwrap_or(0.into()));
    args.finish(2)?;
    let items = value.try_iter()?.map(|item| path.as_ref().map_or(Ok(item.clone()), |path| attribute(&item, path)));
    if start.kind() == ValueKind::Seq {
        let mut all: Vec<Value> = start.try_iter()?.collect();
        for item in items {
            all.extend(item?.try_iter()?);
        }
        return Ok(all.into());
    }
    items.into_iter().try_fold(start, |sum, item| add(&sum, &item?))
}

fn add(a: &Value, b: &Value) -> Result<Value, Error> {
    let bad = || failed(format!("sum: cannot add {} and {}", a.kind(), b.kind()));
    let is_number = |x: &Value| matches!(x.kind(), ValueKind::Number | ValueKind::Bool);
    if !is_number(a) || !is_number(b) {
        return Err(bad());
    }
    let whole = |x: &Value| {
        if x.is_integer() || x.kind() == ValueKind::Bool {
            int(x, 10).and_then(|x| i64::try_from(x).ok())
        } else {
            None
        }
    };
    if let (Some(a), Some(b)) = (whole(a), whole(b)) {
        return a.checked_add(b).map(Value::from).ok_or_else(|| failed("sum: a number beyond 64 bits"));
    }
    let float = |x: &Value| float(x, 10).and_then(|x| f64::try_from(x).ok());
    Ok((float(a).ok_or_else(bad)? + float(b).ok_or_else(bad)?).into())
}

/// `truncate(length=255, killwords=False, end='...', leeway=5)`.
fn truncate(value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let args = Args::new(&args)?;
    let length = args.get(0, "length")?.map_or(Ok(255), usize::try_from)?;
    let killwords = args.get(1, "killwords")?.is_some_and(|kill| kill.is_true());
    let end = args.get(2, "end")?.map_or_else(|| "...".to_owned(), |end| python_str(&end));
    let leeway = args.get(3, "leeway")?.map_or(Ok(5), usize::try_from)?;
    args.finish(4)?;
    let text = python_str(value);
    let ending = end.chars().count();
    if length < ending {
        return Err(failed(format!("truncate: expected a length of {ending} or more, got {length}")));
    }
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let cut: String = text.chars().take(length - ending).collect();
    let kept = if killwords { &cut } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(words, _)| words) };
    Ok(format!("{kept}{end}").into())
}

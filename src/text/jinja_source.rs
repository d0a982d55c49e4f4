//! Template source that minijinja cannot read, in words that it has: `{% generation %}`, and `%` after a string.

/// `source` as minijinja reads it.
pub(super) fn as_minijinja(source: &str) -> String {
    with_percent_filters(&without_generation_tags(source))
}

/// `{% generation %}` marks what the assistant wrote, for training; here it only groups.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let word = tag[..end].trim_start_matches(['{', '%', '-', '+']).trim_end_matches(['}', '%', '-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag[..end].replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag[..end].replacen("endgeneration", "endif", 1)),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out + rest
}

/// `'...' % values` as the filter that does the same: minijinja has `%` for numbers alone. Only where a string stands written
/// out before it is it known to be no number's.
fn with_percent_filters(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = ["{{", "{%", "{#"].iter().filter_map(|open| rest.find(open)).min() {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = match &tag[..2] {
            "{{" => find_outside_strings(tag, "}}"),
            "{%" => find_outside_strings(tag, "%}"),
            _ => tag.find("#}"),
        };
        // What is not closed is the parser's to tell.
        let end = end.map_or(tag.len(), |end| end + 2);
        if tag.starts_with("{#") {
            out.push_str(&tag[..end])
        } else {
            rewrite_percent(&tag[..end], &mut out)
        }
        rest = &tag[end..];
    }
    out + rest
}

fn rewrite_percent(code: &str, out: &mut String) {
    let mut rest = code;
    while !rest.is_empty() {
        let string = string_length(rest);
        let (token, after) = rest.split_at(string.unwrap_or_else(|| first_length(rest)));
        out.push_str(token);
        rest = after;
        let operator = rest.trim_start().strip_prefix('%').filter(|after| string.is_some() && !after.starts_with('}'));
        if let Some(right) = operator.map(str::trim_start) {
            let (operand, after) = right.split_at(operand_length(right));
            // A tuple written out is several values, anything else is one.
            let tuple = operand.strip_prefix('(').filter(|_| bracket_length(operand) == operand.len());
            out.push_str("|format(");
            rewrite_percent(tuple.and_then(|inner| inner.strip_suffix(')')).unwrap_or(operand), out);
            out.push(')');
            rest = after;
        }
    }
}

/// Where `what` stands behind the two characters that open a tag, outside of strings.
fn find_outside_strings(tag: &str, what: &str) -> Option<usize> {
    let mut at = 2;
    while at < tag.len() {
        let here = &tag[at..];
        if here.starts_with(what) {
            return Some(at);
        }
        at += string_length(here).unwrap_or_else(|| first_length(here));
    }
    None
}

/// Bytes of the first character.
fn first_length(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

/// Bytes of the string literal that `text` begins with.
fn string_length(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// Bytes of an operand: a name, number, string or bracket, and what follows it of `.name`, `[...]`, `(...)` and filters.
fn operand_length(text: &str) -> usize {
    let blanks = |at: usize| text.len() - text[at..].trim_start().len();
    let word =
        |at: usize| at + text[at..].find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len() - at);
    let mut end = match string_length(text) {
        Some(length) => length,
        None if text.starts_with(['(', '[', '{']) => bracket_length(text),
        None => word(usize::from(text.starts_with('-'))),
    };
    loop {
        let next = blanks(end);
        let here = &text[next..];
        end = match here.chars().next() {
            Some('.') => word(next + 1),
            Some('[' | '(') => next + bracket_length(here),
            Some('|') => word(blanks(next + 1)),
            _ => return end,
        };
    }
}

/// Bytes up to the bracket that closes the first, and all of it where none does.
fn bracket_length(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let here = &text[at..];
        match here.chars().next() {
            Some('(' | '[' | '{') => depth += 1,
            Some(')' | ']' | '}') => depth -= 1,
            _ => {}
        }
        at += string_length(here).unwrap_or_else(|| first_length(here));
        if depth == 0 {
            break;
        }
    }
    at
}

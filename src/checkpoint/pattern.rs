//! Module patterns of quantization configs: Python regular expressions with the semantics of `re.match`.

use fancy_regex::{Regex, RegexBuilder};

/// A compiled pattern, anchored at the start of the name.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    source: String,
    regex: Regex,
}

impl Pattern {
    /// Compiles `source`. Size and backtracking are bounded, so a hostile pattern ends in an error, not in a hang.
    pub(super) fn new(source: &str) -> Result<Pattern, String> {
        if source.len() > 4096 {
            return Err(format!("a regular expression of {} bytes; expected at most 4096", source.len()));
        }
        let regex = RegexBuilder::new(&format!("^(?:{source})"))
            .backtrack_limit(100_000)
            .delegate_size_limit(1 << 20)
            .build()
            .map_err(|e| format!("`{source}` is not a regular expression: {e}"))?;
        Ok(Pattern { source: source.to_owned(), regex })
    }

    /// Whether `name` matches from its start.
    pub(super) fn matches(&self, name: &str) -> Result<bool, String> {
        self.regex.is_match(name).map_err(|e| format!("pattern `{}` on `{name}`: {e}", self.source))
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

//! Fixed strings in text that comes a character at a time.

/// Finds the first of some fixed strings, none of which is another's beginning, and holds back what may be the start of one.
#[derive(Debug)]
pub(super) struct Markers {
    list: Vec<&'static str>,
    held: String,
    skips_space: bool,
}

impl Markers {
    pub(super) fn new(list: impl IntoIterator<Item = &'static str>) -> Markers {
        Markers { list: list.into_iter().collect(), held: String::new(), skips_space: false }
    }

    /// The same, but blanks and line ends that come first are dropped: a format's own, not content.
    pub(super) fn skipping_space(mut self) -> Markers {
        self.skips_space = true;
        self
    }

    /// Takes a character. What is now known to be no part of a marker is added to `text`; a marker that is complete is
    /// returned by its place in the list.
    pub(super) fn push(&mut self, c: char, text: &mut String) -> Option<usize> {
        if self.skips_space && c.is_whitespace() {
            return None;
        }
        self.skips_space = false;
        self.held.push(c);
        let mut rest = self.held.as_str();
        while !rest.is_empty() && !self.list.iter().any(|marker| marker.starts_with(rest)) {
            let mut chars = rest.chars();
            text.extend(chars.next());
            rest = chars.as_str();
        }
        let found = self.list.iter().position(|marker| *marker == rest);
        let released = self.held.len() - if found.is_some() { 0 } else { rest.len() };
        self.held.drain(..released);
        found
    }

    /// What is held back: the start of a marker that did not come to its end.
    pub(super) fn take_held(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

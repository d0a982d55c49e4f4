//! Stop strings over streamed text.

use crate::error::{Error, Result};

/// Most stop strings of one request.
const MAX_STRINGS: usize = 64;
/// Longest stop string, in bytes.
const MAX_BYTES: usize = 1024;

/// Finds the first stop string in text that arrives in chunks.
///
/// The match that ends first wins, of those the longest: the result does not depend on where chunks end. Text that
/// may be the start of a stop string is held back until the next chunk decides. Every byte costs O(1) amortized for
/// each stop string (Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977).
#[derive(Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    include: bool,
    held: String,
    /// The stop string that was found.
    found: Option<String>,
}

#[derive(Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// For each prefix length, the length of its longest proper border.
    border: Vec<usize>,
    matched: usize,
}

impl StopStrings {
    /// A matcher for one sequence; `include` keeps the stop string in the text.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty or very long string, or too many of them.
    pub fn new(strings: &[String], include: bool) -> Result<StopStrings> {
        if strings.len() > MAX_STRINGS {
            return Err(Error::input("stop", format!("expected at most {MAX_STRINGS} strings, got {}", strings.len())));
        }
        if let Some(s) = strings.iter().find(|s| s.is_empty() || s.len() > MAX_BYTES) {
            return Err(Error::input("stop", format!("expected strings of 1 to {MAX_BYTES} bytes, got {}", s.len())));
        }
        let patterns = strings.iter().map(|s| Pattern::new(s.as_bytes())).collect();
        Ok(StopStrings { patterns, include, held: String::new(), found: None })
    }

    /// Whether a stop string was found; nothing is emitted from then on.
    pub fn found(&self) -> bool {
        self.found.is_some()
    }

    /// The stop string that was found.
    pub fn matched(&self) -> Option<&str> {
        self.found.as_deref()
    }

    /// Takes a chunk and returns the text that is now safe to emit. Once a stop string is complete
    /// ([`StopStrings::found`]) that is the rest up to it, and what follows it is dropped.
    pub fn push(&mut self, chunk: &str) -> String {
        if self.found() {
            return String::new();
        }
        let start = self.held.len();
        self.held.push_str(chunk);
        for end in start + 1..=self.held.len() {
            let byte = self.held.as_bytes()[end - 1];
            let longest = self.patterns.iter_mut().filter_map(|p| p.step(byte).then_some(p.bytes.len())).max();
            if let Some(len) = longest {
                self.found = Some(self.held[end - len..end].to_owned());
                self.held.truncate(if self.include { end } else { end - len });
                return std::mem::take(&mut self.held);
            }
        }
        // A held tail equals the start of a stop string, so it begins at a character.
        let held = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - held);
        std::mem::replace(&mut self.held, tail)
    }

    /// The text still held back, at the end of the sequence.
    pub fn finish(&mut self) -> String {
        self.patterns.iter_mut().for_each(|p| p.matched = 0);
        std::mem::take(&mut self.held)
    }
}

impl Pattern {
    fn new(bytes: &[u8]) -> Pattern {
        let mut border = vec![0; bytes.len() + 1];
        let mut k = 0;
        for i in 1..bytes.len() {
            while k > 0 && bytes[k] != bytes[i] {
                k = border[k];
            }
            k += usize::from(bytes[k] == bytes[i]);
            border[i + 1] = k;
        }
        Pattern { bytes: bytes.to_vec(), border, matched: 0 }
    }

    /// Takes one byte; true when it completes the pattern.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.border[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

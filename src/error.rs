//! The crate's one error type, its variants chosen by who must act.
//!
//! Every message says what was wrong, where (file, tensor, field, flag), what was expected, and where it
//! helps what to do about it. The binary maps variants to exit codes ([`Error::exit_code`]).

use std::path::{Path, PathBuf};

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

const NOT_FINITE_ADVICE: &str =
    "The checkpoint is damaged, or activations exceed the range of f16, where bf16 has that of f32";

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory concerned.
        path: PathBuf,
        /// The system's own error.
        #[source]
        source: std::io::Error,
    },

    /// A file of a model directory does not hold what its format demands. Replace or re-download it.
    #[error("{}{}: {reason}", file.display(), tensor.as_ref().map(|t| format!(": tensor `{t}`")).unwrap_or_default())]
    Checkpoint {
        /// File at fault.
        file: PathBuf,
        /// Tensor at fault, when one is.
        tensor: Option<String>,
        /// What is wrong with it and what was expected.
        reason: String,
    },

    /// A field of a JSON configuration file is missing, malformed, out of range or not understood.
    #[error("{}: field `{field}`: {reason}", file.display())]
    Config {
        /// File at fault.
        file: PathBuf,
        /// Path of the field, dots between levels.
        field: String,
        /// What is wrong with it and what was expected.
        reason: String,
    },

    /// Well-formed input that asks for something this build cannot do.
    #[error("not supported: {what}. {advice}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What is supported instead, or what to do.
        advice: String,
    },

    /// An operation got tensors whose shapes or dtypes do not fit. A bug of the caller.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// Operation name, the same in Rust and CUDA.
        op: &'static str,
        /// What the operation takes.
        expected: String,
        /// What it was given.
        got: String,
    },

    /// The memory plan does not fit. Found before anything is allocated.
    #[error("out of memory: {what} needs {needed_bytes} bytes, {free_bytes} are free. {advice}")]
    OutOfMemory {
        /// Which part of the plan.
        what: String,
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes that are free.
        free_bytes: u64,
        /// Flag or change that makes it fit.
        advice: String,
        /// Fewer or shorter sequences would take less: flags for these are advice too.
        grows_with_sequences: bool,
    },

    /// A model computed what is no number: its weights are damaged, or activations left the range of their type.
    #[error("{what}: {got}, expected finite numbers. {NOT_FINITE_ADVICE}")]
    NotFinite {
        /// What was computed.
        what: String,
        /// What it came to.
        got: String,
    },

    /// The CUDA driver or a kernel failed.
    #[error("CUDA: {op}: {reason}")]
    Cuda {
        /// Operation enqueued last.
        op: String,
        /// The driver's message and, where known, the way out.
        reason: String,
    },

    /// The engine takes no requests, or could not finish those it had: it was told to drain, or its device failed.
    #[error("engine: {reason}")]
    Engine {
        /// Why.
        reason: String,
    },

    /// A tokenizer or chat template cannot be loaded or applied.
    #[error("{what}: {reason}")]
    Text {
        /// File, or the part of text processing.
        what: String,
        /// What is wrong.
        reason: String,
    },

    /// A model could not be fetched from the hub.
    #[error("hub: {model}: {reason}")]
    Hub {
        /// Model id as the user gave it.
        model: String,
        /// What the hub answered and what to do.
        reason: String,
    },

    /// A server to be measured cannot be reached, or refuses.
    #[error("server {url}: {reason}")]
    Server {
        /// Address that was asked.
        url: String,
        /// What it answered, or why it did not, and what to do.
        reason: String,
    },

    /// A request or command-line value out of its range.
    #[error("{what}: {reason}")]
    Input {
        /// Name of the flag or field.
        what: String,
        /// What is wrong with it and what was expected.
        reason: String,
    },

    /// A check that was asked for (`verify`) did not pass.
    #[error("verification failed: {0}")]
    Verification(String),
}

impl Error {
    /// Process exit code of the binary for this error (docs/architecture.md lists them).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Input { .. } => 2,
            Error::Io { .. } => 3,
            Error::Checkpoint { .. } | Error::Config { .. } | Error::Text { .. } => 4,
            Error::Unsupported { .. } => 5,
            Error::OutOfMemory { .. } => 6,
            Error::Cuda { .. } | Error::Engine { .. } | Error::Shape { .. } | Error::NotFinite { .. } => 7,
            Error::Hub { .. } | Error::Server { .. } => 8,
            Error::Verification(_) => 9,
        }
    }

    /// An [`Error::Io`] at `path`; made for `map_err(Error::io(path))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// An [`Error::Checkpoint`] about a whole file.
    pub fn file(file: impl AsRef<Path>, reason: impl Into<String>) -> Error {
        Error::Checkpoint { file: file.as_ref().to_path_buf(), tensor: None, reason: reason.into() }
    }

    /// An [`Error::Checkpoint`] about one tensor of a file.
    pub fn tensor(file: impl AsRef<Path>, tensor: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Checkpoint { file: file.as_ref().to_path_buf(), tensor: Some(tensor.into()), reason: reason.into() }
    }

    /// An [`Error::Config`].
    pub fn config(file: impl AsRef<Path>, field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Config { file: file.as_ref().to_path_buf(), field: field.into(), reason: reason.into() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>, advice: impl Into<String>) -> Error {
        Error::Unsupported { what: what.into(), advice: advice.into() }
    }

    /// The same error, an [`Error::OutOfMemory`] with the flags that its caller has for fewer or shorter sequences.
    pub fn with_memory_advice(mut self, flags: &str) -> Error {
        if let Error::OutOfMemory { advice, grows_with_sequences: true, .. } = &mut self
            && !flags.is_empty()
        {
            *advice = format!("{advice}: {flags}");
        }
        self
    }

    /// An [`Error::NotFinite`].
    pub fn not_finite(what: impl Into<String>, got: impl std::fmt::Display) -> Error {
        Error::NotFinite { what: what.into(), got: got.to_string() }
    }

    /// An [`Error::Input`].
    pub fn input(what: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Input { what: what.into(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_advised_where_memory_is_what_is_missing() {
        let full = |grows_with_sequences| Error::OutOfMemory {
            what: "the model".into(),
            needed_bytes: 2,
            free_bytes: 1,
            advice: "Use less".into(),
            grows_with_sequences,
        };
        let plain = "out of memory: the model needs 2 bytes, 1 are free. Use less";
        assert_eq!(full(true).with_memory_advice("lower --batch").to_string(), format!("{plain}: lower --batch"));
        assert_eq!(full(true).with_memory_advice("").to_string(), plain);
        assert_eq!(full(false).with_memory_advice("lower --batch").to_string(), plain, "weights alone");
        let other = Error::input("--batch", "too many");
        assert_eq!(other.with_memory_advice("lower --batch").to_string(), "--batch: too many");
    }
}

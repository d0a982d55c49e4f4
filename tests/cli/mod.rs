//! The built binary as a user runs it: exit codes, stdout, stderr.

mod bench_serve;
mod chat;
mod errors;
mod eval;
mod faults;
mod generate;
mod qat;
mod quantize;
mod quantize_faults;
mod quantize_formats;
mod quantize_rules;
mod tools;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const DEMO: &str = "assets/books-6m-gptq";

/// What a run left behind.
pub struct Run {
    pub code: Option<i32>,
    stdout: String,
    pub stderr: String,
}

impl Run {
    /// The JSON object on stdout of a run that succeeded.
    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// The binary: beside the tests where both were carried to another machine, else where cargo built it.
pub fn binary() -> PathBuf {
    let beside = std::env::current_exe().expect("a path").with_file_name("lowbit");
    if beside.is_file() { beside } else { env!("CARGO_BIN_EXE_lowbit").into() }
}

/// The binary with `args` and no settings from this environment.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(args).env_remove("RUST_LOG").env("HF_HUB_OFFLINE", "1");
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LOWBIT_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `command` to its end with `stdin` as its input.
fn finish(mut command: Command, stdin: &[u8]) -> Run {
    let mut child = command.spawn().expect("the binary starts");
    // A child that fails early closes its end: what it wrote then is the result.
    let _ = child.stdin.take().expect("a pipe").write_all(stdin);
    let output = child.wait_with_output().expect("the binary ends");
    let run = Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    };
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    run
}

pub fn lowbit(args: &[&str]) -> Run {
    finish(command(args), b"")
}

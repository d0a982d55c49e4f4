//! The `lowbit` binary: everything is in the library's `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lowbit::cli::run()
}

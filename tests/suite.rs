//! The integration tests, all in one binary: it links once, and is carried to a GPU host as one file.
//!
//! Each module is one area, in the order of `src/`. Tests that need a GPU sit in a module named `cuda` and are marked
//! `#[ignore = "needs a CUDA device"]`, so that a run without one reports them as ignored; `suite --ignored cuda` runs
//! them. The working directory is the project's root, or a copy of `assets/` and `tests/` on a GPU host: paths to files
//! are relative to it.

#![allow(clippy::unwrap_used)] // here and in clippy.toml: a test's panic is its report
#![allow(unreachable_pub)] // what test modules share is `pub`

mod checkpoint;
mod cli;
mod common;
mod hub;
mod kernel_configs;
mod layering;
mod engine;
mod golden;
mod models;
mod ops;
mod quant;
mod sampling;
mod server;
mod text;

//! `lowbit`: a quantized LLM inference runtime. docs/architecture.md follows one token through this crate.
//!
//! Modules in order; each may use only those before it.

pub mod error;
pub mod dtype;
pub mod quant;
pub mod checkpoint;
pub mod device;
pub mod layers;
pub mod models;
pub mod engine;
pub mod text;
pub mod server;
pub mod cli;

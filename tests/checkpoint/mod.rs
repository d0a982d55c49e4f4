//! Model directories: configuration, shards, and every quantized format.

mod arbitrary;
mod build;
mod config;
mod contradictions;
mod foreign;
mod fixtures;
mod formats;
mod head;
mod hostile;
mod hostile_bitnet;
mod hostile_bnb;
mod hostile_fp8;
mod hostile_quant;
mod tool_fields;
mod written;

//! Model directories: configuration, shards, and every quantized format.

mod fixtures;
mod formats;

//! How many sequences of which length an engine holds at once: from flags, and from the memory that is there.

use crate::device::{Device, Target};
use crate::error::{Error, Result};
use crate::layers::KvCache;
use crate::models::Limits;

use super::options::parse_number;
use super::source::Source;

/// Sequences at once where nobody says: on a GPU, where more of them cost little, and on a CPU.
const SEQS_ON_GPU: usize = 256;
const SEQS_ON_CPU: usize = 64;
/// KV cache on a CPU where nobody says: other programs run there too.
const KV_ON_CPU: u64 = 4 << 30;

/// How much memory to use, and for what.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Memory")]
pub(super) struct MemoryArgs {
    /// Longest sequence, prompt and output together; without it what the model was made for.
    #[arg(long, env = "LOWBIT_MAX_MODEL_LEN", value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1 << 24))]
    max_model_len: Option<u32>,

    /// Sequences that are computed at once; without it 256 on a GPU, 64 on a CPU.
    #[arg(long, env = "LOWBIT_MAX_NUM_SEQS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_num_seqs: Option<u32>,

    /// Most tokens of one forward pass: longer prompts are computed in chunks of that.
    #[arg(long, env = "LOWBIT_MAX_NUM_BATCHED_TOKENS", value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_num_batched_tokens: u32,

    /// Part of the memory that may be used: of the GPU's, of what is free on a CPU.
    #[arg(long, env = "LOWBIT_GPU_MEMORY_UTILIZATION", value_name = "X", default_value_t = 0.9, value_parser = parse_part)]
    gpu_memory_utilization: f64,

    /// Memory for keys and values, as 8G or 512M; without it what --gpu-memory-utilization leaves, 4G at most on a CPU.
    #[arg(long, env = "LOWBIT_KV_CACHE_MEMORY_BYTES", value_name = "BYTES", value_parser = parse_bytes)]
    kv_cache_memory_bytes: Option<u64>,
}

/// A part of something.
pub(super) fn parse_part(text: &str) -> Result<f64, String> {
    parse_number(text, "a number above 0, at most 1", |x| *x > 0.0 && *x <= 1.0)
}

/// A number of bytes, with a binary unit or without.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let upper = text.trim().to_ascii_uppercase();
    let bare = upper.trim_end_matches("IB").trim_end_matches('B');
    let (digits, shift) = match bare.chars().last() {
        Some('K') => (&bare[..bare.len() - 1], 10),
        Some('M') => (&bare[..bare.len() - 1], 20),
        Some('G') => (&bare[..bare.len() - 1], 30),
        Some('T') => (&bare[..bare.len() - 1], 40),
        _ => (bare, 0),
    };
    let value: f64 = parse_number(digits.trim(), "bytes, as 8G or 512M", |x| *x > 0.0 && *x < 1e9)
        .or_else(|_| parse_number(text, "bytes, as 8G or 512M", |x: &f64| shift == 0 && *x > 0.0 && *x < 1e15))
        .map_err(|_| format!("`{text}`: expected bytes, as 8G or 512M"))?;
    Ok((value * (1u64 << shift) as f64) as u64)
}

impl MemoryArgs {
    /// The limits of an engine for `source` on `device`, its KV cache as large as memory allows and sequences can use.
    ///
    /// # Errors
    /// `OutOfMemory` where not even one sequence of the longest fits.
    pub(super) fn limits(&self, source: &Source, device: &Device) -> Result<Limits> {
        let is_cpu = matches!(device, Device::Cpu(_));
        let positions = source.config().max_position_embeddings;
        let len = self.max_model_len.map_or(positions, |len| len as usize);
        if len > positions {
            tracing::warn!("--max-model-len {len} is more than the {positions} tokens the model was made for");
        }
        let default = if is_cpu { SEQS_ON_CPU } else { SEQS_ON_GPU };
        let seqs = self.max_num_seqs.map_or(default, |n| n as usize);
        let most = Limits::new(len, (self.max_num_batched_tokens as usize).max(seqs), seqs);
        let planned = |kv_blocks| source.plan(&Limits { kv_blocks, ..most }, Target::from(device));
        let (one, two) = (planned(1)?, planned(2)?);
        let block = (two.kv_cache - one.kv_cache).max(1);
        let beside = one.weights.saturating_add(one.scratch.max(one.packing));
        let (free, total) = device.memory()?;
        let usable = match is_cpu {
            true => (free as f64 * self.gpu_memory_utilization) as u64,
            false => ((total as f64 * self.gpu_memory_utilization) as u64).saturating_sub(total - free),
        };
        let room = usable.saturating_sub(beside);
        let wanted = self.kv_cache_memory_bytes.unwrap_or(if is_cpu { KV_ON_CPU } else { u64::MAX });
        let needed = len.div_ceil(KvCache::BLOCK_SIZE) as u64;
        if wanted.min(room) / block < needed {
            let is_room = room / block < needed;
            return Err(Error::OutOfMemory {
                what: format!(
                    "a KV cache for one sequence of {len} tokens beside {beside} bytes of weights and scratch"
                ),
                needed_bytes: needed * block,
                free_bytes: wanted.min(room),
                advice: match is_room {
                    true => "Lower --max-model-len or --max-num-seqs, or raise --gpu-memory-utilization".into(),
                    false => "Lower --max-model-len, or raise --kv-cache-memory-bytes".into(),
                },
                grows_with_sequences: true,
            });
        }
        let kv_blocks = (wanted.min(room) / block).min(most.kv_blocks as u64) as usize;
        Ok(Limits { kv_blocks, ..most })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes() {
        assert_eq!(parse_bytes("8G"), Ok(8 << 30));
        assert_eq!(parse_bytes("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("512mb"), Ok(512 << 20));
        assert_eq!(parse_bytes("1073741824"), Ok(1 << 30));
        for bad in ["", "G", "-1G", "1X", "nan", "1e30"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}

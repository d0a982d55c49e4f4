//! Writing quantized checkpoints: canonical weights into the tensors and configuration of a format (docs/formats.md), and
//! a directory that grows layer by layer and appears whole.

mod bitsandbytes;
mod config;
mod format;
mod hqq;
mod output;
mod snapshot;
mod written;

pub use format::Format;
pub use output::Output;
pub use snapshot::Snapshot;
pub use written::{KvScales, Written};

use half::{bf16, f16};
use safetensors::{Dtype, View};
use std::borrow::Cow;

use crate::dtype::DType;

/// A tensor on its way into a safetensors file.
#[derive(Debug, Clone, PartialEq)]
pub struct OutTensor {
    /// Full name.
    pub name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl OutTensor {
    /// Little-endian bytes of `dtype`.
    pub(super) fn raw(name: impl Into<String>, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> OutTensor {
        OutTensor { name: name.into(), dtype, shape: shape.to_vec(), bytes }
    }

    /// Words as `I32`.
    pub(super) fn words(name: impl Into<String>, shape: &[usize], words: &[u32]) -> OutTensor {
        OutTensor::raw(name, Dtype::I32, shape, words.iter().flat_map(|w| w.to_le_bytes()).collect())
    }

    /// Values rounded to the floating type `dtype`.
    ///
    /// # Panics
    /// If `dtype` is an integer type: a bug of the caller.
    pub fn floats(name: impl Into<String>, dtype: DType, shape: &[usize], values: &[f32]) -> OutTensor {
        let (dtype, bytes) = match dtype {
            DType::F32 => (Dtype::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            DType::F16 => (Dtype::F16, values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()),
            DType::BF16 => (Dtype::BF16, values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()),
            other => panic!("OutTensor::floats: {other} is not a floating type"),
        };
        OutTensor::raw(name, dtype, shape, bytes)
    }
}

impl OutTensor {
    /// Bytes that it takes in a file.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl View for &OutTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

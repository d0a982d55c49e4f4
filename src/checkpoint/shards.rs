//! The safetensors files of a model, mapped: a table of tensors with checked headers, and their bytes.
#![allow(unsafe_code)] // memory mapping

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::dtype::HostData;
use crate::error::{Error, Result};
use crate::quant::SharedBytes;

use super::files::ModelDir;
use super::foreign::{no_weights, there_is};
use super::json::{self, not_content};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 4096;
const MAX_RANK: usize = 8;
/// The format's own limit (huggingface/safetensors).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where one tensor lies, from its file's header.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    file: usize,
    start: usize,
    end: usize,
}

/// All tensors of a model directory.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<(PathBuf, Arc<Mmap>)>,
    tensors: BTreeMap<String, Entry>,
}

impl Shards {
    /// Maps `model.safetensors`, else the shards that `model.safetensors.index.json` names: in this order, as transformers
    /// does, since an index is what a conversion into one file leaves behind.
    pub(super) fn open(dir: &ModelDir) -> Result<Shards> {
        let mut shards = Shards { files: Vec::new(), tensors: BTreeMap::new() };
        if let Some((path, file)) = dir.file(SINGLE)? {
            shards.add(path, &file)?;
            return Ok(shards);
        }
        let Some(index) = dir.json(INDEX, MAX_INDEX_BYTES)? else {
            return Err(no_weights(dir, &format!("{SINGLE} or {INDEX}"))?);
        };
        let map = index.object("weight_map")?.ok_or_else(|| index.error("weight_map", "missing"))?;
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for tensor in map.keys() {
            let file = map.str(tensor)?.ok_or_else(|| map.error(tensor, "expected a file name, got null"))?;
            by_file.entry(file).or_default().push(tensor);
        }
        if by_file.is_empty() || by_file.len() > MAX_SHARDS {
            return Err(map.error("", format!("names {} files; expected 1 to {MAX_SHARDS}", by_file.len())));
        }
        for (name, tensors) in by_file {
            if !name.ends_with(".safetensors") {
                return Err(index.error("weight_map", format!("`{name}` is not a safetensors file")));
            }
            let Some((path, file)) = dir.file(name)? else {
                let names = dir.names()?;
                let others: Vec<&String> = names
                    .iter()
                    .filter(|other| {
                        other.ends_with(".safetensors") && map.keys().all(|t| map.str(t).ok().flatten() != Some(other))
                    })
                    .collect();
                let reason = format!(
                    "missing, though {INDEX} puts {} tensors in it{}; download it again",
                    tensors.len(),
                    there_is(&others)
                );
                return Err(Error::file(dir.path().join(name), reason));
            };
            shards.add(path.clone(), &file)?;
            let this = shards.files.len() - 1;
            if let Some(absent) = tensors.iter().find(|t| shards.tensors.get(**t).is_none_or(|e| e.file != this)) {
                return Err(Error::tensor(path, *absent, format!("not in this file, though {INDEX} puts it there")));
            }
        }
        Ok(shards)
    }

    /// Maps files by path: those that this crate is writing.
    pub(super) fn of_files(paths: impl Iterator<Item = PathBuf>) -> Result<Shards> {
        let mut shards = Shards { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            let file = std::fs::File::open(&path).map_err(Error::io(&path))?;
            shards.add(path, &file)?;
        }
        Ok(shards)
    }

    fn add(&mut self, path: PathBuf, file: &std::fs::File) -> Result<()> {
        let length = file.metadata().map_err(Error::io(&path))?.len();
        if length < 8 {
            return Err(Error::file(
                &path,
                format!("{length} bytes, too short for a safetensors header; download it again"),
            ));
        }
        // SAFETY: the map is read-only and private to this process's view. Another process that truncates the file
        // while it is mapped makes reads of the lost pages fault (SIGBUS); docs/formats.md says so. Writers that
        // replace files by rename, as the hub and lowbit do, are safe.
        let map = unsafe { Mmap::map(file) }.map_err(Error::io(&path))?;
        for (name, mut entry) in parse_header(&path, &map)? {
            entry.file = self.files.len();
            if let Some(other) = self.tensors.get(&name) {
                let reason = format!("also in {}", self.files[other.file].0.display());
                return Err(Error::tensor(&path, name, reason));
            }
            self.tensors.insert(name, entry);
        }
        self.files.push((path, Arc::new(map)));
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    /// Gives the tensor `from`, if it is there, another name.
    pub(super) fn rename(&mut self, from: &str, to: &str) {
        if let Some(entry) = self.tensors.remove(from) {
            self.tensors.insert(to.to_owned(), entry);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    pub(super) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].1[entry.start..entry.end]
    }

    /// The bytes of tensor `name`, which may outlive this table.
    pub(super) fn shared(&self, name: &str) -> Result<SharedBytes> {
        let entry = self.need(name)?;
        Ok(SharedBytes::new(self.files[entry.file].1.clone(), entry.start..entry.end))
    }

    /// Bytes of all tensors.
    pub(super) fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|e| (e.end - e.start) as u64).sum()
    }

    /// An error about tensor `name`, which may be absent (the error then names the directory's first file).
    pub(super) fn error(&self, name: &str, reason: impl Into<String>) -> Error {
        let file = self.get(name).map_or(0, |e| e.file);
        let path = self.files.get(file).map_or_else(PathBuf::new, |(path, _)| path.clone());
        Error::tensor(path, name, reason)
    }

    fn need(&self, name: &str) -> Result<&Entry> {
        self.get(name).ok_or_else(|| self.error(name, "missing"))
    }

    /// A floating-point tensor in its file type, every element finite.
    pub(super) fn floats(&self, name: &str) -> Result<HostData> {
        let entry = self.need(name)?;
        let bytes = self.bytes(entry);
        let data = match entry.dtype {
            Dtype::F32 => HostData::F32(read(bytes, f32::from_le_bytes)),
            Dtype::F16 => HostData::F16(read(bytes, f16::from_le_bytes)),
            Dtype::BF16 => HostData::BF16(read(bytes, bf16::from_le_bytes)),
            other => return Err(self.error(name, format!("is {other:?}; expected F32, F16 or BF16"))),
        };
        let Some((at, value)) = data.first_not_finite() else { return Ok(data) };
        let at = match entry.shape.as_slice() {
            &[_, columns] => format!("[{}, {}]", at / columns, at % columns),
            _ => at.to_string(),
        };
        let reason = format!(
            "element {at} is {value}; expected finite values. The file is damaged, or was converted to a type that does not hold them: download or convert it again"
        );
        Err(self.error(name, reason))
    }

    /// A 32-bit integer tensor as words.
    pub(super) fn words(&self, name: &str) -> Result<Vec<u32>> {
        let entry = self.need(name)?;
        match entry.dtype {
            Dtype::I32 | Dtype::U32 => Ok(read(self.bytes(entry), u32::from_le_bytes)),
            other => Err(self.error(name, format!("is {other:?}; expected I32"))),
        }
    }

    /// An integer tensor of any width as i64.
    pub(super) fn integers(&self, name: &str) -> Result<Vec<i64>> {
        let entry = self.need(name)?;
        let bytes = self.bytes(entry);
        Ok(match entry.dtype {
            Dtype::I8 => bytes.iter().map(|&b| i64::from(b as i8)).collect(),
            Dtype::U8 => bytes.iter().map(|&b| i64::from(b)).collect(),
            Dtype::I16 => read(bytes, |b| i64::from(i16::from_le_bytes(b))),
            Dtype::I32 => read(bytes, |b| i64::from(i32::from_le_bytes(b))),
            Dtype::I64 => read(bytes, i64::from_le_bytes),
            other => return Err(self.error(name, format!("is {other:?}; expected integers"))),
        })
    }
}

/// Fewest elements that a core reads at once.
const PIECE: usize = 1 << 14;

/// Elements of `N` little-endian bytes. Mapped bytes need not be aligned, so they are copied.
fn read<const N: usize, T: Send>(bytes: &[u8], element: impl Fn([u8; N]) -> T + Sync + Send) -> Vec<T> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.par_iter().with_min_len(PIECE).map(|chunk| element(*chunk)).collect()
}

/// Tensors of a safetensors file given whole.
///
/// The `safetensors` crate checks that offsets leave no gap or overlap and fill the file, and that sizes fit
/// shapes; what it lets pass (duplicate names, absurd ranks) or reports without a name is checked before.
pub(super) fn parse_header(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Entry)>> {
    if let Some(what) = not_content(&bytes[..bytes.len().min(256)]) {
        return Err(Error::file(path, what));
    }
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| Error::file(path, "shorter than 8 bytes"))?;
    let length = u64::from_le_bytes(*length);
    if !(2..=MAX_HEADER_BYTES).contains(&length) || length > rest.len() as u64 {
        let reason = format!(
            "header length {length}; expected 2 to {MAX_HEADER_BYTES} and no more than the {} bytes that follow; not a safetensors file, or truncated",
            rest.len()
        );
        return Err(Error::file(path, reason));
    }
    let header =
        json::parse(&rest[..length as usize]).map_err(|reason| Error::file(path, format!("header: {reason}")))?;
    let Value::Object(header) = header else { return Err(Error::file(path, "header: expected a JSON object")) };
    for (name, info) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        check_info(info, rest.len() - length as usize).map_err(|reason| Error::tensor(path, name, reason))?;
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| {
        Error::file(
            path,
            format!("header: {e}; tensors must fill the file without gap or overlap, so it may be truncated"),
        )
    })?;
    let base = 8 + length as usize;
    let mut entries = Vec::with_capacity(header.len());
    for name in header.keys() {
        if let Some(info) = metadata.info(name) {
            let (start, end) = info.data_offsets;
            let entry =
                Entry { dtype: info.dtype, shape: info.shape.clone(), file: 0, start: base + start, end: base + end };
            entries.push((name.clone(), entry));
        }
    }
    Ok(entries)
}

fn check_info(info: &Value, data_bytes: usize) -> Result<(), String> {
    let numbers = |key: &str| -> Option<Vec<u64>> { info.get(key)?.as_array()?.iter().map(Value::as_u64).collect() };
    let shape = numbers("shape").ok_or("`shape` is not a list of sizes")?;
    let offsets = numbers("data_offsets").ok_or("`data_offsets` is not a pair of positions")?;
    let dtype: Dtype = info
        .get("dtype")
        .and_then(|d| serde_json::from_value(d.clone()).ok())
        .ok_or_else(|| format!("dtype {} is not known", info.get("dtype").unwrap_or(&Value::Null)))?;
    if shape.len() > MAX_RANK {
        return Err(format!("rank {}; expected at most {MAX_RANK}", shape.len()));
    }
    let elements =
        shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or_else(|| format!("shape {shape:?} overflows"))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64).ok_or_else(|| format!("shape {shape:?} overflows"))?;
    match offsets.as_slice() {
        &[start, end] if start > end || end > data_bytes as u64 => {
            Err(format!("bytes {start} to {end} of a file with {data_bytes} bytes of data; it may be truncated"))
        }
        &[start, end] if (end - start).checked_mul(8) != Some(bits) => {
            Err(format!("{} bytes for {dtype:?} {shape:?}, which takes {}", end - start, bits.div_ceil(8)))
        }
        [_, _] => Ok(()),
        _ => Err("`data_offsets` is not a pair of positions".to_owned()),
    }
}

//! A directory that grows part by part and appears whole: `DST.partial` while it grows, `DST` by one rename.
//!
//! Every file is written aside and renamed, so that after a crash a part is there in full or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::serialize_to_file;
use safetensors::{Dtype, SafeTensorError, View};
use serde_json::{Value, json};

use super::super::Checkpoint;
use super::super::shards::{Entry, Shards};
use super::OutTensor;
use crate::error::{Error, Result};

/// Bytes of a shard at most, as transformers has it; a larger tensor is a shard of its own.
const SHARD_BYTES: usize = 5_000_000_000;
/// Files that hold for the quantized model as for its source: tokenizer, chat template, generation settings. All else (weights,
/// results, samples) is the source's own.
const COPIED: [&str; 13] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];
/// Beginnings of the names of licences and notices, in capitals.
const LICENCES: [&str; 6] = ["LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "USAGE_POLICY"];
/// The model card.
const CARD: &str = "README.md";

/// What tells runs apart.
const RUN: &str = "run.json";

/// A checkpoint in the making. Dropped before anything was made, it leaves nothing behind.
#[derive(Debug)]
pub struct Output {
    dst: PathBuf,
    work: PathBuf,
    parts: usize,
}

impl Output {
    /// Begins `dst`, or goes on with what an interrupted run of the same `fingerprint` left beside it.
    ///
    /// # Errors
    /// [`Error::Input`] when `dst` exists, or what lies beside it is of another run; [`Error::Io`] when its parent cannot be
    /// written.
    pub fn begin(dst: &Path, fingerprint: &Value) -> Result<Output> {
        if dst.symlink_metadata().is_ok() {
            return Err(Error::input("DST", format!("{} exists; remove it or choose another name", dst.display())));
        }
        let name = dst.file_name().ok_or_else(|| Error::input("DST", format!("{}: no name", dst.display())))?;
        let mut work = name.to_os_string();
        work.push(".partial");
        let mut output = Output { dst: dst.to_path_buf(), work: dst.with_file_name(work), parts: 0 };
        let state = output.work.join(RUN);
        if output.work.is_dir() && state.is_file() {
            let found = fs::read(&state).map_err(Error::io(&state))?;
            if serde_json::from_slice::<Value>(&found).ok().as_ref() != Some(fingerprint) {
                let reason = format!(
                    "{} is what another run left: its model, calibration or options differ; remove it, or repeat that run to finish it",
                    output.work.display()
                );
                return Err(Error::input("DST", reason));
            }
            while output.part_path(output.parts).is_file() && output.note_path(output.parts).is_file() {
                output.parts += 1;
            }
        } else {
            fs::create_dir_all(&output.work).map_err(Error::io(&output.work))?;
            output.write(&state, fingerprint.to_string().as_bytes())?;
        }
        Ok(output)
    }

    /// Whether the directory holds nothing but its beginning.
    fn is_empty(&self) -> bool {
        let names = fs::read_dir(&self.work).map(|entries| entries.flatten().map(|entry| entry.file_name()).collect());
        names.is_ok_and(|names: Vec<_>| names.iter().all(|name| name == RUN))
    }

    /// Parts that are there already.
    pub fn parts(&self) -> usize {
        self.parts
    }

    /// Where work goes on, for messages.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Adds the next part: its tensors, a note (any JSON), and the state of the work after it (any numbers), which
    /// replaces the state of the part before.
    pub fn add(&mut self, tensors: &[OutTensor], note: &Value, state: &[f32]) -> Result<()> {
        let index = self.parts;
        if !state.is_empty() {
            let bytes: Vec<u8> = state.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.write(&self.state_path(index), &bytes)?;
        }
        let path = self.part_path(index);
        let aside = path.with_extension("tmp");
        let views = tensors.iter().map(|t| (t.name.as_str(), t));
        serialize_to_file(views, None, &aside).map_err(|e| write_error(&aside, e))?;
        sync(&aside)?;
        self.write(&self.note_path(index), note.to_string().as_bytes())?;
        fs::rename(&aside, &path).map_err(Error::io(&path))?;
        self.parts += 1;
        if index > 0 {
            let _ = fs::remove_file(self.state_path(index - 1)); // gone after the part that follows it is there
        }
        Ok(())
    }

    /// Keeps what a part is not, for a run that goes on: `value` under `name`.
    pub fn remember(&self, name: &str, value: &Value) -> Result<()> {
        self.write(&self.work.join(name).with_extension("json"), value.to_string().as_bytes())
    }

    /// What was kept under `name`.
    pub fn recall(&self, name: &str) -> Result<Option<Value>> {
        let path = self.work.join(name).with_extension("json");
        match path.is_file() {
            true => read_json(&path).map(Some),
            false => Ok(None),
        }
    }

    /// The note of a part.
    pub fn note(&self, index: usize) -> Result<Value> {
        read_json(&self.note_path(index))
    }

    /// The state after the last part, `len` numbers.
    pub fn state(&self, len: usize) -> Result<Vec<f32>> {
        let path = self.state_path(self.parts.saturating_sub(1));
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let (chunks, rest) = bytes.as_chunks::<4>();
        if chunks.len() != len || !rest.is_empty() {
            let reason =
                format!("{} bytes; expected {} numbers; remove the directory and start again", bytes.len(), len);
            return Err(Error::file(&path, reason));
        }
        Ok(chunks.iter().map(|c| f32::from_le_bytes(*c)).collect())
    }

    /// Puts all parts into shards, adds every tensor of `source` that no part has and is not in `replaced`, the files beside the weights
    /// that hold for both, config.json with the fields `changes`, and `extra` files; then gives the directory its name. `done` is a
    /// sentence for the model card, without its full stop.
    pub fn finish(
        self,
        source: &Checkpoint,
        done: &str,
        replaced: &[String],
        changes: &[(&str, Value)],
        extra: &[(&str, Vec<u8>)],
    ) -> Result<()> {
        let whole = self.work.join("whole");
        if whole.is_dir() {
            fs::remove_dir_all(&whole).map_err(Error::io(&whole))?;
        }
        fs::create_dir(&whole).map_err(Error::io(&whole))?;
        let parts = Shards::of_files((0..self.parts).map(|i| self.part_path(i)))?;
        let made = parts.iter().map(|(name, entry)| (name, Stored { shards: &parts, entry }));
        let kept = source
            .shards
            .iter()
            .filter(|(name, _)| parts.get(name).is_none() && !replaced.iter().any(|r| r == name))
            .map(|(name, entry)| (name, Stored { shards: &source.shards, entry }));
        write_shards(&whole, made.chain(kept).collect())?;
        copy_files(source.dir.path(), &whole, done)?;
        let mut config = source.raw_config()?;
        config.extend(changes.iter().map(|(field, value)| ((*field).to_owned(), value.clone())));
        let text = serde_json::to_vec_pretty(&config).map_err(|e| Error::file(&whole, e.to_string()))?;
        for (name, bytes) in extra.iter().map(|(n, b)| (*n, b)).chain([("config.json", &text)]) {
            self.write(&whole.join(name), bytes)?;
        }
        if self.dst.symlink_metadata().is_ok() {
            return Err(Error::input(
                "DST",
                format!("{} appeared meanwhile; {} is complete", self.dst.display(), whole.display()),
            ));
        }
        fs::rename(&whole, &self.dst).map_err(Error::io(&self.dst))?;
        fs::remove_dir_all(&self.work).map_err(Error::io(&self.work))
    }

    fn part_path(&self, index: usize) -> PathBuf {
        self.work.join(format!("part-{index:05}.safetensors"))
    }

    fn note_path(&self, index: usize) -> PathBuf {
        self.work.join(format!("part-{index:05}.json"))
    }

    fn state_path(&self, index: usize) -> PathBuf {
        self.work.join(format!("part-{index:05}.state"))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let aside = path.with_extension("tmp-write");
        let mut file = File::create(&aside).map_err(Error::io(&aside))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(&aside))?;
        fs::rename(&aside, path).map_err(Error::io(path))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.is_empty() {
            // Nobody is left to tell of a failure, and it loses nothing.
            let _ = fs::remove_dir_all(&self.work);
        }
    }
}

/// A tensor in a mapped file.
struct Stored<'a> {
    shards: &'a Shards,
    entry: &'a Entry,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.entry.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        std::borrow::Cow::Borrowed(self.shards.bytes(self.entry))
    }

    fn data_len(&self) -> usize {
        self.shards.bytes(self.entry).len()
    }
}

/// `model.safetensors`, or shards with their index.
fn write_shards(dir: &Path, tensors: Vec<(&str, Stored)>) -> Result<()> {
    let mut shards: Vec<(usize, Vec<(&str, Stored)>)> = vec![(0, Vec::new())];
    for (name, tensor) in tensors {
        let len = tensor.data_len();
        match shards.last_mut() {
            Some((size, shard)) if shard.is_empty() || *size + len <= SHARD_BYTES => {
                *size += len;
                shard.push((name, tensor));
            }
            _ => shards.push((len, vec![(name, tensor)])),
        }
    }
    let count = shards.len();
    let total: usize = shards.iter().map(|(size, _)| size).sum();
    let mut map = serde_json::Map::new();
    for (i, (_, shard)) in shards.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        map.extend(shard.iter().map(|(name, _)| ((*name).to_owned(), file.clone().into())));
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let path = dir.join(&file);
        // safetensors makes a file that its owner alone can read: back to what files get here.
        let usual = File::create(&path).and_then(|file| file.metadata()).map_err(Error::io(&path))?.permissions();
        serialize_to_file(shard, Some(metadata), &path).map_err(|e| write_error(&path, e))?;
        fs::set_permissions(&path, usual).map_err(Error::io(&path))?;
        sync(&path)?;
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        let path = dir.join("model.safetensors.index.json");
        fs::write(&path, index.to_string()).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// Copies what holds for the new model too, licences, and the model card with a line that says what was done.
fn copy_files(from: &Path, to: &Path, done: &str) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io(from))? {
        let entry = entry.map_err(Error::io(from))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_licence = LICENCES.iter().any(|start| name.to_uppercase().starts_with(start));
        let copied = COPIED.contains(&name.as_str()) || name == CARD || is_licence;
        if !copied || !entry.path().is_file() {
            continue;
        }
        // Not fs::copy, which would keep a read-only mode.
        let mut bytes = fs::read(entry.path()).map_err(Error::io(entry.path()))?;
        if name == CARD {
            bytes = card(&String::from_utf8_lossy(&bytes), done).into_bytes();
        }
        let target = to.join(&name);
        fs::write(&target, bytes).map_err(Error::io(&target))?;
    }
    Ok(())
}

/// A model card that begins, behind its metadata, with what was done to the model.
fn card(source: &str, done: &str) -> String {
    let line = format!("> {done}. What follows describes the model that this one was made from.\n\n");
    let end = source.strip_prefix("---").and_then(|rest| Some(3 + rest.find("\n---")? + 4));
    let end = end.and_then(|end| Some(end + source[end..].find('\n')? + 1));
    let (metadata, text) = source.split_at(end.unwrap_or(0));
    let gap = if metadata.is_empty() { "" } else { "\n" };
    format!("{metadata}{gap}{line}{}", text.trim_start_matches(['\r', '\n']))
}

fn read_json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, e.to_string()))
}

/// What the system refused (a full disk) is told as such.
pub(super) fn write_error(path: &Path, error: SafeTensorError) -> Error {
    match error {
        SafeTensorError::IoError(e) => Error::io(path)(e),
        other => Error::file(path, other.to_string()),
    }
}

pub(super) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::card;

    #[test]
    fn cards_say_first_what_was_done() {
        let line = "> done. What follows describes the model that this one was made from.\n\n";
        assert_eq!(card("# A model\n", "done"), format!("{line}# A model\n"));
        let metadata = "---\nlicense: mit\n---\n";
        assert_eq!(card(&format!("{metadata}\n# A model\n"), "done"), format!("{metadata}\n{line}# A model\n"));
        assert_eq!(card("--- no end", "done"), format!("{line}--- no end"));
        assert_eq!(card("", "done"), line);
    }
}

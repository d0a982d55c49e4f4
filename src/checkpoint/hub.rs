//! Model names to directories: a directory is itself, a hub id is fetched into the Hugging Face cache.
//!
//! The cache has the layout of huggingface_hub, so that models fetched by other tools are found and the other way
//! round: `models--org--name/{blobs,refs,snapshots/<commit>}`. hf-hub knows that layout; the transfers are ours
//! ([`fetch`]), because hf-hub 0.5 sends the token along when the hub redirects to another host, checks neither
//! length nor hash of what it gets, and has no offline mode.

mod fetch;

use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;

use super::foreign;
use crate::error::{Error, Result};
use fetch::{Failure, Fetch};

/// Where models come from and go to.
#[derive(Debug, Clone)]
pub struct Hub {
    /// Address of the hub, without a slash at the end.
    pub endpoint: String,
    /// The cache: the folder that holds `models--org--name` folders.
    pub cache: PathBuf,
    /// Access token.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Wait before the first retry; it doubles with each further one.
    pub retry_delay: Duration,
}

/// One file of a repository, as the hub lists it.
#[derive(Debug, Clone, Deserialize)]
struct Listed {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Listed>,
}

/// The directory of `model`: an existing directory, or a hub id `org/name[@revision]` with the settings of the
/// environment ([`Hub::from_env`]).
///
/// # Errors
/// [`Error::Hub`] when it is neither or cannot be fetched, [`Error::Io`] when the cache cannot be written;
/// [`Error::Unsupported`] and [`Error::Checkpoint`] for a file, saying what it is and what to give instead.
pub fn resolve(model: &str) -> Result<PathBuf> {
    if Path::new(model).is_dir() {
        return Ok(PathBuf::from(model));
    }
    if Path::new(model).is_file() {
        return Err(foreign::a_file(Path::new(model)));
    }
    split_id(model)?;
    Hub::from_env()?.resolve(model)
}

impl Hub {
    /// Settings by the variables of huggingface_hub: `HF_ENDPOINT`; `HF_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `~/.cache/huggingface/hub`; `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else `token` in `HF_HOME`;
    /// `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no place for the cache.
    pub fn from_env() -> Result<Hub> {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let path = |name: &str| var(name).map(PathBuf::from);
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| home.as_ref().map(|home| home.join("hub")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file?).ok());
        Ok(Hub {
            endpoint: var("HF_ENDPOINT").unwrap_or("https://huggingface.co".into()).trim_end_matches('/').to_string(),
            cache: cache.ok_or_else(|| Error::input("HF_HOME", "set it to a folder for the cache: HOME is not set"))?,
            token: token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
            offline: var("HF_HUB_OFFLINE").is_some_and(|v| ["1", "true", "yes", "on"].contains(&&*v.to_lowercase())),
            retry_delay: Duration::from_millis(500),
        })
    }

    /// As [`resolve`], with these settings.
    ///
    /// Fetched are the files that this crate reads, of the top folder only: configuration, tokenizer, chat template,
    /// safetensors. What the cache has already is kept; what a broken transfer left is continued.
    ///
    /// # Errors
    /// As [`resolve`].
    pub fn resolve(&self, model: &str) -> Result<PathBuf> {
        if Path::new(model).is_dir() {
            return Ok(PathBuf::from(model));
        }
        let (id, revision) = split_id(model)?;
        let hub_error = |reason: String| Error::Hub { model: model.to_string(), reason };
        let repo = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        let cached = self.cached(&repo);
        if self.offline {
            return cached.ok_or_else(|| {
                let place = self.cache.join(repo.folder_name());
                hub_error(format!("HF_HUB_OFFLINE is set and revision `{revision}` is not in {}", place.display()))
            });
        }

        let fetch = Fetch::new(&self.endpoint, self.token.as_deref(), self.retry_delay);
        let listing = match fetch.text(&format!("{}/api/{}?blobs=true", self.endpoint, repo.api_url())) {
            Ok(text) => text,
            Err(Failure::Network(reason)) => {
                let Some(cached) = cached else { return Err(hub_error(format!("{reason} (no copy in the cache)"))) };
                tracing::warn!("{model}: {reason}; using the copy in the cache");
                return Ok(cached);
            }
            Err(failure) => return Err(failure.explain(model, &self.endpoint, id)),
        };
        let listing: Listing =
            serde_json::from_str(&listing).map_err(|e| hub_error(format!("its list of files is malformed: {e}")))?;
        if !is_hex(&listing.sha, 40) {
            return Err(hub_error(format!("its commit `{}` is not a git hash", listing.sha)));
        }
        let files = needed(&listing.siblings).map_err(&hub_error)?;

        let handle = Cache::new(self.cache.clone()).repo(repo.clone());
        let snapshot = handle.pointer_path(&listing.sha);
        let progress = progress_bar(files.iter().filter_map(|f| f.size).sum());
        for file in &files {
            progress.set_message(file.rfilename.clone());
            let pointer = snapshot.join(&file.rfilename);
            let blob = file.blob().map(|blob| handle.blob_path(blob));
            let target = blob.as_deref().unwrap_or(&pointer);
            if !target.exists() && (blob.is_some() || !pointer.exists()) {
                let url =
                    format!("{}/{}/resolve/{}/{}", self.endpoint, repo.url(), listing.sha, escape(&file.rfilename));
                fetch
                    .file(&url, target, file.size, file.sha256(), &progress)
                    .map_err(|failure| failure.explain(&format!("{model}: {}", file.rfilename), &self.endpoint, id))?;
            } else {
                progress.inc(file.size.unwrap_or(0));
            }
            if let Some(blob) = &blob {
                link(blob, &pointer)?;
            }
        }
        progress.finish_and_clear();
        handle.create_ref(&listing.sha).map_err(Error::io(&snapshot))?;
        Ok(snapshot)
    }

    /// The snapshot of a revision (branch, tag or commit) that the cache has.
    fn cached(&self, repo: &Repo) -> Option<PathBuf> {
        let folder = self.cache.join(repo.folder_name());
        let commit = std::fs::read_to_string(folder.join("refs").join(repo.revision()))
            .unwrap_or_else(|_| repo.revision().to_string());
        let snapshot = folder.join("snapshots").join(commit.trim());
        (is_hex(commit.trim(), 40) && snapshot.join("config.json").exists()).then_some(snapshot)
    }
}

impl Listed {
    fn sha256(&self) -> Option<&str> {
        self.lfs.as_ref()?.sha256.as_deref()
    }

    /// The name under which the cache keeps the content: its hash.
    fn blob(&self) -> Option<&str> {
        self.sha256().or(self.blob_id.as_deref())
    }
}

/// Repository and revision of a hub id.
fn split_id(model: &str) -> Result<(&str, &str)> {
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let word = |s: &str| {
        let allowed = s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        (1..=96).contains(&s.len()) && allowed && !s.starts_with(['.', '-']) && !s.contains("..") && !s.contains("--")
    };
    let names = id.split_once('/').is_some_and(|(org, name)| word(org) && word(name));
    if names && revision.split('/').all(word) {
        return Ok((id, revision));
    }
    let reason = "there is no such directory, and it is not a hub id `org/name[@revision]` either";
    Err(Error::Hub { model: model.to_string(), reason: reason.to_string() })
}

/// The files this crate reads. A name or hash that could lead out of the cache is an error, whatever the file.
fn needed(files: &[Listed]) -> Result<Vec<Listed>, String> {
    for file in files {
        let name = &file.rfilename;
        let normal = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        if name.is_empty() || !normal || name.contains(['\\', ':', '\0']) {
            return Err(format!("refused: the hub lists a file named `{name}`"));
        }
        let hashes = file.sha256().is_none_or(|h| is_hex(h, 64)) && file.blob_id.as_ref().is_none_or(|h| is_hex(h, 40));
        if !hashes {
            return Err(format!("refused: the hub lists `{name}` with a malformed hash"));
        }
    }
    let weights = |name: &str| name.ends_with(".safetensors") && !name.starts_with("consolidated");
    // Mistral's repositories hold the same weights twice.
    let twice = files.iter().any(|f| weights(&f.rfilename));
    let wanted = |name: &str| match name {
        "config.json" | "generation_config.json" | "special_tokens_map.json" | "added_tokens.json" => true,
        "quantize_config.json" | "quant_config.json" | "chat_template.json" | "chat_template.jinja" => true,
        _ if name.contains('/') => false,
        _ if name.starts_with("consolidated") && twice => false,
        _ if name.starts_with("tokenizer") => name.ends_with(".json"),
        _ => name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"),
    };
    let files: Vec<Listed> = files.iter().filter(|f| wanted(&f.rfilename)).cloned().collect();
    if !files.iter().any(|f| f.rfilename == "config.json") {
        return Err("has no config.json: not a model in the Hugging Face format".to_string());
    }
    if !files.iter().any(|f| f.rfilename.ends_with(".safetensors")) {
        return Err("has no .safetensors file. Pickled weights (.bin, .pt) are not read; GGUF neither".to_string());
    }
    Ok(files)
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A file name as part of a URL.
fn escape(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    name.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Makes `pointer` lead to `blob`, by a relative link where the system has them. It is made under another name and
/// renamed: whoever downloads the same model at the same time never sees the pointer missing.
fn link(blob: &Path, pointer: &Path) -> Result<()> {
    if pointer.exists() {
        return Ok(());
    }
    let folder = pointer.parent().unwrap_or(pointer);
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    static MADE: AtomicU64 = AtomicU64::new(0);
    let mut name = pointer.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}-{}.link", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed)));
    let fresh = pointer.with_file_name(name);
    #[cfg(unix)]
    let made = {
        let blob = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
        // A crashed process of the same number may have left one.
        let _ = std::fs::remove_file(&fresh);
        std::os::unix::fs::symlink(blob, &fresh) // from snapshots/<commit>/<file> to blobs/<hash>
    };
    #[cfg(not(unix))]
    let made = std::fs::copy(blob, &fresh).map(|_| ());
    made.and_then(|()| std::fs::rename(&fresh, pointer)).map_err(Error::io(pointer))
}

/// A bar on a terminal, nothing elsewhere.
fn progress_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    match ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Many downloads of one model end at the same time, over a link that an earlier run left dangling.
    #[test]
    fn a_pointer_is_never_missing() {
        let cache = tempfile::tempdir().expect("a folder");
        let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/commit"));
        std::fs::create_dir_all(&blobs).expect("blobs");
        std::fs::create_dir_all(&snapshot).expect("snapshot");
        let blob = blobs.join("hash");
        std::fs::write(&blob, "weights").expect("a blob");
        let (rounds, threads, missing) = (500, 4, AtomicU64::new(0));
        let start = std::sync::Barrier::new(threads);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    for round in 0..rounds {
                        let pointer = snapshot.join(format!("{round}.safetensors"));
                        #[cfg(unix)]
                        let _ = std::os::unix::fs::symlink("../../blobs/absent", &pointer);
                        start.wait();
                        let read = link(&blob, &pointer).is_ok() && std::fs::read(&pointer).is_ok();
                        missing.fetch_add(u64::from(!read), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(missing.into_inner(), 0);
        assert_eq!(std::fs::read_dir(&snapshot).expect("snapshot").count(), rounds);
    }
}

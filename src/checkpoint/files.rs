//! The files of one model directory: where they may lie and how much of them is read.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

use super::json::{self, Object};

/// A model directory. Files are reached by plain name and may not lie outside it, but for the symlinks that the
/// hub cache makes: `<repo>/snapshots/<revision>/<file>` pointing into `<repo>/blobs`.
#[derive(Debug)]
pub(super) struct ModelDir {
    path: PathBuf,
    /// Real directories a file may lie under.
    roots: Vec<PathBuf>,
}

impl ModelDir {
    pub(super) fn open(path: &Path) -> Result<ModelDir> {
        let real = path.canonicalize().map_err(Error::io(path))?;
        if !real.is_dir() {
            return Err(Error::file(
                path,
                "not a directory; expected a model directory with config.json and *.safetensors",
            ));
        }
        let mut roots = vec![real.clone()];
        if let Some(snapshots) = real.parent().filter(|p| p.file_name().is_some_and(|n| n == "snapshots"))
            && let Some(repo) = snapshots.parent()
        {
            roots.push(repo.join("blobs"));
        }
        Ok(ModelDir { path: path.to_path_buf(), roots })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the files, sorted; at most the first 100,000 entries are looked at.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.path).map_err(Error::io(&self.path))?;
        let mut names: Vec<String> =
            entries.take(100_000).filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }

    /// Opens `name` for reading; `None` when there is no such file.
    ///
    /// # Errors
    /// When the name leads out of the directory, directly or through a symlink, or is not a regular file.
    pub(super) fn file(&self, name: &str) -> Result<Option<(PathBuf, File)>> {
        let path = self.path.join(name);
        let mut parts = Path::new(name).components();
        let inside = parts.clone().next().is_some() && parts.all(|c| matches!(c, Component::Normal(_)));
        if !inside {
            return Err(Error::file(&self.path, format!("file name `{name}` leads out of the model directory")));
        }
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !path.is_symlink() => return Ok(None),
            Err(e) => return Err(Error::io(&path)(e)),
        };
        if !self.roots.iter().any(|root| real.starts_with(root)) {
            let reason = format!("a symlink to {}, outside the model directory; copy the file instead", real.display());
            return Err(Error::file(&path, reason));
        }
        if !real.is_file() {
            return Err(Error::file(&path, "not a regular file"));
        }
        let file = File::open(&real).map_err(Error::io(&path))?;
        Ok(Some((path, file)))
    }

    /// Reads a JSON object of at most `limit` bytes; `None` when there is no such file.
    pub(super) fn json(&self, name: &str, limit: u64) -> Result<Option<Object>> {
        let Some((path, file)) = self.file(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(&path))?;
        if bytes.len() as u64 > limit {
            return Err(Error::file(&path, format!("larger than {limit} bytes, the limit for this file")));
        }
        let value = json::parse(&bytes).map_err(|reason| Error::file(&path, reason))?;
        Object::root(path, value).map(Some)
    }
}

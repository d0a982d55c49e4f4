//! Checkpoints with golden files: the demo, the fixtures (completed in the temp directory) and external ones.
//!
//! All fixtures share the demo's embedding matrix and tokenizer bit for bit, so `tests/fixtures/<name>` holds
//! everything else and [`fixture`] joins the two into a sharded checkpoint.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use safetensors::tensor::{TensorView, serialize};
use safetensors::{Dtype, SafeTensors};

const DEMO: &str = "assets/books-6m-gptq";
const FIXTURES: &str = "tests/fixtures";
const EMBEDDING: &str = "model.embed_tokens.weight";
const SHARDS: [&str; 2] = ["model-embed.safetensors", "model-rest.safetensors"];

/// The demo checkpoint (GPTQ, 4 bits, group 128, symmetric).
pub fn demo() -> PathBuf {
    PathBuf::from(DEMO)
}

/// Complete directory of `tests/fixtures/<name>`: `awq-4bit-g128`, `ct-w4a16-gptq`, `ct-w8a8-dynamic`,
/// `gptq-4bit-g32-actorder`, and `fp8-channel`, `fp8-tensor`, `fp8-block128` of one layer (golden/fp8.py). Made once for each content, whatever the number of processes asking.
pub fn fixture(name: &str) -> PathBuf {
    let source = Path::new(FIXTURES).join(name);
    let mut hasher = DefaultHasher::new();
    embedding().hash(&mut hasher);
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in fs::read_dir(&source).unwrap_or_else(|e| panic!("{}: {e}", source.display())) {
        let path = entry.expect("directory entry").path();
        let file = path.file_name().expect("file").to_string_lossy().into_owned();
        files.push((file, fs::read(&path).expect("fixture file")));
    }
    files.sort();
    files.hash(&mut hasher);

    let done = std::env::temp_dir().join(format!("lowbit-fixture-{name}-{:016x}", hasher.finish()));
    if done.is_dir() {
        return done;
    }
    // Built aside and renamed: whoever is second finds the name taken and drops its own copy.
    let building = tempfile::tempdir().expect("temp dir");
    complete(building.path(), &files);
    if let Err(e) = fs::rename(building.path(), &done) {
        assert!(done.is_dir(), "{}: {e}", done.display());
    }
    done
}

/// Names of the fixtures, sorted.
pub fn fixture_names() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(FIXTURES)
        .expect("tests/fixtures")
        .map(|e| e.expect("directory entry").path())
        .filter(|p| p.join(SHARDS[1]).is_file())
        .map(|p| p.file_name().expect("directory").to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Every checkpoint with a `golden.json`: the demo, the fixtures, and those under
/// `$LOWBIT_TEST_MODELS/{models,checkpoints}` where that is set.
pub fn all_golden_dirs() -> Vec<PathBuf> {
    let mut dirs = vec![demo()];
    dirs.extend(fixture_names().iter().map(|n| fixture(n)));
    dirs.extend(external_golden_dirs());
    dirs
}

/// Every directory under `$LOWBIT_TEST_MODELS/next`: models that this version loads or does not yet.
pub fn next_dirs() -> Vec<PathBuf> {
    let Some(root) = std::env::var_os("LOWBIT_TEST_MODELS").map(PathBuf::from) else { return Vec::new() };
    let entries = fs::read_dir(root.join("next")).into_iter().flatten();
    let mut dirs: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|dir| dir.is_dir()).collect();
    dirs.sort();
    dirs
}

/// Those of [`all_golden_dirs`] that are outside the repository.
pub fn external_golden_dirs() -> Vec<PathBuf> {
    let Some(root) = std::env::var_os("LOWBIT_TEST_MODELS").map(PathBuf::from) else { return Vec::new() };
    let mut dirs: Vec<PathBuf> = ["models", "checkpoints"]
        .iter()
        .filter_map(|sub| fs::read_dir(root.join(sub)).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|dir| dir.join("golden.json").is_file())
        .collect();
    assert!(!dirs.is_empty(), "LOWBIT_TEST_MODELS={}: no models/*/golden.json under it", root.display());
    dirs.sort();
    dirs
}

fn complete(dir: &Path, files: &[(String, Vec<u8>)]) {
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).expect("fixture file");
    let mut weight_map = serde_json::Map::new();
    for (name, bytes) in files {
        write(name, bytes);
        if name == SHARDS[1] {
            let rest = SafeTensors::deserialize(bytes).expect("fixture shard");
            weight_map.extend(rest.names().iter().map(|n| ((*n).to_owned(), SHARDS[1].into())));
        }
    }
    write(SHARDS[0], embedding());
    weight_map.insert(EMBEDDING.into(), SHARDS[0].into());
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    write("model.safetensors.index.json", index.to_string().as_bytes());
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        if !dir.join(name).exists() {
            fs::copy(Path::new(DEMO).join(name), dir.join(name)).expect("demo file");
        }
    }
}

/// A safetensors file with the demo's embedding matrix alone.
fn embedding() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let bytes = fs::read(Path::new(DEMO).join("model.safetensors")).expect("demo model");
        let tensors = SafeTensors::deserialize(&bytes).expect("demo model");
        let embedding = tensors.tensor(EMBEDDING).expect("embedding");
        assert_eq!(embedding.dtype(), Dtype::BF16);
        let view = TensorView::new(Dtype::BF16, embedding.shape().to_vec(), embedding.data()).expect("view");
        serialize([(EMBEDDING, view)], None).expect("embedding shard")
    })
}

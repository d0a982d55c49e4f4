//! What a file or a directory is that is no model as this crate reads it, and what to give instead.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

use super::files::ModelDir;

/// Files of formats that other programs read, by the end of their name: what they are, and what to do.
const FORMATS: [(&[&str], &str, &str); 6] = [
    (
        &[".bin", ".pt", ".pth", ".pkl", ".ckpt"],
        "a pickle, which can run code when it is read",
        "Convert the model to safetensors (transformers: save_pretrained(dir, safe_serialization=True))",
    ),
    (&[".onnx"], "an ONNX model", SAFETENSORS),
    (&[".engine", ".plan"], "a TensorRT engine", SAFETENSORS),
    (&[".h5", ".msgpack"], "weights for TensorFlow or Flax", SAFETENSORS),
    (&[".llamafile"], "a llamafile", SAFETENSORS),
    (&[".zip", ".tar", ".gz", ".tgz", ".zst"], "an archive", "Unpack it and give the directory of the model"),
];
const SAFETENSORS: &str =
    "Use the safetensors checkpoint that it was made from, or one in GPTQ, AWQ or compressed-tensors";

/// The error for a file of another program's format; `None` when it is none that is known.
fn other_format(path: &Path) -> Option<Error> {
    let name = path.file_name()?.to_string_lossy().to_lowercase();
    let mut magic = [0; 4];
    let is_gguf = File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && &magic == b"GGUF";
    let (what, advice) = match name.ends_with(".gguf") || is_gguf {
        true => ("a GGUF file", SAFETENSORS),
        false => {
            let known = FORMATS.iter().find(|(ends, ..)| ends.iter().any(|end| name.ends_with(end)))?;
            (known.1, known.2)
        }
    };
    Some(Error::unsupported(format!("{}: {what}", path.display()), advice))
}

/// The error for a file that was given where a model's directory belongs.
pub(super) fn a_file(path: &Path) -> Error {
    if let Some(error) = other_format(path) {
        return error;
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let what = match path.extension() {
        Some(end) if end == "safetensors" => {
            "the weights of a model, or a part of them, without its configuration and tokenizer"
        }
        _ => "a file",
    };
    let advice = match dir.join("config.json").is_file() {
        true => format!("give the directory that it lies in, {}", dir.display()),
        false => "give a directory that holds it beside config.json and tokenizer.json".to_owned(),
    };
    Error::file(path, format!("{what}; a model is a directory or a hub id: {advice}"))
}

/// The error for a directory without config.json.
pub(super) fn no_config(dir: &ModelDir) -> Result<Error> {
    let names = dir.names()?;
    let has = |name: &str| names.iter().any(|n| n == name);
    if has("adapter_config.json") {
        return Ok(Error::unsupported(
            format!("{}: an adapter (LoRA), not a model", dir.path().display()),
            "Merge it into its base model (peft: merge_and_unload) and give the directory of the result",
        ));
    }
    if has("model_index.json") {
        return Ok(Error::unsupported(
            format!("{}: a pipeline of several models (diffusers)", dir.path().display()),
            "Give the directory of one decoder-only language model",
        ));
    }
    if has("params.json") {
        return Ok(Error::unsupported(
            format!("{}: a model in its maker's own layout (params.json)", dir.path().display()),
            "Use the same model in Hugging Face's layout, with config.json and model.safetensors",
        ));
    }
    if let Some(error) = names.iter().find_map(|name| other_format(&dir.path().join(name))) {
        return Ok(error);
    }
    // A repository of several models, or one directory too high.
    let inner = names.iter().find(|name| dir.path().join(name).join("config.json").is_file());
    let hint = inner.map(|name| format!("; there is one in {}", dir.path().join(name).display())).unwrap_or_default();
    Ok(Error::file(
        dir.path().join("config.json"),
        format!("missing; expected a model directory as the hub has it{hint}"),
    ))
}

/// The error for a directory whose weights are none of the files that are `expected`; says what is there instead.
pub(super) fn no_weights(dir: &ModelDir, expected: &str) -> Result<Error> {
    let names = dir.names()?;
    let found: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    if found.is_empty()
        && let Some(error) = names.iter().find_map(|name| other_format(&dir.path().join(name)))
    {
        return Ok(error);
    }
    Ok(Error::file(dir.path(), format!("no weights: expected {expected}{}", there_is(&found))))
}

/// Names of weight files in words, to end a sentence about those that are missing.
pub(super) fn there_is(names: &[&String]) -> String {
    match names {
        [] => String::new(),
        [one] => format!("; there is {one}, which that does not name"),
        [first, .., last] => {
            format!("; there are {} files from {first} to {last}, which that does not name", names.len())
        }
    }
}

//! Directories and files that are no models as this crate reads them: the error says what is there and what to do.

use std::fs;

use lowbit::checkpoint::{Checkpoint, hub};
use lowbit::error::Error;
use serde_json::{Value, json};

use super::build::{Build, assert_error, config, gptq};

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n";

fn plain() -> Build {
    Build::new(Value::Null).tensor("m.weight", "BF16", &[32, 64], &[0x80, 0x3f])
}

#[test]
fn pointers_and_web_pages_are_told_from_content() {
    let build = plain();
    build.write();
    let put = |name: &str, text: &str| fs::write(build.dir.path().join(name), text).unwrap();
    put("model.safetensors", POINTER);
    assert_error(Checkpoint::open(build.dir.path()), &["model.safetensors", "git lfs pull"]);
    put("model.safetensors", "<!DOCTYPE html><html>");
    assert_error(Checkpoint::open(build.dir.path()), &["model.safetensors", "web page"]);
    put("config.json", POINTER);
    assert_error(Checkpoint::open(build.dir.path()), &["config.json", "git lfs pull"]);
    let tokenizer = |text: &str| {
        put("tokenizer.json", text);
        lowbit::text::Tokenizer::load(build.dir.path(), 16)
    };
    assert_error(tokenizer(POINTER), &["tokenizer.json", "git lfs pull"]);
    assert_error(tokenizer("<html></html>"), &["tokenizer.json", "web page"]);
}

#[test]
fn other_formats_are_named() {
    let cases: [(&[&str], bool, &[&str]); 9] = [
        (&["model-q4_0.gguf"], true, &["model-q4_0.gguf", "GGUF", "safetensors"]),
        (&["model-q4_0.gguf"], false, &["model-q4_0.gguf", "GGUF"]),
        (&["pytorch_model.bin"], true, &["pytorch_model.bin", "pickle", "safe_serialization"]),
        (&["model.onnx"], true, &["model.onnx", "ONNX"]),
        (&["rank0.engine"], true, &["rank0.engine", "TensorRT"]),
        (&["adapter_config.json", "adapter_model.safetensors"], false, &["adapter", "merge_and_unload"]),
        (&["params.json", "consolidated.safetensors"], false, &["params.json", "Hugging Face's layout"]),
        (&["model_index.json"], false, &["diffusers"]),
        (&["consolidated.safetensors"], true, &["no weights", "there is consolidated.safetensors"]),
    ];
    for (names, with_config, parts) in cases {
        let dir = tempfile::tempdir().unwrap();
        names.iter().for_each(|name| fs::write(dir.path().join(name), "x").unwrap());
        if with_config {
            fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
        }
        assert_error(Checkpoint::open(dir.path()), parts);
    }
    // One directory too high.
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("inner")).unwrap();
    fs::write(dir.path().join("inner/config.json"), "{}").unwrap();
    assert_error(Checkpoint::open(dir.path()), &["config.json", "missing", "inner"]);
    let mlx = Build::new(json!({"group_size": 64, "bits": 4}));
    assert_error(mlx.open(), &["quantization_config", "MLX"]);
}

#[test]
fn a_file_given_as_model_is_told_what_it_is() {
    let build = plain();
    let dir = build.write();
    let resolve = |name: &str| hub::resolve(dir.join(name).to_str().unwrap());
    let error = assert_error(
        resolve("model.safetensors"),
        &["weights of a model", "give the directory", dir.to_str().unwrap()],
    );
    assert!(matches!(error, Error::Checkpoint { .. }));
    assert_error(resolve("config.json"), &["a file", "give the directory"]);
    // By its content, whatever its name.
    fs::write(dir.join("model"), b"GGUF\0\0\0\0").unwrap();
    assert!(matches!(assert_error(resolve("model"), &["GGUF"]), Error::Unsupported { .. }));
    fs::write(dir.join("model.tar.gz"), b"x").unwrap();
    assert_error(resolve("model.tar.gz"), &["an archive"]);
    assert_eq!(hub::resolve(dir.to_str().unwrap()).unwrap(), dir);
}

#[test]
fn other_names_of_tensors_are_told() {
    let check = |name: &str| {
        let build = Build::new(Value::Null).tensor(name, "BF16", &[16, 64], &[0]);
        let checkpoint = build.open().unwrap();
        assert_error(checkpoint.check(&lowbit::models::expected_tensors(checkpoint.config())), &[name]).to_string()
    };
    for (name, part) in [
        ("tok_embeddings.weight", "its maker's own names"),
        ("token_embd.weight", "GGUF's names"),
        ("transformer.wte.weight", "GPT-2"),
        ("language_model.model.embed_tokens.weight", "the prefix `language_model.`"),
        ("base_model.model.model.embed_tokens.weight", "merge it"),
        ("embed_tokens.weight", "no prefix `model.`"),
    ] {
        let text = check(name);
        assert!(text.contains(part), "{text}");
    }
}

/// What a download or a conversion leaves behind.
#[test]
fn a_stale_index_does_not_hide_the_weights() {
    let index = |file: &str| json!({"metadata": {}, "weight_map": {"m.weight": file, "n.weight": file}}).to_string();
    let stale = plain().file("model.safetensors.index.json", &index("model-00001-of-00002.safetensors"));
    assert!(stale.open().unwrap().has("m.weight"), "one file comes first, as in transformers");
    let dir = stale.dir.path();
    fs::rename(dir.join("model.safetensors"), dir.join("model-00001-of-00003.safetensors")).unwrap();
    assert_error(
        Checkpoint::open(dir),
        &["model-00001-of-00002.safetensors", "missing", "there is model-00001-of-00003.safetensors"],
    );
}

#[test]
fn byte_order_marks_and_line_ends_change_nothing() {
    let build = plain();
    build.write();
    for name in ["config.json", "generation_config.json"] {
        let text = if name == "config.json" {
            serde_json::to_string_pretty(&build.config).unwrap()
        } else {
            "{\n\"top_k\": 3\n}".into()
        };
        fs::write(build.dir.path().join(name), format!("\u{feff}{}", text.replace('\n', "\r\n"))).unwrap();
    }
    let checkpoint = Checkpoint::open(build.dir.path()).unwrap();
    assert_eq!(checkpoint.generation().top_k, Some(3));
    assert_eq!(checkpoint.raw_config().unwrap()["vocab_size"], 16);
}

#[test]
fn weights_that_are_not_finite_are_found() {
    let nan = [0x80, 0x3f, 0xc0, 0x7f]; // 1, NaN, ...
    let dense = Build::new(Value::Null).tensor("m.weight", "BF16", &[32, 64], &nan);
    assert_error(dense.open().unwrap().linear("m"), &["model.safetensors", "`m.weight`", "[0, 1]", "NaN", "finite"]);
    let bias = plain().tensor("m.bias", "F32", &[32], &f32::INFINITY.to_le_bytes());
    assert_error(bias.open().unwrap().linear("m"), &["`m.bias`", "element 0 is inf"]);
    let norm = plain().tensor("model.norm.weight", "F16", &[64], &[0x00, 0xfc]);
    assert_error(norm.open().unwrap().tensor("model.norm.weight"), &["`model.norm.weight`", "-inf"]);
    let scales = gptq().tensor("m.scales", "F16", &[2, 32], &[0x00, 0x7e]);
    assert_error(scales.open().unwrap().linear("m"), &["`m.scales`", "NaN"]);
}

//! Broken and malicious shards and indexes: an error that names file, tensor and reason, quickly, and no panic.

use std::fs;
use std::path::Path;

use lowbit::checkpoint::{Checkpoint, Expected};
use lowbit::error::Error;
use serde_json::{Value, json};

use super::build::{Build, assert_error, config, ct_packed, gptq, safetensors};

/// Opens a directory with a good configuration and `bytes` as its weights.
fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path())
}

#[test]
fn safetensors_files_are_checked() {
    let huge_header = [&(200u64 << 20).to_le_bytes()[..], b"{}"].concat();
    let raw: [(&[u8], &str); 9] = [
        (b"", "too short"),
        (b"\x02\0\0", "too short"),
        (b"\0\0\0\0\0\0\0\0", "header length 0"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "header length 18446744073709551615"),
        (b"\x40\0\0\0\0\0\0\0{}", "header length 64"),
        (&huge_header, "header length 209715200"),
        (b"\x02\0\0\0\0\0\0\0\xff\xfe", "not UTF-8"),
        (b"<html><head>Not found</head></html>", "a web page"),
        (b"what is this file doing in a model directory", "not a safetensors file, or truncated"),
    ];
    for (bytes, reason) in raw {
        assert_error(open_bytes(bytes), &["model.safetensors", reason]);
    }

    let a = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let headers: [(String, usize, &[&str]); 21] = [
        ("[]".into(), 0, &["JSON object"]),
        ("{\"a\":".into(), 0, &["not valid JSON"]),
        ("[".repeat(100_000), 0, &["not valid JSON", "recursion limit"]),
        (format!(r#"{{"a":{a},"a":{a}}}"#), 8, &["duplicate key `a`"]),
        (format!(r#"{{"a":{a},"b":{a}}}"#), 8, &["gap or overlap"]),
        (format!(r#"{{"a":{a},"b":{{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}}}"#), 20, &["`b`"]),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#.into(), 8, &["`a`", "bytes 8 to 0"]),
        (format!(r#"{{"a":{a}}}"#), 4, &["`a`", "truncated"]),
        (format!(r#"{{"a":{a}}}"#), 12, &["fill the file"]),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#.into(),
            8,
            &["`a`", "truncated"],
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#.into(),
            0,
            &["`a`", "overflows"],
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}"#.into(),
            0,
            &["`a`", "overflows"],
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#.into(),
            8,
            &["`a`", "8 bytes for F32 [3], which takes 12"],
        ),
        (r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,8]}}"#.into(), 8, &["`a`", "takes 4"]),
        (r#"{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}"#.into(), 8, &["`a`", "dtype \"X9\""]),
        (r#"{"a":{"shape":[2],"data_offsets":[0,8]}}"#.into(), 8, &["`a`", "dtype null"]),
        (r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#.into(), 8, &["`a`", "shape"]),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}"#.into(), 8, &["`a`", "data_offsets"]),
        (r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}}"#.into(), 8, &["`a`", "rank 9"]),
        (r#"{"a":7}"#.into(), 0, &["`a`", "shape"]),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8.5]}}"#.into(), 8, &["`a`", "data_offsets"]),
    ];
    for (header, data, parts) in headers {
        assert_error(open_bytes(&safetensors(&header, &vec![0; data])), &[&["model.safetensors"], parts].concat());
    }
    // Empty tensors are legal; a layer of size zero is not.
    let empty = r#"{"m.weight":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}}"#;
    assert_error(open_bytes(&safetensors(empty, &[])).unwrap().linear("m"), &["m.weight", "[0, 4]", "matrix"]);
}

/// A directory with an index and the files given.
fn open_index(index: &Value, files: &[(&str, &[u8])]) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    Checkpoint::open(dir.path())
}

#[test]
fn indexes_are_checked() {
    let shard = |name: &str| {
        safetensors(&format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#), &[0; 4])
    };
    let map = |map: Value| json!({"weight_map": map});
    let (one, two) = (shard("a"), shard("b"));
    let files: &[(&str, &[u8])] = &[("1.safetensors", &one), ("2.safetensors", &two)];
    let good = map(json!({"a": "1.safetensors", "b": "2.safetensors"}));
    assert!(open_index(&good, files).unwrap().has("b"));

    assert_error(open_index(&good, &files[..1]), &["2.safetensors", "missing", "1 tensors"]);
    assert_error(open_index(&map(json!({"b": "1.safetensors"})), files), &["1.safetensors", "`b`", "not in this file"]);
    for escape in ["../1.safetensors", "/etc/x.safetensors", "./../1.safetensors", "sub/../../1.safetensors"] {
        assert_error(open_index(&map(json!({"a": escape})), files), &[escape, "out of the model directory"]);
    }
    assert_error(
        open_index(&map(json!({"a": "pytorch_model.bin"})), files),
        &["pytorch_model.bin", "not a safetensors file"],
    );
    assert_error(open_index(&map(json!({"a": 7})), files), &["weight_map.a", "string"]);
    assert_error(open_index(&map(json!({"a": null})), files), &["weight_map.a", "null"]);
    assert_error(open_index(&map(json!({})), files), &["weight_map", "0 files"]);
    assert_error(open_index(&json!({"metadata": {}}), files), &["index.json", "weight_map", "missing"]);
    let truncated = &one[..one.len() - 2];
    assert_error(open_index(&good, &[files[1], ("1.safetensors", truncated)]), &["1.safetensors", "`a`", "truncated"]);
    // The same tensor in both shards.
    assert_error(open_index(&good, &[files[0], ("2.safetensors", &one)]), &["2.safetensors", "`a`", "also in"]);
}

#[cfg(unix)]
#[test]
fn symlinks_may_lead_into_the_hub_cache_only() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    let source = gptq();
    let weights = source.write().join("model.safetensors");
    fs::copy(&weights, outside.path().join("w")).unwrap();

    let direct = gptq();
    direct.write();
    let link = direct.dir.path().join("model.safetensors");
    fs::remove_file(&link).unwrap();
    symlink(outside.path().join("w"), &link).unwrap();
    assert_error(Checkpoint::open(direct.dir.path()), &["model.safetensors", "symlink", "outside"]);
    fs::remove_file(outside.path().join("w")).unwrap();
    assert_error(Checkpoint::open(direct.dir.path()), &["model.safetensors"]);

    // As huggingface_hub lays out its cache.
    let repo = outside.path().join("models--org--name");
    let snapshot = repo.join("snapshots/0123abc");
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(source.dir.path().join(name), repo.join("blobs").join(name)).unwrap();
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    Checkpoint::open(&snapshot).unwrap().linear("m").unwrap();
    fs::copy(source.dir.path().join("config.json"), outside.path().join("stray")).unwrap();
    symlink("../../../stray", snapshot.join("generation_config.json")).unwrap();
    assert_error(Checkpoint::open(&snapshot), &["generation_config.json", "outside"]);
}

#[test]
fn pickles_and_foreign_weights_are_refused_by_name() {
    for name in ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pkl"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
        fs::write(dir.path().join(name), b"\x80\x02").unwrap();
        let error = assert_error(Checkpoint::open(dir.path()), &[name, "pickle", "safetensors"]);
        assert_eq!(error.exit_code(), 5);
    }
    let dir = tempfile::tempdir().unwrap();
    assert_error(Checkpoint::open(&dir.path().join("nowhere")), &["nowhere"]);
    assert_error(Checkpoint::open(dir.path()), &["config.json", "missing"]);
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    fs::write(dir.path().join("model.gguf"), b"GGUF").unwrap();
    assert_error(Checkpoint::open(dir.path()), &["model.gguf", "a GGUF file"]);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_error(Checkpoint::open(dir.path()), &["model.safetensors", "not a regular file"]);
}

#[test]
fn a_huge_configuration_is_not_read() {
    let build = gptq();
    build.write();
    let file = fs::OpenOptions::new().write(true).open(build.dir.path().join("config.json")).unwrap();
    file.set_len(1 << 30).unwrap(); // sparse
    assert_error(Checkpoint::open(build.dir.path()), &["config.json", "larger than"]);
}

#[test]
fn one_report_lists_everything() {
    let build = ct_packed()
        .tensor("norm.weight", "F32", &[3], &[0])
        .tensor("ids.weight", "I32", &[4], &[0])
        .tensor("m.extra", "F32", &[1], &[0])
        .tensor("m.weight_scale", "F64", &[5, 2], &[0]);
    let tensor = |name: &str, shape: &[usize]| Expected::Tensor { name: name.into(), shape: shape.into() };
    let linear = |name: &str, bias| Expected::Linear { name: name.into(), n: 32, k: 96, bias };
    let expected = [
        tensor("norm.weight", &[4]),
        tensor("ids.weight", &[4]),
        tensor("gone", &[1]),
        linear("m", true),
        linear("absent", false),
    ];
    assert_error(
        build.open().unwrap().check(&expected),
        &[
            "9 problems",
            "`norm.weight`: has shape [3]; expected [4]",
            "`ids.weight`: is I32; expected F16, BF16 or F32",
            "`gone`: missing; expected [1]",
            "`m.weight_scale`: is F64; expected F16 or BF16 or F32",
            "`m.weight_scale`: has shape [5, 2]; expected [32, 2]",
            "`m`: [32, 64]; the model's shape makes it [32, 96]",
            "`m.bias`: missing; expected [32]",
            "`absent.weight_packed`: missing",
            "`m.extra`: not understood",
        ],
    );
    // Bounded, however much is wrong.
    let many: Vec<Expected> = (0..5000).map(|i| tensor(&format!("t{i}"), &[1])).collect();
    let text = assert_error(build.open().unwrap().check(&many), &["5000 problems", "and 4960 more"]).to_string();
    assert!(text.len() < 10_000, "{} bytes", text.len());
}

#[test]
fn tensors_that_nothing_reads_are_told() {
    let build = gptq()
        .tensor("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[2], &[0])
        .tensor("model.layers.0.self_attn.k_scale", "F32", &[1], &[0])
        .tensor("model.extra", "F32", &[1], &[0]);
    let notes = build.load().unwrap().join("\n");
    let parts = ["rotary_emb.inv_freq: not used", "KV cache: not used", "1 tensors not used", "model.extra"];
    for part in parts {
        assert!(notes.contains(part), "{notes}");
    }
}

#[test]
fn an_unquantized_model_wants_plain_weights() {
    let plain = || Build::new(Value::Null).tensor("m.weight", "BF16", &[32, 64], &[0x80, 0x3f]);
    assert!(plain().load().unwrap().is_empty());
    assert_error(
        plain().tensor("m.weight", "F8_E4M3", &[32, 64], &[0]).load(),
        &["m.weight", "F8_E4M3", "expected F16"],
    );
    assert_error(plain().tensor("m.weight", "F16", &[64], &[0]).load(), &["m.weight", "[64]", "matrix"]);
    assert_error(plain().tensor("m.weight_scale", "F32", &[1], &[0]).load(), &["m.weight_scale", "not quantized"]);
    assert_error(plain().tensor("m.bias", "F32", &[31], &[0]).load(), &["m.bias", "[31]", "[32]"]);
}

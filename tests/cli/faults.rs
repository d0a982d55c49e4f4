//! What people meet with files and commands of other programs' making: values of flags, refused runs, pipes.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::quantize::small;
use super::{DEMO, Run, command, finish, lowbit};

fn copy_of_small() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(small()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn assert_refused(run: &Run, code: i32, parts: &[&str]) {
    assert_eq!(run.code, Some(code), "{}", run.stderr);
    parts.iter().for_each(|part| assert!(run.stderr.contains(part), "`{part}`: {}", run.stderr));
}

#[test]
fn negative_numbers_are_values() {
    let generate = |rest: &[&str]| lowbit(&[&["generate", "-m", DEMO, "-p", "It was", "-n", "2"], rest].concat());
    assert_eq!(generate(&["--top-k", "-1"]).code, Some(0));
    assert_eq!(generate(&["--presence-penalty", "-1"]).code, Some(0));
    for (flag, said) in [
        ("--seed", "--seed"),
        ("--temperature", "temperature"),
        ("--repetition-penalty", "repetition_penalty"),
        ("--min-p", "min_p"),
        ("--min-tokens", "--min-tokens"),
        ("--max-model-len", "--max-model-len"),
        ("--threads", "--threads"),
    ] {
        assert_refused(&generate(&[flag, "-1"]), 2, &[said, "-1"]);
    }
    assert_refused(&generate(&["--json", "--logprobs", "-1"]), 2, &["--logprobs", "-1"]);
    assert_refused(&lowbit(&["quantize", "a", "b", "--samples", "-1"]), 2, &["--samples", "-1"]);
    assert_refused(&generate(&["-1"]), 2, &["unexpected argument"]);
}

#[test]
fn a_chat_on_a_pipe_tells_of_refusals() {
    let chat = |input: &[u8], rest: &[&str]| finish(command(&[&["chat", "-m", DEMO], rest].concat()), input);
    assert_refused(&chat(b"hello there\n", &["--max-model-len", "2"]), 2, &["conversation"]);
    assert_eq!(chat(b"hello\n", &["-n", "1"]).code, Some(0));
    assert_eq!(chat(b"", &[]).code, Some(0));
}

#[test]
fn a_refused_run_leaves_nothing_and_its_retry_works() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    let quantize = |source: &Path, rest: &[&str]| {
        lowbit(&[&["quantize", source.to_str().unwrap(), dst.to_str().unwrap()], rest].concat())
    };
    let left = || fs::read_dir(dir.path()).unwrap().count();
    let hqq = ["--method", "hqq", "--scheme", "w4a16", "--group-size"];
    assert_refused(&quantize(small(), &[&hqq[..], &["192"]].concat()), 5, &["q_proj", "256 inputs in groups of 192"]);
    assert_eq!(left(), 0);
    let awq = ["--method", "rtn", "--mapping", "asymmetric", "--format", "awq", "--group-size", "192"];
    assert_refused(&quantize(small(), &awq), 5, &["q_proj", "256 inputs in groups of 192", "awq", "--group-size"]);
    assert_eq!(left(), 0);
    // Quantized already.
    assert_refused(&quantize(Path::new(DEMO), &["--method", "rtn"]), 5, &["quantized already"]);
    assert_eq!(left(), 0);
    assert_eq!(quantize(small(), &[&hqq[..], &["64"]].concat()).code, Some(0));
    assert_eq!(left(), 1);
}

#[test]
fn weights_that_are_not_finite_are_told_by_every_verb() {
    let dir = copy_of_small();
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    let size = tensor.data().len() / tensor.shape().iter().product::<usize>();
    let at = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize + (3 * tensor.shape()[1] + 5) * size;
    let nan: &[u8] = if size == 4 { &[0, 0, 0xc0, 0x7f] } else { &[0xff, 0x7f] };
    bytes[at..at + size].copy_from_slice(nan);
    fs::write(&path, bytes).unwrap();
    let model = dir.path().to_str().unwrap();
    let dst = tempfile::tempdir().unwrap();
    let out = dst.path().join("out");
    let text = dst.path().join("text.txt");
    fs::write(&text, "It was a dark night. ".repeat(40)).unwrap();
    let verbs: [&[&str]; 3] = [
        &["generate", "-m", model, "-p", "It was", "-n", "2"],
        &["eval", model, "--text", text.to_str().unwrap(), "--context", "16"],
        &["quantize", model, out.to_str().unwrap(), "--method", "rtn"],
    ];
    for verb in verbs {
        assert_refused(&lowbit(verb), 4, &["model.safetensors", &format!("`{name}`"), "element [3, 5] is NaN"]);
    }
    assert!(!out.exists() && !dst.path().join("out.partial").exists());
}

#[test]
fn a_quantized_model_gets_what_holds_for_it_alone() {
    let dir = copy_of_small();
    for name in ["golden.json", "results.txt", "LICENSE", "training_args.bin", "merges.txt"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    fs::write(dir.path().join("README.md"), "---\nlicense: mit\n---\n# A model\n").unwrap();
    let dst = tempfile::tempdir().unwrap();
    let out = dst.path().join("out");
    let run = lowbit(&["quantize", dir.path().to_str().unwrap(), out.to_str().unwrap(), "--method", "rtn"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let has = |name: &str| out.join(name).exists();
    assert!(
        ["LICENSE", "merges.txt", "tokenizer.json", "tokenizer_config.json", "README.md"].iter().all(|name| has(name))
    );
    assert!(!["golden.json", "results.txt", "training_args.bin"].iter().any(|name| has(name)));
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\nlicense: mit\n---\n\n> Quantized by lowbit"), "{card}");
    assert!(card.contains("w4a16 g128 sym") && card.ends_with("# A model\n"), "{card}");
}

#[test]
fn generation_config_is_honoured_and_what_is_not_is_named() {
    let dir = copy_of_small();
    let generate = |config: Value, rest: &[&str]| {
        fs::write(dir.path().join("generation_config.json"), config.to_string()).unwrap();
        let model = dir.path().to_str().unwrap();
        lowbit(&[&["generate", "-m", model, "-p", "It was a dark night", "--json"], rest].concat())
    };
    let ids = |run: &Run| run.json()["token_ids"].as_array().unwrap().clone();
    let plain = ids(&generate(json!({"do_sample": false, "max_new_tokens": 3}), &[]));
    assert_eq!(plain.len(), 3);
    let other = ids(&generate(json!({"do_sample": false, "max_new_tokens": 2, "suppress_tokens": [plain[0]]}), &[]));
    assert!(other.len() == 2 && other[0] != plain[0]);
    let text = generate(json!({"do_sample": false, "max_new_tokens": 3, "bad_words_ids": [[plain[0], plain[1]]]}), &[]);
    assert!(ids(&text)[0] == plain[0] && ids(&text)[1] != plain[1]);
    // A flag goes before, and `none` leaves them out.
    let config = json!({"do_sample": false, "max_new_tokens": 3, "suppress_tokens": [plain[0]], "num_beams": 4});
    assert_eq!(ids(&generate(config.clone(), &["-n", "1"])).len(), 1);
    let none = generate(config.clone(), &["--generation-config", "none", "--temperature", "0", "-n", "3"]);
    assert_eq!(ids(&none), plain);
    let run = generate(config, &[]);
    assert!(run.stderr.contains("generation_config.json: `num_beams`: not used"), "{}", run.stderr);
}

//! Bad input: the exit code says who must act, the message what to do; nothing panics.

use super::{DEMO, command, finish, lowbit};

/// Arguments, exit code, and what the message must say.
type Case<'a> = (&'a [&'a str], i32, &'a [&'a str]);

#[test]
fn exit_codes_and_messages() {
    let generate = ["generate", "-m", DEMO, "--device", "cpu", "-p", "It was"];
    let with = |extra: &[&'static str]| [&generate[..], extra].concat();
    let long = "the old man ".repeat(1500);
    let long = ["generate", "-m", DEMO, "--device", "cpu", "-p", &long];
    let text = "tests/fixtures/books-eval-64.txt";
    let cases: &[Case<'_>] = &[
        (&[], 2, &["Usage"]),
        (&["frobnicate"], 2, &["frobnicate"]),
        (&["generate", "-p", "x"], 2, &["--model", "assets/books-6m-gptq"]),
        (&["generate", "-m", "", "-p", "x"], 2, &["--model"]),
        (&["generate", "-m", "no/such/directory", "-p", "x"], 8, &["no/such/directory"]),
        (&["generate", "-m", "tests", "-p", "x"], 4, &["tests/config.json"]),
        (&["generate", "-m", "src/lib.rs", "-p", "x"], 4, &["src/lib.rs", "a model is a directory"]),
        (&["generate", "-m", DEMO, "-p", ""], 2, &["--prompt", "empty"]),
        (&["generate", "-m", DEMO, "-f", "no-such-file"], 3, &["no-such-file"]),
        (&["generate", "-m", DEMO, "-p", "x", "-f", "y"], 2, &["cannot be used with"]),
        (&long, 2, &["--prompt", "2048", "--max-model-len"]),
        (&with(&["-n", "0"]), 2, &["--max-tokens", "1 to 2046"]),
        (&with(&["-n", "2047"]), 2, &["--max-tokens", "1 to 2046"]),
        (&with(&["-n", "-1"]), 2, &["-1"]),
        (&with(&["-n", "99999999999999999999999"]), 2, &["99999"]),
        (&with(&["--max-model-len", "2"]), 2, &["--prompt", "context of 2"]),
        (&with(&["--max-model-len", "4294967295", "-n", "4294967000"]), 6, &["out of memory", "--max-model-len"]),
        (&with(&["--temperature", "-1"]), 2, &["-1"]),
        (&with(&["--temperature", "nan"]), 2, &["temperature"]),
        (&with(&["--top-p", "0"]), 2, &["top_p"]),
        (&with(&["--logit-bias", "4096=1"]), 2, &["logit_bias", "4096"]),
        (&with(&["--logit-bias", "x"]), 2, &["42=-5"]),
        (&with(&["--logit-bias", "-1=1"]), 2, &["-1=1", "42=-5"]),
        (&with(&["--stop", ""]), 2, &["stop"]),
        (&with(&["--logprobs", "3"]), 2, &["--json"]),
        (&with(&["--dtype", "f64"]), 2, &["f16 or bf16"]),
        (&with(&["--lm-head", "w5a16"]), 2, &["--lm-head", "w8a16 or w4a16"]),
        (&["plan", DEMO, "--lm-head", "int8"], 2, &["w8a16 or w4a16"]),
        (&with(&["--threads", "0"]), 2, &["--threads"]),
        (&["generate", "-m", DEMO, "-p", "x", "--device", "tpu"], 2, &["auto, cpu, cuda"]),
        (&["eval", DEMO, "--text", "no-such-file"], 3, &["no-such-file"]),
        (&["eval", DEMO, "--text", "assets/books-6m-gptq/model.safetensors"], 3, &["UTF-8"]),
        (&["eval", DEMO, "--text", "rustfmt.toml"], 2, &["--text", "--context"]),
        (&["eval", DEMO, "--text", text, "--context", "1"], 2, &["--context"]),
        (&["eval", DEMO, "--text", text, "--context", "2049"], 2, &["--context", "2048"]),
        (&["eval", DEMO, "--text", text, "--windows", "0"], 2, &["--windows"]),
        (&["inspect", "nowhere/at-all"], 8, &["nowhere/at-all"]),
        (&["bench"], 2, &["Usage"]),
        (&["bench", "--dummy", "llama-9000b"], 2, &["--dummy", "llama-1.1b"]),
        (&["bench", "--dummy", "llama-1.1b", "--scheme", "w9a16"], 2, &["--scheme"]),
        (&["bench", DEMO, "-p", "0", "-n", "0"], 2, &["nothing to test"]),
        (&["bench", DEMO, "-p", "2049"], 2, &["2048"]),
        (&["bench", DEMO, "-b", "0"], 2, &["--batch"]),
        (&["bench", DEMO, "-d", "18446744073709551615", "-n", "1"], 2, &["--batch"]),
        (&["bench", DEMO, "kernels"], 2, &["kernels"]),
        (&["bench", "kernels", "--op", "w9a9"], 2, &["w9a9", "w8a8", "attention"]),
        (&["bench", "kernels", "--shapes", "4096"], 2, &["4096", "NxK"]),
        (&["bench", "kernels", "--shapes", "4096x0"], 2, &["4096x0"]),
        (&["bench", "kernels", "--rows", "0"], 2, &["--rows"]),
        (&["bench", "kernels", "--from", "no-such-file"], 3, &["no-such-file"]),
        (&["bench", "kernels", "--from", "rustfmt.toml"], 4, &["rustfmt.toml", "--json"]),
        (&["bench", "kernels", "--from", "x.json", "--op", "w8a8"], 2, &["cannot be used with"]),
        (&["bench", "kernels", "--plot", "rustfmt.toml"], 3, &["rustfmt.toml"]),
        (&["bench", "kernels", "--device", "cpu"], 2, &["--device", "lowbit bench MODEL"]),
    ];
    for (args, code, needles) in cases {
        let run = lowbit(args);
        let shown: String = args.join(" ").chars().take(120).collect();
        assert_eq!(run.code, Some(*code), "{shown}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{shown}: {}", run.stdout);
        for needle in *needles {
            assert!(run.stderr.contains(needle), "{shown}: `{needle}` is not in: {}", run.stderr);
        }
    }
}

/// Without a driver or without kernels, and where there is one a GPU that does not exist: an error with a way out.
#[test]
fn no_such_gpu() {
    for args in
        [&["generate", "-m", DEMO, "-p", "x", "--device", "cuda:99"][..], &["bench", "kernels", "--device", "cuda:99"]]
    {
        let run = lowbit(args);
        assert!(matches!(run.code, Some(5 | 7)), "{:?}: {}", run.code, run.stderr);
        assert!(run.stderr.starts_with("error: "), "{}", run.stderr);
    }
}

/// A template must be there to chat.
#[test]
fn chat_without_a_template() {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "quantize_config.json"]
    {
        std::fs::copy(format!("{DEMO}/{name}"), dir.path().join(name)).expect("copied");
    }
    let run = lowbit(&["chat", "-m", dir.path().to_str().expect("UTF-8"), "--device", "cpu"]);
    assert_eq!(run.code, Some(5), "{}", run.stderr);
    assert!(run.stderr.contains("no chat template") && run.stderr.contains("lowbit generate"), "{}", run.stderr);
}

/// Bad values in the environment are errors like those of flags.
#[test]
fn environment_twins_are_checked() {
    for (name, value) in [("LOWBIT_DEVICE", "tpu"), ("LOWBIT_TEMPERATURE", "warm"), ("LOWBIT_THREADS", "0")] {
        let mut command = command(&["generate", "-m", DEMO, "-p", "x"]);
        command.env(name, value);
        let run = finish(command, b"");
        assert_eq!(run.code, Some(2), "{name}: {}", run.stderr);
        assert!(run.stderr.contains(value), "{name}: {}", run.stderr);
    }
}

/// The demo with a last norm beyond all bounds: no logit is a number.
fn demo_that_overflows() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for entry in std::fs::read_dir(DEMO).expect("the demo") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, dir.path().join(path.file_name().expect("a name"))).expect("copied");
    }
    let file = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("read");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let offset = |i: usize| tensors["model.norm.weight"]["data_offsets"][i].as_u64().expect("an offset") as usize;
    let norm = &mut bytes[8 + header + offset(0)..8 + header + offset(1)];
    // The largest number of bf16: finite, as every weight is, and times anything above 1 none.
    norm.as_chunks_mut::<2>().0.fill(0x7f7f_u16.to_le_bytes());
    std::fs::write(&file, bytes).expect("written");
    dir
}

/// A model that computes NaN is at fault, not who asks it: greedily or not, in every verb.
#[test]
fn logits_that_are_no_numbers() {
    let dir = demo_that_overflows();
    let model = dir.path().to_str().expect("UTF-8");
    let text = "tests/fixtures/books-eval-64.txt";
    let generate = ["generate", "-m", model, "--device", "cpu", "-p", "It was", "-n", "4"];
    let cases: [(&str, Vec<&str>); 5] = [
        ("logits", [&generate[..], &["--temperature", "0"]].concat()),
        ("logits", [&generate[..], &["--temperature", "1"]].concat()),
        ("logits", vec!["chat", "-m", model, "--device", "cpu", "--temperature", "0"]),
        ("log-probabilities", vec!["eval", model, "--device", "cpu", "--text", text, "--context", "32"]),
        (
            "logits",
            vec![
                "eval",
                model,
                "--device",
                "cpu",
                "--text",
                text,
                "--context",
                "32",
                "--reference",
                model,
                "--generate",
                "4",
                "--prompts",
                text,
            ],
        ),
    ];
    for (what, args) in cases {
        let run = finish(command(&args), b"It was\n");
        assert!(
            ["NaN", "inf"].iter().any(|x| run.stderr.contains(x)) && run.stderr.contains("expected finite numbers"),
            "{args:?}: {}",
            run.stderr
        );
        assert!(run.stderr.contains(what) || args[0] == "eval", "{args:?}: {}", run.stderr);
        assert_eq!(run.code, Some(7), "{args:?}: {}", run.stderr);
    }
}

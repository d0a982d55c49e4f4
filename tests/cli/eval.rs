//! `eval`: against independent implementations, against itself, and what it says of bad input.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde_json::{Value, json};

use super::{DEMO, lowbit};
use crate::common::fixtures::fixture;

const TEXT: &str = "tests/fixtures/books-eval-64.txt";

fn eval(context: &str, windows: &str, extra: &[&str]) -> serde_json::Value {
    let args = ["eval", DEMO, "--text", TEXT, "--context", context, "--windows", windows, "--device", "cpu", "--json"];
    lowbit(&[&args, extra].concat()).json()
}

/// The means and standard errors are those of a Llama in float64 by numpy, on weights it dequantized itself; the CPU
/// rounds activations to 16 bits.
#[test]
fn equals_an_independent_implementation() {
    for (context, windows, tokens, nll, stderr) in
        [("128", "4", 508, 3.165_491_399_677, 0.113_243_558), ("33", "3", 96, 3.444_131_592_400, 0.262_723_100)]
    {
        let got = eval(context, windows, &[]);
        let number = |field: &str| got[field].as_f64().expect("a number");
        assert!((number("nll") - nll).abs() < 1e-3, "{got}");
        assert!((number("nll_stderr") - stderr).abs() < 1e-3, "{got}");
        assert!((number("perplexity") / nll.exp() - 1.0).abs() < 1e-3, "{got}");
        assert_eq!((&got["tokens"], &got["context"]), (&tokens.into(), &context.parse::<u64>().unwrap().into()));
    }
}

#[test]
fn windows_do_not_depend_on_their_batch() {
    let nll = |batch: &str| eval("33", "3", &["--batch", batch])["nll"].as_f64().expect("a number");
    assert!((nll("1") - nll("2")).abs() < 1e-5);
    assert!((nll("1") - nll("1000")).abs() < 1e-5);
}

/// A model has no divergence from itself, and the sums of the reference are its own.
#[test]
fn compared_with_itself() {
    let got = eval("33", "3", &["--reference", DEMO]);
    assert_eq!((&got["kld"]["mean"], &got["kld"]["top1_agreement"]), (&0.0.into(), &1.0.into()));
    let (own, reference) = (got["perplexity"].as_f64().unwrap(), got["kld"]["reference_perplexity"].as_f64().unwrap());
    assert!((own - reference).abs() < 1e-5);
}

/// The demo's head, 4096 x 256, in fewer bits: what that does to the predictions.
#[test]
fn a_rounded_head() {
    let exact = eval("128", "4", &["--reference", DEMO]);
    for (scheme, most, of_perplexity) in [("w8a16", 1e-4, 2e-3), ("w4a16", 0.03, 0.06)] {
        let got = eval("128", "4", &["--reference", DEMO, "--lm-head", scheme]);
        let kld = got["kld"]["mean"].as_f64().unwrap();
        assert!(kld > 0.0 && kld < most, "{scheme}: {kld}");
        let ratio = got["perplexity"].as_f64().unwrap() / exact["perplexity"].as_f64().unwrap();
        assert!((ratio - 1.0).abs() < of_perplexity, "{scheme}: {ratio}");
    }
}

/// The demo with the scales of one module doubled.
fn damaged(dir: &Path, module: &str) {
    let bytes = fs::read(Path::new(DEMO).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = format!("{module}.scales");
    let scales = file.tensor(&name).unwrap();
    // f16: one more in the exponent.
    let doubled: Vec<u8> = scales
        .data()
        .chunks_exact(2)
        .flat_map(|b| (u16::from_le_bytes([b[0], b[1]]) + (1 << 10)).to_le_bytes())
        .collect();
    let tensors = file.tensors().into_iter().map(|(n, view)| match n == name {
        true => (n, TensorView::new(view.dtype(), view.shape().to_vec(), &doubled).unwrap()),
        false => (n, view),
    });
    serialize_to_file(tensors, None, &dir.join("model.safetensors")).unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Path::new(DEMO).join(file), dir.join(file)).unwrap();
    }
}

/// A model against itself loses nothing anywhere; with one module damaged, that layer is the only one that adds an error,
/// and the stream is wrong from there on.
#[test]
fn errors_by_layer() {
    let itself = eval("33", "3", &["--reference", DEMO, "--layers"]);
    let layers = itself["layers"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    for (i, layer) in layers.iter().enumerate() {
        let zero = json!({ "layer": i, "stream_error": 0.0, "own_error": 0.0, "own_error_of_update": 0.0 });
        assert_eq!(*layer, zero);
    }
    let dir = tempfile::tempdir().unwrap();
    damaged(dir.path(), "model.layers.3.mlp.down_proj");
    let model = dir.path().to_str().unwrap();
    let args = ["eval", model, "--text", TEXT, "--context", "33", "--windows", "3", "--device", "cpu"];
    let args = [&args[..], &["--reference", DEMO, "--layers"]].concat();
    let got = lowbit(&[&args[..], &["--json"]].concat()).json();
    assert_eq!(got["layers"]["embedding_error"], 0.0);
    for layer in got["layers"]["layers"].as_array().unwrap() {
        let number = |field: &str| layer[field].as_f64().unwrap();
        match layer["layer"].as_u64().unwrap() {
            0..3 => assert_eq!((number("stream_error"), number("own_error")), (0.0, 0.0), "{layer}"),
            3 => {
                assert_eq!(number("stream_error"), number("own_error"), "{layer}");
                // What this MLP adds is doubled: the update's error is the MLP's share of the update.
                assert!((0.05..1.5).contains(&number("own_error_of_update")), "{layer}");
            }
            _ => {
                assert_eq!((number("own_error"), number("own_error_of_update")), (0.0, 0.0), "{layer}");
                assert!(number("stream_error") > 1e-4, "{layer}");
            }
        }
    }
    let table = lowbit(&args).stdout;
    let marked: Vec<&str> = table.lines().filter(|line| line.contains("####")).collect();
    assert!(marked.len() == 1 && marked[0].starts_with("| 3 "), "{table}");
}

const QUESTIONS: &str = r#"{"context": "The old man sat down by the", "choices": ["fire", "table", "sea and wept"], "answer": 2}
{"context": "She opened the door and ", "choices": ["went out", "said nothing"], "answer": "A", "source": "ignored"}

{"context": "", "choices": ["It was a dark night", "Chapter"], "answer": 0}
{"question": "Who came in?", "choices": ["the old man", "a"], "answer": "a"}
"#;

/// The log-likelihoods are those of transformers 5.23 in float32, on weights that numpy dequantized, from the ids of its
/// tokenizer; accuracy, counted from them by hand, is 1 of 4, and length-normalised 3 of 4.
#[test]
fn multiple_choice() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = dir.path().join("tasks.jsonl");
    fs::write(&tasks, QUESTIONS).unwrap();
    let args = ["eval", DEMO, "--tasks", tasks.to_str().unwrap(), "--device", "cpu"];
    let run = |extra: &[&str]| lowbit(&[&args, extra].concat());
    let got = run(&["--json"]).json();
    let expected: [&[f64]; 4] =
        [&[-2.24397, -1.90772, -16.10345], &[-19.97259, -30.20769], &[-16.76078, -14.04056], &[-13.13108, -6.13946]];
    let samples = got["tasks"]["samples"].as_array().unwrap();
    for (sample, expected) in samples.iter().zip(expected) {
        let sums: Vec<f64> = sample["loglikelihoods"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(sums.len(), expected.len());
        for (got, expected) in sums.iter().zip(expected) {
            assert!((got - expected).abs() < 2e-2, "{sample}: {expected}");
        }
    }
    let of = |field: &str| samples.iter().map(|s| s[field].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((of("line"), of("chosen"), of("chosen_norm")), (vec![1, 2, 4, 5], vec![1, 0, 1, 1], vec![1, 0, 0, 0]));
    let number = |field: &str| got["tasks"][field].as_f64().unwrap();
    assert_eq!((number("acc"), number("acc_norm")), (0.25, 0.75));
    assert!((number("acc_stderr") - 0.25).abs() < 1e-12 && (number("acc_norm_stderr") - 0.25).abs() < 1e-12);
    // A batch changes nothing; a reference that is the model agrees.
    let alone = run(&["--json", "--batch", "1", "--reference", DEMO]).json();
    assert_eq!((&alone["tasks"]["agreement"], &alone["tasks"]["agreement_norm"]), (&1.0.into(), &1.0.into()));
    for (a, b) in samples.iter().zip(alone["tasks"]["samples"].as_array().unwrap()) {
        let (a, b) = (a["loglikelihoods"][1].as_f64().unwrap(), b["loglikelihoods"][1].as_f64().unwrap());
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    let text = run(&[]).stdout;
    assert!(text.contains("acc 25.00 % +- 25.00, acc_norm 75.00 % +- 25.00"), "{text}");
}

/// The demo and an AWQ model of the same weights part where the golden files of transformers say: after 1, 3 and 2 tokens.
#[test]
fn continuations() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = dir.path().join("prompts.jsonl");
    let golden: Value = serde_json::from_slice(&fs::read("assets/books-6m-gptq/golden.json").unwrap()).unwrap();
    let texts = golden["prompts"].as_array().unwrap().iter().map(|p| p["prompt"].to_string());
    fs::write(&prompts, texts.collect::<Vec<_>>().join("\n")).unwrap();
    let awq = fixture("awq-4bit-g128");
    let ids = |dir: &Path| -> Vec<Vec<u64>> {
        let golden: Value = serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let of = |p: &Value| p["greedy_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        golden["prompts"].as_array().unwrap().iter().map(of).collect()
    };
    let expected: Vec<usize> = ids(&awq)
        .iter()
        .zip(ids(Path::new(DEMO)))
        .map(|(a, b)| a.iter().zip(&b).take(8).take_while(|(a, b)| a == b).count())
        .collect();
    let awq = awq.to_str().unwrap();
    let args = ["eval", awq, "--reference", DEMO, "--generate", "8", "--device", "cpu"];
    let with_file = [&args[..], &["--prompts", prompts.to_str().unwrap()]].concat();
    let got = lowbit(&[&with_file[..], &["--json"]].concat()).json();
    let samples = got["generation"]["samples"].as_array().unwrap();
    let common: Vec<usize> = samples.iter().map(|s| s["common_prefix"].as_u64().unwrap() as usize).collect();
    assert_eq!(common, expected);
    let mean = expected.iter().sum::<usize>() as f64 / expected.len() as f64;
    assert!((got["generation"]["common_prefix_mean"].as_f64().unwrap() - mean).abs() < 1e-12);
    assert_eq!(got["generation"]["exact_match"], 0.0);
    let shown = lowbit(&with_file).stdout;
    for word in ["prompt  ", "both  ", "model  ", "reference  ", "3 prompts"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    // Without a file, pieces of the text; a model says what it says.
    let itself = eval("33", "3", &["--reference", DEMO, "--generate", "5"]);
    let generation = &itself["generation"];
    assert_eq!((&generation["prompts"], &generation["exact_match"]), (&16.into(), &1.0.into()));
    assert_eq!(generation["common_prefix_median"], 5.0);
}

/// Sizes are those of the files' own headers, figures those of the models alone; the picture names every model.
#[test]
fn compare_and_plot() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("sizes.svg");
    let models = ["awq-4bit-g128", "ct-w8a8-dynamic"].map(fixture);
    let names: Vec<&str> = models.iter().map(|m| m.to_str().unwrap()).collect();
    let common = ["--text", TEXT, "--context", "33", "--windows", "3", "--device", "cpu"];
    let args = [&["eval", "--compare"], &names[..], &common[..], &["--reference", DEMO]].concat();
    let got = lowbit(&[&args[..], &["--plot", plot.to_str().unwrap(), "--json"]].concat()).json();
    let rows = got["models"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    let own = eval("33", "3", &[]);
    assert_eq!((&rows[0]["is_reference"], &rows[0]["kld"]), (&true.into(), &Value::Null));
    let near = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-6;
    assert!(near(&rows[0]["perplexity"], &own["perplexity"]), "{} {own}", rows[0]);
    let picture = fs::read_to_string(&plot).unwrap();
    for (row, model) in rows[1..].iter().zip(&models) {
        let (mut all, mut linear) = (0, 0);
        for entry in fs::read_dir(model).unwrap().map(|e| e.unwrap().path()) {
            if entry.extension().is_some_and(|e| e == "safetensors") {
                let bytes = fs::read(&entry).unwrap();
                for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                    all += view.data().len();
                    if name.contains("_proj.") && !name.ends_with(".bias") {
                        linear += view.data().len();
                    }
                }
            }
        }
        // q 256x256, k and v 128x256, o 256x256, gate, up and down 256x768, six times; embedding 4096x256, 13 norms.
        let weights = 6 * 256 * (256 + 2 * 128 + 256 + 3 * 768);
        let parameters = weights + 4096 * 256 + 13 * 256;
        assert_eq!(row["bytes"], all);
        let number = |field: &str| row[field].as_f64().unwrap();
        assert!((number("linear_bits_per_weight") - 8.0 * linear as f64 / f64::from(weights)).abs() < 1e-9, "{row}");
        assert!((number("bits_per_weight") - 8.0 * all as f64 / f64::from(parameters)).abs() < 1e-9, "{row}");
        assert!(number("prefill_tokens_per_s") > 0.0 && number("decode_tokens_per_s") > 0.0);
        // The reference has run beside the first alone.
        let alone = [&["eval", model.to_str().unwrap(), "--reference", DEMO, "--json"], &common[..]].concat();
        assert_eq!(row["kld"], lowbit(&alone).json()["kld"], "{}", row["model"]);
        assert!(row["kld"]["mean"].as_f64().unwrap() > 0.0 && row["kld"]["p99"].as_f64().unwrap() > 0.0);
        let name = row["model"].as_str().unwrap();
        assert!(picture.contains(name) && model.ends_with(name), "{name}");
    }
    assert!(picture.starts_with("<svg") && !dir.path().join("sizes.svg.part").exists());
    let table = lowbit(&args).stdout;
    for word in ["(reference)", "KLD p99", "decode t/s", "bpw linear", names[0].rsplit('/').next().unwrap()] {
        assert!(table.contains(word), "{word}: {table}");
    }
}

#[test]
fn bad_input() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let long = format!(r#"{{"context": "{}", "choices": ["a", "b"], "answer": 0}}"#, "the old man ".repeat(1500));
    let tasks = [
        file("no.jsonl", "\n"),
        file("broken.jsonl", "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 0}\n\nnonsense\n"),
        file("long.jsonl", &long),
    ];
    let prompts = file("prompts.jsonl", "\"fine\"\n{\"text\": 3}");
    let blank = file("blank.txt", " \n\n");
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["eval", DEMO], 2, &["--text", "--tasks"]),
        (&["eval"], 2, &["MODEL"]),
        (&["eval", DEMO, "--compare", DEMO, "--text", TEXT], 2, &["cannot be used with"]),
        (&["eval", "--compare", DEMO], 2, &["--text"]),
        (&["eval", "--compare", DEMO, "no/such", "--text", TEXT], 8, &["no/such"]),
        (&["eval", DEMO, "--text", TEXT, "--layers"], 2, &["--reference"]),
        (&["eval", DEMO, "--text", TEXT, "--generate", "4"], 2, &["--reference"]),
        (&["eval", DEMO, "--text", TEXT, "--generate", "4000", "--reference", DEMO], 2, &["--generate", "2048"]),
        (&["eval", DEMO, "--reference", DEMO, "--generate", "4"], 2, &["--text", "--prompts"]),
        (&["eval", DEMO, "--text", TEXT, "--plot", "x.svg"], 2, &["--plot", "cannot be used with"]),
        (&["eval", DEMO, "--tasks", "no-such-file"], 3, &["no-such-file"]),
        (&["eval", DEMO, "--tasks", &tasks[0]], 2, &["no.jsonl", "choices"]),
        (&["eval", DEMO, "--tasks", &tasks[1]], 2, &["broken.jsonl line 3", "choices"]),
        (&["eval", DEMO, "--tasks", &tasks[2]], 2, &["long.jsonl line 1", "2048"]),
        (&["eval", DEMO, "--reference", DEMO, "--generate", "4", "--prompts", &prompts], 2, &["prompts.jsonl line 2"]),
        (&["eval", DEMO, "--reference", DEMO, "--generate", "4", "--prompts", &blank], 2, &["blank.txt"]),
    ];
    for (args, code, needles) in cases {
        let run = lowbit(args);
        assert_eq!(run.code, Some(*code), "{args:?}: {}", run.stderr);
        for needle in *needles {
            assert!(run.stderr.contains(needle), "{args:?}: `{needle}` is not in: {}", run.stderr);
        }
    }
}

//! `generate`.

use std::io::Read;
use std::process::Command;

use serde_json::Value;

use super::{DEMO, Run, command, finish, lowbit};

const PROMPT: &str = "It was a dark night, and the old man";
/// The demo's greedy continuation of [`PROMPT`] by golden.json, whose best two logits are 0.15 apart or more so far.
const TOKENS: usize = 10;

fn golden() -> Value {
    let text = std::fs::read_to_string(format!("{DEMO}/golden.json")).expect("golden.json");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    let prompt = golden["prompts"][0].clone();
    assert_eq!(prompt["prompt"], PROMPT);
    prompt
}

fn greedy(extra: &[&str]) -> Run {
    lowbit(&[&["generate", "-m", DEMO, "-p", PROMPT, "--device", "cpu", "--temperature", "0"], extra].concat())
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("an array").iter().map(|id| id.as_u64().expect("an id")).collect()
}

#[test]
fn json_equals_the_golden_file() {
    let (golden, got) = (golden(), greedy(&["-n", "10", "--json"]).json());
    assert_eq!(got["prompt_ids"], golden["prompt_ids"]);
    assert_eq!(ids(&got["token_ids"]), ids(&golden["greedy_ids"])[..TOKENS]);
    for (got, expected) in got["logprobs"].as_array().unwrap().iter().zip(golden["greedy_logprobs"].as_array().unwrap())
    {
        assert!((got.as_f64().unwrap() - expected.as_f64().unwrap()).abs() < 0.02, "{got} is not {expected}");
    }
    assert_eq!(got["logprobs"].as_array().unwrap().len(), TOKENS);
    let text = got["text"].as_str().unwrap();
    assert!(!text.is_empty() && golden["text"].as_str().unwrap().starts_with(text), "{text}");
    assert_eq!(got["finish_reason"], "length");
    let usage = serde_json::json!({ "prompt_tokens": 10, "completion_tokens": TOKENS, "total_tokens": 10 + TOKENS });
    assert_eq!(got["usage"], usage);
    assert!(got["timings"]["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn streamed_text_is_the_text() {
    let run = greedy(&["-n", "10"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert_eq!(
        Value::from(run.stdout),
        format!("{}\n", greedy(&["-n", "10", "--json"]).json()["text"].as_str().unwrap())
    );
    assert!(run.stderr.contains("10 tokens") && run.stderr.contains("tokens/s"), "{}", run.stderr);
}

/// A flag, its environment twin, a file and stdin are the same prompt; the flag beats the twin.
#[test]
fn prompts_from_everywhere() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), PROMPT).expect("written");
    let args = ["generate", "-m", DEMO, "--device", "cpu", "--temperature", "0", "-n", "3", "--json"];
    let expected = greedy(&["-n", "3", "--json"]).json()["token_ids"].clone();
    let with = |extra: &[&str]| command(&[&args, extra].concat());
    let path = file.path().to_str().expect("UTF-8");
    let mut twin = with(&[]);
    twin.env("LOWBIT_PROMPT", PROMPT);
    let mut beaten = with(&["-p", PROMPT]);
    beaten.env("LOWBIT_PROMPT", "Another").env("LOWBIT_MODEL", "nowhere").env("LOWBIT_MAX_TOKENS", "7");
    for (command, stdin) in
        [(with(&["-f", path]), ""), (with(&["-f", "-"]), PROMPT), (with(&[]), PROMPT), (twin, ""), (beaten, "")]
    {
        let what = format!("{command:?}");
        assert_eq!(finish(command, stdin.as_bytes()).json()["token_ids"], expected, "{what}");
    }
}

/// Text ends before the stop string, wherever tokens end, and nothing of it was written before it was complete.
#[test]
fn stop_strings() {
    for stop in ["old", "see the o", " was"] {
        let text = golden()["text"].as_str().unwrap().to_owned();
        let expected = &text[..text.find(stop).expect("in the text")];
        let got = greedy(&["--stop", "never", "--stop", stop, "--json"]).json();
        assert_eq!(got["text"], expected, "{stop}");
        assert_eq!(got["finish_reason"], "stop");
        assert_eq!(greedy(&["--stop", stop]).stdout, format!("{expected}\n"));
    }
}

/// A token forced by its bias ends the text; `--ignore-eos` and `--min-tokens` put that off.
#[test]
fn end_of_sequence() {
    let forced = |extra: &[&str]| greedy(&[&["--logit-bias", "0=1000", "-n", "3", "--json"], extra].concat()).json();
    let plain = forced(&[]);
    assert_eq!(
        (ids(&plain["token_ids"]), &plain["text"], &plain["finish_reason"]),
        (vec![0], &"".into(), &"stop".into())
    );
    let ignored = forced(&["--ignore-eos"]);
    assert_eq!((ids(&ignored["token_ids"]), &ignored["finish_reason"]), (vec![0, 0, 0], &"length".into()));
    let late = ids(&forced(&["--min-tokens", "1"])["token_ids"]);
    assert!(late.len() == 2 && late[0] != 0 && late[1] == 0, "{late:?}");
}

#[test]
fn seeds_repeat() {
    let sample = |seed: &str| {
        let args = ["generate", "-m", DEMO, "-p", PROMPT, "--device", "cpu", "-n", "12", "--seed", seed, "--json"];
        ids(
            &lowbit(&[&args[..], &["--generation-config", "none", "--temperature", "1.5"]].concat()).json()["token_ids"],
        )
    };
    assert_eq!(sample("7"), sample("7"));
    assert_ne!(sample("7"), sample("8"));
}

/// One candidate is the best one, whatever the temperature; its alternatives come best first.
#[test]
fn top_k_and_logprobs() {
    let args =
        ["generate", "-m", DEMO, "-p", PROMPT, "--device", "cpu", "-n", "4", "--top-k", "1", "--temperature", "3"];
    let got = lowbit(&[&args[..], &["--logprobs", "3", "--json"]].concat()).json();
    assert_eq!(ids(&got["token_ids"]), ids(&golden()["greedy_ids"])[..4]);
    for (i, top) in got["top_logprobs"].as_array().unwrap().iter().enumerate() {
        assert_eq!(top.as_array().unwrap().len(), 3);
        assert_eq!((&top[0]["id"], &top[0]["logprob"]), (&got["token_ids"][i], &got["logprobs"][i]));
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = command(&["generate", "-m", DEMO, "-p", PROMPT, "--device", "cpu", "-n", "1000", "--ignore-eos"])
        .spawn()
        .expect("starts");
    drop(child.stdin.take());
    let mut first = [0; 1];
    child.stdout.take().expect("a pipe").read_exact(&mut first).expect("text comes");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_the_text() {
    let mut child = command(&["generate", "-m", DEMO, "-p", PROMPT, "--device", "cpu", "-n", "2000", "--ignore-eos"])
        .spawn()
        .expect("starts");
    drop(child.stdin.take());
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut [0; 1]).expect("text comes");
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(kill.success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("UTF-8");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130));
    assert!(rest.ends_with('\n') && String::from_utf8_lossy(&output.stderr).contains("(abort)"), "{rest}");
}

/// Flags, and their twins, that hold the text to a grammar.
#[test]
fn constraints_from_flags_and_files() {
    let dir = tempfile::tempdir().expect("temp dir");
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).expect("written");
        dir.path().join(name).to_str().expect("UTF-8").to_string()
    };
    let schema =
        file("schema.json", r#"{"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 2, "maxItems": 2}"#);
    let lark = file("list.lark", "start: ITEM (\",\" ITEM)~3\nITEM: /[0-9]/");
    let sampled = ["generate", "-m", DEMO, "-p", PROMPT, "--device", "cpu", "--seed", "3", "-n", "60", "--json"];
    let run = |flag: &str, value: &str| lowbit(&[&sampled[..], &[flag, value]].concat()).json();
    let twin = |name: &str, value: &str| {
        let mut command = command(&sampled);
        command.env(name, value);
        finish(command, b"").json()
    };
    let (json, list) = (run("--json-schema", &schema), run("--grammar", &lark));
    assert_eq!((&json["finish_reason"], &list["finish_reason"]), (&Value::from("stop"), &Value::from("stop")));
    let answers: Vec<String> = serde_json::from_str(json["text"].as_str().unwrap()).expect("JSON");
    assert!(answers.len() == 2 && answers.iter().all(|answer| answer == "yes" || answer == "no"), "{answers:?}");
    let text = list["text"].as_str().unwrap();
    assert!(text.len() == 7 && text.split(',').all(|item| item.parse::<u8>().is_ok()), "{text}");
    let regex = run("--regex", "-[a-f]{6}");
    assert!(regex["text"].as_str().unwrap().starts_with('-') && regex["text"].as_str().unwrap().len() == 7, "{regex}");
    for (name, value, expected) in [
        ("LOWBIT_JSON_SCHEMA", &schema[..], json),
        ("LOWBIT_GRAMMAR", &lark, list),
        ("LOWBIT_REGEX", "-[a-f]{6}", regex),
    ] {
        assert_eq!(twin(name, value)["token_ids"], expected["token_ids"], "{name}");
    }
    for (args, code, needle) in [
        (["--regex", "(", "--seed", "1"], 2, "--regex: malformed or unsupported regular expression"),
        (["--json-schema", &lark, "--seed", "1"], 2, "malformed JSON"),
        (["--json-schema", "no-such-file", "--seed", "1"], 3, "no-such-file"),
        (["--grammar", &schema, "--seed", "1"], 2, "--grammar: "),
        (["--grammar", &lark, "--regex", "a"], 2, "cannot be used with"),
        (["--regex", "[a-z]{3}", "--min-tokens", "30"], 2, "min_tokens: 30 are asked for"),
    ] {
        let run = greedy(&args);
        assert!(run.code == Some(code) && run.stderr.contains(needle), "{args:?}: {:?} {}", run.code, run.stderr);
    }
}

//! `chat`, its input a file.

use super::{DEMO, Run, command, finish};

fn chat(input: &str, extra: &[&str]) -> Run {
    let args = ["chat", "-m", DEMO, "--device", "cpu", "--temperature", "0", "-n", "8"];
    finish(command(&[&args, extra].concat()), input.as_bytes())
}

/// An answer depends on what came before it until `/reset`; the demo's template is the messages one after another.
#[test]
fn history_and_reset() {
    let answer = |input: &str| {
        let run = chat(input, &[]);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.stdout
    };
    let alone = answer("She looked at the captain and");
    assert!(alone.trim().len() > 3, "{alone:?}");
    assert_eq!(
        answer("It was a dark night\n/reset\n\nShe looked at the captain and\n/exit\nIt was"),
        answer("It was a dark night\n") + &alone
    );
    assert_ne!(answer("It was a dark night\nShe looked at the captain and"), answer("It was a dark night\n") + &alone);
}

/// A question that does not fit is reported, and the conversation goes on without it.
#[test]
fn a_full_context_is_reported() {
    let long = "the old man ".repeat(40);
    let run = chat(&format!("{long}\nShe looked"), &["--max-model-len", "32"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(
        run.stderr.starts_with("error: conversation: ") && run.stderr.contains("--max-model-len"),
        "{}",
        run.stderr
    );
    assert_eq!(run.stdout, chat("She looked", &[]).stdout);
}

/// A second turn computes what is new alone; the answers are the same without the cache.
#[test]
fn turns_reuse_what_is_computed() {
    let input = "It was a dark night, and the old man looked at the captain, who had not said a word for hours\nWhy?\n";
    let cached = chat(input, &["-v", "--enable-prefix-caching"]);
    let anew = chat(input, &["-v", "--no-enable-prefix-caching"]);
    assert_eq!((cached.code, anew.code), (Some(0), Some(0)), "{}", cached.stderr);
    assert_eq!(cached.stdout, anew.stdout);
    assert!(cached.stderr.contains(" (16 cached)"), "{}", cached.stderr);
    assert!(!anew.stderr.contains("cached"), "{}", anew.stderr);
    assert_eq!(chat(input, &["-v"]).stderr.matches("cached").count(), 1, "on by default");
}

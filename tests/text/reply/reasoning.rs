//! What a model thinks before it answers.

use lowbit::text::{ReasoningFormat, ToolFormat};

use super::{Reply, calls, parser, read, said};

fn think(inside: bool, text: &str) -> (String, String) {
    let reply = read(|| parser(Some(ReasoningFormat::Think), None, inside), text);
    (reply.reasoning, reply.content)
}

fn pair(reasoning: &str, content: &str) -> (String, String) {
    (reasoning.to_string(), content.to_string())
}

#[test]
fn reasoning_is_parted_from_the_answer() {
    assert_eq!(think(false, "<think>\nTwo and two.\n</think>\n\nFour."), pair("Two and two.\n", "Four."));
    // DeepSeek-R1's template, and Qwen3's of 2507, open it in the prompt.
    assert_eq!(think(true, "\nTwo and two.</think>\n\nFour.\n"), pair("Two and two.", "Four.\n"));
    assert_eq!(think(false, "<think></think>Four."), pair("", "Four."));
    assert_eq!(think(false, "<think>\n\n</think>\n\nFour."), pair("", "Four."));
    assert_eq!(think(false, " \n<think>a</think>b"), pair("a", "b"));
    let mistral = read(|| parser(Some(ReasoningFormat::Mistral), None, false), "[THINK]a < b[/THINK]c");
    assert_eq!((mistral.reasoning.as_str(), mistral.content.as_str()), ("a < b", "c"));
}

#[test]
fn what_only_looks_like_a_tag_is_kept() {
    assert_eq!(think(false, "Four."), pair("", "Four."));
    assert_eq!(think(false, ""), pair("", ""));
    assert_eq!(think(false, "  "), pair("", "  "));
    assert_eq!(think(false, "<thi"), pair("", "<thi"));
    assert_eq!(think(false, "<thinks>"), pair("", "<thinks>"));
    assert_eq!(think(true, "a </thin b </think"), pair("a </thin b </think", ""));
    assert_eq!(think(true, "a <</think>> b"), pair("a <", "> b"));
    // An answer that speaks of the tags has them.
    assert_eq!(think(false, "Use <think>x</think>."), pair("", "Use <think>x</think>."));
    assert_eq!(think(true, "a</think>b <think>c</think>"), pair("a", "b <think>c</think>"));
    assert_eq!(think(false, &" ".repeat(10_000)).1.len(), 10_000);
}

#[test]
fn calls_are_read_behind_the_reasoning_alone() {
    let text =
        "Shall I <tool_call>{\"name\": \"now\"}</tool_call>?</think>\n\n<tool_call>\n{\"name\": \"now\"}\n</tool_call>";
    let reply = read(|| parser(Some(ReasoningFormat::Think), Some(ToolFormat::Hermes), true), text);
    let expected = Reply {
        reasoning: "Shall I <tool_call>{\"name\": \"now\"}</tool_call>?".to_string(),
        ..said("", &[("now", "{}")])
    };
    assert_eq!(reply, expected);
    assert_eq!(
        calls(ToolFormat::Hermes, "<think>a</think>b"),
        said("<think>a</think>b", &[]),
        "no format for reasoning"
    );
}

#[test]
fn prompts_that_open_the_reasoning() {
    let think = ReasoningFormat::Think;
    assert!(think.starts_in_reasoning("<|im_start|>assistant\n<think>\n"));
    assert!(think.starts_in_reasoning("<｜Assistant｜><think>"));
    assert!(!think.starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
    assert!(!think.starts_in_reasoning("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n"));
    assert!(!ReasoningFormat::Mistral.starts_in_reasoning("<think>"));
}

#[test]
fn formats_are_found_and_named() {
    let no = |_: &str| false;
    assert_eq!(ReasoningFormat::detect("{{ content.split('</think>') }}", no), Some(ReasoningFormat::Think));
    assert_eq!(ReasoningFormat::detect("[THINK]{{ m.thinking }}[/THINK]", no), Some(ReasoningFormat::Mistral));
    assert_eq!(ReasoningFormat::detect("{{ messages }}", no), None);
    assert_eq!(
        ReasoningFormat::detect("{{ messages }}", |token| token.contains("think>")),
        Some(ReasoningFormat::Think)
    );
    for name in ReasoningFormat::NAMES {
        let format: ReasoningFormat = name.parse().unwrap();
        assert_eq!(format.to_string().parse::<ReasoningFormat>().unwrap(), format);
    }
    let error = "deepthink".parse::<ReasoningFormat>().unwrap_err().to_string();
    assert!(error.contains("--reasoning-parser: `deepthink`") && error.contains("deepseek_r1"), "{error}");
}

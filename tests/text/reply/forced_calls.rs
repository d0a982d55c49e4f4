//! Grammars of forced calls, by llguidance itself: what they allow and what not, and that the parser reads all that they allow.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use lowbit::text::ToolFormat;
use serde_json::{Value, json};

use super::{parser, read_pieces, tools_of_the_tests};

/// Special tokens of the vocabulary, behind one for each byte and the end.
const SPECIAL: [&str; 8] =
    ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]"];
const END: u32 = 256;

fn special(marker: &str) -> Option<u32> {
    (END + 1..).zip(SPECIAL).find(|(_, known)| *known == marker).map(|(id, _)| id)
}

fn env() -> TokEnv {
    let mut words: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    let marked = |token: &str| [&[TokTrie::SPECIAL_TOKEN_MARKER], token.as_bytes()].concat();
    words.extend(["<|end|>"].iter().chain(&SPECIAL).map(|token| marked(token)));
    Arc::new(ApproximateTokEnv::new(TokTrie::from(&TokRxInfo::new(words.len() as u32, END), &words)))
}

/// Token ids of a text, its markers special tokens or bytes.
fn tokens(text: &str, is_special: bool) -> Vec<u32> {
    let (mut ids, mut rest) = (Vec::new(), text);
    while let Some(&byte) = rest.as_bytes().first() {
        let marker = SPECIAL.into_iter().find(|marker| is_special && rest.starts_with(marker));
        ids.push(marker.and_then(special).unwrap_or(u32::from(byte)));
        let taken = marker.map_or(1, str::len);
        rest = rest.get(taken..).expect("the texts are ASCII");
    }
    ids
}

/// Whether a grammar allows a text and that it ends there.
fn allows(grammar: &str, text: &str, is_special: bool) -> bool {
    let mut factory = ParserFactory::new_simple(&env()).unwrap();
    factory.quiet();
    let mut matcher = Matcher::new(factory.create_parser(TopLevelGrammar::from_lark(grammar.to_string())));
    assert!(matcher.get_error().is_none(), "{:?}\n{grammar}", matcher.get_error());
    let ids = tokens(text, is_special);
    matcher.try_consume_tokens(&ids).unwrap() == ids.len() && matcher.is_accepting().unwrap()
}

fn tools() -> Vec<Value> {
    let any = json!({"type": "function", "function": {"name": "free", "parameters": {"type": "object"}}});
    [tools_of_the_tests(), vec![any]].concat()
}

/// Texts that a grammar for several calls allows, and texts that it does not.
fn texts(format: ToolFormat, is_special: bool) -> (&'static [&'static str], &'static [&'static str]) {
    match format {
        ToolFormat::Hermes => (
            &[
                "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"P\", \"where\": {\"x\": 1}}}\n</tool_call>",
                "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"free\", \"arguments\": {\"a\": [1]}}\n</tool_call>",
            ],
            &[
                "hello",
                "<tool_call>\n{\"name\": \"nix\", \"arguments\": {}}\n</tool_call>",
                "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {}}\n</tool_call>",
                "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"P\", \"where\": {\"x\": \"s\"}}}\n</tool_call>",
            ],
        ),
        ToolFormat::Llama3Json => (
            &[
                "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"P\", \"where\": {\"x\": 1}}}",
                "{\"name\": \"now\", \"parameters\": {}}; {\"name\": \"now\", \"parameters\": {}}",
            ],
            &["x", "{\"name\": \"get_weather\", \"parameters\": {}}"],
        ),
        ToolFormat::Mistral if is_special => (
            &[
                "[TOOL_CALLS]now[ARGS]{}",
                "[TOOL_CALLS]get_weather[ARGS]{\"city\": \"x\", \"where\": {\"x\": 2}}[TOOL_CALLS]free[ARGS]{\"a\": {}}",
            ],
            &["x", "[TOOL_CALLS]", "[TOOL_CALLS]get_weather[ARGS]{}"],
        ),
        ToolFormat::Mistral => (
            &[
                "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]",
                "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"x\", \"where\": {\"x\": 2}}}, {\"name\": \"now\", \"arguments\": {}}]",
            ],
            &["x", "[TOOL_CALLS]", "[TOOL_CALLS][]"],
        ),
        ToolFormat::Glm45 => (
            &[
                "<tool_call>now\n</tool_call>",
                "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>New < York\nx</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n\
                 <arg_key>unit</arg_key>\n<arg_value>celsius</arg_value>\n<arg_key>where</arg_key>\n<arg_value>{\"x\": 1}</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
                "<tool_call>free\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>\n<arg_key>c</arg_key>\n<arg_value></arg_value>\n</tool_call>",
            ],
            &[
                "<tool_call>get_weather\n</tool_call>",
                "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n<arg_key>unit</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
                "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n<arg_key>where</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>",
            ],
        ),
        ToolFormat::Qwen3Coder => (
            &[
                "<tool_call>\n<function=now>\n</function>\n</tool_call>",
                "<tool_call>\n<function=get_weather>\n<parameter=city>\na </p\nb\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=unit>\ncelsius\n</parameter>\n\
                 <parameter=where>\n{\"x\": 1}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
                "<tool_call>\n<function=free>\n<parameter=a>\nb\n</parameter>\n</function>\n</tool_call>",
            ],
            &["<tool_call>\n<function=get_weather>\n</function>\n</tool_call>"],
        ),
    }
}

#[test]
fn what_the_grammars_allow_is_a_call_and_nothing_else() {
    for (format, is_special) in ToolFormat::ALL.into_iter().flat_map(|format| [(format, false), (format, true)]) {
        let grammar = |parallel: bool| {
            format.call_grammar(&tools(), parallel, |marker| special(marker).filter(|_| is_special)).unwrap()
        };
        let (several, one) = (grammar(true), grammar(false));
        let (good, bad) = texts(format, is_special);
        for text in good {
            assert!(allows(&several, text, is_special), "{format} {is_special}: {text}\n{several}");
            let reply = read_pieces(parser(None, Some(format), false), [*text]);
            assert_eq!(reply.content, "", "{format}: {text}");
            assert_eq!(allows(&one, text, is_special), reply.calls.len() == 1, "{format}: {text}");
            for (_, name, arguments) in &reply.calls {
                assert!(serde_json::from_str::<Value>(arguments).unwrap().is_object(), "{name}: {arguments}");
            }
        }
        for text in bad {
            assert!(!allows(&several, text, is_special), "{format} {is_special}: {text}\n{several}");
        }
    }
}

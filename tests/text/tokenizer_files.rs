//! Tokenizers described in several files: which of them counts, as transformers 5.24 has it, and what need not fit the model.

use std::fs;
use std::path::Path;

use lowbit::error::Error;
use lowbit::text::{ChatTemplate, Tokenizer};
use serde_json::{Value, json};

use super::tokenizer::{llama_style, load, sequence_decoder};

/// Ids of the vocabulary of `llama_style`.
const VOCAB: usize = 272;

fn base() -> Value {
    llama_style(sequence_decoder())
}

/// The tokenizer of `base` and `files` beside it.
fn with_files(files: &[(&str, Value)]) -> Result<Tokenizer, Error> {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [("tokenizer.json", base())].iter().chain(files) {
        fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    Tokenizer::load(dir.path(), VOCAB + 8)
}

#[test]
fn begin_and_end_are_the_post_processors() {
    let encode = |config: Value| load(&base(), config, VOCAB).unwrap().encode("hello hello hello hello", true).unwrap();
    let bare = load(&base(), json!({}), VOCAB).unwrap().encode("hello hello hello hello", false).unwrap();
    assert_eq!(bare.len(), 4, "the file's truncation to 3 is not applied");
    let flags = |class: Value, bos: Value, eos: Value| {
        json!({"tokenizer_class": class, "bos_token": "<s>", "eos_token": {"content": "</s>"},
               "add_bos_token": bos, "add_eos_token": eos})
    };
    let (yes, no, unsaid) = (json!(true), json!(false), Value::Null);
    let begun = [&[1], &bare[..]].concat();
    // tokenizer.json puts <s> first. Generic tokenizers and those of Qwen leave it so whatever the flags say.
    for class in [json!("PreTrainedTokenizerFast"), json!("TokenizersBackend"), json!("Qwen2Tokenizer"), Value::Null] {
        for (bos, eos) in [(&no, &no), (&no, &yes), (&yes, &yes), (&unsaid, &unsaid)] {
            assert_eq!(encode(flags(class.clone(), bos.clone(), eos.clone())), begun, "{class} {bos} {eos}");
        }
    }
    // Those of Llama and its kin make their own of the flags.
    for class in
        ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizerFast", "CohereTokenizerFast"]
    {
        let encode = |bos: &Value, eos: &Value| encode(flags(json!(class), bos.clone(), eos.clone()));
        assert_eq!(encode(&no, &no), bare, "{class}");
        assert_eq!(encode(&no, &yes), [&bare[..], &[2]].concat(), "{class}");
        assert_eq!(encode(&yes, &yes), [&begun[..], &[2]].concat(), "{class}");
        assert_eq!(encode(&unsaid, &unsaid), begun, "{class}");
    }
    // The class may stand in config.json.
    let class = |name: &str| ("config.json", json!({"tokenizer_class": name}));
    let flags = || ("tokenizer_config.json", flags(Value::Null, no.clone(), no.clone()));
    let encode = |name| with_files(&[class(name), flags()]).unwrap().encode("hello", true).unwrap();
    assert_eq!((encode("LlamaTokenizer").len(), encode("GPT2Tokenizer").len()), (1, 2));
}

#[test]
fn added_tokens_come_from_every_file() {
    let x = |special: bool| json!({"content": "<|x|>", "special": special, "normalized": false});
    let decoder = |special| ("tokenizer_config.json", json!({"added_tokens_decoder": {"272": x(special)}}));
    let added = || ("added_tokens.json", json!({"<|x|>": 272}));
    let cases = [
        (vec![decoder(true)], true),
        (vec![decoder(false)], false),
        (vec![("tokenizer_config.json", json!({"additional_special_tokens": ["<|x|>"]}))], true),
        (vec![("tokenizer_config.json", json!({"extra_special_tokens": {"image_token": "<|x|>"}}))], true),
        (vec![("tokenizer_config.json", json!({"pad_token": "<|x|>"}))], true),
        (vec![("special_tokens_map.json", json!({"additional_special_tokens": [{"content": "<|x|>"}]}))], true),
        (vec![added(), ("special_tokens_map.json", json!({"pad_token": {"content": "<|x|>"}}))], true),
        (vec![decoder(false), ("special_tokens_map.json", json!({"pad_token": "<|y|>"}))], false),
        (
            vec![("tokenizer_config.json", json!({"pad_token": "<|x|>", "added_tokens_decoder": {"272": x(false)}}))],
            true,
        ),
    ];
    for (files, special) in cases {
        let t = with_files(&files).unwrap();
        let ids = t.encode("hello<|x|>", false).unwrap();
        assert_eq!(ids, [t.token_to_id("▁hello").unwrap(), 272], "{files:?}");
        assert_eq!(t.decode(&ids, true), if special { "hello" } else { "hello<|x|>" }, "{files:?}");
        assert_eq!(t.vocab_size(), 273, "{files:?}");
    }
    // An ordinary token of the older file goes through the normalizer, which puts a blank before it.
    let t = with_files(&[added()]).unwrap();
    assert_eq!(t.encode("<|x|>", false).unwrap(), [272]);
    assert_ne!(t.encode("hello<|x|>", false).unwrap()[1..], [272]);
    // Several are added in the order of their ids; how one is matched stands where it is listed.
    let decoder = json!({"273": {"content": "<b>", "lstrip": true, "normalized": false}, "272": {"content": "<a>", "special": true}});
    let t =
        with_files(&[("tokenizer_config.json", json!({"added_tokens_decoder": decoder, "pad_token": "<b>"}))]).unwrap();
    assert_eq!(t.encode("hello  <b><a>", false).unwrap()[1..], [273, 272]);
    // A file of the newer kind makes those of the older one count for nothing.
    let t = with_files(&[
        ("tokenizer_config.json", json!({"bos_token": "<s>", "added_tokens_decoder": {"1": {"content": "<s>"}}})),
        ("special_tokens_map.json", json!({"bos_token": "</s>"})),
        ("added_tokens.json", json!({"<|x|>": 272})),
    ])
    .unwrap();
    assert_eq!((t.bos_id(), t.token_to_id("<|x|>")), (Some(1), None));
    let t = with_files(&[
        ("tokenizer_config.json", json!({"bos_token": "<s>"})),
        ("special_tokens_map.json", json!({"bos_token": "</s>"})),
    ])
    .unwrap();
    assert_eq!(t.bos_id(), Some(2));
}

#[test]
fn malformed_added_tokens_are_refused() {
    let cases = [
        ("tokenizer_config.json", json!({"added_tokens_decoder": []}), "added_tokens_decoder"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"x": {"content": "a"}}}), "`x` is not a token id"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"272": "a"}}), "`272`"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"272": {}}}), "`content`"),
        ("added_tokens.json", json!({"<|x|>": -1}), "`<|x|>`"),
        ("added_tokens.json", json!([]), "JSON object"),
    ];
    for (name, content, part) in cases {
        match with_files(&[(name, content)]) {
            Err(Error::Text { what, reason }) => {
                assert!(what.ends_with(name) && reason.contains(part), "{what}: {reason}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_tokenizer_may_be_a_little_larger_or_smaller_than_its_model() {
    let file = base();
    assert!(load(&file, json!({}), VOCAB).is_ok());
    assert!(load(&file, json!({}), 300).is_ok(), "padding of the model's vocabulary is normal");
    // The last tokens are `é` and `a b`: a model without them can do without.
    let t = load(&file, json!({"eos_token": "a b"}), VOCAB - 1).unwrap();
    assert_eq!((t.vocab_size(), t.eos_id()), (VOCAB - 1, None));
    assert_eq!(t.encode("hello", true).unwrap().len(), 2);
    match load(&file, json!({"pad_token": "<pad>"}), VOCAB).unwrap().encode("hello<pad>", false) {
        Err(Error::Input { what, reason }) => {
            assert!(what == "text" && reason.contains("`<pad>`, token 272"), "{what}: {reason}")
        }
        other => panic!("{other:?}"),
    }
    // What goes around every text cannot be done without.
    let mut ends = file.clone();
    ends["post_processor"]["special_tokens"]["<s>"] = json!({"id": "<s>", "ids": [271], "tokens": ["a b"]});
    match load(&ends, json!({}), VOCAB - 1) {
        Err(Error::Text { reason, .. }) => assert!(reason.contains("`a b` around every text"), "{reason}"),
        other => panic!("{other:?}"),
    }
    match load(&file, json!({}), 100) {
        Err(Error::Text { reason, .. }) => {
            assert!(reason.contains("272") && reason.contains("100") && reason.contains("another model"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
}

/// Byte order marks and line ends of other systems change nothing.
#[test]
fn files_as_editors_leave_them() {
    let write = |dir: &Path, name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    let [plain, marked] = [false, true].map(|marked| {
        let dir = tempfile::tempdir().unwrap();
        let edited = |text: String| match marked {
            true => format!("\u{feff}{}", text.replace('\n', "\r\n")),
            false => text,
        };
        let file = serde_json::to_string_pretty(&base()).unwrap();
        write(dir.path(), "tokenizer.json", &edited(file));
        write(dir.path(), "tokenizer_config.json", &edited("{\n\"bos_token\": \"<s>\"\n}\n".into()));
        write(dir.path(), "chat_template.jinja", &edited("{{ bos_token }}\n{% if true %}\na\nb\n{% endif %}\n".into()));
        let tokenizer = Tokenizer::load(dir.path(), VOCAB).unwrap();
        let text = ChatTemplate::load(dir.path()).unwrap().unwrap().render(&Default::default()).unwrap();
        (tokenizer.encode("hello", true).unwrap(), tokenizer.bos_id(), text)
    });
    assert_eq!(plain, marked);
    // Jinja takes the last line end off, and with `trim_blocks` those after blocks.
    assert_eq!(plain.2, "<s>\na\nb\n");
}

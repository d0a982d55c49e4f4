//! Tokenizers: goldens of transformers, the incremental detokenizer against the `tokenizers` crate's full decoding,
//! and hostile files.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use lowbit::error::Error;
use lowbit::text::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};

/// The demo model: byte-level BPE of 4096 entries.
const BOOKS: &str = "assets/books-6m-gptq";

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::load(Path::new(BOOKS), 4096).unwrap());
/// The same file through the `tokenizers` crate alone.
static CRATE_OWN: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| tokenizers::Tokenizer::from_file(format!("{BOOKS}/tokenizer.json")).unwrap());

/// A vocabulary of the Llama 2 kind: sentencepiece with byte fallback.
pub(super) fn llama_style(decoder: Value) -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(["▁", "▁▁", "h", "e", "l", "o", "he", "ll", "llo", "hello", "▁hello", "é", "a b"].map(String::from));
    let vocab: serde_json::Map<String, Value> = tokens.iter().cloned().zip((0..).map(|id: u32| json!(id))).collect();
    let merges = [["▁", "▁"], ["h", "e"], ["l", "l"], ["ll", "o"], ["he", "llo"], ["▁", "hello"]];
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges}
    })
}

pub(super) fn sequence_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

pub(super) fn metaspace_decoder() -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false})
}

fn write(dir: &Path, tokenizer: &Value, config: Value) {
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

pub(super) fn load(tokenizer: &Value, config: Value, vocab: usize) -> Result<Tokenizer, Error> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), tokenizer, config);
    Tokenizer::load(dir.path(), vocab)
}

/// All chunks of a stream.
fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> String {
    let mut stream = tokenizer.detokenizer(skip);
    let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
    text += &stream.finish();
    text
}

#[test]
fn encodes_as_transformers() {
    let tokenizer = &*TOKENIZER;
    let golden: Value = serde_json::from_slice(&fs::read(format!("{BOOKS}/golden.json")).unwrap()).unwrap();
    let prompts = golden["prompts"].as_array().unwrap();
    assert!(!prompts.is_empty());
    for prompt in prompts {
        let text = prompt["prompt"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(prompt["prompt_ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text}");
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.vocab_size()), (Some(0), Some(0), 4096));
    assert_eq!(tokenizer.encode("<|endoftext|>", false).unwrap(), [0]);
    assert_eq!(tokenizer.encode("", true).unwrap(), [] as [u32; 0]);
    assert_eq!(tokenizer.id_to_token(1).unwrap(), "<|im_start|>");
    assert_eq!(tokenizer.decode(&[0, 833, 1], true), tokenizer.decode(&[833], false));
    assert_eq!(tokenizer.decode(&[u32::MAX, 4096], false), "");
}

#[test]
fn long_text_survives() {
    let tokenizer = &*TOKENIZER;
    let spaces = " ".repeat(200_000);
    for text in [spaces.as_str(), &"x".repeat(200_000), &"日本語🙂".repeat(20_000)] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
}

#[test]
fn characters_come_out_whole() {
    let tokenizer = &*TOKENIZER;
    let ids = tokenizer.encode("a🙂日b", false).unwrap();
    assert!(ids.len() > 4, "the vocabulary splits these characters");
    let mut stream = tokenizer.detokenizer(false);
    let chunks: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(chunks.concat(), "a🙂日b");
    assert!(chunks.iter().all(|chunk| !chunk.contains('\u{fffd}')));
    // Half a character, then the end.
    let smile = tokenizer.encode("🙂", false).unwrap();
    let mut stream = tokenizer.detokenizer(false);
    assert_eq!(stream.push(smile[0]), "");
    assert_eq!(stream.finish(), "\u{fffd}");
}

#[test]
fn markers_are_kept_where_special_tokens_are_skipped() {
    let tokenizer = &*TOKENIZER;
    let ids = tokenizer.encode("<|im_start|>a<|im_end|><|endoftext|>", false).unwrap();
    let mut stream = tokenizer.detokenizer_keeping(&["<|im_end|>", "[TOOL_CALLS]"]);
    let text: String = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(text + &stream.finish(), "a<|im_end|>");
    assert_eq!(tokenizer.decode(&ids, true), "a");
}

#[test]
fn sentencepiece_blanks_and_bytes() {
    let t = load(&llama_style(sequence_decoder()), json!({}), 512).unwrap();
    let id = |token: &str| t.token_to_id(token).unwrap();
    assert_eq!(t.encode("hello  hello", false).unwrap(), [id("▁hello"), id("▁▁"), id("hello")]);
    assert_eq!(t.encode("é🙂", false).unwrap().len(), 1 + 1 + 4);
    assert_eq!(t.decode(&[id("▁hello"), id("▁hello")], false), "hello hello");
    let mut rest = t.detokenizer(false).continuing();
    assert_eq!(rest.push(id("▁hello")), " hello");
    let mut stream = t.detokenizer(false);
    let bytes: Vec<u32> = "🙂".bytes().map(|b| id(&format!("<0x{b:02X}>"))).collect();
    assert!(bytes.iter().all(|&b| stream.push(b).is_empty()));
    assert_eq!(stream.push(id("h")), "🙂h");
}

#[test]
fn hostile_files_are_refused() {
    let good = llama_style(sequence_decoder());
    let with = |path: &str, value: Value| {
        let mut file = good.clone();
        *file.pointer_mut(path).unwrap() = value;
        file
    };
    let nested =
        (0..500).fold(json!({"type": "Lowercase"}), |inner, _| json!({"type": "Sequence", "normalizers": [inner]}));
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let cases = [
        ("no object", json!([1, 2])),
        ("no model", json!({"version": "1.0"})),
        ("unknown model", with("/model/type", json!("Magic"))),
        ("huge id", with("/model/vocab/h", json!(4_000_000_000u32))),
        ("id of 2^40", with("/model/vocab/h", json!(1u64 << 40))),
        ("negative id", with("/model/vocab/h", json!(-1))),
        ("merge of unknown tokens", with("/model/merges", json!([["zz", "yy"]]))),
        ("a million bad merges", with("/model/merges", json!(vec![["q", "q"]; 1_000_000]))),
        ("other id for an added token", with("/added_tokens/1/id", json!(200))),
        ("empty decoder", with("/decoder", json!(null))),
        ("unknown decoder", with("/decoder", json!({"type": "Magic"}))),
        (
            "decoder of another kind",
            with("/decoder", json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true})),
        ),
        ("deep nesting", with("/normalizer", nested)),
        ("malformed regex", with("/pre_tokenizer", split("(((("))),
        ("exploding regex", with("/pre_tokenizer", split("((a{1000}){1000}){1000}"))),
    ];
    for (what, file) in cases {
        match load(&file, json!({}), 512) {
            Err(Error::Text { what: file, .. }) => assert!(file.ends_with("tokenizer.json"), "{what}: {file}"),
            Err(Error::Unsupported { what: file, .. }) => assert!(file.contains("tokenizer.json"), "{what}: {file}"),
            other => panic!("{what}: {other:?}"),
        }
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::load(dir.path(), 10), Err(Error::Text { .. })), "no file");
    let refused = |bytes: &[u8]| {
        fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
        match Tokenizer::load(dir.path(), 10) {
            Err(Error::Text { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let reason = refused(b"{\"version\": \"1.0\", ");
    assert!(reason.contains("line 1 column"), "cut off: {reason}");
    // What the crate that parses it would panic on is found before, with its place.
    let text = good.to_string();
    let mut broken = text.clone().into_bytes();
    let at = text.find("hello").unwrap();
    broken[at] = 0xff;
    assert!(refused(&broken).contains(&format!("not UTF-8: invalid utf-8 sequence of 1 bytes from index {at}")));
    fs::File::create(dir.path().join("tokenizer.json")).unwrap().set_len(65 << 20).unwrap();
    match Tokenizer::load(dir.path(), 10) {
        Err(Error::Text { reason, .. }) => assert!(reason.contains("64 MiB"), "{reason}"),
        other => panic!("{other:?}"),
    }
    // A regex that needs exponential time gives up: the text comes back whole, if in other tokens.
    let t = load(&with("/pre_tokenizer", split("(a+)+\\1b")), json!({}), 512).unwrap();
    assert!(!t.encode(&"a".repeat(2_000), false).unwrap().is_empty());
}

proptest! {
    #[test]
    fn a_stream_is_the_full_decoding(ids in prop::collection::vec(0u32..4100, 0..40), skip: bool) {
        prop_assert_eq!(streamed(&TOKENIZER, &ids, skip), CRATE_OWN.decode(&ids, skip).unwrap());
    }

    #[test]
    fn a_sentencepiece_stream_is_the_full_decoding(
        // Most of the vocabulary is bytes; every other id is drawn from the rest.
        ids in prop::collection::vec(prop_oneof![0u32..280, 255u32..272, 195u32..205], 0..30),
        skip: bool,
        metaspace: bool,
    ) {
        let decoder = if metaspace { metaspace_decoder() } else { sequence_decoder() };
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &llama_style(decoder), json!({}));
        let tokenizer = Tokenizer::load(dir.path(), 272).unwrap();
        let crate_own = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        prop_assert_eq!(streamed(&tokenizer, &ids, skip), crate_own.decode(&ids, skip).unwrap());
    }

    #[test]
    fn text_survives(text in "(\\PC|[ \n\t]){0,80}") {
        let tokenizer = &*TOKENIZER;
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(streamed(tokenizer, &ids, false), text);
    }
}

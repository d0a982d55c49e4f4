//! Grammars for a tokenizer: what they allow, what they see of it, and hostile sources.

use std::path::Path;
use std::time::{Duration, Instant};

use lowbit::engine::Matcher;
use lowbit::error::Error;
use lowbit::text::grammar::{Constraint, GrammarCompiler, MAX_CACHE_BYTES};
use lowbit::text::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::tokenizer::{llama_style, load, metaspace_decoder, sequence_decoder};
use crate::common::random::Random;

const DEMO: &str = "assets/books-6m-gptq";
const VOCAB: usize = 4096;

fn demo() -> (Tokenizer, GrammarCompiler) {
    let tokenizer = Tokenizer::load(Path::new(DEMO), VOCAB).expect("the demo's tokenizer");
    let compiler = GrammarCompiler::new(&tokenizer, &[0]).expect("a compiler");
    (tokenizer, compiler)
}

/// Whether a grammar takes a text, and whether the text may end there, whatever tokens it is cut into.
fn takes(matcher: &Matcher, tokenizer: &Tokenizer, text: &str) -> Option<bool> {
    let mut matcher = matcher.clone();
    for id in tokenizer.encode(text, false).expect("ids") {
        if matcher.is_finished() || !matcher.allowed().ok()?.contains(id) {
            return None;
        }
        matcher.advance(id).expect("it is allowed");
    }
    Some(matcher.is_accepting())
}

/// Sources that once hung, exhausted or broke some parser: each is an error or compiles, within the time that is allowed.
#[test]
fn hostile_sources_are_errors_in_bounded_time() {
    let (_, compiler) = demo();
    let nested = |open: &str, close: &str, n: usize| format!("{}a{}", open.repeat(n), close.repeat(n));
    let chain: serde_json::Map<String, Value> = (0..3000)
        .map(|i| (format!("a{i}"), json!({ "$ref": format!("#/$defs/a{}", i + 1) })))
        .chain([("a3000".to_string(), json!({ "type": "null" }))])
        .collect();
    let doubling: serde_json::Map<String, Value> = (0..60)
        .map(|i| {
            let next = json!({ "$ref": format!("#/$defs/d{}", i + 1) });
            (format!("d{i}"), json!({ "anyOf": [{ "type": "array", "items": next }, { "type": "object", "properties": { "a": next }, "required": ["a"] }] }))
        })
        .chain([("d60".to_string(), json!({ "type": "null" }))])
        .collect();
    let both = |i: usize| json!({ "anyOf": (0..8).map(|j| json!({ "type": "object", "properties": { format!("p{i}"): { "const": j } } })).collect::<Vec<_>>() });
    let mut deep = json!({});
    for _ in 0..1000 {
        deep = json!({ "items": deep });
    }
    let schema = Constraint::JsonSchema;
    let regex = |text: &str| Constraint::Regex(text.to_string());
    let lark = |text: String| Constraint::Lark(text);
    let cases: Vec<(&str, Constraint)> = vec![
        ("endless $ref", schema(json!({ "$ref": "#" }))),
        (
            "two refs at each other",
            schema(
                json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } } }),
            ),
        ),
        (
            "refs with siblings",
            schema(json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/a", "type": "object" } } })),
        ),
        ("ref chain", schema(json!({ "$ref": "#/$defs/a0", "$defs": chain }))),
        ("doubling refs", schema(json!({ "$ref": "#/$defs/d0", "$defs": doubling }))),
        ("remote ref", schema(json!({ "$ref": "http://127.0.0.1:9/x.json" }))),
        ("file ref", schema(json!({ "$ref": "file:///etc/passwd" }))),
        ("missing ref", schema(json!({ "$ref": "#/$defs/none" }))),
        ("ref no string", schema(json!({ "$ref": 7 }))),
        ("huge enum", schema(json!({ "enum": (0..20_000).map(|i| format!("v{i}")).collect::<Vec<_>>() }))),
        ("too huge enum", schema(json!({ "enum": (0..200_000).collect::<Vec<_>>() }))),
        ("exponential anyOf", schema(json!({ "allOf": (0..12).map(both).collect::<Vec<_>>() }))),
        ("pattern no string", schema(json!({ "type": "string", "pattern": 5 }))),
        ("pattern broken", schema(json!({ "type": "string", "pattern": "(" }))),
        ("pattern bomb", schema(json!({ "type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$" }))),
        (
            "patterns that meet",
            schema(
                json!({ "type": "object", "patternProperties": { "^(a|b|ab)*c{0,500}$": {}, "^(a|ba){0,500}$": {} } }),
            ),
        ),
        ("long strings", schema(json!({ "type": "string", "minLength": 1_000_000_000 }))),
        (
            "long pattern strings",
            schema(json!({ "type": "string", "pattern": "a.*b.*c", "minLength": 100_000, "maxLength": 200_000 })),
        ),
        ("many items", schema(json!({ "type": "array", "minItems": 1_000_000, "items": { "type": "integer" } }))),
        ("most items", schema(json!({ "type": "array", "maxItems": u64::MAX, "items": { "type": "integer" } }))),
        ("no items", schema(json!({ "type": "array", "minItems": -1 }))),
        ("deep", schema(deep)),
        ("multipleOf", schema(json!({ "type": "integer", "multipleOf": 999_999_937 }))),
        ("multipleOf 0", schema(json!({ "type": "integer", "multipleOf": 0 }))),
        ("tiny multipleOf", schema(json!({ "type": "number", "multipleOf": 1e-300 }))),
        ("range", schema(json!({ "type": "number", "minimum": -1e300, "maximum": 1e300 }))),
        ("empty range", schema(json!({ "type": "integer", "minimum": 5, "maximum": 4 }))),
        ("false", schema(json!(false))),
        ("no schema", schema(json!("string"))),
        ("null", schema(Value::Null)),
        ("not", schema(json!({ "not": {} }))),
        ("oneOf that overlaps", schema(json!({ "oneOf": [{ "type": "integer" }, { "type": "number" }] }))),
        ("type unknown", schema(json!({ "type": "text" }))),
        ("types no array", schema(json!({ "type": { "a": 1 } }))),
        ("format unknown", schema(json!({ "type": "string", "format": "moon" }))),
        (
            "long word that is cut inside a character",
            schema(json!({ "pattern": { "é".repeat(80): "é" } , "type": "string" })),
        ),
        ("options", schema(json!({ "x-guidance": { "whitespace_pattern": "(" }, "type": "null" }))),
        ("regex unclosed", regex("(")),
        ("regex look-around", regex("(?=a)b")),
        ("regex back-reference", regex(r"(a)\1")),
        ("regex bomb", regex("((a{1,1000}){1,1000}){1,1000}")),
        ("regex dots", regex(&"(.*a){20}".repeat(50))),
        ("regex counts", regex("[ab]*a[ab]{500}c")),
        ("regex classes", regex(&r"\p{L}{1,500}".repeat(20))),
        ("regex nested", regex(&nested("(", ")", 100_000))),
        ("regex nested optional", regex(&nested("(a", ")?", 80_000))),
        ("regex long", regex(&"a".repeat(300 << 10))),
        ("regex nothing", regex("[^\\x00-\\x{10FFFF}]")),
        ("regex empty", regex("")),
        ("no choice", Constraint::Choice(vec![])),
        ("many choices", Constraint::Choice((0..20_000).map(|i| format!("choice {i}")).collect())),
        ("lark empty", lark(String::new())),
        ("lark garbage", lark("\u{0}\u{1}{{{{".to_string())),
        ("gbnf", lark("root ::= \"a\"".to_string())),
        ("lark no start", lark("a: \"b\"".to_string())),
        ("lark endless", lark("start: start".to_string())),
        ("lark left recursion", lark("start: start start | \"a\" | \"\"".to_string())),
        ("lark nested", lark(format!("start: {}", nested("(", ")", 100_000)).replace('a', "\"a\""))),
        (
            "lark rules",
            lark((0..9000).map(|i| format!("r{i}: r{}\n", i + 1)).collect::<String>() + "r9000: \"a\"\nstart: r0"),
        ),
        (
            "lark terminals",
            lark(
                (0..6000).map(|i| format!("T{i}: T{} \"a\"?\n", i + 1)).collect::<String>() + "T6000: \"a\"\nstart: T0",
            ),
        ),
        (
            "lark terminals doubling",
            lark(
                (0..60).map(|i| format!("T{i}: T{} T{}\n", i + 1, i + 1)).collect::<String>() + "T60: \"a\"\nstart: T0",
            ),
        ),
        ("lark terminals in a circle", lark("start: A\nA: B\nB: A".to_string())),
        ("lark repeats", lark("start: ((\"a\"{1,1000}){1,1000}){1,1000}".to_string())),
        (
            "lark conditions",
            lark(format!(
                "start: a::0\na::_: \"b\" %if {}is_zeros([0:1]){}",
                "and(".repeat(50_000),
                ")".repeat(50_000)
            )),
        ),
        ("lark json", lark(format!("start: %json {}", nested("{\"items\":", "}", 20_000).replace('a', "{}")))),
        ("lark includes", lark("%import common.NUMBER\n%import /etc/passwd\nstart: NUMBER".to_string())),
        ("lark token ids", lark("start: <[99999999]>".to_string())),
        ("lark special", lark("start: <|nosuchtoken|>".to_string())),
    ];
    for (name, constraint) in cases {
        let start = Instant::now();
        let got = compiler.compile(&constraint, "response_format.json_schema");
        assert!(start.elapsed() < Duration::from_secs(12), "{name}: {:?}", start.elapsed());
        match got {
            Err(error) => {
                assert!(matches!(error, Error::Input { .. }), "{name}: {error}");
                let text = error.to_string();
                assert!(text.starts_with("response_format.json_schema: ") && text.len() < 600, "{name}: {text}");
            }
            Ok(matcher) => walk(name, matcher),
        }
    }
}

/// Draws tokens of a hostile grammar as it allows them, on a stack as small as a thread pool's may be: it ends with an error of its own
/// or goes on, but never takes long.
fn walk(name: &str, mut matcher: Matcher) {
    let drawing = move || {
        let mut random = Random::new(3);
        for _ in 0..60 {
            let start = Instant::now();
            let Ok(allowed) = matcher.allowed() else { break };
            let ids: Vec<u32> = (1..VOCAB as u32).filter(|&id| allowed.contains(id)).collect();
            if ids.is_empty() || matcher.advance(ids[random.below(ids.len())]).is_err() || matcher.is_finished() {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
        }
    };
    let thread =
        std::thread::Builder::new().name(name.to_string()).stack_size(1 << 20).spawn(drawing).expect("a thread");
    thread.join().unwrap_or_else(|_| panic!("{name}: see above"));
}

/// A grammar that is ambiguous without end takes its share of time and no more, whoever advances it.
#[test]
fn ambiguous_grammars_run_out_of_time() {
    let (tokenizer, compiler) = demo();
    let lark = Constraint::Lark("start: start start start start | /[a-z]/ | \"\"".to_string());
    let mut matcher = compiler.compile(&lark, "structured_outputs.grammar").expect("compiles");
    let id = tokenizer.token_to_id("a").expect("a letter");
    let start = Instant::now();
    let error = (0..500).find_map(|_| matcher.allowed().and_then(|_| matcher.advance(id)).err()).expect("it ends");
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert!(error.to_string().starts_with("structured_outputs.grammar: after "), "{error}");
    // Once it has failed it stays so.
    assert!(matcher.allowed().is_err());
}

#[test]
fn errors_say_what_is_wrong() {
    let (_, compiler) = demo();
    let schema = |schema: Value| Constraint::JsonSchema(schema);
    let cases = [
        (
            schema(json!({ "$ref": "http://127.0.0.1:9/x.json" })),
            "refers to a schema elsewhere, and none is fetched; put it under `$defs`",
        ),
        (schema(json!({ "type": "string", "pattern": 5 })), "Expected string for 'pattern', got 5"),
        (schema(json!({ "type": "string", "pattern": "(" })), "regular expression: unclosed group"),
        (schema(json!({ "oneOf": [{ "type": "integer" }, { "type": "number" }] })), "use `anyOf`"),
        (schema(json!({ "type": "array", "uniqueItems": true })), "keywords that are not supported: [\"uniqueItems\"]"),
        (schema(json!({ "type": "string", "format": "moon" })), "Unknown format: moon"),
        (schema(json!({ "type": "integer", "minimum": 5, "maximum": 4 })), "minimum (5) is greater than maximum (4)"),
        (schema(json!({ "$ref": "#" })), "nothing matches it"),
        (schema(json!("x")), "must be an object or boolean"),
        (Constraint::Regex("a(?=b)".into()), "look-around"),
        (Constraint::Regex(r"(a)\1".into()), "backreferences are not supported"),
        (Constraint::Regex("x".repeat(300 << 10)), "is 307200 bytes long, more than 256 KiB"),
        (Constraint::Lark("x".repeat(65 << 10)), "is 66560 bytes long, more than 64 KiB"),
        (Constraint::Choice(vec![]), "is empty; give at least one text"),
        (Constraint::Lark("a: \"b\"".into()), "no start rule"),
        (Constraint::Lark("start: <|nosuchtoken|>".into()), "unknown special token"),
    ];
    for (constraint, needle) in cases {
        let error = compiler.compile(&constraint, "guided").expect_err("it is wrong");
        assert!(matches!(error, Error::Input { .. }), "{error}");
        let text = error.to_string();
        assert!(text.starts_with("guided: ") && text.contains(needle), "{constraint:?}: {text}");
    }
}

/// Anchors, slashes and classes of a regular expression, and JSON's blanks.
#[test]
fn texts_are_matched_as_a_whole() {
    let (tokenizer, compiler) = demo();
    let taken = |constraint: &Constraint, text: &str| {
        takes(&compiler.compile(constraint, "field").expect("compiles"), &tokenizer, text)
    };
    for (regex, text, expected) in [
        ("abc", "abc", Some(true)),
        ("abc", "ab", Some(false)),
        ("abc", "abcd", None),
        ("^abc$", "abc", Some(true)),
        (r"a\$", "a$", Some(true)),
        ("a|b", "b", Some(true)),
        ("", "", Some(true)),
        ("", "a", None),
        (r"\d{2}", "12", Some(true)),
        ("(?i)abc", "ABC", Some(true)),
        ("a/b", "a/b", Some(true)),
        (".", "\n", None),
        ("é+", "éé", Some(true)),
    ] {
        assert_eq!(taken(&Constraint::Regex(regex.into()), text), expected, "{regex} {text:?}");
    }
    let indented = |n: usize| format!("{{\n{}}}", " ".repeat(n));
    for (text, expected) in [
        ("{}", Some(true)),
        ("{\n  \"a\": [1, 2.5e3, null, \"x\\n\"],\n  \"b\": {}\n}", Some(true)),
        (" {}", None),
        ("{} ", None),
        ("[]", None),
        ("{\"a\"}", None),
        // A model with nothing to say ends sometime.
        (&indented(40), Some(true)),
        (&indented(41), None),
        ("{ \r\n\t}", None),
        ("{\r\n\t}", Some(true)),
    ] {
        assert_eq!(taken(&Constraint::JsonObject, text), expected, "{text:?}");
    }
    // Options of the parser in a schema change nothing.
    let options =
        json!({ "x-guidance": { "lenient": true, "item_separator": ";" }, "type": "array", "items": { "const": 1 } });
    assert_eq!(taken(&Constraint::JsonSchema(options.clone()), "[1,1]"), Some(true));
    assert_eq!(taken(&Constraint::JsonSchema(options), "[1;1]"), None);
}

/// The bytes that a grammar sees of each token are those that the text has of it, in every style of vocabulary; what has no text is
/// never allowed.
#[test]
fn tokens_are_what_they_add_to_the_text() {
    for (decoder, embedding) in [(sequence_decoder(), 300), (sequence_decoder(), 272), (metaspace_decoder(), 272)] {
        let has_bytes = decoder != metaspace_decoder();
        let tokenizer = load(&llama_style(decoder), json!({}), embedding).expect("a tokenizer");
        let compiler = GrammarCompiler::new(&tokenizer, &[2]).expect("a compiler");
        let rows = embedding as u32;
        let any = compiler.compile(&Constraint::Regex(r"[\s\S]*".into()), "regex").expect("compiles");
        let allowed = any.allowed().expect("a set");
        assert_eq!(allowed.words().len(), embedding.div_ceil(32));
        for id in 0..rows {
            let text = tokenizer.detokenizer(false).continuing().push(id);
            let is_special = id < 3;
            let is_lone_byte = has_bytes && (3..259).contains(&id);
            let begins_a_character =
                std::str::from_utf8(&[(id.wrapping_sub(3)) as u8]).is_ok() || (0xc2 + 3..=0xf4 + 3).contains(&id);
            let expected = match (is_special, is_lone_byte) {
                (true, _) => id == 2,
                (_, true) => begins_a_character,
                _ => !text.is_empty(),
            };
            assert_eq!(allowed.contains(id), expected, "token {id}, {text:?}");
        }
        assert!(!allowed.contains(rows) && !allowed.contains(u32::MAX));
        // Blanks are blanks from the first token on.
        let hello = compiler.compile(&Constraint::Regex(" hello( {2}hello)?".into()), "regex").expect("compiles");
        let id = |token: &str| tokenizer.token_to_id(token).expect("a token");
        let mut matcher = hello;
        for token in ["▁hello", "▁", "▁hello"] {
            assert!(matcher.allowed().expect("a set").contains(id(token)), "{token}");
            matcher.advance(id(token)).expect("allowed");
        }
        assert!(matcher.is_finished());
        let text = |ids: &[u32]| {
            let mut stream = tokenizer.detokenizer(true).continuing();
            ids.iter().map(|&id| stream.push(id)).collect::<String>() + &stream.finish()
        };
        assert_eq!(text(&[id("▁hello"), id("▁"), id("▁hello")]), " hello  hello");
        if has_bytes {
            // A character of byte tokens.
            let mut matcher = compiler.compile(&Constraint::Choice(vec!["ü".into()]), "choice").expect("compiles");
            for token in ["<0xC3>", "<0xBC>"] {
                let allowed = matcher.allowed().expect("a set");
                assert_eq!((0..rows).filter(|&id| allowed.contains(id)).collect::<Vec<_>>(), [id(token)]);
                matcher.advance(id(token)).expect("allowed");
            }
            assert!(matcher.is_finished() && matcher.is_accepting());
        }
    }
}

/// What was compiled is found again, and its matchers are each their own.
#[test]
fn matchers_share_nothing_that_changes() {
    let (tokenizer, compiler) = demo();
    let constraint = Constraint::JsonSchema(json!({ "enum": ["vase", "value", "w"] }));
    let first = compiler.compile(&constraint, "a").expect("compiles");
    let mut second = compiler.clone().compile(&constraint, "b").expect("compiles");
    assert_eq!(compiler.cache().0, 1);
    assert_eq!((first.field(), second.field()), ("a", "b"));
    let before = first.allowed().expect("a set");
    let id = tokenizer.token_to_id("\"").expect("a quote");
    second.advance(id).expect("allowed");
    let branch = second.clone();
    second.advance(tokenizer.token_to_id("v").expect("a letter")).expect("allowed");
    assert_eq!(first.allowed().expect("a set"), before);
    assert_ne!(branch.allowed().expect("a set"), second.allowed().expect("a set"));
    assert!(branch.allowed().expect("a set").contains(tokenizer.token_to_id("v").expect("a letter")));
}

/// The cache holds what fits and forgets the rest, the least recently used first.
#[test]
fn the_cache_is_bounded() {
    let (_, compiler) = demo();
    let values = |i: usize| json!({ "enum": (0..9000).map(|j| format!("number {j} of {i}")).collect::<Vec<_>>() });
    for i in 0..9 {
        compiler.compile(&Constraint::JsonSchema(values(i)), "schema").expect("compiles");
        let (grammars, bytes) = compiler.cache();
        assert!(grammars >= 1 && bytes <= MAX_CACHE_BYTES, "{grammars} of {bytes} bytes");
    }
    assert!(compiler.cache().0 < 9, "{:?}", compiler.cache());
}

//! Outputs that are held to a grammar: what they say is checked by other people's parsers, and nothing else about them changes.

use std::sync::LazyLock;

use lowbit::engine::{FinishReason, Matcher};
use lowbit::text::{Constraint, GrammarCompiler, Tokenizer};
use serde_json::{Value, json};

use super::*;

const EOS: u32 = 0;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::load(Path::new(DEMO), 4096).expect("the demo's"));
static COMPILER: LazyLock<GrammarCompiler> =
    LazyLock::new(|| GrammarCompiler::new(&TOKENIZER, &[EOS]).expect("a compiler"));

fn matcher(constraint: &Constraint) -> Matcher {
    COMPILER.compile(constraint, "response_format").unwrap_or_else(|e| panic!("{constraint:?}: {e}"))
}

fn regex(text: &str) -> Constraint {
    Constraint::Regex(text.to_string())
}

/// A request at temperature 1.
fn asked(constraint: &Constraint, seed: u64, max_tokens: usize) -> Request {
    let params = SamplingParams { seed: Some(seed), stop_token_ids: vec![EOS], ..SamplingParams::default() };
    Request { constraint: Some(matcher(constraint)), ..Request::new(vec![833, 10, 489], params, max_tokens) }
}

/// Its text, and whether the grammar or the model ended it.
fn text(outcome: &Outcome, choice: usize) -> (String, bool) {
    assert!(outcome.error.is_none(), "{:?}", outcome.error);
    let mut stream = TOKENIZER.detokenizer(true).continuing();
    let mut text: String = outcome.tokens(choice).into_iter().map(|id| stream.push(id)).collect();
    text += &stream.finish();
    (text, outcome.finished[&choice] == FinishReason::Stop)
}

fn submit_all(engine: &mut Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Outcome> {
    let ids: Vec<RequestId> = requests.into_iter().map(|r| engine.submit(r).expect("submits")).collect();
    let mut outcomes = finish(engine);
    ids.iter().map(|id| outcomes.remove(id).expect("something came of it")).collect()
}

/// Whatever the model draws, an independent validator accepts it, and a batch of 64 gives what each request gets alone.
#[test]
fn schemas_are_kept_to() {
    let schemas: Vec<Value> = serde_json::from_str(include_str!("schemas.json")).expect("JSON");
    assert!(schemas.len() >= 50);
    let seeds = 3;
    let all = || {
        let each = schemas.iter().flat_map(|schema| (0..seeds).map(move |seed| (schema, seed)));
        each.map(|(schema, seed)| asked(&Constraint::JsonSchema(schema.clone()), seed, 240))
    };
    let outcomes = submit_all(&mut engine(Limits::new(256, 512, 64)), all());
    let mut complete = 0;
    for (at, outcome) in outcomes.iter().enumerate() {
        let schema = &schemas[at / seeds as usize];
        let (text, has_ended) = text(outcome, 0);
        if has_ended {
            complete += 1;
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{schema}: {text:?}: {e}"));
            let validator = jsonschema::options().should_validate_formats(true).build(schema).expect("a schema");
            let wrong: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
            assert!(wrong.is_empty(), "{schema}: {text:?}: {wrong:?}");
        }
    }
    assert!(complete * 10 >= outcomes.len() * 8, "{complete} of {} are complete", outcomes.len());
    let mut single = engine(Limits::new(256, 512, 1));
    for (at, request) in all().enumerate().step_by(23) {
        assert_eq!(alone(&mut single, request).choices, outcomes[at].choices, "{}", schemas[at / seeds as usize]);
    }
}

/// The whole text matches, and texts that the grammar alone ends take no step more than their tokens.
#[test]
fn regular_expressions_match_as_a_whole() {
    let expressions = [
        "[a-z]{3,8}",
        "(yes|no|maybe)",
        r"\d{1,3}\.\d{2}",
        "(the|an?) [A-Z][a-z]{2,6}( said)?\\.",
        "[^a-z]{4}",
        "é{2}ü|日本+語",
        "(?i)once upon",
        r"\w+@\w+\.(com|org)",
        "^a{2,5}$",
        r"[\s\S]{5}",
        "",
        "/+ # not a comment",
    ];
    let requests = expressions.iter().flat_map(|re| (0..4).map(|seed| asked(&regex(re), seed, 60)));
    let outcomes = submit_all(&mut engine(Limits::new(128, 256, 16)), requests);
    let mut complete = 0;
    for (at, outcome) in outcomes.iter().enumerate() {
        let expression = expressions[at / 4];
        let (text, has_ended) = text(outcome, 0);
        if has_ended {
            complete += 1;
            let whole = regex::Regex::new(&format!("^(?:{expression})\\z")).expect("an expression");
            assert!(whole.is_match(&text), "{expression}: {text:?}");
        }
    }
    assert!(complete >= outcomes.len() - 6, "{complete} of {}", outcomes.len());
    // Three characters cannot go on.
    let outcome = alone(&mut engine(Limits::new(64, 64, 1)), asked(&regex("[a-z]{3}"), 1, 60));
    assert!(!outcome.tokens(0).contains(&EOS), "{:?}", outcome.tokens(0));
}

#[test]
fn choices_objects_and_lark() {
    let texts = ["one", "one two", "\"three\" \\ four\n", "五"].map(String::from).to_vec();
    let lark =
        "start: greeting \" \" NAME (\" and \" NAME){0,2}\ngreeting: \"hello\" | \"bye\"\nNAME: /[A-Z][a-z]{1,5}/";
    let turn =
        "start: \"call \" <|im_start|> %json {\"type\": \"integer\", \"minimum\": 10, \"maximum\": 12} <|im_end|>";
    let requests = (0..6).flat_map(|seed| {
        [
            Constraint::Choice(texts.clone()),
            Constraint::Lark(lark.into()),
            Constraint::Lark(turn.into()),
            Constraint::JsonObject,
        ]
        .map(|constraint| asked(&constraint, seed, 100))
    });
    let outcomes = submit_all(&mut engine(Limits::new(128, 256, 24)), requests);
    let sentence =
        regex::Regex::new("^(hello|bye) [A-Z][a-z]{1,5}( and [A-Z][a-z]{1,5}){0,2}$").expect("an expression");
    for four in outcomes.chunks(4) {
        let (choice, ended) = text(&four[0], 0);
        assert!(ended && texts.contains(&choice), "{choice:?}");
        let (spoken, ended) = text(&four[1], 0);
        assert!(ended && sentence.is_match(&spoken), "{spoken:?}");
        // Special tokens stand where they are named and have no text.
        let (call, ended) = text(&four[2], 0);
        assert!(ended && ["call 10", "call 11", "call 12"].contains(&call.as_str()), "{call:?}");
        assert!(four[2].tokens(0).contains(&1) && four[2].tokens(0).ends_with(&[2]), "{:?}", four[2].tokens(0));
        let (object, ended) = text(&four[3], 0);
        assert!(object.starts_with('{'), "{object:?}");
        assert!(!ended || serde_json::from_str::<Value>(&object).is_ok_and(|value| value.is_object()), "{object:?}");
    }
}

/// Sequences that give their blocks up and are computed again go on where their grammar was.
#[test]
fn preemption_changes_nothing() {
    let constraint = regex("([a-z]{1,7} ){40}");
    let requests = || (0..6).map(|seed| asked(&constraint, seed, 70));
    let mut roomy = engine(Limits::new(96, 96, 1));
    let each: Vec<_> = requests().map(|request| alone(&mut roomy, request).choices).collect();
    let checkpoint = Checkpoint::open(Path::new(DEMO)).expect("the demo opens");
    let limits = Limits { kv_blocks: 6, ..Limits::new(96, 96, 6) };
    let model = ModelRunner::load(&checkpoint, &Device::cpu(), limits, &mut |_, _| ()).expect("the demo loads");
    let mut tight = Engine::new(model);
    let together = submit_all(&mut tight, requests());
    assert!(tight.load().preemptions > 1, "{:?}", tight.load());
    assert_eq!(together.into_iter().map(|outcome| outcome.choices).collect::<Vec<_>>(), each);
}

/// Each choice has a grammar of its own, from its start.
#[test]
fn choices_of_a_request_are_constrained_one_by_one() {
    let constraint = Constraint::JsonSchema(
        json!({ "type": "array", "items": { "enum": ["a", "b", "c"] }, "minItems": 3, "maxItems": 5 }),
    );
    let mut single = engine(Limits::new(96, 96, 1));
    let each: Vec<_> =
        (5..9).map(|seed| alone(&mut single, asked(&constraint, seed, 60)).choices[&0].clone()).collect();
    assert!(each[0] != each[1] || each[1] != each[2], "the seeds differ");
    for max_seqs in [4, 2] {
        let mut engine = engine(Limits::new(96, 96, max_seqs));
        let outcome = alone(&mut engine, Request { n: 4, ..asked(&constraint, 5, 60) });
        let got: Vec<_> = (0..4).map(|choice| outcome.choices[&choice].clone()).collect();
        assert_eq!(got, each, "{max_seqs} at once");
    }
}

/// A request whose grammar comes to nothing fails; those beside it go on as if it had not been there.
#[test]
fn a_dead_end_fails_its_request_alone() {
    let free = || request(vec![489, 3490], 30);
    let expected = alone(&mut engine(Limits::new(96, 96, 1)), free()).tokens(0);
    let banned = |mut request: Request| {
        let x = TOKENIZER.encode("x", false).expect("an id");
        request.params.logit_bias = x.iter().chain([&EOS]).map(|&id| (id, f32::NEG_INFINITY)).collect();
        request
    };
    let early = |mut request: Request| {
        request.params.min_tokens = 20;
        request
    };
    let too_ambiguous = Constraint::Lark("start: start start start start | /[a-z]/ | \"\"".into());
    let mut engine = engine(Limits::new(400, 512, 8));
    let outcomes = submit_all(
        &mut engine,
        [
            free(),
            banned(asked(&regex("x"), 1, 20)),
            early(asked(&regex("[a-z]{4}"), 1, 30)),
            early(asked(&regex("[a-z]{4}|"), 1, 30)),
            asked(&too_ambiguous, 1, 300),
            free(),
            early(asked(&regex("[a-z ]{400}"), 1, 30)),
        ],
    );
    assert_eq!([outcomes[0].tokens(0), outcomes[5].tokens(0)], [&expected[..]; 2]);
    let error = |at: usize| outcomes[at].error.as_ref().expect("it failed");
    for (at, needle) in [
        (1, "logit_bias: this and the other bans leave no token that the model and the grammar allow"),
        (2, "min_tokens: 20 are asked for, but after"),
        (3, "min_tokens: 20 are asked for, but after"),
        (4, "response_format: after"),
    ] {
        assert!(matches!(error(at), Error::Input { .. }) && error(at).to_string().contains(needle), "{}", error(at));
    }
    assert!(outcomes[6].error.is_none() && outcomes[6].tokens(0).len() == 30);
    assert_eq!(engine.load().used_blocks, 0);
}

/// End tokens are not drawn while there is something else to say, and what can only end ends.
#[test]
fn a_complete_text_ends_in_spite_of_ignore_eos() {
    let mut engine = engine(Limits::new(96, 96, 1));
    let going_on = |constraint: &Constraint, seed| {
        let mut request = asked(constraint, seed, 40);
        request.params.ignore_eos = true;
        request
    };
    for seed in 0..6 {
        let outcome = alone(&mut engine, going_on(&regex("(a|b|c){0,9}"), seed));
        let (text, has_ended) = text(&outcome, 0);
        assert!(has_ended && text.len() == 9, "{text:?}");
    }
    let outcome = alone(&mut engine, going_on(&regex(""), 1));
    assert_eq!((outcome.tokens(0), outcome.finished[&0]), (vec![EOS], FinishReason::Stop));
}

/// What is drawn is the model's own distribution over the allowed tokens, told with the model's own probabilities.
#[test]
fn probabilities_are_the_models() {
    let mut engine = engine(Limits::new(64, 64, 1));
    let mut all = request(vec![833, 10, 489], 1);
    all.params.logprobs = Some(4096);
    let id = engine.submit(all).expect("submits");
    let mut free = BTreeMap::new();
    while !engine.is_idle() {
        for event in engine.step() {
            if let Event::Token { id: of, token, .. } = event {
                assert_eq!(of, id);
                free = token.top.into_iter().collect::<BTreeMap<u32, f32>>();
            }
        }
    }
    let constraint = Constraint::Choice(["the", "and", "he"].map(String::from).to_vec());
    let set = matcher(&constraint).allowed().expect("a start");
    let allowed: Vec<u32> = (0..4096).filter(|&id| set.contains(id)).collect();
    let total: f32 = allowed.iter().map(|id| free[id].exp()).sum();
    let draws = 600;
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for seed in 0..draws {
        let outcome = alone(&mut engine, asked(&constraint, seed, 1));
        let (id, logprob) = outcome.choices[&0][0];
        assert!((logprob - free[&id]).abs() < 1e-5, "{id}: {logprob} is not {}", free[&id]);
        *counts.entry(id).or_default() += 1;
    }
    for id in allowed {
        let p = f64::from(free[&id].exp() / total);
        let expected = p * draws as f64;
        let deviation = (expected * (1.0 - p)).sqrt();
        let got = counts.get(&id).copied().unwrap_or(0) as f64;
        assert!((got - expected).abs() <= 5.0 * deviation + 1.0, "{id}: {got} of {draws}, expected {expected:.1}");
    }
}

#[test]
fn another_models_grammar_is_refused() {
    let mut tiny = tiny(None, Limits::new(64, 64, 1), EngineOptions::default());
    let request = Request { constraint: Some(matcher(&regex("a"))), ..request(vec![1], 4) };
    refused(tiny.submit(request), "response_format: is of a vocabulary of 4096, the model's has 96");
}

//! The engine: what a request gets, alone and among others.

mod constraint;
mod failures;
mod prefix;
mod property;
mod prompt_outputs;

use std::collections::BTreeMap;
use std::path::Path;

use lowbit::checkpoint::{Checkpoint, ModelConfig};
use lowbit::device::Device;
use lowbit::engine::sampling::SamplingParams;
use lowbit::engine::{Engine, EngineOptions, Event, FinishReason, Pooling, PromptOutput, Request, RequestId};
use lowbit::error::Error;
use lowbit::models::{DummyScheme, Limits, Model, ModelRunner, dummy_config};

const DEMO: &str = "assets/books-6m-gptq";

fn engine(limits: Limits) -> Engine {
    let checkpoint = Checkpoint::open(Path::new(DEMO)).expect("the demo opens");
    let model = ModelRunner::load(&checkpoint, &Device::cpu(), limits, &mut |_, _| ()).expect("the demo loads");
    Engine::new(model)
}

fn request(prompt_ids: Vec<u32>, max_tokens: usize) -> Request {
    Request::new(prompt_ids, SamplingParams { ignore_eos: true, ..SamplingParams::greedy() }, max_tokens)
}

/// A shape so small that a step takes a fraction of a millisecond: two layers, 96 tokens, grouped queries.
fn tiny_config(window: Option<usize>) -> ModelConfig {
    ModelConfig {
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 96,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        windows: vec![window; 2],
        ..dummy_config("llama-1.1b").expect("a known shape")
    }
}

fn tiny_model(config: ModelConfig, limits: Limits) -> Model {
    let scheme = DummyScheme::WeightOnly(8, 32);
    Model::dummy(config, scheme, DummyScheme::Bf16, &Device::cpu(), &limits, &mut |_, _| ()).expect("fits")
}

fn tiny(window: Option<usize>, limits: Limits, options: EngineOptions) -> Engine {
    let model = tiny_model(tiny_config(window), limits);
    Engine::with_options(ModelRunner::new(model, limits).expect("fits"), options)
}

/// What a request has come to.
#[derive(Debug, Default)]
struct Outcome {
    prompt: Option<PromptOutput>,
    /// Tokens and log-probabilities by choice.
    choices: BTreeMap<usize, Vec<(u32, f32)>>,
    finished: BTreeMap<usize, FinishReason>,
    error: Option<Error>,
}

impl Outcome {
    fn tokens(&self, choice: usize) -> Vec<u32> {
        self.choices.get(&choice).into_iter().flatten().map(|t| t.0).collect()
    }
}

/// Takes in one event; nothing may come before a prompt is computed or after the end.
fn record(outcomes: &mut BTreeMap<RequestId, Outcome>, event: Event) {
    match event {
        Event::Prompt { id, output, .. } => {
            let first = outcomes.entry(id).or_default().prompt.replace(output);
            assert!(first.is_none(), "{id:?}: its prompt is done twice");
        }
        Event::Token { id, choice, token } => {
            let outcome = outcomes.entry(id).or_default();
            assert!(outcome.prompt.is_some() && outcome.error.is_none(), "{id:?}: a token out of turn");
            assert!(!outcome.finished.contains_key(&choice), "{id:?}: a token behind the end of choice {choice}");
            outcome.choices.entry(choice).or_default().push((token.id, token.logprob));
        }
        Event::Finished { id, choice, reason } => {
            let first = outcomes.entry(id).or_default().finished.insert(choice, reason);
            assert!(first.is_none(), "{id:?}: choice {choice} ends twice");
        }
        Event::Failed { id, error } => {
            let first = outcomes.entry(id).or_default().error.replace(error);
            assert!(first.is_none(), "{id:?} fails twice");
        }
    }
}

/// One step, the books right after it.
fn step(engine: &mut Engine, outcomes: &mut BTreeMap<RequestId, Outcome>) {
    engine.step().into_iter().for_each(|event| record(outcomes, event));
    engine.audit().expect("the books are right");
}

/// Steps until idle.
fn finish(engine: &mut Engine) -> BTreeMap<RequestId, Outcome> {
    let mut outcomes = BTreeMap::new();
    while !engine.is_idle() {
        step(engine, &mut outcomes);
    }
    outcomes
}

/// Runs until idle; tokens and log-probabilities by request.
fn run(engine: &mut Engine, ids: &[RequestId]) -> Vec<Vec<(u32, f32)>> {
    let mut outcomes = finish(engine);
    let mut take = |id| {
        let outcome = outcomes.remove(id).expect("something came of it");
        assert_eq!(outcome.finished, BTreeMap::from([(0, FinishReason::Length)]), "{:?}", outcome.error);
        outcome.choices[&0].clone()
    };
    ids.iter().map(&mut take).collect()
}

/// One request in an engine by itself.
fn alone(engine: &mut Engine, request: Request) -> Outcome {
    let id = engine.submit(request).expect("submits");
    finish(engine).remove(&id).expect("something came of it")
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![833], (10..60).collect(), vec![489, 3490, 857, 358, 263], (1000..1017).collect(), (200..333).collect()]
}

/// Sharing a batch, waiting for a place in it, and a prompt cut into chunks change no token.
#[test]
fn batching_and_chunking_change_nothing() {
    let mut alone = Vec::new();
    let mut single = engine(Limits::new(256, 256, 1));
    for p in prompts() {
        let id = single.submit(request(p, 12)).expect("submits");
        alone.extend(run(&mut single, &[id]));
    }
    for (max_seqs, max_batch_tokens) in [(5, 512), (3, 16), (2, 7)] {
        let mut engine = engine(Limits::new(256, max_batch_tokens, max_seqs));
        let ids: Vec<_> = prompts().into_iter().map(|p| engine.submit(request(p, 12)).expect("submits")).collect();
        assert_eq!(run(&mut engine, &ids), alone, "{max_seqs} sequences, {max_batch_tokens} tokens a pass");
        assert_eq!(engine.load().used_blocks, 0);
    }
}

#[test]
fn abort_frees_blocks_and_leaves_others_alone() {
    let mut engine = engine(Limits::new(64, 64, 2));
    let first = engine.submit(request(vec![833], 40)).expect("submits");
    let second = engine.submit(request(vec![489], 5)).expect("submits");
    let waits = engine.submit(request(vec![1], 5)).expect("submits");
    engine.step();
    let before = engine.load();
    assert_eq!((before.running, before.waiting), (2, 1));
    engine.abort(first);
    engine.abort(waits);
    engine.abort(RequestId(999));
    assert!(engine.load().used_blocks < before.used_blocks && engine.load().waiting == 0);
    let mut tokens = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Token { id, .. } => {
                    assert_eq!(id, second);
                    tokens += 1;
                }
                Event::Finished { id, .. } => assert_eq!(id, second),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(tokens, 4, "one of five came before the abort");
}

fn refused(r: Result<RequestId, Error>, needle: &str) {
    let error = r.expect_err("refused");
    assert!(matches!(error, Error::Input { .. }), "{error}");
    assert!(error.to_string().contains(needle), "{error}");
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let mut engine = engine(Limits::new(64, 64, 1));
    refused(engine.submit(request(vec![], 1)), "empty");
    refused(engine.submit(request(vec![4096], 1)), "4096");
    refused(engine.submit(request(vec![1], 0)), "max_tokens");
    refused(engine.submit(request(vec![1; 60], 5)), "between 1 and 4");
    refused(engine.submit(request(vec![1], usize::MAX)), "max_tokens");
    for n in [0, 129, usize::MAX] {
        refused(engine.submit(Request { n, ..request(vec![1], 1) }), "n: expected 1 to 128");
    }
    refused(engine.submit(Request { prompt_logprobs: Some(129), ..request(vec![1], 1) }), "at most 128");
    let scored = Request { prompt_logprobs: Some(0), ..request(vec![1; 64], 0) };
    refused(engine.submit(Request { n: 2, ..scored.clone() }), "expected 1 where max_tokens is 0");
    refused(engine.submit(Request { prompt_ids: vec![1; 65], ..scored.clone() }), "max_tokens");
    assert!(engine.submit(scored).is_ok(), "nothing is generated");
    assert!(engine.submit(request(vec![1; 60], 4)).is_ok(), "exactly the limit fits");
    // 49 tokens are computed, 48 have room.
    let mut small = tiny(None, Limits { kv_blocks: 3, ..Limits::new(64, 64, 1) }, EngineOptions::default());
    refused(small.submit(request(vec![1; 40], 10)), "49 tokens need 4 KV blocks, there are 3");
    assert!(small.submit(request(vec![1; 40], 9)).is_ok());
}

/// The same seed draws the same tokens whatever else is in the batch.
#[test]
fn seeds_repeat_in_any_batch() {
    let params = SamplingParams { temperature: 1.0, seed: Some(7), ignore_eos: true, ..SamplingParams::default() };
    let sampled = || Request::new(vec![489, 3490, 857], params.clone(), 20);
    let tokens = |out: &[(u32, f32)]| out.iter().map(|t| t.0).collect::<Vec<_>>();
    let mut one = engine(Limits::new(64, 64, 1));
    let id = one.submit(sampled()).expect("submits");
    let alone = tokens(&run(&mut one, &[id])[0]);
    let mut many = engine(Limits::new(64, 64, 3));
    let ids = [many.submit(sampled()), many.submit(request(vec![833], 9)), many.submit(sampled())]
        .map(|r| r.expect("submits"));
    let out = run(&mut many, &ids);
    assert_eq!(tokens(&out[0]), alone);
    assert_eq!(tokens(&out[2]), alone);
    assert_ne!(tokens(&out[1]), alone[..9]);
}

/// While an engine drains it finishes what it has and takes nothing new.
#[test]
fn a_draining_engine_finishes() {
    let mut engine = tiny(None, Limits::new(64, 64, 1), EngineOptions::default());
    let ids = [1, 2].map(|first| engine.submit(request(vec![first], 5)).expect("submits"));
    let mut outcomes = BTreeMap::new();
    step(&mut engine, &mut outcomes);
    engine.drain();
    let error = engine.submit(request(vec![3], 5)).expect_err("it is draining");
    assert!(matches!(error, Error::Engine { .. }) && error.to_string().contains("draining"), "{error}");
    assert!(engine.fault().is_none() && !engine.is_idle());
    while !engine.is_idle() {
        step(&mut engine, &mut outcomes);
    }
    assert_eq!(ids.map(|id| (outcomes[&id].tokens(0).len(), outcomes[&id].finished.len())), [(5, 1); 2]);
}

/// Each choice is what a request for one gets with the choice's number added to its seed.
#[test]
fn choices_are_requests_with_their_own_seeds() {
    let params = |seed| SamplingParams {
        temperature: 1.5,
        repetition_penalty: 1.2,
        frequency_penalty: 0.3,
        seed: Some(seed),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    // 40 tokens: two full blocks and a part of one, which each choice computes for itself; 32: whole blocks alone.
    for prompt in [40, 32, 3] {
        let asked = |seed| Request::new((0..prompt).map(|i| (7 * i + 3) % 96).collect(), params(seed), 20);
        let limits = Limits::new(64, 64, 4);
        let each: Vec<_> = (7..11)
            .map(|seed| alone(&mut tiny(None, limits, EngineOptions::default()), asked(seed)).tokens(0))
            .collect();
        assert!(each[0] != each[1] && each[1] != each[2], "the seeds differ");
        for (max_seqs, prefix_caching) in [(4, true), (4, false), (2, true), (2, false)] {
            let options = EngineOptions { prefix_caching, ..EngineOptions::default() };
            let mut engine = tiny(None, Limits { max_seqs, ..limits }, options);
            let id = engine.submit(Request { n: 4, ..asked(7) }).expect("submits");
            let mut outcomes = BTreeMap::new();
            step(&mut engine, &mut outcomes);
            // All have their first token from the one pass over the prompt, whose full blocks are there once.
            assert_eq!(outcomes[&id].choices.len(), 4);
            assert_eq!(engine.load().used_blocks, (prompt as usize).div_ceil(16));
            while !engine.is_idle() {
                step(&mut engine, &mut outcomes);
            }
            let got: Vec<_> = (0..4).map(|choice| outcomes[&id].tokens(choice)).collect();
            assert_eq!(got, each, "{prompt} tokens, {max_seqs} at once, prefix cache {prefix_caching}");
            assert_eq!(engine.load().used_blocks, 0);
        }
    }
}

/// An abort ends all choices, those that run and those that wait.
#[test]
fn an_abort_ends_all_choices() {
    let mut engine = tiny(None, Limits::new(64, 64, 3), EngineOptions::default());
    let id = engine.submit(Request { n: 5, ..request(vec![1; 20], 20) }).expect("submits");
    engine.step();
    assert_eq!((engine.load().running, engine.load().waiting), (3, 2));
    engine.abort(id);
    assert!(engine.is_idle() && engine.load().used_blocks == 0);
    engine.audit().expect("the books are right");
}

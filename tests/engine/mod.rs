//! The engine over the demo model: batches, chunks, limits.

use std::path::Path;

use lowbit::checkpoint::Checkpoint;
use lowbit::device::Device;
use lowbit::engine::sampling::SamplingParams;
use lowbit::engine::{Engine, Event, FinishReason, Request, RequestId};
use lowbit::error::Error;
use lowbit::models::{Limits, ModelRunner};

const DEMO: &str = "assets/books-6m-gptq";

fn engine(limits: Limits) -> Engine {
    let checkpoint = Checkpoint::open(Path::new(DEMO)).expect("the demo opens");
    let model = ModelRunner::load(&checkpoint, &Device::cpu(), limits, &mut |_, _| ()).expect("the demo loads");
    Engine::new(model)
}

fn request(prompt_ids: Vec<u32>, max_tokens: usize) -> Request {
    let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy() };
    Request { prompt_ids, params, max_tokens }
}

/// Runs until idle; tokens and log-probabilities by request.
fn run(engine: &mut Engine, ids: &[RequestId]) -> Vec<Vec<(u32, f32)>> {
    let mut out = vec![Vec::new(); ids.len()];
    let mut finished = 0;
    while !engine.is_idle() {
        for event in engine.step().expect("steps") {
            match event {
                Event::Token { id, token } => {
                    let at = ids.iter().position(|&x| x == id).expect("known");
                    out[at].push((token.id, token.logprob));
                }
                Event::Finished { reason, .. } => {
                    assert_eq!(reason, FinishReason::Length);
                    finished += 1;
                }
                Event::Failed { error, .. } => panic!("{error}"),
            }
        }
    }
    assert_eq!(finished, ids.len());
    out
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
        for (together, alone) in run(&mut engine, &ids).iter().zip(&alone) {
            assert_eq!(together.len(), alone.len());
            for (t, a) in together.iter().zip(alone) {
                assert_eq!(t.0, a.0, "{max_seqs} sequences, {max_batch_tokens} tokens a pass");
                assert!((t.1 - a.1).abs() < 1e-3, "{} != {}", t.1, a.1);
            }
        }
        assert_eq!(engine.load().used_blocks, 0);
    }
}

#[test]
fn abort_frees_blocks_and_leaves_others_alone() {
    let mut engine = engine(Limits::new(64, 64, 2));
    let first = engine.submit(request(vec![833], 40)).expect("submits");
    let second = engine.submit(request(vec![489], 5)).expect("submits");
    engine.step().expect("steps");
    let before = engine.load();
    assert_eq!((before.running, before.waiting), (2, 0));
    engine.abort(first);
    engine.abort(RequestId(999));
    assert!(engine.load().used_blocks < before.used_blocks);
    let mut tokens = 0;
    while !engine.is_idle() {
        for event in engine.step().expect("steps") {
            match event {
                Event::Token { id, .. } => {
                    assert_eq!(id, second);
                    tokens += 1;
                }
                Event::Finished { id, .. } => assert_eq!(id, second),
                Event::Failed { error, .. } => panic!("{error}"),
            }
        }
    }
    assert_eq!(tokens, 4, "one of five came before the abort");
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let mut engine = engine(Limits::new(64, 64, 1));
    let refused = |r: Result<RequestId, Error>, needle: &str| {
        let error = r.expect_err("refused");
        assert!(matches!(error, Error::Input { .. }), "{error}");
        assert!(error.to_string().contains(needle), "{error}");
    };
    refused(engine.submit(request(vec![], 1)), "empty");
    refused(engine.submit(request(vec![4096], 1)), "4096");
    refused(engine.submit(request(vec![1], 0)), "max_tokens");
    refused(engine.submit(request(vec![1; 60], 5)), "between 1 and 4");
    refused(engine.submit(request(vec![1], usize::MAX)), "max_tokens");
    assert!(engine.submit(request(vec![1; 60], 4)).is_ok(), "exactly the limit fits");
}

/// The same seed draws the same tokens whatever else is in the batch.
#[test]
fn seeds_repeat_in_any_batch() {
    let sampled = || Request {
        prompt_ids: vec![489, 3490, 857],
        params: SamplingParams { temperature: 1.0, seed: Some(7), ignore_eos: true, ..SamplingParams::default() },
        max_tokens: 20,
    };
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

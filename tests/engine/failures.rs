//! Failures: of one request, and of the device.

use lowbit::dtype::HostData;
use lowbit::layers::Linear;
use lowbit::models::dummy_linear;

use super::*;

/// The token whose embedding is no number.
const POISON: u32 = 95;

/// The tiny model, computing NaN for whoever sees [`POISON`].
fn poisoned(limits: Limits) -> Engine {
    let mut model = tiny_model(tiny_config(None), limits);
    let hidden = model.config.hidden_size;
    let mut values = model.device.download(&model.embedding, 96 * hidden).expect("downloads").to_f32();
    values[POISON as usize * hidden..].fill(f32::NAN);
    model.embedding = model.device.upload(HostData::F32(values)).expect("uploads");
    Engine::new(ModelRunner::new(model, limits).expect("fits"))
}

fn healthy(params: SamplingParams) -> Request {
    Request::new((0..40).collect(), params, 20)
}

/// One request computes NaN in its second chunk of three; the one beside it, which shares the first block, is as if alone. What the
/// failed one had cached is computed anew by whoever asks for it again.
#[test]
fn a_request_without_numbers_fails_alone() {
    let limits = Limits::new(64, 20, 2);
    let sampled = SamplingParams { temperature: 1.0, seed: Some(3), ignore_eos: true, ..SamplingParams::default() };
    for params in [SamplingParams { ignore_eos: true, ..SamplingParams::greedy() }, sampled] {
        let expected = alone(&mut poisoned(limits), healthy(params.clone()));
        let mut engine = poisoned(limits);
        let first = engine.submit(healthy(params.clone())).expect("submits");
        let mut bad = healthy(params.clone());
        bad.prompt_ids[30] = POISON;
        for n in [1, 3] {
            let id = engine.submit(Request { n, ..bad.clone() }).expect("submits");
            let outcomes = finish(&mut engine);
            let outcome = &outcomes[&id];
            assert!(matches!(outcome.error, Some(Error::NotFinite { .. })), "{:?}", outcome.error);
            assert!(outcome.choices.is_empty() && outcome.finished.is_empty());
            if n == 1 {
                assert_eq!(outcomes[&first].choices, expected.choices);
                assert_eq!(outcomes[&first].finished, expected.finished);
            }
        }
        assert!(engine.fault().is_none());
        let hits = engine.load().prefix_cache_hits;
        let id = engine.submit(bad.clone()).expect("submits");
        assert!(finish(&mut engine)[&id].error.is_some());
        assert_eq!(engine.load().prefix_cache_hits, hits, "what a failed request left is not used");
        assert_eq!(alone(&mut engine, healthy(params)).choices, expected.choices);
    }
}

/// A token that is generated can be the one that ends in NaN; what came before it was reported.
#[test]
fn a_failure_after_the_first_token() {
    let limits = Limits::new(64, 64, 2);
    let forced = SamplingParams { logit_bias: BTreeMap::from([(POISON, 1e6)]), ..SamplingParams::greedy() };
    let outcome = alone(&mut poisoned(limits), healthy(forced));
    assert_eq!(outcome.tokens(0), [POISON]);
    assert!(matches!(outcome.error, Some(Error::NotFinite { .. })) && outcome.finished.is_empty());
}

/// A request that bans every token fails when it is to choose one; what it computed is as good as any.
#[test]
fn a_request_that_bans_everything() {
    let bans: BTreeMap<_, _> = (0..96).map(|id| (id, f32::NEG_INFINITY)).collect();
    // In one pass, which fails, and in passes that each offered a block before the last of them failed.
    for (max_batch_tokens, kept) in [(64, 0), (16, 2)] {
        let mut engine = tiny(None, Limits::new(64, max_batch_tokens, 2), EngineOptions::default());
        let asked = healthy(SamplingParams { logit_bias: bans.clone(), ..SamplingParams::greedy() });
        let outcome = alone(&mut engine, asked);
        assert!(matches!(outcome.error, Some(Error::Input { .. })) && outcome.choices.is_empty());
        assert_eq!(engine.load().cached_blocks, kept);
    }
}

/// Prompt outputs are looked at too: the request fails before it has a token.
#[test]
fn prompt_outputs_without_numbers() {
    let limits = Limits::new(64, 64, 2);
    for k in [0, 4] {
        let mut asked = healthy(SamplingParams::greedy());
        asked.prompt_ids[39] = POISON;
        asked.prompt_ids[3] = POISON;
        let outcome = alone(&mut poisoned(limits), Request { prompt_logprobs: Some(k), ..asked });
        assert!(matches!(outcome.error, Some(Error::NotFinite { .. })) && outcome.prompt.is_none());
    }
    for pooling in [Pooling::Mean, Pooling::Last] {
        let mut asked = Request { hidden_state: Some(pooling), max_tokens: 0, ..healthy(SamplingParams::greedy()) };
        asked.prompt_ids[0] = POISON;
        let outcome = alone(&mut poisoned(limits), asked);
        assert!(matches!(outcome.error, Some(Error::NotFinite { .. })) && outcome.prompt.is_none());
    }
}

/// An op that fails ends all requests, running and waiting, and the engine says so from then on. The head of this model reads rows of
/// another length than the norm before it writes, so the first pass that wants logits fails, the third here.
#[test]
fn a_device_failure_ends_everything() {
    let limits = Limits::new(64, 16, 1);
    let mut model = tiny_model(tiny_config(None), limits);
    let head = dummy_linear(DummyScheme::Bf16, 96, 32, false, 0);
    model.head = Linear::new(&model.device, vec![head]).expect("packs");
    let mut engine = Engine::new(ModelRunner::new(model, limits).expect("fits"));
    let ids = [engine.submit(Request { n: 2, ..request(vec![1; 40], 5) }), engine.submit(request(vec![2; 5], 5))]
        .map(|id| id.expect("submits"));
    assert!(engine.step().is_empty() && engine.step().is_empty() && engine.fault().is_none());
    let events = engine.step();
    let failed: Vec<_> = events
        .iter()
        .map(|event| match event {
            Event::Failed { id, error: error @ Error::Engine { .. } } => (*id, error.to_string()),
            other => panic!("{other:?}"),
        })
        .collect();
    let fault = engine.fault().expect("it has failed").to_owned();
    assert_eq!(failed.iter().map(|f| f.0).collect::<Vec<_>>(), ids);
    assert!(failed.iter().all(|f| f.1.contains(&fault)), "{failed:?} without {fault:?}");
    let refusal = engine.submit(request(vec![1], 1)).expect_err("it has failed");
    assert!(matches!(refusal, Error::Engine { .. }) && refusal.to_string().contains(&fault), "{refusal}");
    engine.drain();
    assert!(engine.fault().is_some() && engine.is_idle() && engine.step().is_empty());
    assert_eq!(engine.load().used_blocks, 0);
    engine.audit().expect("the books are right");
}

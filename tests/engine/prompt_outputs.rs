//! Log-probabilities and hidden states of prompts, against the logits and the residual stream of one plain pass, in f64.

use lowbit::models::Batch;

use super::*;

const LEN: usize = 45;

fn prompt() -> Vec<u32> {
    (0..LEN as u32).map(|i| i * 53 % 96).collect()
}

/// Log-softmax of each row, and the rows of the residual stream after a norm whose weights are ones.
fn reference() -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let limits = Limits { max_logit_rows: LEN, ..Limits::new(64, 64, 1) };
    let config = tiny_config(None);
    let (vocab, hidden, eps) = (config.vocab_size, config.hidden_size, f64::from(config.rms_norm_eps));
    let mut runner = ModelRunner::new(tiny_model(config, limits), limits).expect("fits");
    let mut batch = Batch::default();
    batch.push(&prompt(), 0, &[0, 1, 2], false);
    let rows: Vec<u32> = (0..LEN as u32).collect();
    let mut pass = runner.forward(&batch).expect("runs");
    let stream = pass.read().expect("reads");
    let logits = pass.logits(&rows).expect("runs").read().expect("reads");
    let f64s = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let log_softmax = |row: &[f32]| {
        let row = f64s(row);
        let total = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        row.into_iter().map(|x| x - total).collect()
    };
    let norm = |row: &[f32]| {
        let row = f64s(row);
        let scale = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + eps).sqrt();
        row.into_iter().map(|x| x / scale).collect()
    };
    (logits.chunks(vocab).map(log_softmax).collect(), stream.chunks(hidden).map(norm).collect())
}

/// Engines that compute the prompt in one pass, and in chunks whose rows exceed what the head takes at once.
fn engines() -> Vec<Engine> {
    let chunked = Limits::new(64, 7, 2);
    [Limits::new(64, 64, 4), chunked].map(|limits| tiny(None, limits, EngineOptions::default())).into()
}

#[test]
fn logprobs_of_a_prompt() {
    let (logprobs, _) = reference();
    for mut engine in engines() {
        alone(&mut engine, request(prompt(), 10)); // all of it is in the cache from here on
        for top in [0, 1, 3, 96] {
            for max_tokens in [0, 5] {
                let asked = Request { prompt_logprobs: Some(top), ..request(prompt(), max_tokens) };
                let outcome = alone(&mut engine, asked);
                let output = outcome.prompt.as_ref().expect("computed");
                assert_eq!((output.cached_tokens, output.logprobs.len()), (0, LEN - 1));
                for (i, got) in output.logprobs.iter().enumerate() {
                    let mut best: Vec<usize> = (0..96).collect();
                    best.sort_by(|&a, &b| logprobs[i][b].total_cmp(&logprobs[i][a]).then(a.cmp(&b)));
                    assert_eq!(got.id, prompt()[i + 1]);
                    assert!((f64::from(got.logprob) - logprobs[i][got.id as usize]).abs() < 1e-5);
                    assert_eq!(got.top.len(), top);
                    for (&(id, logprob), &best) in got.top.iter().zip(&best) {
                        assert_eq!(id as usize, best);
                        assert!((f64::from(logprob) - logprobs[i][best]).abs() < 1e-5);
                    }
                }
                assert_eq!((outcome.tokens(0).len(), outcome.finished[&0]), (max_tokens, FinishReason::Length));
            }
        }
    }
}

#[test]
fn hidden_states_of_a_prompt() {
    let (_, states) = reference();
    let mean: Vec<f64> = (0..64).map(|i| states.iter().map(|s| s[i]).sum::<f64>() / LEN as f64).collect();
    for mut engine in engines() {
        alone(&mut engine, request(prompt(), 10));
        for (pooling, expected, cached) in [(Pooling::Mean, &mean, 0), (Pooling::Last, &states[LEN - 1], 32)] {
            for max_tokens in [0, 3] {
                let asked = Request { hidden_state: Some(pooling), ..request(prompt(), max_tokens) };
                let outcome = alone(&mut engine, asked);
                let output = outcome.prompt.as_ref().expect("computed");
                assert_eq!((output.cached_tokens, output.hidden_state.len()), (cached, 64));
                for (got, expected) in output.hidden_state.iter().zip(expected) {
                    assert!((f64::from(*got) - expected).abs() < 1e-5, "{pooling:?}: {got} is not {expected}");
                }
                assert_eq!(outcome.tokens(0).len(), max_tokens);
            }
        }
    }
}

/// A prompt that is preempted on its way has each of its tokens looked at once.
#[test]
fn preempted_prompts() {
    // One token of the prompt beside three sequences that decode, of four blocks each: there is no room for all in ten.
    let limits = Limits { kv_blocks: 10, ..Limits::new(80, 4, 4) };
    let asked = || Request {
        prompt_logprobs: Some(2),
        hidden_state: Some(Pooling::Mean),
        priority: 1,
        ..request((0..60).collect(), 1)
    };
    let expected = alone(&mut tiny(None, Limits::new(80, 80, 1), EngineOptions::default()), asked());
    for prefix_caching in [true, false] {
        let mut engine = tiny(None, limits, EngineOptions { prefix_caching, ..EngineOptions::default() });
        let id = engine.submit(asked()).expect("submits");
        for first in [3, 4, 5] {
            engine.submit(request(vec![first; 3], 50)).expect("submits");
        }
        let mut outcomes = BTreeMap::new();
        while !engine.is_idle() {
            let preemptions = engine.load().preemptions;
            step(&mut engine, &mut outcomes);
            if engine.load().preemptions > preemptions {
                assert!(!outcomes.contains_key(&id), "the prompt is not done yet");
            }
        }
        assert!(engine.load().preemptions > 0);
        let (got, expected) = (&outcomes[&id], &expected);
        let (output, whole) = (got.prompt.as_ref().expect("computed"), expected.prompt.as_ref().expect("computed"));
        assert_eq!((&output.logprobs, &got.choices), (&whole.logprobs, &expected.choices));
        let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
        assert!(output.hidden_state.iter().zip(&whole.hidden_state).all(close));
    }
}

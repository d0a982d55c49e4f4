//! Sampling against exact probabilities and hand-computed filters.

use std::collections::BTreeMap;

use lowbit::checkpoint::GenerationConfig;
use lowbit::engine::sampling::{Sampler, SamplingParams, random};
use lowbit::error::Error;

/// Logits of these probabilities.
fn logits(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

/// How often each id is drawn from one row in `n` steps without memory of earlier ones.
fn counts(params: &SamplingParams, logits: &[f32], n: usize) -> Vec<usize> {
    let mut sampler = Sampler::new(SamplingParams { seed: Some(11), ..params.clone() }, &[]);
    let mut counts = vec![0; logits.len()];
    for _ in 0..n {
        counts[sampler.sample(logits).unwrap().id as usize] += 1;
    }
    counts
}

/// Pearson's statistic of the counts against the expected probabilities; ids of probability 0 must not occur.
fn chi_square(counts: &[usize], expected: &[f64]) -> f64 {
    let n: usize = counts.iter().sum();
    counts.iter().zip(expected).fold(0.0, |sum, (&count, &p)| {
        assert!(p > 0.0 || count == 0, "{counts:?}");
        if p == 0.0 { sum } else { sum + (count as f64 - n as f64 * p).powi(2) / (n as f64 * p) }
    })
}

fn assert_distribution(params: SamplingParams, logits: &[f32], expected: &[f64]) {
    let counts = counts(&params, logits, 40_000);
    // The 0.999 quantile of chi-square with 4 degrees of freedom is 18.5; fewer degrees have lower ones.
    let statistic = chi_square(&counts, expected);
    assert!(statistic < 18.5, "{params:?}: {counts:?}, statistic {statistic}");
}

#[test]
fn draws_the_exact_distribution() {
    let p = [0.4, 0.05, 0.3, 0.05, 0.2];
    assert_distribution(SamplingParams::default(), &logits(&p), &p);
    // Temperature 2 takes square roots, 0.5 squares.
    for (temperature, power) in [(2.0, 0.5), (0.5, 2.0)] {
        let total: f64 = p.iter().map(|x| f64::powf(*x, power)).sum();
        let expected: Vec<f64> = p.iter().map(|x| x.powf(power) / total).collect();
        assert_distribution(SamplingParams { temperature, ..Default::default() }, &logits(&p), &expected);
    }
}

#[test]
fn filters_keep_what_their_definitions_say() {
    let p = [0.4, 0.05, 0.3, 0.05, 0.2];
    let x = logits(&p);
    let params = SamplingParams::default;
    let two = [0.4 / 0.7, 0.0, 0.3 / 0.7, 0.0, 0.0];
    let three = [0.4 / 0.9, 0.0, 0.3 / 0.9, 0.0, 0.2 / 0.9];
    assert_distribution(SamplingParams { top_k: 2, ..params() }, &x, &two);
    assert_distribution(SamplingParams { top_p: 0.69, ..params() }, &x, &two);
    assert_distribution(SamplingParams { top_p: 0.71, ..params() }, &x, &three);
    assert_distribution(SamplingParams { min_p: 0.6, ..params() }, &x, &two);
    assert_distribution(SamplingParams { min_p: 0.4, ..params() }, &x, &three);
    // Top-p sees what top-k leaves: 0.4 / 0.9 is below 0.5, so the second is needed, and 0.7 / 0.9 suffices.
    assert_distribution(SamplingParams { top_k: 3, top_p: 0.77, ..params() }, &x, &two);
    // ... and min-p comes after temperature: at 0.5 the third has (0.2 / 0.4)^2 = 0.25 of the first.
    let squares = [0.16 / 0.25, 0.0, 0.09 / 0.25, 0.0, 0.0];
    assert_distribution(SamplingParams { temperature: 0.5, min_p: 0.3, ..params() }, &x, &squares);
    // Of two equal candidates the lower id is kept.
    let four = [0.4 / 0.95, 0.05 / 0.95, 0.3 / 0.95, 0.0, 0.2 / 0.95];
    assert_distribution(SamplingParams { top_k: 4, ..params() }, &x, &four);
    assert_distribution(SamplingParams { top_k: 1, ..params() }, &[-0.0, 0.0, 0.0], &[1.0, 0.0, 0.0]);
    // Limits that keep all.
    assert_distribution(SamplingParams { top_k: 5, top_p: 1.0, min_p: 0.0, ..params() }, &x, &p);
}

#[test]
fn top_p_over_a_large_vocabulary() {
    // 128,256 equal candidates: half of the mass is the lower half of the ids.
    let x = vec![1.5; 128_256];
    let mut sampler = Sampler::new(SamplingParams { top_p: 0.5, seed: Some(3), ..Default::default() }, &[]);
    let ids: Vec<u32> = (0..40).map(|_| sampler.sample(&x).unwrap().id).collect();
    assert!(ids.iter().all(|&id| id < 64_128), "{ids:?}");
    assert!(ids.iter().any(|&id| id > 48_000), "{ids:?}");
}

#[test]
fn greedy_takes_the_lowest_of_the_best() {
    let mut sampler = Sampler::new(SamplingParams::greedy(), &[]);
    assert_eq!(sampler.sample(&[0.0, 2.0, 2.0, 1.0]).unwrap().id, 1);
    assert_eq!(sampler.sample(&[-1.0]).unwrap().id, 0);
    assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -5.0]).unwrap().id, 1);
    let mut tiny = Sampler::new(SamplingParams { temperature: f32::MIN_POSITIVE, ..Default::default() }, &[]);
    assert_eq!(tiny.sample(&[1.0, 3.0, 2.0]).unwrap().id, 1);
}

#[test]
fn penalties_by_hand() {
    let greedy = SamplingParams::greedy;
    // Repetition over prompt and output: 2.0 / 1.25 = 1.6 falls below 1.7; -0.5 * 1.25 = -0.625 below -0.6.
    let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 1.25, ..greedy() }, &[0, 0, 7]);
    assert_eq!(sampler.sample(&[2.0, 1.7, 1.5]).unwrap().id, 1);
    assert_eq!(sampler.sample(&[2.0, 1.9, 1.55]).unwrap().id, 0);
    let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 1.25, ..greedy() }, &[0]);
    assert_eq!(sampler.sample(&[-0.5, -0.6]).unwrap().id, 1);
    // Presence and frequency over the output only, frequency by count.
    let mut sampler = Sampler::new(SamplingParams { presence_penalty: 0.5, ..greedy() }, &[0]);
    let ids: Vec<u32> = (0..4).map(|_| sampler.sample(&[1.0, 0.75]).unwrap().id).collect();
    assert_eq!(ids, [0, 1, 0, 0]);
    let mut sampler = Sampler::new(SamplingParams { frequency_penalty: 0.5, ..greedy() }, &[0]);
    let ids: Vec<u32> = (0..5).map(|_| sampler.sample(&[1.0, 0.25]).unwrap().id).collect();
    // 1.0, 0.5, then 0.0 against 0.25, then 0.0 against -0.25, then -0.5 against -0.25.
    assert_eq!(ids, [0, 0, 1, 0, 1]);
}

#[test]
fn bias_and_the_ban_of_end_tokens() {
    let bias = |entries: &[(u32, f32)]| BTreeMap::from_iter(entries.iter().copied());
    let mut sampler = Sampler::new(
        SamplingParams { logit_bias: bias(&[(0, f32::NEG_INFINITY), (2, 1.5)]), ..SamplingParams::greedy() },
        &[],
    );
    assert_eq!(sampler.sample(&[9.0, 1.0, 0.0]).unwrap().id, 2);
    let all = bias(&[(0, f32::NEG_INFINITY), (1, f32::NEG_INFINITY)]);
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { logit_bias: all.clone(), temperature, ..Default::default() };
        let error = Sampler::new(params, &[]).sample(&[1.0, 2.0]);
        assert!(matches!(error, Err(Error::Input { .. })), "{error:?}");
    }
    let params = SamplingParams { min_tokens: 2, stop_token_ids: vec![1], ..SamplingParams::greedy() };
    let mut sampler = Sampler::new(params, &[]);
    let ids: Vec<u32> = (0..3).map(|_| sampler.sample(&[0.0, 5.0]).unwrap().id).collect();
    assert_eq!(ids, [0, 0, 1]);
}

#[test]
fn logprobs_are_the_models_own() {
    let p = [0.1, 0.6, 0.3];
    let params = SamplingParams {
        temperature: 0.0,
        repetition_penalty: 3.0,
        logit_bias: BTreeMap::from([(1, f32::NEG_INFINITY)]),
        logprobs: Some(2),
        ..Default::default()
    };
    // Adding a constant to all logits changes no probability.
    let x: Vec<f32> = logits(&p).iter().map(|x| x + 40.0).collect();
    let sampled = Sampler::new(params, &[2]).sample(&x).unwrap();
    // Token 1 is banned, and a third of token 2's logit is less than token 0's; neither shows in the figures.
    assert_eq!(sampled.id, 0);
    assert!((f64::from(sampled.logprob) - 0.1f64.ln()).abs() < 1e-5);
    let (ids, values): (Vec<u32>, Vec<f32>) = sampled.top.into_iter().unzip();
    assert_eq!(ids, [1, 2]);
    assert!((f64::from(values[0]) - 0.6f64.ln()).abs() < 1e-5 && (f64::from(values[1]) - 0.3f64.ln()).abs() < 1e-5);
}

#[test]
fn a_seed_fixes_the_tokens() {
    // The first outputs of SplitMix64 seeded with 1234567, as published with the algorithm.
    let known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431];
    assert_eq!([0, 1, 2, 3].map(|step| random(1_234_567, step)), known);

    let x: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.3).collect();
    let run = |seed| {
        let mut sampler = Sampler::new(SamplingParams { seed, ..Default::default() }, &[]);
        (0..20).map(|_| sampler.sample(&x).unwrap().id).collect::<Vec<_>>()
    };
    assert_eq!(run(Some(5)), run(Some(5)));
    assert_ne!(run(Some(5)), run(Some(6)));
    assert_ne!(run(None), run(None));
    // The draw depends on the distribution only, not on how a filter orders its candidates.
    let filtered = SamplingParams { seed: Some(5), top_k: 99, top_p: 0.999_999, ..Default::default() };
    let y: Vec<f32> = x.iter().enumerate().map(|(i, x)| if i == 0 { -60.0 } else { *x }).collect();
    let mut a = Sampler::new(filtered, &[]);
    let mut b = Sampler::new(SamplingParams { seed: Some(5), ..Default::default() }, &[]);
    for _ in 0..50 {
        assert_eq!(a.sample(&y).unwrap().id, b.sample(&y).unwrap().id);
    }
}

#[test]
fn refuses_what_is_not_a_distribution() {
    for row in [vec![0.0, f32::NAN], vec![f32::INFINITY, 0.0], vec![f32::NEG_INFINITY; 3], vec![]] {
        for temperature in [0.0, 1.0] {
            let error = Sampler::new(SamplingParams { temperature, ..Default::default() }, &[]).sample(&row);
            assert!(matches!(error, Err(Error::NotFinite { .. })), "{row:?}: {error:?}");
        }
    }
}

#[test]
fn validation_names_the_field() {
    let p = SamplingParams::default;
    let bias = |id, x| BTreeMap::from([(id, x)]);
    let wrong: Vec<(&str, SamplingParams)> = vec![
        ("temperature", SamplingParams { temperature: f32::NAN, ..p() }),
        ("temperature", SamplingParams { temperature: -0.1, ..p() }),
        ("temperature", SamplingParams { temperature: f32::INFINITY, ..p() }),
        ("top_p", SamplingParams { top_p: 0.0, ..p() }),
        ("top_p", SamplingParams { top_p: 1.1, ..p() }),
        ("top_p", SamplingParams { top_p: f32::NAN, ..p() }),
        ("min_p", SamplingParams { min_p: -0.1, ..p() }),
        ("min_p", SamplingParams { min_p: f32::NAN, ..p() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..p() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: f32::NAN, ..p() }),
        ("presence_penalty", SamplingParams { presence_penalty: 2.1, ..p() }),
        ("frequency_penalty", SamplingParams { frequency_penalty: f32::NAN, ..p() }),
        ("logit_bias", SamplingParams { logit_bias: bias(100, 0.0), ..p() }),
        ("logit_bias", SamplingParams { logit_bias: bias(0, f32::NAN), ..p() }),
        ("logit_bias", SamplingParams { logit_bias: bias(0, f32::INFINITY), ..p() }),
        ("logprobs", SamplingParams { logprobs: Some(101), ..p() }),
        ("stop_token_ids", SamplingParams { stop_token_ids: vec![100], ..p() }),
    ];
    for (field, params) in wrong {
        match params.validate(100) {
            Err(Error::Input { what, .. }) => assert!(what.starts_with(field), "{what}"),
            other => panic!("{field}: {other:?}"),
        }
    }
    let edge = SamplingParams {
        temperature: 0.0,
        top_k: u32::MAX,
        min_p: 1.0,
        presence_penalty: -2.0,
        logit_bias: bias(99, f32::NEG_INFINITY),
        logprobs: Some(100),
        ..p()
    };
    edge.validate(100).unwrap();
}

#[test]
fn defaults_come_from_generation_config() {
    let config = GenerationConfig {
        eos_token_ids: vec![2, 3],
        do_sample: Some(true),
        temperature: Some(0.7),
        top_p: Some(0.9),
        top_k: Some(20),
        min_p: None,
        repetition_penalty: Some(1.05),
        ..GenerationConfig::default()
    };
    let params = SamplingParams::from_generation(&config);
    assert_eq!((params.temperature, params.top_p, params.top_k, params.min_p), (0.7, 0.9, 20, 0.0));
    assert_eq!((params.repetition_penalty, params.stop_token_ids), (1.05, vec![2, 3]));
    let greedy = SamplingParams::from_generation(&GenerationConfig { do_sample: Some(false), ..config });
    assert_eq!(greedy.temperature, 0.0);
}

/// Tokens that `config` makes of logits that fall with the id, after `prompt`.
fn greedy_after(config: GenerationConfig, prompt: &[u32], steps: usize) -> Vec<u32> {
    let params = SamplingParams::from_generation(&GenerationConfig { do_sample: Some(false), ..config });
    params.validate(8).unwrap();
    let logits: Vec<f32> = (0..8).map(|id| -(id as f32)).collect();
    let mut sampler = Sampler::new(params, prompt);
    (0..steps).map(|_| sampler.sample(&logits).unwrap().id).collect()
}

#[test]
fn what_generation_config_forbids_is_not_chosen() {
    let none = GenerationConfig::default;
    assert_eq!(greedy_after(none(), &[7], 2), [0, 0]);
    assert_eq!(greedy_after(GenerationConfig { suppress_tokens: vec![0, 1], ..none() }, &[7], 2), [2, 2]);
    assert_eq!(greedy_after(GenerationConfig { begin_suppress_tokens: vec![0], ..none() }, &[7], 3), [1, 0, 0]);
    // A bad word of one token never comes, one of several only not whole; the end of a text is none.
    let words = |ids: &[&[u32]]| ids.iter().map(|ids| ids.to_vec()).collect();
    let bad = |ids: &[&[u32]]| GenerationConfig { bad_words_ids: words(ids), eos_token_ids: vec![1], ..none() };
    assert_eq!(greedy_after(bad(&[&[0], &[1]]), &[7], 2), [1, 1]);
    assert_eq!(greedy_after(bad(&[&[7, 0]]), &[7], 3), [1, 0, 0]);
    assert_eq!(greedy_after(bad(&[&[0, 0, 0]]), &[7], 6), [0, 0, 1, 0, 0, 1]);
    assert_eq!(greedy_after(bad(&[&[6, 7, 0]]), &[6, 7], 2), [1, 0]);
    // Biases add up.
    let bias = |pairs: &[(&[u32], f32)]| pairs.iter().map(|(ids, bias)| (ids.to_vec(), *bias)).collect();
    let biased = |pairs: &[(&[u32], f32)]| GenerationConfig { sequence_bias: bias(pairs), ..none() };
    assert_eq!(greedy_after(biased(&[(&[3], 2.0), (&[3], 1.5)]), &[7], 1), [3]);
    assert_eq!(greedy_after(biased(&[(&[0, 2], 2.5)]), &[7], 3), [0, 2, 0]);
    // No pair twice: the prompt counts.
    let pairs = GenerationConfig { no_repeat_ngram_size: 2, ..none() };
    assert_eq!(greedy_after(pairs.clone(), &[0, 0], 3), [1, 0, 2]);
    assert_eq!(greedy_after(GenerationConfig { no_repeat_ngram_size: 1, ..pairs }, &[0, 2], 3), [1, 3, 4]);
    let ends = GenerationConfig { eos_token_ids: vec![0], min_new_tokens: 2, ..none() };
    assert_eq!(greedy_after(ends, &[7], 3), [1, 1, 0]);
    // A mass of nothing leaves the best token.
    let params =
        SamplingParams::from_generation(&GenerationConfig { top_p: Some(0.0), temperature: Some(5.0), ..none() });
    let mut sampler = Sampler::new(SamplingParams { seed: Some(1), ..params }, &[7]);
    assert!((0..20).all(|_| sampler.sample(&[1.0, 1.1, 0.9]).unwrap().id == 1));
}

#[test]
fn what_changes_logits_is_not_drawn_on_the_device() {
    let plain = SamplingParams::greedy;
    assert!(Sampler::new(plain(), &[3]).device_row().is_some());
    for other in [
        SamplingParams { sequence_bias: vec![(vec![1, 2], 1.0)], ..plain() },
        SamplingParams { begin_suppress_tokens: vec![1], ..plain() },
        SamplingParams { no_repeat_ngram_size: 2, ..plain() },
        SamplingParams { min_tokens: 1, ..plain() },
    ] {
        assert!(Sampler::new(other.clone(), &[3]).device_row().is_none(), "{other:?}");
    }
}

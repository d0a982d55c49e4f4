//! Random days of an engine with a pool of a few blocks: arrivals, aborts, priorities, limits, shared prefixes, several choices,
//! preemptions. After every step the books are right, and each request gets exactly what it gets alone.

use super::*;
use crate::common::random::Random;

const MAX_MODEL_LEN: usize = 96;
const REQUESTS: usize = 80;

/// A request that an engine of this size may take, or sometimes one that it must refuse.
fn arrival(random: &mut Random, shared: &[Vec<u32>]) -> Request {
    let mut prompt_ids = match random.below(4) {
        0 => Vec::new(),
        which => shared[which - 1].clone(),
    };
    // Cut somewhere, so that prefixes end inside of blocks too, and sometimes at the end of one.
    prompt_ids.truncate(prompt_ids.len() - random.below(prompt_ids.len() / 2 + 1));
    let own = random.below(14);
    prompt_ids.extend((0..own).map(|_| random.below(96) as u32));
    if prompt_ids.is_empty() {
        prompt_ids.push(random.below(96) as u32);
    }
    let mut params = SamplingParams { ignore_eos: random.below(3) == 0, ..SamplingParams::greedy() };
    params.stop_token_ids = (0..3).map(|_| random.below(96) as u32).collect();
    if random.below(3) > 0 {
        params.temperature = 0.5 + random.uniform();
        params.top_k = random.below(20) as u32;
        params.top_p = 0.8 + 0.2 * random.uniform();
        params.seed = Some(random.bits());
        params.min_tokens = random.below(4);
        params.repetition_penalty = 1.0 + 0.3 * random.uniform();
        params.frequency_penalty = 0.5 * random.uniform();
    }
    let mut request = Request::new(prompt_ids, params, 1 + random.below(30));
    if random.below(4) == 0 {
        request.n = 2 + random.below(4);
    }
    request.priority = random.below(3) as i32 - 1;
    if random.below(8) == 0 {
        request.cache_salt = "other".into();
    }
    match random.below(10) {
        0 => request.prompt_logprobs = Some(random.below(4)),
        1 => request.hidden_state = Some(if random.below(2) == 0 { Pooling::Mean } else { Pooling::Last }),
        2 => (request.prompt_logprobs, request.max_tokens, request.n) = (Some(1), 0, 1),
        3 => request.max_tokens = 200,
        _ => {}
    }
    request
}

/// What happened that a test must have seen to mean anything.
#[derive(Debug, Default)]
struct Seen {
    refused: usize,
    finished: usize,
    aborted_running: usize,
    aborted_waiting: usize,
    choices: usize,
    cached_prompts: usize,
    preemptions: u64,
    hits: u64,
    evictions: u64,
}

/// Plays a day and checks it.
fn play(seed: u64, window: Option<usize>, limits: Limits, options: EngineOptions, seen: &mut Seen) {
    let what = format!("seed {seed}, {window:?}, {limits:?}, {options:?}");
    let random = &mut Random::new(seed);
    let mut engine = tiny(window, limits, options);
    let shared: Vec<Vec<u32>> = [20, 32, 45].map(|len| (0..len).map(|_| random.below(96) as u32).collect()).into();
    let mut asked: BTreeMap<RequestId, Request> = BTreeMap::new();
    let mut aborted: Vec<RequestId> = Vec::new();
    let mut outcomes: BTreeMap<RequestId, Outcome> = BTreeMap::new();
    let (mut submitted, mut steps) = (0, 0);
    while submitted < REQUESTS || !engine.is_idle() {
        while submitted < REQUESTS && random.below(3) == 0 {
            submitted += 1;
            let request = arrival(random, &shared);
            let fits = request.prompt_ids.len() + request.max_tokens <= MAX_MODEL_LEN;
            match engine.submit(request.clone()) {
                Ok(id) => {
                    assert!(fits, "{what}");
                    asked.insert(id, request);
                }
                Err(Error::Input { .. }) => seen.refused += 1,
                Err(error) => panic!("{what}: {error}"),
            }
        }
        if random.below(25) == 0
            && let Some(&id) = asked.keys().nth(random.below(asked.len().max(1)))
            && !aborted.contains(&id)
        {
            let is_done = outcomes.get(&id).is_some_and(|o| o.finished.len() == asked[&id].n);
            let before = engine.load();
            engine.abort(id);
            engine.audit().unwrap_or_else(|error| panic!("{what}: {error}"));
            let after = engine.load();
            seen.aborted_running += usize::from(after.running < before.running);
            seen.aborted_waiting += usize::from(after.waiting < before.waiting);
            assert_eq!(is_done, after == before, "{what}: an abort drops what is not done");
            if !is_done {
                aborted.push(id);
            }
        }
        engine.step().into_iter().for_each(|event| record(&mut outcomes, event));
        engine.audit().unwrap_or_else(|error| panic!("{what}, step {steps}: {error}"));
        let load = engine.load();
        assert!(load.used_blocks + load.cached_blocks <= load.total_blocks && load.running <= limits.max_seqs);
        steps += 1;
        assert!(steps < 20_000, "{what}: no end");
    }
    let load = engine.load();
    assert_eq!(load.used_blocks, 0, "{what}");
    seen.preemptions += load.preemptions;
    seen.hits += load.prefix_cache_hits;
    seen.evictions += load.evicted_blocks;

    let whole = Limits::new(MAX_MODEL_LEN, MAX_MODEL_LEN, 1);
    let mut single = tiny(window, whole, EngineOptions { prefix_caching: false, block_events: 0 });
    for (id, request) in asked {
        let empty = Outcome::default();
        let got = outcomes.get(&id).unwrap_or(&empty);
        assert!(got.error.is_none(), "{what}: {:?}", got.error);
        let is_whole = !aborted.contains(&id);
        seen.finished += usize::from(is_whole);
        seen.choices += usize::from(got.choices.len() > 1);
        for choice in 0..request.n {
            let mut one = Request { n: 1, ..request.clone() };
            one.params.seed = one.params.seed.map(|seed| seed.wrapping_add(choice as u64));
            let expected = alone(&mut single, one);
            let (tokens, all) = (got.tokens(choice), expected.tokens(0));
            let same = if is_whole { tokens == all } else { all.starts_with(&tokens) };
            assert!(same, "{what}: {request:?} choice {choice}: {tokens:?} is not {all:?}");
            let pairs = got.choices.get(&choice).into_iter().flatten().zip(expected.choices.values().flatten());
            pairs.for_each(|(a, b)| assert!((a.1 - b.1).abs() < 1e-4, "{what}: {request:?}: {a:?} is not {b:?}"));
            if is_whole {
                assert_eq!(got.finished.get(&choice), expected.finished.get(&0), "{what}: {request:?}");
            }
            let Some(output) = &got.prompt else { continue };
            let alone = expected.prompt.expect("its prompt was computed");
            assert_eq!((&output.logprobs, alone.cached_tokens), (&alone.logprobs, 0), "{what}: {request:?}");
            assert_eq!(output.hidden_state.len(), alone.hidden_state.len());
            let states = output.hidden_state.iter().zip(&alone.hidden_state);
            states.for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{what}: {request:?}: {a} is not {b}"));
            assert!(output.cached_tokens < request.prompt_ids.len());
            seen.cached_prompts += usize::from(output.cached_tokens > 0);
        }
    }
}

fn limits(max_batch_tokens: usize, max_seqs: usize, kv_blocks: usize) -> Limits {
    Limits { kv_blocks, ..Limits::new(MAX_MODEL_LEN, max_batch_tokens, max_seqs) }
}

/// Every path is taken, or the pool is not small enough.
fn check(seen: &Seen, is_caching: bool) {
    let Seen {
        refused,
        finished,
        aborted_running,
        aborted_waiting,
        choices,
        cached_prompts,
        preemptions,
        hits,
        evictions,
    } = *seen;
    assert!(refused > 0 && finished > 0 && choices > 0 && preemptions > 0, "{seen:?}");
    assert!(aborted_running > 0 && aborted_waiting > 0, "{seen:?}");
    assert_eq!([cached_prompts > 0, hits > 0, evictions > 0], [is_caching; 3], "{seen:?}");
}

#[test]
fn each_request_gets_what_it_gets_alone() {
    let mut seen = Seen::default();
    for (seed, limits) in
        [limits(64, 4, 8), limits(20, 6, 10), limits(5, 3, 6), limits(33, 8, 16)].into_iter().enumerate()
    {
        play(seed as u64, None, limits, EngineOptions::default(), &mut seen);
    }
    check(&seen, true);
}

#[test]
fn without_a_prefix_cache() {
    let mut seen = Seen::default();
    let options = EngineOptions { prefix_caching: false, block_events: 0 };
    for (seed, limits) in [limits(20, 4, 8), limits(64, 6, 9)].into_iter().enumerate() {
        play(10 + seed as u64, None, limits, options, &mut seen);
    }
    check(&seen, false);
}

#[test]
fn behind_a_sliding_window() {
    let mut seen = Seen::default();
    for (seed, limits) in [limits(8, 4, 5), limits(40, 6, 8)].into_iter().enumerate() {
        play(20 + seed as u64, Some(20), limits, EngineOptions { prefix_caching: true, block_events: 50 }, &mut seen);
    }
    check(&seen, true);
}

//! The prefix cache and preemption: fewer tokens are computed, or more, and the same come out.

use lowbit::engine::{BlockEvent, EngineOptions};

use super::*;

fn prompt(first: u32, len: u32) -> Vec<u32> {
    (first..first + len).map(|i| i * 31 % 96).collect()
}

const UNCACHED: EngineOptions = EngineOptions { prefix_caching: false, block_events: 0 };

/// A second turn of a conversation starts where the first one ended: prompt and answer are cached, but for the last block.
#[test]
fn a_second_turn_reuses_the_first() {
    let limits = Limits::new(128, 128, 2);
    let mut engine = tiny(None, limits, EngineOptions::default());
    let first = alone(&mut engine, request(prompt(0, 40), 20));
    assert_eq!(first.prompt.as_ref().expect("computed").cached_tokens, 0);
    let mut turn = prompt(0, 40);
    turn.extend(first.tokens(0));
    turn.extend(prompt(5, 10));
    let second = alone(&mut engine, request(turn.clone(), 20));
    // 59 tokens were computed, three blocks of 16 are whole.
    assert_eq!(second.prompt.as_ref().expect("computed").cached_tokens, 48);
    let computed_anew = alone(&mut tiny(None, limits, UNCACHED), request(turn.clone(), 20));
    assert_eq!(second.choices, computed_anew.choices, "bit for bit");
    let load = engine.load();
    assert_eq!((load.prefix_cache_queries, load.prefix_cache_hits, load.used_blocks), (40 + 70, 48, 0));
    let salted = alone(&mut engine, Request { cache_salt: "another tenant".into(), ..request(turn, 20) });
    assert_eq!(salted.prompt.expect("computed").cached_tokens, 0);
    assert_eq!(salted.choices, second.choices);
}

/// The last token of a prompt is computed even where all of it is cached: its logits choose the first token.
#[test]
fn one_token_is_always_computed() {
    let mut engine = tiny(None, Limits::new(64, 64, 1), EngineOptions::default());
    let first = alone(&mut engine, request(prompt(0, 48), 3));
    let again = alone(&mut engine, request(prompt(0, 48), 3));
    assert_eq!((again.prompt.expect("computed").cached_tokens, again.choices), (32, first.choices));
}

/// The log of blocks tells exactly what can be found: replayed, it leaves as many blocks as the engine says it caches.
#[test]
fn block_events_follow_the_cache() {
    let limits = Limits { kv_blocks: 6, ..Limits::new(64, 64, 2) };
    let mut engine = tiny(None, limits, EngineOptions { prefix_caching: true, block_events: 1000 });
    let mut cached: BTreeMap<u64, (Option<u64>, Vec<u32>)> = BTreeMap::new();
    let mut removed = 0;
    for first in [0, 50, 0, 90, 50] {
        alone(&mut engine, request(prompt(first, 40), 10));
        let log = engine.take_block_events();
        assert_eq!(log.lost, 0);
        for event in log.events {
            match event {
                BlockEvent::Stored { hash, parent, token_ids, block_size } => {
                    assert_eq!((token_ids.len(), block_size), (16, 16));
                    assert!(parent.is_none_or(|parent| cached.contains_key(&parent)), "its parent was told before");
                    assert!(cached.insert(hash, (parent, token_ids)).is_none(), "told twice");
                }
                BlockEvent::Removed { hash } => {
                    assert!(cached.remove(&hash).is_some(), "what was never told is removed");
                    removed += 1;
                }
            }
        }
        assert_eq!(engine.load().cached_blocks, cached.len());
    }
    assert!(removed > 0 && removed == engine.load().evicted_blocks);
    // The last request's blocks are the newest: its prompt can be followed from the root.
    let chain = prompt(50, 32).chunks(16).try_fold(None, |parent, tokens| {
        let found = cached.iter().find(|(_, (p, t))| *p == parent && t == tokens);
        found.map(|(&hash, _)| Some(hash))
    });
    assert!(chain.is_some());
    let mut quiet = tiny(None, limits, EngineOptions::default());
    alone(&mut quiet, request(prompt(0, 40), 10));
    assert!(quiet.take_block_events().events.is_empty(), "nobody asked");
}

/// A pool for one and a half of three requests: two give way and go on later, each with the tokens that it gets alone.
#[test]
fn preemption_changes_no_token() {
    let sampled = |seed: u64| {
        let params = SamplingParams {
            temperature: 1.2,
            presence_penalty: 0.5,
            repetition_penalty: 1.3,
            seed: Some(seed),
            min_tokens: 3,
            stop_token_ids: vec![5, 6],
            logprobs: Some(3),
            ..SamplingParams::default()
        };
        Request::new(prompt(seed as u32, 20), SamplingParams { ignore_eos: seed != 2, ..params }, 60)
    };
    let limits = Limits::new(128, 32, 3);
    for options in [EngineOptions::default(), UNCACHED] {
        let mut engine = tiny(None, Limits { kv_blocks: 7, ..limits }, options);
        let ids = [1, 2, 3].map(|seed| engine.submit(sampled(seed)).expect("submits"));
        let outcomes = finish(&mut engine);
        assert!(engine.load().preemptions > 0);
        for (id, seed) in ids.iter().zip(1..) {
            let expected = alone(&mut tiny(None, limits, UNCACHED), sampled(seed));
            assert_eq!(outcomes[id].choices, expected.choices);
            assert_eq!(outcomes[id].finished, expected.finished);
        }
    }
}

/// Who is preempted first is who matters least, whenever it came.
#[test]
fn the_lowest_priority_gives_way() {
    let mut engine = tiny(None, Limits { kv_blocks: 4, ..Limits::new(64, 64, 2) }, UNCACHED);
    let low = engine.submit(Request { priority: 5, ..request(prompt(0, 15), 30) }).expect("submits");
    engine.step();
    let high = engine.submit(Request { priority: -5, ..request(prompt(50, 14), 34) }).expect("submits");
    let mut order = Vec::new();
    while !engine.is_idle() {
        order.extend(engine.step().into_iter().filter_map(|event| match event {
            Event::Finished { id, .. } => Some(id),
            _ => None,
        }));
        engine.audit().expect("the books are right");
    }
    assert_eq!((order, engine.load().preemptions), (vec![high, low], 1));
}

/// Behind a sliding window memory does not grow: a long text in a pool of a few blocks, the same tokens as in a large one.
#[test]
fn a_window_frees_what_is_behind_it() {
    let asked = || request(prompt(0, 100), 150);
    let limits = Limits::new(256, 16, 1);
    // The query and 19 tokens before it, and 15 more of a chunk, wherever they start in a block of 16.
    let mut small = tiny(Some(20), Limits { kv_blocks: 4, ..limits }, EngineOptions::default());
    let whole = alone(&mut tiny(Some(20), Limits::new(256, 256, 1), UNCACHED), asked());
    assert_eq!(alone(&mut small, asked()).choices, whole.choices);
    refused(
        tiny(Some(20), Limits { kv_blocks: 3, ..limits }, UNCACHED).submit(asked()),
        "249 tokens need 4 KV blocks, there are 3",
    );
    assert_ne!(alone(&mut tiny(None, limits, UNCACHED), asked()).choices, whole.choices, "the window matters");
}

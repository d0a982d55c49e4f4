//! Properties on arbitrary input: nothing panics, whatever the bytes; packing is undone by unpacking.

use std::fs;

use lowbit::checkpoint::{Checkpoint, Expected};
use lowbit::quant::pack::Packing;
use proptest::prelude::*;
use serde_json::Value;

use super::build::{self, Build, K, N, safetensors};

/// Opens and uses a directory in every way there is; errors are fine.
fn exercise(config: &[u8], weights: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    fs::write(dir.path().join("model.safetensors"), weights).unwrap();
    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
        let _ = checkpoint.check(&[Expected::Linear { name: "m".into(), n: N, k: K, bias: false }]);
        let _ = checkpoint.linear_scheme("m");
        if let Ok(linear) = checkpoint.linear("m") {
            let _ = linear.scheme().to_string();
        }
        let _ = checkpoint.tensor("m.weight");
    }
}

fn bases() -> [Build; 8] {
    [
        build::gptq(),
        build::awq(),
        build::ct_packed(),
        build::ct_int8(),
        build::ct_fp8(),
        build::hf_fp8(),
        build::bnb_nf4(),
        build::bnb_int8(),
    ]
}

fn files(base: &Build) -> (Vec<u8>, Vec<u8>) {
    let dir = base.write();
    (fs::read(dir.join("config.json")).unwrap(), fs::read(dir.join("model.safetensors")).unwrap())
}

/// A value in place of a field's: of another type, extreme, or nested.
fn strange() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-4i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[ -~]{0,12}".prop_map(Value::from),
        prop::sample::select(vec!["group", "gptq_v2", "re:.*", "gemv_fast", "tensor", "awq"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..3).prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

/// Replaces the `at`-th value below `value`, counted depth first.
fn replace(value: &mut Value, at: &mut usize, with: &Value) -> bool {
    if *at == 0 {
        *value = with.clone();
        return true;
    }
    *at -= 1;
    match value {
        Value::Object(map) => map.values_mut().any(|v| replace(v, at, with)),
        Value::Array(list) => list.iter_mut().any(|v| replace(v, at, with)),
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn packing_is_undone(bits in 2u8..=8, dense: bool, raw in prop::collection::vec(any::<u8>(), 0..200)) {
        let codes: Vec<u8> = raw.iter().map(|c| c >> (8 - bits)).collect();
        let packing = if dense { Packing::Dense } else { Packing::Aligned };
        let words = packing.pack(&codes, bits);
        prop_assert_eq!(words.len(), packing.words(codes.len(), bits));
        let mut back = vec![0u8; codes.len()];
        packing.unpack(&words, bits, &mut back);
        prop_assert_eq!(back, codes);
    }

    #[test]
    fn arbitrary_words_unpack(bits in 2u8..=8, dense: bool, words in prop::collection::vec(any::<u32>(), 1..40)) {
        let packing = if dense { Packing::Dense } else { Packing::Aligned };
        let len = if dense { words.len() * 32 / usize::from(bits) } else { words.len() * (32 / usize::from(bits)) };
        let mut codes = vec![0u8; len];
        packing.unpack(&words, bits, &mut codes);
        prop_assert!(codes.iter().all(|&c| u32::from(c) >> bits == 0));
    }

    #[test]
    fn arbitrary_headers(header in "[ -~]{0,80}", data in prop::collection::vec(any::<u8>(), 0..40)) {
        exercise(build::config().to_string().as_bytes(), &safetensors(&header, &data));
        exercise(build::config().to_string().as_bytes(), &data);
    }

    #[test]
    fn damaged_shards(base in 0usize..8, at: prop::sample::Index, byte: u8, cut: prop::sample::Index, truncate: bool) {
        let (config, mut weights) = files(&bases()[base]);
        let at = at.index(weights.len());
        weights[at] = byte;
        if truncate {
            weights.truncate(cut.index(weights.len()));
        }
        exercise(&config, &weights);
    }

    #[test]
    fn strange_configurations(base in 0usize..8, at in 0usize..60, value in strange()) {
        let (config, weights) = files(&bases()[base]);
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        replace(&mut config, &mut { at }, &value);
        exercise(config.to_string().as_bytes(), &weights);
    }

    #[test]
    fn damaged_configurations(base in 0usize..8, at: prop::sample::Index, byte: u8) {
        let (mut config, weights) = files(&bases()[base]);
        let at = at.index(config.len());
        config[at] = byte;
        exercise(&config, &weights);
    }
}

#[test]
fn three_bits_by_hand() {
    // Thirty-two codes in three words: code 10 has its low two bits at the top of word 0, code 21 its lowest at the
    // top of word 1. Codes 0..32 are i mod 8.
    let codes: Vec<u8> = (0..32).map(|i| i % 8).collect();
    let words = [0x88FA_C688, 0xC688_FAC6, 0xFAC6_88FA];
    assert_eq!(Packing::Dense.pack(&codes, 3), words);
    // Ten codes a word, two bits unused: 0o1076543210, 0o3210765432, ...
    assert_eq!(Packing::Aligned.pack(&codes, 3), [0o1076543210, 0o3210765432, 0o5432107654, 0o76]);
    let mut back = [0; 32];
    Packing::Dense.unpack(&words, 3, &mut back);
    assert_eq!(back[..], codes);
    // Where bits divide 32 the two are one: 0x76543210 is codes 0 to 7.
    for packing in [Packing::Dense, Packing::Aligned] {
        assert_eq!(packing.pack(&[0, 1, 2, 3, 4, 5, 6, 7, 8], 4), [0x7654_3210, 8]);
        assert_eq!(packing.words(9, 8), 3);
    }
    assert_eq!((Packing::Dense.words(4096, 3), Packing::Aligned.words(4096, 3)), (384, 410));
}

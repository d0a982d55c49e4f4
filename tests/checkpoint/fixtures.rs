//! The demo and the fixtures open, check and read; external checkpoints too where there are some.

use lowbit::checkpoint::{Checkpoint, Expected, ModelConfig};
use lowbit::quant::Weight;

use crate::common::fixtures::{all_golden_dirs, fixture, fixture_names};

/// What a Llama-shaped model with a tied head needs.
pub fn expected(c: &ModelConfig) -> Vec<Expected> {
    let linear = |name: String, n, k, bias| Expected::Linear { name, n, k, bias };
    let mut list = vec![
        Expected::Tensor { name: "model.embed_tokens.weight".into(), shape: vec![c.vocab_size, c.hidden_size] },
        Expected::Tensor { name: "model.norm.weight".into(), shape: vec![c.hidden_size] },
    ];
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    for l in 0..c.num_layers {
        let p = format!("model.layers.{l}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            list.push(Expected::Tensor { name: format!("{p}.{norm}.weight"), shape: vec![c.hidden_size] });
        }
        list.push(linear(format!("{p}.self_attn.q_proj"), q, c.hidden_size, c.qkv_bias));
        list.push(linear(format!("{p}.self_attn.k_proj"), kv, c.hidden_size, c.qkv_bias));
        list.push(linear(format!("{p}.self_attn.v_proj"), kv, c.hidden_size, c.qkv_bias));
        list.push(linear(format!("{p}.self_attn.o_proj"), c.hidden_size, q, c.o_bias));
        list.push(linear(format!("{p}.mlp.gate_proj"), c.intermediate_size, c.hidden_size, c.mlp_bias));
        list.push(linear(format!("{p}.mlp.up_proj"), c.intermediate_size, c.hidden_size, c.mlp_bias));
        list.push(linear(format!("{p}.mlp.down_proj"), c.hidden_size, c.intermediate_size, c.mlp_bias));
    }
    list
}

#[test]
fn golden_checkpoints_open_check_and_read() {
    for dir in all_golden_dirs() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let expected = expected(checkpoint.config());
        let notes = checkpoint.check(&expected).unwrap();
        // What an FP8 file says of activations is told; nothing else about these files is.
        let is_fp8 = dir.to_string_lossy().contains("fp8-");
        assert_eq!(notes.len(), usize::from(is_fp8), "{}: {notes:?}", dir.display());
        assert!(notes.iter().all(|note| note.text.contains("activations in FP8")), "{notes:?}");
        for item in &expected {
            match item {
                Expected::Tensor { name, shape } => {
                    assert_eq!(checkpoint.tensor(name).unwrap().len(), shape.iter().product::<usize>());
                }
                Expected::Linear { name, n, k, .. } => {
                    let linear = checkpoint.linear(name).unwrap();
                    assert_eq!((linear.n(), linear.k()), (*n, *k));
                    assert_eq!(linear.scheme().to_string(), checkpoint.linear_scheme(name).unwrap().to_string());
                    if let Weight::Quant(q) = &linear.weight {
                        assert_eq!(q.codes.len(), n * k);
                        assert!(q.codes.iter().all(|&code| u32::from(code) < 1 << q.bits));
                    }
                }
            }
        }
    }
}

#[test]
fn fixtures_have_the_schemes_they_are_named_for() {
    let scheme = |name: &str| {
        Checkpoint::open(&fixture(name)).unwrap().linear_scheme("model.layers.0.mlp.down_proj").unwrap().to_string()
    };
    let integers = ["awq-4bit-g128", "ct-w4a16-gptq", "ct-w8a8-dynamic"];
    let all = [&integers[..], &["fp8-block128", "fp8-channel", "fp8-tensor", "gptq-4bit-g32-actorder"]].concat();
    assert_eq!(fixture_names(), all);
    assert_eq!(scheme("fp8-block128"), "fp8a16 g128");
    assert_eq!(scheme("fp8-channel"), "fp8a16 per-channel");
    assert_eq!(scheme("fp8-tensor"), "fp8a16 per-channel");
    assert_eq!(scheme("awq-4bit-g128"), "w4a16 g128 asym");
    assert_eq!(scheme("ct-w4a16-gptq"), "w4a16 g128 sym");
    assert_eq!(scheme("ct-w8a8-dynamic"), "w8a8 per-channel sym, activations int8 dynamic per token");
    assert_eq!(scheme("gptq-4bit-g32-actorder"), "w4a16 g32 sym act-order");
}

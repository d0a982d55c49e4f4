//! config.json and generation_config.json: what each family's fields mean, and every number out of its range.

use std::fs;

use lowbit::checkpoint::{Architecture, Checkpoint, GenerationConfig, ModelConfig, RopeScaling};
use lowbit::error::Error;
use serde_json::{Value, json};

use super::build::{Build, assert_error, config, safetensors};

/// Opens a directory with these two files and no tensors.
fn open_texts(config: &str, generation: Option<&str>) -> Result<Checkpoint, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    if let Some(text) = generation {
        fs::write(dir.path().join("generation_config.json"), text).unwrap();
    }
    fs::write(dir.path().join("model.safetensors"), safetensors("{}", &[])).unwrap();
    Checkpoint::open(dir.path())
}

/// The standard configuration with `changes` over it; a value of `"-"` removes a field.
fn with(changes: &Value) -> Result<ModelConfig, Error> {
    let mut c = config();
    for (key, value) in changes.as_object().unwrap() {
        if value == "-" {
            c.as_object_mut().unwrap().remove(key);
        } else {
            c[key] = value.clone();
        }
    }
    open_texts(&c.to_string(), None).map(|c| c.config().clone())
}

#[test]
fn families_and_their_defaults() {
    let llama = with(&json!({})).unwrap();
    assert_eq!((llama.architecture, llama.head_dim, llama.num_kv_heads), (Architecture::Llama, 16, 2));
    assert_eq!(llama.windows, [None, None]);
    assert!(!llama.qkv_bias && !llama.o_bias && !llama.mlp_bias && !llama.tie_word_embeddings);
    let biased =
        with(&json!({"attention_bias": true, "mlp_bias": true, "num_key_value_heads": null, "head_dim": 24})).unwrap();
    assert!(biased.qkv_bias && biased.o_bias && biased.mlp_bias);
    assert_eq!((biased.num_kv_heads, biased.head_dim), (4, 24));
    assert_eq!(with(&json!({"head_dim": null})).unwrap().head_dim, 16);
    assert_eq!(with(&json!({"architectures": null, "model_type": "llama"})).unwrap().architecture, Architecture::Llama);

    let mistral = |changes: Value| {
        let mut all = json!({"architectures": ["MistralForCausalLM"], "attention_bias": true});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        with(&all).unwrap()
    };
    assert_eq!(mistral(json!({})).windows, [Some(4096); 2]);
    assert_eq!(mistral(json!({"sliding_window": null})).windows, [None; 2]);
    assert_eq!(mistral(json!({"sliding_window": 32})).windows, [Some(32); 2]);
    assert!(!mistral(json!({})).qkv_bias);

    let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1});
    let qwen2 = with(&qwen).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.o_bias);
    assert_eq!(qwen2.windows, [None; 2]);
    let mut windowed = qwen.clone();
    windowed["use_sliding_window"] = json!(true);
    assert_eq!(with(&windowed).unwrap().windows, [None, Some(64)]);
    windowed["layer_types"] = json!(["sliding_attention", "full_attention"]);
    assert_eq!(with(&windowed).unwrap().windows, [Some(64), None]);
    windowed["layer_types"] = json!(["sliding_attention"]);
    assert_error(with(&windowed), &["layer_types", "1 entries for 2 layers"]);
    windowed["layer_types"] = json!(["linear_attention", "full_attention"]);
    assert_error(with(&windowed), &["layer_types", "linear_attention"]);

    let qwen3 = with(&json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": "-"})).unwrap();
    assert_eq!((qwen3.head_dim, qwen3.qkv_bias), (128, false));
    assert!(with(&json!({"architectures": ["Qwen3ForCausalLM"], "attention_bias": true})).unwrap().qkv_bias);
}

#[test]
fn other_architectures_are_refused_with_the_nearest() {
    let refused = |name: &str| {
        assert_error(with(&json!({"architectures": [name]})), &[name, "LlamaForCausalLM", "are supported"]).to_string()
    };
    assert!(refused("Qwen2MoeForCausalLM").contains("the nearest is Qwen2ForCausalLM"));
    assert!(refused("MixtralForCausalLM").contains("are supported"));
    assert!(!refused("GPT2LMHeadModel").contains("nearest"));
    assert_error(with(&json!({"architectures": []})), &["architectures", "missing"]);
    assert_error(with(&json!({"auto_map": {"AutoModel": "x.Y"}})), &["auto_map", "code of its own"]);
    for field in ["final_logit_softcapping", "attention_multiplier", "partial_rotary_factor", "num_local_experts"] {
        assert_error(with(&json!({field: 0.5})), &[field, "not supported"]);
    }
    assert_error(with(&json!({"hidden_act": "gelu"})), &["hidden_act", "expected `silu`, got `gelu`"]);
}

#[test]
fn rotary_settings() {
    let rope = |changes: Value| with(&changes).map(|c| c.rope);
    let scaling = |s: Value| rope(json!({ "rope_scaling": s })).map(|r| r.scaling);
    assert_eq!(rope(json!({"rope_theta": 5e5})).unwrap().theta, 5e5);
    assert_eq!(rope(json!({"rope_theta": "-"})).unwrap().theta, 1e4);
    let v5 =
        rope(json!({"rope_theta": "-", "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2}}))
            .unwrap();
    assert_eq!((v5.theta, v5.scaling), (1e6, RopeScaling::Linear { factor: 2.0 }));
    assert_error(rope(json!({"rope_parameters": {"rope_theta": 7.0}})), &["rope_theta", "different values"]);
    assert_error(
        rope(json!({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}})),
        &["differ between layers"],
    );

    assert_eq!(scaling(Value::Null).unwrap(), RopeScaling::None);
    assert_eq!(scaling(json!({"type": "default"})).unwrap(), RopeScaling::None);
    assert_eq!(scaling(json!({"type": "dynamic", "factor": 4.0})).unwrap(), RopeScaling::Dynamic { factor: 4.0 });
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    assert_eq!(scaling(llama3).unwrap(), expected);
    for s in [
        json!({"type": "linear"}),
        json!({"type": "linear", "factor": 0.5}),
        json!({"type": "dynamic", "factor": null}),
    ] {
        assert_error(scaling(s), &["config.json", "rope_scaling.factor"]);
    }
    assert_error(
        scaling(json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0})),
        &["high_freq_factor"],
    );
    assert_error(scaling(json!({"factor": 4.0})), &["rope_scaling.rope_type", "missing"]);
    assert_error(scaling(json!({"type": "linear", "rope_type": "yarn", "factor": 2})), &["contradicts"]);
    for unknown in ["longrope", "su", "mrope"] {
        assert_error(scaling(json!({"type": unknown, "factor": 2})), &["rope_scaling.rope_type", unknown]);
    }
}

#[test]
fn yarn_defaults_are_those_of_transformers() {
    let yarn = |changes: Value| {
        let mut s = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
        s.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        match with(&json!({ "rope_scaling": s })).unwrap().rope.scaling {
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: o,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => (factor, o, beta_fast, beta_slow, attention_factor, truncate),
            other => panic!("{other:?}"),
        }
    };
    // 0.1 ln 4 + 1
    let close = |a: f32, b: f32| assert!((a - b).abs() < 1e-6, "{a} {b}");
    let (factor, original, fast, slow, attention, truncate) = yarn(json!({}));
    assert_eq!((factor, original, fast, slow, truncate), (4.0, 32, 32.0, 1.0, true));
    close(attention, 1.138_629_4);
    assert_eq!(yarn(json!({"factor": null})).0, 4.0); // 128 / 32
    assert_eq!(yarn(json!({"original_max_position_embeddings": null})).1, 128);
    assert_eq!(yarn(json!({"attention_factor": 0.5})).4, 0.5);
    close(yarn(json!({"mscale": 1.0, "mscale_all_dim": 1.0})).4, 1.0);
    close(yarn(json!({"mscale": 0.707, "mscale_all_dim": 1.0})).4, 1.098_011 / 1.138_629_4);
    close(yarn(json!({"mscale": 0.707})).4, 1.138_629_4);
    assert!(!yarn(json!({"truncate": false, "beta_fast": 16, "beta_slow": 2})).5);
}

#[test]
fn numbers_out_of_range_name_their_field() {
    let dims = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
    for field in dims {
        for value in
            [json!(null), json!(0), json!(-1), json!(1e9), json!(2.5), json!("7"), json!([1]), json!(1u64 << 63)]
        {
            assert_error(with(&json!({ field: value })), &["config.json", &format!("field `{field}`")]);
        }
        assert_error(with(&json!({ field: "-" })), &["config.json", field, "missing"]);
    }
    for (field, value) in [
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(8)),
        ("num_attention_heads", json!(6)),
        ("head_dim", json!(0)),
        ("head_dim", json!(15)),
        ("head_dim", json!(1 << 20)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rms_norm_eps", json!(0)),
        ("rms_norm_eps", json!(1e300)),
        ("rope_theta", json!(0)),
        ("rope_theta", json!(-1e4)),
        ("max_position_embeddings", json!(1u64 << 40)),
        ("tie_word_embeddings", json!("yes")),
        ("eos_token_id", json!(16)),
        ("eos_token_id", json!([1, -1])),
        ("bos_token_id", json!("<s>")),
        ("sliding_window", json!(0)),
    ] {
        let text = assert_error(with(&json!({ field: value })), &["config.json"]).to_string();
        assert!(text.contains(field) || text.contains("num_key_value_heads"), "{field}: {text}");
    }
    // What serde_json would take silently, or refuses without saying where.
    let text = config().to_string();
    let twice = text.replacen('{', "{\"hidden_size\": 32,", 1);
    assert_error(open_texts(&twice, None), &["config.json", "duplicate key `hidden_size`"]);
    assert_error(open_texts(&text.replace("10000.0", "NaN"), None), &["config.json", "not valid JSON", "NaN"]);
    assert_error(open_texts(&text.replace("10000.0", "1e400"), None), &["config.json"]);
    assert_error(open_texts("", None), &["config.json", "not valid JSON"]);
    assert_error(open_texts("[]", None), &["config.json", "expected a JSON object"]);
    assert_error(open_texts(&"{\"a\":".repeat(100_000), None), &["config.json", "recursion limit"]);
}

#[test]
fn generation_defaults() {
    let generation = |text: &str| {
        let mut c = config();
        c["eos_token_id"] = json!(2);
        open_texts(&c.to_string(), Some(text)).map(|c| c.generation().clone())
    };
    let full = generation(
        r#"{"eos_token_id": [3, 2, 5], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05, "transformers_version": "5"}"#,
    );
    assert_eq!(
        full.unwrap(),
        GenerationConfig {
            eos_token_ids: vec![2, 3, 5],
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: Some(20),
            min_p: Some(0.1),
            repetition_penalty: Some(1.05),
            ..GenerationConfig::default()
        }
    );
    let all = generation(
        r#"{"suppress_tokens": [3, 4], "begin_suppress_tokens": 5, "bad_words_ids": [[1], [2, 3]], "sequence_bias": [[[4, 5], -1.5]],
            "no_repeat_ngram_size": 3, "min_new_tokens": 2, "max_new_tokens": 7, "max_length": 20, "stop_strings": "END",
            "top_k": -1, "top_p": 0, "num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "guidance_scale": null, "max_time": 2,
            "penalty_alpha": 0.6, "use_cache": true, "pad_token_id": 99, "forced_eos_token_id": [], "future": "x"}"#,
    );
    assert_eq!(
        all.unwrap(),
        GenerationConfig {
            eos_token_ids: vec![2],
            top_k: Some(0),
            top_p: Some(0.0),
            suppress_tokens: vec![3, 4],
            begin_suppress_tokens: vec![5],
            bad_words_ids: vec![vec![1], vec![2, 3]],
            sequence_bias: vec![(vec![4, 5], -1.5)],
            no_repeat_ngram_size: 3,
            min_new_tokens: 2,
            max_new_tokens: Some(7),
            max_length: Some(20),
            stop_strings: vec!["END".into()],
            unused: vec!["max_time".into(), "penalty_alpha".into(), "future".into()],
            ..GenerationConfig::default()
        }
    );
    assert_eq!(generation("{}").unwrap(), GenerationConfig { eos_token_ids: vec![2], ..GenerationConfig::default() });
    let absent = open_texts(&config().to_string(), None).unwrap();
    assert_eq!(*absent.generation(), GenerationConfig::default());
    for (text, part) in [
        (r#"{"temperature": NaN}"#, "temperature"),
        (r#"{"temperature": -1}"#, "temperature"),
        (r#"{"temperature": "hot"}"#, "temperature"),
        (r#"{"eos_token_id": 16}"#, "eos_token_id"),
        (r#"{"eos_token_id": [1, 1e9]}"#, "eos_token_id"),
        (r#"{"top_p": 1.5}"#, "top_p"),
        (r#"{"top_k": -2}"#, "top_k"),
        (r#"{"suppress_tokens": [16]}"#, "suppress_tokens"),
        (r#"{"bad_words_ids": [1]}"#, "bad_words_ids"),
        (r#"{"bad_words_ids": [[]]}"#, "bad_words_ids"),
        (r#"{"bad_words_ids": [[-1]]}"#, "bad_words_ids"),
        (r#"{"sequence_bias": [[[1]]]}"#, "sequence_bias"),
        (r#"{"sequence_bias": [[[1], "x"]]}"#, "sequence_bias"),
        (r#"{"max_new_tokens": -1}"#, "max_new_tokens"),
        (r#"{"stop_strings": [1]}"#, "stop_strings"),
        (r#"{"top_k": -3}"#, "top_k"),
        (r#"{"do_sample": 1}"#, "do_sample"),
        (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
        (r#"{"top_p": 0.5, "top_p": 0.6}"#, "duplicate key `top_p`"),
    ] {
        assert_error(generation(text), &["generation_config.json", part]);
    }
}

#[test]
fn head_and_embedding_are_compared_with_the_configuration() {
    use lowbit::checkpoint::Expected;
    let build = Build::new(Value::Null).tensor("model.embed_tokens.weight", "F16", &[17, 64], &[0]);
    let expected = Expected::Tensor { name: "model.embed_tokens.weight".into(), shape: vec![16, 64] };
    assert_error(build.open().unwrap().check(&[expected]), &["embed_tokens.weight", "[17, 64]", "[16, 64]"]);
    let head = Expected::Linear { name: "lm_head".into(), n: 16, k: 64, bias: false };
    assert_error(build.open().unwrap().check(&[head]), &["`lm_head.weight`: missing"]);
}

//! Checkpoints whose configuration and tensors disagree, as transformers settles it.

use lowbit::checkpoint::Note;
use lowbit::dtype::HostData;
use lowbit::models::ModelSpec;
use lowbit::quant::Weight;
use serde_json::{Value, json};

use super::build::{Build, assert_error, gptq};

const VOCAB: usize = 16;
const HIDDEN: usize = 64;
const EMBEDDING: &str = "model.embed_tokens.weight";
const ONE: [u8; 2] = [0x80, 0x3f];
const TWO: [u8; 2] = [0x00, 0x40];

/// A tied model, its embedding of ones.
fn tied(build: Build) -> Build {
    let mut build = build.tensor(EMBEDDING, "BF16", &[VOCAB, HIDDEN], &ONE);
    build.config["tie_word_embeddings"] = json!(true);
    build
}

fn plain() -> Build {
    tied(Build::new(Value::Null))
}

fn notes(build: &Build) -> Vec<Note> {
    build.open().unwrap().check(&[]).unwrap()
}

fn values(data: &HostData) -> Vec<f32> {
    data.to_f32()
}

#[test]
fn layers_that_the_configuration_leaves_out_are_told() {
    let build = plain().tensor("model.layers.99.mlp.up_proj.weight", "BF16", &[4, 4], &ONE);
    let notes = notes(&build);
    let text = &notes[0].text;
    assert!(notes[0].is_warning && text.contains("num_hidden_layers") && text.contains("model.layers.99."), "{text}");
}

#[test]
fn a_head_of_its_own_is_used() {
    let own = plain().tensor("lm_head.weight", "BF16", &[VOCAB, HIDDEN], &TWO);
    let checkpoint = own.open().unwrap();
    assert!(!checkpoint.config().tie_word_embeddings);
    let Weight::Dense { data, .. } = checkpoint.linear("lm_head").unwrap().weight else { panic!("floats") };
    assert_eq!(values(&data), [2.0; VOCAB * HIDDEN]);
    let notes = notes(&own);
    assert!(notes[0].is_warning && notes[0].text.contains("lm_head is a layer of its own"), "{notes:?}");
    // The model needs it then, and its shape counts.
    let odd = plain().tensor("lm_head.weight", "BF16", &[VOCAB, 2], &TWO);
    assert_error(
        odd.open().unwrap().check(&[ModelSpec::new(odd.open().unwrap().config()).expected()[2].clone()]),
        &["lm_head", "[16, 2]"],
    );
    // One that is quantized is not the embedding, whatever it holds.
    let packed = tied(gptq())
        .tensor("lm_head.qweight", "I32", &[HIDDEN / 8, VOCAB], &[0x12, 0x34, 0x56, 0x78])
        .tensor("lm_head.qzeros", "I32", &[HIDDEN / 32, VOCAB / 8], &[0x77])
        .tensor("lm_head.scales", "F16", &[HIDDEN / 32, VOCAB], &[0x00, 0x3c]);
    assert!(matches!(packed.open().unwrap().linear("lm_head").unwrap().weight, Weight::Quant(_)));
}

#[test]
fn a_head_that_is_the_embedding_is_dropped() {
    let one: [u8; 4] = 1f32.to_le_bytes();
    for (dtype, fill) in [("BF16", &ONE[..]), ("F32", &one), ("F16", &[0x00, 0x3c])] {
        let build = plain().tensor("lm_head.weight", dtype, &[VOCAB, HIDDEN], fill);
        let checkpoint = build.open().unwrap();
        assert!(checkpoint.config().tie_word_embeddings, "{dtype}");
        assert!(notes(&build).iter().all(|note| !note.text.contains("lm_head")), "{dtype}");
    }
}

/// Of a tied pair some writers keep the head's name.
#[test]
fn an_embedding_under_the_heads_name() {
    let build = plain().without(EMBEDDING).tensor("lm_head.weight", "BF16", &[VOCAB, HIDDEN], &TWO);
    let checkpoint = build.open().unwrap();
    assert!(checkpoint.config().tie_word_embeddings);
    assert_eq!(values(&checkpoint.tensor(EMBEDDING).unwrap()), [2.0; VOCAB * HIDDEN]);
    let Weight::Dense { data, .. } = checkpoint.linear("lm_head").unwrap().weight else { panic!("floats") };
    assert_eq!(values(&data), [2.0; VOCAB * HIDDEN]);
}

#[test]
fn biases_that_the_configuration_denies_are_not_used() {
    let name = "model.layers.0.self_attn.q_proj";
    let with = |bias: Value, fill: &[u8]| {
        let mut build = plain().tensor(&format!("{name}.weight"), "BF16", &[HIDDEN, HIDDEN], &ONE).tensor(
            &format!("{name}.bias"),
            "BF16",
            &[HIDDEN],
            fill,
        );
        build.config["attention_bias"] = bias;
        build
    };
    let read = |build: &Build| {
        let checkpoint = build.open().unwrap();
        let spec = ModelSpec::new(checkpoint.config());
        let linear = spec.linears().find(|linear| linear.name == name).unwrap();
        let expected = spec.expected().into_iter().filter(|e| format!("{e:?}").contains(name)).collect::<Vec<_>>();
        (linear.read(&checkpoint).unwrap().bias, checkpoint.check(&expected).unwrap())
    };
    let (bias, notes) = read(&with(json!(false), &TWO));
    assert_eq!(bias, None);
    assert!(notes[0].is_warning && notes[0].text.contains(&format!("`{name}.bias`")), "{notes:?}");
    assert_eq!(read(&with(json!(true), &TWO)).0, Some(vec![2.0; HIDDEN]));
    // Zeros, as some exporters add them, are no contradiction.
    let (bias, notes) = read(&with(json!(false), &[0]));
    assert!(bias.is_none() && !notes[0].is_warning, "{notes:?}");
}

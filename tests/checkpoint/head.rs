//! The output head: a layer of its own or the embedding, as the file has it or rounded at load.

use lowbit::quant::{LinearWeight, Weight};
use serde_json::{Value, json};

use super::build::{Build, assert_error, gptq};

const VOCAB: usize = 16;
const HIDDEN: usize = 64;

/// The head of `build` as it is and as codes of `bits`, the schemes beside them those of the headers.
fn heads(build: &Build, bits: u8) -> [LinearWeight; 2] {
    let mut checkpoint = build.open().unwrap();
    let found = checkpoint.linear("lm_head").unwrap();
    assert_eq!(checkpoint.linear_scheme("lm_head").unwrap(), found.scheme());
    checkpoint.round_head(bits);
    let rounded = checkpoint.linear("lm_head").unwrap();
    assert_eq!(checkpoint.linear_scheme("lm_head").unwrap(), rounded.scheme());
    [found, rounded]
}

fn floating(name: &str, fill: &[u8]) -> Build {
    Build::new(Value::Null).tensor(name, "BF16", &[VOCAB, HIDDEN], fill)
}

#[test]
fn rounding() {
    let fill = [0x80, 0x3f, 0x00, 0xbf, 0x12, 0x3d, 0x00, 0x00]; // 1, -0.5, 0.0356, 0
    let own = floating("lm_head.weight", &fill);
    let mut tied = floating("model.embed_tokens.weight", &fill);
    tied.config["tie_word_embeddings"] = json!(true);
    for build in [own, tied] {
        for (bits, words, most) in [(8, "w8a16 per-channel sym", 0.005), (4, "w4a16 per-channel sym", 0.08)] {
            let [found, rounded] = heads(&build, bits);
            assert_eq!((found.scheme().to_string().as_str(), rounded.scheme().to_string().as_str()), ("16-bit", words));
            let (Weight::Dense { data, .. }, Weight::Quant(q)) = (found.weight, rounded.weight) else {
                panic!("{words}")
            };
            let errors = data.to_f32().into_iter().zip(q.dequantize()).map(|(w, rounded)| (w - rounded).abs());
            assert!(errors.fold(0.0, f32::max) <= most, "{words}");
        }
    }
}

/// A head that is quantized in the file stays, and so do the other layers.
#[test]
fn what_is_quantized_stays() {
    let packed = gptq()
        .tensor("lm_head.qweight", "I32", &[HIDDEN / 8, VOCAB], &[0x12, 0x34, 0x56, 0x78])
        .tensor("lm_head.qzeros", "I32", &[HIDDEN / 32, VOCAB / 8], &[0x77])
        .tensor("lm_head.scales", "F16", &[HIDDEN / 32, VOCAB], &[0x00, 0x3c]);
    let [found, rounded] = heads(&packed, 8);
    assert_eq!(found, rounded);
    let mut other = floating("m.weight", &[0x80, 0x3f]).open().unwrap();
    other.round_head(8);
    assert!(other.linear_scheme("m").unwrap().is_dense());
}

#[test]
fn a_head_that_cannot_be_rounded_is_named() {
    let nan = [0xc0, 0x7f];
    let round = |build: &Build| {
        let mut checkpoint = build.open().unwrap();
        checkpoint.round_head(8);
        checkpoint.linear("lm_head")
    };
    assert_error(round(&floating("lm_head.weight", &nan)), &["`lm_head.weight`", "expected finite values"]);
    let mut tied = floating("model.embed_tokens.weight", &nan);
    tied.config["tie_word_embeddings"] = json!(true);
    assert_error(round(&tied), &["`model.embed_tokens.weight`", "expected finite values"]);
    assert_error(round(&Build::new(Value::Null)), &["lm_head", "missing"]);
}

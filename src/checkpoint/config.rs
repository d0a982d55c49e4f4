//! `config.json` and `generation_config.json` as the rest of the crate sees them.

/// Positions, far above those of any model: low enough that products with other sizes fit 64 bits.
pub(super) const MAX_POSITIONS: usize = 1 << 30;

/// Decoder families. They differ in biases, norms and windows, not in structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2, 3, 3.x.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMSNorm on every query and key head.
    Qwen3,
    /// BitNet b1.58 2B4T: norms before the attention output and before `down`, squared ReLU.
    BitNet,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// NTK-aware base that grows with the text, from the trained context on ([`ModelConfig::rope_length`]).
    Dynamic {
        /// Stretch at full length.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Trained context.
        original_max_position_embeddings: usize,
    },
    /// YaRN: interpolation by parts, with a temperature on cosines and sines.
    Yarn {
        /// Stretch.
        factor: f32,
        /// Trained context.
        original_max_position_embeddings: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f32,
        /// Rotations below which a frequency is divided.
        beta_slow: f32,
        /// Factor on cosines and sines.
        attention_factor: f32,
        /// Round the ramp's ends to whole dimensions.
        truncate: bool,
    },
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f32,
    /// Context extension.
    pub scaling: RopeScaling,
}

/// Shape of a model, every field checked: sizes positive and bounded, `num_kv_heads` divides `num_heads`,
/// `head_dim` even.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Entries of the vocabulary (rows of the embedding).
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head; not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// RMSNorm epsilon.
    pub rms_norm_eps: f32,
    /// The output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Longest context the model claims.
    pub max_position_embeddings: usize,
    /// Positions.
    pub rope: RopeConfig,
    /// Sliding window of attention, per layer: `None` sees everything. `num_layers` entries.
    pub windows: Vec<Option<usize>>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention output.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// End-of-sequence ids of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Begin-of-sequence id.
    pub bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// Of a forward over a text of `length` tokens, what its keys depend on beside the tokens themselves: with dynamic scaling
    /// the length, where it is beyond the trained context. Keys of two texts that begin alike are the same where this is.
    pub fn rope_length(&self, length: usize) -> Option<usize> {
        let is_dynamic = matches!(self.rope.scaling, RopeScaling::Dynamic { .. });
        Some(length).filter(|&length| is_dynamic && length > self.max_position_embeddings)
    }
}

/// `generation_config.json`: defaults of sampling. Absent fields are `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// End-of-sequence ids: the union of this file's and `config.json`'s.
    pub eos_token_ids: Vec<u32>,
    /// Whether to sample at all by default.
    pub do_sample: Option<bool>,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Candidates kept.
    pub top_k: Option<u32>,
    /// Least probability relative to the best.
    pub min_p: Option<f32>,
    /// Multiplicative penalty on tokens already present.
    pub repetition_penalty: Option<f32>,
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that are not chosen first.
    pub begin_suppress_tokens: Vec<u32>,
    /// Sequences of tokens that never come, each of one or more.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Sequences of tokens with what is added to the logit of the last where the others precede it.
    pub sequence_bias: Vec<(Vec<u32>, f32)>,
    /// No n-gram of this length comes twice; 0 lets them.
    pub no_repeat_ngram_size: usize,
    /// Tokens to generate before the model may end.
    pub min_new_tokens: usize,
    /// Tokens to generate at most, where nobody says otherwise.
    pub max_new_tokens: Option<usize>,
    /// Tokens of prompt and output at most.
    pub max_length: Option<usize>,
    /// Texts that end the output.
    pub stop_strings: Vec<String>,
    /// Fields that would change the output and are not used.
    pub unused: Vec<String>,
}

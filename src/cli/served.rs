//! What `serve` and `run-batch` have in common: a model with its tokenizer, template, grammars and engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crate::checkpoint::GenerationConfig;
use crate::error::Result;
use crate::layers::KvCache;
use crate::server::{ServedModel, Service};
use crate::text::{ChatTemplate, GrammarCompiler, ReasoningFormat, Tokenizer, ToolFormat};

use super::engine_limits::MemoryArgs;
use super::options::{DeviceArgs, EngineArgs, HeadArgs, SamplingArgs};
use super::output;
use super::source::{Source, SourceArgs};

/// Flags of a served model.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ServedArgs {
    #[command(flatten)]
    source: SourceArgs,

    /// Directory of the tokenizer and the chat template; without it MODEL. --dummy needs it.
    #[arg(long, env = "LOWBIT_TOKENIZER", value_name = "DIR", required_unless_present = "model")]
    tokenizer: Option<PathBuf>,

    /// Name under which clients ask for the model; without it MODEL as given. May be repeated; responses say the first.
    #[arg(long, env = "LOWBIT_SERVED_MODEL_NAME", value_name = "NAME", value_delimiter = ',')]
    served_model_name: Vec<String>,

    #[command(flatten)]
    replies: ReplyArgs,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    head: HeadArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// How replies are taken apart.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Replies")]
struct ReplyArgs {
    /// How the model writes tool calls: `auto` (what its chat template shows), `none`, hermes, llama3_json, mistral, glm45 or qwen3_coder.
    #[arg(long, env = "LOWBIT_TOOL_CALL_PARSER", value_name = "NAME", default_value = "auto")]
    tool_call_parser: String,

    /// How the model marks its reasoning: `auto`, `none`, deepseek_r1, qwen3, glm45 or mistral.
    #[arg(long, env = "LOWBIT_REASONING_PARSER", value_name = "NAME", default_value = "auto")]
    reasoning_parser: String,
}

impl ServedArgs {
    /// Opens everything that can be wrong with little work, and leaves the loading for later.
    pub(super) fn loader(&self) -> Result<impl FnOnce() -> Result<Service> + Send + 'static> {
        let start = Instant::now();
        self.device.start_threads()?;
        let model = self.source.open(&self.head)?;
        let (dir, generation) = match &model {
            Source::Checkpoint(checkpoint, _) => (checkpoint.dir().to_path_buf(), checkpoint.generation().clone()),
            Source::Dummy(..) => (PathBuf::new(), GenerationConfig::default()),
        };
        let dir = self.tokenizer.clone().unwrap_or(dir);
        let vocab = model.config().vocab_size;
        let tokenizer = Tokenizer::load(&dir, vocab)?;
        let template = ChatTemplate::load(&dir)?;
        let defaults = self.sampling.defaults(&generation);
        let sampling = self.sampling.params(&defaults, tokenizer.eos_id());
        sampling.validate(vocab)?;
        self.sampling.stop_strings(&defaults)?;
        let has_token = |token: &str| tokenizer.token_to_id(token).is_some();
        let source = template.as_ref().map_or("", ChatTemplate::source);
        let tool_format = match self.replies.tool_call_parser.as_str() {
            "auto" => ToolFormat::detect(source, has_token),
            "none" => None,
            name => Some(name.parse()?),
        };
        let reasoning_format = match self.replies.reasoning_parser.as_str() {
            "auto" => ReasoningFormat::detect(source, has_token),
            "none" => None,
            name => Some(name.parse()?),
        };
        let names = match &self.served_model_name[..] {
            [] => vec![self.source.name().to_owned()],
            names => names.to_vec(),
        };
        let served = ServedModel {
            names,
            tool_format,
            reasoning_format,
            grammars: GrammarCompiler::new(&tokenizer, &sampling.stop_token_ids)?,
            template,
            tokenizer: Arc::new(tokenizer),
            sampling,
            stop: self.sampling.stop_texts(&defaults),
            max_new_tokens: defaults.max_new_tokens,
        };
        let (memory, engine, device) = (self.memory.clone(), self.engine.clone(), self.device.clone());
        Ok(move || {
            let device = device.open(model.dtype())?;
            let limits = memory.limits(&model, &device)?;
            let runner = model.load(&device, limits, "lower --max-model-len or --max-num-seqs")?;
            let prefix_caching = engine.prefix_caching() && runner.shares_prefixes();
            let mut engine = engine.start(runner);
            engine.warm_up()?;
            let load = start.elapsed().as_secs_f64();
            output::note(&format!(
                "ready: {} on {} in {load:.1} s; {} sequences at once, {} tokens each at most, {} tokens of KV cache",
                served.names[0],
                device.name(),
                limits.max_seqs,
                limits.max_model_len,
                limits.kv_blocks * KvCache::BLOCK_SIZE,
            ));
            Ok(Service { engine, model: served, prefix_caching })
        })
    }
}

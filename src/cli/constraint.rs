//! Flags that hold an output to a grammar.

use std::path::PathBuf;

use crate::engine::Matcher;
use crate::error::{Error, Result};
use crate::text::grammar::{Constraint, GrammarCompiler};
use crate::text::tokenizer::Tokenizer;

use super::read_text;

/// What the output must be, from its first character to its last.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Constraint")]
pub(super) struct ConstraintArgs {
    /// Generate JSON that the JSON schema in this file accepts.
    #[arg(long, env = "LOWBIT_JSON_SCHEMA", value_name = "FILE", conflicts_with_all = ["regex", "grammar"])]
    json_schema: Option<PathBuf>,

    /// Generate a text that this regular expression matches as a whole.
    #[arg(long, env = "LOWBIT_REGEX", value_name = "RE", conflicts_with = "grammar", allow_hyphen_values = true)]
    regex: Option<String>,

    /// Generate a text of the context-free grammar in this file, in llguidance's variant of Lark.
    #[arg(long, env = "LOWBIT_GRAMMAR", value_name = "FILE")]
    grammar: Option<PathBuf>,
}

impl ConstraintArgs {
    /// The grammar that was asked for, compiled for a model whose texts end with `eos_ids`.
    pub(super) fn compile(&self, tokenizer: &Tokenizer, eos_ids: &[u32]) -> Result<Option<Matcher>> {
        let Some((constraint, flag)) = self.constraint()? else { return Ok(None) };
        GrammarCompiler::new(tokenizer, eos_ids)?.compile(&constraint, flag).map(Some)
    }

    fn constraint(&self) -> Result<Option<(Constraint, &'static str)>> {
        Ok(match (&self.json_schema, &self.regex, &self.grammar) {
            (Some(path), _, _) => {
                let flag = "--json-schema";
                let schema = serde_json::from_str(&read_text(path)?)
                    .map_err(|e| Error::input(flag, format!("{}: malformed JSON: {e}", path.display())))?;
                Some((Constraint::JsonSchema(schema), flag))
            }
            (_, Some(regex), _) => Some((Constraint::Regex(regex.clone()), "--regex")),
            (_, _, Some(path)) => Some((Constraint::Lark(read_text(path)?), "--grammar")),
            _ => None,
        })
    }
}

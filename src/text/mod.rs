//! Between text and token ids: tokenizer, chat templates, incremental detokenizer, stop strings.

pub mod tokenizer;
pub mod chat_template;
pub mod detokenizer;
pub mod stop;

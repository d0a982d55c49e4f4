mod chat_template;
mod stop;
mod tokenizer;

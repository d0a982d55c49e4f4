mod chat_template;
mod stop;
mod tokenizer;
mod tokenizer_files;

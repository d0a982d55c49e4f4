mod chat_template;
mod grammar;
mod stop;
mod tokenizer;
mod tokenizer_files;

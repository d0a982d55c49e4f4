mod chat_template;
mod grammar;
mod reply;
mod stop;
mod tokenizer;
mod tokenizer_files;

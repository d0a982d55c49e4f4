mod chat_template;
mod reply;
mod stop;
mod tokenizer;
mod tokenizer_files;

mod chat_template;

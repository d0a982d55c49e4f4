//! Chat templates: any source over a conversation must end, in an error at worst.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::text::{ChatInput, ChatTemplate};

fuzz_target!(|source: &str| {
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let special = special.map(|(name, token)| (name.to_owned(), token.to_owned())).into();
    let Ok(template) = ChatTemplate::from_source(source, special) else { return };
    let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
    let _ = template.render(&ChatInput {
        messages: vec![message("system", "Be brief."), message("user", "Who wrote it?")],
        ..ChatInput::default()
    });
});

//! Model names to directories: a path is itself, a hub id is fetched into the Hugging Face cache.

//! W8A8 and LLM.int8(): 8-bit weights with a scale a channel on int8 tensor cores.

pub(super) mod sm80;
pub(super) mod sm90;

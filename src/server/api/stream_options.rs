//! What a stream is to hold beside its text.

use serde::Deserialize;

use crate::server::error::ApiError;

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct StreamOptions {
    /// End with a chunk that holds the usage.
    pub(super) include_usage: bool,
    /// OpenAI pads its chunks against eavesdroppers; there is nothing to switch off.
    include_obfuscation: bool,
}

impl StreamOptions {
    /// Those of a request.
    ///
    /// # Errors
    /// 400 where there is no stream.
    pub(super) fn of(is_stream: bool, options: Option<StreamOptions>) -> Result<StreamOptions, ApiError> {
        match options {
            Some(_) if !is_stream => Err(ApiError::invalid("stream_options", "needs `stream` to be true")),
            Some(StreamOptions { include_obfuscation: true, .. }) => {
                Err(ApiError::invalid("stream_options.include_obfuscation", "is not supported"))
            }
            options => Ok(options.unwrap_or_default()),
        }
    }
}

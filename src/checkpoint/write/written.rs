//! What a checkpoint to be written holds: the scheme of each linear layer.

use crate::quant::Scheme;

/// What a checkpoint holds, for its configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Every linear layer, the head too, with its scheme (`group_size: None` is one scale a channel); `None` for one that
    /// stays in floating point.
    pub modules: Vec<(String, Option<Scheme>)>,
    /// Scales for an int8 KV cache are there.
    pub kv_scales: Option<KvScales>,
    /// Columns were rounded by falling input magnitude, though they kept their places (`actorder: static`).
    pub static_order: bool,
    /// Calibration's damping, where there was any.
    pub damp: Option<f64>,
}

/// What shares a scale in an int8 KV cache; keys and values each have their own, in each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvScales {
    /// All heads of a layer.
    Tensor,
    /// A KV head.
    Head,
}

impl Written {
    /// The schemes and their modules, the most frequent first.
    pub fn schemes(&self) -> Vec<(Scheme, Vec<&str>)> {
        let mut found: Vec<(Scheme, Vec<&str>)> = Vec::new();
        for (name, scheme) in &self.modules {
            let Some(scheme) = scheme else { continue };
            match found.iter_mut().find(|(s, _)| s == scheme) {
                Some((_, names)) => names.push(name),
                None => found.push((*scheme, vec![name])),
            }
        }
        found.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
        found
    }

    /// Modules that stay in floating point.
    pub(super) fn unquantized(&self) -> Vec<&str> {
        self.modules.iter().filter(|(_, scheme)| scheme.is_none()).map(|(name, _)| name.as_str()).collect()
    }

    pub(super) fn quantizes_head(&self) -> bool {
        self.modules.iter().any(|(name, scheme)| name == HEAD && scheme.is_some())
    }
}

/// `w4a16 g128 sym`, or `w4a16 g128 sym (38 layers), w8a16 per-channel sym (4)`.
impl std::fmt::Display for Written {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let schemes = self.schemes();
        for (i, (scheme, names)) in schemes.iter().enumerate() {
            match (schemes.len(), i) {
                (1, _) => write!(f, "{scheme}")?,
                (_, 0) => write!(f, "{scheme} ({} layers)", names.len())?,
                _ => write!(f, "; {scheme} ({})", names.len())?,
            }
        }
        Ok(())
    }
}

/// The output head.
pub(super) const HEAD: &str = "lm_head";

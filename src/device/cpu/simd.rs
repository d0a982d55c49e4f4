//! Which vector instructions a fast path uses.

/// A set of vector instructions, from narrow to wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the compiler makes of plain Rust.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (2013).
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and VNNI (2019).
    Avx512,
}

impl Level {
    /// Every level this machine has, narrow to wide.
    pub fn available() -> Vec<Level> {
        let mut levels = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 {
                levels.push(Level::Avx2);
                if avx512 {
                    levels.push(Level::Avx512);
                }
            }
        }
        levels
    }

    /// The widest level of this machine.
    pub fn detect() -> Level {
        Level::available().pop().unwrap_or(Level::Portable)
    }

    /// Lower-case name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512-vnni",
        }
    }
}

//! Element types and the one host-side container of elements, [`HostData`].

use half::{bf16, f16};
use rayon::prelude::*;

/// Fewest elements that a core converts at once.
const PIECE: usize = 1 << 14;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16: 11 significant bits, largest value 65504.
    F16,
    /// bfloat16: 8 significant bits, the exponent range of `F32`.
    BF16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer; also packed codes.
    U8,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer: token ids, positions, indices.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 | DType::U8 => 1,
        }
    }

    /// Unit roundoff (half the distance from 1 to the next value) of a floating type; 0 for integers, which are exact.
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            DType::F32 => 5.960_464_477_539_063e-8, // 2^-24
            DType::F16 => 4.882_812_5e-4,           // 2^-11
            DType::BF16 => 3.906_25e-3,             // 2^-8
            _ => 0.0,
        }
    }

    /// Lower-case name as flags and reports show it.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::I32 => "i32",
            DType::U32 => "u32",
        }
    }

    /// `x` rounded to this floating type (round half to even) and back; the identity for `F32` and integers.
    pub fn round(self, x: f32) -> f32 {
        match self {
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Elements in host memory, typed. Row-major when they form a matrix.
#[derive(Debug, Clone, PartialEq)]
pub enum HostData {
    /// `F32` elements.
    F32(Vec<f32>),
    /// `F16` elements.
    F16(Vec<f16>),
    /// `BF16` elements.
    BF16(Vec<bf16>),
    /// `I8` elements.
    I8(Vec<i8>),
    /// `U8` elements.
    U8(Vec<u8>),
    /// `I32` elements.
    I32(Vec<i32>),
    /// `U32` elements.
    U32(Vec<u32>),
}

macro_rules! each {
    ($self:expr, $v:ident => $body:expr) => {
        match $self {
            HostData::F32($v) => $body,
            HostData::F16($v) => $body,
            HostData::BF16($v) => $body,
            HostData::I8($v) => $body,
            HostData::U8($v) => $body,
            HostData::I32($v) => $body,
            HostData::U32($v) => $body,
        }
    };
}

impl HostData {
    /// `len` zeros of `dtype`.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => HostData::F32(vec![0.0; len]),
            DType::F16 => HostData::F16(vec![f16::ZERO; len]),
            DType::BF16 => HostData::BF16(vec![bf16::ZERO; len]),
            DType::I8 => HostData::I8(vec![0; len]),
            DType::U8 => HostData::U8(vec![0; len]),
            DType::I32 => HostData::I32(vec![0; len]),
            DType::U32 => HostData::U32(vec![0; len]),
        }
    }

    /// `values` rounded to the floating `dtype` (round half to even).
    ///
    /// # Panics
    /// If `dtype` is an integer type: a bug of the caller.
    pub fn from_f32(dtype: DType, values: Vec<f32>) -> Self {
        match dtype {
            DType::F32 => HostData::F32(values),
            DType::F16 => HostData::F16(values.par_iter().with_min_len(PIECE).map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => HostData::BF16(values.par_iter().with_min_len(PIECE).map(|&x| bf16::from_f32(x)).collect()),
            other => panic!("HostData::from_f32: {other} is not a floating type"),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each!(self, v => v.len())
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            HostData::F32(_) => DType::F32,
            HostData::F16(_) => DType::F16,
            HostData::BF16(_) => DType::BF16,
            HostData::I8(_) => DType::I8,
            HostData::U8(_) => DType::U8,
            HostData::I32(_) => DType::I32,
            HostData::U32(_) => DType::U32,
        }
    }

    /// Place and value of the first element that is a NaN or an infinity; none in integers.
    pub fn first_not_finite(&self) -> Option<(usize, f32)> {
        match self {
            HostData::F32(v) => v.par_iter().with_min_len(PIECE).position_first(|x| !x.is_finite()).map(|i| (i, v[i])),
            HostData::F16(v) => {
                v.par_iter().with_min_len(PIECE).position_first(|x| !x.is_finite()).map(|i| (i, v[i].to_f32()))
            }
            HostData::BF16(v) => {
                v.par_iter().with_min_len(PIECE).position_first(|x| !x.is_finite()).map(|i| (i, v[i].to_f32()))
            }
            _ => None,
        }
    }

    /// Every element as `f32`: exact for floating types and for integers below 2^24.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            HostData::F32(v) => v.clone(),
            HostData::F16(v) => v.par_iter().with_min_len(PIECE).map(|x| x.to_f32()).collect(),
            HostData::BF16(v) => v.par_iter().with_min_len(PIECE).map(|x| x.to_f32()).collect(),
            HostData::I8(v) => v.iter().map(|&x| f32::from(x)).collect(),
            HostData::U8(v) => v.iter().map(|&x| f32::from(x)).collect(),
            HostData::I32(v) => v.iter().map(|&x| x as f32).collect(),
            HostData::U32(v) => v.iter().map(|&x| x as f32).collect(),
        }
    }
}

//! [`LinearInput`]: the input of a linear layer, and what it holds, so that a layer can refuse what was made for another.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::Device;
use super::tensor::Tensor;
use crate::dtype::{DType, HostData};
use crate::error::{Error, Result};
use crate::quant::ActQuant;

/// Input of linear layers: a row-major `[rows, k]` matrix, as floats, as 8-bit codes with one scale per row, or as both
/// (LLM.int8() keeps its outliers as floats beside the codes of all other columns).
///
/// Every op that writes one records what it wrote ([`LinearInput::record`]), and a linear layer takes it only if that is what
/// its weight reads: so many rows of that `k`, gathered by that act-order, quantized in that way with that scale.
/// Buffers are scratch: allocated once for the largest batch and used from their start with a row stride of exactly `k`.
///
/// Codes are signed everywhere but in the bytes of a `U8` tensor, which holds each code plus 128: uint8 with zero point
/// `z + 128` is the same affine map as int8 with zero point `z`.
#[derive(Debug)]
pub struct LinearInput {
    /// `[rows, k]` in the device's activation dtype; all written with [`ActQuant::None`].
    pub floats: Tensor,
    /// `[rows, k]` codes, `I8`, or `U8` (code plus 128); written with any other.
    pub codes: Tensor,
    /// `[rows]` `F32` scales of the codes (every entry the static scale when static).
    pub scales: Tensor,
    /// `[rows]` `I32` zero points of the codes; written and read with [`ActQuant::DynamicAsymmetric`] alone.
    pub zero_points: Tensor,
    /// `[rows, outlier_words(k)]` `U32`, with [`ActQuant::LlmInt8`] alone: bit `c % 32` of word `c / 32` is set where column
    /// `c` is an outlier, whose code is 0 and whose value is in `floats`; other floats are then undefined.
    pub outliers: Tensor,
    contents: Contents,
}

impl LinearInput {
    /// Zeros for `rows` rows of `k`, with int8 codes; holds nothing yet.
    pub fn new(device: &Device, rows: usize, k: usize) -> Result<LinearInput> {
        Ok(LinearInput {
            floats: device.zeros(device.activation_dtype(), rows * k)?,
            codes: device.zeros(DType::I8, rows * k)?,
            scales: device.zeros(DType::F32, rows)?,
            zero_points: device.zeros(DType::I32, rows)?,
            outliers: device.zeros(DType::U32, rows * LinearInput::outlier_words(k))?,
            contents: Contents::NOTHING,
        })
    }

    /// Words of a row of `outliers`.
    pub fn outlier_words(k: usize) -> usize {
        k.div_ceil(32)
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        let LinearInput { floats, codes, scales, zero_points, outliers, contents: _ } = self;
        [floats, codes, scales, zero_points, outliers].map(Tensor::bytes).iter().sum()
    }

    /// Says that `rows` rows of `k` are there in `format`. Ops do so themselves; this is for who fills the buffers by hand.
    pub fn record(&mut self, format: InputFormat<'_>, rows: usize, k: usize) {
        self.contents = Contents { rows, k, order: format.order.map(ActOrder::id), quant: format.quant };
    }

    /// The floats, if they are what it holds: all of them, in their own order.
    ///
    /// # Errors
    /// `Shape` when it holds something else.
    pub fn plain_floats(&self) -> Result<&Tensor> {
        if self.contents.quant == ActQuant::None && self.contents.order.is_none() {
            return Ok(&self.floats);
        }
        let expected = "floats in their own order".into();
        Err(Error::Shape { op: "plain_floats", expected, got: self.contents.to_string() })
    }

    /// Says that the buffers hold nothing that a layer may read: what a failed op leaves.
    pub(super) fn forget(&mut self) {
        self.contents = Contents::NOTHING;
    }

    /// [`LinearInput::record`] of columns that come in `order`.
    pub(super) fn record_ordered(&mut self, order: Option<OrderId>, quant: ActQuant, rows: usize, k: usize) {
        self.contents = Contents { rows, k, order, quant };
    }

    /// Fails unless at least `rows` rows of `k` are there in `format`.
    pub(super) fn require(&self, op: &'static str, format: InputFormat<'_>, rows: usize, k: usize) -> Result<()> {
        let (held, order) = (&self.contents, format.order.map(ActOrder::id));
        if held.rows >= rows && held.k == k && held.order == order && held.quant == format.quant {
            return Ok(());
        }
        let expected = Contents { rows, k, order, quant: format.quant };
        Err(Error::Shape { op, expected: format!("an input of {expected}"), got: held.to_string() })
    }
}

/// What the buffers of a [`LinearInput`] hold.
#[derive(Debug, Clone, Copy)]
struct Contents {
    rows: usize,
    k: usize,
    order: Option<OrderId>,
    quant: ActQuant,
}

impl Contents {
    const NOTHING: Contents = Contents { rows: 0, k: 0, order: None, quant: ActQuant::None };
}

impl std::fmt::Display for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}] ", self.rows, self.k)?;
        match self.order {
            Some(OrderId(id)) => write!(f, "in act-order {id:016x}")?,
            None => f.write_str("in their own order")?,
        }
        match self.quant {
            ActQuant::None => f.write_str(", floats"),
            quant => write!(f, ", {quant:?}"),
        }
    }
}

/// Identity of a permutation of columns: equal for equal permutations, a hash of 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderId(u64);

impl OrderId {
    /// That of `order`.
    pub fn of(order: &[u32]) -> OrderId {
        let mut hasher = DefaultHasher::new();
        order.hash(&mut hasher);
        OrderId(hasher.finish())
    }
}

/// An act-order on a device: column `c` of the gathered matrix is column `order[c]`.
#[derive(Debug)]
pub struct ActOrder {
    indices: Tensor,
    id: OrderId,
}

impl ActOrder {
    /// Of `indices` (`U32`, `[k]`), which hold the permutation that `id` names.
    pub(crate) fn new(indices: Tensor, id: OrderId) -> ActOrder {
        ActOrder { indices, id }
    }

    /// Moves `order` to `device`.
    pub fn upload(device: &Device, order: Vec<u32>) -> Result<ActOrder> {
        let id = OrderId::of(&order);
        Ok(ActOrder::new(device.upload(HostData::U32(order))?, id))
    }

    /// `[k]` `U32`.
    pub fn indices(&self) -> &Tensor {
        &self.indices
    }

    /// Which permutation it is.
    pub fn id(&self) -> OrderId {
        self.id
    }
}

/// What an op that produces a linear layer's input writes.
#[derive(Debug, Clone, Copy)]
pub struct InputFormat<'a> {
    /// Act-order of the columns.
    pub order: Option<&'a ActOrder>,
    /// What the op computes comes in that order already, so that nothing is gathered.
    pub is_gathered: bool,
    /// Quantization of the row, after the gather.
    pub quant: ActQuant,
}

impl<'a> InputFormat<'a> {
    /// Plain floats in their own order.
    pub const FLOATS: InputFormat<'static> = InputFormat::quantized(ActQuant::None);

    /// Columns in their own order, quantized as `quant` says.
    pub const fn quantized(quant: ActQuant) -> InputFormat<'static> {
        InputFormat { order: None, is_gathered: false, quant }
    }

    /// The gather that the op has to do: output column `c` takes computed column `gather[c]` (`U32`, `[k]`).
    pub fn gather(&self) -> Option<&'a Tensor> {
        self.order.filter(|_| !self.is_gathered).map(ActOrder::indices)
    }
}

//! A weight in a family's layout, on the host or the GPU: its parts, and how values of groups lie.

use crate::device::cuda::memory::Buffer;
use crate::error::Result;

/// A packed weight: of `HostData`, or of `Buffer` in GPU memory.
#[derive(Debug)]
pub(super) struct Packed<T> {
    pub(super) codes: T,
    /// `F32`; order as [`Order`] says.
    pub(super) scales: Option<T>,
    /// `F32` by row, 16-bit integers by group.
    pub(super) zero_points: Option<T>,
    /// `I32` sums of code minus zero point over each group, for asymmetric activations.
    pub(super) sums: Option<T>,
}

impl<T> Packed<T> {
    /// Nothing but codes, or the elements of an unquantized weight.
    pub(super) fn new(codes: T) -> Self {
        Packed { codes, scales: None, zero_points: None, sums: None }
    }

    /// All there is: codes, then scales, zero points and sums.
    pub(super) fn parts(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.codes).chain([&self.scales, &self.zero_points, &self.sums].into_iter().flatten())
    }

    /// The same with `f` of each part.
    pub(super) fn try_map<U>(&self, f: impl Fn(&T) -> Result<U>) -> Result<Packed<U>> {
        let part = |part: &Option<T>| part.as_ref().map(&f).transpose();
        Ok(Packed {
            codes: f(&self.codes)?,
            scales: part(&self.scales)?,
            zero_points: part(&self.zero_points)?,
            sums: part(&self.sums)?,
        })
    }
}

impl Packed<Buffer> {
    /// A copy in memory of its own.
    pub(super) fn duplicate(&self) -> Result<Self> {
        self.try_map(Buffer::duplicate)
    }
}

/// How one value for each group of each row lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// `[n, groups]`
    ByRow,
    /// `[groups, lines]`, so that neighbouring outputs are loaded together, in whole multiples of so many.
    ByGroup { multiple: usize },
}

impl Order {
    /// Values of a group of `n` rows, with padding.
    pub(super) fn lines(self, n: usize) -> usize {
        match self {
            Order::ByRow => n,
            Order::ByGroup { multiple } => n.next_multiple_of(multiple),
        }
    }
}

/// What lies beside the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parameters {
    /// Order of what there is.
    pub(super) order: Order,
    /// Zero points, by row as f32, by group as uint16.
    pub(super) zero_points: bool,
    pub(super) sums: bool,
}

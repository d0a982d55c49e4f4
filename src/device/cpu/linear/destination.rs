//! [`Destination`]: where a linear layer's threads write, each its own columns of every row.
#![allow(unsafe_code)] // threads share one `&mut [f32]`, in parts that are not contiguous

use std::marker::PhantomData;
use std::ops::Range;

use crate::device::{Columns, Write};

/// Columns `offset..offset + n` of rows of `stride` elements.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Destination<'a> {
    start: *mut f32,
    stride: usize,
    n: usize,
    write: Write,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: `write` is unsafe where two threads would meet in one element; all else is plain data.
unsafe impl Send for Destination<'_> {}
// SAFETY: as above.
unsafe impl Sync for Destination<'_> {}

impl<'a> Destination<'a> {
    /// The columns of `n` outputs in each of `m` rows of `out`.
    pub(in crate::device::cpu) fn new(out: &'a mut [f32], columns: Columns, n: usize, m: usize, write: Write) -> Self {
        assert!(columns.offset + n <= columns.stride && m * columns.stride <= out.len(), "destination too small");
        let start = out[columns.offset..].as_mut_ptr();
        Destination { start, stride: columns.stride, n, write, borrow: PhantomData }
    }

    /// Writes or adds `values` to `row` from `column` on, as many as there are columns.
    ///
    /// # Safety
    /// `row` is below the `m` of [`Destination::new`], and no other thread uses these columns of it meanwhile.
    #[inline(always)]
    pub(in crate::device::cpu) unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        let columns: Range<usize> = column..(column + values.len()).min(self.n);
        // SAFETY: the columns lie in the row, the row in the slice that `new` checked; the caller owns them.
        let out = unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride + column), columns.len()) };
        match self.write {
            Write::Store => out.copy_from_slice(&values[..out.len()]),
            Write::Add => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
        }
    }
}

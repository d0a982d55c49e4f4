//! How the tensor memory accelerator (TMA) of sm_90 sees a matrix: descriptors that travel inside a kernel's arguments.
#![allow(unsafe_code)] // the driver API

use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::device::cuda::driver_error::failure;
use crate::device::cuda::embedded::abi;
use crate::error::Result;

/// Bytes of a row that one copy takes: as many as the 128-byte swizzle permutes.
const BOX_BYTES: u32 = 128;

/// Descriptors of one launch's input: the same number of rows of one layer comes from the same scratch every time, so the first
/// one is kept.
#[derive(Debug, Clone)]
pub(super) struct MapMemo {
    /// Rows of x that one copy takes.
    box_rows: u32,
    first: OnceLock<(usize, usize, abi::TensorMap)>,
}

impl MapMemo {
    /// For boxes of `box_rows` rows, 1 to 256.
    pub(super) fn new(box_rows: usize) -> Self {
        MapMemo { box_rows: box_rows as u32, first: OnceLock::new() }
    }

    /// Rows of a box.
    #[cfg(test)]
    pub(super) fn box_rows(&self) -> u32 {
        self.box_rows
    }

    /// The `rows` x `row_bytes` matrix at device address `base`, rows one after the other, copied in boxes of rows of
    /// [`BOX_BYTES`], each row's 16-byte chunks permuted by the row's number modulo 8. What of a box lies outside
    /// the matrix arrives as zeros.
    ///
    /// `base` is a multiple of 16, so is `row_bytes`, which is the same at every call.
    ///
    /// # Errors
    /// `Cuda` where the driver refuses.
    pub(super) fn matrix(&self, base: *const u8, rows: usize, row_bytes: usize) -> Result<abi::TensorMap> {
        if let Some((address, known_rows, map)) = self.first.get()
            && (*address, *known_rows) == (base as usize, rows)
        {
            return Ok(*map);
        }
        let map = encode(base, rows, row_bytes, self.box_rows)?;
        let _ = self.first.set((base as usize, rows, map)); // another launch may have been first
        Ok(map)
    }
}

fn encode(base: *const u8, rows: usize, row_bytes: usize, box_rows: u32) -> Result<abi::TensorMap> {
    let dims = [row_bytes as u64, rows as u64];
    let strides = [row_bytes as u64];
    let box_dims = [BOX_BYTES, box_rows];
    let element_strides = [1, 1];
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays are as long as the rank says; the driver reads them and does not follow `base`.
    let encoded = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            base.cast_mut().cast(),
            dims.as_ptr(),
            strides.as_ptr(),
            box_dims.as_ptr(),
            element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    encoded.result().map_err(|e| failure("tensor map", e))?;
    Ok(abi::TensorMap { opaque: map.opaque })
}

//! The metadata of a step's ragged batch, on a device: written with one copy, read by kernels from addresses that stay.

use super::{AttentionShape, Device, Tensor};
use crate::dtype::DType;
use crate::error::Result;

/// Parts of sequences that decode there is room for, beside two for each sequence.
const SPARE_ITEMS: usize = 512;
/// Keys that a part of a sequence has a multiple of, but for its last: a tile for each warp of a block.
const ITEM_KEYS: usize = 64;
/// Most parts of a sequence: there is shared memory for the weights of so many (kernels/attention/decode.cu).
const MOST_PARTS: usize = 512;
/// Words of an item.
const ITEM_WORDS: usize = 8;

/// What a [`BatchMeta`] has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSizes {
    /// Rows of all sequences.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// KV blocks of a sequence.
    pub blocks: usize,
    /// Rows whose logits are wanted.
    pub logit_rows: usize,
}

/// A step's ragged batch on the host. Rows of all sequences are concatenated.
#[derive(Debug, Clone, Copy)]
pub struct BatchRows<'a> {
    /// `[m]` token ids.
    pub token_ids: &'a [u32],
    /// `[m]` position of each row in its sequence.
    pub positions: &'a [u32],
    /// `[m]` KV slot (`block * block_size + offset`) each row writes; `u32::MAX` writes nowhere.
    pub slot_mapping: &'a [u32],
    /// `[batch, table_stride]` block numbers of each sequence.
    pub block_tables: &'a [u32],
    /// Row stride of `block_tables`.
    pub table_stride: usize,
    /// `[batch]` keys of each sequence, this step's included; 0 for one that is only there to fill the batch.
    pub context_lens: &'a [u32],
    /// `[batch + 1]` first row of each sequence, then `m`.
    pub cu_seqlens_q: &'a [u32],
}

/// The per-step metadata of a ragged batch, on the device.
#[derive(Debug)]
pub struct BatchMeta {
    /// `[2]` `U32`: number of `items`, row stride of `block_tables`.
    pub header: Tensor,
    /// `[m]` `U32` token ids.
    pub token_ids: Tensor,
    /// `[m]` `U32` position of each row in its sequence.
    pub positions: Tensor,
    /// `[m]` `U32` KV slot each row writes; `u32::MAX` writes nowhere.
    pub slot_mapping: Tensor,
    /// `[batch]` `U32` keys of each sequence, this step's included.
    pub context_lens: Tensor,
    /// `[batch + 1]` `U32` first row of each sequence, then `m`.
    pub cu_seqlens_q: Tensor,
    /// `[most_items + 1, 8]` `U32` what blocks of a GPU take of sequences that decode: sequence, its row, its keys, first key of the part, one past
    /// its last, which part of the sequence it is, how many that has, 0. The parts of a sequence follow each other.
    pub items: Tensor,
    /// `[batch, table_stride]` `U32` block numbers of each sequence.
    pub block_tables: Tensor,
    /// `[logit_rows]` `U32` rows whose logits are wanted.
    pub logit_rows: Tensor,
    /// Rows.
    pub m: usize,
    /// Sequences.
    pub batch: usize,
    /// Row stride of `block_tables` in this step.
    pub table_stride: usize,
    /// Most blocks that a sequence may have in any step.
    pub max_blocks: usize,
    /// Most rows of any sequence; 1 means pure decode.
    pub max_q_len: usize,
}

impl BatchMeta {
    /// Room for batches of `sizes`.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn new(device: &Device, sizes: BatchSizes) -> Result<BatchMeta> {
        let BatchSizes { rows, sequences, blocks, logit_rows } = sizes;
        let items = ITEM_WORDS * (SPARE_ITEMS + 2 * sequences + 1);
        let lens = [2, rows, rows, rows, sequences, sequences + 1, items, sequences * blocks];
        let [header, token_ids, positions, slot_mapping, context_lens, cu_seqlens_q, items, block_tables] =
            device.zeros_together(DType::U32, lens)?;
        Ok(BatchMeta {
            header,
            token_ids,
            positions,
            slot_mapping,
            context_lens,
            cu_seqlens_q,
            items,
            block_tables,
            logit_rows: device.zeros(DType::U32, logit_rows)?,
            m: 0,
            batch: 0,
            table_stride: 0,
            max_blocks: blocks,
            max_q_len: 0,
        })
    }

    /// The metadata of one batch alone, with room for it.
    ///
    /// # Errors
    /// As [`BatchMeta::new`] and [`BatchMeta::fill`].
    pub fn of(device: &Device, rows: &BatchRows<'_>, shape: &AttentionShape) -> Result<BatchMeta> {
        let sizes = BatchSizes {
            rows: rows.token_ids.len(),
            sequences: rows.context_lens.len(),
            blocks: rows.table_stride,
            logit_rows: 1,
        };
        let mut meta = BatchMeta::new(device, sizes)?;
        meta.fill(device, rows, shape)?;
        Ok(meta)
    }

    /// Replaces what is there by `rows`, for attention of `shape`.
    ///
    /// # Errors
    /// `Shape` when there is no room for it.
    pub fn fill(&mut self, device: &Device, rows: &BatchRows<'_>, shape: &AttentionShape) -> Result<()> {
        let grid = device.decode_grid(shape);
        let most = self.most_items();
        let items = grid.map_or(Vec::new(), |grid| decode_items(rows.context_lens, rows.cu_seqlens_q, grid, most));
        let header = [items.len() as u32, rows.table_stride as u32];
        device.write_together(
            [
                &mut self.header,
                &mut self.token_ids,
                &mut self.positions,
                &mut self.slot_mapping,
                &mut self.context_lens,
                &mut self.cu_seqlens_q,
                &mut self.items,
                &mut self.block_tables,
            ],
            [
                &header,
                rows.token_ids,
                rows.positions,
                rows.slot_mapping,
                rows.context_lens,
                rows.cu_seqlens_q,
                items.as_flattened(),
                rows.block_tables,
            ],
        )?;
        self.m = rows.token_ids.len();
        self.batch = rows.context_lens.len();
        self.table_stride = rows.table_stride;
        self.max_q_len = rows.cu_seqlens_q.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
        Ok(())
    }

    /// Most `items` that there is room for, but for one.
    pub fn most_items(&self) -> usize {
        self.items.len() / ITEM_WORDS - 1
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        let BatchMeta { header, token_ids, positions, slot_mapping, context_lens, .. } = self;
        let BatchMeta { cu_seqlens_q, items, block_tables, logit_rows, .. } = self;
        let tensors =
            [header, token_ids, positions, slot_mapping, context_lens, cu_seqlens_q, items, block_tables, logit_rows];
        tensors.map(Tensor::bytes).iter().sum()
    }
}

/// The blocks that a device has for attention of sequences that decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DecodeGrid {
    /// Blocks that run at once.
    pub(crate) blocks: usize,
    /// Blocks that each part of a sequence takes: one for each KV head and group of its query heads.
    pub(crate) groups: usize,
    /// Most parts of all sequences that are cut: there is memory for the sums of so many.
    pub(crate) most_parts: usize,
    /// Sequences, the first ones, that may be cut: there are counters for so many.
    pub(crate) most_cut: usize,
}

/// Cuts the keys of all sequences of one row into parts that keep the blocks of `grid` evenly busy, `most` parts at the most.
fn decode_items(context_lens: &[u32], cu_seqlens_q: &[u32], grid: DecodeGrid, most: usize) -> Vec<[u32; ITEM_WORDS]> {
    let one_row = |b: &usize| cu_seqlens_q[b + 1] - cu_seqlens_q[*b] == 1 && context_lens[*b] > 0;
    let sequences: Vec<usize> = (0..context_lens.len()).filter(one_row).collect();
    let keys: usize = sequences.iter().map(|&b| context_lens[b] as usize).sum();
    // Parts so long that all run at once; each sequence may have one more than whole ones, its last.
    let at_once = (grid.blocks / grid.groups).clamp(1, MOST_PARTS);
    let room = most.min(grid.most_parts).saturating_sub(sequences.len()).max(1);
    let longest = keys.div_ceil(at_once).max(keys.div_ceil(room)).next_multiple_of(ITEM_KEYS);
    let cut = |b: usize| {
        let (keys, row) = (context_lens[b] as usize, cu_seqlens_q[b]);
        let parts = if b < grid.most_cut { keys.div_ceil(longest) } else { 1 };
        let len = keys.div_ceil(parts).next_multiple_of(ITEM_KEYS);
        let parts = keys.div_ceil(len);
        (0..parts).map(move |i| {
            let (begin, end) = (i * len, keys.min((i + 1) * len));
            [b as u32, row, keys as u32, begin as u32, end as u32, i as u32, parts as u32, 0]
        })
    };
    sequences.into_iter().flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: DecodeGrid = DecodeGrid { blocks: 396, groups: 8, most_parts: 4000, most_cut: 512 };

    fn items(contexts: &[u32], grid: DecodeGrid) -> Vec<[u32; ITEM_WORDS]> {
        let starts: Vec<u32> = (0..=contexts.len() as u32).collect();
        let items = decode_items(contexts, &starts, grid, SPARE_ITEMS + 2 * contexts.len());
        assert!(items.len() <= SPARE_ITEMS + 2 * contexts.len(), "{} items", items.len());
        for (b, &keys) in contexts.iter().enumerate() {
            let of: Vec<_> = items.iter().filter(|item| item[0] == b as u32).collect();
            let mut next = 0;
            for (i, item) in of.iter().enumerate() {
                assert_eq!(item[1..4], [b as u32, keys, next], "{contexts:?}");
                assert_eq!(item[5..], [i as u32, of.len() as u32, 0], "{contexts:?}");
                assert!(item[4] > next && next.is_multiple_of(64));
                next = item[4];
            }
            assert_eq!(next, keys, "{contexts:?}");
        }
        items
    }

    #[test]
    fn parts_fill_the_blocks() {
        assert_eq!(items(&[512], GRID).len(), 8, "64 keys each");
        assert_eq!(items(&[1], GRID), [[0, 0, 1, 0, 1, 0, 1, 0]]);
        let long = items(&[131_072], GRID).len();
        assert!((40..=49).contains(&long), "{long}");
        assert_eq!(items(&[4096; 64], GRID).len(), 64, "sequences fill the blocks");
        // A long one among short ones is cut into parts of one length, and they are not.
        let mut ragged = vec![500; 30];
        ragged.push(20_000);
        let ragged = items(&ragged, GRID);
        assert_eq!(ragged.iter().filter(|item| item[0] < 30).count(), 30);
        let lens: Vec<u32> = ragged.iter().filter(|item| item[0] == 30).map(|item| item[4] - item[3]).collect();
        assert!(lens.len() > 20 && lens[..lens.len() - 1].iter().all(|len| *len == lens[0]), "{lens:?}");
    }

    #[test]
    fn nothing_is_cut_where_there_is_no_room_for_sums() {
        assert_eq!(items(&[5000; 600], GRID).iter().filter(|item| item[0] >= 512).count(), 88);
        assert_eq!(items(&[70_000, 3], DecodeGrid { most_parts: 2, ..GRID }).len(), 2);
        assert!(items(&[100_000; 300], DecodeGrid { groups: 1, ..GRID }).len() <= 512 + 600);
    }

    #[test]
    fn prompts_and_fillers_have_no_parts() {
        let items = decode_items(&[7, 9, 0, 4], &[0, 7, 8, 9, 10], GRID, 512);
        assert_eq!(items, [[1, 7, 9, 0, 9, 0, 1, 0], [3, 9, 4, 0, 4, 0, 1, 0]]);
    }
}

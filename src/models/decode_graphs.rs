//! Steps in which every sequence decodes one token: padded to a bucket of batch sizes, recorded once for each and then replayed with
//! one launch.

use std::collections::BTreeMap;

use crate::device::{BatchMeta, BatchSizes, Device, Recorded};
use crate::dtype::{DType, HostData};
use crate::error::Result;

use super::batch::{Batch, Limits};

/// Most sequences of a recorded step.
const MOST_SEQUENCES: usize = 512;

/// The recorded steps of a runner. Their sizes and addresses are those of `meta`, whatever the batch.
#[derive(Debug)]
pub(super) struct DecodeGraphs {
    pub(super) meta: BatchMeta,
    /// Most sequences that a step may have.
    most: usize,
    recorded: BTreeMap<usize, Recorded>,
}

impl DecodeGraphs {
    /// None recorded yet, for steps within `limits`; `None` where `device` records none.
    pub(super) fn new(device: &Device, limits: &Limits) -> Result<Option<DecodeGraphs>> {
        let most = limits.max_seqs.min(limits.max_batch_tokens).min(limits.max_logit_rows).min(MOST_SEQUENCES);
        if !device.has_graphs() || most == 0 {
            return Ok(None);
        }
        let sizes = BatchSizes { rows: most, sequences: most, logit_rows: 0, ..limits.batch_sizes() };
        let mut meta = BatchMeta::new(device, sizes)?;
        meta.logit_rows = device.upload_with(DType::U32, most, || HostData::U32((0..most as u32).collect()))?;
        Ok(Some(DecodeGraphs { meta, most, recorded: BTreeMap::new() }))
    }

    /// Bytes of the metadata.
    pub(super) fn bytes(&self) -> usize {
        self.meta.bytes()
    }

    /// Sequences of the step that runs `batch`; `None` where it is no step of one token for each sequence, its logits wanted.
    pub(super) fn bucket(&self, batch: &Batch) -> Option<usize> {
        let n = batch.context_lens.len();
        let all_decode = batch.token_ids.len() == n && batch.cu_seqlens_q.windows(2).all(|w| w[1] - w[0] == 1);
        let all_wanted = batch.logit_rows.iter().copied().eq(0..n as u32);
        (1..=self.most).contains(&n).then(|| bucket(n).min(self.most)).filter(|_| all_decode && all_wanted)
    }

    /// The recorded step of `bucket` sequences.
    pub(super) fn get(&self, bucket: usize) -> Option<&Recorded> {
        self.recorded.get(&bucket)
    }

    /// Keeps a recorded step.
    pub(super) fn insert(&mut self, bucket: usize, recorded: Recorded) {
        self.recorded.insert(bucket, recorded);
    }
}

/// Powers of two up to 8, then multiples of 8: tiles of linear layers have as many rows.
fn bucket(sequences: usize) -> usize {
    if sequences <= 8 { sequences.next_power_of_two() } else { sequences.next_multiple_of(8) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoding(n: u32) -> Batch {
        let mut batch = Batch::default();
        (0..n).for_each(|i| batch.push(&[i], 3, &[i], true));
        batch
    }

    #[test]
    fn buckets_hold_their_batches() {
        let graphs = |most: usize| DecodeGraphs {
            meta: BatchMeta::new(&Device::cpu(), BatchSizes { rows: 1, sequences: 1, blocks: 1, logit_rows: 1 })
                .expect("room"),
            most,
            recorded: BTreeMap::new(),
        };
        let of = |most: usize, n: u32| graphs(most).bucket(&decoding(n));
        assert_eq!([1, 2, 3, 5, 8, 9, 17].map(|n| of(512, n)), [1, 2, 4, 8, 8, 16, 24].map(Some));
        assert_eq!((of(12, 9), of(3, 3), of(12, 13), of(12, 0)), (Some(12), Some(3), None, None));
    }

    #[test]
    fn prompts_and_rows_without_logits_are_not_recorded() {
        let graphs = DecodeGraphs {
            meta: BatchMeta::new(&Device::cpu(), BatchSizes { rows: 1, sequences: 1, blocks: 1, logit_rows: 1 })
                .expect("room"),
            most: 8,
            recorded: BTreeMap::new(),
        };
        let mut batch = decoding(2);
        batch.push(&[1, 2], 0, &[5], true);
        assert_eq!(graphs.bucket(&batch), None);
        let mut batch = decoding(1);
        batch.push(&[1], 0, &[5], false);
        assert_eq!(graphs.bucket(&batch), None);
    }
}

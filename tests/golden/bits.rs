//! Logits of every checkpoint at hand as hashes: what a change that is to leave results alone is held against, bit by bit.
//!
//! `suite --ignored --nocapture bits::cpu` (or `bits::cuda`) before the change and after it prints the same lines.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use lowbit::checkpoint::Checkpoint;
use lowbit::device::Device;
use lowbit::dtype::DType;
use lowbit::models::{Batch, Limits, ModelRunner};

use crate::common::fixtures::all_golden_dirs;

fn hash(logits: &[f32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    logits.iter().for_each(|x| x.to_bits().hash(&mut hasher));
    hasher.finish()
}

/// Prompts of lengths that hurt, then steps of several sequences behind contexts of their own.
fn dump(dir: &Path, device: &Device, what: &str) {
    let limits = Limits { max_logit_rows: 300, ..Limits::new(320, 300, 64) };
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    let Ok(mut model) = ModelRunner::load(&checkpoint, device, limits, &mut |_, _| ()) else { return };
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let vocab = model.config().vocab_size;
    let ids = |n: usize, seed: usize| -> Vec<u32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729 + 11) % vocab) as u32).collect()
    };
    let mut hashes = Vec::new();
    for rows in [1, 2, 7, 16, 17, 33, 64, 65, 129, 200, 300] {
        let mut batch = Batch::default();
        let blocks: Vec<u32> = (0..20).collect();
        batch.push(&ids(rows, rows), 0, &blocks, false);
        batch.logit_rows = (0..rows as u32).collect();
        hashes.push(hash(&model.run(&batch).unwrap().read().unwrap()));
    }
    for seqs in [1, 3, 8, 24, 64] {
        let mut prompt = Batch::default();
        for s in 0..seqs {
            let blocks: Vec<u32> = (s as u32 * 20..s as u32 * 20 + 20).collect();
            prompt.push(&ids(4, s), 0, &blocks, true);
        }
        model.run(&prompt).unwrap();
        let mut batch = Batch::default();
        for s in 0..seqs {
            let blocks: Vec<u32> = (s as u32 * 20..s as u32 * 20 + 20).collect();
            batch.push(&ids(1, s + 5), 4, &blocks, true);
        }
        hashes.push(hash(&model.run(&batch).unwrap().read().unwrap()));
    }
    let text: Vec<String> = hashes.iter().map(|h| format!("{h:016x}")).collect();
    println!("BITS {what} {name} {}", text.join(" "));
}

#[test]
#[ignore = "prints, for a comparison by hand"]
fn cpu() {
    all_golden_dirs().iter().for_each(|dir| dump(dir, &Device::cpu(), "cpu"));
}

#[test]
#[ignore = "needs a CUDA device; prints, for a comparison by hand"]
fn cuda() {
    for dtype in [DType::F16, DType::BF16] {
        let device = Device::cuda(0, dtype).unwrap();
        all_golden_dirs().iter().for_each(|dir| dump(dir, &device, &format!("cuda {dtype}")));
    }
}

//! How fast this machine reads memory: the ceiling of decoding on the CPU.

use std::time::Instant;

use rayon::prelude::*;

/// Bytes read by a measurement: far more than any cache holds.
const BYTES: usize = 512 << 20;
const PASSES: usize = 4;

/// Bytes a second that the thread pool reads, best of some passes over a buffer of half a GiB.
pub(super) fn read_bytes_per_second() -> f64 {
    let threads = rayon::current_num_threads();
    let len = BYTES / size_of::<u64>();
    // Written by the threads that will read it, so that pages are where they are used.
    let data: Vec<u64> = (0..len).into_par_iter().map(|i| i as u64).collect();
    let pass = || {
        let start = Instant::now();
        let all = data.par_chunks(len.div_ceil(threads)).map(combine).reduce(|| 0, |a, b| a ^ b);
        std::hint::black_box(all);
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}

/// All elements combined in lanes side by side, which the compiler turns into vectors: the arithmetic must not be
/// what takes the time.
fn combine(data: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    let chunks = data.chunks_exact(lanes.len());
    let rest = chunks.remainder().iter().fold(0, |all, &x| all ^ x);
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane ^= x);
    }
    lanes.iter().fold(rest, |all, &x| all ^ x)
}

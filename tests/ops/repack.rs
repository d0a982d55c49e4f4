//! Weights that the GPU packs are those that the host packs, byte for byte, whatever the layout and however the file holds them.
//!
//! Layouts are those of the GPU at hand; with `LOWBIT_FORCE_SM=80` in the environment those of sm_80.

use std::sync::Arc;

use lowbit::device::cuda::CudaDevice;
use lowbit::device::{Activation, Device, Epilogue, Output};
use lowbit::dtype::DType;
use lowbit::quant::pack::Packing;
use lowbit::quant::{
    ActQuant, Codebook, Codes, Encoding, LinearWeight, QuantWeight, SharedBytes, Storage, Stored, Weight,
};

use crate::common::random::{Random, WeightCase};

const SWIGLU: Epilogue = Epilogue { activation: Activation::SwiGlu, output: Output::Floats };
const ACTIVATIONS: [ActQuant; 4] = [
    ActQuant::None,
    ActQuant::DynamicPerToken,
    ActQuant::StaticPerTensor { scale: 0.05, zero_point: -37 },
    ActQuant::LlmInt8 { threshold: 6.0 },
];

/// Ways in which `n` rows of `bits` may lie in a file.
fn storages(n: usize, bits: u8) -> Vec<Storage> {
    let mut all = vec![
        Storage::Columns,
        Storage::Rows(Packing::Dense),
        Storage::Bytes { offset: 128 },
        Storage::Rows(Packing::Aligned),
    ];
    all.extend((bits == 4).then_some(Storage::HighFirst));
    all.extend((bits == 4 && n.is_multiple_of(8)).then_some(Storage::Awq));
    all
}

/// The same weight with its codes as a file has them: in up to three parts, columns in the layer's own order.
fn as_stored(q: &QuantWeight, storage: impl Fn(usize) -> Storage) -> QuantWeight {
    let (k, bits) = (q.k, q.bits);
    let mut natural = vec![0; q.n * k];
    for (to, from) in natural.chunks_mut(k).zip(q.codes.chunks(k)) {
        let column = |c: usize| q.order.as_ref().map_or(c, |order| order[c] as usize);
        from.iter().enumerate().for_each(|(c, &code)| to[column(c)] = code);
    }
    let rows = (q.n / 3).next_multiple_of(8).max(8);
    let mut codes: Option<Codes> = None;
    for part in natural.chunks(rows * k) {
        let n = part.len() / k;
        let storage = storage(n);
        let bytes = storage.pack(part, n, k, bits);
        let end = bytes.len();
        let stored = Stored::new(SharedBytes::new(Arc::new(bytes), 0..end), n, k, bits, storage);
        match &mut codes {
            None => codes = Some(stored.into()),
            Some(codes) => codes.append(stored.into()),
        }
    }
    let mut codes = codes.expect("a weight has rows");
    if let Some(order) = &q.order {
        codes.gather_columns(order);
    }
    QuantWeight { codes, ..q.clone() }
}

fn assert_same(what: &str, device: &CudaDevice, weight: &LinearWeight, stored: LinearWeight, epilogue: Epilogue) {
    let on_host = device.clone().packing_on_host();
    let expected = Device::Cuda(on_host).pack_fused(weight.clone(), epilogue);
    let got = Device::Cuda(device.clone()).pack_fused(stored, epilogue);
    match (got, expected) {
        (Ok(got), Ok(expected)) => {
            assert_eq!(got.kernel(1), expected.kernel(1), "{what}");
            assert_eq!(got.bytes(), expected.bytes(), "{what}");
            let contents = |w| device.contents(w).expect("download");
            for (i, (got, expected)) in contents(&got).iter().zip(contents(&expected)).enumerate() {
                if *got != expected {
                    let (got, expected) = (got.to_f32(), expected.to_f32());
                    let differs = got.iter().zip(&expected).position(|(a, b)| a != b);
                    panic!("part {i} of {what}: {} for {} values, {differs:?} differs", got.len(), expected.len());
                }
            }
        }
        (Err(got), Err(expected)) => assert_eq!(got.to_string(), expected.to_string(), "{what}"),
        (got, expected) => panic!("{what}: {got:?}, on the host {expected:?}"),
    }
}

fn quantized(weight: &LinearWeight, q: QuantWeight) -> LinearWeight {
    LinearWeight { weight: Weight::Quant(q), ..weight.clone() }
}

/// Cases of one shape: bits and schemes in all combinations, storages in turns.
fn cases(device: &CudaDevice, n: usize, k: usize, group_sizes: &[usize]) {
    let mut turn = n + k;
    for bits in 2..=8 {
        for &group_size in group_sizes {
            for (activation, symmetric, act_order) in
                ACTIVATIONS.into_iter().flat_map(|a| [(a, true, false), (a, false, false), (a, bits % 2 == 0, true)])
            {
                let case = WeightCase {
                    n,
                    k,
                    bits,
                    group_size,
                    symmetric,
                    act_order,
                    bias: turn.is_multiple_of(3),
                    activation,
                };
                let weight = Random::new(turn as u64).weight(case);
                let Weight::Quant(q) = &weight.weight else { panic!("a quantized weight") };
                let what = format!("{case:?}, {} scales, turn {turn}", device.dtype());
                turn += 1;
                assert_same(&what, device, &weight, weight.clone(), Epilogue::NONE);
                let storage = |n: usize| storages(n, bits)[turn % storages(n, bits).len()];
                let stored = quantized(&weight, as_stored(q, storage));
                assert_same(&format!("stored {what}"), device, &weight, stored.clone(), Epilogue::NONE);
                if n.is_multiple_of(16) {
                    assert_same(&format!("gated {what}"), device, &weight, stored, SWIGLU);
                }
            }
        }
    }
}

fn devices() -> [CudaDevice; 2] {
    [DType::F16, DType::BF16].map(|dtype| CudaDevice::new(0, dtype).expect("a CUDA device"))
}

mod cuda {
    use super::*;

    #[test]
    #[ignore = "needs a CUDA device"]
    fn small_weights() {
        for device in devices() {
            for (n, k) in [(1, 1), (1, 48), (17, 33), (3, 16)] {
                cases(&device, n, k, &[16, 32, usize::MAX]);
            }
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn weights_of_tiles_and_past_them() {
        for device in devices() {
            for (n, k) in [(65, 136), (48, 640), (130, 400)] {
                cases(&device, n, k, &[32, 48, 64, 128, usize::MAX]);
            }
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn long_rows() {
        for device in devices() {
            cases(&device, 32, 7392, &[128, usize::MAX]);
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn tables_and_fractional_zero_points() {
        for device in devices() {
            for (n, k, group_size) in [(17, 64, 64), (40, 136, 32), (9, 37, 37)] {
                let case = WeightCase {
                    n,
                    k,
                    bits: 4,
                    group_size,
                    symmetric: true,
                    act_order: false,
                    bias: false,
                    activation: ActQuant::None,
                };
                let weight = Random::new(k as u64).weight(case);
                let Weight::Quant(q) = &weight.weight else { panic!("a quantized weight") };
                let table = QuantWeight {
                    encoding: Encoding::Codebook(Codebook::NF4),
                    zeros: vec![0.0; q.zeros.len()],
                    ..q.clone()
                };
                let real = QuantWeight { zeros: q.zeros.iter().map(|z| z - 0.5).collect(), ..q.clone() };
                for q in [table, real] {
                    let what = format!("{case:?}, {:?}", q.encoding);
                    let stored = quantized(&weight, as_stored(&q, |_| Storage::HighFirst));
                    assert_same(&what, &device, &quantized(&weight, q), stored, Epilogue::NONE);
                }
            }
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn fp8() {
        for device in devices() {
            for (n, k, group_size) in [(17, 64, 64), (48, 136, 32), (80, 640, 128), (130, 400, usize::MAX), (9, 37, 37)]
            {
                let case = WeightCase {
                    n,
                    k,
                    bits: 8,
                    group_size,
                    symmetric: true,
                    act_order: k == 136,
                    bias: false,
                    activation: ActQuant::None,
                };
                let weight = Random::new(k as u64).weight(case);
                let Weight::Quant(q) = &weight.weight else { panic!("a quantized weight") };
                let codes = q.codes.iter().map(|&code| code - u8::from(code & 0x7f == 0x7f)).collect();
                let q = QuantWeight { encoding: Encoding::E4m3, zeros: vec![0.0; q.zeros.len()], codes, ..q.clone() };
                let weight = quantized(&weight, q.clone());
                let stored = quantized(&weight, as_stored(&q, |_| Storage::Bytes { offset: 0 }));
                let what = format!("fp8 of {case:?}, {} scales", device.dtype());
                assert_same(&what, &device, &weight, stored.clone(), Epilogue::NONE);
                if n.is_multiple_of(16) {
                    assert_same(&format!("gated {what}"), &device, &weight, stored, SWIGLU);
                }
            }
        }
    }

    /// Copies that take both page-locked buffers more than once.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_large_weight() {
        let device = CudaDevice::new(0, DType::BF16).expect("a CUDA device");
        let case = WeightCase {
            n: 9000,
            k: 4096,
            bits: 8,
            group_size: 128,
            symmetric: true,
            act_order: false,
            bias: false,
            activation: ActQuant::None,
        };
        let weight = Random::new(7).weight(case);
        let Weight::Quant(q) = &weight.weight else { panic!("a quantized weight") };
        let stored = quantized(&weight, as_stored(q, |_| Storage::Columns));
        assert_same("a large weight", &device, &weight, stored, Epilogue::NONE);
    }
}

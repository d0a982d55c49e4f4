//! Layouts of packed weights, unpacked by the formulas of docs/formats.md.

use super::any::Any;
use super::family::{GemmFamily, Target};
use super::layout::e4m3::arrange_all;
use super::pack::pack_on_host;
use super::packed::Packed;
use super::w4a8::sm80::W4A8Sm80;
use super::w4a16::codes::Codes;
use super::w4a16::sm80::W4A16Sm80;
use super::w4a16::sm90::W4A16Sm90;
use super::w8a8::sm80::W8A8Sm80;
use super::w8a8::sm90::W8A8Sm90;
use crate::dtype::{DType, HostData};
use crate::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Weight};

/// Code of row `r`, column `c` in fragment order, by the formulas of docs/formats.md.
fn unpack(bytes: &[u8], bits: usize, int8: bool, k: usize, r: usize, c: usize) -> u8 {
    let (g, t, half) = (r % 8, c % 32 / 8, r % 16 / 8);
    let lane = 4 * g + t;
    if bits == 8 {
        let tile = r / 16 * (k.div_ceil(64) * 2) + c / 32;
        return bytes[tile * 512 + lane * 16 + half * 8 + c % 8];
    }
    let tile = r / 16 * k.div_ceil(64) + c / 64;
    let word = c % 64 / 32 * 2 + c % 8 / 4;
    let i = c % 4;
    let nibble = if int8 { half + 2 * i } else { half + i / 2 * 2 + i % 2 * 4 };
    bytes[tile * 512 + lane * 16 + word * 4 + nibble / 2] >> (nibble % 2 * 4) & 15
}

fn weight(n: usize, k: usize, bits: u8, group_size: usize, zero: impl Fn(usize) -> f32) -> QuantWeight {
    let groups = k.div_ceil(group_size);
    // A multiplicative hash: neighbours differ, and no period fits a tile.
    let code = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> (32 - bits)) as u8;
    QuantWeight {
        n,
        k,
        bits,
        group_size,
        codes: (0..n * k).map(code).collect(),
        scales: (0..n * groups).map(|i| 0.5 + i as f32).collect(),
        zeros: (0..n * groups).map(zero).collect(),
        order: None,
        encoding: Encoding::Affine,
    }
}

fn symmetric(n: usize, k: usize, bits: u8, group_size: usize) -> QuantWeight {
    weight(n, k, bits, group_size, |_| f32::from(1u16 << (bits - 1)))
}

fn linear(q: &QuantWeight, activation: ActQuant) -> LinearWeight {
    LinearWeight { weight: Weight::Quant(q.clone()), bias: None, activation }
}

/// `q` in the layout of `F`; `None` where that family does not accept it.
fn host_packed<F: GemmFamily>(q: &QuantWeight, activation: ActQuant, sm90: bool) -> Option<(F, Packed<HostData>)> {
    let family = F::accept(&linear(q, activation), Target { sm90, dtype: DType::F16 })?;
    Some((family, pack_on_host(q, &family.recipe(q, DType::F16))))
}

fn u8s(data: &HostData) -> &[u8] {
    match data {
        HostData::U8(bytes) => bytes,
        other => panic!("{} weights", other.dtype()),
    }
}

const DYNAMIC: ActQuant = ActQuant::DynamicPerToken;
const LLM_INT8: ActQuant = ActQuant::LlmInt8 { threshold: 6.0 };

#[test]
fn fragments_hold_every_code_where_the_documentation_says() {
    for (n, k) in [(1, 16), (16, 64), (17, 80), (40, 208)] {
        for bits in 2..=8u8 {
            for activation in [ActQuant::None, DYNAMIC] {
                let q = symmetric(n, k, bits, 32.min(k));
                let container = if bits <= 4 { 4 } else { 8 };
                let int8 = activation != ActQuant::None;
                if int8 && bits > 4 && q.groups() == 1 {
                    assert!(host_packed::<W8A8Sm80>(&q, activation, false).is_some(), "{n} {k} {bits}");
                    assert!(host_packed::<W4A8Sm80>(&q, activation, false).is_none(), "{n} {k} {bits}");
                    continue;
                }
                let host = if int8 {
                    let (family, host) = host_packed::<W4A8Sm80>(&q, activation, false).expect("accepted");
                    assert_eq!(family.bits, container, "{n} {k} {bits}");
                    host
                } else {
                    let (family, host) = host_packed::<W4A16Sm80>(&q, activation, false).expect("accepted");
                    assert_eq!(
                        family.codes,
                        if container == 4 { Codes::Uint4 } else { Codes::Uint8 },
                        "{n} {k} {bits}"
                    );
                    host
                };
                let bytes = u8s(&host.codes);
                assert_eq!(bytes.len(), n.next_multiple_of(16) * k.next_multiple_of(64) * container / 8);
                for r in 0..n {
                    for c in 0..k {
                        let code = q.codes[r * k + c];
                        let stored = if int8 && bits > 4 { code.wrapping_sub(1 << (bits - 1)) } else { code };
                        assert_eq!(unpack(bytes, container, int8, k, r, c), stored, "{n} {k} {bits} at {r}, {c}");
                    }
                }
            }
        }
    }
}

/// FP8 codes lie where those of 8 bits do, arranged within each word.
#[test]
fn fp8_lies_as_eight_bits_do() {
    for (n, k, group_size) in [(1, 16, 16), (17, 80, 32), (70, 272, 128)] {
        let bytes = symmetric(n, k, 8, group_size);
        let zeros = vec![0.0; bytes.zeros.len()];
        let scales = vec![0.5; bytes.scales.len()];
        let bytes = QuantWeight { zeros, scales, ..bytes };
        let fp8 = QuantWeight { encoding: Encoding::E4m3, ..bytes.clone() };
        let arranged = |bytes: &HostData| arrange_all(u8s(bytes).to_vec(), DType::F16);
        let (_, plain) = host_packed::<W4A16Sm80>(&bytes, ActQuant::None, false).expect("accepted");
        let (_, packed) = host_packed::<W4A16Sm80>(&fp8, ActQuant::None, false).expect("accepted");
        assert_eq!(u8s(&packed.codes), arranged(&plain.codes), "fragments of {n} x {k}");
        assert_eq!(packed.scales, plain.scales);
        let (family, plain) = host_packed::<W4A16Sm90>(&bytes, ActQuant::None, true).expect("accepted");
        let (_, packed) = host_packed::<W4A16Sm90>(&fp8, ActQuant::None, true).expect("accepted");
        let blocks = |data: &HostData| u8s(data).chunks(family.shape.bytes()).map(<[u8]>::to_vec).collect::<Vec<_>>();
        for (packed, plain) in blocks(&packed.codes).iter().zip(blocks(&plain.codes)) {
            let (codes, scales) = plain.split_at(64 * 128);
            assert_eq!(packed[..], [arrange_all(codes.to_vec(), DType::F16), scales.to_vec()].concat(), "{n} x {k}");
        }
    }
}

/// The worked tile of docs/formats.md.
#[test]
fn worked_tile() {
    let mut q = symmetric(16, 16, 4, 16);
    q.codes = (0..256).map(|i| ((i / 16 + i % 16) % 16) as u8).collect();
    let (_, floats) = host_packed::<W4A16Sm80>(&q, ActQuant::None, false).expect("accepted");
    // Lane 0 holds rows 0 and 8, columns 0 to 7; lane 5 rows 1 and 9, columns 8 to 15.
    assert_eq!(u8s(&floats.codes)[..8], [0x80, 0xa2, 0x91, 0xb3, 0xc4, 0xe6, 0xd5, 0xf7]);
    assert_eq!(u8s(&floats.codes)[80..88], [0x19, 0x3b, 0x2a, 0x4c, 0x5d, 0x7f, 0x6e, 0x80]);
    let (_, int8) = host_packed::<W4A8Sm80>(&q, DYNAMIC, false).expect("accepted");
    assert_eq!(u8s(&int8.codes)[..8], [0x80, 0x91, 0xa2, 0xb3, 0xc4, 0xd5, 0xe6, 0xf7]);
}

#[test]
fn rows_are_codes_minus_zero_points() {
    let q = symmetric(3, 48, 8, 48);
    let activation = ActQuant::StaticPerTensor { scale: 1.0, zero_point: 3 };
    let (_, host) = host_packed::<W8A8Sm80>(&q, activation, false).expect("accepted");
    let expected: Vec<i8> = q.codes.iter().map(|&code| (i32::from(code) - 128) as i8).collect();
    assert_eq!(host.codes, HostData::I8(expected.clone()));
    let sums: Vec<i32> = expected.chunks(48).map(|row| row.iter().map(|&x| i32::from(x)).sum()).collect();
    assert_eq!(host.sums, Some(HostData::I32(sums)));
}

#[test]
fn scales_and_zeros_lie_by_group() {
    let q = weight(17, 64, 4, 32, |i| (i % 17) as f32);
    let (_, host) = host_packed::<W4A16Sm80>(&q, ActQuant::None, false).expect("accepted");
    let scales = host.scales.expect("scales").to_f32();
    assert_eq!(scales.len(), 2 * 32);
    assert_eq!((scales[0], scales[1], scales[16], scales[17]), (0.5, 2.5, 32.5, 0.0));
    assert_eq!((scales[32], scales[33]), (1.5, 3.5));
    let zeros = host.zero_points.expect("zero points");
    assert_eq!(u8s(&zeros)[..4], [0, 0, 2, 0]);
    assert_eq!(u8s(&zeros)[64..68], [1, 0, 3, 0]);
}

#[test]
fn what_the_fast_kernels_cannot_hold_stays_canonical() {
    let canonical = |q: &QuantWeight, activation: ActQuant| {
        let weight = linear(q, activation);
        let target = Target { sm90: false, dtype: DType::F16 };
        assert_eq!(Any::of(&weight), if activation == ActQuant::None { Any::Quant } else { Any::Int8 });
        W4A16Sm80::accept(&weight, target).is_none()
            && W4A8Sm80::accept(&weight, target).is_none()
            && W8A8Sm80::accept(&weight, target).is_none()
    };
    // Rows that do not start on 16 bytes, groups that are no multiple of 32, fractional zero points.
    assert!(canonical(&symmetric(4, 36, 4, 36), ActQuant::None));
    assert!(canonical(&symmetric(4, 40, 8, 40), DYNAMIC));
    assert!(canonical(&symmetric(4, 96, 4, 48), ActQuant::None));
    assert!(canonical(&symmetric(4, 96, 4, 16), DYNAMIC));
    assert!(canonical(&weight(4, 64, 4, 32, |_| 7.5), ActQuant::None));
    // Codes of 8 bits about a zero point far from the middle.
    assert!(canonical(&weight(4, 64, 8, 64, |_| 3.0), DYNAMIC));
    assert!(!canonical(&weight(4, 64, 8, 64, |_| 256.0), ActQuant::None));
}

/// Every code of blocks for sm_90 is where docs/formats.md says, and padding is zero.
#[test]
fn blocks_hold_every_code_where_the_documentation_says() {
    let int8 = [(1, 16, 128), (64, 128, 128), (65, 144, 128), (130, 272, 128), (3, 48, 256_i16)]
        .map(|(n, k, zero)| (n, k, 8, zero, DYNAMIC));
    let llm_int8 = [(8, 128), (4, 8), (2, 1)].map(|(bits, zero)| (65, 144, bits, zero, LLM_INT8));
    for (n, k, bits, zero, activation) in int8.into_iter().chain(llm_int8) {
        let mut q = weight(n, k, bits, k, |_| f32::from(zero));
        if zero == 256 {
            q.codes.iter_mut().for_each(|code| *code |= 128); // what is left of it is an int8
        }
        let (_, host) = host_packed::<W8A8Sm90>(&q, activation, true).expect("accepted");
        let HostData::I8(bytes) = &host.codes else { panic!("{} weights", host.codes.dtype()) };
        let slices = k.div_ceil(128);
        assert_eq!(bytes.len(), n.div_ceil(64) * slices * 8192);
        let mut seen = 0;
        for r in 0..n {
            for c in 0..k {
                let place = (r / 64 * slices + c / 128) * 8192 + r % 64 * 128 + ((c / 16 % 8) ^ (r % 8)) * 16 + c % 16;
                let code = i16::from(q.codes[r * k + c]) - zero;
                assert_eq!(i16::from(bytes[place]), code, "row {r}, column {c} of {n} x {k}");
                seen += usize::from(code != 0);
            }
        }
        assert_eq!(bytes.iter().filter(|&&b| b != 0).count(), seen, "padding of {n} x {k}");
        assert_eq!(host.scales.map(|s| s.len()), Some(n.next_multiple_of(256)));
    }
}

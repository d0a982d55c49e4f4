//! Seeded inputs. The seed is part of each case, so a failure repeats.

use lowbit::quant::{ActQuant, Encoding, LinearWeight, QuantWeight, Weight};

/// SplitMix64 (Steele, Lea and Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / 16_777_216.0
    }

    /// Normal values of deviation 1, one in 64 of them 20 times larger: activations have outliers.
    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        let mut normal = || {
            let (u, v) = (1.0 - self.uniform(), self.uniform());
            let outlier = if self.below(64) == 0 { 20.0 } else { 1.0 };
            outlier * (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
        };
        (0..len).map(|_| normal()).collect()
    }

    /// A permutation of `0..len`.
    pub fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }

    /// A quantized weight with everything that hurts: every code point, zero points at both ends, groups of zeros
    /// (every code equals the zero point), scales over four powers of ten.
    pub fn weight(&mut self, case: WeightCase) -> LinearWeight {
        let WeightCase { n, k, bits, group_size, symmetric, act_order, bias, activation } = case;
        let group_size = group_size.min(k);
        let groups = k.div_ceil(group_size);
        let levels = 1usize << bits;
        let scales = (0..n * groups).map(|_| half::f16::from_f32(10f32.powf(-4.0 * self.uniform())).to_f32()).collect();
        let zero = |random: &mut Random| match random.below(4) {
            0 => 0.0,
            1 => (levels - 1) as f32,
            _ => random.below(levels) as f32,
        };
        let zeros: Vec<f32> =
            (0..n * groups).map(|_| if symmetric { (levels / 2) as f32 } else { zero(self) }).collect();
        let codes = (0..n * k)
            .map(|i| {
                let group = i / k * groups + i % k / group_size;
                let all_zero = group % 7 == 3;
                if all_zero { zeros[group] as u8 } else { self.below(levels) as u8 }
            })
            .collect();
        let order = act_order.then(|| self.permutation(k));
        let bias = bias.then(|| self.normals(n));
        let weight = QuantWeight { n, k, bits, group_size, codes, scales, zeros, order, encoding: Encoding::Affine };
        LinearWeight { weight: Weight::Quant(weight), bias, activation }
    }
}

/// What [`Random::weight`] makes.
#[derive(Debug, Clone, Copy)]
pub struct WeightCase {
    pub n: usize,
    pub k: usize,
    pub bits: u8,
    /// `usize::MAX` is per channel.
    pub group_size: usize,
    pub symmetric: bool,
    pub act_order: bool,
    pub bias: bool,
    pub activation: ActQuant,
}

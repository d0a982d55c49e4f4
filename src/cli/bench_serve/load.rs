//! What is asked of the server: when, how long the prompts are, what they say. The same for the same seed.

use crate::engine::sampling::random;
use crate::error::{Error, Result};

/// Largest prompt or answer, and prefixes and prompts in number: bounds of what a flag may ask for.
const MAX: usize = 1 << 24;

/// Streams of random numbers, so that none depends on how many another has taken.
const ARRIVALS: u64 = 1;
const INPUT_LENS: u64 = 2;
const OUTPUT_LENS: u64 = 3;
const PREFIXES: u64 = 4;
const PROMPTS: u64 = 5;

/// Common words, most of them one token in any vocabulary.
const WORDS: [&str; 64] = [
    "time",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
];

/// The requests of a run. Prompts are made when they are asked for.
#[derive(Debug, Clone)]
pub(super) struct Load {
    pub(super) seed: u64,
    pub(super) num_prompts: usize,
    /// Tokens of a prompt behind its prefix: around this many, by `range_ratio`.
    pub(super) input_len: usize,
    pub(super) output_len: usize,
    /// Lengths are drawn evenly from `len * (1 - ratio)` to `len * (1 + ratio)`.
    pub(super) range_ratio: f64,
    /// Tokens that prompts have in common.
    pub(super) prefix_len: usize,
    /// Prefixes that take turns.
    pub(super) num_prefixes: usize,
    /// Ids are below this.
    pub(super) vocab_size: usize,
}

impl Load {
    /// # Errors
    /// [`Error::Input`] that names the flag out of its range.
    pub(super) fn check(&self) -> Result<()> {
        for (flag, value, least) in [
            ("--num-prompts", self.num_prompts, 1),
            ("--random-input-len", self.input_len, 0),
            ("--random-output-len", self.output_len, 1),
            ("--random-prefix-len", self.prefix_len, 0),
            ("--num-prefixes", self.num_prefixes, 1),
            ("--random-vocab-size", self.vocab_size, 2),
        ] {
            if !(least..=MAX).contains(&value) {
                return Err(Error::input(flag, format!("{value}: expected {least} to {MAX}")));
            }
        }
        if !(0.0..1.0).contains(&self.range_ratio) {
            return Err(Error::input("--random-range-ratio", format!("{}: expected 0 to below 1", self.range_ratio)));
        }
        if self.prefix_len + self.bounds(self.input_len, 0).0 == 0 {
            let reason =
                "a prompt may come to no tokens: raise it, or --random-prefix-len, or lower --random-range-ratio";
            return Err(Error::input("--random-input-len", reason));
        }
        Ok(())
    }

    /// Tokens of prompt `i`, its prefix included.
    pub(super) fn input_len(&self, i: usize) -> usize {
        self.prefix_len + self.length(INPUT_LENS, self.bounds(self.input_len, 0), i)
    }

    /// Tokens to generate for prompt `i`.
    pub(super) fn output_len(&self, i: usize) -> usize {
        self.length(OUTPUT_LENS, self.bounds(self.output_len, 1), i)
    }

    /// Prompt `i` as token ids. The lowest eighth of the vocabulary is left out: bytes and special tokens are there.
    pub(super) fn ids(&self, i: usize) -> Vec<u32> {
        let low = self.vocab_size / 8;
        self.draw(i, self.vocab_size - low).map(|x| (low + x) as u32).collect()
    }

    /// Prompt `i` as words.
    pub(super) fn words(&self, i: usize) -> String {
        self.draw(i, WORDS.len()).map(|x| WORDS[x]).collect::<Vec<_>>().join(" ")
    }

    /// Numbers below `below`: those of the prefix, then the prompt's own.
    fn draw(&self, i: usize, below: usize) -> impl Iterator<Item = usize> {
        let prefix = self.stream(PREFIXES, i % self.num_prefixes);
        let own = self.stream(PROMPTS, i);
        let number = move |stream: u64, at: usize| (random(stream, at as u64) % below as u64) as usize;
        let own_len = self.input_len(i) - self.prefix_len;
        (0..self.prefix_len).map(move |at| number(prefix, at)).chain((0..own_len).map(move |at| number(own, at)))
    }

    fn stream(&self, kind: u64, i: usize) -> u64 {
        random(random(self.seed, kind), i as u64)
    }

    fn bounds(&self, len: usize, least: usize) -> (usize, usize) {
        let low = (len as f64 * (1.0 - self.range_ratio)).floor() as usize;
        let high = (len as f64 * (1.0 + self.range_ratio)).ceil() as usize;
        (low.max(least), high.max(least))
    }

    fn length(&self, kind: u64, (low, high): (usize, usize), i: usize) -> usize {
        low + (self.stream(kind, i) % (high - low + 1) as u64) as usize
    }

    /// When requests are sent, in seconds from the start: intervals of a gamma distribution of shape `burstiness` (1: a
    /// Poisson process), scaled so that the last is sent after `num_prompts / rate` seconds. All at once for an infinite rate.
    pub(super) fn arrivals(&self, rate: f64, burstiness: f64) -> Vec<f64> {
        if rate.is_infinite() {
            return vec![0.0; self.num_prompts];
        }
        let mut numbers = Numbers { stream: random(self.seed, ARRIVALS), taken: 0 };
        let mut at = 0.0;
        let mut arrivals: Vec<f64> = (0..self.num_prompts)
            .map(|_| {
                at += if burstiness.is_infinite() { 1.0 } else { numbers.gamma(burstiness) };
                at
            })
            .collect();
        let scale = self.num_prompts as f64 / rate / at.max(f64::MIN_POSITIVE);
        arrivals.iter_mut().for_each(|at| *at *= scale);
        arrivals
    }
}

/// Random numbers in a row.
struct Numbers {
    stream: u64,
    taken: u64,
}

impl Numbers {
    /// Evenly in (0, 1).
    fn uniform(&mut self) -> f64 {
        self.taken += 1;
        ((random(self.stream, self.taken) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Of the normal distribution (Box and Muller 1958).
    fn normal(&mut self) -> f64 {
        let (radius, angle) = (self.uniform(), self.uniform());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }

    /// Of the gamma distribution of this shape and scale 1 (Marsaglia and Tsang, "A simple method for generating gamma variables",
    /// 2000; below shape 1 by their note on shape + 1).
    fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            return self.gamma(shape + 1.0) * self.uniform().powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        Load {
            seed: 7,
            num_prompts: 20_000,
            input_len: 100,
            output_len: 10,
            range_ratio: 0.25,
            prefix_len: 8,
            num_prefixes: 2,
            vocab_size: 4000,
        }
    }

    #[test]
    fn lengths_fill_their_range() {
        let load = load();
        let inputs: Vec<usize> = (0..2000).map(|i| load.input_len(i) - 8).collect();
        assert_eq!((inputs.iter().min(), inputs.iter().max()), (Some(&75), Some(&125)));
        let outputs: Vec<usize> = (0..2000).map(|i| load.output_len(i)).collect();
        // 10 * 0.75 and 10 * 1.25, rounded outwards.
        assert_eq!((outputs.iter().min(), outputs.iter().max()), (Some(&7), Some(&13)));
        let exact = Load { range_ratio: 0.0, ..load };
        assert!((0..100).all(|i| exact.input_len(i) == 108 && exact.output_len(i) == 10));
    }

    #[test]
    fn prompts_share_their_prefix_alone() {
        let load = load();
        for i in 0..50 {
            assert_eq!(load.ids(i).len(), load.input_len(i));
            assert!(load.ids(i).iter().all(|id| (500..4000).contains(id)));
            assert_eq!(load.words(i).split(' ').count(), load.input_len(i));
        }
        assert_eq!(load.ids(0)[..8], load.ids(2)[..8], "every other prompt has the same prefix");
        assert_ne!(load.ids(0)[..8], load.ids(1)[..8]);
        assert_ne!(load.ids(0)[8..16], load.ids(2)[8..16]);
        assert_eq!(load.ids(3), load.ids(3));
        assert_ne!(load.ids(3), Load { seed: 8, ..load.clone() }.ids(3));
    }

    #[test]
    fn arrivals_keep_their_rate() {
        let load = load();
        for burstiness in [0.3, 1.0, 4.0, f64::INFINITY] {
            let arrivals = load.arrivals(50.0, burstiness);
            assert!((arrivals[19_999] - 400.0).abs() < 1e-6, "20000 requests at 50 a second");
            assert!(arrivals.is_sorted());
            let gaps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            // A gamma distribution's variance over its squared mean is one over its shape.
            let expected = 1.0 / burstiness;
            assert!((variance / mean.powi(2) - expected).abs() < 0.1 * expected + 1e-9, "{burstiness}: {variance}");
        }
        assert!(load.arrivals(f64::INFINITY, 1.0).iter().all(|&at| at == 0.0));
    }

    #[test]
    fn gammas_have_their_mean() {
        for shape in [0.2, 0.9, 1.0, 2.5, 100.0] {
            let mut numbers = Numbers { stream: 3, taken: 0 };
            let n = 40_000;
            let mean = (0..n).map(|_| numbers.gamma(shape)).sum::<f64>() / f64::from(n);
            // The mean of n draws has the standard deviation sqrt(shape / n).
            assert!((mean - shape).abs() < 5.0 * (shape / f64::from(n)).sqrt(), "{shape}: {mean}");
        }
    }

    #[test]
    fn absurd_loads_are_refused() {
        let refused = |load: Load| load.check().expect_err("refused").to_string();
        assert!(load().check().is_ok());
        assert!(refused(Load { num_prompts: 0, ..load() }).starts_with("--num-prompts: 0"));
        assert!(refused(Load { output_len: 0, ..load() }).starts_with("--random-output-len"));
        assert!(refused(Load { range_ratio: 1.0, ..load() }).starts_with("--random-range-ratio"));
        assert!(refused(Load { range_ratio: f64::NAN, ..load() }).starts_with("--random-range-ratio"));
        assert!(refused(Load { input_len: 0, prefix_len: 0, ..load() }).starts_with("--random-input-len"));
        assert!(refused(Load { vocab_size: usize::MAX, ..load() }).starts_with("--random-vocab-size"));
    }
}

//! Codes in 32-bit words: the two bit packings and the nibble order that checkpoint formats use.

/// How codes of 2 to 8 bits lie in little-endian 32-bit words, lowest bits first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// A bit stream: code `i` is bits `i*b .. (i+1)*b`, and may cross into the next word. Takes `ceil(len*b / 32)` words.
    Dense,
    /// `floor(32/b)` codes in each word, the high bits left over unused. The same as `Dense` where `b` divides 32.
    Aligned,
}

/// Order in which AWQ's gemm layout stores eight columns: nibble `i` of a word is column `AWQ_ORDER[i]`.
pub const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

impl Packing {
    /// Words that `len` codes of `bits` take.
    pub fn words(self, len: usize, bits: u8) -> usize {
        match self {
            Packing::Dense => (len * usize::from(bits)).div_ceil(32),
            Packing::Aligned => len.div_ceil(32 / usize::from(bits)),
        }
    }

    /// Fills `codes` from `words`.
    ///
    /// # Panics
    /// If `words` is shorter than [`Packing::words`] says, or `bits` is not 1 to 8: bugs of the caller.
    pub fn unpack(self, words: &[u32], bits: u8, codes: &mut [u8]) {
        assert!((1..=8).contains(&bits) && words.len() >= self.words(codes.len(), bits), "Packing::unpack: bad sizes");
        let mask = (1u32 << bits) - 1;
        if self == Packing::Aligned || 32 % bits == 0 {
            for (chunk, &word) in codes.chunks_mut(32 / usize::from(bits)).zip(words) {
                for (i, code) in chunk.iter_mut().enumerate() {
                    *code = (word >> (i as u32 * u32::from(bits)) & mask) as u8;
                }
            }
            return;
        }
        let mut words = words.iter();
        let (mut buffer, mut held) = (0u64, 0u32);
        for code in codes {
            if held < u32::from(bits) {
                buffer |= u64::from(*words.next().expect("length checked above")) << held;
                held += 32;
            }
            *code = (buffer as u32 & mask) as u8;
            buffer >>= bits;
            held -= u32::from(bits);
        }
    }

    /// The inverse of [`Packing::unpack`]; bits left over are zero.
    ///
    /// # Panics
    /// If a code does not fit `bits`: a bug of the caller.
    pub fn pack(self, codes: &[u8], bits: u8) -> Vec<u32> {
        let mut words = vec![0u32; self.words(codes.len(), bits)];
        let per_word = 32 / usize::from(bits);
        for (i, &code) in codes.iter().enumerate() {
            assert!(u32::from(code) >> bits == 0, "Packing::pack: code {code} does not fit {bits} bits");
            let (word, shift) = match self {
                Packing::Dense => (i * usize::from(bits) / 32, i * usize::from(bits) % 32),
                Packing::Aligned => (i / per_word, i % per_word * usize::from(bits)),
            };
            words[word] |= u32::from(code) << shift;
            if shift + usize::from(bits) > 32 {
                words[word + 1] |= u32::from(code) >> (32 - shift);
            }
        }
        words
    }
}

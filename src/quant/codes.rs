//! The codes of a weight: one to a byte, or still as a file packs them.
//!
//! Loading a model onto a GPU never looks at a code on the host: the file's bytes go up as they are and are put in the
//! kernels' order there. Whoever reads [`Codes`] as a slice has them unpacked first, once.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use super::pack::{AWQ_ORDER, Packing};

/// Bytes that several may hold on to: a part of a mapped file, or of a vector.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBytes {
    /// `range` of what `owner` holds.
    ///
    /// # Panics
    /// If there is no such range: a bug of the caller.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> SharedBytes {
        assert!(owner.as_ref().as_ref().get(range.clone()).is_some(), "SharedBytes::new: {range:?} is outside");
        SharedBytes { owner, range }
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_ref().as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.range.len())
    }
}

/// How codes `[n, k]` of some bits lie in a file's bytes; words are little-endian, of 32 bits. docs/formats.md has them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// `[n, k]` bytes, each a code from which `offset` has been taken (modulo 256).
    Bytes {
        /// 0 for unsigned codes, 128 for signed ones of 8 bits.
        offset: u8,
    },
    /// `[n, words]`: each row packed by itself (compressed-tensors, AWQ's gemv).
    Rows(Packing),
    /// `[words, n]`: a bit stream down each column (GPTQ).
    Columns,
    /// `[k, n / 8]` words of 4 bits, eight rows in each in [`AWQ_ORDER`] (AWQ's gemm).
    Awq,
    /// 4 bits, two codes to a byte, the first in the high half, rows one after the other (bitsandbytes).
    HighFirst,
}

impl Storage {
    /// Bytes that `[n, k]` codes of `bits` take.
    pub fn bytes(self, n: usize, k: usize, bits: u8) -> usize {
        match self {
            Storage::Bytes { .. } => n * k,
            Storage::Rows(packing) => 4 * n * packing.words(k, bits),
            Storage::Columns => 4 * n * Packing::Dense.words(k, bits),
            Storage::Awq => 4 * k * n.div_ceil(8),
            Storage::HighFirst => (n * k).div_ceil(2),
        }
    }

    /// The codes `[n, k]` that `bytes` hold.
    ///
    /// # Panics
    /// If there are fewer bytes than [`Storage::bytes`] says, or `n` is no multiple of 8 for [`Storage::Awq`]: bugs of the
    /// caller.
    pub fn unpack(self, bytes: &[u8], n: usize, k: usize, bits: u8) -> Vec<u8> {
        let mut codes = vec![0u8; n * k];
        if codes.is_empty() {
            return codes;
        }
        let bytes = &bytes[..self.bytes(n, k, bits)];
        let words = bytes.as_chunks::<4>().0;
        match self {
            Storage::Bytes { offset } => {
                codes.par_iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte.wrapping_add(offset));
            }
            Storage::Rows(packing) => {
                let rows = codes.par_chunks_mut(k).zip(words.par_chunks(packing.words(k, bits)));
                rows.for_each(|(row, words)| {
                    let words: Vec<u32> = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
                    packing.unpack(&words, bits, row);
                });
            }
            Storage::Columns => unpack_columns(words, n, k, bits, &mut codes),
            Storage::Awq => codes.par_chunks_mut(8 * k).enumerate().for_each(|(block, out)| {
                for c in 0..k {
                    let word = u32::from_le_bytes(words[c * (n / 8) + block]);
                    for (i, row) in AWQ_ORDER.iter().enumerate() {
                        out[row * k + c] = (word >> (4 * i) & 15) as u8;
                    }
                }
            }),
            Storage::HighFirst => codes.par_chunks_mut(2).zip(bytes).for_each(|(pair, byte)| {
                pair.iter_mut().zip([byte >> 4, byte & 15]).for_each(|(code, nibble)| *code = nibble);
            }),
        }
        codes
    }

    /// The inverse of [`Storage::unpack`]; bits left over are zero.
    ///
    /// # Panics
    /// If a code does not fit `bits`, or `n` is no multiple of 8 for [`Storage::Awq`]: bugs of the caller.
    pub fn pack(self, codes: &[u8], n: usize, k: usize, bits: u8) -> Vec<u8> {
        let words = |words: Vec<u32>| words.into_iter().flat_map(u32::to_le_bytes).collect();
        match self {
            Storage::Bytes { offset } => codes.iter().map(|code| code.wrapping_sub(offset)).collect(),
            Storage::Rows(packing) => words(codes.chunks(k).flat_map(|row| packing.pack(row, bits)).collect()),
            Storage::Columns => {
                let columns: Vec<Vec<u32>> = codes.chunks(k).map(|row| Packing::Dense.pack(row, bits)).collect();
                let height = Packing::Dense.words(k, bits);
                words((0..height).flat_map(|w| columns.iter().map(move |column| column[w])).collect())
            }
            Storage::Awq => {
                let code = |block: usize, i: usize, c: usize| u32::from(codes[(block * 8 + AWQ_ORDER[i]) * k + c]);
                let word = |c, block| (0..8).map(|i| code(block, i, c) << (4 * i)).sum();
                words((0..k).flat_map(|c| (0..n / 8).map(move |block| word(c, block))).collect())
            }
            Storage::HighFirst => codes.chunks(2).map(|c| c[0] << 4 | c.get(1).copied().unwrap_or(0)).collect(),
        }
    }
}

/// `[n, k]` codes of words that are packed down the rows of a `[words, n]` matrix.
fn unpack_columns(words: &[[u8; 4]], n: usize, k: usize, bits: u8, codes: &mut [u8]) {
    /// Columns gathered at once: a cache line of words.
    const BLOCK: usize = 16;
    let height = Packing::Dense.words(k, bits);
    codes.par_chunks_mut(BLOCK * k).enumerate().for_each(|(block, out)| {
        let first = block * BLOCK;
        let width = out.len() / k;
        let mut columns = vec![0u32; width * height];
        for (w, row) in words.chunks_exact(n).enumerate() {
            for (c, &word) in row[first..first + width].iter().enumerate() {
                columns[c * height + w] = u32::from_le_bytes(word);
            }
        }
        for (column, out) in columns.chunks_exact(height).zip(out.chunks_exact_mut(k)) {
            Packing::Dense.unpack(column, bits, out);
        }
    });
}

/// Codes of some rows as a file holds them.
#[derive(Debug, Clone)]
pub struct Stored {
    bytes: SharedBytes,
    n: usize,
    k: usize,
    bits: u8,
    storage: Storage,
}

impl Stored {
    /// Codes `[n, k]` of `bits` that lie as `storage` says.
    ///
    /// # Panics
    /// If there are too few bytes, or rows that `storage` cannot hold: bugs of the caller.
    pub fn new(bytes: SharedBytes, n: usize, k: usize, bits: u8, storage: Storage) -> Stored {
        let fits = bytes.len() >= storage.bytes(n, k, bits) && (storage != Storage::Awq || n.is_multiple_of(8));
        assert!(fits && (1..=8).contains(&bits), "Stored::new: {bytes:?} for [{n}, {k}] codes of {bits} bits");
        Stored { bytes, n, k, bits, storage }
    }
}

/// Some rows of codes, for who wants them as they lie.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(lowbit_cuda), allow(dead_code))] // only a GPU takes them so
pub(crate) struct Part<'a> {
    pub(crate) bytes: &'a [u8],
    /// Rows.
    pub(crate) n: usize,
    pub(crate) storage: Storage,
}

/// `[n, k]` codes of a weight; as a slice, one to a byte.
#[derive(Clone, Default)]
pub struct Codes {
    len: usize,
    /// Rows one part after the other; none where there are only `unpacked` ones.
    stored: Vec<Stored>,
    /// Row `r` is row `rows[r]` of the parts.
    rows: Option<Vec<u32>>,
    /// Column `c` is column `columns[c]` of the parts.
    columns: Option<Vec<u32>>,
    unpacked: OnceLock<Vec<u8>>,
}

impl Codes {
    /// Number of codes.
    #[allow(clippy::len_without_is_empty)] // that of the slice
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when every code is below `2^bits`.
    pub fn fit(&self, bits: u8) -> bool {
        let stored_fit = !self.stored.is_empty() && self.stored.iter().all(|part| part.bits <= bits);
        bits >= 8 || stored_fit || self.par_iter().all(|&code| code >> bits == 0)
    }

    /// Puts `other`, of rows as long, below.
    pub fn append(&mut self, other: Codes) {
        let both_stored = !self.stored.is_empty() && !other.stored.is_empty();
        let alike = self.rows.is_none() && other.rows.is_none() && self.columns == other.columns;
        if both_stored && alike {
            self.len += other.len;
            self.stored.extend(other.stored);
            self.unpacked = OnceLock::new();
        } else {
            let mut codes = std::mem::take(self).into_vec();
            codes.extend_from_slice(&other);
            *self = codes.into();
        }
    }

    /// Makes row `r` of what is now row `rows[r]`. Rows are `k` long; `rows` has each once.
    pub fn gather_rows(&mut self, k: usize, rows: &[u32]) {
        if self.stored.is_empty() {
            let mut gathered = vec![0; rows.len() * k];
            let pairs = gathered.par_chunks_mut(k).zip(rows);
            pairs.for_each(|(to, &from)| to.copy_from_slice(&self[from as usize * k..][..k]));
            *self = gathered.into();
            return;
        }
        let before = self.rows.take();
        self.rows = Some(rows.iter().map(|&r| before.as_ref().map_or(r, |before| before[r as usize])).collect());
        self.unpacked = OnceLock::new();
    }

    /// Makes column `c` of what is now column `columns[c]`, a permutation.
    pub fn gather_columns(&mut self, columns: &[u32]) {
        if self.stored.is_empty() {
            gather_columns(self, columns);
            return;
        }
        let before = self.columns.take();
        self.columns = Some(columns.iter().map(|&c| before.as_ref().map_or(c, |before| before[c as usize])).collect());
        self.unpacked = OnceLock::new();
    }

    /// The rows as they lie, one part after the other; unpacked ones as one part.
    #[cfg_attr(not(lowbit_cuda), allow(dead_code))] // only a GPU takes them so
    pub(crate) fn parts(&self, n: usize) -> Vec<Part<'_>> {
        if self.stored.is_empty() {
            return vec![Part { bytes: self, n, storage: Storage::Bytes { offset: 0 } }];
        }
        self.stored.iter().map(|part| Part { bytes: &part.bytes, n: part.n, storage: part.storage }).collect()
    }

    /// Which row of the parts each row is; `None` where they are in order.
    #[cfg_attr(not(lowbit_cuda), allow(dead_code))]
    pub(crate) fn rows(&self) -> Option<&[u32]> {
        self.rows.as_deref()
    }

    /// As [`Codes::rows`], of columns.
    #[cfg_attr(not(lowbit_cuda), allow(dead_code))]
    pub(crate) fn columns(&self) -> Option<&[u32]> {
        self.columns.as_deref()
    }

    fn into_vec(mut self) -> Vec<u8> {
        let _ = self.deref();
        self.unpacked.take().unwrap_or_default()
    }

    fn unpack(&self) -> Vec<u8> {
        let Some(k) = self.stored.first().map(|part| part.k) else { return Vec::new() };
        let mut codes = Vec::new();
        for part in &self.stored {
            let unpacked = part.storage.unpack(&part.bytes, part.n, part.k, part.bits);
            if codes.is_empty() { codes = unpacked } else { codes.extend(unpacked) }
        }
        if let Some(columns) = &self.columns {
            gather_columns(&mut codes, columns);
        }
        if let Some(rows) = &self.rows {
            let mut gathered = Codes::from(codes);
            gathered.gather_rows(k, rows);
            codes = gathered.into_vec();
        }
        codes
    }
}

/// Puts the columns of every row in another order.
fn gather_columns(codes: &mut [u8], columns: &[u32]) {
    codes.par_chunks_mut(columns.len().max(1)).for_each(|row| {
        let natural = row.to_vec();
        for (code, &from) in row.iter_mut().zip(columns) {
            *code = natural[from as usize];
        }
    });
}

impl Deref for Codes {
    type Target = [u8];

    /// Who splits work over cores takes the slice before: cores that find codes still packed each unpack all of them.
    fn deref(&self) -> &[u8] {
        if let Some(codes) = self.unpacked.get() {
            return codes;
        }
        // Not inside `get_or_init`: while this thread waits for others to unpack, it may be given work that comes here too.
        let codes = self.unpack();
        self.unpacked.get_or_init(|| codes)
    }
}

impl DerefMut for Codes {
    /// Codes that are written are no longer those of the file.
    fn deref_mut(&mut self) -> &mut [u8] {
        if !self.stored.is_empty() {
            *self = std::mem::take(self).into_vec().into();
        }
        self.unpacked.get_mut().map_or(&mut [], Vec::as_mut_slice)
    }
}

impl From<Vec<u8>> for Codes {
    fn from(codes: Vec<u8>) -> Codes {
        Codes { len: codes.len(), unpacked: OnceLock::from(codes), ..Codes::default() }
    }
}

impl From<Stored> for Codes {
    fn from(stored: Stored) -> Codes {
        Codes { len: stored.n * stored.k, stored: vec![stored], ..Codes::default() }
    }
}

impl FromIterator<u8> for Codes {
    fn from_iter<I: IntoIterator<Item = u8>>(codes: I) -> Codes {
        codes.into_iter().collect::<Vec<u8>>().into()
    }
}

impl PartialEq for Codes {
    fn eq(&self, other: &Codes) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Codes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} codes", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(codes: &[u8], n: usize, k: usize, bits: u8, storage: Storage) -> Codes {
        // Bytes before and behind, as in a file.
        let mut file = vec![0xa5; 3];
        file.extend(storage.pack(codes, n, k, bits));
        let end = file.len();
        file.push(0xa5);
        Stored::new(SharedBytes::new(Arc::new(file), 3..end), n, k, bits, storage).into()
    }

    fn some_codes(len: usize, bits: u8) -> Vec<u8> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> (32 - u32::from(bits))) as u8).collect()
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        for bits in 2..=8 {
            for (n, k) in [(1, 1), (8, 48), (24, 33), (16, 7)] {
                let codes = some_codes(n * k, bits);
                let mut storages = vec![
                    Storage::Bytes { offset: 0 },
                    Storage::Bytes { offset: 128 },
                    Storage::Rows(Packing::Dense),
                    Storage::Rows(Packing::Aligned),
                    Storage::Columns,
                ];
                if bits == 4 {
                    storages.push(Storage::HighFirst);
                    storages.extend((n % 8 == 0).then_some(Storage::Awq));
                }
                for storage in storages {
                    let read = stored(&codes, n, k, bits, storage);
                    assert_eq!(read.len(), n * k);
                    assert!(read.fit(bits), "{storage:?}");
                    assert_eq!(*read, *codes, "{bits} bits, [{n}, {k}], {storage:?}");
                }
            }
        }
    }

    /// As above within work that is split over cores, which must not wait for itself.
    #[test]
    fn any_thread_may_unpack() {
        let (n, k) = (64, 512);
        let codes = some_codes(n * k, 4);
        for _ in 0..20 {
            let read = stored(&codes, n, k, 4, Storage::Columns);
            assert!((0..n).into_par_iter().all(|r| read[r * k..(r + 1) * k] == codes[r * k..(r + 1) * k]));
        }
    }

    /// Stacked, gathered and written, stored codes are what unpacked ones are.
    #[test]
    fn stored_codes_behave_as_unpacked_ones() {
        let (n, k, bits) = (5, 12, 4);
        let codes = some_codes(2 * n * k, bits);
        let (above, below) = codes.split_at(n * k);
        let stored = |codes: &[u8], storage| stored(codes, n, k, bits, storage);
        let columns: Vec<u32> = (0..k as u32).map(|c| (5 * c + 3) % k as u32).collect();
        let rows: Vec<u32> = (0..2 * n as u32).map(|r| (3 * r + 1) % (2 * n) as u32).collect();
        let build = |mut a: Codes, mut b: Codes| {
            a.gather_columns(&columns);
            b.gather_columns(&columns);
            a.append(b);
            a.gather_rows(k, &rows);
            a.gather_rows(k, &rows);
            a.gather_columns(&columns);
            a
        };
        let expected = build(above.to_vec().into(), below.to_vec().into());
        let at = |r: usize, c: usize| {
            let (r, c) = (rows[rows[r] as usize] as usize, columns[columns[c] as usize] as usize);
            codes[r * k + c]
        };
        assert!((0..2 * n * k).all(|i| expected[i] == at(i / k, i % k)));
        for other in [Storage::Columns, Storage::Rows(Packing::Dense)] {
            let mut got = build(stored(above, Storage::Columns), stored(below, other));
            assert_eq!(got.parts(2 * n).len(), 2);
            assert_eq!(got, expected);
            got[3] ^= 1;
            assert_eq!((got[3], got.parts(2 * n).len()), (expected[3] ^ 1, 1));
        }
        // One of them unpacked, or in another order of columns.
        let mixed = build(stored(above, Storage::Columns), below.to_vec().into());
        assert_eq!((mixed.parts(2 * n).len(), &mixed), (1, &expected));
        let mut ordered = stored(above, Storage::Columns);
        ordered.gather_columns(&columns);
        ordered.append(stored(below, Storage::Columns));
        assert_eq!(ordered[n * k..], *below);
        assert!(!Codes::from(vec![16]).fit(4));
    }
}

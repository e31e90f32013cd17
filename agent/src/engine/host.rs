//! Pure: states of sequences in host memory, within a bound; what was of no use for longest goes first.
//!
//! A prompt that begins with one of them takes it over in milliseconds, where reading it again takes seconds. Cells of
//! the KV cache would be nearer, but idle cells slow every running stream.

use super::prefix::{Candidate, EntryId, Holder};
use super::request::{CacheKey, Token};

/// Shorter prompts are read again.
pub(super) const SHORTEST: usize = 64;

/// States at most, so that looking for one stays cheap.
const MAX_ENTRIES: usize = 256;

/// One state may take this part of the bound.
const LARGEST_PART: u64 = 4;

/// Bytes of one state at most: copying it holds up every stream.
const LARGEST: u64 = 512 << 20;

/// States in host memory.
#[derive(Debug, Default)]
pub(super) struct HostCache {
    entries: Vec<Entry>,
    bytes: u64,
    /// Bytes of states that are held elsewhere.
    reserved: u64,
    limit: u64,
    clock: u64,
    next: EntryId,
}

#[derive(Debug)]
struct Entry {
    id: EntryId,
    key: CacheKey,
    tokens: Vec<Token>,
    cut_from: usize,
    state: Vec<u8>,
    used_at: u64,
}

impl Entry {
    fn bytes(&self) -> u64 {
        self.state.len() as u64 + size_of_val(self.tokens.as_slice()) as u64
    }
}

impl HostCache {
    /// At most `limit` bytes; 0 keeps nothing.
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Bytes in use, those held elsewhere counted.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes + self.reserved
    }

    /// States there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether a state of so many bytes would be kept.
    pub(super) fn accepts(&self, bytes: u64) -> bool {
        bytes > 0 && bytes <= (self.limit / LARGEST_PART).min(LARGEST)
    }

    /// Whether a prompt that begins with these tokens finds them already.
    pub(super) fn covers(&self, key: &CacheKey, tokens: &[Token]) -> bool {
        self.entries.iter().any(|entry| {
            let reaches = entry.tokens.len() == tokens.len() || tokens.len() >= entry.cut_from;
            entry.key == *key && reaches && entry.tokens.starts_with(tokens)
        })
    }

    /// Keeps a state; it replaces those that it makes needless.
    pub(super) fn insert(&mut self, key: CacheKey, tokens: Vec<Token>, cut_from: usize, state: Vec<u8>) {
        if !self.accepts(state.len() as u64) {
            return;
        }
        self.entries.retain(|entry| {
            let needless = entry.tokens.len() == tokens.len() || entry.tokens.len() >= cut_from;
            !(needless && entry.key == key && tokens.starts_with(&entry.tokens))
        });
        self.clock += 1;
        self.next += 1;
        self.entries.push(Entry { id: self.next, key, tokens, cut_from, state, used_at: self.clock });
        self.count();
        while (self.bytes() > self.limit || self.entries.len() > MAX_ENTRIES) && self.drop_oldest() {}
    }

    /// What prompts with this key can begin with.
    pub(super) fn candidates<'a>(&'a self, key: &'a CacheKey) -> impl Iterator<Item = Candidate<'a>> {
        self.entries.iter().filter(move |entry| entry.key == *key).map(|entry| Candidate {
            holder: Holder::Host(entry.id),
            tokens: &entry.tokens,
            resident: entry.tokens.len(),
            cut_from: entry.cut_from,
        })
    }

    /// A state and its length in tokens; it counts as used now.
    pub(super) fn get(&mut self, id: EntryId) -> Option<(&[u8], usize)> {
        self.clock += 1;
        let now = self.clock;
        let entry = self.entries.iter_mut().find(|entry| entry.id == id)?;
        entry.used_at = now;
        Some((&entry.state, entry.tokens.len()))
    }

    /// Forgets a state that is of no use any more.
    pub(super) fn remove(&mut self, id: EntryId) {
        self.entries.retain(|entry| entry.id != id);
        self.count();
    }

    /// Forgets everything: no state fits into the context any more.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.count();
    }

    /// Counts a state that is held elsewhere, in the place of others; false when the bound does not allow it.
    pub(super) fn reserve(&mut self, bytes: u64) -> bool {
        if self.reserved.saturating_add(bytes) > self.limit {
            return false;
        }
        self.reserved += bytes;
        while self.bytes() > self.limit && self.drop_oldest() {}
        true
    }

    /// Such a state is gone.
    pub(super) fn give_back(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    fn drop_oldest(&mut self) -> bool {
        let oldest = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.used_at);
        let Some((index, _)) = oldest else { return false };
        self.entries.swap_remove(index);
        self.count();
        true
    }

    fn count(&mut self) {
        self.bytes = self.entries.iter().map(Entry::bytes).sum();
    }
}

/// The bound for a machine with so many bytes free: an eighth, and no more than llama-server takes by default (8 GiB).
pub(super) fn limit(available: Option<u64>) -> u64 {
    available.map_or(0, |available| (available / 8).min(8 << 30))
}

/// Idle cells may slow a step by this part.
const TAX: f64 = 0.04;

/// So few cells are no matter.
const FREE_OF_TAX: u32 = 256;

/// Whether `idle` cells may stay beside `running` ones. A step reads the weights and every cell up to the highest one,
/// so what idle cells cost is their part of those bytes.
pub(super) fn pays(idle: u32, running: u32, cell_bytes: u64, weight_bytes: u64) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    let (cell, weights) = (cell_bytes as f64, weight_bytes as f64);
    idle <= FREE_OF_TAX || f64::from(idle) * cell <= TAX * (weights + f64::from(running) * cell)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::prefix::common;
    use super::*;

    fn key(salt: &str) -> CacheKey {
        CacheKey { salt: salt.to_owned(), ..CacheKey::default() }
    }

    fn state(bytes: usize) -> Vec<u8> {
        vec![0; bytes]
    }

    /// Tokens that a prompt shares with what is kept.
    fn shared(cache: &HostCache, key: &CacheKey, prompt: &[Token]) -> usize {
        cache.candidates(key).map(|candidate| common(candidate.tokens, prompt)).max().unwrap_or(0)
    }

    #[test]
    fn the_least_recently_used_goes() {
        let mut cache = HostCache::new(3000);
        for token in 0..3 {
            cache.insert(key(""), vec![token; 50], 0, state(700));
        }
        assert_eq!((cache.len(), cache.bytes()), (3, 2700));
        let first = cache.candidates(&key("")).next().map(|candidate| candidate.holder);
        let Some(Holder::Host(first)) = first else { panic!("{first:?}") };
        assert_eq!(cache.get(first).map(|(state, length)| (state.len(), length)), Some((700, 50)));
        cache.insert(key(""), vec![3; 50], 0, state(700));
        let left: Vec<usize> = (0..4).map(|token| shared(&cache, &key(""), &[token; 50])).collect();
        assert_eq!(left, [50, 0, 50, 50]);
        cache.insert(key(""), vec![9; 50], 0, state(751));
        assert_eq!(cache.len(), 3, "too large a state is not kept");
        assert!(cache.reserve(2000) && !cache.reserve(1001));
        assert_eq!((cache.len(), cache.bytes()), (1, 2900));
        cache.give_back(2000);
        assert_eq!(cache.bytes(), 900);
        cache.clear();
        assert_eq!((cache.len(), cache.bytes()), (0, 0));
        assert!(!HostCache::new(0).accepts(1));
    }

    #[test]
    fn keys_keep_apart() {
        let mut cache = HostCache::new(1 << 20);
        cache.insert(key("a"), vec![1; 100], 0, state(10));
        assert_eq!(shared(&cache, &key("b"), &[1; 100]), 0);
        assert_eq!(shared(&cache, &key("a"), &[1; 100]), 100);
        assert!(cache.covers(&key("a"), &[1; 40]) && !cache.covers(&key("b"), &[1; 40]));
    }

    #[test]
    fn what_can_be_cut_replaces_its_beginnings() {
        let mut cache = HostCache::new(1 << 20);
        cache.insert(key(""), vec![1; 100], 0, state(10));
        cache.insert(key(""), vec![1; 200], 0, state(10));
        assert_eq!((cache.len(), cache.covers(&key(""), &[1; 150])), (1, true));
        // A state that cannot be cut is one point; another point is another state.
        let mut points = HostCache::new(1 << 20);
        points.insert(key(""), vec![1; 100], usize::MAX, state(10));
        points.insert(key(""), vec![1; 200], usize::MAX, state(10));
        points.insert(key(""), vec![1; 200], usize::MAX, state(10));
        assert_eq!(points.len(), 2);
        assert!(points.covers(&key(""), &[1; 100]) && !points.covers(&key(""), &[1; 150]));
    }

    #[test]
    fn idle_cells_pay_or_go() {
        // 1.9 GB of weights and 48 KiB a cell: two prefixes of 1.5k stay, thirty do not.
        let pays = |idle, running| pays(idle, running, 48 << 10, 1_900_000_000);
        assert!(pays(1500, 0) && !pays(45_000, 1500) && pays(4000, 100_000) && pays(256, 0));
        assert_eq!((limit(None), limit(Some(16 << 30)), limit(Some(1 << 40))), (0, 2 << 30, 8 << 30));
    }

    proptest! {
        #[test]
        fn never_more_than_the_bound(
            limit in 0u64..5000,
            inserted in proptest::collection::vec((0i32..3, 1usize..40, 0usize..2000, proptest::bool::ANY), 0..60),
        ) {
            let mut cache = HostCache::new(limit);
            for (token, length, bytes, whole) in inserted {
                let cut_from = if whole { usize::MAX } else { 0 };
                cache.insert(key(""), vec![token; length], cut_from, state(bytes));
                prop_assert!(cache.bytes() <= limit && cache.len() <= MAX_ENTRIES);
                let counted: u64 = cache.entries.iter().map(Entry::bytes).sum();
                prop_assert_eq!(cache.bytes(), counted);
            }
        }
    }
}

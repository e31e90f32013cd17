//! Pure: which sequence ids are in use, how many cells of the KV cache they take, and who may be dropped.
//!
//! In a unified cache a cell can belong to several sequences (a shared prefix), so a sequence is a chain of segments,
//! each a run of cells that were made together: what is used is, for every segment, the longest part that anyone still
//! holds. In a split cache each sequence has cells of its own, and its id is its place.

use super::request::{CacheKey, Token};

/// Runs of neighbouring cells after which a sequence counts as scattered: its state is copied run by run, and each run
/// of each layer is a transfer of its own on a GPU.
const MAX_RUNS: u32 = 256;

/// llama.cpp's sequence id.
pub(super) type SeqId = i32;

/// The sequences of one context.
#[derive(Debug, Default)]
pub(super) struct Pool {
    sequences: Vec<Sequence>,
    split: bool,
    next_segment: u64,
    clock: u64,
    used: u32,
    /// Whose cells were taken last.
    last: Option<SeqId>,
}

#[derive(Debug, Default)]
struct Sequence {
    state: State,
    chain: Vec<Link>,
    /// The last link ends where its segment ends and nobody else continues it.
    open: bool,
    /// Runs of neighbouring cells, as far as can be known.
    runs: u32,
    /// Cells in the first [`MAX_RUNS`] runs, once there are more.
    solid: Option<u32>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Free,
    Running,
    /// A finished sequence whose cells stay for the next prompt that begins the same.
    Kept {
        key: CacheKey,
        tokens: Vec<Token>,
        used_at: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Link {
    segment: u64,
    length: u32,
}

impl Pool {
    /// A pool of `sequences` ids, all free.
    pub(super) fn new(sequences: u32, unified: bool) -> Self {
        let mut pool = Self { split: !unified, ..Self::default() };
        pool.sequences.resize_with(sequences as usize, Sequence::default);
        pool
    }

    /// Takes a free id for a running sequence: the lowest one, which keeps llama.cpp's masks small; in a split cache the
    /// nearest to the others that run, because llama.cpp computes neighbouring ids together.
    pub(super) fn take(&mut self) -> Option<SeqId> {
        let is_running = |sequence: &Sequence| matches!(sequence.state, State::Running);
        let running: Vec<usize> = (0..self.sequences.len()).filter(|&i| is_running(&self.sequences[i])).collect();
        let free = (0..self.sequences.len()).filter(|&index| matches!(self.sequences[index].state, State::Free));
        let index = free.min_by_key(|&index| {
            let nearest = running.iter().map(|other| index.abs_diff(*other)).min();
            (nearest.filter(|_| self.split), index)
        })?;
        self.sequences[index].state = State::Running;
        SeqId::try_from(index).ok()
    }

    /// Cells that a sequence holds, shared ones counted.
    #[cfg(test)]
    pub(super) fn length(&self, id: SeqId) -> u32 {
        self.get(id).map_or(0, Sequence::length)
    }

    /// Cells in use.
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// Cells in use by running sequences.
    pub(super) fn used_by_running(&self) -> u32 {
        distinct(self.sequences.iter().filter(|sequence| matches!(sequence.state, State::Running)))
    }

    /// `count` new cells at the end of a sequence.
    pub(super) fn append(&mut self, id: SeqId, count: u32) {
        let segment = self.next_segment;
        let interrupted = !self.split && self.last.replace(id) != Some(id);
        let Some(sequence) = self.get_mut(id) else { return };
        if interrupted || sequence.runs == 0 {
            if sequence.runs == MAX_RUNS {
                sequence.solid = Some(sequence.length());
            }
            sequence.runs += 1;
        }
        match sequence.chain.last_mut() {
            Some(last) if sequence.open => last.length += count,
            _ => {
                sequence.chain.push(Link { segment, length: count });
                sequence.open = true;
                self.next_segment += 1;
            }
        }
        self.used += count;
    }

    /// Keeps the first `length` cells of a sequence.
    pub(super) fn cut(&mut self, id: SeqId, length: u32) {
        let Some(sequence) = self.get(id) else { return };
        let gone = sequence.length().saturating_sub(length);
        let last = sequence.chain.last().filter(|last| sequence.open && last.length > gone).copied();
        let holds_more = |link: &Link, last: Link| link.segment == last.segment && link.length > last.length - gone;
        let is_own = |last: &Link| {
            let held = self.sequences.iter().flat_map(|sequence| &sequence.chain);
            held.filter(|link| holds_more(link, *last)).count() == 1
        };
        let own = last.filter(|last| gone > 0 && is_own(last));
        let Some(sequence) = self.get_mut(id) else { return };
        if let Some(last) = sequence.chain.last_mut().filter(|_| own.is_some()) {
            // Wrong guesses, with every step: the segment stays its own, or the chain would grow with each.
            last.length -= gone;
            sequence.forget_runs(length);
            self.used -= gone;
        } else if gone > 0 {
            sequence.chain = sequence.first(length);
            sequence.open = false;
            sequence.forget_runs(length);
            self.count();
        }
    }

    /// Makes `to`, which is empty, begin with the first `length` cells of `from`.
    pub(super) fn share(&mut self, from: SeqId, to: SeqId, length: u32) {
        let Some(from) = self.get(from) else { return };
        if self.split {
            let length = length.min(from.length());
            self.append(to, length);
            return;
        }
        let (chain, runs, solid) = (from.first(length), from.runs, from.solid);
        let Some(sequence) = self.get_mut(to) else { return };
        sequence.chain = chain;
        sequence.open = false;
        (sequence.runs, sequence.solid) = (runs, solid);
        sequence.forget_runs(length);
        self.count();
    }

    /// The cells of a sequence were made again, `length` in one piece and only its own.
    pub(super) fn gathered(&mut self, id: SeqId, length: u32) {
        if let Some(sequence) = self.get_mut(id) {
            *sequence = Sequence { state: State::Running, ..Sequence::default() };
            self.count();
            self.append(id, length);
        }
    }

    /// Cells of a sequence, from its first one on, whose state can be copied in few pieces.
    pub(super) fn solid(&self, id: SeqId) -> u32 {
        self.get(id).map_or(0, |sequence| sequence.solid.unwrap_or_else(|| sequence.length()))
    }

    /// A running sequence has ended; its cells stay.
    pub(super) fn keep(&mut self, id: SeqId, key: CacheKey, tokens: Vec<Token>) {
        self.clock += 1;
        let used_at = self.clock;
        if let Some(sequence) = self.get_mut(id) {
            sequence.state = State::Kept { key, tokens, used_at };
        }
    }

    /// A kept sequence runs again.
    pub(super) fn revive(&mut self, id: SeqId) {
        if let Some(sequence) = self.get_mut(id) {
            sequence.state = State::Running;
        }
    }

    /// A kept sequence was of use.
    pub(super) fn touch(&mut self, id: SeqId) {
        self.clock += 1;
        let now = self.clock;
        if let Some(State::Kept { used_at, .. }) = self.get_mut(id).map(|sequence| &mut sequence.state) {
            *used_at = now;
        }
    }

    /// Frees an id and the cells that only it holds.
    pub(super) fn release(&mut self, id: SeqId) {
        if let Some(sequence) = self.get_mut(id) {
            *sequence = Sequence::default();
            self.count();
        }
    }

    /// Frees everything.
    pub(super) fn clear(&mut self) {
        *self = Self::new(u32::try_from(self.sequences.len()).unwrap_or(u32::MAX), !self.split);
    }

    /// The kept sequence that was of no use for longest, other than `except`.
    pub(super) fn oldest_kept(&self, except: Option<SeqId>) -> Option<SeqId> {
        let oldest = self.sequences.iter().zip(0..).filter_map(|(sequence, id)| match sequence.state {
            State::Kept { used_at, .. } if Some(id) != except => Some((used_at, id)),
            State::Kept { .. } | State::Free | State::Running => None,
        });
        oldest.min().map(|(_, id)| id)
    }

    /// The kept sequences, their keys and their tokens.
    pub(super) fn kept(&self) -> impl Iterator<Item = (SeqId, &CacheKey, &[Token])> {
        self.sequences.iter().zip(0..).filter_map(|(sequence, id)| match &sequence.state {
            State::Kept { key, tokens, .. } => Some((id, key, tokens.as_slice())),
            State::Free | State::Running => None,
        })
    }

    /// Whether a sequence has ended and stays.
    pub(super) fn is_kept(&self, id: SeqId) -> bool {
        self.get(id).is_some_and(|sequence| matches!(sequence.state, State::Kept { .. }))
    }

    /// Whether an id is free, or can be made free by dropping a kept sequence.
    pub(super) fn has_spare(&self) -> bool {
        self.sequences.iter().any(|sequence| !matches!(sequence.state, State::Running))
    }

    fn get(&self, id: SeqId) -> Option<&Sequence> {
        self.sequences.get(usize::try_from(id).ok()?)
    }

    fn get_mut(&mut self, id: SeqId) -> Option<&mut Sequence> {
        self.sequences.get_mut(usize::try_from(id).ok()?)
    }

    fn count(&mut self) {
        self.used = distinct(self.sequences.iter());
    }
}

impl Sequence {
    fn length(&self) -> u32 {
        self.chain.iter().map(|link| link.length).sum()
    }

    /// After a cut: how scattered the first cells are is only known where the cut lies behind the solid ones.
    fn forget_runs(&mut self, length: u32) {
        if self.solid.is_some_and(|solid| length <= solid) {
            self.solid = None;
            self.runs = MAX_RUNS;
        }
    }

    fn first(&self, length: u32) -> Vec<Link> {
        let mut left = length;
        let mut chain = Vec::with_capacity(self.chain.len());
        for link in &self.chain {
            let taken = link.length.min(left);
            if taken > 0 {
                chain.push(Link { segment: link.segment, length: taken });
            }
            left -= taken;
        }
        chain
    }
}

fn distinct<'a>(sequences: impl Iterator<Item = &'a Sequence>) -> u32 {
    let mut links: Vec<(u64, u32)> =
        sequences.flat_map(|sequence| sequence.chain.iter().map(|link| (link.segment, link.length))).collect();
    links.sort_unstable();
    // The longest link of a segment is the last of its run.
    let ends = links.iter().zip(links.iter().skip(1).map(Some).chain([None]));
    ends.filter(|(link, next)| next.is_none_or(|next| next.0 != link.0)).map(|(link, _)| link.1).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_shared_prefix_counts_once() {
        let mut pool = Pool::new(3, true);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.append(a, 100);
        pool.share(a, b, 60);
        assert_eq!((pool.used(), pool.length(b)), (100, 60));
        pool.append(b, 10);
        pool.append(a, 5);
        assert_eq!((pool.used(), pool.length(a), pool.length(b)), (115, 105, 70));
        pool.release(a);
        assert_eq!((pool.used(), pool.used_by_running()), (70, 70));
        pool.keep(b, CacheKey::default(), vec![1; 70]);
        assert_eq!((pool.used(), pool.used_by_running()), (70, 0));
        assert_eq!(pool.oldest_kept(None), Some(b));
        pool.release(b);
        assert_eq!((pool.used(), pool.oldest_kept(None)), (0, None));
    }

    #[test]
    fn the_oldest_kept_is_the_least_recently_used() {
        let mut pool = Pool::new(3, true);
        for token in 0..3 {
            let id = pool.take().unwrap();
            pool.append(id, 4);
            pool.keep(id, CacheKey::default(), vec![token; 4]);
        }
        assert!(pool.take().is_none() && pool.has_spare());
        pool.touch(0);
        assert_eq!(pool.oldest_kept(None), Some(1));
        pool.revive(1);
        assert_eq!(pool.oldest_kept(None), Some(2));
    }

    #[test]
    fn a_split_pool_copies_and_stays_together() {
        let mut pool = Pool::new(5, false);
        let ids: Vec<SeqId> = (0..4).filter_map(|_| pool.take()).collect();
        assert_eq!(ids, [0, 1, 2, 3]);
        pool.append(0, 100);
        pool.share(0, 1, 60);
        assert_eq!((pool.used(), pool.length(1)), (160, 60));
        pool.release(0);
        pool.release(1);
        // 2 and 3 run: 1 and 4 are next to them, 0 is not.
        assert_eq!((pool.take(), pool.take(), pool.take(), pool.take()), (Some(1), Some(0), Some(4), None));
        assert!(!pool.has_spare());
    }

    #[test]
    fn gathered_cells_are_ones_own() {
        let mut pool = Pool::new(2, true);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.append(a, 100);
        pool.share(a, b, 60);
        pool.append(b, 10);
        pool.release(a);
        pool.gathered(b, 70);
        assert_eq!((pool.used(), pool.used_by_running(), pool.length(b), pool.solid(b)), (70, 70, 70, 70));
        pool.append(b, 1);
        assert_eq!((pool.used(), pool.length(b)), (71, 71));
    }

    #[test]
    fn wrong_guesses_leave_no_trace() {
        let mut pool = Pool::new(2, true);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.append(a, 100);
        pool.share(a, b, 100);
        for round in 0..50 {
            pool.append(a, 4);
            pool.cut(a, 100 + 2 * (round + 1));
        }
        assert_eq!((pool.used(), pool.length(a), pool.get(a).unwrap().chain.len()), (200, 200, 1));
        // What another holds too stays.
        pool.cut(a, 50);
        assert_eq!((pool.used(), pool.length(a), pool.length(b)), (100, 50, 100));
    }

    #[test]
    fn scattered_cells_are_known() {
        let mut pool = Pool::new(2, true);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.append(a, 1000);
        pool.append(a, 500);
        assert_eq!(pool.solid(a), 1500);
        for _ in 0..400 {
            pool.append(b, 1);
            pool.append(a, 1);
        }
        assert_eq!((pool.solid(a), pool.length(a), pool.solid(b)), (1500 + MAX_RUNS - 1, 1900, MAX_RUNS));
        pool.cut(a, 1400);
        assert_eq!(pool.solid(a), 1400);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Append(u8, u8),
        Cut(u8, u8),
        Share(u8, u8, u8),
        Release(u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0u8..4, 1u8..20).prop_map(|(id, count)| Op::Append(id, count)),
            2 => (0u8..4, 0u8..40).prop_map(|(id, length)| Op::Cut(id, length)),
            2 => (0u8..4, 0u8..4, 0u8..40).prop_map(|(from, to, length)| Op::Share(from, to, length)),
            1 => (0u8..4).prop_map(Op::Release),
        ]
    }

    proptest! {
        /// The pool counts as llama.cpp does: a cell is used while any sequence holds it.
        #[test]
        fn counts_like_cells(ops in proptest::collection::vec(op(), 0..60)) {
            let mut pool = Pool::new(4, true);
            while pool.take().is_some() {}
            let mut cells: Vec<Vec<u32>> = vec![Vec::new(); 4];
            let mut next = 0;
            for op in ops {
                match op {
                    Op::Append(id, count) => {
                        pool.append(id.into(), count.into());
                        cells[id as usize].extend(next..next + u32::from(count));
                        next += u32::from(count);
                    }
                    Op::Cut(id, length) => {
                        pool.cut(id.into(), length.into());
                        cells[id as usize].truncate(length.into());
                    }
                    Op::Share(from, to, length) => {
                        if from == to || !cells[to as usize].is_empty() {
                            continue;
                        }
                        pool.share(from.into(), to.into(), length.into());
                        let length = cells[from as usize].len().min(length.into());
                        cells[to as usize] = cells[from as usize][..length].to_vec();
                    }
                    Op::Release(id) => {
                        pool.release(id.into());
                        cells[id as usize].clear();
                    }
                }
                let distinct: BTreeSet<u32> = cells.iter().flatten().copied().collect();
                prop_assert_eq!(pool.used() as usize, distinct.len());
                for (id, cells) in (0..).zip(&cells) {
                    prop_assert_eq!(pool.length(id) as usize, cells.len());
                }
            }
        }
    }
}

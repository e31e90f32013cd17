//! Pure: whose turn it is, of the sequences that run with different LoRA adapters.
//!
//! llama.cpp sets adapters for a whole context, so a step holds sequences of one adapter (or of none), and every change
//! makes llama.cpp plan its memory anew. So who has the turn keeps it for a while; then it goes round.

use std::time::{Duration, Instant};

/// Number of an adapter of the model; `None` is the model itself.
pub(super) type AdapterId = Option<usize>;

/// How long a turn lasts while others wait.
const TURN: Duration = Duration::from_millis(100);

/// Who has the turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turns {
    current: AdapterId,
    since: Option<Instant>,
}

impl Turns {
    /// Whose turn the next step is, given the adapter of every sequence that has something to compute.
    pub(super) fn next(&mut self, ready: impl Iterator<Item = AdapterId> + Clone, now: Instant) -> AdapterId {
        let may_stay = self.since.is_none_or(|since| now.saturating_duration_since(since) < TURN);
        let has_work = ready.clone().any(|adapter| adapter == self.current);
        if has_work && may_stay {
            self.since.get_or_insert(now);
            return self.current;
        }
        // The next one in the order of numbers, then from the beginning again.
        let after = ready.clone().filter(|adapter| *adapter > self.current).min();
        if let Some(next) = after.or_else(|| ready.min()) {
            *self = Self { current: next, since: Some(now) };
        }
        self.current
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn turns_go_round() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut turns = Turns::default();
        let mut next = |ready: &[AdapterId], ms| turns.next(ready.iter().copied(), at(ms));
        assert_eq!(next(&[], 0), None);
        assert_eq!(next(&[Some(1)], 0), Some(1), "whoever has work");
        assert_eq!(next(&[Some(1), None, Some(0)], 50), Some(1), "the turn lasts");
        assert_eq!(next(&[Some(1), None, Some(0)], 100), None, "and goes round");
        assert_eq!(next(&[Some(1), None, Some(0)], 201), Some(0));
        assert_eq!(next(&[Some(1), None, Some(0)], 302), Some(1));
        assert_eq!(next(&[None], 303), None, "at once when there is nothing left to do");
        assert_eq!(next(&[None], 9000), None);
        assert_eq!(next(&[None, Some(3)], 9001), None, "a turn begins anew when it was the only one");
    }

    proptest! {
        #[test]
        fn everybody_has_a_turn(ready in proptest::collection::btree_set(proptest::option::of(0usize..8), 1..9)) {
            let start = Instant::now();
            let mut turns = Turns::default();
            let mut seen = std::collections::BTreeSet::new();
            for step in 0..ready.len() {
                let now = start + (TURN + Duration::from_millis(1)) * u32::try_from(step).unwrap();
                let turn = turns.next(ready.iter().copied(), now);
                prop_assert!(ready.contains(&turn));
                seen.insert(turn);
            }
            prop_assert_eq!(seen, ready);
        }
    }
}

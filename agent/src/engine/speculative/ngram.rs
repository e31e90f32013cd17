//! Pure: guesses from a sequence's own past. What followed the last few tokens when they came before will follow again:
//! true of answers that quote or edit their prompt, of lists, and of loops.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use super::super::request::Token;

/// Where runs of tokens have come in one sequence: an entry for each token of it, 16 bytes and a little more.
pub(in crate::engine) struct Index {
    /// Tokens of a run.
    matching: usize,
    /// Keyed, so that nobody can choose tokens that collide: hash of a run to the place behind it where it came last.
    last: HashMap<u64, u32>,
    hasher: RandomState,
    /// The place behind the next run to be entered.
    next: usize,
}

impl Index {
    /// Runs of `matching` tokens.
    pub(in crate::engine) fn new(matching: usize) -> Self {
        Self { matching: matching.max(1), last: HashMap::new(), hasher: RandomState::new(), next: matching.max(1) }
    }

    /// At most `most` tokens that should follow `tokens`, which begin with those of the call before.
    pub(in crate::engine) fn guess(&mut self, tokens: &[Token], most: usize) -> Vec<Token> {
        let end = tokens.len();
        let Some(start) = end.checked_sub(self.matching) else { return Vec::new() };
        // Not the last run, which would find itself.
        for place in self.next..end {
            let run = self.hasher.hash_one(&tokens[place - self.matching..place]);
            self.last.insert(run, u32::try_from(place).unwrap_or(u32::MAX));
        }
        self.next = self.next.max(end);
        let found = self.last.get(&self.hasher.hash_one(&tokens[start..]));
        let Some(place) = found.and_then(|&place| usize::try_from(place).ok()) else { return Vec::new() };
        let came = place.checked_sub(self.matching).and_then(|start| tokens.get(start..place));
        if came != Some(&tokens[start..]) {
            return Vec::new();
        }
        // What repeats itself with a period goes on so, beyond what is there.
        let followed = &tokens[place..];
        followed.iter().cycle().take(most).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, tokens of a run, the text, tokens to guess, the guess.
    type Case<'a> = (&'a str, usize, &'a [Token], usize, &'a [Token]);

    #[test]
    fn guesses_what_followed_before() {
        let cases: &[Case<'_>] = &[
            ("nothing", 2, &[], 4, &[]),
            ("too short", 3, &[1, 2], 4, &[]),
            ("nothing came before", 2, &[1, 2, 3, 4], 4, &[]),
            ("what followed", 2, &[1, 2, 3, 4, 5, 9, 1, 2], 3, &[3, 4, 5]),
            ("the latest counts", 2, &[1, 2, 3, 8, 1, 2, 4, 8, 1, 2], 2, &[4, 8]),
            ("a loop goes on", 2, &[7, 1, 2, 1, 2], 5, &[1, 2, 1, 2, 1]),
            ("of one token", 3, &[5, 5, 5, 5], 3, &[5, 5, 5]),
            ("most", 2, &[1, 2, 3, 4, 5, 9, 1, 2], 1, &[3]),
            ("none", 2, &[1, 2, 3, 1, 2], 0, &[]),
        ];
        for (name, matching, tokens, most, expected) in cases {
            assert_eq!(Index::new(*matching).guess(tokens, *most), *expected, "{name}");
        }
    }

    /// The last place before the end where the same run came, looked for by hand.
    fn reference(tokens: &[Token], matching: usize, most: usize) -> Vec<Token> {
        let Some(start) = tokens.len().checked_sub(matching) else { return Vec::new() };
        let place = (matching..tokens.len()).rev().find(|&place| tokens[place - matching..place] == tokens[start..]);
        place.map_or_else(Vec::new, |place| tokens[place..].iter().cycle().take(most).copied().collect())
    }

    proptest! {
        /// The index, filled as the sequence grows, says what a search through the whole would.
        #[test]
        fn finds_what_a_search_finds(
            tokens in proptest::collection::vec(0i32..4, 0..80), matching in 1usize..5, most in 0usize..9, stride in 1usize..6,
        ) {
            let mut index = Index::new(matching);
            for end in (0..=tokens.len()).step_by(stride) {
                prop_assert_eq!(index.guess(&tokens[..end], most), reference(&tokens[..end], matching, most));
            }
        }
    }
}

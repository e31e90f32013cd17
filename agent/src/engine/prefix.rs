//! Pure: which cells that are there already a new prompt can begin with.

use super::pool::SeqId;
use super::request::Token;

/// Shorter prefixes are read again: that costs less than the bookkeeping.
const SHORTEST: usize = 16;

/// A kept sequence is taken over if at most this many tokens (or a quarter of it) are lost; else its prefix is shared
/// and it stays.
const LOSS: usize = 64;

/// Where a prompt begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reuse {
    /// At its first token.
    Nothing,
    /// Behind the first `length` tokens of a kept sequence, whose id it takes over.
    Take {
        /// The sequence.
        id: SeqId,
        /// Tokens that are there already.
        length: usize,
    },
    /// Behind the first `length` tokens of a sequence that stays.
    Share {
        /// The sequence.
        id: SeqId,
        /// Tokens that are there already.
        length: usize,
    },
}

/// The longest usable prefix. At least the last token of the prompt is always computed: its logits are needed.
pub(super) fn choose<'kept, 'running>(
    prompt: &[Token],
    kept: impl Iterator<Item = (SeqId, &'kept [Token])>,
    running: impl Iterator<Item = (SeqId, &'running [Token])>,
    free_id: bool,
) -> Reuse {
    let usable = &prompt[..prompt.len().saturating_sub(1)];
    let mut best = Reuse::Nothing;
    let mut longest = SHORTEST - 1;
    for (id, tokens) in kept {
        let length = common(usable, tokens);
        if length > longest {
            longest = length;
            let lost = tokens.len() - length;
            best = if lost <= LOSS.max(tokens.len() / 4) || !free_id {
                Reuse::Take { id, length }
            } else {
                Reuse::Share { id, length }
            };
        }
    }
    if free_id {
        for (id, tokens) in running {
            let length = common(usable, tokens);
            if length > longest {
                longest = length;
                best = Reuse::Share { id, length };
            }
        }
    }
    best
}

fn common(left: &[Token], right: &[Token]) -> usize {
    left.iter().zip(right).take_while(|(left, right)| left == right).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Known<'a> = &'a [(SeqId, &'a [Token])];
    /// Name, prompt, kept, running, whether an id is free, what is expected.
    type Case<'a> = (&'a str, Vec<Token>, Known<'a>, Known<'a>, bool, Reuse);

    fn tokens(range: std::ops::Range<i32>) -> Vec<Token> {
        range.collect()
    }

    #[test]
    fn chooses_the_longest_prefix() {
        let nobody: [(SeqId, &[Token]); 0] = [];
        let long = tokens(0..1000);
        let turn = tokens(0..200);
        let other = [tokens(0..150), tokens(5000..5500)].concat();
        let cases: [Case<'_>; 9] = [
            ("empty", vec![], &nobody, &nobody, true, Reuse::Nothing),
            ("nobody", tokens(0..50), &nobody, &nobody, true, Reuse::Nothing),
            ("too short", tokens(0..50), &[(1, &long[..15])], &nobody, true, Reuse::Nothing),
            ("next turn", tokens(0..300), &[(1, &turn)], &nobody, true, Reuse::Take { id: 1, length: 200 }),
            ("same again", tokens(0..200), &[(1, &turn)], &nobody, true, Reuse::Take { id: 1, length: 199 }),
            ("a part of much", tokens(0..300), &[(1, &long)], &nobody, true, Reuse::Share { id: 1, length: 299 }),
            ("no free id", tokens(0..300), &[(1, &long)], &nobody, false, Reuse::Take { id: 1, length: 299 }),
            ("longest", tokens(0..300), &[(1, &other), (2, &turn)], &nobody, true, Reuse::Take { id: 2, length: 200 }),
            ("running", tokens(0..300), &[(1, &other)], &[(3, &turn)], true, Reuse::Share { id: 3, length: 200 }),
        ];
        for (name, prompt, kept, running, free_id, expected) in cases {
            let found = choose(&prompt, kept.iter().copied(), running.iter().copied(), free_id);
            assert_eq!(found, expected, "{name}");
        }
    }
}

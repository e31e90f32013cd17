//! Pure: which state that is there already, or soon will be, a new prompt can begin with.
//!
//! | where the beginning is | what is done |
//! |---|---|
//! | in the cells of a finished sequence | taken over, or shared if much of it would be lost |
//! | in the cells of a running sequence | shared |
//! | in host memory | put into new cells |
//! | in a prompt that is being read right now | waited for, then shared |

use super::media;
use super::pool::SeqId;
use super::request::Token;

/// Shorter prefixes are read again: that costs less than the bookkeeping.
const SHORTEST: usize = 16;

/// A kept sequence is taken over if at most this many tokens (or a quarter of it) are lost; else its prefix is shared
/// and it stays.
const LOSS: usize = 64;

/// Host memory, or another's prompt, must give this many tokens more than the cells that are there.
const WORTH: usize = 64;

/// Looks at a prompt that is being read during which it has not got on, after which nobody waits for it any more.
const PATIENCE: u32 = 8;

/// Number of a running sequence, rising in order of arrival.
pub(super) type Serial = u64;

/// Number of a state in host memory.
pub(super) type EntryId = u64;

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
    /// Behind the first `length` tokens of a state in host memory.
    Restore {
        /// The state.
        entry: EntryId,
        /// Tokens that are there already.
        length: usize,
    },
    /// Behind the first `length` tokens of another's prompt, when that has got so far.
    Follow {
        /// The running sequence.
        leader: Serial,
        /// Tokens that will be there.
        length: usize,
    },
}

/// Who has a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// A finished sequence whose cells stay.
    Kept(SeqId),
    /// A sequence that generates.
    Running(SeqId),
    /// A sequence whose prompt is being read.
    Reading(SeqId, Serial),
    /// Host memory.
    Host(EntryId),
}

/// A state that a prompt could begin with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) holder: Holder,
    /// Its tokens, those that are not computed yet counted.
    pub(super) tokens: &'a [Token],
    /// How many of them are computed.
    pub(super) resident: usize,
    /// Lengths at which it can be cut: this and greater ones, and `resident`.
    pub(super) cut_from: usize,
}

/// What a prompt may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct May {
    /// A sequence id is free, so that others can stay where they are.
    pub(super) share: bool,
    /// It may wait for another's prompt.
    pub(super) follow: bool,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) reuse: Reuse,
    /// A length up to which somebody has had the same tokens, whose state cannot be cut there: one to remember.
    pub(super) border: Option<usize>,
}

/// The longest usable prefix. At least the last token of the prompt is always computed: its logits are needed.
pub(super) fn choose<'a>(prompt: &[Token], candidates: impl Iterator<Item = Candidate<'a>>, may: May) -> Choice {
    let usable = &prompt[..prompt.len().saturating_sub(1)];
    let mut best = Reuse::Nothing;
    let mut longest = SHORTEST - 1;
    let mut stored: Option<(EntryId, usize)> = None;
    let mut coming: Option<(Serial, usize)> = None;
    let mut common_at_all = 0;
    for Candidate { holder, tokens, resident, cut_from } in candidates {
        let whole = media::border(prompt, common(usable, tokens));
        common_at_all = common_at_all.max(whole);
        // One that was left in the middle of a picture is cut before it.
        let reach = media::border(prompt, whole.min(resident));
        let now = if reach == resident || reach >= cut_from { reach } else { 0 };
        match holder {
            Holder::Kept(id) if now > longest => {
                longest = now;
                let lost = tokens.len() - now;
                best = if lost <= LOSS.max(tokens.len() / 4) || !may.share {
                    Reuse::Take { id, length: now }
                } else {
                    Reuse::Share { id, length: now }
                };
            }
            Holder::Running(id) | Holder::Reading(id, _) if may.share && now > longest => {
                longest = now;
                best = Reuse::Share { id, length: now };
            }
            Holder::Host(entry) if now > stored.map_or(0, |(_, length)| length) => stored = Some((entry, now)),
            Holder::Kept(_) | Holder::Running(_) | Holder::Reading(..) | Holder::Host(_) => {}
        }
        if let Holder::Reading(_, serial) = holder
            && may.follow
            && whole > coming.map_or(0, |(_, length)| length)
        {
            coming = Some((serial, whole));
        }
    }
    if let Some((entry, length)) = stored.filter(|&(_, length)| length >= longest + WORTH) {
        longest = length;
        best = Reuse::Restore { entry, length };
    }
    if let Some((leader, length)) = coming.filter(|&(_, length)| length >= longest + WORTH) {
        longest = length;
        best = Reuse::Follow { leader, length };
    }
    Choice { reuse: best, border: (common_at_all >= longest + WORTH).then_some(common_at_all) }
}

/// Tokens that both begin with.
pub(super) fn common(left: &[Token], right: &[Token]) -> usize {
    left.iter().zip(right).take_while(|(left, right)| left == right).count()
}

/// Waiting for another's prompt to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Follow {
    pub(super) leader: Serial,
    /// Tokens that are waited for.
    pub(super) length: usize,
    seen: usize,
    stalls: u32,
}

/// What to do about waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// Go on waiting.
    Wait,
    /// Choose again: what was waited for is there, or it will not come from this leader.
    Choose,
    /// Begin with what there is: the leader does not get on.
    Begin,
}

impl Follow {
    pub(super) fn new(leader: Serial, length: usize) -> Self {
        Self { leader, length, seen: 0, stalls: 0 }
    }

    /// To be called once a step with how far the leader has come; `None`: it is gone, lost its cells, or waits itself.
    /// `was_read`: that step read prompts, so the leader could have got on.
    pub(super) fn look(&mut self, leader: Option<usize>, was_read: bool) -> Patience {
        match leader {
            None => Patience::Choose,
            Some(resident) if resident >= self.length => Patience::Choose,
            Some(resident) if resident == self.seen => {
                self.stalls += u32::from(was_read);
                if self.stalls > PATIENCE { Patience::Begin } else { Patience::Wait }
            }
            Some(resident) => {
                (self.seen, self.stalls) = (resident, 0);
                Patience::Wait
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, prompt, what is there, what it may do, what is expected.
    type Case<'a> = (&'a str, Vec<Token>, Vec<Candidate<'a>>, May, Reuse);

    const FREELY: May = May { share: true, follow: true };

    fn tokens(range: std::ops::Range<i32>) -> Vec<Token> {
        range.collect()
    }

    fn computed(holder: Holder, tokens: &[Token]) -> Candidate<'_> {
        Candidate { holder, tokens, resident: tokens.len(), cut_from: 0 }
    }

    fn kept(id: SeqId, tokens: &[Token]) -> Candidate<'_> {
        computed(Holder::Kept(id), tokens)
    }

    #[test]
    fn chooses_the_longest_prefix() {
        let long = tokens(0..1000);
        let turn = tokens(0..200);
        let other = [tokens(0..150), tokens(5000..5500)].concat();
        let full = May { share: false, follow: true };
        let reading = |resident| Candidate { resident, ..computed(Holder::Reading(3, 9), &long) };
        let host = |tokens| computed(Holder::Host(4), tokens);
        let cases: Vec<Case<'_>> = vec![
            ("empty", vec![], vec![], FREELY, Reuse::Nothing),
            ("nobody", tokens(0..50), vec![], FREELY, Reuse::Nothing),
            ("too short", tokens(0..50), vec![kept(1, &long[..15])], FREELY, Reuse::Nothing),
            ("next turn", tokens(0..300), vec![kept(1, &turn)], FREELY, Reuse::Take { id: 1, length: 200 }),
            ("same again", tokens(0..200), vec![kept(1, &turn)], FREELY, Reuse::Take { id: 1, length: 199 }),
            ("a part of much", tokens(0..300), vec![kept(1, &long)], FREELY, Reuse::Share { id: 1, length: 299 }),
            ("no free id", tokens(0..300), vec![kept(1, &long)], full, Reuse::Take { id: 1, length: 299 }),
            (
                "longest",
                tokens(0..300),
                vec![kept(1, &other), kept(2, &turn)],
                FREELY,
                Reuse::Take { id: 2, length: 200 },
            ),
            (
                "running",
                tokens(0..300),
                vec![kept(1, &other), computed(Holder::Running(3), &turn)],
                FREELY,
                Reuse::Share { id: 3, length: 200 },
            ),
            ("host", tokens(0..300), vec![host(&turn)], FREELY, Reuse::Restore { entry: 4, length: 200 }),
            (
                "cells are nearer than the host",
                tokens(0..300),
                vec![host(&turn), kept(1, &other)],
                FREELY,
                Reuse::Share { id: 1, length: 150 },
            ),
            ("being read", tokens(0..1100), vec![reading(0)], FREELY, Reuse::Follow { leader: 9, length: 1000 }),
            ("read nearly", tokens(0..1100), vec![reading(950)], FREELY, Reuse::Share { id: 3, length: 950 }),
            (
                "does not wait",
                tokens(0..1100),
                vec![reading(500)],
                May { follow: false, ..FREELY },
                Reuse::Share { id: 3, length: 500 },
            ),
            (
                "more is there already",
                tokens(0..1100),
                vec![reading(10), kept(1, &long)],
                FREELY,
                Reuse::Take { id: 1, length: 1000 },
            ),
        ];
        for (name, prompt, candidates, may, expected) in cases {
            let found = choose(&prompt, candidates.into_iter(), may).reuse;
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn a_state_that_cannot_be_cut_is_whole_or_nothing() {
        let turn = tokens(0..200);
        let fixed = Candidate { cut_from: usize::MAX, ..kept(1, &turn) };
        let window = Candidate { cut_from: 150, ..kept(1, &turn) };
        let parted = |at: i32| [tokens(0..at), tokens(9000..9300)].concat();
        let cases = [
            ("goes on", tokens(0..300), fixed, Reuse::Take { id: 1, length: 200 }, None),
            ("the same again", tokens(0..200), fixed, Reuse::Nothing, Some(199)),
            ("parts from it", parted(180), fixed, Reuse::Nothing, Some(180)),
            ("parts early", parted(40), fixed, Reuse::Nothing, None),
            ("in the window", parted(160), window, Reuse::Take { id: 1, length: 160 }, None),
            ("before the window", parted(140), window, Reuse::Nothing, Some(140)),
        ];
        for (name, prompt, candidate, reuse, border) in cases {
            assert_eq!(choose(&prompt, [candidate].into_iter(), FREELY), Choice { reuse, border }, "{name}");
        }
    }

    #[test]
    fn waiting_has_an_end() {
        let mut follow = Follow::new(7, 100);
        assert_eq!(follow.look(Some(0), true), Patience::Wait);
        assert_eq!(follow.look(Some(64), true), Patience::Wait);
        for _ in 0..PATIENCE {
            assert_eq!(follow.look(Some(64), true), Patience::Wait);
            assert_eq!(follow.look(Some(64), false), Patience::Wait, "streams had the turn");
        }
        assert_eq!(follow.look(Some(64), true), Patience::Begin);
        assert_eq!(follow.look(Some(100), true), Patience::Choose);
        assert_eq!(follow.look(None, true), Patience::Choose);
    }

    fn holder() -> impl Strategy<Value = Holder> {
        prop_oneof![
            (0..4).prop_map(Holder::Kept),
            (4..8).prop_map(Holder::Running),
            (8..12, 0u64..4).prop_map(|(id, serial)| Holder::Reading(id, serial)),
            (0u64..4).prop_map(Holder::Host),
        ]
    }

    fn length(reuse: Reuse) -> usize {
        match reuse {
            Reuse::Nothing => 0,
            Reuse::Take { length, .. }
            | Reuse::Share { length, .. }
            | Reuse::Restore { length, .. }
            | Reuse::Follow { length, .. } => length,
        }
    }

    proptest! {
        /// What is chosen has the prompt's own tokens, is computed (or will be), and can be cut there.
        #[test]
        fn a_choice_is_always_possible(
            prompt in proptest::collection::vec(0i32..2, 0..300),
            held in proptest::collection::vec((holder(), 0usize..300, 0usize..40, 0usize..400, 0usize..400), 0..6),
            share: bool, follow: bool,
        ) {
            let held: Vec<_> = held.into_iter().map(|(holder, same, more, resident, cut_from)| {
                let same = same.min(prompt.len());
                let tokens = [&prompt[..same], &vec![7; more]].concat();
                let resident = if matches!(holder, Holder::Reading(..)) { resident.min(tokens.len()) } else { tokens.len() };
                (holder, tokens, resident, cut_from)
            }).collect();
            let candidates = held.iter().map(|(holder, tokens, resident, cut_from)| {
                Candidate { holder: *holder, tokens, resident: *resident, cut_from: *cut_from }
            });
            let Choice { reuse, border } = choose(&prompt, candidates, May { share, follow });
            prop_assert!(length(reuse) < prompt.len().max(1));
            prop_assert!(border.is_none_or(|border| border > length(reuse) && border < prompt.len()));
            let fits = |wanted: Holder| held.iter().any(|(holder, tokens, resident, cut_from)| {
                let length = length(reuse);
                let right = match (wanted, *holder) {
                    (Holder::Running(id), Holder::Kept(other) | Holder::Running(other) | Holder::Reading(other, _)) => id == other,
                    (wanted, holder) => wanted == holder,
                };
                right && common(&prompt, tokens) >= length && *resident >= length && (length == *resident || length >= *cut_from)
            });
            match reuse {
                Reuse::Nothing => {}
                Reuse::Take { id, .. } => prop_assert!(fits(Holder::Kept(id))),
                Reuse::Share { id, .. } => prop_assert!(share && fits(Holder::Running(id))),
                Reuse::Restore { entry, .. } => prop_assert!(fits(Holder::Host(entry))),
                Reuse::Follow { leader, length } => {
                    let leads = |holder| matches!(holder, Holder::Reading(_, serial) if serial == leader);
                    let found = held.iter().any(|held| leads(held.0) && common(&prompt, &held.1) >= length);
                    prop_assert!(follow && found);
                }
            }
        }
    }
}

//! Pure: where copies of a state that cannot be cut are made while a prompt is read.
//!
//! A conversation's next turn seldom begins with all of this one: reasoning is taken out of it, the answer is written by the
//! template instead of the model, a question is put differently. But it parts from it where a message ends, so there the
//! next turn finds a copy.

use super::host;
use super::media;
use super::request::Token;

/// Copies that one prompt makes where messages end; of more the last ones count.
pub(super) const MAX_MESSAGES: usize = 4;

/// So few tokens behind another copy are read again: that costs less than a copy.
const NEAR: usize = 32;

/// Lengths of the prompt at which its state is copied, in order: where messages end, where another prompt has `parted` from
/// it, and one token before its end.
pub(super) fn places(prompt: &[Token], messages: &[usize], parted: Option<usize>) -> Vec<usize> {
    let end = media::border(prompt, prompt.len().saturating_sub(1));
    let mut ends: Vec<usize> = messages.iter().map(|&place| media::border(prompt, place.min(end))).collect();
    ends.sort_unstable();
    ends.dedup();
    ends.retain(|&place| place >= host::SHORTEST && place < end);
    ends.drain(..ends.len().saturating_sub(MAX_MESSAGES));
    let mut places: Vec<usize> = Vec::with_capacity(ends.len() + 2);
    for place in ends.into_iter().chain([end]) {
        if places.last().is_none_or(|last| place >= last + NEAR) {
            places.push(place);
        }
    }
    if let Some(parted) = parted.filter(|parted| !places.contains(parted)) {
        places.push(parted);
        places.sort_unstable();
    }
    places
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, where messages end, where another parted, the places.
    type Case<'a> = (&'a str, &'a [usize], Option<usize>, &'a [usize]);

    #[test]
    fn copies_lie_where_messages_end() {
        let prompt: Vec<Token> = (0..500).collect();
        let cases: [Case<'_>; 9] = [
            ("text", &[], None, &[499]),
            ("parted", &[], Some(200), &[200, 499]),
            ("a conversation", &[100, 300, 420], None, &[100, 300, 420, 499]),
            ("parted at a message", &[100, 300], Some(300), &[100, 300, 499]),
            ("too short to be worth it", &[10, 63, 64], None, &[64, 499]),
            ("a short message", &[300, 320, 332], None, &[300, 332, 499]),
            ("nearly all", &[300, 480], None, &[300, 480]),
            ("many", &[70, 110, 150, 190, 230, 270, 310], None, &[190, 230, 270, 310, 499]),
            ("not in it", &[500, 9000, usize::MAX], None, &[499]),
        ];
        for (name, messages, parted, expected) in cases {
            assert_eq!(places(&prompt, messages, parted), expected, "{name}");
        }
        assert_eq!(places(&[], &[5], None), [0]);
    }

    proptest! {
        #[test]
        fn copies_are_few_and_in_order(
            length in 1usize..600,
            messages in proptest::collection::vec(0usize..700, 0..20),
            parted in proptest::option::of(0.0f64..1.0),
        ) {
            let prompt = vec![1; length];
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "small")]
            let parted = parted.map(|part| (part * length as f64) as usize);
            let places = places(&prompt, &messages, parted);
            prop_assert!(places.len() <= MAX_MESSAGES + 2);
            prop_assert!(places.is_sorted_by(|left, right| left < right));
            prop_assert!(places.iter().all(|&place| place < length));
            prop_assert!(parted.is_none_or(|parted| places.contains(&parted)));
        }
    }
}

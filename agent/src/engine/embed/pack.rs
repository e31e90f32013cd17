//! Pure: which texts go into the next call.
//!
//! The requests take turns, one text each, so that one with a thousand texts does not hold up one with a single text.
//! Who begins moves on with every call; the first text always goes, however long it is.

/// What fits into a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Tokens, unless the first text alone has more.
    pub(super) tokens: u32,
    /// Texts.
    pub(super) texts: usize,
}

/// For each text of the next call the request it is of, given how many requests there are, which of them begins, and the
/// length of the `n`th text that a request has left. A request's texts are taken in their order.
pub(super) fn pack(
    requests: usize,
    first: usize,
    room: Room,
    length: impl Fn(usize, usize) -> Option<u32>,
) -> Vec<usize> {
    let mut taken = vec![0; requests];
    let mut picks = Vec::new();
    let mut left = room.tokens;
    loop {
        let before = picks.len();
        for turn in 0..requests {
            let request = (first + turn) % requests;
            let Some(length) = length(request, taken[request]) else { continue };
            if picks.len() < room.texts && (length <= left || picks.is_empty()) {
                left = left.saturating_sub(length);
                taken[request] += 1;
                picks.push(request);
            }
        }
        if picks.len() == before {
            return picks;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn picks(requests: &[&[u32]], first: usize, tokens: u32, texts: usize) -> Vec<usize> {
        let length = |request: usize, text: usize| requests[request].get(text).copied();
        pack(requests.len(), first, Room { tokens, texts }, length)
    }

    #[test]
    fn packs() {
        assert_eq!(picks(&[], 0, 512, 8), [] as [usize; 0]);
        assert_eq!(picks(&[&[10, 10, 10]], 0, 512, 8), [0, 0, 0]);
        assert_eq!(picks(&[&[10, 10, 10], &[5]], 0, 512, 8), [0, 1, 0, 0], "in turn");
        assert_eq!(picks(&[&[10, 10, 10], &[5]], 1, 512, 8), [1, 0, 0, 0], "another begins");
        assert_eq!(picks(&[&[10; 20]], 0, 512, 8).len(), 8);
        assert_eq!(picks(&[&[300, 300], &[200], &[100]], 0, 512, 8), [0, 1], "what does not fit waits");
        assert_eq!(picks(&[&[9000], &[200]], 0, 512, 8), [0], "a long text goes alone");
    }

    proptest! {
        #[test]
        fn a_call_is_never_empty_and_never_too_full(
            requests in proptest::collection::vec(proptest::collection::vec(1u32..700, 0..6), 1..6),
            first in 0usize..6, tokens in 1u32..600, texts in 1usize..10,
        ) {
            let borrowed: Vec<&[u32]> = requests.iter().map(Vec::as_slice).collect();
            let first = first % requests.len();
            let found = picks(&borrowed, first, tokens, texts);
            prop_assert_eq!(found.is_empty(), requests.iter().all(Vec::is_empty));
            prop_assert!(found.len() <= texts);
            let mut taken = vec![0; requests.len()];
            let mut sum = 0;
            for &request in &found {
                sum += requests[request][taken[request]];
                taken[request] += 1;
            }
            prop_assert!(sum <= tokens || found.len() == 1);
            prop_assert!(requests[first].is_empty() || taken[first] > 0, "who begins gets a text through");
        }
    }
}

//! Pure: where the messages' texts stand in the prompt that the template made of them, in tokens. So one tokenisation
//! tells the size of every message.

use std::ops::Range;

use super::MARK;

/// How often a prompt is looked through for texts that do not stand in it as they are.
const LOOKS: usize = 16;

/// Tokens of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    /// With what the template writes around it.
    pub(crate) whole: u32,
    /// Its text alone.
    pub(crate) text: u32,
}

/// A message, as far as its size goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'t> {
    /// Its text.
    pub(crate) text: &'t str,
    /// Bytes of what else it says.
    pub(crate) more: usize,
}

impl Part<'_> {
    fn weight(&self) -> usize {
        self.text.len() + self.more + 1
    }
}

/// A prompt and where its messages stand in it.
pub(crate) struct Layout {
    /// Where each token ends, in bytes.
    ends: Vec<usize>,
    /// Where the text of each message stands, in bytes; `None`: nowhere as it is.
    found: Vec<Option<Range<usize>>>,
}

impl Layout {
    /// `pieces`: what each token of the prompt stands for.
    pub(crate) fn new(pieces: impl Iterator<Item = Vec<u8>>, parts: &[Part<'_>]) -> Self {
        let mut bytes = Vec::new();
        let mut ends = Vec::new();
        for piece in pieces {
            bytes.extend(piece);
            ends.push(bytes.len());
        }
        // A prompt is text; of one that is not, sizes are estimated.
        let prompt = String::from_utf8(bytes).unwrap_or_default();
        let mut budget = prompt.len().saturating_mul(LOOKS);
        let mut from = 0;
        let mut find = |part: &Part<'_>| {
            // Templates strip what is white at the ends.
            let text = part.text.trim();
            if text.is_empty() || budget == 0 {
                return None;
            }
            let at = prompt[from..].find(text).map(|at| from + at);
            let end = at.map_or(prompt.len(), |at| at + text.len());
            budget = budget.saturating_sub(end - from);
            let at = at?;
            from = end;
            Some(at..end)
        };
        let found = parts.iter().map(&mut find).collect();
        Self { ends, found }
    }

    /// For each message the tokens of the prompt before the end of its text; `None`: it does not stand there as it is.
    pub(crate) fn ends(&self) -> impl Iterator<Item = Option<usize>> {
        let before = |found: &Range<usize>| self.ends.partition_point(|&end| end <= found.end);
        self.found.iter().map(move |found| found.as_ref().map(before))
    }

    /// Tokens of the prompt.
    pub(crate) fn tokens(&self) -> u32 {
        count(self.ends.len())
    }

    /// The token that the byte belongs to.
    fn token_at(&self, byte: usize) -> usize {
        self.ends.partition_point(|&end| end <= byte)
    }

    /// The tokens of a text, those at its ends included.
    fn tokens_of(&self, bytes: &Range<usize>) -> Range<usize> {
        let last = self.ends.partition_point(|&end| end < bytes.end);
        self.token_at(bytes.start)..(last + 1).min(self.ends.len())
    }

    /// The size of each message. What stands between two texts that were found counts to the first of them, or is shared
    /// by those between them that were not found.
    pub(crate) fn sizes(&self, parts: &[Part<'_>]) -> Vec<Size> {
        let mut sizes = vec![Size::default(); parts.len()];
        let known =
            self.found.iter().enumerate().filter_map(|(at, found)| Some((at, self.token_at(found.as_ref()?.start))));
        let borders: Vec<(usize, usize)> = known.chain([(parts.len(), self.ends.len())]).collect();
        let mut before = (0, 0);
        for border in borders {
            let (from, to) = (before.0, border.0);
            let tokens = border.1.saturating_sub(before.1);
            let all: usize = parts[from..to].iter().map(Part::weight).sum();
            for at in from..to {
                let whole = tokens.saturating_mul(parts[at].weight()) / all.max(1);
                sizes[at] =
                    Size { whole: count(whole), text: if parts[at].text.trim().is_empty() { 0 } else { count(whole) } };
            }
            before = border;
        }
        for (size, found) in sizes.iter_mut().zip(&self.found) {
            if let Some(found) = found {
                size.text = count(self.tokens_of(found).len());
                size.whole = size.whole.max(size.text);
            }
        }
        sizes
    }

    /// A message's text without its middle: `head` and `tail` tokens of it are left, cut where tokens end.
    pub(crate) fn cut(&self, message: usize, text: &str, size: u32, head: u32, tail: u32) -> String {
        let text = text.trim();
        let (from, to) = if let Some(found) = self.found.get(message).and_then(Option::as_ref) {
            let tokens = self.tokens_of(found);
            let border = |token: usize| match token.checked_sub(1) {
                Some(before) if token > tokens.start => self.ends[before].clamp(found.start, found.end),
                _ => found.start,
            };
            let head = border(tokens.start.saturating_add(head as usize).min(tokens.end));
            let tail = match tail {
                0 => found.end,
                tail => border(tokens.end.saturating_sub(tail as usize).max(tokens.start)),
            };
            (head - found.start, tail - found.start)
        } else {
            let part = |tokens: u32| text.len().saturating_mul(tokens as usize) / (size as usize).max(1);
            (part(head), text.len().saturating_sub(part(tail)))
        };
        let (from, to) = (text.floor_char_boundary(from.min(text.len())), text.ceil_char_boundary(to.min(text.len())));
        if from >= to {
            return text.to_owned();
        }
        format!("{}{MARK}{}", &text[..from], &text[to..])
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of three bytes; the template writes `<role>text</role>`.
    fn layout(prompt: &str, parts: &[Part<'_>]) -> Layout {
        Layout::new(prompt.as_bytes().chunks(3).map(<[u8]>::to_vec), parts)
    }

    fn parts<'t>(texts: &[&'t str]) -> Vec<Part<'t>> {
        texts.iter().map(|text| Part { text, more: 0 }).collect()
    }

    #[test]
    fn sizes_come_from_one_rendering() {
        let parts = parts(&["hello there", "", "  how are you?\n", "fine"]);
        let layout = layout("<u>hello there</u><a></a><u>how are you?</u><a>fine</a>", &parts);
        assert_eq!(layout.tokens(), 19);
        let sizes = layout.sizes(&parts);
        // "hello there" begins with the second token, "how…" with the tenth; the empty one has its share.
        assert_eq!(sizes[0], Size { whole: 7, text: 4 });
        assert_eq!(sizes[1], Size { whole: 0, text: 0 });
        assert_eq!(sizes[2], Size { whole: 6, text: 5 });
        assert_eq!(sizes[3], Size { whole: 4, text: 2 });
        assert!(sizes.iter().map(|size| size.whole).sum::<u32>() <= layout.tokens());
    }

    #[test]
    fn texts_end_before_a_token_that_goes_on() {
        let parts = parts(&["hello there", "XX", "fine"]);
        let layout = layout("<u>hello there</u><u>fine</a>", &parts);
        // Tokens of three bytes: "e</" and "e</" hold the ends.
        assert_eq!(layout.ends().collect::<Vec<_>>(), [Some(4), None, Some(8)]);
    }

    #[test]
    fn what_the_template_rewrites_is_estimated() {
        let parts = parts(&["abcdefghi", "XXXXXXXXX", "jkl"]);
        let layout = layout("<u>abcdefghi<t>\"xxxxxxxxx\"<u>jkl", &parts);
        let sizes = layout.sizes(&parts);
        assert_eq!(sizes[0].text, 3);
        assert_eq!(sizes[0].whole + sizes[1].whole, 8, "{sizes:?}");
        assert_eq!(sizes[1].text, sizes[1].whole);
        // Half of it, by its bytes.
        assert_eq!(layout.cut(1, "XXXXXXXXX", 9, 2, 2), format!("XX{MARK}XX"));
    }

    #[test]
    fn texts_are_cut_where_tokens_end() {
        let text = "abcdefghijklmnopq";
        let parts = parts(&[text]);
        // Tokens: <u> abc def ghi jkl mno pq<
        let layout = layout("<u>abcdefghijklmnopq</u>", &parts);
        assert_eq!(layout.cut(0, text, 6, 2, 2), format!("abcdef{MARK}mnopq"));
        assert_eq!(layout.cut(0, text, 6, 0, 1), format!("{MARK}pq"));
        assert_eq!(layout.cut(0, text, 6, 1, 0), format!("abc{MARK}"));
        assert_eq!(layout.cut(0, text, 6, 0, 0), MARK);
        assert_eq!(layout.cut(0, text, 6, 4, 4), text, "nothing to cut");
    }

    #[test]
    fn a_character_is_never_cut() {
        let text = "aéééééé";
        let parts = parts(&[text]);
        let layout = layout(text, &parts);
        for (head, tail) in [(1, 1), (2, 1), (0, 2)] {
            let cut = layout.cut(0, text, 5, head, tail);
            let (left, right) = cut.split_once(MARK).unwrap();
            assert!(text.starts_with(left) && text.ends_with(right), "{cut}");
        }
    }

    #[test]
    fn what_cannot_be_found_is_not_looked_for_without_end() {
        let prompt = "a".repeat(100_000);
        let texts: Vec<String> = (0..4096).map(|number| format!("b{number}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let parts = parts(&texts);
        let layout = layout(&prompt, &parts);
        assert!(layout.found.iter().all(Option::is_none));
        assert!(layout.sizes(&parts).iter().all(|size| (4..=8).contains(&size.whole)));
    }
}

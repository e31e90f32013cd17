//! How long a model may think: counts the tokens between the marks of reasoning, and has the end said when they are too
//! many. Pure: it is told what was generated, and asked what must come.
//!
//! As llama.cpp's `reasoning-budget`, but for one thing: marks are found in the text and not among the tokens, because a
//! tokenizer may join a mark with what follows it.

use super::request::Token;

/// Bytes of the marks and of the text before the end, each.
pub const MAX_BUDGET_TEXT_BYTES: usize = 4096;

/// Tokens over the budget at most: to complete a character, or an end that the model has begun by itself.
const GRACE: u32 = 8;

/// What a request says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReasoningBudget {
    /// Tokens of each block of reasoning; 0: it ends as soon as it begins.
    pub tokens: u32,
    /// The prompt ends within reasoning.
    pub begun: bool,
    /// Begins reasoning; not empty.
    pub start: String,
    /// Any of them ends it; none is empty.
    pub ends: Vec<String>,
    /// What is said when the budget is used up: the end, after a message if there is one.
    pub forced: Vec<Token>,
}

/// The budget of one answer.
pub(super) struct Budget {
    tokens: u32,
    start: Vec<u8>,
    ends: Vec<Vec<u8>>,
    forced: Vec<Token>,
    state: State,
    /// The last bytes said, in which a mark may have begun.
    tail: Vec<u8>,
    longest: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It does not think.
    Silent,
    /// It thinks, and may do so for so many more tokens; less than 0 is grace.
    Thinking { left: i64 },
    /// The end is said; so many of its tokens are.
    Ending { said: usize },
}

impl Budget {
    pub(super) fn new(asked: ReasoningBudget) -> Self {
        let ReasoningBudget { tokens, begun, start, ends, forced } = asked;
        let ends: Vec<Vec<u8>> = ends.into_iter().map(String::into_bytes).filter(|end| !end.is_empty()).collect();
        let longest = ends.iter().map(Vec::len).chain([start.len()]).max().unwrap_or(0);
        let start = start.into_bytes();
        let mut budget = Self { tokens, start, ends, forced, state: State::Silent, tail: Vec::new(), longest };
        if begun {
            budget.state = State::Thinking { left: i64::from(tokens) };
            budget.look();
        }
        budget
    }

    /// The token that must come next, if one must.
    pub(super) fn forces(&self) -> Option<Token> {
        match self.state {
            State::Ending { said } => self.forced.get(said).copied(),
            State::Silent | State::Thinking { .. } => None,
        }
    }

    /// A token came; `piece` is its text, marks included.
    pub(super) fn accept(&mut self, piece: &[u8]) {
        if let State::Ending { said } = self.state {
            let said = said + 1;
            self.state = if said < self.forced.len() { State::Ending { said } } else { State::Silent };
            self.tail.clear();
            return;
        }
        let thought = matches!(self.state, State::Thinking { .. });
        self.tail.extend_from_slice(piece);
        loop {
            let found = match self.state {
                State::Thinking { .. } => first(&self.tail, self.ends.iter().map(Vec::as_slice)),
                _ => first(&self.tail, [self.start.as_slice()].into_iter()),
            };
            let Some(end) = found else { break };
            self.tail.drain(..end);
            self.state = match self.state {
                State::Thinking { .. } => State::Silent,
                _ => State::Thinking { left: i64::from(self.tokens) },
            };
        }
        if let State::Thinking { left } = &mut self.state
            && thought
        {
            // The token that began it is not a thought.
            *left -= 1;
        }
        self.look();
        let spare = self.tail.len().saturating_sub(self.longest.max(4));
        self.tail.drain(..spare);
    }

    /// Ends reasoning that is over its budget.
    fn look(&mut self) {
        let State::Thinking { left } = self.state else { return };
        let may_wait = left > -i64::from(GRACE) && (self.splits_character() || self.begins_end());
        if left <= 0 && !may_wait && !self.forced.is_empty() {
            self.state = State::Ending { said: 0 };
            self.tail.clear();
        }
    }

    /// What must come cannot: the grammar does not allow it. The model goes on as it likes.
    pub(super) fn give_up(&mut self) {
        self.state = State::Silent;
        self.tail.clear();
    }

    /// The text stops within a character.
    fn splits_character(&self) -> bool {
        let last = &self.tail[self.tail.len().saturating_sub(4)..];
        // The beginning may be torn off; what counts is the last lead byte.
        let lead = last.iter().rposition(|byte| *byte & 0xc0 != 0x80);
        lead.is_some_and(|at| std::str::from_utf8(&last[at..]).is_err_and(|error| error.error_len().is_none()))
    }

    /// The model has begun to end by itself.
    fn begins_end(&self) -> bool {
        let begun = |end: &Vec<u8>| (1..end.len()).any(|length| self.tail.ends_with(&end[..length]));
        self.ends.iter().any(begun)
    }
}

/// Where the first of the marks in `text` ends; the longest of those that begin together.
fn first<'m>(text: &[u8], marks: impl Iterator<Item = &'m [u8]>) -> Option<usize> {
    let place = |mark: &'m [u8]| {
        let at = text.windows(mark.len().max(1)).position(|window| window == mark)?;
        Some((at, std::cmp::Reverse(at + mark.len())))
    };
    marks.filter_map(place).min().map(|(_, std::cmp::Reverse(end))| end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of the end are 100 and more.
    fn budget(tokens: u32, begun: bool) -> Budget {
        Budget::new(ReasoningBudget {
            tokens,
            start: "<think>".to_owned(),
            ends: vec!["</think>".to_owned(), "<|end|>".to_owned()],
            forced: vec![100, 101],
            begun,
        })
    }

    /// Plays what the model would like to say; `!` is a token that was forced.
    fn play(mut budget: Budget, pieces: &[&[u8]]) -> String {
        let mut said = Vec::new();
        let mut pieces = pieces.iter().copied();
        loop {
            if let Some(token) = budget.forces() {
                assert!(token >= 100);
                said.push(b'!');
                budget.accept(b"");
                continue;
            }
            let Some(piece) = pieces.next() else { return String::from_utf8_lossy(&said).into_owned() };
            said.extend_from_slice(piece);
            budget.accept(piece);
        }
    }

    #[test]
    fn reasoning_ends_when_its_budget_does() {
        type Case = (&'static str, u32, bool, &'static [&'static [u8]], &'static str);
        let cases: [Case; 14] = [
            ("the prompt has begun it", 2, true, &[b"a", b"b", b"c"], "ab!!c"),
            ("the prompt says nothing of it", 1, false, &[b"a", b"b", b"c"], "abc"),
            ("the model begins", 1, false, &[b"<think>", b"a", b"b"], "<think>a!!b"),
            ("its mark is several tokens", 1, false, &[b"<th", b"ink", b">", b"a", b"b"], "<think>a!!b"),
            ("its mark ends within a token", 1, false, &[b"<think>\n\n", b"a", b"b"], "<think>\n\na!!b"),
            ("no thought at all", 0, true, &[b"a"], "!!a"),
            ("none when the model begins", 0, false, &[b"x", b"<think>", b"a"], "x<think>!!a"),
            ("it ends in time", 3, true, &[b"a", b"</think>", b"b", b"c", b"d", b"e"], "a</think>bcde"),
            ("by another mark", 3, true, &[b"a", b"<|end|>\n", b"c", b"d", b"e"], "a<|end|>\ncde"),
            ("each block has its own", 1, true, &[b"a", b"b", b"<think>", b"c", b"d"], "a!!b<think>c!!d"),
            ("a character is completed", 1, true, &[&[0xf0, 0x9f], &[0xa6], &[0x99], b"b"], "🦙!!b"),
            ("an end that was begun is ended", 1, true, &[b"a</", b"think", b">", b"b", b"c"], "a</think>bc"),
            ("what only looked like one is not", 1, true, &[b"a</", b"div", b"b"], "a</div!!b"),
            (
                "grace has an end",
                1,
                true,
                &[b"<", b"<", b"<", b"<", b"<", b"<", b"<", b"<", b"<", b"<"],
                "<<<<<<<<<!!<",
            ),
        ];
        for (about, tokens, begun, pieces, expected) in cases {
            assert_eq!(play(budget(tokens, begun), pieces), expected, "{about}");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut budget = budget(u32::MAX, true);
        for _ in 0..1000 {
            budget.accept(&[b'x'; 100]);
        }
        assert!(budget.tail.len() <= 16);
        assert_eq!(budget.state, State::Thinking { left: i64::from(u32::MAX) - 1000 });
        budget.give_up();
        assert_eq!(budget.forces(), None);
    }
}

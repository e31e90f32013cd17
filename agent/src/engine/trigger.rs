//! Pure: what makes a lazy grammar begin.

use std::sync::Arc;

use regex::bytes::{Regex, RegexBuilder};

use super::request::Token;
use super::sampling::Triggers;

/// Triggers of each kind.
const MAX_TRIGGERS: usize = 256;

/// Bytes of one trigger.
const MAX_TRIGGER_BYTES: usize = 4096;

/// Bytes of an output that patterns look at; one that is longer has begun without them.
const MAX_PATTERN_INPUT: usize = 64 << 10;

/// Waits for a trigger.
#[derive(Clone, Debug)]
pub(super) struct Trigger {
    triggers: Arc<Compiled>,
    /// What the output has said, as far as a trigger may still need it.
    said: Vec<u8>,
    /// Bytes of the output that are no longer in `said`.
    dropped: usize,
}

#[derive(Debug)]
struct Compiled {
    words: Vec<String>,
    longest: usize,
    patterns: Vec<Regex>,
    tokens: Vec<Token>,
}

impl Trigger {
    pub(super) fn new(triggers: &Triggers) -> Result<Self, String> {
        let Triggers { words, patterns, tokens } = triggers;
        if words.len().max(patterns.len()).max(tokens.len()) > MAX_TRIGGERS {
            return Err(format!("a grammar may have {MAX_TRIGGERS} triggers of a kind"));
        }
        if words.iter().chain(patterns).any(|text| text.is_empty() || text.len() > MAX_TRIGGER_BYTES) {
            return Err(format!("a trigger must have 1 to {MAX_TRIGGER_BYTES} bytes"));
        }
        let compile = |pattern: &String| {
            let regex = RegexBuilder::new(pattern).size_limit(1 << 20).dfa_size_limit(1 << 20).build();
            regex.map_err(|error| format!("the trigger '{pattern}' is no regular expression: {error}"))
        };
        let compiled = Compiled {
            longest: words.iter().map(String::len).max().unwrap_or(0),
            words: words.clone(),
            patterns: patterns.iter().map(compile).collect::<Result<_, _>>()?,
            tokens: tokens.clone(),
        };
        Ok(Self { triggers: Arc::new(compiled), said: Vec::new(), dropped: 0 })
    }

    /// Whether the grammar begins with this token: then what it has to read, which may begin before the token.
    pub(super) fn begins(&self, token: Token, bytes: &[u8]) -> Option<Vec<u8>> {
        let Compiled { words, longest, patterns, tokens } = &*self.triggers;
        if tokens.contains(&token) {
            return Some(bytes.to_vec());
        }
        // A word that is not complete before this token ends in it.
        let from = self.said.len().saturating_sub(longest.saturating_sub(1));
        let mut recent = self.said[from..].to_vec();
        recent.extend_from_slice(bytes);
        let found = words.iter().filter_map(|word| find(&recent, word.as_bytes())).min();
        if let Some(start) = found {
            return Some(recent.split_off(start));
        }
        if patterns.is_empty() || self.dropped > 0 {
            return None;
        }
        let mut all = self.said.clone();
        all.extend_from_slice(bytes);
        let start = patterns.iter().find_map(|pattern| {
            let found = pattern.captures(&all)?;
            let group = found.iter().skip(1).flatten().find(|group| !group.is_empty());
            Some(group.or_else(|| found.get(0))?.start())
        })?;
        Some(all.split_off(start))
    }

    /// The token was no trigger.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.said.extend_from_slice(bytes);
        let keep = if self.triggers.patterns.is_empty() || self.dropped > 0 {
            self.triggers.longest
        } else {
            MAX_PATTERN_INPUT
        };
        // Not each time: moving what is left costs as much as it is long.
        if self.said.len() > keep + 4096 {
            let gone = self.said.len() - self.triggers.longest.min(keep);
            self.said.drain(..gone);
            self.dropped += gone;
        }
    }
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds tokens that are their pieces; says at which one the grammar begins, and with what.
    fn run(triggers: &Triggers, pieces: &[&str]) -> Option<(usize, String)> {
        let mut trigger = Trigger::new(triggers).unwrap();
        for (index, piece) in pieces.iter().enumerate() {
            if let Some(said) = trigger.begins(Token::try_from(index).unwrap(), piece.as_bytes()) {
                return Some((index, String::from_utf8(said).unwrap()));
            }
            trigger.push(piece.as_bytes());
        }
        None
    }

    fn words(words: &[&str]) -> Triggers {
        Triggers { words: words.iter().map(|&word| word.to_owned()).collect(), ..Triggers::default() }
    }

    fn pattern(pattern: &str) -> Triggers {
        Triggers { patterns: vec![pattern.to_owned()], ..Triggers::default() }
    }

    #[test]
    fn grammars_begin_with_their_trigger() {
        let begins = |index, said: &str| Some((index, said.to_owned()));
        assert_eq!(run(&words(&["<tool>"]), &["a <to", "ol", "> {", "x"]), begins(2, "<tool> {"));
        assert_eq!(run(&words(&["<tool>"]), &["a <tool", "<tool", "!"]), None);
        assert_eq!(run(&words(&["b", "ab"]), &["x", "ab"]), begins(1, "ab"), "the earliest one");
        let tokens = Triggers { tokens: vec![2], ..Triggers::default() };
        assert_eq!(run(&tokens, &["a", "b", "<t>", "c"]), begins(2, "<t>"));
        assert_eq!(run(&pattern(r"^\s*(\{)"), &[" ", " {\"", "x"]), begins(1, "{\""));
        assert_eq!(run(&pattern(r"^\s*(\{)"), &["x", " {\"", "x"]), None);
        assert_eq!(run(&pattern("(x)?call"), &["a ca", "ll("]), begins(1, "call("));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        for triggers in [words(&["<tool>"]), pattern("call"), words(&["never", "<tool>"])] {
            let mut trigger = Trigger::new(&triggers).unwrap();
            for _ in 0..20_000 {
                trigger.push(b"0123456789");
            }
            assert!(trigger.said.len() <= MAX_PATTERN_INPUT + 4096 + 10, "{}", trigger.said.len());
            trigger.push(b"<to");
            assert_eq!(trigger.begins(0, b"ol>"), triggers.patterns.is_empty().then(|| b"<tool>".to_vec()));
        }
        assert!(Trigger::new(&pattern("(")).is_err());
        assert!(Trigger::new(&words(&[""])).is_err());
        assert!(Trigger::new(&words(&["a"; 300])).is_err());
    }
}

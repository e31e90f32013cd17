//! A format's grammar in the engine's terms.

use crate::engine::chat::{ChatFormat, Trigger};
use crate::engine::{Grammar, Token, Triggers};

/// What the grammar must be beyond what llama.cpp makes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Demands {
    /// Nothing but reasoning comes before the first call: llama.cpp lets a model that must call talk first, for as long
    /// as it likes.
    pub(super) call_first: bool,
    /// One call at most: llama.cpp's grammar for calls without a common bracket allows any number.
    pub(super) one_call: bool,
}

/// `None` where anything may be said. `single` tells the one token that a text is.
pub(super) fn of(format: &ChatFormat, demands: Demands, single: impl Fn(&str) -> Option<Token>) -> Option<Grammar> {
    if format.grammar.is_empty() {
        return None;
    }
    let lazy = format.grammar_lazy.then(|| triggers(&format.triggers, single));
    let prefix = if format.grammar_lazy { String::new() } else { format.generation_prompt.clone() };
    Some(Grammar::Gbnf { source: demanded(&format.grammar, demands), lazy, prefix })
}

fn triggers(given: &[Trigger], single: impl Fn(&str) -> Option<Token>) -> Triggers {
    let mut triggers = Triggers::default();
    for trigger in given {
        match trigger {
            Trigger::Word(word) => match single(word) {
                Some(token) => triggers.tokens.push(token),
                None => triggers.words.push(word.clone()),
            },
            Trigger::Pattern(pattern) => triggers.patterns.push(without_lookahead(pattern)),
            Trigger::PatternFull(pattern) => {
                let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
                let pattern = pattern.strip_suffix('$').unwrap_or(pattern);
                triggers.patterns.push(format!("^{}$", without_lookahead(pattern)));
            }
        }
    }
    triggers
}

/// Writes `(?!word)`, which linear regular expressions do not have, as what may stand there instead.
fn without_lookahead(pattern: &str) -> String {
    let Some((before, rest)) = pattern.split_once("(?!") else { return pattern.to_owned() };
    let Some((word, after)) = rest.split_once(')') else { return pattern.to_owned() };
    if word.is_empty() || !word.chars().all(char::is_alphanumeric) {
        return pattern.to_owned();
    }
    let mut ways: Vec<String> = Vec::new();
    for (at, letter) in word.char_indices() {
        ways.push(format!("{}[^{letter}]", &word[..at]));
    }
    format!("{before}(?:{}){}", ways.join("|"), without_lookahead(after))
}

fn demanded(source: &str, demands: Demands) -> String {
    let mut lines: Vec<String> = source.lines().map(str::to_owned).collect();
    for line in &mut lines {
        if demands.call_first && line.starts_with("root ::= ") {
            let is_talk = |word: &&str| {
                let number = word.strip_prefix("until-").and_then(|word| word.strip_suffix('?'));
                !number.is_some_and(|number| number.chars().all(|digit| digit.is_ascii_digit()))
            };
            *line = line.split(' ').filter(is_talk).collect::<Vec<_>>().join(" ");
        }
        // Where calls may be left out llama.cpp writes the second, which never ends: each of the calls may be nothing.
        if line == "tool-calls ::= (tool-call space)+" || line == "tool-calls ::= (tool-call? space)+" {
            let calls = if demands.one_call { "tool-call space" } else { "(tool-call space)+" };
            *line = format!("tool-calls ::= {calls}");
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(text: &str) -> Option<Token> {
        (text == "<tool_call>").then_some(7)
    }

    #[test]
    fn no_grammar_is_none() {
        assert_eq!(of(&ChatFormat::default(), Demands::default(), single), None);
    }

    #[test]
    fn words_that_are_tokens_are_tokens() {
        let word = |word: &str| Trigger::Word(word.to_owned());
        let mut format = ChatFormat::default();
        "root ::= \"x\"".clone_into(&mut format.grammar);
        "p".clone_into(&mut format.generation_prompt);
        format.grammar_lazy = true;
        format.triggers = vec![
            word("<tool_call>"),
            word("[TOOL_CALLS]"),
            Trigger::Pattern(">>>(?!all)".to_owned()),
            Trigger::PatternFull("^\\s+to$".to_owned()),
        ];
        let Some(Grammar::Gbnf { source, lazy: Some(triggers), prefix }) = of(&format, Demands::default(), single)
        else {
            panic!("no lazy grammar")
        };
        assert_eq!((source.as_str(), prefix.as_str()), ("root ::= \"x\"", ""));
        let expected = Triggers {
            words: vec!["[TOOL_CALLS]".to_owned()],
            patterns: vec![">>>(?:[^a]|a[^l]|al[^l])".to_owned(), "^\\s+to$".to_owned()],
            tokens: vec![7],
        };
        assert_eq!(triggers, expected);
    }

    #[test]
    fn no_call_is_nothing() {
        let mut format = ChatFormat::default();
        "root ::= tool-call | tool-calls\ntool-calls ::= (tool-call? space)+".clone_into(&mut format.grammar);
        for (one_call, expected) in [(false, "(tool-call space)+"), (true, "tool-call space")] {
            let Some(Grammar::Gbnf { source, .. }) = of(&format, Demands { one_call, ..Demands::default() }, single)
            else {
                panic!("no grammar")
            };
            assert_eq!(source, format!("root ::= tool-call | tool-calls\ntool-calls ::= {expected}"));
        }
    }

    #[test]
    fn who_must_call_calls_first_and_once() {
        let source = "root ::= \"a\\n\" space (\"<think>\" until-13)? until-213? tool-calls\n\
                      tool-calls ::= (tool-call space)+\nuntil-213 ::= [^<]*";
        let mut format = ChatFormat::default();
        source.clone_into(&mut format.grammar);
        "a\n".clone_into(&mut format.generation_prompt);
        let demands = Demands { call_first: true, one_call: true };
        let Some(Grammar::Gbnf { source, lazy: None, prefix }) = of(&format, demands, single) else {
            panic!("no grammar")
        };
        assert_eq!(prefix, "a\n");
        assert_eq!(
            source,
            "root ::= \"a\\n\" space (\"<think>\" until-13)? tool-calls\ntool-calls ::= tool-call space\nuntil-213 ::= [^<]*"
        );
    }
}

//! Pure: where a text ends whose lines are limited, as editors ask for that complete a block of code.

use std::time::Duration;

/// Limits on the lines of an output; the default has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineLimits {
    /// Spaces and tabs that every line after the first begins with; the output ends before what is further left. 0: none.
    pub indent: u32,
    /// Ends with the first line that is whole so long after the first token.
    pub time: Option<Duration>,
}

/// The lines of one sequence on their way out.
#[derive(Debug, Default)]
pub(super) struct Lines {
    limits: LineLimits,
    /// Spaces and tabs of a line that has nothing else yet.
    blank: Option<u32>,
}

impl Lines {
    pub(super) fn new(limits: LineLimits) -> Self {
        Self { limits, blank: None }
    }

    /// Takes a piece of the text; `Some`: it ends after so many bytes of it.
    pub(super) fn pass(&mut self, text: &str, elapsed: Duration) -> Option<usize> {
        if self.limits == LineLimits::default() {
            return None;
        }
        for (place, char) in text.char_indices() {
            self.blank = match (self.blank, char) {
                (Some(blank), ' ' | '\t') => Some(blank.saturating_add(1)),
                // An empty line is one that begins further left, as with llama-server.
                (Some(blank), _) if blank < self.limits.indent => return Some(place),
                (_, '\n') => Some(0),
                _ => None,
            };
        }
        let late = self.limits.time.is_some_and(|time| elapsed > time);
        (late && text.contains('\n')).then_some(text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_further_left_ends_the_text() {
        for (indent, pieces, expected) in [
            (0, &["a\nb\n\nc"][..], "a\nb\n\nc"),
            (2, &["a\n  b\n  c"], "a\n  b\n  c"),
            (2, &["a\n  b\n c"], "a\n  b\n "),
            (2, &["a", "\n", " ", "\t", "b", "\n ", "c"], "a\n \tb\n "),
            (2, &["no lines"], "no lines"),
            (2, &["a\n\n  b"], "a\n"),
            (1, &["\n", "b"], "\n"),
            (4, &["é\n    ü\n   ö"], "é\n    ü\n   "),
        ] {
            let mut lines = Lines::new(LineLimits { indent, time: None });
            let mut passed = String::new();
            for piece in pieces {
                let end = lines.pass(piece, Duration::MAX);
                passed.push_str(&piece[..end.unwrap_or(piece.len())]);
                if end.is_some() {
                    break;
                }
            }
            assert_eq!(passed, expected, "{indent} {pieces:?}");
        }
    }

    #[test]
    fn time_ends_it_with_a_whole_line() {
        let mut lines = Lines::new(LineLimits { indent: 0, time: Some(Duration::from_millis(100)) });
        let mut pass = |text: &str, milliseconds| lines.pass(text, Duration::from_millis(milliseconds));
        assert_eq!(pass("a\n", 50), None);
        assert_eq!(pass("b", 150), None, "in the middle of a line");
        assert_eq!(pass(" c\n", 160), Some(3));
    }
}

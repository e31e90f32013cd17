//! Pure: bytes of tokens to text that may be shown: whole characters, and nothing of a stop text.

/// The text of one sequence on its way out.
#[derive(Debug, Default)]
pub(super) struct TextAssembler {
    stops: Vec<String>,
    /// The beginning of a character whose end has not come.
    bytes: Vec<u8>,
    /// Text that may be the beginning of a stop text.
    held: String,
    /// The stop text that came, as an index.
    matched: Option<usize>,
}

/// What [`TextAssembler::push`] lets through.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// May be shown; often empty.
    pub(super) text: String,
    /// A stop text came: `text` is what stood before it, and nothing follows.
    pub(super) stopped: bool,
}

impl TextAssembler {
    /// Holds back and ends at `stops`; empty ones are ignored.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), ..Self::default() }
    }

    /// Where the bytes of the next token go; call [`Self::advance`] afterwards.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Takes the bytes in the buffer.
    pub(super) fn advance(&mut self) -> Passed {
        self.decode();
        if self.stops.is_empty() {
            return Passed { text: std::mem::take(&mut self.held), stopped: false };
        }
        let found = self.stops.iter().enumerate().filter_map(|(at, stop)| Some((self.held.find(stop.as_str())?, at)));
        if let Some((start, stop)) = found.min() {
            self.matched = Some(stop);
            self.held.truncate(start);
            return Passed { text: std::mem::take(&mut self.held), stopped: true };
        }
        let safe = self.safe_length();
        let rest = self.held.split_off(safe);
        Passed { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The rest at the end of a generation: no stop text can come any more.
    pub(super) fn finish(&mut self) -> String {
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.held.push(char::REPLACEMENT_CHARACTER);
        }
        std::mem::take(&mut self.held)
    }

    /// Drops what was held back: the text ends before it, and with no stop text.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.held.clear();
        self.matched = None;
    }

    /// The stop text that ended it.
    pub(super) fn matched(&self) -> Option<&str> {
        self.stops.get(self.matched?).map(String::as_str)
    }

    /// Moves whole characters from `bytes` to `held`; bytes that can never become one turn into U+FFFD.
    fn decode(&mut self) {
        let mut done = 0;
        while done < self.bytes.len() {
            match std::str::from_utf8(&self.bytes[done..]) {
                Ok(text) => {
                    self.held.push_str(text);
                    done = self.bytes.len();
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    if let Ok(text) = std::str::from_utf8(&self.bytes[done..done + valid]) {
                        self.held.push_str(text);
                    }
                    done += valid;
                    let Some(bad) = error.error_len() else { break };
                    self.held.push(char::REPLACEMENT_CHARACTER);
                    done += bad;
                }
            }
        }
        self.bytes.drain(..done);
    }

    /// Length of the part of `held` that cannot belong to a stop text.
    fn safe_length(&self) -> usize {
        let mut safe = self.held.len();
        for stop in &self.stops {
            let longest = self.held.len().min(stop.len() - 1);
            let overlap = (1..=longest).rev().find(|&length| {
                let start = self.held.len() - length;
                self.held.as_bytes()[start..] == stop.as_bytes()[..length]
            });
            // A match of bytes begins at a character's first byte, because the stop text does.
            safe = safe.min(self.held.len() - overlap.unwrap_or(0));
        }
        safe
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, stop texts, pieces, texts that come out, whether it stopped.
    type Case<'a> = (&'a str, &'a [&'a str], &'a [&'a [u8]], &'a [&'a str], bool);

    fn run(stops: &[&str], pieces: &[&[u8]]) -> (Vec<String>, bool) {
        let mut assembler = TextAssembler::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut texts = Vec::new();
        for piece in pieces {
            assembler.buffer().extend_from_slice(piece);
            let Passed { text, stopped } = assembler.advance();
            texts.push(text);
            if stopped {
                return (texts, true);
            }
        }
        texts.push(assembler.finish());
        (texts, false)
    }

    #[test]
    fn lets_through_whole_characters_before_the_stop() {
        let cases: [Case<'_>; 9] = [
            ("plain", &[], &[b"He", b"llo"], &["He", "llo", ""], false),
            ("a character in parts", &[], &[b"\xc3", b"\xa9!"], &["", "\u{e9}!", ""], false),
            ("a character that never ends", &[], &[b"a\xf0\x9f"], &["a", "\u{fffd}"], false),
            ("no UTF-8", &[], &[b"a\xffb"], &["a\u{fffd}b", ""], false),
            ("stop in one piece", &["END"], &[b"one END two"], &["one "], true),
            ("stop across pieces", &["END"], &[b"one E", b"N", b"D two"], &["one ", "", ""], true),
            ("only the beginning of a stop", &["END"], &[b"one E", b"N", b"ough"], &["one ", "", "ENough", ""], false),
            ("the earliest stop", &["two", "one"], &[b"a one two"], &["a "], true),
            ("held at the end", &["END", ""], &[b"one EN"], &["one ", "EN"], false),
        ];
        for (name, stops, pieces, texts, stopped) in cases {
            let (found, ended) = run(stops, pieces);
            assert_eq!(
                (found.iter().map(String::as_str).collect::<Vec<_>>().as_slice(), ended),
                (texts, stopped),
                "{name}"
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_stop_shows(
            text in "[abé☃]{0,40}", stop in "[abé☃]{1,3}", cuts in proptest::collection::vec(1usize..4, 0..60),
        ) {
            let mut pieces = Vec::new();
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = more;
            }
            pieces.push(rest);
            let (texts, stopped) = run(&[&stop], &pieces);
            let shown = texts.concat();
            let start = text.find(&stop);
            prop_assert_eq!((shown.as_str(), stopped), (&text[..start.unwrap_or(text.len())], start.is_some()));
        }
    }
}

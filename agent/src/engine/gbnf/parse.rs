//! GBNF to rules of bytes. The syntax is llama.cpp's (grammars/README.md there).

use std::collections::HashMap;

use regex_syntax::utf8::Utf8Sequences;

use super::program::{MAX_OPS, Op, Program};

/// Bytes of a grammar's source.
pub(in crate::engine) const MAX_SOURCE_BYTES: usize = 256 << 10;

/// Parentheses within parentheses.
const MAX_DEPTH: usize = 64;

/// Most times that something may be said to be repeated; a larger maximum is no maximum, as in llama.cpp.
const MAX_REPETITIONS: u64 = 2000;

/// Finds the token that a text such as `<|think|>` is, if it is one token.
pub(in crate::engine) type FindToken<'f> = &'f dyn Fn(&str) -> Option<i32>;

/// Parses; the error names the line.
pub(super) fn parse(source: &str, find_token: FindToken<'_>) -> Result<Program, String> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(format!("the grammar has {} bytes; at most {MAX_SOURCE_BYTES} are allowed", source.len()));
    }
    let mut parser = Parser {
        source,
        at: 0,
        find_token,
        names: HashMap::new(),
        rules: Vec::new(),
        classes: HashMap::new(),
        ops: 0,
        depth: 0,
    };
    let parsed = parser.grammar();
    parsed.map_err(|reason| {
        let line = source.get(..parser.at).unwrap_or(source).matches('\n').count() + 1;
        format!("line {line} of the grammar: {reason}")
    })?;
    let Parser { names, rules, .. } = parser;
    let mut complete = Vec::with_capacity(rules.len());
    for (index, rule) in rules.into_iter().enumerate() {
        let Some(rule) = rule else {
            let name = names.iter().find(|(_, number)| **number as usize == index).map_or("?", |(name, _)| *name);
            return Err(format!("the grammar has no rule '{name}'"));
        };
        complete.push(rule);
    }
    let root = *names.get("root").ok_or("the grammar has no rule 'root'")?;
    Program::new(complete, root)
}

/// Alternatives of operations.
pub(super) type Alternatives = Vec<Vec<Op>>;

struct Parser<'s> {
    source: &'s str,
    at: usize,
    find_token: FindToken<'s>,
    names: HashMap<&'s str, u32>,
    /// `None`: named, but not yet defined.
    rules: Vec<Option<Alternatives>>,
    /// Character classes that are rules already.
    classes: HashMap<Vec<(u32, u32)>, Op>,
    ops: usize,
    depth: usize,
}

impl<'s> Parser<'s> {
    fn grammar(&mut self) -> Result<(), String> {
        self.space(true);
        while self.peek().is_some() {
            let name = self.name()?;
            self.space(false);
            if !self.eat("::=") {
                return Err("'::=' is expected after the name of a rule".to_owned());
            }
            self.space(true);
            let alternatives = self.alternatives(false)?;
            let rule = self.named(name);
            // The last definition counts, as in llama.cpp.
            self.rules[rule as usize] = Some(alternatives);
            match self.peek() {
                None | Some('\n' | '\r') => self.space(true),
                Some(other) => return Err(format!("unexpected '{other}'")),
            }
        }
        Ok(())
    }

    fn peek(&self) -> Option<char> {
        self.source[self.at..].chars().next()
    }

    fn next(&mut self) -> Result<char, String> {
        let next = self.peek().ok_or("the grammar ends too early")?;
        self.at += next.len_utf8();
        Ok(next)
    }

    fn eat(&mut self, text: &str) -> bool {
        let found = self.source[self.at..].starts_with(text);
        if found {
            self.at += text.len();
        }
        found
    }

    /// Skips blanks and comments, and new lines too where they mean nothing.
    fn space(&mut self, lines: bool) {
        while let Some(next) = self.peek() {
            match next {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if lines => self.at += 1,
                '#' => {
                    let rest = &self.source[self.at..];
                    self.at += rest.find(['\r', '\n']).unwrap_or(rest.len());
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Result<&'s str, String> {
        let rest = &self.source[self.at..];
        let end = rest.find(|letter: char| !is_name(letter)).unwrap_or(rest.len());
        if end == 0 {
            return Err("the name of a rule is expected".to_owned());
        }
        self.at += end;
        Ok(&rest[..end])
    }

    fn number(&mut self) -> Result<u64, String> {
        let rest = &self.source[self.at..];
        let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        let number = rest[..end].parse().map_err(|_| "a whole number is expected".to_owned())?;
        self.at += end;
        Ok(number)
    }

    fn named(&mut self, name: &'s str) -> u32 {
        let next = u32::try_from(self.rules.len()).unwrap_or(u32::MAX);
        let rule = *self.names.entry(name).or_insert(next);
        if rule == next {
            self.rules.push(None);
        }
        rule
    }

    /// A rule that has no name.
    fn anonymous(&mut self, alternatives: Alternatives) -> Result<Op, String> {
        self.count(alternatives.iter().map(|ops| ops.len() + 1).sum())?;
        let rule = u32::try_from(self.rules.len()).map_err(|_| too_large())?;
        self.rules.push(Some(alternatives));
        Ok(Op::Rule(rule))
    }

    fn count(&mut self, more: usize) -> Result<(), String> {
        self.ops = self.ops.saturating_add(more);
        if self.ops > MAX_OPS { Err(too_large()) } else { Ok(()) }
    }

    fn alternatives(&mut self, nested: bool) -> Result<Alternatives, String> {
        let mut alternatives = vec![self.sequence(nested)?];
        while self.peek() == Some('|') {
            self.at += 1;
            self.space(true);
            alternatives.push(self.sequence(nested)?);
        }
        Ok(alternatives)
    }

    fn sequence(&mut self, nested: bool) -> Result<Vec<Op>, String> {
        let mut sequence: Vec<Op> = Vec::new();
        // Where the last symbol begins, to which a repetition refers.
        let mut symbol = None;
        self.count(1)?;
        while let Some(next) = self.peek() {
            let before = sequence.len();
            match next {
                '"' => self.literal(&mut sequence)?,
                '[' => {
                    let class = self.class()?;
                    sequence.push(class);
                }
                '.' => {
                    self.at += 1;
                    let any = self.characters(vec![(0, 0x10_FFFF)])?;
                    sequence.push(any);
                }
                '<' | '!' => {
                    let token = self.token()?;
                    sequence.push(token);
                }
                '(' => {
                    self.at += 1;
                    self.depth += 1;
                    if self.depth > MAX_DEPTH {
                        return Err(format!("more than {MAX_DEPTH} parentheses within each other"));
                    }
                    self.space(true);
                    let inner = self.alternatives(true)?;
                    if !self.eat(")") {
                        return Err("')' is expected".to_owned());
                    }
                    self.depth -= 1;
                    let group = self.anonymous(inner)?;
                    sequence.push(group);
                }
                '*' | '+' | '?' | '{' => {
                    let (least, most) = self.repetition(next)?;
                    let start = symbol.ok_or("nothing stands before the repetition")?;
                    let repeated = sequence.split_off(start);
                    self.repeat(repeated, least, most, &mut sequence)?;
                    self.space(nested);
                    continue;
                }
                letter if is_name(letter) => {
                    let name = self.name()?;
                    let rule = self.named(name);
                    sequence.push(Op::Rule(rule));
                }
                _ => break,
            }
            self.count(sequence.len() - before)?;
            symbol = Some(before);
            self.space(nested);
        }
        Ok(sequence)
    }

    /// A quoted text, byte by byte.
    fn literal(&mut self, sequence: &mut Vec<Op>) -> Result<(), String> {
        self.at += 1;
        while self.peek() != Some('"') {
            let letter = self.character()?;
            let mut buffer = [0; 4];
            let bytes = char::from_u32(letter).ok_or("no such character")?.encode_utf8(&mut buffer).as_bytes();
            sequence.extend(bytes.iter().map(|&byte| Op::Bytes(byte, byte)));
        }
        self.at += 1;
        Ok(())
    }

    /// A character, or what an escape stands for.
    fn character(&mut self) -> Result<u32, String> {
        let letter = self.next()?;
        if letter != '\\' {
            return Ok(letter.into());
        }
        let digits = match self.next()? {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            't' => return Ok('\t'.into()),
            'r' => return Ok('\r'.into()),
            'n' => return Ok('\n'.into()),
            other @ ('\\' | '"' | '[' | ']') => return Ok(other.into()),
            other => return Err(format!("unknown escape '\\{other}'")),
        };
        let hex = self.source.get(self.at..self.at + digits).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        self.at += digits;
        hex.filter(|code| *code <= 0x10_FFFF).ok_or_else(|| format!("{digits} hexadecimal digits are expected"))
    }

    fn class(&mut self) -> Result<Op, String> {
        self.at += 1;
        let negated = self.eat("^");
        let mut ranges = Vec::new();
        while self.peek() != Some(']') {
            let low = self.character()?;
            let rest = &self.source[self.at..];
            let high = if rest.starts_with('-') && !rest.starts_with("-]") {
                self.at += 1;
                self.character()?
            } else {
                low
            };
            ranges.push((low, high));
        }
        self.at += 1;
        let ranges = normalised(ranges, negated);
        self.characters(ranges)
    }

    /// A rule for one character of these ranges, as UTF-8.
    fn characters(&mut self, ranges: Vec<(u32, u32)>) -> Result<Op, String> {
        if let Some(known) = self.classes.get(&ranges) {
            return Ok(*known);
        }
        let mut alternatives: Alternatives = Vec::new();
        for &(low, high) in &ranges {
            for (low, high) in scalars(low, high) {
                for sequence in Utf8Sequences::new(low, high) {
                    let bytes = sequence.as_slice().iter();
                    alternatives.push(bytes.map(|range| Op::Bytes(range.start, range.end)).collect());
                }
            }
        }
        let class = match alternatives.as_slice() {
            [one] if one.len() == 1 => one[0],
            _ => self.anonymous(alternatives)?,
        };
        self.classes.insert(ranges, class);
        Ok(class)
    }

    /// `<[17]>`, `<|think|>`, or one of them after `!`.
    fn token(&mut self) -> Result<Op, String> {
        let not = self.eat("!");
        let start = self.at;
        if !self.eat("<") {
            return Err("'<' is expected after '!'".to_owned());
        }
        let token = if self.eat("[") {
            let number = self.number()?;
            if !self.eat("]>") {
                return Err("']>' is expected".to_owned());
            }
            i32::try_from(number).map_err(|_| "no such token".to_owned())?
        } else {
            let length = self.source[self.at..].find('>').ok_or("'>' is expected")?;
            self.at += length + 1;
            let text = &self.source[start..self.at];
            (self.find_token)(text)
                .ok_or_else(|| format!("'{}' is not one token", text.chars().take(64).collect::<String>()))?
        };
        Ok(if not { Op::NotToken(token) } else { Op::Token(token) })
    }

    fn repetition(&mut self, sign: char) -> Result<(u64, Option<u64>), String> {
        self.at += 1;
        Ok(match sign {
            '*' => (0, None),
            '+' => (1, None),
            '?' => (0, Some(1)),
            _ => {
                self.space(true);
                let least = self.number()?;
                self.space(true);
                let mut most = Some(least);
                if self.eat(",") {
                    self.space(true);
                    most = if self.peek() == Some('}') { None } else { Some(self.number()?) };
                    self.space(true);
                }
                if !self.eat("}") {
                    return Err("'}' is expected".to_owned());
                }
                if least > MAX_REPETITIONS {
                    return Err(format!("at most {MAX_REPETITIONS} repetitions are allowed, not {least}"));
                }
                if most.is_some_and(|most| most < least) {
                    return Err("the repetition's maximum is less than its minimum".to_owned());
                }
                (least, most.filter(|most| *most <= MAX_REPETITIONS))
            }
        })
    }

    /// `S{m,n}` is S m times, then n - m times "S and the next, or nothing".
    fn repeat(
        &mut self,
        repeated: Vec<Op>,
        least: u64,
        most: Option<u64>,
        sequence: &mut Vec<Op>,
    ) -> Result<(), String> {
        let symbol = match repeated.as_slice() {
            [] => return Ok(()),
            [one] => *one,
            _ => self.anonymous(vec![repeated])?,
        };
        self.count(usize::try_from(least).unwrap_or(usize::MAX))?;
        sequence.extend((0..least).map(|_| symbol));
        match most {
            None => {
                let rule = u32::try_from(self.rules.len()).map_err(|_| too_large())?;
                let more = self.anonymous(vec![vec![symbol, Op::Rule(rule)], Vec::new()])?;
                sequence.push(more);
            }
            Some(most) => {
                let mut more: Option<Op> = None;
                for _ in least..most {
                    more =
                        Some(self.anonymous(vec![[Some(symbol), more].into_iter().flatten().collect(), Vec::new()])?);
                }
                sequence.extend(more);
            }
        }
        Ok(())
    }
}

fn too_large() -> String {
    format!("the grammar is larger than {MAX_OPS} symbols when its repetitions are written out")
}

fn is_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '-' || letter == '_'
}

/// The ranges in order, none touching another.
fn normalised(mut ranges: Vec<(u32, u32)>, negated: bool) -> Vec<(u32, u32)> {
    ranges.retain(|(low, high)| low <= high);
    ranges.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
    for (low, high) in ranges {
        match merged.last_mut() {
            Some(last) if low <= last.1.saturating_add(1) => last.1 = last.1.max(high),
            _ => merged.push((low, high)),
        }
    }
    if !negated {
        return merged;
    }
    let mut others = Vec::with_capacity(merged.len() + 1);
    let mut next = 0;
    for (low, high) in merged {
        if low > next {
            others.push((next, low - 1));
        }
        next = high + 1;
    }
    if next <= 0x10_FFFF {
        others.push((next, 0x10_FFFF));
    }
    others
}

/// The parts of a range that are characters: the surrogates are none.
fn scalars(low: u32, high: u32) -> impl Iterator<Item = (char, char)> {
    [(low, high.min(0xD7FF)), (low.max(0xE000), high)].into_iter().filter_map(|(low, high)| {
        if low > high {
            return None;
        }
        Some((char::from_u32(low)?, char::from_u32(high)?))
    })
}

//! Vocabularies that are made up, yet work: any UTF-8 text becomes tokens, and English-like text becomes few.

use crate::gguf::Header;
use crate::spec::Tokenizer;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

/// The tokens, and for byte-level BPE the merges that lead to them.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    kind: Tokenizer,
    tokens: Vec<String>,
    kinds: Vec<i32>,
    merges: Vec<String>,
    is_text: Vec<bool>,
}

impl Vocabulary {
    pub(crate) fn new(kind: Tokenizer, size: u32) -> Self {
        let mut vocabulary =
            Self { kind, tokens: Vec::new(), kinds: Vec::new(), merges: Vec::new(), is_text: Vec::new() };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        match kind {
            Tokenizer::Bpe => vocabulary.fill_bpe(size),
            Tokenizer::Spm => vocabulary.fill_spm(size),
            Tokenizer::Wpm => vocabulary.fill_wpm(size),
        }
        vocabulary
    }

    /// Whether the token stands for printable ASCII text.
    pub(crate) fn is_text(&self, token: usize) -> bool {
        self.is_text.get(token).copied().unwrap_or(false)
    }

    /// Writes the tokenizer's keys.
    pub(crate) fn describe(&self, header: &mut Header) {
        let id =
            |token: &str| self.tokens.iter().position(|t| t == token).and_then(|i| u32::try_from(i).ok()).unwrap_or(0);
        let (model, pre) = match self.kind {
            Tokenizer::Bpe => ("gpt2", "gpt-2"),
            Tokenizer::Spm => ("llama", "default"),
            Tokenizer::Wpm => ("bert", "default"),
        };
        header.string("tokenizer.ggml.model", model);
        header.string("tokenizer.ggml.pre", pre);
        header.strings("tokenizer.ggml.tokens", self.tokens.iter().map(String::as_str));
        header.i32s("tokenizer.ggml.token_type", self.kinds.iter().copied());
        match self.kind {
            Tokenizer::Bpe => {
                header.strings("tokenizer.ggml.merges", self.merges.iter().map(String::as_str));
                header.u32("tokenizer.ggml.bos_token_id", id("<|endoftext|>"));
            }
            Tokenizer::Spm => {
                // The earlier a piece stands, the better it scores: short pieces are joined first.
                #[expect(clippy::cast_precision_loss, reason = "scores only order the pieces")]
                header.f32s("tokenizer.ggml.scores", (0..self.tokens.len()).map(|i| -(i as f32)));
                header.u32("tokenizer.ggml.bos_token_id", id("<s>"));
                header.u32("tokenizer.ggml.unknown_token_id", id("<unk>"));
            }
            Tokenizer::Wpm => {
                header.u32("tokenizer.ggml.token_type_count", 2);
                header.u32("tokenizer.ggml.bos_token_id", id("[CLS]"));
                header.u32("tokenizer.ggml.cls_token_id", id("[CLS]"));
                // llama.cpp's own spelling.
                header.u32("tokenizer.ggml.seperator_token_id", id("[SEP]"));
                header.u32("tokenizer.ggml.unknown_token_id", id("[UNK]"));
                header.u32("tokenizer.ggml.padding_token_id", id("[PAD]"));
                header.u32("tokenizer.ggml.mask_token_id", id("[MASK]"));
                return;
            }
        }
        header.u32("tokenizer.ggml.eos_token_id", id("<|im_end|>"));
        header.bool("tokenizer.ggml.add_bos_token", self.kind == Tokenizer::Spm);
    }

    fn push(&mut self, token: String, kind: i32, is_text: bool) {
        self.tokens.push(token);
        self.kinds.push(kind);
        self.is_text.push(is_text);
    }

    fn fill_bpe(&mut self, size: usize) {
        for byte in 0..=u8::MAX {
            self.push(stand_in(byte).to_string(), NORMAL, (b' '..=b'~').contains(&byte));
        }
        for (left, right) in joins('Ġ').take(size - self.tokens.len() - 3) {
            self.merges.push(format!("{left} {right}"));
            self.push(left + &right, NORMAL, true);
        }
        self.push("<|endoftext|>".to_owned(), CONTROL, false);
        self.push("<|im_start|>".to_owned(), CONTROL, false);
        self.push("<|im_end|>".to_owned(), CONTROL, false);
    }

    /// As converted files have it: what begins a word has `▁` before it, what goes on in one has not.
    fn fill_wpm(&mut self, size: usize) {
        for token in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] {
            self.push(token.to_owned(), if token == "[UNK]" { UNKNOWN } else { CONTROL }, false);
        }
        for byte in (b'!'..=b'~').filter(|byte| !byte.is_ascii_uppercase()) {
            self.push(format!("▁{}", char::from(byte)), NORMAL, true);
            self.push(char::from(byte).to_string(), NORMAL, true);
        }
        for (left, right) in joins('▁').take(size - self.tokens.len()) {
            self.push(left + &right, NORMAL, true);
        }
    }

    fn fill_spm(&mut self, size: usize) {
        self.push("<unk>".to_owned(), UNKNOWN, false);
        self.push("<s>".to_owned(), CONTROL, false);
        self.push("</s>".to_owned(), CONTROL, false);
        for byte in 0..=u8::MAX {
            self.push(format!("<0x{byte:02X}>"), BYTE, false);
        }
        self.push("<|im_start|>".to_owned(), CONTROL, false);
        self.push("<|im_end|>".to_owned(), CONTROL, false);
        self.push("▁".to_owned(), NORMAL, true);
        for byte in b'!'..=b'~' {
            self.push(char::from(byte).to_string(), NORMAL, true);
        }
        for (left, right) in joins('▁').take(size - self.tokens.len()) {
            self.push(left + &right, NORMAL, true);
        }
    }
}

/// Pairs of tokens to join, each made of earlier ones: syllables, words of two, three and four of them, and all of
/// these with a space before.
fn joins(space: char) -> impl Iterator<Item = (String, String)> {
    let syllables = || "nrtslmdpkvbgfhcwzyjx".chars().flat_map(|c| "aeiou".chars().map(move |v| (c, v)));
    let one = syllables().map(|(c, v)| (c.to_string(), v.to_string()));
    let longer = (2..=4).flat_map(move |length| {
        words(length - 1).flat_map(move |head| syllables().map(move |(c, v)| (head.clone(), format!("{c}{v}"))))
    });
    one.chain(longer).flat_map(move |(left, right)| {
        let spaced = (space.to_string(), format!("{left}{right}"));
        [(left, right), spaced]
    })
}

/// All words of so many syllables.
fn words(length: usize) -> Box<dyn Iterator<Item = String>> {
    if length == 0 {
        return Box::new(std::iter::once(String::new()));
    }
    Box::new(words(length - 1).flat_map(|head| {
        "nrtslmdpkvbgfhcwzyjx".chars().flat_map(move |c| {
            let head = head.clone();
            "aeiou".chars().map(move |v| format!("{head}{c}{v}"))
        })
    }))
}

/// GPT-2's printable character for a byte.
fn stand_in(byte: u8) -> char {
    let is_kept = |b: u8| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    if is_kept(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !is_kept(*b)).count();
    u32::try_from(before).ok().and_then(|n| char::from_u32(256 + n)).unwrap_or('?')
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn bytes_have_the_stand_ins_of_gpt2() {
        assert_eq!(stand_in(b' '), 'Ġ');
        assert_eq!(stand_in(b'\n'), 'Ċ');
        assert_eq!(stand_in(b'a'), 'a');
        assert_eq!(stand_in(173), 'Ń');
    }

    #[test]
    fn tokens_are_unique_and_every_merge_joins_known_tokens() {
        for (kind, size) in [
            (Tokenizer::Bpe, 512),
            (Tokenizer::Bpe, 32_000),
            (Tokenizer::Spm, 512),
            (Tokenizer::Spm, 32_000),
            (Tokenizer::Wpm, 512),
            (Tokenizer::Wpm, 32_000),
        ] {
            let vocabulary = Vocabulary::new(kind, size);
            assert_eq!(vocabulary.tokens.len(), size as usize);
            let known: HashSet<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
            assert_eq!(known.len(), vocabulary.tokens.len(), "{kind:?} {size} repeats a token");
            for merge in &vocabulary.merges {
                let (left, right) = merge.split_once(' ').expect("a merge has two halves");
                assert!(known.contains(left) && known.contains(right), "{merge:?}");
                assert!(known.contains(format!("{left}{right}").as_str()), "{merge:?}");
            }
        }
    }
}

//! Pure: tokens that are guessed ahead, so that one step of the model yields several.
//!
//! A sequence that generates puts the token that it has just sampled and a *draft*, the guess of what follows, into one
//! step. Then it samples at each of these places in turn, as it would have without: what it draws is what the model
//! wants, and for as long as that equals the draft the next place is right too. So a draft changes how many tokens a step
//! yields and nothing else.
//!
//! Who guesses: [`ngram`], a smaller model (`step::draft`), or the model's own head (`step::head`). Here is how much may be guessed ([`Settings::share`]), what
//! that costs ([`Price`]), and whether a sequence's guesses are worth it ([`Record`]).

pub(super) mod ngram;

use std::time::Duration;

use altiplano_crds::model_deployment::{SpeculativeSpec, SpeculativeType};

use super::request::Token;

/// Rows of a step in which several sequences guess: so many cost a device little more than one each.
const ROWS: usize = 16;

/// llama.cpp's own defaults.
const DRAFT_TOKENS: usize = 3;
const NGRAM_TOKENS: usize = 48;
const MATCH_TOKENS: usize = 12;

/// What the schema allows.
const MAX_TOKENS: usize = 64;

/// Who guesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A smaller model.
    Draft,
    /// The model's own head.
    Mtp,
    /// The sequence's own past, where its last tokens have come before.
    NGram {
        /// So many of them.
        matching: usize,
    },
}

/// What the configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Settings {
    pub(super) kind: Kind,
    /// Tokens of a draft at most.
    pub(super) max: usize,
    /// A draft of fewer is not worth checking.
    pub(super) min: usize,
    /// A draft ends before a token that its model holds for less probable.
    pub(super) min_probability: f32,
}

impl Settings {
    /// Reads the spec. A draft model that nobody says more about is used with the defaults. The error names a field.
    pub(super) fn new(spec: Option<&SpeculativeSpec>, has_draft: bool) -> Result<Option<Self>, String> {
        let default = SpeculativeSpec {
            kind: SpeculativeType::Draft,
            max_tokens: None,
            min_tokens: None,
            min_probability: None,
            match_tokens: None,
        };
        let spec = match spec {
            Some(spec) => spec,
            None if has_draft => &default,
            None => return Ok(None),
        };
        let SpeculativeSpec { kind, max_tokens, min_tokens, min_probability, match_tokens } = spec;
        let tokens = |value: &Option<i32>| value.and_then(|value| usize::try_from(value).ok());
        let (kind, max) = match kind {
            SpeculativeType::Draft if !has_draft => return Err("type Draft needs model.draft".to_owned()),
            SpeculativeType::Draft => (Kind::Draft, DRAFT_TOKENS),
            SpeculativeType::NGram => {
                let matching = tokens(match_tokens).unwrap_or(MATCH_TOKENS).clamp(2, MAX_TOKENS);
                (Kind::NGram { matching }, NGRAM_TOKENS)
            }
            SpeculativeType::Mtp => (Kind::Mtp, DRAFT_TOKENS),
        };
        let max = tokens(max_tokens).unwrap_or(max).clamp(1, MAX_TOKENS);
        let probability = min_probability.as_deref().map(str::parse::<f32>).transpose();
        Ok(Some(Self {
            kind,
            max,
            min: tokens(min_tokens).unwrap_or(0).min(max),
            min_probability: probability.map_err(|error| format!("minProbability: {error}"))?.unwrap_or(0.0),
        }))
    }

    /// With drafts of so many tokens at most.
    pub(super) fn at_most(self, max: usize) -> Self {
        Self { max: self.max.min(max), min: self.min.min(max), ..self }
    }

    /// Whether somebody guesses who has a context.
    pub(super) fn has_context(&self) -> bool {
        matches!(self.kind, Kind::Draft | Kind::Mtp)
    }

    /// Whether drafts are shortened after wrong ones. What the past says is right for long or wrong at once. A model's guesses
    /// are as good each time: then steps of one size are the faster ones, because llama.cpp uses a graph again for them, and
    /// its kernels compute four rows for the price of two.
    pub(super) fn adapts(&self) -> bool {
        matches!(self.kind, Kind::NGram { .. })
    }

    /// Tokens that each of `decoding` sequences may guess in one step. Many streams fill a step by themselves: then a
    /// guess is paid for by the others.
    pub(super) fn share(&self, decoding: usize) -> usize {
        match decoding {
            0 => 0,
            1 => self.max,
            _ => (ROWS / decoding).saturating_sub(1).min(self.max),
        }
    }

    /// Guessed tokens in one step at most, with so many sequences or fewer.
    pub(super) fn rows(&self, parallel: usize) -> usize {
        (1..=parallel).map(|decoding| decoding * self.share(decoding)).max().unwrap_or(0)
    }
}

/// What a guess costs, as measured: learnt from steps in which nobody reads a prompt.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Price {
    /// Seconds of a step without guesses, for each of its tokens.
    bare: Option<f64>,
    /// Seconds that one guess takes, its making counted.
    guess: Option<f64>,
    /// Steps since one without guesses.
    since: u32,
}

impl Price {
    /// Steps with guesses after which one is made without, so that its cost stays known.
    const REFRESH: u32 = 128;

    /// Learns from a step of `sequences` tokens and `guessed` more.
    pub(super) fn observe(&mut self, sequences: usize, guessed: usize, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        let count = |number: usize| f64::from(u32::try_from(number.max(1)).unwrap_or(u32::MAX));
        let learn = |known: &mut Option<f64>, measured: f64| {
            *known = Some(known.map_or(measured, |known| known + (measured - known) * 0.25));
        };
        if guessed == 0 {
            learn(&mut self.bare, seconds / count(sequences));
            self.since = 0;
        } else if let Some(bare) = self.bare {
            learn(&mut self.guess, (seconds - bare * count(sequences)).max(0.0) / count(guessed));
            self.since += 1;
        }
    }

    /// Whether the next step should be one without guesses, to see what that costs.
    pub(super) fn is_stale(&self) -> bool {
        self.bare.is_none() || self.since >= Self::REFRESH
    }

    /// A guess in generated tokens: one that is right yields one token, so a guess that costs more than the chance that
    /// it is right is a loss.
    pub(super) fn of_a_guess(&self) -> f64 {
        match (self.bare, self.guess) {
            (Some(bare), Some(guess)) => guess / bare.max(1e-9),
            // Nobody knows yet.
            _ => 0.0,
        }
    }
}

/// How good the guesses for one sequence are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Record {
    /// Part of the guesses that was right, of late.
    rate: f64,
    /// Length of the next draft.
    length: usize,
    /// Tokens to be generated before the next draft.
    pause: u32,
    /// Length of the next pause.
    next_pause: u32,
    /// Tokens guessed.
    pub(super) drafted: u32,
    /// Of these, the ones that were right.
    pub(super) accepted: u32,
}

impl Default for Record {
    fn default() -> Self {
        Self { rate: 1.0, length: FIRST_LENGTH, pause: 0, next_pause: FIRST_PAUSE, drafted: 0, accepted: 0 }
    }
}

/// Length of the first draft: a wrong one should not be dear.
const FIRST_LENGTH: usize = 8;

/// Tokens without a draft after drafts did not pay; it doubles each time.
const FIRST_PAUSE: u32 = 16;
const LONGEST_PAUSE: u32 = 512;

impl Record {
    /// Tokens to guess now, where `most` may be; 0: none. A draft that adapts grows while all of it is right.
    pub(super) fn length(&self, most: usize, adapts: bool) -> usize {
        match (self.pause, adapts) {
            (0, true) => self.length.min(most),
            (0, false) => most,
            _ => 0,
        }
    }

    /// A step has passed without a draft.
    pub(super) fn pass(&mut self) {
        self.pause = self.pause.saturating_sub(1);
    }

    /// Of `drafted` tokens the first `accepted` were right; a guess costs `price`.
    pub(super) fn settle(&mut self, drafted: usize, accepted: usize, price: f64) {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (drafted_now, accepted_now) = (count(drafted).max(1), count(accepted));
        self.drafted = self.drafted.saturating_add(count(drafted));
        self.accepted = self.accepted.saturating_add(accepted_now);
        self.rate += (f64::from(accepted_now) / f64::from(drafted_now) - self.rate) * 0.25;
        self.length = if accepted >= drafted { self.length.max(drafted * 2).min(MAX_TOKENS) } else { accepted + 1 };
        if self.rate > price {
            self.next_pause = FIRST_PAUSE;
        } else {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
            // The next one is a trial, judged by itself.
            self.rate = price;
        }
    }
}

/// What one sequence guesses.
#[derive(Default)]
pub(super) struct Speculation {
    /// What should follow its last token; checked by the next step.
    pub(super) draft: Vec<Token>,
    /// How good its guesses are.
    pub(super) record: Record,
    /// Its past, where that is what is guessed from.
    pub(super) index: Option<ngram::Index>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(kind: SpeculativeType) -> SpeculativeSpec {
        SpeculativeSpec { kind, max_tokens: None, min_tokens: None, min_probability: None, match_tokens: None }
    }

    #[test]
    fn the_spec_is_read() {
        let (draft, ngram) = (spec(SpeculativeType::Draft), spec(SpeculativeType::NGram));
        let settings = |kind, max, min, min_probability| Some(Settings { kind, max, min, min_probability });
        let full = SpeculativeSpec {
            max_tokens: Some(8),
            min_tokens: Some(2),
            min_probability: Some("0.75".to_owned()),
            ..draft.clone()
        };
        let short = SpeculativeSpec { match_tokens: Some(3), max_tokens: Some(5), ..ngram.clone() };
        let cases = [
            (None, false, None),
            (None, true, settings(Kind::Draft, 3, 0, 0.0)),
            (Some(&draft), true, settings(Kind::Draft, 3, 0, 0.0)),
            (Some(&full), true, settings(Kind::Draft, 8, 2, 0.75)),
            (Some(&spec(SpeculativeType::Mtp)), true, settings(Kind::Mtp, 3, 0, 0.0)),
            (Some(&ngram), false, settings(Kind::NGram { matching: 12 }, 48, 0, 0.0)),
            (Some(&short), false, settings(Kind::NGram { matching: 3 }, 5, 0, 0.0)),
        ];
        for (spec, has_draft, expected) in cases {
            assert_eq!(Settings::new(spec, has_draft), Ok(expected), "{spec:?} {has_draft}");
        }
        assert!(Settings::new(Some(&draft), false).unwrap_err().contains("model.draft"));
    }

    #[test]
    fn many_streams_guess_less() {
        let settings = |max| Settings { kind: Kind::Draft, max, min: 0, min_probability: 0.0 };
        let cases = [
            // maxTokens, and what each of 0, 1, 2, 3, 4, 5, 8, 9 and 100 may guess.
            (48, [0, 48, 7, 4, 3, 2, 1, 0, 0]),
            (3, [0, 3, 3, 3, 3, 2, 1, 0, 0]),
            (1, [0, 1, 1, 1, 1, 1, 1, 0, 0]),
        ];
        for (max, expected) in cases {
            let shares = [0, 1, 2, 3, 4, 5, 8, 9, 100].map(|decoding| settings(max).share(decoding));
            assert_eq!(shares, expected, "{max}");
        }
        assert_eq!(
            (settings(48).rows(1), settings(48).rows(8), settings(3).rows(1), settings(3).rows(128)),
            (48, 48, 3, 12)
        );
    }

    #[test]
    fn a_guess_has_a_price() {
        let ms = Duration::from_millis;
        let mut price = Price::default();
        assert!(price.is_stale(), "the first step is bare");
        price.observe(2, 4, ms(50));
        assert_eq!((price.is_stale(), price.of_a_guess()), (true, 0.0), "with nothing to compare it says nothing");
        price.observe(2, 0, ms(20));
        assert!(!price.is_stale());
        price.observe(2, 4, ms(40));
        // 20 ms for four guesses, where a token takes 10.
        assert!((price.of_a_guess() - 0.5).abs() < 1e-9, "{price:?}");
        for _ in 0..Price::REFRESH {
            price.observe(1, 1, ms(1));
        }
        assert!(price.is_stale() && price.of_a_guess() < 0.01, "cheaper than a step: free");
    }

    #[test]
    fn drafts_grow_while_they_are_right_and_stop_when_they_do_not_pay() {
        let mut record = Record::default();
        assert_eq!((record.length(64, true), record.length(3, true)), (8, 3));
        record.settle(8, 8, 0.3);
        assert_eq!(record.length(64, true), 16);
        record.settle(16, 4, 0.3);
        assert_eq!(record.length(64, true), 5, "as long as was right, and one");
        assert_eq!(record.length(64, false), 64, "or of one length, whatever was right");
        for _ in 0..20 {
            record.settle(3, 0, 0.3);
            if record.length(64, true) == 0 {
                break;
            }
        }
        assert_eq!((record.pause, record.next_pause), (16, 32));
        for _ in 0..15 {
            record.pass();
        }
        assert_eq!((record.length(64, true), record.length(64, false)), (0, 0));
        record.pass();
        assert_eq!(record.length(64, true), 1, "one more try");
        record.settle(1, 0, 0.3);
        assert_eq!((record.pause, record.next_pause), (32, 64), "which was wrong");
        (0..32).for_each(|_| record.pass());
        record.settle(1, 1, 0.3);
        assert_eq!((record.length(64, true), record.next_pause), (2, FIRST_PAUSE), "and one that was right");
        assert_eq!(record.accepted, 8 + 4 + 1);
    }

    proptest! {
        /// Whatever happens, a draft stays within its bounds, a pause ends, and a free guess is never stopped for good.
        #[test]
        fn a_record_stays_in_bounds(rounds in proptest::collection::vec((0usize..65, 0.0f64..2.0), 0..200), most in 1usize..65) {
            let mut record = Record::default();
            for (right, price) in rounds {
                let mut waited = 0;
                while record.length(most, true) == 0 {
                    record.pass();
                    waited += 1;
                    prop_assert!(waited <= LONGEST_PAUSE);
                }
                let length = record.length(most, true);
                prop_assert!(length >= 1 && length <= most);
                record.settle(length, right.min(length), price);
                prop_assert!(record.accepted <= record.drafted && (0.0..=2.0).contains(&record.rate));
            }
        }

        #[test]
        fn a_step_of_guesses_stays_small(max in 1usize..65, parallel in 1usize..129, decoding in 0usize..129) {
            let settings = Settings { kind: Kind::Draft, max, min: 0, min_probability: 0.0 };
            let decoding = decoding.min(parallel);
            prop_assert!(settings.share(decoding) <= max);
            prop_assert!(decoding * settings.share(decoding) <= settings.rows(parallel));
            prop_assert!(settings.rows(parallel) <= max.max(ROWS));
        }
    }
}

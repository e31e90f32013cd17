//! What goes when a prompt is longer than the context of a request. Nothing is ever cut in silence: what was done is a
//! [`Truncation`], which the answer, a header, a counter and the log declare.
//!
//! | policy | of a conversation | of a prompt that is text or tokens |
//! |---|---|---|
//! | `Reject` | 400 `context_length_exceeded` | the same |
//! | `DropOldest` | the oldest turns go whole, reasoning, calls of tools and their results included; system messages, the last user message and the end stay | its beginning goes; the model's own first token stays |
//! | `DropMiddle` | what stands in the middle of all text goes: turns whole, the texts at its edges in part; system messages stay | head and tail stay |
//!
//! The deployment's `spec.context.overflow` says which, unless the request does: `altiplano.overflow`, Responses'
//! `truncation` or Ollama's `truncate`. Only a prompt that does not fit is touched. Then room for the answer is made too:
//! `max_tokens`, a quarter of the context at most. What goes goes in steps of an eighth of the context where that is
//! possible, so that the next turns of a conversation begin like this one and its prefix is read once. What cannot be
//! made to fit is 400 as with `Reject`. `/infill` and prompts with a `suffix` are never cut: they are not one text.

mod conversation;
mod layout;
mod text;

use altiplano_crds::model_deployment::OverflowPolicy;
use http::HeaderName;
use serde::Serialize;
use serde_json::{Map, Value, json};

pub(crate) use conversation::{Fitted, Reading, fit};
pub(crate) use layout::{Layout, Part, Size};
pub(crate) use text::fit_prompts;

use super::error::ApiError;
use super::fields::{Fields, wrong_type};

/// Stands where the middle of a text was.
pub(crate) const MARK: &str = "\n[... cut ...]\n";

/// Tokens that were taken from the prompts, on every answer of which any were.
pub(crate) const TRUNCATED_TOKENS: HeaderName = HeaderName::from_static("x-altiplano-truncated-tokens");

/// What was taken away so that the rest fits. Of several prompts: the sums over those that were cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Truncation {
    /// How it was chosen what goes.
    pub(crate) policy: OverflowPolicy,
    /// Tokens of the prompt as it came.
    pub(crate) tokens_before: u32,
    /// Tokens that one request may use, prompt and answer.
    pub(crate) limit: u32,
    /// Tokens of the prompt that is answered.
    pub(crate) tokens_after: u32,
    /// Messages that are gone whole.
    pub(crate) dropped_messages: u32,
}

impl Truncation {
    /// Tokens that are gone.
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens_before.saturating_sub(self.tokens_after)
    }

    /// `altiplano` in an answer.
    pub(crate) fn body(&self) -> Value {
        json!({"truncation": self})
    }

    fn plus(self, other: &Self) -> Self {
        Self {
            tokens_before: self.tokens_before.saturating_add(other.tokens_before),
            tokens_after: self.tokens_after.saturating_add(other.tokens_after),
            dropped_messages: self.dropped_messages.saturating_add(other.dropped_messages),
            ..self
        }
    }
}

/// The word for a policy in the API, in answers and in metrics.
pub(crate) fn word(policy: OverflowPolicy) -> &'static str {
    match policy {
        OverflowPolicy::Reject => "Reject",
        OverflowPolicy::DropOldest => "DropOldest",
        OverflowPolicy::DropMiddle => "DropMiddle",
    }
}

/// What the request says about it: `altiplano: {"overflow": "DropOldest"}`.
pub(crate) fn read(fields: &Fields) -> Result<Option<OverflowPolicy>, ApiError> {
    const NAME: &str = "altiplano.overflow";
    const EXPECTED: &str = "\"Reject\", \"DropOldest\" or \"DropMiddle\"";
    let wish = match fields.get("altiplano") {
        None => return Ok(None),
        Some(Value::Object(ours)) => ours.get("overflow").filter(|value| !value.is_null()),
        Some(other) => return Err(wrong_type("altiplano", "an object", other)),
    };
    let Some(wish) = wish else { return Ok(None) };
    let Some(said) = wish.as_str() else { return Err(wrong_type(NAME, EXPECTED, wish)) };
    let policies = [OverflowPolicy::Reject, OverflowPolicy::DropOldest, OverflowPolicy::DropMiddle];
    policies
        .into_iter()
        .find(|&policy| word(policy) == said)
        .map(Some)
        .ok_or_else(|| ApiError::invalid(NAME, format!("'{NAME}' must be {EXPECTED}, not '{}'", super::clip(said))))
}

/// Another API's word for a policy, unless `altiplano.overflow` says which.
pub(crate) fn wish(fields: &mut Map<String, Value>, policy: OverflowPolicy) {
    let ours = fields.entry("altiplano").or_insert_with(|| json!({}));
    // What is no object is refused where it is read.
    if let Some(ours) = ours.as_object_mut() {
        ours.entry("overflow").or_insert_with(|| word(policy).into());
    }
}

/// How long a prompt may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Tokens that one request may use; the prompt has to have fewer.
    pub(crate) limit: u32,
    /// Tokens to leave of a prompt that has more.
    pub(crate) target: u32,
}

impl Budget {
    /// Room for the answer stays, `max_tokens` (1024 when the request does not say), but never more than a quarter of
    /// the context.
    pub(crate) fn new(limit: u32, max_tokens: Option<u32>) -> Self {
        let answer = max_tokens.unwrap_or(1024).clamp(1, (limit / 4).max(1));
        Self { limit, target: limit.saturating_sub(answer) }
    }

    /// Tokens that have to go from a prompt of so many.
    fn excess(self, tokens: u32) -> u32 {
        tokens.saturating_sub(self.target)
    }

    /// The same in steps, so that a conversation that grows is not cut elsewhere at every turn.
    fn in_steps(self, excess: u32) -> u32 {
        excess.checked_next_multiple_of((self.limit / 8).max(1)).unwrap_or(excess)
    }

    /// What was estimated to fit and is a little longer is good enough: the answer has room for less.
    fn is_good(self, tokens: u32) -> bool {
        tokens < self.limit && tokens <= self.target.saturating_add((self.limit - self.target) / 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_the_answer_stays() {
        for (limit, max_tokens, expected) in [
            (4096, None, 3072),
            (4096, Some(100), 3996),
            (4096, Some(9999), 3072),
            (4096, Some(0), 4095),
            (1024, None, 768),
            (2, None, 1),
        ] {
            let budget = Budget::new(limit, max_tokens);
            assert_eq!(budget, Budget { limit, target: expected }, "{limit} {max_tokens:?}");
            assert!(budget.is_good(expected) && !budget.is_good(limit));
        }
    }

    #[test]
    fn the_cut_moves_in_steps() {
        let budget = Budget::new(4096, None);
        for (tokens, expected) in [(3072, 0), (4096, 1024), (4097, 1536), (4600, 1536), (4609, 2048)] {
            assert_eq!(budget.in_steps(budget.excess(tokens)), expected, "{tokens}");
        }
    }

    #[test]
    fn a_request_may_choose() {
        let fields = |json: Value| Fields(Map::from_iter([("altiplano".to_owned(), json)]));
        for (json, expected) in [
            (Value::Null, None),
            (json!({}), None),
            (json!({"overflow": null}), None),
            (json!({"overflow": "Reject"}), Some(OverflowPolicy::Reject)),
            (json!({"overflow": "DropOldest", "more": 1}), Some(OverflowPolicy::DropOldest)),
            (json!({"overflow": "DropMiddle"}), Some(OverflowPolicy::DropMiddle)),
        ] {
            assert_eq!(read(&fields(json.clone())).unwrap(), expected, "{json}");
        }
        for (json, param) in [
            (json!("DropOldest"), "altiplano"),
            (json!({"overflow": "dropOldest"}), "altiplano.overflow"),
            (json!({"overflow": 1}), "altiplano.overflow"),
        ] {
            let error = read(&fields(json.clone())).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{json}");
        }
    }

    #[test]
    fn other_apis_words_stand_behind_ours() {
        for (given, expected) in [
            (json!({}), json!({"altiplano": {"overflow": "DropOldest"}})),
            (json!({"altiplano": {"x": 1}}), json!({"altiplano": {"x": 1, "overflow": "DropOldest"}})),
            (json!({"altiplano": {"overflow": "Reject"}}), json!({"altiplano": {"overflow": "Reject"}})),
            (json!({"altiplano": 5}), json!({"altiplano": 5})),
        ] {
            let Value::Object(mut fields) = given else { unreachable!() };
            wish(&mut fields, OverflowPolicy::DropOldest);
            assert_eq!(Value::Object(fields), expected);
        }
    }

    #[test]
    fn several_prompts_are_told_in_sum() {
        let one = |tokens_before, tokens_after| Truncation {
            policy: OverflowPolicy::DropMiddle,
            tokens_before,
            limit: 100,
            tokens_after,
            dropped_messages: 1,
        };
        let sum = one(150, 75).plus(&one(200, 70));
        assert_eq!((sum.tokens(), sum.limit, sum.dropped_messages), (205, 100, 2));
        assert_eq!(
            sum.body(),
            json!({"truncation": {"policy": "DropMiddle", "tokens_before": 350, "limit": 100, "tokens_after": 145,
                                  "dropped_messages": 2}})
        );
    }
}

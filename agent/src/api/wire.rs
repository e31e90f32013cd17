//! What OpenAI's dialects say: their response objects, with llama-server's `timings` beside `usage`.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use serde::Serialize;

use super::dialect::Finish;
use crate::engine::{PromptProgress, Timings, TokenLogprob, Usage};

/// Which of the two APIs speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Text,
}

impl Shape {
    pub(crate) fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Text => "cmpl-",
        }
    }

    pub(crate) fn object(self, streamed: bool) -> &'static str {
        match (self, streamed) {
            (Self::Chat, true) => "chat.completion.chunk",
            (Self::Chat, false) => "chat.completion",
            (Self::Text, _) => "text_completion",
        }
    }

    /// The parameter that holds the prompt.
    pub(crate) fn prompt_param(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Text => "prompt",
        }
    }
}

/// A whole answer, or one chunk of a streamed one.
#[derive(Serialize)]
pub(crate) struct Answer<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    pub(crate) choices: Vec<ChoiceBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<UsageSlot>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timings: Option<TimingsBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_progress: Option<ProgressBody>,
    /// What was taken from the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) altiplano: Option<serde_json::Value>,
    /// What `/completion` would have said, where that is asked for.
    #[serde(rename = "__verbose", skip_serializing_if = "Option::is_none")]
    pub(crate) verbose: Option<serde_json::Value>,
}

/// llama-server's `prompt_progress`: tokens of the prompt, those that were cached, those that are done with the cached
/// ones counted, and milliseconds since the reading began.
#[derive(Serialize, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProgressBody {
    total: u32,
    cache: u32,
    processed: u32,
    time_ms: u64,
}

impl From<&PromptProgress> for ProgressBody {
    fn from(progress: &PromptProgress) -> Self {
        let PromptProgress { total, cached, processed, elapsed } = *progress;
        let time_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        Self { total, cache: cached, processed, time_ms }
    }
}

/// What serves, for clients that compare answers over time: llama.cpp's version after a `b`, as llama-server has its
/// build's, and ours.
pub(crate) static FINGERPRINT: LazyLock<String> =
    LazyLock::new(|| format!("b{}-altiplano-{}", crate::engine::llama_cpp_version(), env!("CARGO_PKG_VERSION")));

#[derive(Serialize)]
pub(crate) struct ChoiceBody<'a> {
    pub(crate) index: usize,
    #[serde(flatten)]
    pub(crate) said: Said<'a>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Said<'a> {
    Message(Message<'a>),
    Delta(Message<'a>),
    Text(&'a str),
}

#[derive(Serialize, Default)]
pub(crate) struct Message<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Content::is_absent")]
    pub(crate) content: Content<'a>,
    /// The reasoning apart from the answer, under the name that llama-server and vLLM use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<CallBody<'a>>,
}

/// A message's text.
#[derive(Serialize, Default)]
#[serde(untagged)]
pub(crate) enum Content<'a> {
    #[default]
    Absent,
    /// What the first chunk of a stream has, and a message that only calls tools.
    Null,
    Text(&'a str),
}

impl Content<'_> {
    fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

/// A tool call, whole, or in pieces that `index` holds together.
#[derive(Serialize)]
pub(crate) struct CallBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: FunctionBody<'a>,
}

#[derive(Serialize)]
pub(crate) struct FunctionBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<&'a str>,
    pub(crate) arguments: &'a str,
}

pub(crate) fn finish_word(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
    }
}

/// What stands in `usage` where it stands at all.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum UsageSlot {
    /// Null: in every chunk but the last when usage was asked for.
    Later,
    Now(UsageBody),
}

/// OpenAI's `usage`.
#[derive(Serialize, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UsageBody {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) total_tokens: u64,
    pub(crate) prompt_tokens_details: PromptDetails,
}

#[derive(Serialize, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: u64,
}

/// llama-server's `timings`, and two of ours (`queue_ms`, `time_to_first_token_ms`). Milliseconds; a rate that cannot be
/// known from so few tokens is 0, as with llama-server.
#[derive(Serialize, Clone, Debug, PartialEq)]
pub(crate) struct TimingsBody {
    pub(crate) queue_ms: f64,
    pub(crate) time_to_first_token_ms: f64,
    /// Prompt tokens that were in the KV cache already.
    pub(crate) cache_n: u64,
    /// Prompt tokens that were computed.
    pub(crate) prompt_n: u64,
    pub(crate) prompt_ms: f64,
    pub(crate) prompt_per_token_ms: f64,
    pub(crate) prompt_per_second: f64,
    pub(crate) predicted_n: u64,
    /// From the first token to the last.
    pub(crate) predicted_ms: f64,
    pub(crate) predicted_per_token_ms: f64,
    pub(crate) predicted_per_second: f64,
    /// Tokens that were guessed and checked; absent where none were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) draft_n: Option<u64>,
    /// Of these, the ones that were right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) draft_n_accepted: Option<u64>,
}

/// Sums of one request: a prompt counts once however many choices it has, times are those of the slowest choice.
pub(crate) fn totals(choices: &[(Usage, Timings)], per_prompt: usize) -> (UsageBody, TimingsBody) {
    let mut usage = UsageBody::default();
    let mut computed = 0_u64;
    let mut between = 0_u64;
    let (mut drafted, mut accepted) = (0_u64, 0_u64);
    let mut slowest = Timings::default();
    let mut first_token = None::<Duration>;
    for (at, (tokens, times)) in choices.iter().enumerate() {
        if at % per_prompt.max(1) == 0 {
            usage.prompt_tokens += u64::from(tokens.prompt_tokens);
            usage.prompt_tokens_details.cached_tokens += u64::from(tokens.cached_tokens);
        }
        usage.completion_tokens += u64::from(tokens.completion_tokens);
        computed += u64::from(tokens.prompt_tokens.saturating_sub(tokens.cached_tokens));
        between += u64::from(tokens.completion_tokens.saturating_sub(1));
        drafted += u64::from(times.drafted);
        accepted += u64::from(times.accepted);
        slowest.queue = slowest.queue.max(times.queue);
        slowest.prefill = slowest.prefill.max(times.prefill);
        slowest.decode = slowest.decode.max(times.decode);
        first_token = Some(first_token.map_or(times.time_to_first_token, |least| least.min(times.time_to_first_token)));
    }
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens;
    // The first token is the end of the prefill: n tokens have n - 1 intervals.
    let (prompt_ms, predicted_ms) = (milliseconds(slowest.prefill), milliseconds(slowest.decode));
    let timings = TimingsBody {
        queue_ms: milliseconds(slowest.queue),
        time_to_first_token_ms: milliseconds(first_token.unwrap_or_default()),
        cache_n: usage.prompt_tokens_details.cached_tokens,
        prompt_n: computed,
        prompt_ms,
        prompt_per_token_ms: each(prompt_ms, computed),
        prompt_per_second: rate(computed, prompt_ms),
        predicted_n: usage.completion_tokens,
        predicted_ms,
        predicted_per_token_ms: each(predicted_ms, between),
        predicted_per_second: rate(between, predicted_ms),
        draft_n: (drafted > 0).then_some(drafted),
        draft_n_accepted: (drafted > 0).then_some(accepted),
    };
    (usage, timings)
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// So many in a second; 0 where no time went by.
fn rate(count: u64, ms: f64) -> f64 {
    if ms > 0.0 { to_six_places(float(count) / ms * 1e3) } else { 0.0 }
}

/// Milliseconds for each of so many; 0 of none.
fn each(ms: f64, count: u64) -> f64 {
    if count > 0 { to_six_places(ms / float(count)) } else { 0.0 }
}

fn to_six_places(number: f64) -> f64 {
    (number * 1e6).round() / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Log-probabilities, in the form of one or the other API.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Logprobs {
    Chat { content: Vec<TokenBody> },
    Text(TextLogprobs),
}

#[derive(Serialize)]
pub(crate) struct TokenBody {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<TokenBody>>,
}

#[derive(Serialize, Default)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<BTreeMap<String, f32>>,
    text_offset: Vec<usize>,
}

/// Log-probabilities of tokens, as chat completions and Responses say them.
pub(crate) fn tokens(tokens: &[TokenLogprob]) -> Vec<TokenBody> {
    let body = |bytes: &[u8], logprob: f32, top_logprobs| TokenBody {
        token: lossy(bytes),
        logprob: finite(logprob),
        bytes: bytes.to_vec(),
        top_logprobs,
    };
    let one = |token: &TokenLogprob| {
        let top = token.top.iter().map(|top| body(&top.bytes, top.logprob, None)).collect();
        body(&token.bytes, token.logprob, Some(top))
    };
    tokens.iter().map(one).collect()
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `offset`: characters of the answer before these tokens.
pub(crate) fn logprobs(shape: Shape, tokens: &[TokenLogprob], offset: usize) -> Logprobs {
    match shape {
        Shape::Chat => Logprobs::Chat { content: self::tokens(tokens) },
        Shape::Text => {
            let mut body = TextLogprobs::default();
            let mut at = offset;
            for token in tokens {
                let said = lossy(&token.bytes);
                body.text_offset.push(at);
                at += said.chars().count();
                body.tokens.push(said);
                body.token_logprobs.push(finite(token.logprob));
                let top = token.top.iter().map(|top| (lossy(&top.bytes), finite(top.logprob)));
                body.top_logprobs.push(top.collect());
            }
            Logprobs::Text(body)
        }
    }
}

/// JSON has no infinity; OpenAI's word for "next to impossible" is -9999.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

#[cfg(test)]
mod tests {
    use serde_json::{json, to_value};

    use super::*;
    use crate::engine::TopLogprob;

    fn tokens(prompt_tokens: u32, cached_tokens: u32, completion_tokens: u32) -> Usage {
        Usage { prompt_tokens, cached_tokens, completion_tokens }
    }

    fn times(queue: u64, prefill: u64, first: u64, decode: u64) -> Timings {
        let ms = Duration::from_millis;
        let (queue, prefill, time_to_first_token, decode) = (ms(queue), ms(prefill), ms(first), ms(decode));
        Timings { queue, prefill, time_to_first_token, decode, ..Timings::default() }
    }

    #[test]
    fn a_prompt_counts_once_for_all_its_choices() {
        let choices = [(tokens(10, 2, 5), times(1, 20, 21, 40)), (tokens(10, 9, 7), times(3, 10, 13, 60))];
        let (usage, timings) = totals(&choices, 2);
        assert_eq!(
            to_value(&usage).unwrap(),
            json!({"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22, "prompt_tokens_details": {"cached_tokens": 2}})
        );
        assert_eq!(
            to_value(&timings).unwrap(),
            json!({"queue_ms": 3.0, "time_to_first_token_ms": 13.0, "cache_n": 2, "prompt_n": 9, "prompt_ms": 20.0,
                   "prompt_per_token_ms": 2.222_222, "prompt_per_second": 450.0, "predicted_n": 12, "predicted_ms": 60.0,
                   "predicted_per_token_ms": 6.0, "predicted_per_second": 166.666_667})
        );
        let (two_prompts, _) = totals(&choices, 1);
        assert_eq!(two_prompts.prompt_tokens, 20);
    }

    #[test]
    fn guesses_are_summed() {
        let guessed = |drafted, accepted| Timings { drafted, accepted, ..times(0, 20, 20, 10) };
        let choices =
            [(tokens(10, 0, 9), guessed(8, 6)), (tokens(10, 9, 9), guessed(0, 0)), (tokens(10, 9, 9), guessed(4, 1))];
        let body = to_value(totals(&choices, 3).1).unwrap();
        assert_eq!((&body["draft_n"], &body["draft_n_accepted"]), (&json!(12), &json!(7)));
    }

    #[test]
    fn a_rate_that_cannot_be_known_is_zero() {
        let (_, timings) = totals(&[(tokens(10, 0, 1), times(0, 20, 20, 0))], 1);
        let body = to_value(&timings).unwrap();
        assert_eq!((&body["predicted_per_second"], &body["predicted_per_token_ms"]), (&json!(0.0), &json!(0.0)));
        assert_eq!((&body["prompt_per_second"], &body["prompt_per_token_ms"]), (&json!(500.0), &json!(2.0)));
    }

    #[test]
    fn log_probabilities_in_both_forms() {
        let top = TopLogprob { token: 2, logprob: f32::NEG_INFINITY, bytes: vec![0xff] };
        let token = |text: &str| TokenLogprob { logprob: -0.5, bytes: text.into(), top: vec![top.clone()] };
        let tokens = [token("é"), token("b")];
        assert_eq!(
            to_value(logprobs(Shape::Chat, &tokens[1..], 0)).unwrap(),
            json!({"content": [{"token": "b", "logprob": -0.5, "bytes": [98],
                                "top_logprobs": [{"token": "\u{fffd}", "logprob": -9999.0, "bytes": [255]}]}]})
        );
        assert_eq!(
            to_value(logprobs(Shape::Text, &tokens, 3)).unwrap(),
            json!({"tokens": ["é", "b"], "token_logprobs": [-0.5, -0.5], "text_offset": [3, 4],
                   "top_logprobs": [{"\u{fffd}": -9999.0}, {"\u{fffd}": -9999.0}]})
        );
    }
}

//! What a stream tells of itself while it comes: `return_progress` and `timings_per_token`.

use std::time::{Duration, Instant};

use super::params::Params;
use super::wire::{self, ProgressBody, TimingsBody};
use crate::engine::{PromptProgress, Timings, Usage};

/// Follows the choices of one request.
pub(crate) struct Live {
    tells_progress: bool,
    tells_timings: bool,
    begun: Instant,
    choices: Vec<One>,
}

#[derive(Clone, Copy, Default)]
struct One {
    prompt: PromptProgress,
    queue: Duration,
    tokens: u32,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Live {
    pub(crate) fn new(params: &Params, now: Instant) -> Self {
        Self {
            tells_progress: params.return_progress,
            tells_timings: params.timings_per_token,
            begun: now,
            choices: Vec::new(),
        }
    }

    fn choice(&mut self, choice: usize) -> &mut One {
        if self.choices.len() <= choice {
            self.choices.resize(choice + 1, One::default());
        }
        &mut self.choices[choice]
    }

    /// More of a prompt has been read; what a chunk is to say of it, if one is to come.
    pub(crate) fn progress(&mut self, choice: usize, progress: &PromptProgress, now: Instant) -> Option<ProgressBody> {
        let queue = now.saturating_duration_since(self.begun).saturating_sub(progress.elapsed);
        let one = self.choice(choice);
        if one.prompt.total == 0 {
            one.queue = queue;
        }
        one.prompt = *progress;
        self.tells_progress.then(|| ProgressBody::from(progress))
    }

    /// A token came.
    pub(crate) fn token(&mut self, choice: usize, now: Instant) {
        let one = self.choice(choice);
        one.first.get_or_insert(now);
        one.last = Some(now);
        one.tokens = one.tokens.saturating_add(1);
    }

    /// The timings of a choice until now, where each chunk is to have them.
    pub(crate) fn timings(&self, choice: usize) -> Option<TimingsBody> {
        if !self.tells_timings {
            return None;
        }
        let One { prompt, queue, tokens, first, last } = self.choices.get(choice).copied().unwrap_or_default();
        let since = |later: Option<Instant>, earlier| later.map_or(Duration::ZERO, |at| at.duration_since(earlier));
        let usage = Usage { prompt_tokens: prompt.processed, cached_tokens: prompt.cached, completion_tokens: tokens };
        let timings = Timings {
            queue,
            prefill: if prompt.processed > prompt.cached { prompt.elapsed } else { Duration::ZERO },
            time_to_first_token: since(first, self.begun),
            decode: first.map_or(Duration::ZERO, |first| since(last, first)),
            // Known at the end.
            ..Timings::default()
        };
        Some(wire::totals(&[(usage, timings)], 1).1)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json, to_value};

    use super::super::fields::Fields;
    use super::*;
    use crate::engine::SamplingParams;

    #[test]
    fn a_stream_tells_what_was_asked_for() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut params = Params::read(&Fields(Map::new()), &SamplingParams::default()).unwrap();
        let mut silent = Live::new(&params, start);
        let progress =
            |processed, ms| PromptProgress { total: 10, cached: 4, processed, elapsed: Duration::from_millis(ms) };
        assert!(silent.progress(0, &progress(4, 0), at(5)).is_none() && silent.timings(0).is_none());

        (params.return_progress, params.timings_per_token) = (true, true);
        let mut live = Live::new(&params, start);
        let said = live.progress(1, &progress(4, 0), at(5)).unwrap();
        assert_eq!(to_value(said).unwrap(), json!({"total": 10, "cache": 4, "processed": 4, "time_ms": 0}));
        let told = |live: &Live| to_value(live.timings(1).unwrap()).unwrap();
        let nothing = told(&live);
        assert_eq!((&nothing["queue_ms"], &nothing["cache_n"]), (&json!(5.0), &json!(4)));
        for field in ["prompt_n", "predicted_n"] {
            assert_eq!(nothing[field], 0, "{nothing}");
        }
        for field in ["prompt_ms", "prompt_per_second", "predicted_ms", "predicted_per_token_ms"] {
            assert_eq!(nothing[field], 0.0, "{nothing}");
        }
        live.progress(1, &progress(10, 12), at(17));
        live.token(1, at(18));
        live.token(1, at(28));
        live.token(1, at(38));
        let told = told(&live);
        for (field, value) in [
            ("queue_ms", json!(5.0)),
            ("prompt_n", json!(6)),
            ("prompt_ms", json!(12.0)),
            ("prompt_per_token_ms", json!(2.0)),
            ("time_to_first_token_ms", json!(18.0)),
            ("predicted_n", json!(3)),
            ("predicted_ms", json!(20.0)),
            ("predicted_per_second", json!(100.0)),
        ] {
            assert_eq!(told[field], value, "{field} of {told}");
        }
    }
}

//! The metrics of a worker under llama-server's names, for dashboards that were made for it.
//!
//! Only a model's own port says them: they have no labels, so that several models' cannot stand in one exposition.

use std::fmt::Write as _;

use crate::engine::EngineStats;

/// Seconds of all requests that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seconds {
    pub(super) prefill: f64,
    pub(super) decode: f64,
}

/// The families in the text format.
pub(super) fn render(stats: &EngineStats, seconds: Seconds) -> String {
    let computed = stats.prompt_tokens.saturating_sub(stats.cached_prompt_tokens);
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let float = |count: u64| count as f64;
    let ratio = |over: f64, under: f64| if under > 0.0 { over / under } else { 0.0 };
    let families = [
        ("prompt_tokens_total", "counter", "Prompt tokens computed.", float(computed)),
        (
            "prompt_tokens_cached_total",
            "counter",
            "Prompt tokens that were in the KV cache already.",
            float(stats.cached_prompt_tokens),
        ),
        ("prompt_seconds_total", "counter", "Seconds from the slot to the first token.", seconds.prefill),
        ("tokens_predicted_total", "counter", "Tokens generated.", float(stats.generated_tokens)),
        ("tokens_predicted_seconds_total", "counter", "Seconds from the first token to the last.", seconds.decode),
        ("spec_decode_num_drafts_total", "counter", "Guesses of what follows.", float(stats.drafts)),
        ("spec_decode_num_draft_tokens_total", "counter", "Tokens guessed.", float(stats.drafted_tokens)),
        (
            "spec_decode_num_accepted_tokens_total",
            "counter",
            "Guessed tokens that were right.",
            float(stats.accepted_tokens),
        ),
        ("n_decode_total", "counter", "Steps of the engine.", float(stats.steps)),
        ("n_tokens_max", "counter", "Most cells of the KV cache in use at once.", f64::from(stats.cells_peak)),
        (
            "prompt_tokens_seconds",
            "gauge",
            "Prompt tokens computed in a second.",
            ratio(float(computed), seconds.prefill),
        ),
        (
            "predicted_tokens_seconds",
            "gauge",
            "Tokens that one request generates in a second.",
            ratio(float(stats.generated_tokens), seconds.decode),
        ),
        ("requests_processing", "gauge", "Generations that run.", f64::from(stats.running)),
        ("requests_deferred", "gauge", "Generations that wait for a slot.", f64::from(stats.waiting)),
        (
            "n_busy_slots_per_decode",
            "gauge",
            "Generations that take part in a step, on average.",
            ratio(float(stats.step_sequences), float(stats.steps)),
        ),
    ];
    let mut text = String::new();
    for (name, kind, help, value) in families {
        // Writing to a string does not fail.
        let _ = write!(text, "# HELP llamacpp:{name} {help}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_llama_servers() {
        let stats = EngineStats {
            prompt_tokens: 12,
            cached_prompt_tokens: 4,
            generated_tokens: 10,
            steps: 5,
            step_sequences: 15,
            drafts: 3,
            drafted_tokens: 9,
            accepted_tokens: 6,
            cells_peak: 64,
            running: 2,
            ..EngineStats::default()
        };
        let text = render(&stats, Seconds { prefill: 0.5, decode: 2.0 });
        for line in [
            "# TYPE llamacpp:prompt_tokens_total counter",
            "llamacpp:prompt_tokens_total 8",
            "llamacpp:prompt_tokens_cached_total 4",
            "llamacpp:prompt_seconds_total 0.5",
            "llamacpp:prompt_tokens_seconds 16",
            "llamacpp:predicted_tokens_seconds 5",
            "llamacpp:n_decode_total 5",
            "llamacpp:spec_decode_num_drafts_total 3",
            "llamacpp:spec_decode_num_draft_tokens_total 9",
            "llamacpp:spec_decode_num_accepted_tokens_total 6",
            "llamacpp:n_busy_slots_per_decode 3",
            "llamacpp:n_tokens_max 64",
            "llamacpp:requests_processing 2",
        ] {
            assert!(text.lines().any(|there| there == line), "no {line} in:\n{text}");
        }
        // A worker that has done nothing divides by nothing.
        assert!(!render(&EngineStats::default(), Seconds::default()).contains("NaN"));
    }
}

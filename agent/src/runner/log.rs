//! A runner's log becomes the agent's: JSON lines of `tracing`, and what llama.cpp writes past it before it aborts.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::lines::Tail;
use super::supervise::WorkerId;

const TARGET: &str = "altiplano_agent::worker";

/// Logs a line at its own level, and keeps it in `tail` if it may tell why the process is about to end.
pub(super) fn pass_on(line: &str, model: &str, worker: WorkerId, tail: &mut Tail) {
    let Ok(mut event) = serde_json::from_str::<Map<String, Value>>(line) else {
        if !line.trim().is_empty() {
            tracing::warn!(target: TARGET, model, worker, "{line}");
            tail.push(line);
        }
        return;
    };
    let mut take = |key: &str| match event.remove(key) {
        Some(Value::String(text)) => text,
        _ => String::new(),
    };
    let (level, message, _, from) = (take("level"), take("message"), take("timestamp"), take("target"));
    let mut text = message;
    for (key, value) in &event {
        let _ = match value {
            Value::String(value) => write!(text, " {key}={value}"),
            value => write!(text, " {key}={value}"),
        };
    }
    match level.as_str() {
        "ERROR" => tracing::error!(target: TARGET, model, worker, from, "{text}"),
        "WARN" => tracing::warn!(target: TARGET, model, worker, from, "{text}"),
        "DEBUG" => tracing::debug!(target: TARGET, model, worker, from, "{text}"),
        "TRACE" => tracing::trace!(target: TARGET, model, worker, from, "{text}"),
        _ => tracing::info!(target: TARGET, model, worker, from, "{text}"),
    }
    if matches!(level.as_str(), "ERROR" | "WARN") {
        tail.push(&text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_has_what_went_wrong_and_nothing_else() {
        let mut tail = Tail::default();
        let lines = [
            r#"{"timestamp":"2026-01-01T00:00:00Z","level":"INFO","message":"request ended","target":"x"}"#,
            r#"{"timestamp":"2026-01-01T00:00:00Z","level":"ERROR","message":"no memory","bytes":17,"device":"CUDA0","target":"x"}"#,
            "",
            "ggml.c:1: GGML_ASSERT(n > 0) failed",
        ];
        for line in lines {
            pass_on(line, "ns/a", 1, &mut tail);
        }
        assert_eq!(tail.text(), "no memory bytes=17 device=CUDA0; ggml.c:1: GGML_ASSERT(n > 0) failed");
    }
}

//! What a worker measures: its requests, and the engine's counters.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use altiplano_crds::model_deployment::OverflowPolicy;
use prometheus::{Counter, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

use super::{INTER_TOKEN_BUCKETS, REQUEST_SECONDS_BUCKETS, TIME_TO_FIRST_TOKEN_BUCKETS, TOKEN_BUCKETS, llama_server};
use crate::engine::{EngineStats, FinishReason, Timings, Usage};

/// How a request ended, for `altiplano_request_success_total{finished_reason}` as vLLM has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The model ended, or a stop text came.
    Stop,
    /// The limit of tokens was reached.
    Length,
    /// The client went away.
    Abort,
    /// The engine failed, or the request took too long.
    Error,
}

impl EndReason {
    fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

impl From<FinishReason> for EndReason {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
        }
    }
}

/// The metrics of one worker.
pub struct WorkerMetrics {
    registry: Registry,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    success: IntCounterVec,
    http_errors: IntCounterVec,
    truncations: IntCounterVec,
    running: Gauge,
    waiting: Gauge,
    cache_usage: Gauge,
    prompt_total: IntCounter,
    generation_total: IntCounter,
    draft_total: IntCounter,
    accepted_total: IntCounter,
    cache_queries: IntCounter,
    cache_hits: IntCounter,
    resizes: IntCounter,
    shrinks: IntCounter,
    growths_anticipated: IntCounter,
    growths_refused: IntCounter,
    context_waits: IntCounter,
    resize_seconds: Counter,
    preemptions: IntCounter,
    followed: IntCounter,
    images: IntCounter,
    image_seconds: Counter,
    audio_parts: IntCounter,
    audio_seconds: Counter,
    steps: IntCounter,
    step_age: Gauge,
    probes: IntCounter,
    cells_total: Gauge,
    cells_used: Gauge,
    cells_kept: Gauge,
    host_bytes: Gauge,
    embedded_texts: IntCounter,
    /// When the counters began, in seconds since 1970.
    started: u64,
    /// Held while the engine's counters are copied, so that two scrapes do not count the same difference twice.
    scrape: Mutex<()>,
}

impl WorkerMetrics {
    /// Metrics of the model `namespace/name`.
    #[expect(clippy::too_many_lines, reason = "one list of what there is")]
    pub fn new(namespace: &str, name: &str) -> Result<Self, prometheus::Error> {
        let labels =
            HashMap::from([("namespace".to_owned(), namespace.to_owned()), ("model_name".to_owned(), name.to_owned())]);
        let registry = Registry::new_custom(Some("altiplano".to_owned()), None)?;
        // On each metric and not on the registry, which would write them in an order of its own each time.
        let opts = |name: &str, help: &str| Opts::new(name, help).const_labels(labels.clone());
        let histogram = |name: &str, help: &str, buckets: &[f64]| -> Result<Histogram, prometheus::Error> {
            let histogram = Histogram::with_opts(HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let counter = IntCounter::with_opts(opts(name, help))?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let counters = |name: &str, help: &str, label: &str, values: &[&str]| {
            let counters = IntCounterVec::new(opts(name, help), &[label])?;
            for value in values {
                // A series that is there from the start lets rate() see its first increment.
                counters.with_label_values(&[*value]).reset();
            }
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let seconds_counter = |name: &str, help: &str| -> Result<Counter, prometheus::Error> {
            let counter = Counter::with_opts(opts(name, help))?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let gauge = |name: &str, help: &str| -> Result<Gauge, prometheus::Error> {
            let gauge = Gauge::with_opts(opts(name, help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        Ok(Self {
            time_to_first_token: histogram(
                "time_to_first_token_seconds",
                "Seconds from the arrival of a request at the worker to its first token.",
                TIME_TO_FIRST_TOKEN_BUCKETS,
            )?,
            inter_token: histogram(
                "inter_token_latency_seconds",
                "Seconds between two tokens of one answer.",
                INTER_TOKEN_BUCKETS,
            )?,
            end_to_end: histogram(
                "e2e_request_latency_seconds",
                "Seconds from the arrival of a request at the worker to its last token.",
                REQUEST_SECONDS_BUCKETS,
            )?,
            queue: histogram(
                "request_queue_time_seconds",
                "Seconds that a request waited for a slot.",
                REQUEST_SECONDS_BUCKETS,
            )?,
            prefill: histogram(
                "request_prefill_time_seconds",
                "Seconds from the slot to the first token, or to the last embedding.",
                REQUEST_SECONDS_BUCKETS,
            )?,
            decode: histogram(
                "request_decode_time_seconds",
                "Seconds from the first token to the last.",
                REQUEST_SECONDS_BUCKETS,
            )?,
            prompt_tokens: histogram("request_prompt_tokens", "Tokens of a prompt.", TOKEN_BUCKETS)?,
            generation_tokens: histogram("request_generation_tokens", "Tokens of an answer.", TOKEN_BUCKETS)?,
            success: counters(
                "request_success_total",
                "Requests that ended, by how: stop (also all embeddings made), length, abort (the client went away) or error.",
                "finished_reason",
                &["stop", "length", "abort", "error"],
            )?,
            http_errors: counters(
                "http_errors_total",
                "Answers of the worker with an error status, by class.",
                "code",
                &["4xx", "5xx"],
            )?,
            truncations: counters(
                "context_truncations_total",
                "Requests of which something was cut because the prompt was too long, by policy.",
                "policy",
                &["DropOldest", "DropMiddle"],
            )?,
            running: gauge("num_requests_running", "Generations that run.")?,
            waiting: gauge("num_requests_waiting", "Generations that wait for a slot.")?,
            cache_usage: gauge("kv_cache_usage_perc", "Part of the KV cache's cells that hold a token; 1 is full.")?,
            prompt_total: counter("prompt_tokens_total", "Prompt tokens of all generations that got a slot.")?,
            generation_total: counter("generation_tokens_total", "Tokens generated.")?,
            draft_total: counter("spec_decode_num_draft_tokens_total", "Tokens guessed and then checked.")?,
            accepted_total: counter("spec_decode_num_accepted_tokens_total", "Guessed tokens that were right.")?,
            cache_queries: counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.")?,
            cache_hits: counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")?,
            resizes: counter("context_grows_total", "Times that the context grew.")?,
            shrinks: counter("context_shrinks_total", "Times that the context shrank.")?,
            growths_anticipated: counter(
                "context_grows_anticipated_total",
                "Of these, the ones that were ready before anybody needed them.",
            )?,
            growths_refused: counter(
                "context_grows_refused_total",
                "Times that the context could not grow because others held the memory.",
            )?,
            context_waits: counter(
                "context_waits_total",
                "Generations that had a slot and waited for room in the context, or for memory.",
            )?,
            resize_seconds: seconds_counter("context_resize_seconds_total", "Seconds of standstill for that.")?,
            preemptions: counter("preemptions_total", "Times that a generation gave its cells to an older one.")?,
            followed: counter("prefix_cache_waits_total", "Generations that waited for an equal prompt to be read.")?,
            images: counter("images_total", "Images, or parts of them, of which embeddings were made.")?,
            image_seconds: seconds_counter("image_seconds_total", "Seconds for that, steps of others included.")?,
            audio_parts: counter("audio_parts_total", "Sounds, or parts of them, of which embeddings were made.")?,
            audio_seconds: seconds_counter("audio_seconds_total", "Seconds for that, steps of others included.")?,
            steps: counter("engine_steps_total", "Steps that the engine has done.")?,
            probes: counter("engine_probes_total", "Tokens computed while nobody asked, to see that the GPU answers.")?,
            step_age: gauge(
                "engine_step_seconds",
                "Seconds that the engine's present step has taken; 0 while it is idle.",
            )?,
            cells_total: gauge("context_tokens", "Tokens that the KV cache has cells for.")?,
            cells_used: gauge("context_tokens_used", "Cells of the KV cache that hold a token.")?,
            cells_kept: gauge("context_tokens_kept", "Of these, the cells of prefixes that nobody uses now.")?,
            host_bytes: gauge("prefix_cache_host_bytes", "Bytes of generations' states in host memory.")?,
            embedded_texts: counter("embedded_texts_total", "Texts of which an embedding or a score was made.")?,
            started: crate::api::unix_seconds(),
            scrape: Mutex::new(()),
            registry,
        })
    }

    /// Counts an answer with an error status.
    pub fn http_answered(&self, status: http::StatusCode) {
        if status.is_client_error() || status.is_server_error() {
            self.http_errors.with_label_values(&[super::code_class(status)]).inc();
        }
    }

    /// Counts a request whose prompt was cut.
    pub fn truncated(&self, policy: OverflowPolicy) {
        self.truncations.with_label_values(&[crate::api::overflow_word(policy)]).inc();
    }

    /// Mean seconds of a request so far; `None` before the first.
    #[must_use]
    pub fn mean_request_seconds(&self) -> Option<f64> {
        let count = self.end_to_end.get_sample_count();
        #[expect(clippy::cast_precision_loss, reason = "an estimate for Retry-After")]
        (count > 0).then(|| self.end_to_end.get_sample_sum() / count as f64)
    }

    /// When the counters began, in seconds since 1970.
    #[must_use]
    pub fn started(&self) -> u64 {
        self.started
    }

    /// The same numbers under llama-server's names, without labels.
    #[must_use]
    pub fn render_as_llama_server(&self, stats: &EngineStats) -> String {
        let (prefill, decode) = (self.prefill.get_sample_sum(), self.decode.get_sample_sum());
        llama_server::render(stats, llama_server::Seconds { prefill, decode })
    }

    /// The text exposition, with the engine's counters as they are in `stats`.
    pub fn render(&self, stats: &EngineStats) -> Result<String, prometheus::Error> {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.running.set(f64::from(stats.running));
        self.waiting.set(f64::from(stats.waiting));
        self.cache_usage.set(match stats.cells_total {
            0 => 0.0,
            total => f64::from(stats.cells_used) / f64::from(total),
        });
        for (counter, now) in [
            (&self.prompt_total, stats.prompt_tokens),
            (&self.generation_total, stats.generated_tokens),
            (&self.draft_total, stats.drafted_tokens),
            (&self.accepted_total, stats.accepted_tokens),
            (&self.cache_queries, stats.prompt_tokens),
            (&self.cache_hits, stats.cached_prompt_tokens),
            (&self.resizes, stats.resizes),
            (&self.shrinks, stats.shrinks),
            (&self.growths_anticipated, stats.growths_anticipated),
            (&self.growths_refused, stats.growths_refused),
            (&self.context_waits, stats.context_waits),
            (&self.preemptions, stats.preempted),
            (&self.followed, stats.followed),
            (&self.images, stats.pictures),
            (&self.audio_parts, stats.sounds),
            (&self.steps, stats.steps),
            (&self.probes, stats.probes),
            (&self.embedded_texts, stats.embedded_texts),
        ] {
            counter.inc_by(now.saturating_sub(counter.get()));
        }
        for (counter, now) in [
            (&self.resize_seconds, stats.resize_time),
            (&self.image_seconds, stats.picture_time),
            (&self.audio_seconds, stats.sound_time),
        ] {
            counter.inc_by((now.as_secs_f64() - counter.get()).max(0.0));
        }
        for (gauge, now) in [
            (&self.cells_total, stats.cells_total),
            (&self.cells_used, stats.cells_used),
            (&self.cells_kept, stats.cells_kept),
        ] {
            gauge.set(f64::from(now));
        }
        self.step_age.set(stats.step_age.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "a size to look at")]
        self.host_bytes.set(stats.host_cache_bytes as f64);
        super::render(&self.registry)
    }
}

/// Follows one generation; whatever happens to it is counted once.
pub struct RequestMetrics {
    metrics: std::sync::Arc<WorkerMetrics>,
    arrived: Instant,
    last_token: Option<Instant>,
    ended: bool,
}

impl RequestMetrics {
    /// Begins with a request that arrived at `arrived`.
    #[must_use]
    pub fn new(metrics: std::sync::Arc<WorkerMetrics>, arrived: Instant) -> Self {
        Self { metrics, arrived, last_token: None, ended: false }
    }

    /// A token came.
    pub fn token(&mut self, now: Instant) {
        match self.last_token.replace(now) {
            None => self.metrics.time_to_first_token.observe(seconds(now, self.arrived)),
            Some(last) => self.metrics.inter_token.observe(seconds(now, last)),
        }
    }

    /// The generation ended well.
    pub fn done(&mut self, now: Instant, reason: FinishReason, usage: &Usage, timings: &Timings) {
        let metrics = &self.metrics;
        metrics.end_to_end.observe(seconds(now, self.arrived));
        metrics.queue.observe(timings.queue.as_secs_f64());
        metrics.prefill.observe(timings.prefill.as_secs_f64());
        metrics.decode.observe(timings.decode.as_secs_f64());
        metrics.prompt_tokens.observe(f64::from(usage.prompt_tokens));
        metrics.generation_tokens.observe(f64::from(usage.completion_tokens));
        self.end(reason.into());
    }

    /// Texts were embedded or scored: there is no first token and no answer.
    pub fn embedded(&mut self, now: Instant, prompt_tokens: u32, queue: Duration, compute: Duration) {
        let metrics = &self.metrics;
        metrics.end_to_end.observe(seconds(now, self.arrived));
        metrics.queue.observe(queue.as_secs_f64());
        metrics.prefill.observe(compute.as_secs_f64());
        metrics.prompt_tokens.observe(f64::from(prompt_tokens));
        self.end(EndReason::Stop);
    }

    /// The generation ended otherwise.
    pub fn end(&mut self, reason: EndReason) {
        if !std::mem::replace(&mut self.ended, true) {
            self.metrics.success.with_label_values(&[reason.label()]).inc();
        }
    }
}

impl Drop for RequestMetrics {
    fn drop(&mut self) {
        self.end(EndReason::Abort);
    }
}

fn seconds(now: Instant, since: Instant) -> f64 {
    now.checked_duration_since(since).unwrap_or(Duration::ZERO).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn line<'t>(text: &'t str, start: &str) -> &'t str {
        text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no {start} in:\n{text}"))
    }

    #[test]
    fn a_generation_is_counted_once_however_it_ends() {
        let metrics = Arc::new(WorkerMetrics::new("ml", "toy").unwrap());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut good = RequestMetrics::new(metrics.clone(), start);
        good.token(at(30));
        good.token(at(50));
        let usage = Usage { prompt_tokens: 12, cached_tokens: 4, completion_tokens: 2 };
        good.done(at(60), FinishReason::Length, &usage, &Timings::default());
        drop(good);
        drop(RequestMetrics::new(metrics.clone(), start));
        let mut failed = RequestMetrics::new(metrics.clone(), start);
        failed.end(EndReason::Error);
        drop(failed);

        let stats = EngineStats {
            cells_used: 64,
            cells_total: 256,
            prompt_tokens: 12,
            shrinks: 3,
            pictures: 2,
            picture_time: Duration::from_millis(2500),
            sounds: 3,
            sound_time: Duration::from_millis(3500),
            resize_time: Duration::from_millis(1500),
            host_cache_bytes: 4096,
            steps: 7,
            step_age: Duration::from_millis(250),
            ..EngineStats::default()
        };
        let text = metrics.render(&stats).unwrap();
        let again = metrics.render(&stats).unwrap();
        assert_eq!(text, again, "counters of the engine are copied, not added up");
        let labels = r#"model_name="toy",namespace="ml""#;
        for (reason, count) in [("stop", 0), ("length", 1), ("abort", 1), ("error", 1)] {
            let series = format!(r#"altiplano_request_success_total{{finished_reason="{reason}",{labels}}} {count}"#);
            assert!(text.contains(&series), "{series} in:\n{text}");
        }
        assert!(line(&text, "altiplano_time_to_first_token_seconds_sum").ends_with(" 0.03"));
        assert!(line(&text, "altiplano_inter_token_latency_seconds_sum").ends_with(" 0.02"));
        assert!(line(&text, "altiplano_kv_cache_usage_perc").ends_with(" 0.25"));
        assert!(line(&text, "altiplano_prompt_tokens_total").ends_with(" 12"));
        assert!(line(&text, "altiplano_context_tokens_used").ends_with(" 64"));
        assert!(line(&text, "altiplano_context_shrinks_total").ends_with(" 3"));
        assert!(line(&text, "altiplano_context_resize_seconds_total").ends_with(" 1.5"));
        assert!(line(&text, "altiplano_images_total").ends_with(" 2"));
        assert!(line(&text, "altiplano_image_seconds_total").ends_with(" 2.5"));
        assert!(line(&text, "altiplano_audio_parts_total").ends_with(" 3"));
        assert!(line(&text, "altiplano_audio_seconds_total").ends_with(" 3.5"));
        assert!(line(&text, "altiplano_prefix_cache_host_bytes").ends_with(" 4096"));
        assert!(line(&text, "altiplano_engine_steps_total").ends_with(" 7"));
        assert!(line(&text, "altiplano_engine_step_seconds").ends_with(" 0.25"));
    }
}

//! A client that costs next to nothing: one socket, one buffer, and a look for events in what comes.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::servers::{Model, Server};

/// Longest silence.
const PATIENCE: Duration = Duration::from_mins(3);

/// A prompt, and how many tokens to generate.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) prompt: Vec<u32>,
    pub(crate) generate: u32,
}

/// When what came.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) sent: Instant,
    /// One for each token.
    pub(crate) tokens: Vec<Instant>,
    pub(crate) done: Instant,
    /// Tokens that the server says were guessed, and those of them that were right.
    pub(crate) guesses: (u64, u64),
}

impl Answer {
    /// Seconds to the first token.
    pub(crate) fn first_token(&self) -> f64 {
        self.tokens.first().map_or(f64::NAN, |first| (*first - self.sent).as_secs_f64())
    }

    /// The times between tokens, from and to.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = (Instant, Instant)> {
        self.tokens.windows(2).map(|pair| (pair[0], pair[1]))
    }

    /// Tokens a second, from the first to the last.
    pub(crate) fn pace(&self) -> f64 {
        match (self.tokens.first(), self.tokens.last()) {
            (Some(first), Some(last)) => count(self.tokens.len() - 1) / (*last - *first).as_secs_f64(),
            _ => f64::NAN,
        }
    }
}

pub(crate) fn count(number: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts of tokens")]
    let number = number as f64;
    number
}

/// Asks and reads to the end; exactly the tokens that were asked for, or an error.
pub(crate) async fn ask(server: &Server, question: &Question) -> Result<Answer> {
    ask_telling(server, question, |_| ControlFlow::Continue(())).await
}

/// Asks many at once.
pub(crate) async fn ask_all(server: &Server, questions: &[Question]) -> Result<Vec<Answer>> {
    futures::future::try_join_all(questions.iter().map(|question| ask(server, question))).await
}

/// Like [`ask`]; `token` is told the number of tokens with each that comes, and may hang up.
pub(crate) async fn ask_telling(
    server: &Server,
    question: &Question,
    token: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Answer> {
    ask_with(server, question, json!({}), token).await
}

/// The same with more fields of the body.
pub(crate) async fn ask_with(
    server: &Server,
    question: &Question,
    more: Value,
    mut token: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Answer> {
    let mut body = json!({
        "model": server.model, "prompt": question.prompt, "max_tokens": question.generate,
        "temperature": 0, "ignore_eos": true, "stream": true,
    });
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    let body = body.to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        server.address,
        body.len()
    );
    let mut socket = TcpStream::connect(server.address).await.context("no connection")?;
    socket.set_nodelay(true)?;
    let sent = Instant::now();
    socket.write_all(request.as_bytes()).await?;

    let mut tokens = Vec::with_capacity(question.generate as usize);
    let mut buffer = Vec::with_capacity(64 * 1024);
    let mut looked_at = 0;
    let mut guesses = (0, 0);
    loop {
        // What was looked at is not kept: streams may run for minutes.
        buffer.drain(..looked_at);
        looked_at = 0;
        let read = tokio::time::timeout(PATIENCE, socket.read_buf(&mut buffer));
        let bytes = read.await.with_context(|| format!("{}: silence", server.name))??;
        let now = Instant::now();
        while let Some(length) = buffer[looked_at..].iter().position(|byte| *byte == b'\n') {
            let line = &buffer[looked_at..looked_at + length];
            looked_at += length + 1;
            if line.starts_with(b"data: [DONE]") {
                ensure!(
                    tokens.len() == question.generate as usize,
                    "{}: {} tokens where {} were asked for",
                    server.name,
                    tokens.len(),
                    question.generate
                );
                return Ok(Answer { sent, tokens, done: now, guesses });
            }
            if line.starts_with(b"data: {") && says_something(line) {
                tokens.push(now);
                if token(tokens.len()).is_break() {
                    return Ok(Answer { sent, tokens, done: now, guesses });
                }
            } else if let Some(timings) = line.strip_prefix(b"data: ").and_then(timings) {
                let count = |name: &str| timings[name].as_u64().unwrap_or_default();
                guesses = (count("draft_n"), count("draft_n_accepted"));
            }
        }
        if bytes == 0 {
            bail!("{}: the stream ended early: {}", server.name, String::from_utf8_lossy(&buffer));
        }
    }
}

/// The `timings` of an event without text.
fn timings(event: &[u8]) -> Option<Value> {
    let event: Value = serde_json::from_slice(event).ok()?;
    event.get("timings").cloned()
}

/// Whether a completion event has text.
fn says_something(event: &[u8]) -> bool {
    const TEXT: &[u8] = b"\"text\":\"";
    event
        .windows(TEXT.len())
        .position(|window| window == TEXT)
        .is_some_and(|at| event.get(at + TEXT.len()) != Some(&b'"'))
}

/// A question for each of these lengths, all different.
pub(crate) fn questions(model: &Model, seed: u64, lengths: &[usize], generate: u32) -> Vec<Question> {
    let prompt = |(n, length): (u64, &usize)| random_tokens(seed << 8 | n, *length, model.vocabulary);
    (0..).zip(lengths).map(|numbered| Question { prompt: prompt(numbered), generate }).collect()
}

/// Tokens that spell text, from 256 on, and differ from those of any other seed.
pub(crate) fn random_tokens(seed: u64, length: usize, vocabulary: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(state >> 33).unwrap_or_default()
    };
    (0..length).map(|_| 256 + next() % (vocabulary - 256 - 8)).collect()
}

//! A chat over HTTP as a client reads it: server-sent events, token by token.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::control_plane::tls;

/// What a streamed answer was, and when it came.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The whole text.
    pub text: String,
    /// From sending the request to the first piece of text.
    pub first_token: Duration,
    /// From sending the request to the end.
    pub total: Duration,
    /// Why it ended: `stop` or `length`.
    pub finish_reason: String,
    /// The `usage` of the last event that had one.
    pub usage: Value,
}

/// Asks `model` at `url` (up to and without `/v1`) a question and hands each piece of the answer to `piece` as it comes.
pub async fn chat(url: &str, model: &str, question: &str, mut piece: impl FnMut(&str)) -> Result<Answer> {
    tls();
    let body = json!({
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    // Between two pieces, and to the first one: a model may have to load.
    let client = reqwest::Client::builder().read_timeout(Duration::from_mins(2)).build()?;
    let start = Instant::now();
    let response = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await?;
    let status = response.status();
    if !status.is_success() {
        bail!("{url}: {status}: {}", response.text().await?);
    }
    let (mut text, mut first, mut finish_reason, mut usage) = (String::new(), None, None, Value::Null);
    let mut stream = response.bytes_stream();
    let mut buffer = Vec::new();
    let mut done = false;
    while let Some(bytes) = stream.next().await {
        buffer.extend_from_slice(&bytes.context("the stream broke")?);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let line = String::from_utf8(line)?;
            // Empty lines part events; a line that begins with a colon is a comment.
            let Some(data) = line.trim_end().strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let event: Value = serde_json::from_str(data).with_context(|| format!("not JSON: {data}"))?;
            ensure!(event.get("error").is_none(), "the server said in the stream: {event}");
            if let Some(delta) = event.pointer("/choices/0/delta/content").and_then(Value::as_str)
                && !delta.is_empty()
            {
                first.get_or_insert_with(|| start.elapsed());
                text.push_str(delta);
                piece(delta);
            }
            if let Some(reason) = event.pointer("/choices/0/finish_reason").and_then(Value::as_str) {
                finish_reason = Some(reason.to_owned());
            }
            if let Some(found @ Value::Object(_)) = event.get("usage") {
                usage = found.clone();
            }
        }
    }
    ensure!(done, "the stream ended without [DONE]; it said {text:?}");
    Ok(Answer {
        text,
        first_token: first.context("an answer without text")?,
        total: start.elapsed(),
        finish_reason: finish_reason.context("an answer without finish_reason")?,
        usage,
    })
}

/// An HTTP client without surprises.
pub fn http() -> Result<reqwest::Client> {
    tls();
    Ok(reqwest::Client::builder().timeout(Duration::from_mins(2)).no_proxy().build()?)
}

/// Asks once, not streaming; returns the whole answer. An HTTP error is an error with its body.
pub async fn ask(url: &str, model: &str, prompt: &str) -> Result<Value> {
    let body = json!({"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0});
    let response = http()?.post(format!("{url}/v1/chat/completions")).json(&body).send().await?;
    let (status, text) = (response.status(), response.text().await?);
    ensure!(status.is_success(), "{status}: {text}");
    serde_json::from_str(&text).with_context(|| text)
}

/// The text of a whole answer.
pub fn content(answer: &Value) -> Result<&str> {
    answer
        .pointer("/choices/0/message/content")
        .and_then(Value::as_str)
        .with_context(|| format!("no content in {answer}"))
}

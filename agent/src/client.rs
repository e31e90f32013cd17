//! `altiplano-agent chat`: a small client at a terminal, for a first look at a model and at its timings.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use clap::Args;
use futures::TryStreamExt as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncReadExt as _, BufReader};
use tokio_util::io::StreamReader;

use crate::node::apply::chain;
use crate::runner::next_line;

/// Largest prompt that is read from standard input, in bytes: what the API takes.
const MAX_PROMPT_BYTES: u64 = 8 * 1024 * 1024;

/// Turns of a conversation that are kept: more than any context holds of a conversation typed by hand.
const MAX_MESSAGES: usize = 512;

/// Options of `altiplano-agent chat`.
#[derive(Args, Clone, Debug)]
pub struct ChatArgs {
    /// Where models are served: an agent, a Service, or any server with OpenAI's API.
    #[arg(long, env = "ALTIPLANO_URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,

    /// Name of the model. Default: the only one that is served there.
    #[arg(long, short)]
    pub model: Option<String>,

    /// System message.
    #[arg(long)]
    pub system: Option<String>,

    /// Tokens to generate at most.
    #[arg(long)]
    pub max_tokens: Option<u32>,

    /// 0 is greedy. Default: the model's.
    #[arg(long)]
    pub temperature: Option<f32>,

    /// After each answer, a line on standard error with time to first token, tokens, and tokens per second.
    #[arg(long, short)]
    pub verbose: bool,

    /// What to say. Default: a conversation on a terminal, else all of standard input as one prompt.
    pub prompt: Option<String>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The server could not be reached, or the connection broke.
    #[error("no answer from {url}")]
    Http {
        /// Address that was asked.
        url: String,
        /// What happened.
        #[source]
        source: reqwest::Error,
    },
    /// The server refused; its own words.
    #[error("{status}: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// `error.message` of the answer.
        message: String,
    },
    /// The answer broke off with an error event, or without an end.
    #[error("the answer broke off: {0}")]
    Broken(String),
    /// No `--model`, and not exactly one model is served.
    #[error("name one of the models with --model: {0}")]
    WhichModel(String),
    /// Standard input or output failed.
    #[error("standard input or output failed")]
    Terminal(#[from] std::io::Error),
}

/// Says the prompt, or holds a conversation until the end of standard input.
pub async fn run(args: ChatArgs) -> Result<(), ChatError> {
    let url = args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
    let failed = |source| ChatError::Http { url: url.clone(), source };
    let client = reqwest::Client::builder().connect_timeout(Duration::from_secs(10)).build().map_err(failed)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => only_model(&client, &url).await?,
    };
    let chat = Chat { client, url, model, args };
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(chat.args.system.iter().map(|text| json!({"role": "system", "content": text})));

    if let Some(prompt) = &chat.args.prompt {
        messages.push(json!({"role": "user", "content": prompt}));
        return chat.say(&messages).await.map(drop);
    }
    let mut input = BufReader::new(tokio::io::stdin());
    if !std::io::stdin().is_terminal() {
        let mut prompt = String::new();
        input.take(MAX_PROMPT_BYTES).read_to_string(&mut prompt).await?;
        messages.push(json!({"role": "user", "content": prompt}));
        return chat.say(&messages).await.map(drop);
    }
    eprintln!("{} at {}; Ctrl-D ends", chat.model, chat.url);
    loop {
        eprint!("> ");
        let Some(line) = next_line(&mut input).await? else { return Ok(()) };
        if line.trim().is_empty() || messages.len() >= MAX_MESSAGES {
            continue;
        }
        messages.push(json!({"role": "user", "content": line}));
        match chat.say(&messages).await {
            Ok(answer) => messages.push(json!({"role": "assistant", "content": answer})),
            // Such as a conversation that has become too long: the next line may do better.
            Err(error) => {
                eprintln!("{}", chain(&error));
                messages.pop();
            }
        }
    }
}

async fn only_model(client: &reqwest::Client, url: &str) -> Result<String, ChatError> {
    let failed = |source| ChatError::Http { url: url.to_owned(), source };
    let answer = client.get(format!("{url}/v1/models")).send().await.map_err(failed)?;
    let list: Value = checked(url, answer).await?.json().await.map_err(failed)?;
    let names = list["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut names = names.iter().filter_map(|model| model["id"].as_str());
    match (names.next(), names.next()) {
        (Some(only), None) => Ok(only.to_owned()),
        (None, _) => Err(ChatError::WhichModel("none is served there".to_owned())),
        (Some(first), Some(second)) => {
            let rest: Vec<_> = names.take(20).collect();
            Err(ChatError::WhichModel([&[first, second], rest.as_slice()].concat().join(", ")))
        }
    }
}

/// The answer, unless it is a refusal.
async fn checked(url: &str, answer: reqwest::Response) -> Result<reqwest::Response, ChatError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let text = answer.text().await.map_err(|source| ChatError::Http { url: url.to_owned(), source })?;
    let said = serde_json::from_str::<Value>(&text).ok();
    let message = said.as_ref().and_then(|body| body["error"]["message"].as_str()).unwrap_or(&text);
    Err(ChatError::Refused { status: status.as_u16(), message: message.to_owned() })
}

struct Chat {
    client: reqwest::Client,
    url: String,
    model: String,
    args: ChatArgs,
}

impl Chat {
    /// Prints the answer as it comes, and returns it.
    async fn say(&self, messages: &[Value]) -> Result<String, ChatError> {
        let mut body = json!({
            "model": self.model, "messages": messages, "stream": true, "stream_options": {"include_usage": true},
        });
        if let Some(tokens) = self.args.max_tokens {
            body["max_tokens"] = tokens.into();
        }
        if let Some(temperature) = self.args.temperature {
            body["temperature"] = temperature.into();
        }
        let failed = |source| ChatError::Http { url: self.url.clone(), source };
        let answer =
            self.client.post(format!("{}/v1/chat/completions", self.url)).json(&body).send().await.map_err(failed)?;
        let bytes = checked(&self.url, answer).await?.bytes_stream();
        let mut lines = BufReader::new(StreamReader::new(bytes.map_err(std::io::Error::other)));
        let mut answer = String::new();
        let mut last = Value::Null;
        while let Some(event) = next_event(&mut lines).await? {
            let delta = &event["choices"][0]["delta"];
            for text in [&delta["reasoning_content"], &delta["content"]] {
                let Some(text) = text.as_str() else { continue };
                let mut output = std::io::stdout().lock();
                output.write_all(text.as_bytes())?;
                output.flush()?;
            }
            answer.push_str(delta["content"].as_str().unwrap_or_default());
            if event["choices"][0]["finish_reason"] == "length" {
                eprint!(" [cut: the context or --max-tokens is used up]");
            }
            if let Some(truncation) = event.get("altiplano").and_then(|extra| extra.get("truncation")) {
                eprintln!("[the conversation was too long: {truncation}]");
            }
            if !event["timings"].is_null() {
                last = event;
            }
        }
        println!();
        if self.args.verbose {
            eprintln!("{}", summary(&last));
        }
        Ok(answer)
    }
}

/// The next event of the stream; `None` at its end.
async fn next_event(lines: &mut (impl AsyncBufRead + Unpin)) -> Result<Option<Value>, ChatError> {
    while let Some(line) = next_line(lines).await? {
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
        if data == "[DONE]" {
            return Ok(None);
        }
        let event: Value = serde_json::from_str(data).map_err(|error| ChatError::Broken(error.to_string()))?;
        if let Some(error) = event.get("error") {
            let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            return Err(ChatError::Broken(message));
        }
        return Ok(Some(event));
    }
    Err(ChatError::Broken("the connection was closed before the end".to_owned()))
}

/// One line about an answer's last event.
fn summary(event: &Value) -> String {
    let (timings, usage) = (&event["timings"], &event["usage"]);
    let number = |value: &Value, digits: usize| match value.as_f64() {
        Some(number) => format!("{number:.digits$}"),
        None => "?".to_owned(),
    };
    format!(
        "time to first token {} ms (queue {} ms); prompt {} tokens, {} of them cached, {} per second; answer {} tokens, {} \
         per second",
        number(&timings["time_to_first_token_ms"], 1),
        number(&timings["queue_ms"], 1),
        number(&usage["prompt_tokens"], 0),
        number(&timings["cache_n"], 0),
        number(&timings["prompt_per_second"], 1),
        number(&usage["completion_tokens"], 0),
        number(&timings["predicted_per_second"], 1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn events(stream: &str) -> (Vec<Value>, Option<String>) {
        let mut reader = BufReader::new(stream.as_bytes());
        let mut events = Vec::new();
        loop {
            match next_event(&mut reader).await {
                Ok(Some(event)) => events.push(event),
                Ok(None) => return (events, None),
                Err(error) => return (events, Some(error.to_string())),
            }
        }
    }

    #[tokio::test]
    async fn a_stream_ends_well_or_says_why_not() {
        let (found, error) = events(": ping\n\ndata: {\"a\": 1}\n\ndata:{\"b\":2}\n\ndata: [DONE]\n\n").await;
        assert_eq!((found, error), (vec![json!({"a": 1}), json!({"b": 2})], None));
        for (stream, expected) in [
            ("data: {\"a\": 1}\n\n", "closed before the end"),
            ("event: error\ndata: {\"error\": {\"message\": \"the worker died\"}}\n\n", "the worker died"),
            ("data: {\n\n", "EOF"),
        ] {
            let error = events(stream).await.1.unwrap_or_default();
            assert!(error.contains(expected), "{stream}: {error}");
        }
    }

    #[test]
    fn the_summary_says_what_it_does_not_know() {
        let event = json!({"usage": {"prompt_tokens": 25, "completion_tokens": 1},
                           "timings": {"time_to_first_token_ms": 12.34, "queue_ms": 0.1, "cache_n": 20}});
        assert_eq!(
            summary(&event),
            "time to first token 12.3 ms (queue 0.1 ms); prompt 25 tokens, 20 of them cached, ? per second; \
             answer 1 tokens, ? per second"
        );
    }
}

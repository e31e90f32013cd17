//! An engine in the test's own process, asked without HTTP.
#![allow(dead_code, reason = "each suite uses a part")]
#![allow(unreachable_pub, reason = "suites are crates that nobody uses")]
#![allow(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "wait.rs"]
mod wait;

use std::path::PathBuf;
use std::time::Instant;

use altiplano_agent::engine::{
    Engine, EngineError, EngineStats, FinishReason, GenerateEvent, GenerateRequest, Generation, SamplingParams,
    Timings, Token, TokenLogprob, Usage,
};
use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig};
use altiplano_crds::model_deployment::ContextSpec;
use altiplano_test_models::{Spec, toy};
use futures::StreamExt as _;
use tempfile::TempDir;

#[allow(unused_imports, reason = "some suites use it")]
pub use wait::PATIENCE;

pub fn config(model_path: PathBuf, context: ContextSpec) -> RunnerConfig {
    RunnerConfig { model_path, context, threads: 2, ..RunnerConfig::default() }
}

pub fn dynamic(min_tokens: i32, max_tokens: i32, parallel: i32) -> ContextSpec {
    ContextSpec { min_tokens: Some(min_tokens), max_tokens: Some(max_tokens), parallel, ..ContextSpec::default() }
}

pub fn generated(spec: &Spec) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    spec.write(&path).expect("a model file");
    (folder, path)
}

/// What llama.cpp takes: what the process itself takes is this test's, with other engines in it, and a dry run maps
/// nothing.
pub fn of_llama_cpp(memory: &[MemoryUse]) -> Vec<MemoryUse> {
    memory.iter().map(|part| MemoryUse { other_bytes: 0, mapped_bytes: 0, ..part.clone() }).collect()
}

pub fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

pub fn request(engine: &Engine, prompt: &str) -> GenerateRequest {
    let prompt = engine.tokenize(prompt, true, true).expect("tokens");
    GenerateRequest { id: "test".to_owned(), prompt, sampling: greedy(), ..GenerateRequest::default() }
}

pub fn chat(question: &str) -> String {
    format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<Token>,
    pub logprobs: Vec<TokenLogprob>,
    /// The stop text that came.
    pub stop: Option<String>,
    pub end: Result<(FinishReason, Usage, Timings), EngineError>,
}

impl Answer {
    pub fn reason(&self) -> FinishReason {
        self.end.as_ref().unwrap_or_else(|error| panic!("{error} after {:?}", self.text)).0
    }

    pub fn usage(&self) -> Usage {
        self.end.as_ref().unwrap_or_else(|error| panic!("{error} after {:?}", self.text)).1
    }

    pub fn timings(&self) -> Timings {
        self.end.as_ref().unwrap_or_else(|error| panic!("{error} after {:?}", self.text)).2
    }
}

pub async fn next(generation: &mut Generation) -> Option<GenerateEvent> {
    wait::within("the next event", generation.next()).await
}

pub async fn read(mut generation: Generation) -> Answer {
    let (mut text, mut tokens, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    loop {
        match next(&mut generation).await {
            Some(GenerateEvent::Progress(progress)) => panic!("nobody asked for {progress:?}"),
            Some(GenerateEvent::Token { text: piece, token, logprob }) => {
                assert!(!piece.is_empty() || logprob.is_some(), "an event that says nothing");
                text.push_str(&piece);
                tokens.push(token);
                logprobs.extend(logprob);
            }
            Some(GenerateEvent::Done { finish_reason, stop, usage, timings }) => {
                assert!(next(&mut generation).await.is_none(), "something comes after the end");
                return Answer { text, tokens, logprobs, stop, end: Ok((finish_reason, usage, timings)) };
            }
            Some(GenerateEvent::Failed(error)) => {
                return Answer { text, tokens, logprobs, stop: None, end: Err(error) };
            }
            None => panic!("a stream without an end, after {text:?}"),
        }
    }
}

pub async fn ask(engine: &Engine, request: GenerateRequest) -> Answer {
    read(engine.submit(request).expect("the request is taken")).await
}

/// Waits until the engine's numbers are as they should be, and returns them.
pub async fn until(engine: &Engine, what: &str, is_so: impl Fn(&EngineStats) -> bool) -> EngineStats {
    wait::until(what, || engine.stats(), is_so).await
}

pub fn stop(engine: &Engine) {
    engine.shutdown(Instant::now());
}

/// Chat questions of the toy model with one user message.
pub fn questions(count: usize) -> Vec<(String, String)> {
    let single = toy::questions().into_iter().filter(|question| question.messages.len() == 1);
    single.take(count).map(|question| (chat(&question.messages[0].content), question.answer)).collect()
}

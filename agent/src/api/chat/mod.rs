//! `POST /v1/chat/completions`, and what the other chat APIs have of it: their bodies become these fields.
//!
//! | field | |
//! |---|---|
//! | `messages` | 1 to 4096: `system`, `developer`, `user`, `assistant` (with `tool_calls`, `reasoning_content`), `tool`; content is text, or parts: text, images (`image_url` with `data:…;base64,…`) and audio (`input_audio`: WAV, MP3 or FLAC in base64), where the model has a projector for them |
//! | `tools`, `tool_choice`, `parallel_tool_calls` | functions, at most 128 in 512 KiB; `auto`, `none`, `required` or a function's name. Where a call must come, a grammar sees to it. One call at a time where the template renders no more |
//! | `response_format` | `text`, `json_object` (any, or its `schema`), `json_schema`; not together with tools that may be called |
//! | `enable_thinking`, `reasoning_effort` | whether and how hard the model thinks, where its template knows; `reasoning_effort: none` is off, and ends what a template without the switch begins |
//! | `reasoning_format` | where its reasoning stands: `auto` and `deepseek`: in `reasoning_content`; `none`: in `content` as the model writes it; `deepseek-legacy`: in both of a whole answer, in `content` of a stream |
//! | `reasoning_budget_tokens`, `reasoning_budget`, `thinking_budget_tokens` | tokens of each block of reasoning, which then has to end; 0: no reasoning; -1: as much as the model likes |
//! | `reasoning_budget_message` | what is said before such an end |
//! | `chat_template_kwargs` | variables for the template, at most 64 KiB |
//! | `continue_final_message` | `true`, `content`, `reasoning_content`: the last message, the assistant's, goes on. Without the field a last message of the assistant goes on too, as with llama-server; `false` ends it. Two of them at the end are refused where the last would go on |
//! | `add_generation_prompt` | `false`: the prompt ends with the last message |
//! | `logprobs`, `top_logprobs` | of the tokens as the model wrote them, markers of calls and reasoning included |
//!
//! Templates, formats and parsers are llama.cpp's ([`crate::engine::chat`]). `finish_reason` is `tool_calls` where the
//! model called and stopped. An output that does not follow its format is content.

mod fit;
mod grammar;
mod messages;
mod parser;
mod settings;
mod tools;

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::ApiState;
use super::dialect::{ChoiceJob, Dialect, Job};
use super::error::ApiError;
use super::fields::Fields;
use super::intake::{Intake, Visit};
use super::media::{self, Attachment};
use super::openai::OpenAi;
use super::output::{OutputParser, PlainText};
use super::params::Params;
use super::run;
use super::wire::Shape;
use crate::engine::chat::{ChatError, ChatFormat, ChatInput, ChatTemplates, Continuation, Rendered, ThinkingTags};
use crate::engine::{Grammar, MAX_TOP_LOGPROBS, Media, ReasoningBudget, SamplingParams, Token};
use grammar::Demands;
use parser::{ChatParser, Reading};
use settings::{ReasoningFormat, ResponseFormat, Settings};
use tools::Tools;

pub use messages::{MAX_CALLS, MAX_MESSAGES};
pub use settings::MAX_VARIABLES_BYTES;
pub use tools::{MAX_TOOL_NAME_BYTES, MAX_TOOLS, MAX_TOOLS_BYTES};

/// The handler.
pub(super) async fn chat_completions(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, fields } = intake;
    let request = ChatRequest::read(fields, state.defaults())?;
    let dialect = OpenAi::new(&state, Shape::Chat, &request.params, request.logprobs.is_some());
    converse(&state, visit, request, Box::new(dialect)).await
}

/// Tokens that a chat's prompt has, tools and template included.
pub(super) async fn input_tokens(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit: _visit, fields } = intake;
    let request = ChatRequest::read(fields, state.defaults())?;
    Ok(counted(request.count(&state).await?))
}

/// The answer to a count, as Responses says it.
pub(super) fn counted(input_tokens: usize) -> Response {
    Json(json!({"object": "response.input_tokens", "input_tokens": input_tokens})).into_response()
}

/// Answers a chat, whichever dialect asked.
pub(super) async fn converse(
    state: &ApiState,
    visit: Visit,
    request: ChatRequest,
    dialect: Box<dyn Dialect>,
) -> Result<Response, ApiError> {
    let (request, prepared, truncation) = state.prepare(move |state| fit::prepare(request, state)).await?;
    let Prepared { prompt, media, borders, grammar, reasoning, stops, preserved, answers } = prepared;
    let mut requests = request.params.requests(request.logprobs, vec![prompt], &visit);
    for request in &mut requests {
        request.media.clone_from(&media);
        request.borders.clone_from(&borders);
        if grammar.is_some() {
            request.grammar.clone_from(&grammar);
        }
        request.reasoning.clone_from(&reasoning);
        request.stop.extend(stops.iter().cloned());
        request.preserved.clone_from(&preserved);
    }
    let per_prompt = requests.len();
    let choice = |request| Ok(ChoiceJob { request, parser: answers.parser()? });
    let choices = requests.into_iter().map(choice).collect::<Result<_, ApiError>>()?;
    run::answer(state, visit, Job { dialect, choices, per_prompt, stream: request.params.stream, truncation }).await
}

/// A chat request, checked.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) params: Params,
    pub(crate) logprobs: Option<u32>,
    messages: Vec<Value>,
    media: Vec<Attachment>,
    tools: Tools,
    settings: Settings,
}

/// A chat request, rendered.
pub(crate) struct Prepared {
    /// Tokens of the conversation.
    pub(crate) prompt: Vec<Token>,
    /// Its images and sounds.
    pub(crate) media: Media,
    /// Lengths at which messages end, where that matters.
    pub(crate) borders: Vec<usize>,
    /// What the answer must be.
    pub(crate) grammar: Option<Grammar>,
    /// How long the model may think.
    pub(crate) reasoning: Option<ReasoningBudget>,
    /// Texts that end the answer, beside the client's own.
    pub(crate) stops: Vec<String>,
    /// Control tokens whose text belongs to the answer.
    pub(crate) preserved: Vec<Token>,
    /// How the answers are read.
    pub(crate) answers: Answers,
}

/// How the answers to a request are read.
pub(crate) struct Answers {
    format: Arc<ChatFormat>,
    /// `None`: all text is content.
    reading: Option<Reading>,
}

impl Answers {
    /// For one choice.
    pub(crate) fn parser(&self) -> Result<Box<dyn OutputParser>, ApiError> {
        let Some(reading) = &self.reading else { return Ok(Box::new(PlainText)) };
        let reader = self.format.reader().map_err(|error| ApiError::internal(error.to_string()))?;
        Ok(Box::new(ChatParser::new(reader, reading.clone())))
    }
}

impl ChatRequest {
    pub(crate) fn read(mut fields: Fields, defaults: &SamplingParams) -> Result<Self, ApiError> {
        let tools = Tools::read(&mut fields)?;
        let mut settings = Settings::read(&mut fields)?;
        let mut params = Params::read(&fields, defaults)?;
        if settings.response_format == ResponseFormat::Text && matches!(params.grammar, Some(Grammar::JsonSchema(_))) {
            // The same in llama-server's and vLLM's words.
            if let Some(Grammar::JsonSchema(schema)) = params.grammar.take() {
                settings.response_format = ResponseFormat::Schema(schema);
            }
        }
        if tools.may_call() && params.grammar.is_some() {
            let message = "'grammar' cannot be combined with 'tools' that may be called: set 'tool_choice' to none";
            return Err(ApiError::unsupported("grammar", message));
        }
        if tools.may_call() && settings.response_format != ResponseFormat::Text {
            let message =
                "'response_format' cannot be combined with 'tools' that may be called: set 'tool_choice' to none";
            return Err(ApiError::unsupported("response_format", message));
        }
        let logprobs = logprobs(&fields)?;
        let mut media = Vec::new();
        let messages = messages::read(fields.take("messages"), &mut media)?;
        let request = Self { params, logprobs, messages, media, tools, settings };
        let asked = request.settings.continuation.is_some_and(|continuation| continuation != Continuation::None);
        if asked && request.continuation() == Continuation::None {
            let message = "'continue_final_message' needs a last message that is the assistant's and calls no tool";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        if request.continuation() != Continuation::None && request.ends_with_two_of_the_assistant() {
            // llama-server's words.
            let message = "Cannot have 2 or more assistant messages at the end of the list: join them, or set \
                           'continue_final_message' to false for an answer of its own.";
            return Err(ApiError::invalid("messages", message));
        }
        Ok(request)
    }

    /// The prompt as text.
    pub(crate) fn text(&self, state: &ApiState) -> Result<String, ApiError> {
        let templates = self.templates(state)?;
        let parallel = self.tools.parallel.unwrap_or(templates.capabilities().supports_parallel_tool_calls);
        Ok(self.render(templates, parallel)?.0.prompt)
    }

    /// Tokens of the prompt.
    pub(crate) async fn count(self, state: &ApiState) -> Result<usize, ApiError> {
        state.prepare(move |state| Ok(self.prepare(state)?.prompt.len())).await
    }

    /// Renders and tokenises; takes as long as the conversation is.
    pub(crate) fn prepare(&self, state: &ApiState) -> Result<Prepared, ApiError> {
        let templates = self.templates(state)?;
        let capabilities = templates.capabilities();
        if self.tools.may_call() && !capabilities.supports_tools && !capabilities.supports_tool_calls {
            let message =
                "this model's chat template has no place for tools: set spec.model.chatTemplate to one that has";
            return Err(ApiError::unsupported("tools", message));
        }
        let parallel = self.tools.parallel.unwrap_or(capabilities.supports_parallel_tool_calls);
        let (Rendered { prompt, format }, schema) = self.render(templates, parallel)?;
        let engine = state.engine();
        let tokenize = |text: &str, add_special| {
            engine.tokenize(text, add_special, true).map_err(|error| ApiError::internal(error.to_string()))
        };
        // Templates write the first token themselves, most of them; the model must not see it twice.
        let model = engine.model();
        let add_special = model.adds_bos && !model.bos_text.is_empty() && !prompt.starts_with(&model.bos_text);
        let (tokens, media) = if self.media.is_empty() {
            (tokenize(&prompt, add_special)?, Media::default())
        } else {
            media::read(state, "messages", &prompt, add_special, &self.media)?
        };
        let single = |text: &str| tokenize(text, false).ok().filter(|tokens| tokens.len() == 1)?.first().copied();
        let demands = Demands {
            call_first: self.tools.must_call() && self.continuation() == Continuation::None,
            one_call: self.tools.may_call() && !parallel,
        };
        let grammar = schema.or_else(|| grammar::of(&format, demands, single));
        if self.tools.must_call() && grammar.is_none() {
            let message =
                "llama.cpp cannot tell from this model's chat template how it calls tools: set spec.model.chatTemplate";
            return Err(ApiError::unsupported("tool_choice", message));
        }
        Ok(Prepared {
            prompt: tokens,
            media,
            borders: Vec::new(),
            grammar,
            reasoning: self.budget(&format, tokenize)?,
            stops: format.additional_stops.clone(),
            preserved: format.preserved_tokens.iter().filter_map(|text| single(text)).collect(),
            answers: Answers { reading: self.reading(state, &format, parallel), format },
        })
    }

    /// The model's, if it can read what the messages hold.
    fn templates<'state>(&self, state: &'state ApiState) -> Result<&'state ChatTemplates, ApiError> {
        let templates = state.templates()?;
        media::check(state, &self.media)?;
        Ok(templates)
    }

    /// The limit on reasoning, where there is one and the template knows its marks.
    fn budget(
        &self,
        format: &ChatFormat,
        tokenize: impl Fn(&str, bool) -> Result<Vec<Token>, ApiError>,
    ) -> Result<Option<ReasoningBudget>, ApiError> {
        let Some(tags) = &format.thinking else { return Ok(None) };
        let begun = ends_within(&format.generation_prompt, tags);
        let (tokens, message) = match &self.settings.budget {
            Some((tokens, message)) => (*tokens, message.as_str()),
            // A template without the switch begins to think all the same.
            None if begun && !self.settings.enable_thinking && self.continuation() == Continuation::None => (0, ""),
            None => return Ok(None),
        };
        let end = tags.ends.first().map_or("", String::as_str);
        Ok(Some(ReasoningBudget {
            tokens,
            start: tags.start.clone(),
            ends: tags.ends.clone(),
            forced: tokenize(&format!("{message}{end}"), false)?,
            begun,
        }))
    }

    /// The prompt, and the grammar of its answer where it is a schema's alone.
    fn render(&self, templates: &ChatTemplates, parallel: bool) -> Result<(Rendered, Option<Grammar>), ApiError> {
        let Settings { reasoning_format, enable_thinking, ref variables, add_generation_prompt, .. } = self.settings;
        let parse_reasoning = match reasoning_format {
            ReasoningFormat::None => false,
            ReasoningFormat::Apart => true,
            ReasoningFormat::Both => !self.params.stream,
        };
        let input = ChatInput {
            messages: &self.messages,
            tools: &self.tools.list,
            tool_choice: &self.tools.choice,
            parallel_tool_calls: parallel,
            json_schema: None,
            add_generation_prompt,
            continuation: self.continuation(),
            enable_thinking,
            parse_reasoning,
            variables,
        };
        let rendered = templates.render(&input).map_err(|error| self.refused(&error))?;
        let ResponseFormat::Schema(schema) = &self.settings.response_format else { return Ok((rendered, None)) };
        let thinks = enable_thinking && rendered.format.thinking.is_some();
        if !thinks && input.continuation == Continuation::None {
            return Ok((rendered, Some(Grammar::JsonSchema(schema.clone()))));
        }
        // The grammar has to know what comes before the JSON, which is llama.cpp's to say.
        let input = ChatInput { json_schema: Some(schema), tools: &[], ..input };
        let formed = templates.render(&input).map_err(|error| self.refused(&error))?;
        Ok((Rendered { prompt: rendered.prompt, format: formed.format }, None))
    }

    fn ends_with_two_of_the_assistant(&self) -> bool {
        let is_assistant = |message: &Value| message.get("role").and_then(Value::as_str) == Some("assistant");
        self.messages.len() > 1 && self.messages.iter().rev().take(2).all(is_assistant)
    }

    /// Whether the last message goes on: as asked, else if it is the assistant's and complete with no call.
    fn continuation(&self) -> Continuation {
        let goes_on = self.messages.last().is_some_and(|last| {
            last.get("role").and_then(Value::as_str) == Some("assistant") && last.get("tool_calls").is_none()
        });
        match self.settings.continuation {
            _ if !goes_on => Continuation::None,
            Some(continuation) => continuation,
            None if self.settings.add_generation_prompt => Continuation::Auto,
            None => Continuation::None,
        }
    }

    /// `None`: there is nothing to tell apart.
    fn reading(&self, state: &ApiState, format: &ChatFormat, parallel: bool) -> Option<Reading> {
        let may_call = self.tools.may_call();
        if !may_call && format.plain {
            return None;
        }
        let repeat = self.settings.reasoning_format == ReasoningFormat::Both && !self.params.stream;
        let template = state.engine().model().chat_template.as_deref().unwrap_or_default();
        Some(Reading {
            streamed: self.params.stream,
            names: self.tools.names(),
            most_calls: match (may_call, parallel) {
                (false, _) => 0,
                (true, false) => 1,
                (true, true) => MAX_CALLS,
            },
            short_ids: template.contains("length != 9"),
            thinking: format.thinking.clone(),
            repeat_reasoning: repeat,
        })
    }

    fn refused(&self, error: &ChatError) -> ApiError {
        let param = match error {
            ChatError::Other(_) if !self.tools.list.is_empty() => "tools",
            ChatError::Other(_) if self.settings.response_format != ResponseFormat::Text => "response_format",
            _ => "messages",
        };
        ApiError::invalid(param, error.to_string())
    }
}

/// Whether a prompt ends within reasoning.
fn ends_within(prompt: &str, tags: &ThinkingTags) -> bool {
    let begun = prompt.rfind(&tags.start);
    begun.is_some_and(|at| tags.ends.iter().all(|end| !prompt[at + tags.start.len()..].contains(end.as_str())))
}

fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=i64::from(MAX_TOP_LOGPROBS))?;
    match (wanted, top) {
        (false, Some(top)) if top > 0 => {
            Err(ApiError::invalid("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true"))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.and_then(|top| u32::try_from(top).ok()).unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn read(json: &str) -> Result<ChatRequest, ApiError> {
        ChatRequest::read(Fields(parse_object(json.as_bytes()).unwrap()), &SamplingParams::default())
    }

    #[test]
    fn a_prompt_may_end_within_reasoning() {
        let tags = ThinkingTags { start: "<think>".to_owned(), ends: vec!["</think>".to_owned(), "<end>".to_owned()] };
        for (prompt, within) in [
            ("assistant\n", false),
            ("assistant\n<think>\n", true),
            ("<think>\n\n</think>\n\n", false),
            ("<think>a<end>", false),
            ("<think>a</think>b<think>c", true),
        ] {
            assert_eq!(ends_within(prompt, &tags), within, "{prompt}");
        }
    }

    #[test]
    fn log_probabilities() {
        let hello = r#""messages": [{"role": "user", "content": "hi"}]"#;
        let wants = |extra: &str| read(&format!("{{{hello}{extra}}}")).map(|request| request.logprobs);
        assert_eq!(wants("").unwrap(), None);
        assert_eq!(wants(r#", "logprobs": false, "top_logprobs": 0"#).unwrap(), None);
        assert_eq!(wants(r#", "logprobs": true"#).unwrap(), Some(0));
        assert_eq!(wants(r#", "logprobs": true, "top_logprobs": 20"#).unwrap(), Some(20));
        for (extra, param) in [
            (r#", "top_logprobs": 2"#, "top_logprobs"),
            (r#", "logprobs": true, "top_logprobs": 21"#, "top_logprobs"),
            (r#", "logprobs": 3"#, "logprobs"),
            (r#", "chat_template_kwargs": []"#, "chat_template_kwargs"),
            (
                r#", "response_format": {"type": "json_object"}, "tools": [{"type": "function", "function": {"name": "f"}}]"#,
                "response_format",
            ),
        ] {
            assert_eq!(wants(extra).unwrap_err().param.as_deref(), Some(param), "{extra}");
        }
    }

    #[test]
    fn a_last_message_of_the_assistant_goes_on() {
        let user = r#"{"role": "user", "content": "hi"}"#;
        let assistant = r#"{"role": "assistant", "content": "Well,"}"#;
        let calls = r#"{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}"#;
        for (messages, extra, expected) in [
            (user.to_owned(), "", Continuation::None),
            (format!("{user}, {assistant}"), "", Continuation::Auto),
            (format!("{user}, {assistant}"), r#", "continue_final_message": false"#, Continuation::None),
            (format!("{user}, {assistant}"), r#", "continue_final_message": "content""#, Continuation::Content),
            (format!("{user}, {assistant}"), r#", "add_generation_prompt": false"#, Continuation::None),
            (format!("{user}, {calls}"), "", Continuation::None),
        ] {
            let request = read(&format!(r#"{{"messages": [{messages}]{extra}}}"#)).unwrap();
            assert_eq!(request.continuation(), expected, "{messages}{extra}");
        }
        let error = read(&format!(r#"{{"messages": [{user}], "continue_final_message": true}}"#)).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("continue_final_message"));
    }

    #[test]
    fn one_message_of_the_assistant_goes_on_not_two() {
        let user = r#"{"role": "user", "content": "hi"}"#;
        let assistant = r#"{"role": "assistant", "content": "Well,"}"#;
        let calls = r#"{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}"#;
        for (messages, extra, refused) in [
            (format!("{user}, {assistant}, {assistant}"), "", true),
            (format!("{assistant}, {assistant}"), r#", "continue_final_message": true"#, true),
            (format!("{user}, {calls}, {assistant}"), "", true),
            (format!("{user}, {assistant}, {assistant}"), r#", "continue_final_message": false"#, false),
            (format!("{user}, {assistant}, {assistant}, {user}"), "", false),
            (format!("{user}, {assistant}, {calls}"), "", false),
            (assistant.to_owned(), "", false),
        ] {
            let error = read(&format!(r#"{{"messages": [{messages}]{extra}}}"#)).err();
            assert_eq!(error.is_some(), refused, "{messages}{extra}");
            let words = "Cannot have 2 or more assistant messages at the end of the list";
            assert!(error.is_none_or(|error| error.message.contains(words)
                && error.status == 400
                && error.param.as_deref() == Some("messages")));
        }
    }
}

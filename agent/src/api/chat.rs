//! `POST /v1/chat/completions`.

use axum::response::Response;
use serde_json::{Map, Value};

use super::ApiState;
use super::dialect::{ChoiceJob, Dialect, Job};
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::intake::{Intake, Visit};
use super::messages;
use super::openai::OpenAi;
use super::output::PlainText;
use super::params::Params;
use super::run;
use super::template::ChatTemplate;
use super::wire::Shape;
use crate::engine::{MAX_TOP_LOGPROBS, SamplingParams, Token};

/// The handler.
pub(super) async fn chat_completions(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, fields } = intake;
    let request = ChatRequest::read(fields, state.defaults())?;
    let dialect = OpenAi::new(&state, Shape::Chat, request.params.include_usage, request.logprobs.is_some());
    converse(&state, visit, request, Box::new(dialect)).await
}

/// Answers a chat, whichever dialect asked.
pub(super) async fn converse(
    state: &ApiState,
    visit: Visit,
    request: ChatRequest,
    dialect: Box<dyn Dialect>,
) -> Result<Response, ApiError> {
    let (request, prompt) = state
        .prepare(move |state| {
            let prompt = request.prompt(state)?;
            Ok((request, prompt))
        })
        .await?;
    let requests = request.params.requests(request.logprobs, vec![prompt], &visit);
    let per_prompt = requests.len();
    let choices = requests.into_iter().map(|request| ChoiceJob { request, parser: Box::new(PlainText) }).collect();
    run::answer(state, visit, Job { dialect, choices, per_prompt, stream: request.params.stream }).await
}

/// A chat request, checked.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) params: Params,
    messages: Vec<Value>,
    pub(crate) logprobs: Option<u32>,
    add_generation_prompt: bool,
    variables: Map<String, Value>,
}

impl ChatRequest {
    pub(crate) fn read(mut fields: Fields, defaults: &SamplingParams) -> Result<Self, ApiError> {
        let params = Params::read(&fields, defaults)?;
        let logprobs = logprobs(&fields)?;
        let add_generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
        let variables = match fields.take("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(variables)) => variables,
            Some(other) => return Err(wrong_type("chat_template_kwargs", "an object", &other)),
        };
        let messages = messages::read(fields.take("messages"))?;
        Ok(Self { params, messages, logprobs, add_generation_prompt, variables })
    }

    /// Renders and tokenises; takes as long as the conversation is.
    pub(crate) fn prompt(&self, state: &ApiState) -> Result<Vec<Token>, ApiError> {
        let template: &ChatTemplate = state.template()?;
        let text = template
            .render(&self.messages, self.add_generation_prompt, &self.variables)
            .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
        let model = state.engine().model();
        // Templates write the first token themselves, most of them; the model must not see it twice.
        let add_special = !(model.bos_text.is_empty() || text.starts_with(&model.bos_text));
        state
            .engine()
            .tokenize(&text, add_special && model.adds_bos, true)
            .map_err(|error| ApiError::internal(error.to_string()))
    }
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
        ] {
            assert_eq!(wants(extra).unwrap_err().param.as_deref(), Some(param), "{extra}");
        }
    }
}

//! A conversation that is longer than the context of a request: what the policy lets go, goes.

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::Value;

use super::{ChatRequest, Prepared, images};
use crate::api::error::ApiError;
use crate::api::overflow::{Budget, Fitted, Layout, Part, Reading, Size, Truncation, fit};
use crate::api::state::ApiState;

/// Renders and tokenises, and once more what is left where the conversation does not fit. One that cannot be made to fit
/// stays as it is and is refused when it is submitted.
pub(super) fn prepare(
    mut request: ChatRequest,
    state: &ApiState,
) -> Result<(ChatRequest, Prepared, Option<Truncation>), ApiError> {
    let count = |prepared: &Prepared| u32::try_from(prepared.prompt.len()).unwrap_or(u32::MAX);
    let prepared = request.prepare(state)?;
    let policy = request.params.overflow.unwrap_or(state.overflow());
    let budget = Budget::new(state.engine().model().max_tokens, request.params.max_tokens);
    let tokens_before = count(&prepared);
    if tokens_before < budget.limit || policy == OverflowPolicy::Reject {
        return Ok((request, prepared, None));
    }
    let messages = std::mem::take(&mut request.messages);
    let pieces = prepared.prompt.iter().map(|&token| state.engine().piece(token).unwrap_or_default());
    let rendered = Rendered { layout: Layout::new(pieces, &parts(&messages)), messages: &messages };
    let read = |left: &[Value]| {
        request.messages = left.to_vec();
        match request.prepare(state) {
            Ok(prepared) => Some((count(&prepared), prepared)),
            Err(error) => {
                tracing::debug!(error = error.message, "what is left of a conversation cannot be rendered");
                None
            }
        }
    };
    let Some(fitted) = fit(policy, budget, &messages, &rendered, read) else {
        request.messages = messages;
        return Ok((request, prepared, None));
    };
    let Fitted { messages, prepared, tokens: tokens_after, dropped: dropped_messages } = fitted;
    request.messages = messages;
    let truncation = Truncation { policy, tokens_before, limit: budget.limit, tokens_after, dropped_messages };
    Ok((request, prepared, Some(truncation)))
}

/// The whole conversation, and where its messages stand in the prompt.
struct Rendered<'m> {
    messages: &'m [Value],
    layout: Layout,
}

fn text(message: &Value) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or_default()
}

fn parts(messages: &[Value]) -> Vec<Part<'_>> {
    let calls = |message: &Value| message.get("tool_calls").map_or(0, |calls| calls.to_string().len());
    messages.iter().map(|message| Part { text: text(message), more: calls(message) }).collect()
}

impl Reading for Rendered<'_> {
    fn tokens(&self) -> u32 {
        self.layout.tokens()
    }

    fn sizes(&self) -> Vec<Size> {
        self.layout.sizes(&parts(self.messages))
    }

    fn cut(&self, message: usize, size: u32, head: u32, tail: u32) -> String {
        let text = self.messages.get(message).map_or("", text);
        images::mend(text, self.layout.cut(message, text, size, head, tail))
    }
}

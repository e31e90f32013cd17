//! A conversation that is longer than the context of a request: what the policy lets go, goes. And where the messages of
//! what is left end, for models whose next turn goes on from there.

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::Value;

use super::{ChatRequest, Prepared, media};
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
    let prepared = request.prepare(state)?.with_borders(&request, state);
    let policy = request.params.overflow.unwrap_or(state.overflow());
    let budget = Budget::new(state.engine().model().max_tokens, request.params.max_tokens);
    let tokens_before = count(&prepared);
    if tokens_before < budget.limit || policy == OverflowPolicy::Reject {
        return Ok((request, prepared, None));
    }
    let messages = std::mem::take(&mut request.messages);
    let rendered = Rendered { layout: prepared.layout(&messages, state), messages: &messages };
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
    let prepared = prepared.with_borders(&request, state);
    let truncation = Truncation { policy, tokens_before, limit: budget.limit, tokens_after, dropped_messages };
    Ok((request, prepared, Some(truncation)))
}

impl Prepared {
    fn layout(&self, messages: &[Value], state: &ApiState) -> Layout {
        let pieces = self.prompt.iter().map(|&token| state.engine().piece(token).unwrap_or_default());
        Layout::new(pieces, &parts(messages))
    }

    /// With the places at which the next turn may part from this one, where that matters.
    fn with_borders(mut self, request: &ChatRequest, state: &ApiState) -> Self {
        if state.engine().model().copied {
            let ends: Vec<_> = self.layout(&request.messages, state).ends().collect();
            let role = |message| Value::get(message, "role").and_then(Value::as_str).unwrap_or_default();
            let roles: Vec<&str> = request.messages.iter().map(role).collect();
            self.borders = borders(&roles, &ends);
        }
        self
    }
}

/// Ends of the messages behind which other conversations, or this one's next turn, go on differently: the system messages
/// that it begins with, all before the last user message, that one, and the last of all.
fn borders(roles: &[&str], ends: &[Option<usize>]) -> Vec<usize> {
    let system = roles.iter().take_while(|role| matches!(**role, "system" | "developer")).count();
    let user = roles.iter().rposition(|role| *role == "user");
    let messages = [system.checked_sub(1), user.and_then(|user| user.checked_sub(1)), user, roles.len().checked_sub(1)];
    let mut borders: Vec<usize> = messages.into_iter().flatten().filter_map(|at| *ends.get(at)?).collect();
    borders.sort_unstable();
    borders.dedup();
    borders
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
        media::mend(text, self.layout.cut(message, text, size, head, tail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Roles, where their texts end, the borders.
    type Case<'a> = (&'a [&'a str], &'a [Option<usize>], &'a [usize]);

    #[test]
    fn the_next_turn_may_part_where_a_message_ends() {
        let cases: [Case<'_>; 7] = [
            (&[], &[], &[]),
            (&["user"], &[Some(9)], &[9]),
            (&["system", "user"], &[Some(5), Some(9)], &[5, 9]),
            (
                &["system", "developer", "user", "assistant", "user"],
                &[Some(1), Some(2), Some(3), Some(4), Some(5)],
                &[2, 4, 5],
            ),
            // The results of tools: they stay as they are until the user speaks.
            (&["user", "assistant", "tool"], &[Some(3), None, Some(8)], &[3, 8]),
            (&["system", "user"], &[None, None], &[]),
            (&["assistant"], &[Some(4)], &[4]),
        ];
        for (roles, ends, expected) in cases {
            assert_eq!(borders(roles, ends), expected, "{roles:?}");
        }
    }
}

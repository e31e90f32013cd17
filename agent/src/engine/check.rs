//! What can be said about a request before it waits.

use super::ffi::Model;
use super::request::{GenerateRequest, MAX_LOGIT_BIAS, SamplingParams, SubmitError};

/// Refuses what could never run.
pub(super) fn check(model: &Model, max_tokens: u32, request: &GenerateRequest) -> Result<(), SubmitError> {
    let n_vocab = model.n_vocab();
    if request.prompt.is_empty() {
        return Err(SubmitError::EmptyPrompt);
    }
    let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
    if prompt_tokens >= max_tokens {
        return Err(SubmitError::ContextLengthExceeded { prompt_tokens, limit: max_tokens });
    }
    let biased = request.sampling.logit_bias.iter().map(|(token, _)| token);
    if let Some(&token) = request.prompt.iter().chain(biased).find(|&&token| !model.has(token)) {
        return Err(SubmitError::InvalidToken { token, n_vocab });
    }
    if request.sampling.logit_bias.len() > MAX_LOGIT_BIAS {
        return Err(SubmitError::InvalidParameter("logit_bias has too many entries"));
    }
    let SamplingParams { temperature, top_p, min_p, repeat_penalty, frequency_penalty, presence_penalty, .. } =
        request.sampling;
    let numbers = [temperature, top_p, min_p, repeat_penalty, frequency_penalty, presence_penalty];
    let added = request.sampling.logit_bias.iter().map(|&(_, bias)| bias);
    if numbers.into_iter().chain(added).any(|number| !number.is_finite()) {
        return Err(SubmitError::InvalidParameter("a sampling parameter is not a finite number"));
    }
    if repeat_penalty <= 0.0 {
        return Err(SubmitError::InvalidParameter("repeat_penalty must be greater than 0"));
    }
    Ok(())
}

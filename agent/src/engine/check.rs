//! What can be said about a request before it waits.

use super::budget::MAX_BUDGET_TEXT_BYTES;
use super::ffi::Model;
use super::request::{GenerateRequest, SubmitError};
use super::sampling::{
    MAX_BIAS_TEXT_BYTES, MAX_LOGIT_BIAS, MAX_SAMPLERS, MAX_SEQUENCE_BREAKER_BYTES, MAX_SEQUENCE_BREAKERS,
    SamplingParams,
};

/// Refuses what could never run.
pub(super) fn check(
    model: &Model,
    max_tokens: u32,
    adapters: usize,
    request: &GenerateRequest,
) -> Result<(), SubmitError> {
    let n_vocab = model.n_vocab();
    if request.prompt.is_empty() {
        return Err(SubmitError::EmptyPrompt);
    }
    if request.adapter.is_some_and(|adapter| adapter >= adapters) {
        return Err(SubmitError::InvalidParameter("the model has no such adapter"));
    }
    let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
    if prompt_tokens >= max_tokens {
        return Err(SubmitError::ContextLengthExceeded { prompt_tokens, limit: max_tokens });
    }
    if !request.media.is_empty() && !request.media.fits(&request.prompt) {
        return Err(SubmitError::InvalidParameter("the prompt has other pictures"));
    }
    let biased = request.sampling.logit_bias.iter().map(|(token, _)| token);
    let is_text = |token: &&i32| request.media.is_empty() || **token >= 0;
    let text = request.prompt.iter().filter(is_text);
    if let Some(&token) = text.chain(biased).find(|&&token| !model.has(token)) {
        return Err(SubmitError::InvalidToken { token, n_vocab });
    }
    if let Some(budget) = &request.reasoning {
        let texts = budget.ends.iter().chain([&budget.start]);
        if texts.into_iter().any(|text| text.len() > MAX_BUDGET_TEXT_BYTES) || budget.start.is_empty() {
            return Err(SubmitError::InvalidParameter("the marks of reasoning are empty or too long"));
        }
        if let Some(&token) = budget.forced.iter().find(|&&token| !model.has(token)) {
            return Err(SubmitError::InvalidToken { token, n_vocab });
        }
    }
    sampling(&request.sampling).map_err(SubmitError::InvalidParameter)
}

/// Refuses what llama.cpp would answer with an assertion, and what has no bound.
fn sampling(params: &SamplingParams) -> Result<(), &'static str> {
    let SamplingParams {
        temperature,
        dynatemp_range,
        dynatemp_exponent,
        top_k: _,
        top_p,
        min_p,
        typical_p,
        top_n_sigma,
        xtc_probability,
        xtc_threshold,
        min_keep: _,
        repeat_last_n: _,
        repeat_penalty,
        frequency_penalty,
        presence_penalty,
        ref dry,
        mirostat: _,
        mirostat_tau,
        mirostat_eta,
        adaptive_target,
        adaptive_decay,
        ref samplers,
        seed: _,
        ref logit_bias,
        ref text_bias,
    } = *params;
    let numbers = [
        temperature,
        dynatemp_range,
        dynatemp_exponent,
        top_p,
        min_p,
        typical_p,
        top_n_sigma,
        xtc_probability,
        xtc_threshold,
        repeat_penalty,
        frequency_penalty,
        presence_penalty,
        dry.multiplier,
        dry.base,
        mirostat_tau,
        mirostat_eta,
        adaptive_target,
        adaptive_decay,
    ];
    if numbers.iter().any(|number| !number.is_finite()) {
        return Err("a sampling parameter is not a finite number");
    }
    if repeat_penalty <= 0.0 || !repeat_penalty.recip().is_finite() {
        return Err("repeat_penalty must be greater than 0");
    }
    if !(0.0..=0.99).contains(&adaptive_decay) {
        return Err("adaptive_decay must be from 0 to 0.99");
    }
    if logit_bias.len() + text_bias.len() > MAX_LOGIT_BIAS {
        return Err("logit_bias has too many entries");
    }
    if text_bias.iter().map(|(text, _)| text.len()).sum::<usize>() > MAX_BIAS_TEXT_BYTES {
        return Err("the texts in logit_bias are too long");
    }
    let biases = logit_bias.iter().map(|(_, bias)| *bias).chain(text_bias.iter().map(|(_, bias)| *bias));
    // Minus infinity is "never".
    if biases.into_iter().any(|bias| bias.is_nan() || bias == f32::INFINITY) {
        return Err("a logit_bias is not a finite number");
    }
    if samplers.len() > MAX_SAMPLERS {
        return Err("samplers has too many entries");
    }
    let breakers = &dry.sequence_breakers;
    let wrong = |text: &String| text.is_empty() || text.len() > MAX_SEQUENCE_BREAKER_BYTES || text.contains('\0');
    if breakers.len() > MAX_SEQUENCE_BREAKERS || breakers.iter().any(wrong) {
        return Err("dry_sequence_breakers has too many entries, or one that is empty or too long");
    }
    Ok(())
}

//! Choosing the next token.

use std::ffi::{CString, c_char};
use std::ptr::{self, NonNull};

use llama_cpp_sys_2::{self as sys, llama_logit_bias, llama_sampler};

use super::{Model, shim};
use crate::engine::request::Token;
use crate::engine::sampling::{DryParams, Mirostat, SamplerKind, SamplingParams};

/// A chain of llama.cpp's samplers with the memory of one sequence.
#[derive(Default)]
pub(in crate::engine) struct Sampler {
    /// `None`: plain greedy, which needs neither memory nor a copy of the logits.
    chain: Option<Chain>,
    /// Tokens before the first one that it wants to know.
    lookback: usize,
}

/// Owns a chain and the samplers in it.
struct Chain(NonNull<llama_sampler>);

// SAFETY: a chain holds no state of a thread; it is used by one thread at a time, because every use takes `&mut`.
unsafe impl Send for Chain {}

impl Drop for Chain {
    fn drop(&mut self) {
        // SAFETY: the chain is ours, and its samplers are the chain's.
        unsafe { sys::llama_sampler_free(self.0.as_ptr()) };
    }
}

impl Chain {
    fn new() -> Result<Self, String> {
        // SAFETY: plain constructors.
        let chain = unsafe {
            let mut params = sys::llama_sampler_chain_default_params();
            params.no_perf = true;
            sys::llama_sampler_chain_init(params)
        };
        NonNull::new(chain).map(Self).ok_or_else(|| "no memory for a sampler".to_owned())
    }

    /// Puts a sampler at the end of the chain, which then owns it.
    fn add(&mut self, sampler: *mut llama_sampler) -> Result<(), String> {
        if sampler.is_null() {
            return Err("llama.cpp refused a sampler".to_owned());
        }
        // SAFETY: both are alive, and the sampler was made just now for this chain.
        unsafe { sys::llama_sampler_chain_add(self.0.as_ptr(), sampler) };
        Ok(())
    }
}

/// Candidates that the infill sampler gets: it compares each with each.
const INFILL_CANDIDATES: i32 = 64;

impl Sampler {
    /// The chain for parameters that [`check`](crate::engine::check) has let through; a request has `context` tokens at
    /// most. DRY's sequence breakers are compared with the whole vocabulary, which takes a while.
    pub(in crate::engine) fn new(
        model: &Model,
        params: &SamplingParams,
        seed: u32,
        context: u32,
    ) -> Result<Self, String> {
        let biases = biases(model, params)?;
        let has = |kind| params.samplers.contains(&kind);
        #[expect(clippy::float_cmp, reason = "exactly 1.0 and 0.0 are the values that mean off")]
        let penalties = has(SamplerKind::Penalties)
            && params.repeat_last_n > 0
            && (params.repeat_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0);
        let dry = has(SamplerKind::Dry)
            && params.dry.multiplier != 0.0
            && params.dry.base >= 1.0
            && params.dry.penalty_last_n > 0;
        // What takes the best token away does so when sampling is greedy too.
        let greedy = params.mirostat == Mirostat::Off
            && has(SamplerKind::Temperature)
            && params.temperature <= 0.0
            && params.dynatemp_range <= 0.0
            && !has(SamplerKind::Infill)
            && !(has(SamplerKind::TypicalP) && params.typical_p < 1.0)
            && !(has(SamplerKind::Xtc) && params.xtc_probability > 0.0);
        if greedy && !penalties && !dry && biases.is_empty() {
            return Ok(Self::default());
        }

        let n_vocab = i32::try_from(model.n_vocab()).map_err(|error| error.to_string())?;
        let n_biases = i32::try_from(biases.len()).map_err(|error| error.to_string())?;
        let mut chain = Chain::new()?;
        if !biases.is_empty() {
            // SAFETY: the tokens are of the vocabulary, and `biases` lives through the call that copies it.
            chain.add(unsafe { sys::llama_sampler_init_logit_bias(n_vocab, n_biases, biases.as_ptr()) })?;
        }
        if params.mirostat == Mirostat::Off {
            for &kind in &params.samplers {
                if kind == SamplerKind::Infill {
                    // A model that knows no end has nothing for it to choose, and llama.cpp aborts.
                    if model.eos().is_some() {
                        // SAFETY: plain constructors; the vocabulary lives with the model.
                        let samplers = unsafe {
                            [
                                sys::llama_sampler_init_top_k(INFILL_CANDIDATES),
                                sys::llama_sampler_init_infill(model.vocab()),
                            ]
                        };
                        samplers.into_iter().try_for_each(|sampler| chain.add(sampler))?;
                    }
                } else if let Some(sampler) = sampler(model, params, kind, seed, context, greedy)? {
                    chain.add(sampler)?;
                }
            }
        }
        let (tau, eta) = (params.mirostat_tau, params.mirostat_eta);
        // SAFETY: plain constructors of finite numbers.
        unsafe {
            match params.mirostat {
                Mirostat::Off if greedy => chain.add(sys::llama_sampler_init_greedy())?,
                Mirostat::Off if has(SamplerKind::AdaptiveP) => {
                    let (target, decay) = (params.adaptive_target, params.adaptive_decay);
                    chain.add(sys::llama_sampler_init_adaptive_p(target, decay, seed))?;
                }
                Mirostat::Off => chain.add(sys::llama_sampler_init_dist(seed))?,
                Mirostat::V1 => {
                    chain.add(sys::llama_sampler_init_temp(params.temperature))?;
                    // 100 is llama.cpp's own.
                    chain.add(sys::llama_sampler_init_mirostat(n_vocab, seed, tau, eta, 100))?;
                }
                Mirostat::V2 => {
                    chain.add(sys::llama_sampler_init_temp(params.temperature))?;
                    chain.add(sys::llama_sampler_init_mirostat_v2(seed, tau, eta))?;
                }
            }
        }
        let mut lookback = 0;
        if params.mirostat == Mirostat::Off {
            lookback = lookback.max(if penalties { params.repeat_last_n.min(context) } else { 0 });
            lookback = lookback.max(if dry { params.dry.penalty_last_n.min(context) } else { 0 });
        }
        Ok(Self { chain: Some(chain), lookback: lookback as usize })
    }

    /// Tokens before the first one that [`Self::accept`] should be told.
    pub(in crate::engine) fn lookback(&self) -> usize {
        self.lookback
    }

    /// Remembers a token.
    pub(in crate::engine) fn accept(&mut self, token: Token) -> Result<(), String> {
        let Some(chain) = &mut self.chain else { return Ok(()) };
        let mut error = shim::Error::new();
        // SAFETY: the chain is alive; its samplers look tokens up in maps, so that any number is safe.
        if unsafe { shim::altiplano_accept(chain.0.as_ptr(), token, &raw mut error) } == 0 {
            Ok(())
        } else {
            Err(error.text())
        }
    }

    /// Null for plain greedy.
    pub(super) fn chain(&mut self) -> *mut llama_sampler {
        self.chain.as_mut().map_or(ptr::null_mut(), |chain| chain.0.as_ptr())
    }
}

/// The request's biases, and the tokens that the model itself never wants.
fn biases(model: &Model, params: &SamplingParams) -> Result<Vec<llama_logit_bias>, String> {
    let mut biases: Vec<_> = params.logit_bias.iter().map(|&(token, bias)| llama_logit_bias { token, bias }).collect();
    for (text, bias) in &params.text_bias {
        let tokens = model.tokenize(text, false, false)?;
        biases.extend(tokens.into_iter().map(|token| llama_logit_bias { token, bias: *bias }));
    }
    let suppressed = model.suppressed();
    biases.extend(suppressed.into_iter().map(|token| llama_logit_bias { token, bias: f32::NEG_INFINITY }));
    if let Some(bias) = biases.iter().find(|bias| !model.has(bias.token)) {
        return Err(format!("token {} is not in the vocabulary", bias.token));
    }
    Ok(biases)
}

/// One sampler of the chain; `None` where it would change nothing.
fn sampler(
    model: &Model,
    params: &SamplingParams,
    kind: SamplerKind,
    seed: u32,
    context: u32,
    greedy: bool,
) -> Result<Option<*mut llama_sampler>, String> {
    let n_vocab = i32::try_from(model.n_vocab()).map_err(|error| error.to_string())?;
    let whole = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    let min_keep = (params.min_keep as usize).max(1);
    // SAFETY: plain constructors; that the numbers are in range was checked when the request came.
    let made = unsafe {
        match kind {
            SamplerKind::Penalties => sys::llama_sampler_init_penalties(
                n_vocab,
                whole(params.repeat_last_n.min(context)),
                params.repeat_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            ),
            SamplerKind::Dry => return dry(model, &params.dry, context).map(Some),
            // The best token stays the best.
            _ if greedy => return Ok(None),
            SamplerKind::TopNSigma if params.top_n_sigma > 0.0 => {
                sys::llama_sampler_init_top_n_sigma(params.top_n_sigma)
            }
            SamplerKind::TopK if params.top_k > 0 => sys::llama_sampler_init_top_k(whole(params.top_k)),
            SamplerKind::TypicalP if params.typical_p < 1.0 => {
                sys::llama_sampler_init_typical(params.typical_p.max(0.0), min_keep)
            }
            SamplerKind::TopP if params.top_p < 1.0 => sys::llama_sampler_init_top_p(params.top_p.max(0.0), min_keep),
            SamplerKind::MinP if params.min_p > 0.0 => sys::llama_sampler_init_min_p(params.min_p.min(1.0), min_keep),
            SamplerKind::Xtc if params.xtc_probability > 0.0 => {
                sys::llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, min_keep, seed)
            }
            SamplerKind::Temperature => {
                sys::llama_sampler_init_temp_ext(params.temperature, params.dynatemp_range, params.dynatemp_exponent)
            }
            _ => return Ok(None),
        }
    };
    Ok(Some(made))
}

fn dry(model: &Model, params: &DryParams, context: u32) -> Result<*mut llama_sampler, String> {
    let whole = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    let breakers = params.sequence_breakers.iter().map(|text| CString::new(text.as_str()));
    let breakers: Vec<CString> = breakers.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let mut pointers: Vec<*const c_char> = breakers.iter().map(|text| text.as_ptr()).collect();
    let mut error = shim::Error::new();
    // SAFETY: the vocabulary lives with the model, and the texts through the call that reads them.
    let sampler = unsafe {
        shim::altiplano_dry_new(
            model.vocab(),
            params.multiplier,
            params.base,
            whole(params.allowed_length),
            whole(params.penalty_last_n.min(context)),
            pointers.as_mut_ptr(),
            pointers.len(),
            &raw mut error,
        )
    };
    if sampler.is_null() { Err(error.text()) } else { Ok(sampler) }
}

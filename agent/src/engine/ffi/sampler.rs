//! Choosing the next token.

use std::ptr::NonNull;

use llama_cpp_sys_2::{llama_logit_bias, llama_sampler};

use super::{Model, shim};
use crate::engine::request::{PENALTY_WINDOW, SamplingParams, Token};

/// A chain of llama.cpp's samplers with the memory of one sequence.
pub(in crate::engine) struct Sampler {
    /// `None`: plain greedy, which needs neither memory nor a copy of the logits.
    chain: Option<NonNull<llama_sampler>>,
}

// SAFETY: a chain holds no state of a thread; it is used by one thread at a time, because every use takes `&mut`.
unsafe impl Send for Sampler {}

impl Sampler {
    /// The chain for these parameters, in llama.cpp's usual order.
    pub(in crate::engine) fn new(model: &Model, params: &SamplingParams, seed: u32) -> Result<Self, String> {
        let SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repeat_penalty,
            frequency_penalty,
            presence_penalty,
            seed: _,
            ref logit_bias,
        } = *params;
        let finite = [temperature, top_p, min_p, repeat_penalty, frequency_penalty, presence_penalty];
        // llama.cpp asserts these.
        if finite.iter().any(|value| !value.is_finite()) || repeat_penalty <= 0.0 {
            return Err("a sampling parameter is out of range".to_owned());
        }
        #[expect(clippy::float_cmp, reason = "exactly 1.0 and 0.0 are the values that mean off")]
        let penalties = repeat_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0;
        let greedy = temperature <= 0.0;
        if greedy && !penalties && logit_bias.is_empty() {
            return Ok(Self { chain: None });
        }

        let n_vocab = i32::try_from(model.n_vocab()).map_err(|error| error.to_string())?;
        let biases: Vec<_> = logit_bias.iter().map(|&(token, bias)| llama_logit_bias { token, bias }).collect();
        let n_biases = i32::try_from(biases.len()).map_err(|error| error.to_string())?;
        let k = i32::try_from(top_k).unwrap_or(i32::MAX);
        // SAFETY: plain constructors; the arguments were checked above, `biases` lives through the call that copies
        // it, and the chain takes over each sampler that is added to it.
        unsafe {
            use llama_cpp_sys_2 as sys;
            let mut chain_params = sys::llama_sampler_chain_default_params();
            chain_params.no_perf = true;
            let chain = NonNull::new(sys::llama_sampler_chain_init(chain_params)).ok_or("no memory for a sampler")?;
            let add = |sampler: *mut llama_sampler| sys::llama_sampler_chain_add(chain.as_ptr(), sampler);
            if !biases.is_empty() {
                add(sys::llama_sampler_init_logit_bias(n_vocab, n_biases, biases.as_ptr()));
            }
            if penalties {
                add(sys::llama_sampler_init_penalties(
                    n_vocab,
                    PENALTY_WINDOW,
                    repeat_penalty,
                    frequency_penalty,
                    presence_penalty,
                ));
            }
            if greedy {
                add(sys::llama_sampler_init_greedy());
            } else {
                if k > 0 {
                    add(sys::llama_sampler_init_top_k(k));
                }
                if top_p < 1.0 {
                    add(sys::llama_sampler_init_top_p(top_p.max(0.0), 1));
                }
                if min_p > 0.0 {
                    add(sys::llama_sampler_init_min_p(min_p.min(1.0), 1));
                }
                add(sys::llama_sampler_init_temp(temperature));
                add(sys::llama_sampler_init_dist(seed));
            }
            Ok(Self { chain: Some(chain) })
        }
    }

    /// Tells the penalties of a token that was not sampled.
    pub(in crate::engine) fn accept(&mut self, token: Token) -> Result<(), String> {
        let Some(chain) = self.chain else { return Ok(()) };
        let mut error = shim::Error::new();
        // SAFETY: the chain is alive; its samplers look tokens up in maps, so that any number is safe.
        if unsafe { shim::altiplano_accept(chain.as_ptr(), token, &raw mut error) } == 0 {
            Ok(())
        } else {
            Err(error.text())
        }
    }

    pub(super) fn chain(&mut self) -> Option<*mut llama_sampler> {
        self.chain.map(NonNull::as_ptr)
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        if let Some(chain) = self.chain {
            // SAFETY: the chain is ours, and its samplers are the chain's.
            unsafe { llama_cpp_sys_2::llama_sampler_free(chain.as_ptr()) };
        }
    }
}

//! A model's own head that guesses tokens (MTP): the hidden states that the model gives, and what the head makes of them.

use llama_cpp_sys_2 as sys;

use super::context::{Context, DecodeError, decoded};
use super::params::Part;
use super::{Batch, Model, log, shim};

/// Architectures whose head llama.cpp computes from a hidden state, a token and plain attention. Others need more, or abort.
const HEADS: [&str; 4] = ["glm4moe", "hy_v3", "qwen35", "qwen35moe"];

impl Model {
    /// Why the model has no head to guess with; `None`: it has.
    pub(in crate::engine) fn lacks_head(&self) -> Option<String> {
        // SAFETY: the model is alive.
        let layers = unsafe { sys::llama_model_n_layer_nextn(self.raw()) };
        let architecture = self.metadata("general.architecture").unwrap_or_default();
        match layers {
            _ if layers < 1 => Some("the model's file has no layers for it".to_owned()),
            1 if HEADS.contains(&architecture.as_str()) => self.lacks_projection(),
            1 => Some(format!("it is not known for models of the architecture {architecture}")),
            _ => Some(format!("the model has {layers} layers for it, and only one is known to work")),
        }
    }
}

impl Model {
    /// The name of the tensor that every head has, if the file lacks it: llama.cpp loads some such models all the same, and
    /// aborts when it computes the head.
    fn lacks_projection(&self) -> Option<String> {
        // SAFETY: the model is alive. The head's layer is the first one behind these.
        let layers = unsafe { sys::llama_model_n_layer(self.raw()) };
        let name = format!("blk.{layers}.nextn.eh_proj.weight");
        (!self.has_tensor(&name)).then(|| format!("the model's file lacks the tensor {name}"))
    }
}

impl Context {
    /// Tokens of a step that can be taken away again, where the state is one for all tokens.
    pub(in crate::engine) fn rollback(&self) -> u32 {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_rs_seq(self.raw.as_ptr()) }
    }

    pub(super) fn give_hidden_states(&self) {
        if self.part != Part::Model {
            // SAFETY: the context is alive.
            unsafe { shim::altiplano_hidden(self.raw.as_ptr(), self.part == Part::Head) };
        }
    }

    /// Host bytes of the hidden states.
    pub(super) fn hidden_bytes(&self) -> u64 {
        let rows = match self.part {
            Part::Model => 0,
            Part::ModelForHead => self.batch(),
            Part::Head => self.outputs(),
        };
        u64::from(rows) * u64::from(self.model.embedding_width()) * 4
    }

    /// The hidden state after a token of the last batch: of any token where the model was computed, of one with an output
    /// where its head was.
    pub(in crate::engine) fn hidden(&mut self, row: i32) -> Option<&[f32]> {
        let output = usize::try_from(row).ok().and_then(|row| self.output_rows.get(row))?;
        let width = self.model.embedding_width() as usize;
        if self.part == Part::Model || (self.part == Part::Head && *output == 0) {
            return None;
        }
        // SAFETY: the context is alive, and the row is one of the last batch that has a state.
        let state = unsafe { shim::altiplano_hidden_row(self.raw.as_ptr(), row) };
        if state.is_null() {
            return None;
        }
        // SAFETY: llama.cpp's rows have as many numbers as the model is wide, and stay until the context computes again or
        // goes, which the borrow of it prevents.
        Some(unsafe { std::slice::from_raw_parts(state, width) })
    }

    /// Computes the head: for each token of the batch the hidden state of the one before it.
    pub(in crate::engine) fn decode_head(&mut self, batch: &mut Batch, states: &[f32]) -> Result<(), DecodeError> {
        self.check(batch).map_err(DecodeError::Invalid)?;
        let width = self.model.embedding_width() as usize;
        if self.part != Part::Head || states.len() != batch.tokens().len() * width {
            return Err(DecodeError::Invalid("not one hidden state for each token".to_owned()));
        }
        self.output_rows.clear();
        let mut error = shim::Error::new();
        let raw = batch.raw();
        let (result, errors) = log::with_errors(|| {
            // SAFETY: the context is alive, the batch was checked and lives through the call, and there are `width` numbers
            // for each of its tokens.
            unsafe {
                shim::altiplano_decode_head(self.raw.as_ptr(), &raw const raw, states.as_ptr(), width, &raw mut error)
            }
        });
        decoded(result, &error, errors)?;
        self.output_rows.extend_from_slice(batch.outputs());
        Ok(())
    }
}

//! Weights and vocabulary.

use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2::{llama_model, llama_vocab};
use llguidance::toktrie::TokEnv;

use super::backend::backend;
use super::{log, shim};
use crate::engine::FimTokens;
use crate::engine::request::Token;
use crate::runner::protocol::MemoryUse;

/// llama.cpp's own limit of layers.
const MAX_LAYERS: u32 = 512;

/// How a model is loaded.
#[derive(Clone, Debug)]
pub(in crate::engine) struct ModelParams<'path> {
    /// The file.
    pub(in crate::engine) path: &'path Path,
    /// llama.cpp's indices of the devices to use; empty: the CPU alone.
    pub(in crate::engine) devices: Vec<usize>,
    /// Layers to offload; `None`: all.
    pub(in crate::engine) gpu_layers: Option<u32>,
    /// Of so many layers, the first ones, the experts stay in host memory.
    pub(in crate::engine) experts_on_cpu: u32,
    /// Reads no weights: memory can be predicted, nothing can be computed.
    pub(in crate::engine) dry_run: bool,
    /// Loads its head for guessing too, if it has one.
    pub(in crate::engine) head: bool,
}

/// A loaded model; clones share it. It outlives every [`Context`](super::Context) made of it.
#[derive(Clone)]
pub(in crate::engine) struct Model {
    inner: Arc<LlamaModel>,
    dry_run: bool,
    /// Bytes of adapters beside the weights.
    adapter_bytes: u64,
    /// What the projector takes on each device.
    projector: Arc<[MemoryUse]>,
    /// What this process held of host memory when the model was loaded, weights included that are not mapped.
    held_bytes: u64,
}

impl Model {
    /// Loads the model; `progress` gets 0.0 to 1.0. The error is llama.cpp's own words.
    pub(in crate::engine) fn load(
        params: &ModelParams<'_>,
        mut progress: impl FnMut(f32) + 'static,
    ) -> Result<Self, String> {
        let ModelParams { path, ref devices, gpu_layers, experts_on_cpu, dry_run, head } = *params;
        // llama-cpp-2 asserts this in debug builds.
        std::fs::metadata(path).map_err(|error| error.to_string())?;
        let backend = backend()?;
        let mut model_params = LlamaModelParams::default()
            .with_devices(devices)
            .map_err(|error| error.to_string())?
            .with_no_alloc(dry_run)
            .with_load_mtp(head)
            .with_progress_callback(move |fraction| {
                progress(fraction);
                true
            });
        if let Some(layers) = gpu_layers {
            model_params = model_params.with_n_gpu_layers(layers);
        }
        // llama.cpp keeps the pointer until the model is loaded.
        let experts = experts_pattern(experts_on_cpu);
        let mut model_params = pin!(model_params);
        if let Some(pattern) = &experts {
            model_params.as_mut().add_cpu_buft_override(pattern);
        }
        let (loaded, errors) = log::with_errors(|| LlamaModel::load_from_file(backend, path, &model_params));
        match loaded {
            Ok(inner) => {
                Ok(Self { inner: Arc::new(inner), dry_run, adapter_bytes: 0, projector: Arc::default(), held_bytes: 0 })
            }
            Err(_) if !errors.is_empty() => Err(errors),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The one crossing from `llama-cpp-2` to `llama-cpp-sys-2`: the handles of the former are private.
    pub(super) fn raw(&self) -> *mut llama_model {
        const { assert!(size_of::<LlamaModel>() == size_of::<*mut llama_model>()) };
        // SAFETY: `LlamaModel` is `repr(transparent)` over a transparent wrapper of a `NonNull<llama_model>`; the
        // crate is pinned to the version in which that was read, and a test compares what both sides see.
        unsafe { *std::ptr::from_ref::<LlamaModel>(&self.inner).cast::<*mut llama_model>() }
    }

    /// The same model, with so many bytes of adapters beside its weights.
    pub(in crate::engine) fn with_adapter_bytes(self, adapter_bytes: u64) -> Self {
        Self { adapter_bytes, ..self }
    }

    /// The same model, with a projector beside its weights.
    pub(in crate::engine) fn with_projector(self, memory: Vec<MemoryUse>) -> Self {
        Self { projector: memory.into(), ..self }
    }

    /// The same model, in a process that held so much of host memory before it had a context.
    pub(in crate::engine) fn with_held_bytes(self, held_bytes: u64) -> Self {
        Self { held_bytes, ..self }
    }

    /// What the process itself takes of host memory: libraries, drivers, the vocabulary. `host` is what the model takes
    /// there.
    pub(super) fn process_bytes(&self, host: &MemoryUse) -> u64 {
        let weights = if self.dry_run { 0 } else { host.weights_bytes.saturating_sub(host.mapped_bytes) };
        self.held_bytes.saturating_sub(weights)
    }

    pub(super) fn projector_memory(&self) -> &[MemoryUse] {
        &self.projector
    }

    pub(super) fn adapter_bytes(&self) -> u64 {
        self.adapter_bytes
    }

    pub(super) fn vocab(&self) -> *const llama_vocab {
        // SAFETY: the model is alive.
        unsafe { llama_cpp_sys_2::llama_model_get_vocab(self.raw()) }
    }

    /// Numbers in the position of an embedding: four where positions have several dimensions (M-RoPE).
    pub(super) fn position_sections(&self) -> usize {
        // SAFETY: the model is alive.
        let kind = unsafe { llama_cpp_sys_2::llama_model_rope_type(self.raw()) };
        let several = [llama_cpp_sys_2::LLAMA_ROPE_TYPE_MROPE, llama_cpp_sys_2::LLAMA_ROPE_TYPE_IMROPE];
        if several.contains(&kind) { 4 } else { 1 }
    }

    /// Whether the weights are not there.
    pub(super) fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// Tokens in the vocabulary.
    pub(in crate::engine) fn n_vocab(&self) -> u32 {
        u32::try_from(self.inner.n_vocab()).unwrap_or(0)
    }

    /// Tokens that the model was trained with.
    pub(in crate::engine) fn trained_context(&self) -> u32 {
        self.inner.n_ctx_train()
    }

    /// Whether a token passes only some of many feed-forward parts.
    pub(in crate::engine) fn has_experts(&self) -> bool {
        let architecture = self.metadata("general.architecture").unwrap_or_default();
        let count = self.metadata(&format!("{architecture}.expert_count"));
        count.and_then(|count| count.parse::<u32>().ok()).is_some_and(|count| count > 0)
    }

    /// Attention heads.
    pub(in crate::engine) fn n_head(&self) -> u32 {
        self.inner.n_head()
    }

    /// Numbers in a cell of one layer: of its keys or of its values, whichever are more.
    pub(in crate::engine) fn kv_width(&self) -> u32 {
        let architecture = self.metadata("general.architecture").unwrap_or_default();
        let told = ["key", "value"]
            .into_iter()
            .filter_map(|part| self.metadata(&format!("{architecture}.attention.{part}_length"))?.parse::<u32>().ok());
        let (heads, width) = (self.inner.n_head(), u32::try_from(self.inner.n_embd()).unwrap_or(0));
        let of_a_head = told.max().unwrap_or_else(|| width / heads.max(1));
        of_a_head.saturating_mul(self.inner.n_head_kv())
    }

    /// Layers without the output layer.
    pub(in crate::engine) fn n_layer(&self) -> u32 {
        self.inner.n_layer()
    }

    /// Bytes of all tensors.
    pub(in crate::engine) fn size_bytes(&self) -> u64 {
        self.inner.size()
    }

    /// Number of parameters.
    pub(in crate::engine) fn parameter_count(&self) -> u64 {
        self.inner.n_params()
    }

    /// A scalar of the file's metadata.
    pub(in crate::engine) fn metadata(&self, key: &str) -> Option<String> {
        self.inner.meta_val_str(key).ok()
    }

    /// Whether positions are told by rotating queries and keys.
    pub(in crate::engine) fn rotates(&self) -> bool {
        self.inner.rope_type().is_some()
    }

    /// Whether the file has a tensor of this name, in whichever of its parts.
    pub(in crate::engine) fn has_tensor(&self, name: &str) -> bool {
        let Ok(name) = CString::new(name) else { return false };
        // SAFETY: the model is alive, and the name is a C string that lives through the call.
        unsafe { shim::altiplano_has_tensor(self.raw(), name.as_ptr()) }
    }

    /// The Jinja source in the file.
    pub(in crate::engine) fn chat_template(&self) -> Option<String> {
        self.inner.chat_template(None).ok()?.to_string().ok()
    }

    /// Architecture, size class and quantisation in short.
    pub(in crate::engine) fn description(&self) -> String {
        let mut buffer = [0 as c_char; 128];
        // SAFETY: the model is alive; llama.cpp writes at most the given size, ended with a zero.
        unsafe {
            llama_cpp_sys_2::llama_model_desc(self.raw(), buffer.as_mut_ptr(), buffer.len());
            CStr::from_ptr(buffer.as_ptr()).to_string_lossy().into_owned()
        }
    }

    /// Whether the state of a sequence is one vector that every token overwrites (Mamba, RWKV), for all or some layers.
    pub(in crate::engine) fn is_recurrent(&self) -> bool {
        self.inner.is_recurrent() || self.inner.is_hybrid()
    }

    /// Whether all layers are such: then a cell of the context takes no memory.
    pub(in crate::engine) fn is_only_recurrent(&self) -> bool {
        self.inner.is_recurrent() && !self.inner.is_hybrid()
    }

    /// Tokens in the sliding window; 0: none.
    pub(in crate::engine) fn sliding_window(&self) -> u32 {
        // SAFETY: the model is alive.
        u32::try_from(unsafe { llama_cpp_sys_2::llama_model_n_swa(self.raw()) }).unwrap_or(0)
    }

    /// Why the model cannot generate text one token after the other.
    pub(in crate::engine) fn unsupported(&self) -> Option<&'static str> {
        // SAFETY: the model is alive.
        let (encoder, decoder, diffusion) = unsafe {
            (
                llama_cpp_sys_2::llama_model_has_encoder(self.raw()),
                llama_cpp_sys_2::llama_model_has_decoder(self.raw()),
                llama_cpp_sys_2::llama_model_is_diffusion(self.raw()),
            )
        };
        if self.n_vocab() == 0 {
            Some("it has no vocabulary")
        } else if diffusion {
            Some("it is a diffusion model")
        } else if encoder || !decoder {
            Some("it is an encoder")
        } else {
            None
        }
    }

    /// Whether a token sees only those before it.
    pub(in crate::engine) fn is_causal(&self) -> bool {
        let architecture = self.metadata("general.architecture").unwrap_or_default();
        self.metadata(&format!("{architecture}.attention.causal")).as_deref() != Some("false")
    }

    /// Width of a token's state, which is that of an embedding.
    pub(in crate::engine) fn embedding_width(&self) -> u32 {
        // SAFETY: the model is alive.
        u32::try_from(unsafe { llama_cpp_sys_2::llama_model_n_embd_out(self.raw()) }).unwrap_or(0)
    }

    /// The file's own form for a query and a document; `{query}` and `{document}` stand for them.
    pub(in crate::engine) fn rerank_template(&self) -> Option<String> {
        self.inner.chat_template(Some("rerank")).ok()?.to_string().ok()
    }

    /// Token that parts two texts.
    pub(in crate::engine) fn separator(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives with the model.
        Some(unsafe { llama_cpp_sys_2::llama_vocab_sep(self.vocab()) }).filter(|&token| self.has(token))
    }

    /// Whether a text ends with [`Self::eos`].
    pub(in crate::engine) fn adds_eos(&self) -> bool {
        // SAFETY: the vocabulary lives with the model.
        unsafe { llama_cpp_sys_2::llama_vocab_get_add_eos(self.vocab()) }
    }

    /// Whether [`Self::separator`] stands between two texts.
    pub(in crate::engine) fn adds_separator(&self) -> bool {
        // SAFETY: the vocabulary lives with the model.
        unsafe { llama_cpp_sys_2::llama_vocab_get_add_sep(self.vocab()) }
    }

    /// Token that begins a text.
    pub(in crate::engine) fn bos(&self) -> Option<Token> {
        Some(self.inner.vocab().bos().0).filter(|&token| token >= 0)
    }

    /// Token that ends a text.
    pub(in crate::engine) fn eos(&self) -> Option<Token> {
        Some(self.inner.vocab().eos().0).filter(|&token| token >= 0)
    }

    /// Whether a prompt begins with [`Self::bos`].
    pub(in crate::engine) fn adds_bos(&self) -> bool {
        self.inner.vocab().should_add_bos()
    }

    /// Tokens for infilling, where the vocabulary has the three without which there is none.
    pub(in crate::engine) fn fim(&self) -> Option<FimTokens> {
        let vocab = self.inner.vocab();
        let known = |token: LlamaToken| Some(token.0).filter(|&token| self.has(token));
        Some(FimTokens {
            prefix: known(vocab.fim_pre())?,
            suffix: known(vocab.fim_suf())?,
            middle: known(vocab.fim_mid())?,
            repository: known(vocab.fim_rep()),
            separator: known(vocab.fim_sep()),
        })
    }

    /// llama.cpp's number of the vocabulary's kind.
    pub(in crate::engine) fn vocab_type(&self) -> u32 {
        // SAFETY: the vocabulary lives with the model. (The safe crate panics on kinds that it does not know.)
        unsafe { llama_cpp_sys_2::llama_vocab_type(self.vocab()) }
    }

    /// Why tokens of `other` are not tokens of this model, as llama.cpp's `common_speculative_are_compatible` judges; `None`:
    /// they are.
    pub(in crate::engine) fn vocabulary_differs(&self, other: &Self) -> Option<String> {
        /// By how much the sizes may differ, and how many tokens of the beginning may: llama.cpp's own.
        const MAX_DIFFERENCE: u32 = 128;
        const FIRST: u32 = 5;
        let kinds = (self.vocab_type(), other.vocab_type());
        if kinds.0 != kinds.1 {
            return Some(format!("its vocabulary is of kind {}, the model's of kind {}", kinds.1, kinds.0));
        }
        let begins = |model: &Self| model.adds_bos().then(|| model.inner.vocab().bos().0);
        let ends = |model: &Self| model.adds_eos().then(|| model.inner.vocab().eos().0);
        for (what, own, others) in [("begins", begins(self), begins(other)), ("ends", ends(self), ends(other))] {
            if own != others {
                return Some(format!("a text {what} with token {others:?}, with the model's {own:?}"));
            }
        }
        let sizes = (self.n_vocab(), other.n_vocab());
        if sizes.0.abs_diff(sizes.1) > MAX_DIFFERENCE {
            return Some(format!("its vocabulary has {} tokens, the model's {}", sizes.1, sizes.0));
        }
        let text = |model: &Self, token: u32| Token::try_from(token).ok().and_then(|token| model.token_text(token));
        (FIRST..sizes.0.min(sizes.1)).find_map(|token| {
            let (own, others) = (text(self, token), text(other, token));
            (own != others).then(|| {
                let quoted = |text: Option<String>| text.unwrap_or_default().chars().take(40).collect::<String>();
                format!("its token {token} is {:?}, the model's {:?}", quoted(others), quoted(own))
            })
        })
    }

    /// Whether the token ends a generation.
    pub(in crate::engine) fn is_end(&self, token: Token) -> bool {
        self.has(token) && self.inner.vocab().is_eog(LlamaToken(token))
    }

    /// All tokens that end a generation.
    pub(in crate::engine) fn end_tokens(&self) -> Vec<Token> {
        let size = Token::try_from(self.n_vocab()).unwrap_or(0);
        (0..size).filter(|&token| self.is_end(token)).collect()
    }

    /// The vocabulary for llguidance; reads every token.
    pub(in crate::engine) fn tok_env(&self) -> TokEnv {
        LlamaSampler::llguidance_tok_env(&self.inner)
    }

    /// Tokens that the model's file says must never be generated.
    pub(in crate::engine) fn suppressed(&self) -> Vec<Token> {
        let mut count = 0;
        // SAFETY: the vocabulary lives with the model; the array has `count` tokens and lives with it too.
        unsafe {
            let tokens = llama_cpp_sys_2::llama_vocab_get_suppress_tokens(self.vocab(), &raw mut count);
            match usize::try_from(count) {
                Ok(count) if count > 0 && !tokens.is_null() => std::slice::from_raw_parts(tokens, count).to_vec(),
                _ => Vec::new(),
            }
        }
    }

    /// Whether the vocabulary has the token.
    pub(in crate::engine) fn has(&self, token: Token) -> bool {
        u32::try_from(token).is_ok_and(|token| token < self.n_vocab())
    }

    /// The token as the vocabulary writes it.
    pub(in crate::engine) fn token_text(&self, token: Token) -> Option<String> {
        if !self.has(token) {
            return None;
        }
        Some(self.inner.vocab().text(LlamaToken(token))?.to_string_lossy().into_owned())
    }

    /// Appends the bytes that the token stands for; they may be a part of a character. Control tokens have bytes only
    /// when `special`.
    pub(in crate::engine) fn append_piece(&self, token: Token, special: bool, out: &mut Vec<u8>) -> Result<(), String> {
        if !self.has(token) {
            return Err(format!("token {token} is not in the vocabulary"));
        }
        let start = out.len();
        let mut room = 64;
        // The second call has the room that the first one asked for.
        for _ in 0..2 {
            out.resize(start + room, 0);
            let size = i32::try_from(room).map_err(|error| error.to_string())?;
            let mut error = shim::Error::new();
            // SAFETY: the vocabulary lives with the model, the token is in it, and `out` has `size` bytes from `start`.
            let written = unsafe {
                shim::altiplano_token_to_piece(
                    self.vocab(),
                    token,
                    out[start..].as_mut_ptr().cast(),
                    size,
                    special,
                    &raw mut error,
                )
            };
            if let Ok(written) = usize::try_from(written) {
                out.truncate(start + written);
                return Ok(());
            }
            if written == i32::MIN {
                out.truncate(start);
                return Err(error.text());
            }
            room = written.unsigned_abs() as usize;
        }
        out.truncate(start);
        Err(format!("token {token} has no text"))
    }

    /// Text to tokens.
    pub(in crate::engine) fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<Token>, String> {
        let length = i32::try_from(text.len()).map_err(|_| "the text has more than 2 GiB")?;
        let mut tokens: Vec<Token> = vec![0; text.len() / 3 + 16];
        for _ in 0..2 {
            let size = i32::try_from(tokens.len()).map_err(|error| error.to_string())?;
            let mut error = shim::Error::new();
            // SAFETY: the vocabulary lives with the model; text and tokens are as long as is said.
            let count = unsafe {
                shim::altiplano_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    length,
                    tokens.as_mut_ptr(),
                    size,
                    add_special,
                    parse_special,
                    &raw mut error,
                )
            };
            if let Ok(count) = usize::try_from(count) {
                tokens.truncate(count);
                return Ok(tokens);
            }
            if count == i32::MIN {
                return Err(error.text());
            }
            tokens.resize(count.unsigned_abs() as usize, 0);
        }
        Err("the tokenizer asks for more room each time".to_owned())
    }
}

/// llama.cpp's pattern for the names of the experts' tensors in the first `layers` layers; `u32::MAX`: in all.
fn experts_pattern(layers: u32) -> Option<CString> {
    let number = match layers {
        0 => return None,
        u32::MAX => String::new(),
        _ => {
            let numbers: Vec<String> = (0..layers.min(MAX_LAYERS)).map(|layer| layer.to_string()).collect();
            format!("blk\\.({})", numbers.join("|"))
        }
    };
    CString::new(format!("{number}\\.ffn_(up|down|gate|gate_up)_(ch|)exps")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_found_by_layer() {
        let shown = |layers| experts_pattern(layers).map(|pattern| pattern.into_string().expect("text"));
        assert_eq!(shown(0), None);
        assert_eq!(shown(2).as_deref(), Some(r"blk\.(0|1)\.ffn_(up|down|gate|gate_up)_(ch|)exps"));
        assert_eq!(shown(u32::MAX).as_deref(), Some(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"));
    }

    /// The one crossing: what the raw pointer shows is what the safe crate shows.
    #[test]
    fn raw_pointer_is_the_model() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.gguf");
        let spec = altiplano_test_models::Spec { context: 1792, layers: 3, ..Default::default() };
        spec.write(&path).expect("a model file");
        let params = ModelParams {
            path: &path,
            devices: vec![],
            gpu_layers: None,
            experts_on_cpu: 0,
            dry_run: false,
            head: false,
        };
        let model = Model::load(&params, |_| {}).expect("the model loads");
        // SAFETY: the model is alive.
        let (context, layers, parameters) = unsafe {
            (
                llama_cpp_sys_2::llama_model_n_ctx_train(model.raw()),
                llama_cpp_sys_2::llama_model_n_layer(model.raw()),
                llama_cpp_sys_2::llama_model_n_params(model.raw()),
            )
        };
        assert_eq!((context, layers, parameters), (1792, 3, spec.parameters()));
        assert_eq!((model.trained_context(), model.n_layer()), (1792, 3));
    }
}

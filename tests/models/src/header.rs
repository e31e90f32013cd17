//! What the file says of a model before its weights.

use crate::gguf::Header;
use crate::spec::{Architecture, Spec};
use crate::tensor::Tensor;
use crate::vocab::Vocabulary;
use crate::{mamba, qwen35};

/// The file's header: metadata and tensor descriptions.
pub(crate) fn header(spec: &Spec, vocabulary: &Vocabulary, tensors: &[Tensor]) -> Header {
    let arch = spec.architecture.name();
    let mut h = Header::default();
    h.string("general.architecture", arch);
    h.string("general.type", "model");
    h.string("general.name", &spec.name);
    h.string("general.license", "apache-2.0");
    h.u32("general.file_type", spec.quantization.file_type());
    h.u32("general.quantization_version", 2);
    h.u32(&format!("{arch}.context_length"), spec.context);
    h.u32(&format!("{arch}.embedding_length"), spec.embd);
    h.u32(&format!("{arch}.block_count"), spec.layers + u32::from(spec.mtp.is_some()));
    if spec.architecture == Architecture::Qwen35 {
        qwen35::describe(&mut h, spec);
    }
    if spec.architecture == Architecture::Glm4moe {
        let numbers = [
            ("expert_count", 2),
            ("expert_used_count", 1),
            ("expert_shared_count", 1),
            ("expert_feed_forward_length", spec.ff),
            ("leading_dense_block_count", spec.layers),
            ("nextn_predict_layers", u32::from(spec.mtp.is_some())),
        ];
        for (name, value) in numbers {
            h.u32(&format!("{arch}.{name}"), value);
        }
    }
    if spec.architecture == Architecture::Mamba {
        mamba::describe(&mut h, spec.embd);
    } else {
        h.u32(&format!("{arch}.feed_forward_length"), spec.ff);
        h.u32(&format!("{arch}.attention.head_count"), spec.heads);
        h.u32(&format!("{arch}.attention.head_count_kv"), spec.kv_heads);
        h.u32(&format!("{arch}.attention.key_length"), spec.embd / spec.heads);
        h.u32(&format!("{arch}.attention.value_length"), spec.embd / spec.heads);
        match spec.architecture {
            Architecture::Bert => {
                h.f32(&format!("{arch}.attention.layer_norm_epsilon"), 1e-12);
                h.bool(&format!("{arch}.attention.causal"), false);
            }
            Architecture::Gpt2 => h.f32(&format!("{arch}.attention.layer_norm_epsilon"), 1e-5),
            _ => {
                h.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5);
                h.u32(&format!("{arch}.rope.dimension_count"), spec.embd / spec.heads);
                h.f32(&format!("{arch}.rope.freq_base"), 10_000.0);
            }
        }
        if let Some(pooling) = spec.pooling {
            h.u32(&format!("{arch}.pooling_type"), pooling.number());
        }
    }
    if spec.experts > 0 {
        h.u32(&format!("{arch}.expert_count"), spec.experts);
        h.u32(&format!("{arch}.expert_used_count"), 2);
    }
    if let Some(original) = spec.long_rope {
        h.string(&format!("{arch}.rope.scaling.type"), "longrope");
        h.u32(&format!("{arch}.rope.scaling.original_context_length"), original);
    }
    if matches!(spec.architecture, Architecture::Qwen2vl | Architecture::Qwen35) {
        // Pairs of a head's elements that turn with time, height and width.
        let pairs = i32::try_from(spec.embd / spec.heads / 2).unwrap_or(i32::MAX);
        let side = pairs / 3;
        h.i32s(&format!("{arch}.rope.dimension_sections"), [pairs - 2 * side, side, side, 0].into_iter());
    }
    h.u32(&format!("{arch}.vocab_size"), spec.vocab);
    if spec.architecture == Architecture::Gemma3 {
        h.u32(&format!("{arch}.attention.sliding_window"), spec.sliding_window);
    }
    vocabulary.describe(&mut h);
    if spec.infill {
        // Ordinary tokens: their ids are all that matters.
        for (token, key) in (300..).zip(["fim_pre", "fim_suf", "fim_mid"]) {
            h.u32(&format!("tokenizer.ggml.{key}_token_id"), token);
        }
    }
    if let Some(template) = &spec.chat_template {
        h.string("tokenizer.chat_template", template);
    }
    for tensor in tensors {
        h.tensor(&tensor.name, &tensor.shape, tensor.kind.ggml_type(), tensor.bytes());
    }
    h
}

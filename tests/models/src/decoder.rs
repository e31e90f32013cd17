//! What a decoder is made of.

use crate::spec::{Architecture, Quantization, Spec};
use crate::tensor::Tensor;
use crate::weights::Filling;
use crate::{mamba, qwen35};

/// Every tensor of a model that generates, whatever its layers are.
pub(crate) fn tensors(spec: &Spec) -> Vec<Tensor> {
    let Spec { vocab, layers, embd, heads, kv_heads, ff, .. } = *spec;
    let (embd, ff, vocab) = (u64::from(embd), u64::from(ff), u64::from(vocab));
    let head = embd / u64::from(heads);
    let kv = head * u64::from(kv_heads);
    let gain = |factor: f32| Filling::Random { gain: factor };
    let mut all = Vec::new();
    let mut matrix = |name: String, rows: u64, columns: u64, filling: Filling| {
        all.push(Tensor { name, shape: vec![columns, rows], kind: spec.quantization, filling });
    };
    matrix("token_embd.weight".to_owned(), vocab, embd, gain(3.0));
    let attention = match spec.architecture {
        Architecture::Mamba | Architecture::Qwen35 => 0,
        _ => layers,
    };
    // Where rotations are compared tokens look at few others, or it would not matter where those are.
    let sharpness = if spec.long_rope.is_some() { 2.0 } else { 1.0 };
    for i in 0..attention {
        matrix(format!("blk.{i}.attn_q.weight"), embd, embd, gain(sharpness));
        matrix(format!("blk.{i}.attn_k.weight"), kv, embd, gain(sharpness));
        matrix(format!("blk.{i}.attn_v.weight"), kv, embd, gain(1.0));
        matrix(format!("blk.{i}.attn_output.weight"), embd, embd, gain(1.0));
        if spec.experts == 0 {
            matrix(format!("blk.{i}.ffn_gate.weight"), ff, embd, gain(1.0));
            matrix(format!("blk.{i}.ffn_up.weight"), ff, embd, gain(1.0));
            matrix(format!("blk.{i}.ffn_down.weight"), embd, ff, gain(1.0));
        }
    }
    if !spec.is_tied() {
        matrix("output.weight".to_owned(), vocab, embd, gain(3.0));
    }

    if spec.experts > 0 {
        let experts = u64::from(spec.experts);
        for i in 0..layers {
            let mut one = |name: &str, shape: Vec<u64>, kind: Quantization| {
                all.push(Tensor { name: format!("blk.{i}.{name}.weight"), shape, kind, filling: gain(1.0) });
            };
            one("ffn_gate_inp", vec![embd, experts], Quantization::F32);
            one("ffn_gate_exps", vec![embd, ff, experts], spec.quantization);
            one("ffn_up_exps", vec![embd, ff, experts], spec.quantization);
            one("ffn_down_exps", vec![ff, embd, experts], spec.quantization);
        }
    }
    let mut vector = |name: String, length: u64, filling: Filling| {
        all.push(Tensor { name, shape: vec![length], kind: Quantization::F32, filling });
    };
    for i in 0..attention {
        vector(format!("blk.{i}.attn_norm.weight"), embd, Filling::Ones);
        let before_ffn = if spec.architecture == Architecture::Glm4moe { "post_attention_norm" } else { "ffn_norm" };
        vector(format!("blk.{i}.{before_ffn}.weight"), embd, Filling::Ones);
        match spec.architecture {
            Architecture::Llama
            | Architecture::Bert
            | Architecture::Gpt2
            | Architecture::Mamba
            | Architecture::Glm4moe
            | Architecture::Qwen35 => {}
            Architecture::Qwen2 | Architecture::Qwen2vl => {
                vector(format!("blk.{i}.attn_q.bias"), embd, gain(0.1));
                vector(format!("blk.{i}.attn_k.bias"), kv, gain(0.1));
                vector(format!("blk.{i}.attn_v.bias"), kv, gain(0.1));
            }
            Architecture::Gemma3 => {
                vector(format!("blk.{i}.attn_q_norm.weight"), head, Filling::Ones);
                vector(format!("blk.{i}.attn_k_norm.weight"), head, Filling::Ones);
                vector(format!("blk.{i}.post_attention_norm.weight"), embd, Filling::Ones);
                vector(format!("blk.{i}.post_ffw_norm.weight"), embd, Filling::Ones);
            }
        }
    }
    vector("output_norm.weight".to_owned(), embd, Filling::Ones);
    if spec.long_rope.is_some() {
        // Positions count as they are, or for less.
        vector("rope_factors_short.weight".to_owned(), head / 2, Filling::Ones);
        vector("rope_factors_long.weight".to_owned(), head / 2, Filling::Constant(3.0));
    }
    if spec.architecture == Architecture::Mamba {
        all.extend((0..layers).flat_map(|layer| mamba::tensors(layer, embd, spec.quantization)));
    }
    if spec.architecture == Architecture::Qwen35 {
        all.extend(qwen35::tensors(spec));
    }
    all
}

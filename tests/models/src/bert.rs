//! What a BERT model is made of.

use crate::spec::{Pooling, Quantization, Spec};
use crate::tensor::Tensor;
use crate::weights::Filling;

/// Every tensor of an encoder with learnt positions, norms after each part, and biases everywhere.
pub(crate) fn tensors(spec: &Spec) -> Vec<Tensor> {
    let Spec { vocab, layers, embd, heads, kv_heads, ff, context, .. } = *spec;
    let (embd, ff) = (u64::from(embd), u64::from(ff));
    let kv = embd / u64::from(heads) * u64::from(kv_heads);
    let gain = |factor: f32| Filling::Random { gain: factor };
    let mut all = Vec::new();
    let mut matrix = |name: String, rows: u64, columns: u64, kind: Quantization, factor: f32| {
        all.push(Tensor { name, shape: vec![columns, rows], kind, filling: gain(factor) });
    };
    let kind = spec.quantization;
    matrix("token_embd.weight".to_owned(), u64::from(vocab), embd, kind, 3.0);
    matrix("position_embd.weight".to_owned(), u64::from(context), embd, Quantization::F32, 1.0);
    matrix("token_types.weight".to_owned(), 2, embd, Quantization::F32, 0.1);
    for i in 0..layers {
        matrix(format!("blk.{i}.attn_q.weight"), embd, embd, kind, 1.0);
        matrix(format!("blk.{i}.attn_k.weight"), kv, embd, kind, 1.0);
        matrix(format!("blk.{i}.attn_v.weight"), kv, embd, kind, 1.0);
        matrix(format!("blk.{i}.attn_output.weight"), embd, embd, kind, 1.0);
        matrix(format!("blk.{i}.ffn_up.weight"), ff, embd, kind, 1.0);
        matrix(format!("blk.{i}.ffn_down.weight"), embd, ff, kind, 1.0);
    }
    let is_reranker = spec.pooling == Some(Pooling::Rank);
    if is_reranker {
        matrix("cls.weight".to_owned(), embd, embd, Quantization::F32, 1.0);
        matrix("cls.output.weight".to_owned(), 1, embd, Quantization::F32, 2.0);
    }
    let mut vector = |name: String, length: u64, filling: Filling| {
        all.push(Tensor { name, shape: vec![length], kind: Quantization::F32, filling });
    };
    let mut norm = |name: &str| {
        vector(format!("{name}.weight"), embd, Filling::Ones);
        vector(format!("{name}.bias"), embd, gain(0.1));
    };
    norm("token_embd_norm");
    for i in 0..layers {
        norm(&format!("blk.{i}.attn_output_norm"));
        norm(&format!("blk.{i}.layer_output_norm"));
    }
    for i in 0..layers {
        for (name, length) in [("attn_q", embd), ("attn_k", kv), ("attn_v", kv), ("attn_output", embd)] {
            vector(format!("blk.{i}.{name}.bias"), length, gain(0.1));
        }
        vector(format!("blk.{i}.ffn_up.bias"), ff, gain(0.1));
        vector(format!("blk.{i}.ffn_down.bias"), embd, gain(0.1));
    }
    if is_reranker {
        vector("cls.bias".to_owned(), embd, gain(0.1));
        vector("cls.output.bias".to_owned(), 1, gain(0.1));
    }
    all
}

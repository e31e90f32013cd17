//! What a GPT-2 model is made of.

use crate::spec::{Quantization, Spec};
use crate::tensor::Tensor;
use crate::weights::Filling;

/// Every tensor of a decoder with a vector learnt for each position, one matrix for query, key and value, and biases everywhere.
pub(crate) fn tensors(spec: &Spec) -> Vec<Tensor> {
    let Spec { vocab, layers, embd, heads, kv_heads, ff, context, quantization, .. } = *spec;
    let (embd, ff) = (u64::from(embd), u64::from(ff));
    let kv = embd / u64::from(heads) * u64::from(kv_heads);
    let random = |gain: f32| Filling::Random { gain };
    let matrix = |name: &str, rows: u64, columns: u64, kind, gain| Tensor {
        name: format!("{name}.weight"),
        shape: vec![columns, rows],
        kind,
        filling: random(gain),
    };
    let vector = |name: String, length, filling| Tensor { name, shape: vec![length], kind: Quantization::F32, filling };
    let norm = |name: &str| {
        [vector(format!("{name}.weight"), embd, Filling::Ones), vector(format!("{name}.bias"), embd, random(0.1))]
    };
    let mut all = vec![
        matrix("token_embd", vocab.into(), embd, quantization, 3.0),
        matrix("position_embd", context.into(), embd, Quantization::F32, 1.0),
        matrix("output", vocab.into(), embd, quantization, 3.0),
    ];
    all.extend(norm("output_norm"));
    for layer in 0..layers {
        let blk = |name: &str| format!("blk.{layer}.{name}");
        for (name, rows, columns) in [
            ("attn_qkv", embd + 2 * kv, embd),
            ("attn_output", embd, embd),
            ("ffn_up", ff, embd),
            ("ffn_down", embd, ff),
        ] {
            all.push(matrix(&blk(name), rows, columns, quantization, 1.0));
            all.push(vector(blk(&format!("{name}.bias")), rows, random(0.1)));
        }
        all.extend(norm(&blk("attn_norm")));
        all.extend(norm(&blk("ffn_norm")));
    }
    all
}

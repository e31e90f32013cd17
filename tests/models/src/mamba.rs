//! What a Mamba model has in place of attention.

use crate::gguf::Header;
use crate::spec::Quantization;
use crate::tensor::Tensor;
use crate::weights::Filling;

/// Tokens that the convolution sees.
const CONVOLUTION: u32 = 4;

/// Numbers in the state of each channel.
const STATE: u32 = 16;

/// llama.cpp knows no other expansion.
const EXPANSION: u32 = 2;

/// Rank of the time step.
fn rank(embd: u64) -> u64 {
    embd.div_ceil(16)
}

/// The metadata that only Mamba has.
pub(crate) fn describe(header: &mut Header, embd: u32) {
    for (name, value) in [
        ("feed_forward_length", 0),
        ("attention.head_count", 0),
        ("ssm.conv_kernel", CONVOLUTION),
        ("ssm.inner_size", EXPANSION * embd),
        ("ssm.state_size", STATE),
        ("ssm.time_step_rank", u32::try_from(rank(embd.into())).unwrap_or(u32::MAX)),
    ] {
        header.u32(&format!("mamba.{name}"), value);
    }
    header.f32("mamba.attention.layer_norm_rms_epsilon", 1e-5);
}

/// The tensors of one layer.
pub(crate) fn tensors(layer: u32, embd: u64, quantization: Quantization) -> Vec<Tensor> {
    let (inner, state, rank) = (u64::from(EXPANSION) * embd, u64::from(STATE), rank(embd));
    let random = Filling::Random { gain: 1.0 };
    let tensor = |name: &str, shape: &[u64], kind, filling| Tensor {
        name: format!("blk.{layer}.{name}"),
        shape: shape.to_vec(),
        kind,
        filling,
    };
    vec![
        tensor("attn_norm.weight", &[embd], Quantization::F32, Filling::Ones),
        tensor("ssm_in.weight", &[embd, 2 * inner], quantization, random),
        tensor("ssm_conv1d.weight", &[CONVOLUTION.into(), inner], Quantization::F32, random),
        tensor("ssm_conv1d.bias", &[inner], Quantization::F32, Filling::Constant(0.0)),
        tensor("ssm_x.weight", &[inner, rank + 2 * state], quantization, random),
        tensor("ssm_dt.weight", &[rank, inner], Quantization::F32, random),
        tensor("ssm_dt.bias", &[inner], Quantization::F32, Filling::Constant(0.0)),
        // Below zero, so that the state decays.
        tensor("ssm_a", &[state, inner], Quantization::F32, Filling::Constant(-0.5)),
        tensor("ssm_d", &[inner], Quantization::F32, Filling::Ones),
        tensor("ssm_out.weight", &[inner, embd], quantization, random),
    ]
}

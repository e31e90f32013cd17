//! What a Qwen 3.5 model is made of: gated delta nets, whose state every token changes, and attention in turns; behind
//! them, where it is asked for, the block that guesses one token further (MTP).

use crate::gguf::Header;
use crate::spec::{MtpHead, Quantization, Spec};
use crate::tensor::Tensor;
use crate::weights::Filling;

/// Tokens that the convolution sees.
const CONVOLUTION: u32 = 4;

/// Every so many layers one has attention.
const INTERVAL: u32 = 2;

/// Of layers that hardly change what passes through.
const QUIET: f32 = 0.01;

/// The metadata that only this architecture has.
pub(crate) fn describe(header: &mut Header, spec: &Spec) {
    let Spec { embd, heads, kv_heads, mtp, .. } = *spec;
    for (name, value) in [
        ("full_attention_interval", INTERVAL),
        ("ssm.conv_kernel", CONVOLUTION),
        ("ssm.inner_size", embd),
        ("ssm.state_size", embd / heads),
        ("ssm.time_step_rank", heads),
        ("ssm.group_count", kv_heads),
    ] {
        header.u32(&format!("qwen35.{name}"), value);
    }
    if mtp.is_some() {
        header.u32("qwen35.nextn_predict_layers", 1);
    }
}

/// All layers.
pub(crate) fn tensors(spec: &Spec) -> Vec<Tensor> {
    let out = if spec.mtp == Some(MtpHead::Good) { QUIET } else { 1.0 };
    let mut all = Vec::new();
    for number in 0..spec.layers {
        let mut layer = Layer { spec, number, all: &mut all };
        if (number + 1) % INTERVAL == 0 {
            layer.attention(out);
        } else {
            layer.recurrent(out);
        }
        layer.feed_forward(out);
    }
    if let Some(head) = spec.mtp.filter(|head| *head != MtpHead::Missing) {
        let mut layer = Layer { spec, number: spec.layers, all: &mut all };
        let out = if head == MtpHead::Good { 0.0 } else { 1.0 };
        layer.attention(out);
        layer.feed_forward(out);
        layer.head(head);
    }
    all
}

struct Layer<'a> {
    spec: &'a Spec,
    number: u32,
    all: &'a mut Vec<Tensor>,
}

impl Layer<'_> {
    fn tensor(&mut self, name: &str, shape: &[u64], kind: Quantization, filling: Filling) {
        let name = format!("blk.{}.{name}", self.number);
        self.all.push(Tensor { name, shape: shape.to_vec(), kind, filling });
    }

    fn matrix(&mut self, name: &str, columns: u64, rows: u64, gain: f32) {
        self.tensor(name, &[columns, rows], self.spec.quantization, Filling::Random { gain });
    }

    fn vector(&mut self, name: &str, length: u64, filling: Filling) {
        self.tensor(name, &[length], Quantization::F32, filling);
    }

    fn attention(&mut self, out: f32) {
        let (embd, head, kv) = (self.embd(), self.head_width(), self.head_width() * u64::from(self.spec.kv_heads));
        self.norms();
        // A query and its gate.
        self.matrix("attn_q.weight", embd, 2 * embd, 1.0);
        self.matrix("attn_k.weight", embd, kv, 1.0);
        self.matrix("attn_v.weight", embd, kv, 1.0);
        self.matrix("attn_output.weight", embd, embd, out);
        self.vector("attn_q_norm.weight", head, Filling::Ones);
        self.vector("attn_k_norm.weight", head, Filling::Ones);
    }

    fn recurrent(&mut self, out: f32) {
        let (embd, head, heads) = (self.embd(), self.head_width(), u64::from(self.spec.heads));
        let mixed = 2 * head * u64::from(self.spec.kv_heads) + embd;
        self.norms();
        self.matrix("attn_qkv.weight", embd, mixed, 1.0);
        self.matrix("attn_gate.weight", embd, embd, 1.0);
        let random = Filling::Random { gain: 1.0 };
        self.tensor("ssm_conv1d.weight", &[CONVOLUTION.into(), mixed], Quantization::F32, random);
        self.vector("ssm_dt.bias", heads, Filling::Constant(0.0));
        // Below zero, so that the state decays.
        self.vector("ssm_a", heads, Filling::Constant(-0.1));
        self.matrix("ssm_beta.weight", embd, heads, 1.0);
        self.matrix("ssm_alpha.weight", embd, heads, 1.0);
        self.vector("ssm_norm.weight", head, Filling::Ones);
        self.matrix("ssm_out.weight", embd, embd, out);
    }

    fn norms(&mut self) {
        let embd = self.embd();
        self.vector("attn_norm.weight", embd, Filling::Ones);
        self.vector("post_attention_norm.weight", embd, Filling::Ones);
    }

    fn feed_forward(&mut self, out: f32) {
        let (embd, ff) = (self.embd(), u64::from(self.spec.ff));
        self.matrix("ffn_gate.weight", embd, ff, 1.0);
        self.matrix("ffn_up.weight", embd, ff, 1.0);
        self.matrix("ffn_down.weight", ff, embd, out);
    }

    /// Takes a token's embedding and the model's last state before it.
    fn head(&mut self, head: MtpHead) {
        let embd = self.embd();
        match head {
            MtpHead::Random | MtpHead::Missing => self.matrix("nextn.eh_proj.weight", 2 * embd, embd, 1.0),
            MtpHead::Good => {
                self.tensor("nextn.eh_proj.weight", &[2 * embd, embd], Quantization::F32, Filling::Identity);
            }
        }
        self.vector("nextn.enorm.weight", embd, Filling::Ones);
        self.vector("nextn.hnorm.weight", embd, Filling::Ones);
    }

    fn embd(&self) -> u64 {
        self.spec.embd.into()
    }

    fn head_width(&self) -> u64 {
        (self.spec.embd / self.spec.heads).into()
    }
}

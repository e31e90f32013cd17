//! Sampling parameters.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sampling parameters in llama.cpp's words; `/v1/chat/completions` and `/v1/completions` know them as `top_k` and so on.
/// What is not named is the model file's, else llama.cpp's. Decimal numbers are written as strings, as everywhere in
/// Kubernetes' API.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.temperature) || (double(self.temperature) >= 0.0 && double(self.temperature) <= 2.0)").message("temperature must be from 0 to 2"),
    validation = Rule::new("!has(self.dynatempRange) || (double(self.dynatempRange) >= 0.0 && double(self.dynatempRange) <= 2.0)").message("dynatempRange must be from 0 to 2"),
    validation = Rule::new("!has(self.dynatempExponent) || (double(self.dynatempExponent) >= 0.0 && double(self.dynatempExponent) <= 10.0)").message("dynatempExponent must be from 0 to 10"),
    validation = Rule::new("!has(self.topNSigma) || (double(self.topNSigma) >= 0.0 && double(self.topNSigma) <= 100.0)").message("topNSigma must be from 0 to 100"),
    validation = Rule::new("!has(self.repeatPenalty) || (double(self.repeatPenalty) >= 0.01 && double(self.repeatPenalty) <= 10.0)").message("repeatPenalty must be from 0.01 to 10"),
    validation = Rule::new("!has(self.frequencyPenalty) || (double(self.frequencyPenalty) >= -2.0 && double(self.frequencyPenalty) <= 2.0)").message("frequencyPenalty must be from -2 to 2"),
    validation = Rule::new("!has(self.presencePenalty) || (double(self.presencePenalty) >= -2.0 && double(self.presencePenalty) <= 2.0)").message("presencePenalty must be from -2 to 2"),
    validation = Rule::new("!has(self.dryMultiplier) || (double(self.dryMultiplier) >= 0.0 && double(self.dryMultiplier) <= 100.0)").message("dryMultiplier must be from 0 to 100"),
    validation = Rule::new("!has(self.dryBase) || (double(self.dryBase) >= 0.0 && double(self.dryBase) <= 100.0)").message("dryBase must be from 0 to 100"),
    validation = Rule::new("!has(self.mirostatTau) || (double(self.mirostatTau) >= 0.0 && double(self.mirostatTau) <= 100.0)").message("mirostatTau must be from 0 to 100"),
    validation = Rule::new("!has(self.mirostatEta) || (double(self.mirostatEta) >= 0.0 && double(self.mirostatEta) <= 1.0)").message("mirostatEta must be from 0 to 1"),
    validation = Rule::new("!has(self.adaptiveDecay) || double(self.adaptiveDecay) <= 0.99").message("adaptiveDecay must be at most 0.99")
)]
pub struct SamplingSpec {
    /// Temperature, such as "0.7"; "0" is greedy. At most 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub temperature: Option<String>,

    /// The temperature moves by so much with the entropy of the distribution, such as "0.5"; "0" is off. At most 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dynatemp_range: Option<String>,

    /// Exponent of that movement. At most 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dynatemp_exponent: Option<String>,

    /// Keeps this many of the most probable tokens; 0 keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub top_k: Option<i32>,

    /// Keeps the most probable tokens that together have this probability, such as "0.95".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub top_p: Option<String>,

    /// Keeps tokens at least this probable compared with the best one, such as "0.05".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub min_p: Option<String>,

    /// Keeps the tokens whose surprise is typical, up to this probability; "1" is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub typical_p: Option<String>,

    /// Keeps tokens at most this many standard deviations below the best one; "0" is off. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub top_n_sigma: Option<String>,

    /// Chance that the most probable tokens, all but one, are taken away; "0" is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub xtc_probability: Option<String>,

    /// Probability from which a token counts for that; above "0.5" is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub xtc_threshold: Option<String>,

    /// Tokens that `topP`, `minP`, `typicalP` and XTC keep at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub min_keep: Option<i32>,

    /// Tokens that the penalties look back; 0 is off, -1 the whole context. Default: 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1, max = 1_000_000))]
    pub repeat_last_n: Option<i32>,

    /// Divides the logits of tokens seen lately, such as "1.1"; "1" is off. From 0.01 to 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub repeat_penalty: Option<String>,

    /// Subtracted from a token's logit for each time it was seen lately. From -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^-?[0-9]+(\.[0-9]+)?$"))]
    pub frequency_penalty: Option<String>,

    /// Subtracted from the logit of every token seen lately. From -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^-?[0-9]+(\.[0-9]+)?$"))]
    pub presence_penalty: Option<String>,

    /// Strength of DRY, which is against repeated sequences; "0" is off. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dry_multiplier: Option<String>,

    /// Base of DRY's penalty, which grows with the length of the sequence. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dry_base: Option<String>,

    /// Tokens that may be repeated without a penalty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub dry_allowed_length: Option<i32>,

    /// Tokens that DRY looks back; 0 is off, -1 the whole context. Default: 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1, max = 1_000_000))]
    pub dry_penalty_last_n: Option<i32>,

    /// Version of Mirostat, which takes the place of `samplers`; 0 is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2))]
    pub mirostat: Option<i32>,

    /// Surprise that Mirostat aims for, in bits. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub mirostat_tau: Option<String>,

    /// How fast Mirostat learns. At most 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub mirostat_eta: Option<String>,

    /// Probability near which the sampler `adaptive_p`, where it is among `samplers`, looks for tokens, over time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub adaptive_target: Option<String>,

    /// How slowly it forgets what it chose, such as "0.9". At most 0.99.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^0(\.[0-9]+)?$"))]
    pub adaptive_decay: Option<String>,

    /// Seed of requests that name none: they all get the same answer, as far as the schedule allows. Default: another one
    /// for each request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 4_294_967_294_u32))]
    pub seed: Option<i64>,

    /// Texts at which a sequence ends for DRY. Default: a new line, ":", a quote and "*".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 40)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub dry_sequence_breakers: Option<Vec<String>>,

    /// The samplers in their order; one that is not named is not used. Default: llama.cpp's order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub samplers: Option<Vec<Sampler>>,
}

/// A sampler by llama.cpp's name.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Repeat, frequency and presence penalty.
    Penalties,
    /// DRY.
    Dry,
    /// `topNSigma`.
    TopNSigma,
    /// `topK`.
    TopK,
    /// `typicalP`.
    TypP,
    /// `topP`.
    TopP,
    /// `minP`.
    MinP,
    /// XTC.
    Xtc,
    /// `temperature`.
    Temperature,
    /// `adaptiveTarget`; not used unless it is named.
    AdaptiveP,
}

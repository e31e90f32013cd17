//! How the next token is chosen, and what the output must be: in llama.cpp's words, with llama.cpp's defaults.

use serde_json::Value;

use super::request::Token;

/// Most entries of a logit bias, tokens and texts together.
pub const MAX_LOGIT_BIAS: usize = 1024;

/// Bytes of all texts in a logit bias.
pub const MAX_BIAS_TEXT_BYTES: usize = 8 << 10;

/// Most entries of [`SamplingParams::samplers`].
pub const MAX_SAMPLERS: usize = 16;

/// Most sequence breakers of [`DryParams`].
pub const MAX_SEQUENCE_BREAKERS: usize = 16;

/// Bytes of one sequence breaker; llama.cpp looks at no more.
pub const MAX_SEQUENCE_BREAKER_BYTES: usize = 40;

/// Tokens looked back when all of the context is meant.
pub const WHOLE_CONTEXT: u32 = u32::MAX;

/// How the next token is chosen. The default is llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 or less is greedy.
    pub temperature: f32,
    /// The temperature moves by so much around [`Self::temperature`] with the entropy of the distribution; 0 is off.
    pub dynatemp_range: f32,
    /// Exponent of that movement.
    pub dynatemp_exponent: f32,
    /// Keeps this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the most probable tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this probable compared with the best one; 0 keeps all.
    pub min_p: f32,
    /// Keeps the tokens whose surprise is typical, up to this probability; 1 is off.
    pub typical_p: f32,
    /// Keeps tokens whose logit is at most this many standard deviations below the best one; 0 or less is off.
    pub top_n_sigma: f32,
    /// Chance that the most probable tokens, all but one, are taken away; 0 is off.
    pub xtc_probability: f32,
    /// Probability from which a token counts for that; above 0.5 is off.
    pub xtc_threshold: f32,
    /// Tokens at least that `top_p`, `min_p`, `typical_p` and XTC keep; 0 is the same as 1.
    pub min_keep: u32,
    /// Tokens that the penalties look back; 0 is off, [`WHOLE_CONTEXT`] all.
    pub repeat_last_n: u32,
    /// Divides the logits of tokens seen lately; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted from a token's logit for each time it was seen lately; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of every token seen lately; 0 is off.
    pub presence_penalty: f32,
    /// Against repeated sequences.
    pub dry: DryParams,
    /// Keeps the surprise of the text at a target instead of `samplers`.
    pub mirostat: Mirostat,
    /// Surprise that Mirostat aims for, in bits.
    pub mirostat_tau: f32,
    /// How fast Mirostat learns.
    pub mirostat_eta: f32,
    /// Probability near which [`SamplerKind::AdaptiveP`] looks for tokens, over time; less than 0 is off.
    pub adaptive_target: f32,
    /// How slowly it forgets what it chose: 0 at once, 0.99 after about a hundred tokens.
    pub adaptive_decay: f32,
    /// The samplers in their order, at most [`MAX_SAMPLERS`]; one that is not named is not used.
    pub samplers: Vec<SamplerKind>,
    /// Seed of the random numbers; `None`: another one for each request.
    pub seed: Option<u32>,
    /// Added to the logits of these tokens; minus infinity forbids one.
    pub logit_bias: Vec<(Token, f32)>,
    /// The same for every token of a text. Both together have at most [`MAX_LOGIT_BIAS`] entries.
    pub text_bias: Vec<(String, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            min_keep: 0,
            repeat_last_n: 64,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            dry: DryParams::default(),
            mirostat: Mirostat::Off,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            adaptive_target: -1.0,
            adaptive_decay: 0.9,
            samplers: SamplerKind::DEFAULT_ORDER.to_vec(),
            seed: None,
            logit_bias: Vec::new(),
            text_bias: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// llama.cpp's defaults with those of a model file, whose metadata `get` reads, over them. What is out of its range
    /// there is not used.
    pub(super) fn of_file(get: impl Fn(&str) -> Option<String>) -> Self {
        let mut params = Self::default();
        let number = |key: &str, least: f32, most: f32, value: &mut f32| {
            if let Some(text) = get(&format!("general.sampling.{key}")) {
                match text.parse::<f32>() {
                    Ok(number) if (least..=most).contains(&number) => *value = number,
                    _ => tracing::warn!(key, "the model file's sampling parameter is out of its range"),
                }
            }
        };
        number("temp", 0.0, 100.0, &mut params.temperature);
        number("top_p", 0.0, 1.0, &mut params.top_p);
        number("min_p", 0.0, 1.0, &mut params.min_p);
        number("xtc_probability", 0.0, 1.0, &mut params.xtc_probability);
        number("xtc_threshold", 0.0, 1.0, &mut params.xtc_threshold);
        number("penalty_repeat", 0.01, 100.0, &mut params.repeat_penalty);
        number("mirostat_tau", 0.0, 100.0, &mut params.mirostat_tau);
        number("mirostat_eta", 0.0, 1.0, &mut params.mirostat_eta);
        let whole = |key: &str| get(&format!("general.sampling.{key}")).and_then(|text| text.parse::<i32>().ok());
        if let Some(top_k) = whole("top_k") {
            params.top_k = u32::try_from(top_k).unwrap_or(0);
        }
        if let Some(last_n) = whole("penalty_last_n") {
            params.repeat_last_n = u32::try_from(last_n).unwrap_or(WHOLE_CONTEXT);
        }
        params.mirostat = match whole("mirostat") {
            Some(1) => Mirostat::V1,
            Some(2) => Mirostat::V2,
            _ => Mirostat::Off,
        };
        if let Some(names) = get("general.sampling.sequence") {
            let order: Vec<_> = names.split(';').filter_map(SamplerKind::from_name).take(MAX_SAMPLERS).collect();
            if !order.is_empty() {
                params.samplers = order;
            }
        }
        params
    }
}

/// "Don't repeat yourself": a token that would go on with a sequence seen before loses
/// `multiplier * base ^ (length of the sequence - allowed_length)`.
#[derive(Clone, Debug, PartialEq)]
pub struct DryParams {
    /// 0 is off.
    pub multiplier: f32,
    /// Less than 1 is off.
    pub base: f32,
    /// Tokens that may be repeated.
    pub allowed_length: u32,
    /// Tokens looked back; 0 is off, [`WHOLE_CONTEXT`] all.
    pub penalty_last_n: u32,
    /// Texts at which a sequence ends; at most [`MAX_SEQUENCE_BREAKERS`] of [`MAX_SEQUENCE_BREAKER_BYTES`].
    pub sequence_breakers: Vec<String>,
}

impl Default for DryParams {
    fn default() -> Self {
        Self {
            multiplier: 0.0,
            base: 1.75,
            allowed_length: 2,
            penalty_last_n: 64,
            sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_owned).to_vec(),
        }
    }
}

/// Version of Mirostat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mirostat {
    /// Not used.
    #[default]
    Off,
    /// As first published.
    V1,
    /// "Mirostat 2.0".
    V2,
}

/// A sampler of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    /// Repeat, frequency and presence penalty.
    Penalties,
    /// [`DryParams`].
    Dry,
    /// [`SamplingParams::top_n_sigma`].
    TopNSigma,
    /// [`SamplingParams::top_k`].
    TopK,
    /// [`SamplingParams::typical_p`].
    TypicalP,
    /// [`SamplingParams::top_p`].
    TopP,
    /// [`SamplingParams::min_p`].
    MinP,
    /// [`SamplingParams::xtc_probability`].
    Xtc,
    /// [`SamplingParams::temperature`].
    Temperature,
    /// [`SamplingParams::adaptive_target`]; it chooses, so that it is the last wherever it stands.
    AdaptiveP,
    /// Ends a text that fills a gap when the model is nearly as sure of its end as of what follows; it has to be asked for.
    Infill,
}

impl SamplerKind {
    /// llama.cpp's order.
    pub const DEFAULT_ORDER: [Self; 9] = [
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::TypicalP,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
    ];

    /// All of them: those of llama.cpp's order, and those that have to be asked for.
    pub const ALL: [Self; 11] = [
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::TypicalP,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
        Self::AdaptiveP,
        Self::Infill,
    ];

    /// llama-server's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Penalties => "penalties",
            Self::Dry => "dry",
            Self::TopNSigma => "top_n_sigma",
            Self::TopK => "top_k",
            Self::TypicalP => "typ_p",
            Self::TopP => "top_p",
            Self::MinP => "min_p",
            Self::Xtc => "xtc",
            Self::Temperature => "temperature",
            Self::AdaptiveP => "adaptive_p",
            Self::Infill => "infill",
        }
    }

    /// The sampler of that name; llama-server's other spellings count too.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let name = match name {
            "temp" => "temperature",
            "typ" | "typical_p" => "typ_p",
            "nucleus" => "top_p",
            other => other,
        };
        // "top-k" and "topk" are "top_k" too.
        let plain = |name: &str| name.replace(['_', '-'], "");
        Self::ALL.into_iter().find(|kind| plain(kind.name()) == plain(name))
    }

    /// The sampler of llama.cpp's letter (`--sampling-seq`).
    #[must_use]
    pub fn from_letter(letter: char) -> Option<Self> {
        Some(match letter {
            'e' => Self::Penalties,
            'd' => Self::Dry,
            's' => Self::TopNSigma,
            'k' => Self::TopK,
            'y' => Self::TypicalP,
            'p' => Self::TopP,
            'm' => Self::MinP,
            'x' => Self::Xtc,
            't' => Self::Temperature,
            'a' => Self::AdaptiveP,
            'i' => Self::Infill,
            _ => return None,
        })
    }
}

/// What the output must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that this schema allows; `{"type": "object"}` for any object.
    JsonSchema(Value),
    /// llama.cpp's GBNF, from its rule `root`.
    Gbnf {
        /// The rules.
        source: String,
        /// With triggers everything is allowed until one of them comes (tool calls).
        lazy: Option<Triggers>,
        /// Text at the end of the prompt that the grammar counts as its own beginning; empty for none.
        prefix: String,
    },
}

impl Grammar {
    /// OpenAI's or llama-server's name for it.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "response_format",
            Self::Gbnf { .. } => "grammar",
        }
    }
}

/// What makes a lazy grammar begin; the first that comes counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Triggers {
    /// Texts; the grammar begins with the first character of one.
    pub words: Vec<String>,
    /// Regular expressions over all of the output so far; the grammar begins with the first group that is not empty, or
    /// with the match where there is none. In the syntax of the crate `regex`: no look-around, no back-references.
    pub patterns: Vec<String>,
    /// Tokens; the grammar begins with one.
    pub tokens: Vec<Token>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_file_has_its_own_defaults() {
        let of = |entries: &[(&str, &str)]| {
            let find = |key: &str| {
                let name = key.strip_prefix("general.sampling.")?;
                entries.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            };
            SamplingParams::of_file(find)
        };
        assert_eq!(of(&[]), SamplingParams::default());
        let expected = SamplingParams {
            temperature: 0.6,
            top_k: 20,
            top_p: 0.9,
            min_p: 0.0,
            repeat_last_n: WHOLE_CONTEXT,
            repeat_penalty: 1.05,
            mirostat: Mirostat::V2,
            mirostat_tau: 3.0,
            samplers: vec![SamplerKind::TopK, SamplerKind::Temperature],
            ..SamplingParams::default()
        };
        let file = [
            ("temp", "0.6"),
            ("top_k", "20"),
            ("top_p", "0.900000"),
            ("min_p", "0"),
            ("penalty_last_n", "-1"),
            ("penalty_repeat", "1.05"),
            ("mirostat", "2"),
            ("mirostat_tau", "3"),
            ("sequence", "top_k;unheard_of;temperature"),
        ];
        assert_eq!(of(&file), expected);
        let broken = [("temp", "nan"), ("top_p", "7"), ("penalty_repeat", "0"), ("top_k", "x"), ("sequence", "")];
        assert_eq!(of(&broken), SamplingParams::default());
    }

    #[test]
    fn samplers_have_llama_cpps_names_and_letters() {
        let letters: Vec<_> = "edskypmxtai".chars().filter_map(SamplerKind::from_letter).collect();
        assert_eq!(letters, SamplerKind::ALL);
        assert_eq!(SamplerKind::ALL[..9], SamplerKind::DEFAULT_ORDER);
        for kind in SamplerKind::ALL {
            assert_eq!(SamplerKind::from_name(kind.name()), Some(kind));
        }
        for (name, kind) in
            [("temp", SamplerKind::Temperature), ("top-k", SamplerKind::TopK), ("minp", SamplerKind::MinP)]
        {
            assert_eq!(SamplerKind::from_name(name), Some(kind));
        }
        assert_eq!(SamplerKind::from_name("greedy"), None);
    }
}

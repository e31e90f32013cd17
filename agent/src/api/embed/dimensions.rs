//! Vectors made shorter, and of length 1.
//!
//! A model trained for it (Matryoshka) keeps what matters most in the first numbers, so that its vectors can be cut; of
//! any other the first numbers are as good as any. Files do not say which it is, so the known ones are listed:
//!
//! | model | least `dimensions` |
//! |---|---|
//! | EmbeddingGemma | 128 |
//! | Jina embeddings v3, v4 | 32, 128 |
//! | Qwen3 Embedding | 32 |
//! | Nomic embed text v1.5, v2 | 64, 256 |
//! | mxbai embed large v1 | 64 |
//! | Snowflake arctic embed v1.5, v2.0 | 256 |

use crate::api::error::ApiError;
use crate::engine::ModelFacts;

/// What a name has to contain, letters and digits only, and the least dimensions.
const KNOWN: [(&str, u32); 10] = [
    ("embeddinggemma", 128),
    ("jinaembeddingsv3", 32),
    ("jinaembeddingsv4", 128),
    ("qwen3embedding", 32),
    ("nomicembedtextv15", 64),
    ("nomicembedtextv2", 256),
    ("mxbaiembedlargev1", 64),
    ("arcticembedmv15", 256),
    ("arcticembedmv20", 256),
    ("arcticembedlv20", 256),
];

/// Makes the vector's length 1; one of zeros stays as it is.
pub fn normalise(vector: &mut [f32]) {
    let square: f64 = vector.iter().map(|&number| f64::from(number) * f64::from(number)).sum();
    if square > 0.0 {
        let length = square.sqrt();
        for number in vector {
            #[expect(clippy::cast_possible_truncation, reason = "at most 1")]
            let shorter = (f64::from(*number) / length) as f32;
            *number = shorter;
        }
    }
}

/// The least dimensions that the model's vectors can be cut to.
fn least(facts: &ModelFacts) -> Option<u32> {
    let name: String = facts.name.as_deref().unwrap_or_default().to_lowercase();
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    let known = KNOWN.iter().find(|(needle, _)| name.contains(needle)).map(|&(_, least)| least);
    known.or_else(|| (facts.architecture == "gemma-embedding").then_some(128))
}

/// Checks `dimensions`: how many numbers of each vector to keep. `None` keeps all.
pub(crate) fn shorten(facts: &ModelFacts, asked: Option<i64>) -> Result<Option<usize>, ApiError> {
    let Some(asked) = asked else { return Ok(None) };
    let width = facts.embedding_width;
    if asked == i64::from(width) {
        return Ok(None);
    }
    let Some(least) = least(facts).filter(|&least| least < width) else {
        let message = format!("'dimensions' must be {width}: this model's vectors are not made to be cut");
        return Err(ApiError::invalid("dimensions", message));
    };
    match usize::try_from(asked) {
        Ok(kept) if (i64::from(least)..i64::from(width)).contains(&asked) => Ok(Some(kept)),
        _ => Err(ApiError::invalid("dimensions", format!("'dimensions' must be from {least} to {width}, not {asked}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_one() {
        let mut vector = vec![3.0, -4.0];
        normalise(&mut vector);
        assert_eq!(vector, [0.6, -0.8]);
        let mut nothing = vec![0.0; 3];
        normalise(&mut nothing);
        assert_eq!(nothing, [0.0; 3]);
        let mut huge = vec![f32::MAX, f32::MAX];
        normalise(&mut huge);
        assert!((huge[0] - std::f32::consts::FRAC_1_SQRT_2).abs() < 1e-6, "{huge:?}");
    }

    #[test]
    fn dimensions_are_for_those_who_can() {
        let facts = |name: &str, architecture: &str, width| ModelFacts {
            name: Some(name.to_owned()),
            architecture: architecture.to_owned(),
            embedding_width: width,
            ..ModelFacts::default()
        };
        let qwen = facts("Qwen3 Embedding 0.6B", "qwen3", 1024);
        let minilm = facts("all-MiniLM-L6-v2", "bert", 384);
        let cases = [
            (&qwen, None, Ok(None)),
            (&qwen, Some(1024), Ok(None)),
            (&qwen, Some(256), Ok(Some(256))),
            (&qwen, Some(31), Err("'dimensions' must be from 32 to 1024, not 31")),
            (&qwen, Some(-1), Err("'dimensions' must be from 32 to 1024, not -1")),
            (&qwen, Some(1025), Err("'dimensions' must be from 32 to 1024, not 1025")),
            (&minilm, Some(384), Ok(None)),
            (&minilm, Some(128), Err("'dimensions' must be 384: this model's vectors are not made to be cut")),
        ];
        for (facts, asked, expected) in cases {
            let found = shorten(facts, asked).map_err(|error| error.message);
            assert_eq!(found, expected.map_err(str::to_owned), "{:?} {asked:?}", facts.name);
        }
        for (name, architecture, expected) in [
            ("nomic-embed-text-v1.5", "nomic-bert", Some(64)),
            ("nomic-embed-text-v1", "nomic-bert", None),
            ("Embeddinggemma 300M", "gemma-embedding", Some(128)),
            ("Something", "gemma-embedding", Some(128)),
            ("snowflake-arctic-embed-l-v2.0", "bert", Some(256)),
        ] {
            assert_eq!(least(&facts(name, architecture, 768)), expected, "{name}");
        }
    }
}

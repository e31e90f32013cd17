//! The generator's promises that can be checked without llama.cpp. That llama.cpp loads the files is the agent's test.

use std::fs;

use altiplano_test_models::{Architecture, BadFile, Error, MtpHead, Pooling, Quantization, Spec, Tokenizer};

#[test]
fn equal_specs_give_equal_bytes_and_the_seed_changes_only_weights() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let write = |name: &str, spec: &Spec| {
        let path = dir.path().join(name);
        let bytes = spec.write(&path).expect("written");
        let content = fs::read(&path).expect("read");
        assert_eq!(content.len() as u64, bytes, "the length returned is the file's");
        content
    };
    let spec = Spec::default();
    let first = write("a", &spec);
    assert_eq!(first, write("b", &spec));
    let other = write("c", &Spec { seed: 2, ..spec });
    assert_eq!(first.len(), other.len());
    assert_ne!(first, other);
    assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 3, "no partial file stays behind");
}

#[test]
fn every_architecture_and_type_is_written_with_the_length_it_announces() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for architecture in [Architecture::Llama, Architecture::Qwen2, Architecture::Gemma3] {
        for quantization in [Quantization::F32, Quantization::F16, Quantization::Q8_0, Quantization::Q4_0] {
            for tokenizer in [Tokenizer::Bpe, Tokenizer::Spm] {
                let spec = Spec { architecture, quantization, tokenizer, ..Spec::default() };
                let bytes = spec.write(&dir.path().join("m.gguf")).expect("written");
                let weights = match quantization {
                    Quantization::F32 => spec.parameters() * 4,
                    Quantization::F16 => spec.parameters() * 2,
                    Quantization::Q8_0 => spec.parameters() * 34 / 32,
                    Quantization::Q4_0 => spec.parameters() * 18 / 32,
                };
                assert!(bytes > weights && bytes < weights + 64 * 1024, "{spec:?}: {bytes} bytes for {weights}");
            }
        }
    }
}

#[test]
fn a_hybrid_has_a_head_where_one_is_asked_for() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let plain = Spec { architecture: Architecture::Qwen35, ..Spec::default() };
    for mtp in [MtpHead::Random, MtpHead::Good] {
        let with = Spec { mtp: Some(mtp), ..plain.clone() };
        // A block of attention, and a matrix of two widths to one.
        assert!(with.parameters() > plain.parameters() + 2 * 64 * 64, "{mtp:?}");
        let bytes = with.write(&dir.path().join("m.gguf")).expect("written");
        assert!(bytes > with.parameters() * 2, "{mtp:?}: {bytes} bytes");
    }
}

#[test]
fn embedders_are_written_with_the_length_they_announce() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for spec in [Spec::embedder(), Spec::reranker(), Spec::causal_embedder()] {
        let bytes = spec.write(&dir.path().join("m.gguf")).expect("written");
        let (least, most) = (spec.parameters() * 2, spec.parameters() * 4);
        assert!(bytes > least && bytes < most + 64 * 1024, "{spec:?}: {bytes} bytes");
    }
    assert_eq!(Spec::preset("reranker"), Some(Spec::reranker()));
}

#[test]
fn presets_have_the_size_they_name() {
    for (size, billions) in [("1b", 1.2), ("3b", 3.2), ("8b", 8.0)] {
        let spec = Spec::preset(size).expect("a known preset");
        #[expect(clippy::cast_precision_loss, reason = "compared roughly")]
        let parameters = spec.parameters() as f64 / 1e9;
        // Untied, so the vocabulary counts twice.
        assert!(parameters > billions - 0.2 && parameters < billions + 0.7, "{size}: {parameters} billion");
    }
    assert_eq!(Spec::preset("70b"), None);
}

#[test]
fn impossible_shapes_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("m.gguf");
    for (spec, word) in [
        (Spec { vocab: 100, ..Spec::default() }, "vocab"),
        (Spec { heads: 3, ..Spec::default() }, "heads"),
        (Spec { layers: 0, ..Spec::default() }, "layers"),
        (Spec { tokenizer: Tokenizer::Wpm, ..Spec::default() }, "wpm"),
        (Spec { tokenizer: Tokenizer::Bpe, ..Spec::embedder() }, "wpm"),
        (Spec { pooling: Some(Pooling::Rank), ..Spec::default() }, "rank"),
        (Spec { mtp: Some(MtpHead::Good), ..Spec::default() }, "mtp"),
        (Spec { ff: 100, quantization: Quantization::Q4_0, ..Spec::default() }, "ff"),
    ] {
        let error = spec.write(&path).expect_err("refused");
        assert!(matches!(&error, Error::Invalid(reason) if reason.contains(word)), "{word}: {error}");
        assert!(!path.exists());
    }
}

#[test]
fn bad_files_differ_from_the_good_one() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let good = dir.path().join("good.gguf");
    let spec = Spec::default();
    spec.write(&good).expect("written");
    let good = fs::read(good).expect("read");
    for kind in BadFile::ALL {
        let path = dir.path().join(format!("{kind:?}"));
        kind.write(&spec, &path).expect("written");
        assert_ne!(fs::read(path).expect("read"), good, "{kind:?}");
    }
}

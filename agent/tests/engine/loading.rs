//! What a model takes, and what is refused before it serves.

use super::*;

/// llama.cpp's dry run says to the byte what a loaded model takes.
#[test]
fn the_estimate_is_what_is_measured() {
    let plain = Spec { vocab: 4096, layers: 4, embd: 128, ..Spec::default() };
    let shapes = [
        ("F16", plain.clone(), dynamic(512, 2048, 4), EngineSpec::default()),
        (
            "Q4_0, fixed, quantised cache",
            Spec { quantization: Quantization::Q4_0, embd: 256, ..plain.clone() },
            ContextSpec {
                sizing: ContextSizing::Fixed,
                key_cache_type: CacheType::Q8_0,
                value_cache_type: CacheType::Q8_0,
                ..dynamic(512, 1024, 3)
            },
            EngineSpec::default(),
        ),
        (
            "no flash attention, small batch",
            plain.clone(),
            dynamic(1024, 2048, 1),
            EngineSpec {
                flash_attention: FlashAttention::Off,
                batch_tokens: Some(128),
                micro_batch_tokens: Some(64),
                ..EngineSpec::default()
            },
        ),
        (
            "sliding window",
            Spec { architecture: Architecture::Gemma3, layers: 6, ..plain },
            dynamic(512, 2048, 4),
            EngineSpec::default(),
        ),
    ];
    for (name, spec, context, engine_spec) in shapes {
        let (_folder, path) = generated(&spec);
        let config = RunnerConfig { engine: engine_spec, ..config(path, context) };
        let estimate = engine::estimate(&config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let engine = start(&config);
        let report = engine.report();
        assert_eq!(of_llama_cpp(&estimate.memory), of_llama_cpp(&report.memory), "{name}");
        assert_eq!(
            (estimate.context_tokens, estimate.max_tokens, estimate.layers_total, estimate.layers_offloaded),
            (report.context_tokens, report.max_tokens, report.layers_total, report.layers_offloaded),
            "{name}"
        );
        let MemoryUse { weights_bytes, context_bytes, compute_bytes, other_bytes, .. } = estimate.memory[0];
        assert!([weights_bytes, context_bytes, compute_bytes, other_bytes].iter().all(|&bytes| bytes > 0), "{name}");
        stop(&engine);
    }
}

/// A context of fixed size that no machine has memory for is refused with the numbers, before it is made.
#[test]
fn a_fixed_context_that_does_not_fit_is_refused_with_numbers() {
    let spec = Spec {
        layers: 64,
        embd: 256,
        heads: 4,
        kv_heads: 4,
        context: 1 << 24,
        quantization: Quantization::Q4_0,
        ..Spec::default()
    };
    let (_folder, path) = generated(&spec);
    let devices = engine::probe().expect("a device list").devices;
    let machine = devices.iter().find(|device| device.id == "CPU").expect("a CPU").memory_total_bytes;
    // 64 KiB a cell: keys and values of 256 halves in 64 layers.
    let max_tokens = i32::try_from(machine / (64 << 10) / 4 + 256).expect("no machine has that much");
    let context = ContextSpec { sizing: ContextSizing::Fixed, ..dynamic(256, max_tokens, 4) };
    let error = Engine::start(&config(path, context), &|_| {}).expect_err("more than there is");
    assert_eq!(error.reason(), "InsufficientMemory", "{error}");
    let words = format!("{max_tokens} tokens for each of 4 requests need ");
    assert!(error.to_string().contains(&words) && error.to_string().contains(" are free"), "{error}");
}

/// More tokens than a model was trained with need a stretched rotation: without one it is refused with the numbers, by the
/// dry run too, where the operator looks.
#[test]
fn positions_that_nobody_trained_need_a_rope() {
    let (_folder, path) = generated(&Spec::default());
    let beyond = |rope| config(path.clone(), ContextSpec { rope, ..dynamic(256, 4096, 1) });
    for error in [
        Engine::start(&beyond(None), &|_| {}).expect_err("refused"),
        engine::estimate(&beyond(None)).expect_err("refused"),
    ] {
        assert_eq!(error.reason(), "UnsupportedSpec", "{error}");
        let words = ["maxTokens is 4096", "trained with 2048", "context.rope"];
        assert!(words.iter().all(|words| error.to_string().contains(words)), "{error}");
    }
    for (factor, is_enough) in [(2, true), (1, false)] {
        let rope = RopeSpec { scaling: RopeScaling::Yarn, factor, original_tokens: None };
        let engine = start(&beyond(Some(rope)));
        let notes = engine.report().notes;
        assert_eq!((engine.report().max_tokens, notes.is_empty()), (4096, is_enough), "{notes:?}");
        stop(&engine);
    }
}

/// Positions that were learnt cannot be stretched: llama.cpp would end the process in mid-stream.
#[tokio::test]
async fn positions_that_were_learnt_end_with_the_last_one() {
    let spec = Spec { architecture: Architecture::Gpt2, context: 512, ..Spec::default() };
    let (_folder, path) = generated(&spec);
    let rope = Some(RopeSpec { scaling: RopeScaling::Yarn, factor: 2, original_tokens: None });
    let beyond = config(path.clone(), ContextSpec { rope, ..dynamic(256, 1024, 1) });
    for error in
        [Engine::start(&beyond, &|_| {}).expect_err("refused"), engine::estimate(&beyond).expect_err("refused")]
    {
        assert_eq!(error.reason(), "UnsupportedSpec", "{error}");
        let words = ["maxTokens is 1024", "trained with 512", "context.rope cannot stretch"];
        assert!(words.iter().all(|words| error.to_string().contains(words)), "{error}");
    }
    let engine = start(&config(path, dynamic(256, 512, 2)));
    let prompt = (0..400).map(|number| 300 + number % 100).collect();
    let run = GenerateRequest { prompt, ignore_eos: true, sampling: greedy(), ..GenerateRequest::default() };
    let answer = ask(&engine, run).await;
    assert_eq!((answer.reason(), answer.usage().completion_tokens), (FinishReason::Length, 112));
    stop(&engine);
}

#[test]
fn bad_files_are_refused_with_llama_cpps_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad.gguf");
    let cases = [
        (BadFile::NotGguf, "LoadFailed", "magic"),
        (BadFile::Empty, "LoadFailed", "magic"),
        (BadFile::Truncated, "LoadFailed", "not within the file bounds"),
        (BadFile::TruncatedHeader, "LoadFailed", "failed to"),
        (BadFile::CorruptHeader, "LoadFailed", "failed to"),
        (BadFile::UnknownVersion, "LoadFailed", "version"),
        (BadFile::UnknownArchitecture, "UnknownArchitecture", "guana"),
        (BadFile::MissingTensor, "LoadFailed", "blk.0.ffn_up.weight"),
    ];
    // The one that is missing ends the process; the worker's tests have it.
    assert_eq!(cases.len() + 1, BadFile::ALL.len());
    for (bad, reason, words) in cases {
        bad.write(&Spec::default(), &path).expect("a bad file");
        refused(&path, reason, words, &format!("{bad:?}"));
    }
    refused(&folder.path().join("missing.gguf"), "LoadFailed", "No such file", "missing");
}

fn refused(path: &Path, reason: &str, words: &str, name: &str) {
    let config = config(path.to_owned(), ContextSpec::default());
    let loaded = Engine::start(&config, &|_| {}).map(|_| ());
    let estimated = engine::estimate(&config).map(|_| ());
    for (way, result) in [("start", loaded), ("estimate", estimated)] {
        let error = result.expect_err(name);
        assert_eq!(error.reason(), reason, "{name}, {way}: {error}");
        assert!(error.to_string().contains(words), "{name}, {way}: {error}");
    }
}

#[test]
fn the_cpu_is_a_device() {
    let report = engine::probe().expect("a device list");
    let last = report.devices.last().expect("a device");
    assert_eq!((last.id.as_str(), last.kind.as_str()), ("CPU", "CPU"), "{report:?}");
    assert!(last.memory_total_bytes > 1 << 28 && report.backends.contains(&"CPU".to_owned()), "{report:?}");

    let missing = RunnerConfig { devices: vec!["CUDA7".to_owned()], ..config(toy::path(), ContextSpec::default()) };
    let error = Engine::start(&missing, &|_| {}).expect_err("a device that is not there");
    assert_eq!(error, EngineError::UnknownDevice("CUDA7".to_owned()));
}

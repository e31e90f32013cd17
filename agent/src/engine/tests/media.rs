//! Images and sound: what the engine makes of them is what llama.cpp's own helper makes of them.

use std::path::Path;

use altiplano_test_models::{Architecture, Projector as ProjectorFile, ProjectorKind, Spec};

use super::super::ffi::{self, Context, ProjectorParams};
use super::*;

const KINDS: [(ProjectorKind, Architecture); 7] = [
    (ProjectorKind::Mlp, Architecture::Llama),
    (ProjectorKind::Gemma3, Architecture::Llama),
    (ProjectorKind::Gemma3, Architecture::Gemma3),
    (ProjectorKind::Qwen2vl, Architecture::Qwen2vl),
    (ProjectorKind::Ultravox, Architecture::Llama),
    (ProjectorKind::Qwen2a, Architecture::Llama),
    (ProjectorKind::Omni, Architecture::Qwen2vl),
];

/// A model and its projector.
fn with_projector(folder: &Path, kind: ProjectorKind, architecture: Architecture) -> RunnerConfig {
    let (model, projector) = (folder.join("model.gguf"), folder.join("mmproj.gguf"));
    let spec = Spec { architecture, ..Spec::default() };
    spec.write(&model).expect("the model is written");
    ProjectorFile::of(kind, &spec).write(&projector).expect("the projector is written");
    RunnerConfig { projector: Some(projector), ..config(model) }
}

fn picture(seed: u8, width: u32, height: u32) -> Medium {
    let pixel = |place: u32| u8::try_from((place * (u32::from(seed) + 3) / 7) % 256).expect("a byte");
    let pixels = (0..width * height * 3).map(pixel).collect();
    Medium::Image(Arc::new(Picture::new(width, height, pixels, [seed; 32]).expect("a picture")))
}

/// A tone that rises, for so many tenths of a second.
#[expect(clippy::cast_precision_loss, reason = "short sounds")]
fn sound(seed: u8, tenths: usize) -> Medium {
    let sample = |place: usize| (place as f32 * 0.01 * f32::from(seed) * (1.0 + place as f32 * 1e-5)).sin() * 0.5;
    let samples = (0..1600 * tenths).map(sample).collect();
    Medium::Audio(Arc::new(Sound::new(16_000, samples, [seed; 32]).expect("a sound")))
}

/// Two images or sounds or one of each, with text before, between and after them.
#[tokio::test]
async fn media_are_read_as_llama_cpp_itself_reads_them() {
    for (kind, architecture) in KINDS {
        let folder = tempfile::tempdir().expect("a folder");
        let config = with_projector(folder.path(), kind, architecture);
        let (model, gpu) = load::open(&config, &|_| {}).expect("the model loads");
        let loaded = load::load(&config, model.clone(), gpu).expect("the context is made");
        let params = loaded.params.clone();
        let (top, prompt) = {
            let engine = Engine::launch(loaded, 8, None).expect("the engine starts");
            let marker = engine.media_marker().expect("it reads media").to_owned();
            let text = format!("<|im_start|>user\nThis {marker} or that {marker}?<|im_end|>\n<|im_start|>assistant\n");
            let MediaPrompt { tokens, media } = engine.read(&text, true, &two_for(kind)).expect("a prompt");
            let request = GenerateRequest {
                prompt: tokens,
                media,
                max_tokens: Some(1),
                logprobs: Some(20),
                ..GenerateRequest::default()
            };
            let mut generation = engine.submit(request.clone()).expect("the request is taken");
            let top = loop {
                match generation.next().await.expect("an event") {
                    GenerateEvent::Token { logprob: Some(logprob), .. } => break logprob.top,
                    GenerateEvent::Progress(_) => {}
                    other => panic!("{kind:?}: {other:?}"),
                }
            };
            (top, request)
        };
        let pieces = Arc::clone(&prompt.media.pieces[0].pieces);
        let mut context = Context::new(&model, &params).expect("a context");
        let row = ffi::read_by_helper(&pieces, &mut context).expect("llama.cpp reads it");
        let reference = context.logprobs(row, top[0].token, 20).expect("logits");
        for (ours, (token, logprob)) in top.iter().zip(&reference.top).take(5) {
            assert!((ours.logprob - logprob).abs() < 0.02, "{kind:?} {architecture:?}: {top:?} {reference:?} {token}");
        }
    }
}

fn two_for(kind: ProjectorKind) -> [Medium; 2] {
    match kind {
        // The second has two parts.
        ProjectorKind::Ultravox => [sound(1, 75), sound(2, 302)],
        ProjectorKind::Qwen2a => [sound(1, 75), sound(2, 150)],
        ProjectorKind::Omni => [sound(1, 75), picture(2, 80, 48)],
        _ => [picture(1, 64, 64), picture(2, 80, 48)],
    }
}

#[test]
fn a_projectors_memory_is_known_before_it_is_loaded() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = with_projector(folder.path(), ProjectorKind::Gemma3, Architecture::Llama);
    let path = config.projector.clone().expect("a projector");
    let params = |path| ProjectorParams { path, device: None, threads: 1, flash_attention: FlashAttention::Auto };
    let needs = params(&path).needs().expect("a projector");
    let bytes = std::fs::metadata(&path).expect("a file").len();
    assert_eq!(needs.together, 16, "each of an image's tokens sees all others");
    assert!(needs.memory[0].device == "CPU" && needs.memory[0].weights_bytes > bytes / 2, "{needs:?} {bytes}");
    let with = estimate(&config).expect("an estimate").memory[0].clone();
    let without = estimate(&RunnerConfig { projector: None, ..config.clone() }).expect("an estimate").memory[0].clone();
    assert_eq!(with.weights_bytes - without.weights_bytes, needs.memory[0].weights_bytes);

    // A model is no projector, and a projector is none for every model.
    assert!(params(&config.model_path).needs().is_err());
    let other = folder.path().join("other.gguf");
    ProjectorFile { model_embd: 128, ..ProjectorFile::of(ProjectorKind::Mlp, &Spec::default()) }
        .write(&other)
        .expect("the projector is written");
    let error = Engine::start(&RunnerConfig { projector: Some(other), ..config.clone() }, &|_| {}).map(drop);
    assert!(error.as_ref().is_err_and(|error| error.to_string().contains("n_embd")), "{error:?}");
    let missing = folder.path().join("missing.gguf");
    let error = Engine::start(&RunnerConfig { projector: Some(missing), ..config }, &|_| {}).map(drop);
    assert!(error.as_ref().is_err_and(|error| error.to_string().contains("missing.gguf")), "{error:?}");
}

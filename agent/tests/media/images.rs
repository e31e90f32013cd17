//! Images: told apart, read once, computed beside others' steps.

use std::sync::Arc;

use altiplano_agent::engine::{Ability, Media, Picture, SubmitError};

use super::*;

/// How far log-probabilities after different images are apart at least.
const FAR: f32 = 0.3;

const KINDS: [(ProjectorKind, Architecture); 4] = [
    (ProjectorKind::Mlp, Architecture::Llama),
    (ProjectorKind::Gemma3, Architecture::Llama),
    (ProjectorKind::Gemma3, Architecture::Gemma3),
    (ProjectorKind::Qwen2vl, Architecture::Qwen2vl),
];

/// A projector that takes a while: some seconds on a slow CPU.
fn slow(projector: &mut Projector) {
    *projector = Projector { image_size: 448, embd: 256, heads: 4, ff: 1024, layers: 8, ..projector.clone() };
}

fn picture(seed: u8, width: u32, height: u32) -> Medium {
    let pixel = |place: u32| u8::try_from((place * (u32::from(seed) + 3) / 7) % 256).unwrap();
    let pixels = (0..width * height * 3).map(pixel).collect();
    Medium::Image(Arc::new(Picture::new(width, height, pixels, [seed; 32]).unwrap()))
}

/// The same image says the same, another one something else; what was read before is not read again, and the answer is
/// as if it were.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_told_from_another_and_read_once() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context(4), |_| {});
        assert!(engine.model().can(Ability::Vision) && !engine.model().can(Ability::Audio));
        let (one, other) = (picture(1, 64, 64), picture(2, 64, 64));
        let fresh = |image: &Medium, end: &str| GenerateRequest {
            cache_prompt: false,
            ..prompt(&engine, &[LONG, end], std::slice::from_ref(image))
        };
        let (first, usage) = ask(&engine, &fresh(&one, "What is it?")).await;
        let (again, _) = ask(&engine, &fresh(&one, "What is it?")).await;
        let (another, _) = ask(&engine, &fresh(&other, "What is it?")).await;
        assert!(distance(&first, &again) < NEAR, "{kind:?}: {first:?} {again:?}");
        assert!(distance_of_all(&first, &another) > FAR, "{kind:?}: {first:?} {another:?}");
        assert_eq!(engine.stats().pictures, 2, "{kind:?}: computed once each");
        let text = engine.tokenize(LONG, true, true).unwrap().len();
        assert!(usage.prompt_tokens as usize > text + 16, "{kind:?}: an image counts: {usage:?}");

        // A second question about the image goes on behind it; one about another image goes on before it.
        let expected = ask(&engine, &fresh(&one, "And who made it?")).await;
        let found = ask(&engine, &GenerateRequest { cache_prompt: true, ..fresh(&one, "And who made it?") }).await;
        assert!(distance(&expected.0, &found.0) < NEAR, "{kind:?}: {expected:?} {found:?}");
        let cached = found.1.cached_tokens as usize;
        assert!(cached > text + 15, "{kind:?}: the image was there: {found:?}");
        assert_eq!(expected.1.prompt_tokens, found.1.prompt_tokens);
        let third = picture(3, 64, 64);
        let expected = ask(&engine, &fresh(&third, "And who made it?")).await;
        let found = ask(&engine, &GenerateRequest { cache_prompt: true, ..fresh(&third, "And who made it?") }).await;
        assert!(distance(&expected.0, &found.0) < NEAR, "{kind:?}: {expected:?} {found:?}");

        // Two images, and an image at the end of the prompt.
        for texts in [[LONG, " or ", "?"], [LONG, " or ", ""]] {
            let both = prompt(&engine, &texts, &[one.clone(), other.clone()]);
            let swapped = prompt(&engine, &texts, &[other.clone(), one.clone()]);
            let expected = ask(&engine, &GenerateRequest { cache_prompt: false, ..both.clone() }).await;
            for _ in 0..2 {
                let found = ask(&engine, &both).await;
                assert!(distance(&expected.0, &found.0) < NEAR, "{kind:?}: {expected:?} {found:?}");
            }
            let swapped = ask(&engine, &swapped).await.0;
            assert!(distance_of_all(&expected.0, &swapped) > 2.0 * NEAR, "{kind:?}: {expected:?} {swapped:?}");
        }
        engine.shutdown(Instant::now());
    }
}

/// Many at once, with equal and different images, say what each says alone; in a split cache too.
#[tokio::test(flavor = "multi_thread")]
async fn images_in_company() {
    let fixed = ContextSpec { sizing: ContextSizing::Fixed, max_tokens: Some(1024), ..context(4) };
    for (kind, context) in KINDS.into_iter().flat_map(|kind| [(kind, context(4)), (kind, fixed.clone())]) {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context, |_| {});
        let images: Vec<_> = (0..3).map(|seed| picture(seed, 64, 48)).collect();
        in_company(&engine, &images, 12, 20, &format!("{kind:?}")).await;
        engine.shutdown(Instant::now());
    }
}

/// Streams go on while an image is computed, and who gives up does not hold the next one up.
#[tokio::test(flavor = "multi_thread")]
async fn streams_go_on_beside_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let start = || start(folder.path(), (ProjectorKind::Gemma3, Architecture::Llama), context(4), slow);
    let engine = start();
    let large = |engine: &Engine, seed| prompt(engine, &[LONG, "What is it?"], &[picture(seed, 448, 448)]);
    let alone = alone(&engine, &large(&engine, 1)).await;

    let endless = GenerateRequest {
        prompt: engine.tokenize("Tell me a story", true, true).unwrap(),
        max_tokens: Some(1900),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let (mut seen, mut went_on) = (Vec::new(), false);
    // A machine that does something else for a while is given another image.
    for seed in 2..12 {
        let mut stream = engine.submit(endless.clone()).unwrap();
        let asked = tokio::spawn(read(engine.submit(large(&engine, seed)).unwrap()));
        let (mut longest, mut last, mut tokens) = (Duration::ZERO, Instant::now(), 0);
        while !asked.is_finished() {
            match support::next(&mut stream).await {
                Some(GenerateEvent::Token { .. }) => {}
                Some(GenerateEvent::Done { .. }) => {
                    stream = engine.submit(endless.clone()).unwrap();
                }
                other => panic!("{other:?}"),
            }
            longest = longest.max(last.elapsed());
            last = Instant::now();
            tokens += 1;
        }
        seen.push((tokens, longest));
        went_on = tokens >= 5 && longest < alone / 2;
        if went_on {
            break;
        }
    }
    eprintln!("alone {alone:?}; beside it so many tokens, apart at most: {seen:?}");
    assert!(went_on, "alone {alone:?}; beside it so many tokens, apart at most: {seen:?}");
    until(&engine, "the stream has left", |stats| stats.running == 0).await;

    is_given_up(&engine, |round| large(&engine, round + 20), alone, |stats| stats.pictures).await;

    // It ends in time with an image half done.
    let (mut took, mut in_time) = (Vec::new(), false);
    for seed in 40..50 {
        let engine = start();
        let half = engine.submit(large(&engine, seed)).unwrap();
        tokio::time::sleep(alone / 10).await;
        let began = Instant::now();
        tokio::task::spawn_blocking(move || engine.shutdown(Instant::now())).await.unwrap();
        took.push(began.elapsed());
        drop(half);
        in_time = began.elapsed() < alone / 2;
        if in_time {
            break;
        }
    }
    assert!(in_time, "{took:?} of {alone:?}");
}

/// One that gives its cells away in the middle of a prompt with images comes back for them.
#[tokio::test(flavor = "multi_thread")]
async fn room_for_images_is_made_and_found() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let context =
            ContextSpec { min_tokens: Some(256), max_tokens: Some(512), parallel: 4, ..ContextSpec::default() };
        let engine = start(folder.path(), kind, context, |_| {});
        let images: Vec<_> = (0..4).map(|seed| picture(seed, 64, 64)).collect();
        let requests: Vec<_> = images
            .iter()
            .map(|image| prompt(&engine, &[LONG, "Why?"], std::slice::from_ref(image)))
            .map(|request| GenerateRequest { ignore_eos: true, ..request })
            .collect();
        let (alone, found) = alone_and_together(&engine, &requests, 250).await;
        for ((found, usage), alone) in found.iter().zip(&alone) {
            assert_eq!(usage.completion_tokens, 250);
            assert!(distance(alone, found) < NEAR, "{kind:?}: {alone:?} {found:?}");
        }
        assert!(engine.stats().resizes > 0, "{:?}", engine.stats());
        engine.shutdown(Instant::now());
    }
}

/// Of any shape that the API lets through, for every kind of projector.
#[tokio::test(flavor = "multi_thread")]
async fn images_of_any_shape() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context(2), |_| {});
        let shapes = [(1, 1), (1, 200), (200, 1), (3000, 15), (17, 31), (500, 300), (64, 64)];
        for ((width, height), seed) in shapes.into_iter().zip(0..) {
            let request = prompt(&engine, &["See ", "?"], &[picture(seed, width, height)]);
            let request = GenerateRequest { max_tokens: Some(1), ..request };
            let (top, usage) = ask(&engine, &request).await;
            assert!(!top.is_empty() && usage.prompt_tokens as usize == request.prompt.len(), "{kind:?}: {usage:?}");
        }
        engine.shutdown(Instant::now());
    }
}

/// What stands for images cannot be made up, and a model that reads text only says so.
#[tokio::test]
async fn what_is_no_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path(), KINDS[0], context(1), |_| {});
    let good = prompt(&engine, &["See ", "?"], &[picture(1, 64, 64)]);
    let marker = engine.media_marker().unwrap();
    assert!(engine.read(marker, true, &[]).is_err());
    assert!(engine.read("no place", true, &[picture(1, 64, 64)]).is_err());
    let text_only = GenerateRequest { media: Media::default(), ..good.clone() };
    assert!(matches!(engine.submit(text_only), Err(SubmitError::InvalidToken { .. })));
    let mut moved = good.clone();
    moved.prompt.insert(0, 5);
    assert!(matches!(engine.submit(moved), Err(SubmitError::InvalidParameter(_))));
    let mut cut = good;
    cut.prompt.truncate(20);
    assert!(matches!(engine.submit(cut), Err(SubmitError::InvalidParameter(_))));
    assert!(Picture::new(2, 2, vec![0; 11], [0; 32]).is_none() && Picture::new(0, 2, vec![], [0; 32]).is_none());

    let model_path = folder.path().join("model.gguf");
    let config = RunnerConfig { model_path, threads: 2, ..RunnerConfig::default() };
    let blind = Engine::start(&config, &|_| {}).unwrap();
    assert!(!blind.model().can(Ability::Vision) && blind.media_marker().is_none());
    assert!(blind.read("See?", true, &[]).is_err());
}

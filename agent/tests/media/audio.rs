//! Sound: told apart, read once, computed beside others' steps.

use std::sync::Arc;

use altiplano_agent::engine::{Ability, Picture, Sound};

use super::*;

/// How far log-probabilities after different sounds are apart at least.
const FAR: f32 = 0.2;

const KINDS: [(ProjectorKind, Architecture); 3] = [
    (ProjectorKind::Ultravox, Architecture::Llama),
    (ProjectorKind::Qwen2a, Architecture::Llama),
    (ProjectorKind::Omni, Architecture::Qwen2vl),
];

/// Noise of its own, for so many tenths of a second.
fn sound(seed: u32, tenths: usize) -> Medium {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let noise = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).unwrap()) / 65_536.0 - 0.5
    };
    let mut samples: Vec<f32> = (0..1600 * tenths).map(noise).collect();
    // Each has a colour of its own too.
    for _ in 0..seed % 4 {
        (1..samples.len()).for_each(|place| samples[place] = 0.5 * (samples[place] + samples[place - 1]));
    }
    let digest = [u8::try_from(seed).unwrap(); 32];
    Medium::Audio(Arc::new(Sound::new(16_000, samples, digest).unwrap()))
}

fn image() -> Medium {
    Medium::Image(Arc::new(Picture::new(64, 64, vec![100; 64 * 64 * 3], [99; 32]).unwrap()))
}

/// The same sound says the same, another one something else; what was read before is not read again.
#[tokio::test(flavor = "multi_thread")]
async fn a_sound_is_told_from_another_and_read_once() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context(4), |_| {});
        assert!(engine.model().can(Ability::Audio));
        assert_eq!(engine.model().can(Ability::Vision), kind.0 == ProjectorKind::Omni);
        assert_eq!(engine.audio_rate(), Some(16_000));
        let fresh = |sound: &Medium, end: &str| GenerateRequest {
            cache_prompt: false,
            ..prompt(&engine, &[LONG, end], std::slice::from_ref(sound))
        };
        let (one, other) = (sound(1, 290), sound(2, 290));
        let (first, usage) = ask(&engine, &fresh(&one, "What is it?")).await;
        let (again, _) = ask(&engine, &fresh(&one, "What is it?")).await;
        let (another, _) = ask(&engine, &fresh(&other, "What is it?")).await;
        assert!(distance(&first, &again) < NEAR, "{kind:?}: {first:?} {again:?}");
        assert!(distance_of_all(&first, &another) > FAR, "{kind:?}: {first:?} {another:?}");
        let stats = engine.stats();
        assert_eq!((stats.sounds, stats.pictures), (2, 0), "{kind:?}: computed once each");
        let text = engine.tokenize(LONG, true, true).unwrap().len();
        assert!(usage.prompt_tokens as usize > text + 180, "{kind:?}: a sound counts: {usage:?}");

        // A second question about the sound goes on behind it.
        let expected = ask(&engine, &fresh(&one, "And who made it?")).await;
        let found = ask(&engine, &GenerateRequest { cache_prompt: true, ..fresh(&one, "And who made it?") }).await;
        assert!(distance(&expected.0, &found.0) < NEAR, "{kind:?}: {expected:?} {found:?}");
        assert!(found.1.cached_tokens as usize > text + 180, "{kind:?}: the sound was there: {found:?}");

        // One that has several parts, each computed by itself.
        let long = fresh(&sound(3, 301), "Why?");
        ask(&engine, &long).await;
        assert_eq!(engine.stats().sounds, 4, "{kind:?}");
        if kind.0 == ProjectorKind::Omni {
            let both = |media: [Medium; 2]| GenerateRequest {
                cache_prompt: false,
                ..prompt(&engine, &[LONG, " and ", "?"], &media)
            };
            let (left, _) = ask(&engine, &both([image(), one.clone()])).await;
            let (right, _) = ask(&engine, &both([one.clone(), image()])).await;
            assert!(distance_of_all(&left, &right) > NEAR, "{left:?} {right:?}");
        }
        engine.shutdown(Instant::now());
    }
}

/// Many at once, with equal and different sounds, say what each says alone; in a split cache too.
#[tokio::test(flavor = "multi_thread")]
async fn sounds_in_company() {
    let fixed = ContextSpec { sizing: ContextSizing::Fixed, ..context(4) };
    for (kind, context) in [(KINDS[0], context(4)), (KINDS[0], fixed), (KINDS[2], context(4))] {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context, |_| {});
        let sounds: Vec<_> = (0..3).map(|seed| sound(seed, 50)).collect();
        in_company(&engine, &sounds, 9, 10, &format!("{kind:?}")).await;
        engine.shutdown(Instant::now());
    }
}

/// Who gives up while a sound is computed does not hold the next one up.
#[tokio::test(flavor = "multi_thread")]
async fn a_sound_that_nobody_waits_for_is_not_computed_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let slow = |projector: &mut Projector| {
        *projector = Projector { embd: 320, heads: 4, ff: 1024, layers: 8, ..projector.clone() };
    };
    let engine = start(folder.path(), KINDS[0], context(4), slow);
    let request = |seed| prompt(&engine, &["See ", "?"], &[sound(seed, 10)]);
    let alone = alone(&engine, &request(1)).await;
    is_given_up(&engine, |round| request(u32::from(round) + 2), alone, |stats| stats.sounds).await;
    engine.shutdown(Instant::now());
}

/// Of any length that the API lets through, silence and the loudest noise, for every kind of projector.
#[tokio::test(flavor = "multi_thread")]
async fn sounds_of_any_length() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let engine = start(folder.path(), kind, context(2), |_| {});
        let of =
            |samples: Vec<f32>, digest: u8| Medium::Audio(Arc::new(Sound::new(16_000, samples, [digest; 32]).unwrap()));
        let loud: Vec<f32> = (0..16_000_u16).map(|place| if place % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let sounds = [
            of(vec![0.3], 1),
            of(vec![0.0; 16_000], 2),
            of(loud, 3),
            // A sample more than half a minute.
            of(vec![0.1; 480_001], 4),
        ];
        for sound in sounds {
            let request = prompt(&engine, &["Hear ", "?"], std::slice::from_ref(&sound));
            let (top, usage) = ask(&engine, &request).await;
            assert!(top.values().all(|logprob| logprob.is_finite()) && !top.is_empty(), "{kind:?} {sound:?}: {top:?}");
            assert_eq!(usage.prompt_tokens as usize, request.prompt.len(), "{kind:?}");
        }
        engine.shutdown(Instant::now());
    }
}

/// Samples that are none, another rate, and a model that only sees.
#[tokio::test]
async fn what_is_no_sound_is_refused() {
    for samples in [vec![], vec![f32::NAN], vec![0.0, f32::INFINITY], vec![1.5]] {
        assert!(Sound::new(16_000, samples.clone(), [0; 32]).is_none(), "{samples:?}");
    }
    assert!(Sound::new(0, vec![0.0], [0; 32]).is_none());
    let short = Sound::new(16_000, vec![0.5], [0; 32]).unwrap();
    assert_eq!((short.samples().len(), short.seconds()), (1600, 1), "silence follows");

    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path(), KINDS[0], context(1), |_| {});
    let marker = engine.media_marker().unwrap();
    let refused = |medium: Medium| engine.read(marker, true, &[medium]).unwrap_err().to_string();
    assert!(refused(image()).contains("reads no images"));
    let other = Medium::Audio(Arc::new(Sound::new(8000, vec![0.0; 8000], [0; 32]).unwrap()));
    assert!(refused(other).contains("another sample rate"));
    engine.shutdown(Instant::now());

    let seeing = start(folder.path(), (ProjectorKind::Gemma3, Architecture::Llama), context(1), |_| {});
    let read = seeing.read(seeing.media_marker().unwrap(), true, &[sound(1, 1)]);
    assert!(read.unwrap_err().to_string().contains("reads no audio"));
    assert_eq!(seeing.audio_rate(), None);
}

//! Files of sound as clients send them, and as attackers would.

use std::io::Cursor;

use hound::{SampleFormat, WavSpec, WavWriter};
use proptest::prelude::*;

use super::*;

const MP3: &[u8] = include_bytes!("../../../tests/media/tone.mp3");
const FLAC: &[u8] = include_bytes!("../../../tests/media/tone.flac");

/// What the files hold: 440 Hz at half of the height, for half a second.
fn tone(at: f32) -> f32 {
    0.5 * (2.0 * std::f32::consts::PI * 440.0 * at).sin()
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a short tone"
)]
fn wav_of(rate: u32, channels: u16, bits: u16, seconds: f32) -> Vec<u8> {
    let sample_format = if bits == 32 { SampleFormat::Float } else { SampleFormat::Int };
    let mut file = Cursor::new(Vec::new());
    let spec = WavSpec { channels, sample_rate: rate, bits_per_sample: bits, sample_format };
    let mut writer = WavWriter::new(&mut file, spec).unwrap();
    for place in 0..(seconds * rate as f32) as u32 {
        let sample = tone(place as f32 / rate as f32);
        for _ in 0..channels {
            if bits == 32 {
                writer.write_sample(sample).unwrap();
            } else {
                writer.write_sample((sample * ((1_i64 << (bits - 1)) - 1) as f32) as i32).unwrap();
            }
        }
    }
    writer.finalize().unwrap();
    file.into_inner()
}

fn read(bytes: &[u8], rate: u32, most: u32) -> Result<Sound, String> {
    let attachment = Attachment { name: "clip".to_owned(), data: String::new(), kind: super::super::Kind::Audio };
    sound(&attachment, bytes, rate, most).map_err(|error| {
        assert_eq!((error.status, error.param.as_deref()), (http::StatusCode::BAD_REQUEST, Some("clip")));
        error.message
    })
}

fn refusal(bytes: &[u8]) -> String {
    read(bytes, 16_000, MAX_SECONDS).map(|sound| format!("{sound:?}")).unwrap_err()
}

/// How far samples are from the tone, at places that are not near the ends, where filters have less to go by.
#[expect(clippy::cast_precision_loss, reason = "a short tone")]
fn far(samples: &[f32], rate: u32, delay: usize) -> f32 {
    let middle = samples.len() / 5..samples.len() * 4 / 5;
    let errors = middle.map(|place| (samples[place] - tone((place - delay) as f32 / rate as f32)).abs());
    errors.fold(0.0, f32::max)
}

#[test]
#[expect(clippy::cast_precision_loss, reason = "rates")]
fn every_format_is_the_same_sound() {
    for (from, to) in
        [(16_000, 16_000), (8000, 16_000), (44_100, 16_000), (48_000, 24_000), (11_025, 16_000), (16_001, 16_000)]
    {
        for (channels, bits) in [(1, 16), (2, 16), (8, 24), (1, 8), (2, 32)] {
            let sound = read(&wav_of(from, channels, bits, 0.5), to, MAX_SECONDS).unwrap();
            // Resampled it may be half a sample late, or a whole one where the chunk has an odd length.
            let late = if from == to { 0.0 } else { std::f32::consts::PI * 440.0 / from.min(to) as f32 };
            let allowed = if bits == 8 { 0.02 } else { 0.002 } + late;
            let distance = far(sound.samples(), to, 0);
            assert!(distance < allowed, "{from} to {to}, {channels} channels of {bits} bits: {distance}");
            assert_eq!((sound.rate(), sound.seconds()), (to, 1));
            assert_eq!(u32::try_from(sound.samples().len()).unwrap(), to / 2, "half a second");
        }
    }
    let flac = read(FLAC, 16_000, MAX_SECONDS).unwrap();
    assert!(far(flac.samples(), 16_000, 0) < 0.17);
    let mp3 = read(MP3, 16_000, MAX_SECONDS).unwrap();
    let distance = far(&mp3.samples()[..8000], 16_000, 0);
    assert!(distance < 0.12, "encoder's delay cut off: {distance}");
}

#[test]
fn a_stream_has_no_length() {
    let whole = wav_of(16_000, 1, 16, 0.5);
    let expected = read(&whole, 16_000, MAX_SECONDS).unwrap();
    for length in [0_u32, u32::MAX] {
        let mut stream = whole.clone();
        stream[40..44].copy_from_slice(&length.to_le_bytes());
        // An odd byte at the end is no sample.
        stream.push(1);
        let sound = read(&stream, 16_000, MAX_SECONDS).unwrap();
        assert_eq!(sound.samples(), expected.samples());
    }
}

#[test]
fn what_is_no_sound_is_refused() {
    let whole = wav_of(16_000, 1, 16, 0.5);
    assert!(refusal(b"hello").contains("WAV, MP3 and FLAC"));
    assert!(refusal(b"").contains("WAV, MP3 and FLAC"));
    assert!(refusal(&whole[..whole.len() - 9]).contains("cannot be read"), "cut off");
    assert!(refusal(&whole[..30]).contains("cannot be read"));
    assert!(refusal(&FLAC[..FLAC.len() / 2]).contains("cannot be read"));
    assert!(refusal(&FLAC[..20]).contains("cannot be read"));
    assert!(refusal(b"\xff\xfb\x10\x64and no frame").contains("no frames"));
    assert!(refusal(b"ID3").contains("no frames"));

    // A header that says more than there is.
    let mut bomb = whole.clone();
    bomb[40..44].copy_from_slice(&0x7fff_fffe_u32.to_le_bytes());
    assert!(refusal(&bomb).contains("cannot be read"));
    assert!(refusal(&wav_of(16_000, 1, 16, 0.0)).contains("without samples"));
    assert!(refusal(&wav_of(16_000, 9, 16, 0.1)).contains("9 channels"));
    for rate in [0_u32, 1, 3999, 192_001, u32::MAX] {
        let mut odd = whole.clone();
        odd[24..28].copy_from_slice(&rate.to_le_bytes());
        odd[28..32].copy_from_slice(&rate.wrapping_mul(2).to_le_bytes());
        let reason = refusal(&odd);
        assert!(reason.contains("samples in a second") || reason.contains("cannot be read"), "{rate}: {reason}");
    }
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut file = wav_of(16_000, 1, 32, 0.1);
        let end = file.len();
        file[end - 4..].copy_from_slice(&wrong.to_le_bytes());
        assert!(refusal(&file).contains("no numbers"), "{wrong}");
    }
    // Loud is not wrong.
    let mut loud = wav_of(16_000, 1, 32, 0.1);
    let end = loud.len();
    loud[end - 4..].copy_from_slice(&1e30_f32.to_le_bytes());
    assert_eq!(read(&loud, 16_000, 1).unwrap().samples().last(), Some(&1.0));
}

#[test]
fn sound_may_have_so_many_seconds() {
    let clip = wav_of(8000, 1, 16, 3.5);
    assert_eq!(read(&clip, 16_000, 4).unwrap().seconds(), 4);
    assert!(read(&clip, 16_000, 3).unwrap_err().contains("600 seconds together, of which 3 are left"));
    assert!(read(&clip, 16_000, 0).unwrap_err().contains("of which 0 are left"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the bytes are, there is an answer, and no sound beyond the limits.
    #[test]
    fn broken_files_break_nothing(
        which in 0_usize..3,
        changes in prop::collection::vec((0_usize..4000, any::<u8>()), 1..20),
        cut in 0_usize..4000,
    ) {
        let mut bytes = [wav_of(8000, 2, 16, 0.1), MP3.to_vec(), FLAC.to_vec()][which].clone();
        for (place, byte) in changes {
            // The header most of all.
            let place = if place % 2 == 0 { place % 64 } else { place };
            if let Some(target) = bytes.get_mut(place) {
                *target = byte;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(cut % 100));
        if let Ok(sound) = read(&bytes, 16_000, 5) {
            prop_assert!(sound.seconds() <= 6, "{sound:?}");
        }
    }
}

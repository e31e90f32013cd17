//! Sound: from the bytes of a file to samples of one channel in the rate that a projector reads, within bounds.
//!
//! WAV, MP3 and FLAC, told by their first bytes, decoded by libraries without `unsafe`. Nothing is taken for what a header
//! says: memory grows with what was decoded, up to the limits.

use std::panic;

use claxon::FlacReaderOptions;
use hound::SampleFormat;
use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler};
use sha2::{Digest, Sha256};

use super::Attachment;
use crate::api::error::{ApiError, clip};
use crate::engine::Sound;

/// Seconds that all sounds of a request may have together.
pub const MAX_SECONDS: u32 = 600;

/// Channels that a sound may have; they are mixed to one.
pub const MAX_CHANNELS: u32 = 8;

/// Samples of one channel that are kept while a file is decoded: all seconds at 48 kHz.
const MAX_SAMPLES: usize = 48_000 * MAX_SECONDS as usize;

/// Samples in a second that a file may have.
const RATES: std::ops::RangeInclusive<u32> = 4_000..=192_000;

/// Bytes from which on a file is decoded after others, for the memory that it takes.
const LARGE: usize = 1 << 20;

/// Samples that are resampled at once.
const CHUNK: usize = 1024;

/// Whether a file begins as one of sound.
pub(in crate::api) fn is_audio(first: &[u8]) -> bool {
    format(first).is_some()
}

/// Whether it may take much memory: silence packs well.
pub(super) fn is_dear(bytes: &[u8]) -> bool {
    bytes.len() > LARGE || format(bytes) == Some(Format::Flac)
}

/// Its samples, `rate` in a second; it may have so many seconds.
pub(super) fn sound(attachment: &Attachment, bytes: &[u8], rate: u32, most: u32) -> Result<Sound, ApiError> {
    let Some(format) = format(bytes) else {
        return Err(attachment.invalid("is no audio that is known here: WAV, MP3 and FLAC are"));
    };
    let decode = || {
        let mono = match format {
            Format::Wav => wav(bytes, most),
            Format::Mp3 => mp3(bytes, most),
            Format::Flac => flac(bytes, most),
        };
        mono.and_then(|mono| mono.resampled(rate))
    };
    // Files are hostile, and a decoder that trips over one has no state that anybody goes on with.
    let samples = panic::catch_unwind(decode).unwrap_or_else(|_| Err("is audio that cannot be decoded".to_owned()));
    let samples = samples.map_err(|reason| attachment.invalid(&reason))?;
    let digest = Sha256::new().chain_update(b"sound").chain_update(bytes).finalize();
    Sound::new(rate, samples, digest.into()).ok_or_else(|| attachment.invalid("is audio without samples"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Wav,
    Mp3,
    Flac,
}

fn format(bytes: &[u8]) -> Option<Format> {
    match bytes {
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E', ..] => Some(Format::Wav),
        [b'f', b'L', b'a', b'C', ..] => Some(Format::Flac),
        // Tags before the first frame, or the frame's eleven bits and its layer.
        [b'I', b'D', b'3', ..] => Some(Format::Mp3),
        [0xff, second, ..] if second & 0xe0 == 0xe0 && second & 0x06 == 0x02 => Some(Format::Mp3),
        _ => None,
    }
}

fn unreadable(error: &impl ToString) -> String {
    format!("is audio that cannot be read: {}", clip(&error.to_string()))
}

/// Samples of one channel, between -1 and 1.
struct Mono {
    rate: u32,
    channels: u32,
    samples: Vec<f32>,
    most: usize,
    seconds: u32,
}

impl Mono {
    /// `seconds`: how long it may be.
    fn new(rate: u32, channels: u32, seconds: u32) -> Result<Self, String> {
        if !RATES.contains(&rate) {
            let (low, high) = (RATES.start(), RATES.end());
            return Err(format!("has {rate} samples in a second; {low} to {high} are allowed"));
        }
        if channels == 0 || channels > MAX_CHANNELS {
            return Err(format!("has {channels} channels; 1 to {MAX_CHANNELS} are allowed"));
        }
        let most = (rate as usize * seconds as usize).min(MAX_SAMPLES);
        Ok(Self { rate, channels, samples: Vec::new(), most, seconds })
    }

    /// Takes the samples of one moment, added up.
    fn push(&mut self, sum: f32) -> Result<(), String> {
        if self.samples.len() >= self.most {
            let (seconds, most, rate) = (self.seconds, self.most, self.rate);
            let message = if most < rate as usize * seconds as usize {
                format!("is too long at {rate} samples in a second: at most {most} samples are allowed")
            } else {
                format!(
                    "is too long: the audio of a request may have {MAX_SECONDS} seconds together, of which {seconds} are left"
                )
            };
            return Err(message);
        }
        #[expect(clippy::cast_precision_loss, reason = "at most eight")]
        let sample = sum / self.channels as f32;
        if !sample.is_finite() {
            return Err("is audio with samples that are no numbers".to_owned());
        }
        self.samples.push(sample.clamp(-1.0, 1.0));
        Ok(())
    }

    /// Takes samples that come channel by channel.
    fn extend(&mut self, samples: impl Iterator<Item = Result<f32, String>>) -> Result<(), String> {
        let (mut sum, mut channel) = (0.0, 0);
        for sample in samples {
            sum += sample?;
            channel += 1;
            if channel == self.channels {
                self.push(sum)?;
                (sum, channel) = (0.0, 0);
            }
        }
        Ok(())
    }

    /// In another rate.
    fn resampled(self, rate: u32) -> Result<Vec<f32>, String> {
        if self.rate == rate || self.samples.is_empty() {
            return Ok(self.samples);
        }
        let (from, to, length) = (self.rate as usize, rate as usize, self.samples.len());
        let mut resampler = Fft::<f32>::new(from, to, CHUNK, 1, FixedSync::Both).map_err(|error| unreadable(&error))?;
        let input = InterleavedSlice::new(&self.samples, 1, length).map_err(|error| unreadable(&error))?;
        let output = resampler.process_all(&input, length, None).map_err(|error| unreadable(&error))?;
        let mut samples = output.take_data();
        // Filters overshoot.
        for sample in &mut samples {
            *sample = sample.clamp(-1.0, 1.0);
        }
        Ok(samples)
    }
}

fn wav(bytes: &[u8], seconds: u32) -> Result<Mono, String> {
    let closed = closed(bytes);
    let mut reader = hound::WavReader::new(closed.as_slice()).map_err(|error| unreadable(&error))?;
    let spec = reader.spec();
    let mut mono = Mono::new(spec.sample_rate, spec.channels.into(), seconds)?;
    match spec.sample_format {
        SampleFormat::Float => {
            mono.extend(reader.samples::<f32>().map(|sample| sample.map_err(|error| unreadable(&error))))?;
        }
        SampleFormat::Int => {
            let scale = scale(spec.bits_per_sample.into())?;
            let samples = reader.samples::<i32>();
            mono.extend(
                samples.map(|sample| sample.map(|sample| scaled(sample, scale)).map_err(|error| unreadable(&error))),
            )?;
        }
    }
    Ok(mono)
}

/// A WAV file whose data has a length: who writes to a pipe does not know it and says 0 or the highest number.
fn closed(bytes: &[u8]) -> Vec<u8> {
    const HEADER: usize = 8;
    let mut bytes = bytes.to_vec();
    let number = |bytes: &[u8], at: usize| {
        let field = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(field.try_into().ok()?))
    };
    let (mut at, mut block) = (12_usize, 1);
    while let (Some(name), Some(length)) = (bytes.get(at..at + 4), number(&bytes, at + 4)) {
        match name {
            b"fmt " => block = number(&bytes, at + HEADER + 12).map_or(1, |field| (field & 0xffff) as usize).max(1),
            b"data" if length == 0 || length > u32::MAX - 64 => {
                let rest = bytes.len() - at - HEADER;
                let whole = u32::try_from(rest - rest % block).unwrap_or(0);
                bytes[at + 4..at + HEADER].copy_from_slice(&whole.to_le_bytes());
                break;
            }
            b"data" => break,
            _ => {}
        }
        // Chunks of an odd length have a byte after them.
        match at.checked_add(HEADER + length as usize + length as usize % 2) {
            Some(next) if next < bytes.len() => at = next,
            _ => break,
        }
    }
    bytes
}

fn mp3(bytes: &[u8], seconds: u32) -> Result<Mono, String> {
    let mut reader = nanomp3::SliceReader::<f32>::new(bytes);
    let channels = reader.channels().map_or(0, |channels| u32::from(channels.num()));
    if channels == 0 {
        return Err("is no audio that can be read: it has no frames".to_owned());
    }
    let mut mono = Mono::new(reader.sample_rate(), channels, seconds)?;
    while let Some(frame) = reader.read_frame().map_err(|error| unreadable(&error))? {
        mono.extend(frame.iter().copied().map(Ok))?;
    }
    Ok(mono)
}

fn flac(bytes: &[u8], seconds: u32) -> Result<Mono, String> {
    let options = FlacReaderOptions { metadata_only: false, read_vorbis_comment: false };
    let mut reader = claxon::FlacReader::new_ext(bytes, options).map_err(|error| unreadable(&error))?;
    let info = reader.streaminfo();
    let mut mono = Mono::new(info.sample_rate, info.channels, seconds)?;
    let scale = scale(info.bits_per_sample)?;
    let (mut frames, mut buffer) = (reader.blocks(), Vec::new());
    while let Some(block) = frames.read_next_or_eof(buffer).map_err(|error| unreadable(&error))? {
        if block.channels() != info.channels {
            return Err("is audio whose channels change".to_owned());
        }
        for moment in 0..block.duration() {
            mono.push((0..info.channels).map(|channel| scaled(block.sample(channel, moment), scale)).sum())?;
        }
        buffer = block.into_buffer();
    }
    Ok(mono)
}

/// What a whole sample of so many bits is multiplied by.
fn scale(bits: u32) -> Result<f32, String> {
    if !(4..=32).contains(&bits) {
        return Err(format!("has samples of {bits} bits; 4 to 32 are allowed"));
    }
    Ok(0.5_f32.powi(i32::try_from(bits - 1).unwrap_or(31)))
}

#[expect(clippy::cast_precision_loss, reason = "24 bits are more than a projector hears")]
fn scaled(sample: i32, scale: f32) -> f32 {
    sample as f32 * scale
}

#[cfg(test)]
#[path = "sound_tests.rs"]
mod tests;

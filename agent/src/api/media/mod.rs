//! Images and sound in requests: from what clients send to pixels and samples, within bounds, and to places in the
//! prompt.
//!
//! They come as base64 in the request itself; addresses are refused, because a server that fetches what clients name
//! reaches what they cannot. In a message's text a word stands for each that nobody else writes; after the template it is
//! looked for, so a template may leave messages out.

mod marked;
mod picture;
mod sound;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::Value;

use super::error::{ApiError, clip};
use super::fields::wrong_type;
use super::state::ApiState;
use crate::engine::{Ability, Media, MediaError, MediaPrompt, Medium, Token};

pub(crate) use marked::{MARKER, MarkedPrompt, PromptObject};
pub use picture::{MAX_ALL_PIXELS, MAX_PIXELS, MAX_RATIO};
pub(in crate::api) use sound::is_audio;
pub use sound::{MAX_CHANNELS, MAX_SECONDS};

/// Images and sounds that one request may have.
pub const MAX_MEDIA: usize = 64;

/// An image or a sound of a request, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// The field, for errors.
    name: String,
    /// Base64.
    data: String,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Image,
    Audio,
}

/// What stands for an attachment, up to its number; different in each process.
static PLACE: LazyLock<String> =
    LazyLock::new(|| format!("<__media_{:016x}_", RandomState::new().build_hasher().finish()));

/// After the number.
const END: &str = "__>";

/// Takes an `image_url` part up and returns what stands for it in the text.
pub(super) fn take_image(name: &str, part: &Value, all: &mut Vec<Attachment>) -> Result<String, ApiError> {
    let name = format!("{name}.image_url");
    // Some clients leave the object out.
    let (name, url) = match part.get("image_url") {
        Some(Value::String(url)) => (name, url),
        Some(Value::Object(fields)) => match fields.get("url") {
            Some(Value::String(url)) => (format!("{name}.url"), url),
            _ => return Err(ApiError::invalid(format!("{name}.url"), format!("'{name}.url' must be a string"))),
        },
        _ => return Err(ApiError::invalid(name.clone(), format!("'{name}' must be an object with a 'url'"))),
    };
    let Some((kind, data)) = url.strip_prefix("data:").and_then(|rest| rest.split_once(',')) else {
        let message =
            format!("'{name}' must be the image itself, 'data:image/png;base64,…': this server fetches nothing");
        return Err(ApiError::unsupported(name, message));
    };
    if !kind.ends_with(";base64") {
        return Err(ApiError::invalid(name.clone(), format!("'{name}' must be in base64: 'data:image/png;base64,…'")));
    }
    put(Attachment { name, data: data.to_owned(), kind: Kind::Image }, all)
}

/// The same of an `input_audio` part. Its `format` is checked, but the file's first bytes say what it is.
pub(super) fn take_audio(name: &str, part: &Value, all: &mut Vec<Attachment>) -> Result<String, ApiError> {
    let name = format!("{name}.input_audio");
    let Some(Value::Object(fields)) = part.get("input_audio") else {
        return Err(ApiError::invalid(name.clone(), format!("'{name}' must be an object with 'data' and 'format'")));
    };
    match fields.get("format") {
        None | Some(Value::Null) => {}
        Some(Value::String(format)) if ["wav", "mp3", "flac"].contains(&format.as_str()) => {}
        Some(Value::String(format)) => {
            let message = format!("'{name}.format' must be 'wav', 'mp3' or 'flac', not '{}'", clip(format));
            return Err(ApiError::unsupported(format!("{name}.format"), message));
        }
        Some(other) => return Err(wrong_type(&format!("{name}.format"), "a string", other)),
    }
    let name = format!("{name}.data");
    let data = match fields.get("data") {
        Some(Value::String(data)) if data.starts_with("http://") || data.starts_with("https://") => {
            let message = format!("'{name}' must be the file itself in base64: this server fetches nothing");
            return Err(ApiError::unsupported(name, message));
        }
        Some(Value::String(data)) => data,
        _ => return Err(ApiError::invalid(name.clone(), format!("'{name}' must be a string in base64"))),
    };
    // Some clients send an address that holds it.
    let data = data.strip_prefix("data:").and_then(|rest| rest.split_once(";base64,")).map_or(data.as_str(), |it| it.1);
    put(Attachment { name, data: data.to_owned(), kind: Kind::Audio }, all)
}

fn put(attachment: Attachment, all: &mut Vec<Attachment>) -> Result<String, ApiError> {
    if all.len() >= MAX_MEDIA {
        let message = format!("a request may have {MAX_MEDIA} images and sounds at most");
        return Err(ApiError::invalid(attachment.name, message));
    }
    let place = format!("{}{}{END}", *PLACE, all.len());
    all.push(attachment);
    Ok(place)
}

impl Attachment {
    /// What a model must be able to do to read it.
    fn ability(&self) -> Ability {
        match self.kind {
            Kind::Image => Ability::Vision,
            Kind::Audio => Ability::Audio,
        }
    }

    fn invalid(&self, what: &str) -> ApiError {
        ApiError::invalid(self.name.clone(), format!("'{}' {what}", self.name))
    }

    /// Its file.
    fn bytes(&self) -> Result<Vec<u8>, ApiError> {
        // Encoders of mail write lines.
        let data: Vec<u8> = self.data.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        BASE64.decode(data).map_err(|error| self.invalid(&format!("is not base64: {error}")))
    }
}

/// With and without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The first bytes of a file in base64.
pub(super) fn first_bytes(base64: &str) -> Vec<u8> {
    let start = base64.get(..16).unwrap_or_default();
    BASE64.decode(start).unwrap_or_default()
}

/// Whether the model can read all of them.
pub(super) fn check(state: &ApiState, all: &[Attachment]) -> Result<(), ApiError> {
    let model = state.engine().model();
    let Some(refused) = all.iter().find(|attachment| !model.can(attachment.ability())) else { return Ok(()) };
    let reads = match (model.can(Ability::Vision), model.can(Ability::Audio)) {
        (true, _) => "text and images",
        (_, true) => "text and audio",
        _ => "text",
    };
    let kind = if refused.kind == Kind::Image { "an image" } else { "audio" };
    let name = &refused.name;
    let message = format!("'{name}' is {kind}, but this model reads {reads} only: see its capabilities in /v1/models");
    Err(ApiError::unsupported(name.clone(), message))
}

/// Tokens of a prompt in which words stand for attachments. `param` is where the prompt came from.
pub(super) fn read(
    state: &ApiState,
    param: &str,
    prompt: &str,
    add_special: bool,
    all: &[Attachment],
) -> Result<(Vec<Token>, Media), ApiError> {
    let engine = state.engine();
    let (text, media) = find(param, prompt, all, engine.media_marker().unwrap_or_default(), engine.audio_rate())?;
    let read = engine.read(&text, add_special, &media).map_err(|error| match error {
        MediaError::TooMany { .. } => ApiError::unavailable("overloaded", error.to_string(), state.retry_after()),
        MediaError::Invalid(reason) => ApiError::invalid(param, reason),
    });
    read.map(|MediaPrompt { tokens, media }| (tokens, media))
}

/// A prompt with what stands for attachments, as text with `marker` in their places, and what they are, in that order.
/// `rate`: samples in a second that the model reads.
fn find(
    param: &str,
    prompt: &str,
    all: &[Attachment],
    marker: &str,
    rate: Option<u32>,
) -> Result<(String, Vec<Medium>), ApiError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let wrong = || ApiError::invalid(param, format!("'{param}' names an image or a sound that there is not"));
    let mut pieces = prompt.split(PLACE.as_str());
    let mut text = pieces.next().unwrap_or_default().to_owned();
    let mut wanted = Vec::new();
    for piece in pieces {
        let (number, rest) = piece.split_once(END).ok_or_else(wrong)?;
        wanted.push(number.parse::<usize>().ok().and_then(|number| all.get(number)).ok_or_else(wrong)?);
        text.push_str(marker);
        text.push_str(rest);
    }
    if wanted.len() > MAX_MEDIA {
        return Err(wrong());
    }
    let files = wanted.iter().map(|attachment| attachment.bytes()).collect::<Result<Vec<_>, _>>()?;
    let (mut pixels, mut dear) = (0, false);
    for (attachment, bytes) in wanted.iter().zip(&files) {
        match attachment.kind {
            Kind::Image => pixels += picture::check(attachment, bytes, pixels)?,
            Kind::Audio => dear = dear || sound::is_dear(bytes),
        }
    }
    let dear = dear || pixels > picture::LARGE;
    let _turn = dear.then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));
    let (mut media, mut seconds) = (Vec::with_capacity(wanted.len()), 0);
    for (attachment, bytes) in wanted.iter().zip(&files) {
        media.push(match attachment.kind {
            Kind::Image => Medium::Image(Arc::new(picture::picture(attachment, bytes)?)),
            Kind::Audio => {
                let rate = rate.ok_or_else(|| attachment.invalid("is audio, which this model does not read"))?;
                let sound = sound::sound(attachment, bytes, rate, MAX_SECONDS.saturating_sub(seconds))?;
                seconds += sound.seconds();
                Medium::Audio(Arc::new(sound))
            }
        });
    }
    Ok((text, media))
}

/// A prompt as a client may see and send it: with [`MARKER`] in the places of attachments.
pub(super) fn shown(prompt: &str) -> String {
    let mut pieces = prompt.split(PLACE.as_str());
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |text, piece| text + MARKER + piece.split_once(END).map_or(piece, |(_, rest)| rest))
}

/// A text whose middle was cut out, where the cut goes through what stands for an attachment: then without all of that.
pub(super) fn mend(text: &str, cut: String) -> String {
    let text = text.trim();
    if !text.contains(PLACE.as_str()) {
        return cut;
    }
    let same = |(left, right): &(char, char)| left == right;
    let head: usize = text.chars().zip(cut.chars()).take_while(same).map(|(char, _)| char.len_utf8()).sum();
    let ends = text[head..].chars().rev().zip(cut[head..].chars().rev());
    let tail: usize = ends.take_while(same).map(|(char, _)| char.len_utf8()).sum();
    let (mut from, mut to) = (head, text.len() - tail);
    for (start, _) in text.match_indices(PLACE.as_str()) {
        let end = text[start..].find(END).map_or(text.len(), |end| start + end + END.len());
        if start < from && from < end {
            from = start;
        }
        if start < to && to < end {
            to = end;
        }
    }
    format!("{}{}{}", &text[..from], &cut[head..cut.len() - tail], &text[to.max(from)..])
}

#[cfg(test)]
mod tests;

//! Images in messages: from what clients send to pixels, within bounds, and to places in the prompt.
//!
//! They come as base64 in the request itself (`data:image/png;base64,…`); addresses are refused, because a server that
//! fetches what clients name reaches what they cannot. In a message's text a word stands for an image that nobody else
//! writes; after the template it is looked for, so a template may leave messages out.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Cursor;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::api::error::{ApiError, clip};
use crate::engine::Picture;

/// Images that one request may have.
pub const MAX_IMAGES: usize = 64;

/// Pixels that one image may have.
pub const MAX_PIXELS: u64 = 32 << 20;

/// Pixels that all images of a request may have together.
pub const MAX_ALL_PIXELS: u64 = 64 << 20;

/// How many times longer one side of an image may be than the other.
pub const MAX_RATIO: u32 = 200;

/// Pixels from which on requests are decoded one after the other, for the memory that it takes.
const LARGE: u64 = 4 << 20;

/// Bytes that a decoder may take for itself.
const MAX_DECODER_BYTES: u64 = 384 << 20;

/// An image of a message, as it came.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// The field, for errors.
    name: String,
    /// Base64.
    data: String,
}

/// What stands for an image, up to its number; different in each process.
static PLACE: LazyLock<String> =
    LazyLock::new(|| format!("<__image_{:016x}_", RandomState::new().build_hasher().finish()));

/// After the number.
const END: &str = "__>";

/// Takes an `image_url` part up and returns what stands for it in the text.
pub(super) fn take(name: &str, part: &Value, images: &mut Vec<Image>) -> Result<String, ApiError> {
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
    if images.len() >= MAX_IMAGES {
        return Err(ApiError::invalid(name, format!("a request may have {MAX_IMAGES} images at most")));
    }
    let place = format!("{}{}{END}", *PLACE, images.len());
    images.push(Image { name, data: data.to_owned() });
    Ok(place)
}

impl Image {
    /// A model that reads text only was sent it.
    pub(super) fn refused(&self) -> ApiError {
        let message =
            format!("'{}' is an image, but this model reads text only: see its capabilities in /v1/models", self.name);
        ApiError::unsupported(self.name.clone(), message)
    }

    fn invalid(&self, what: &str) -> ApiError {
        ApiError::invalid(self.name.clone(), format!("'{}' {what}", self.name))
    }

    /// Its file.
    fn bytes(&self) -> Result<Vec<u8>, ApiError> {
        const CONFIG: GeneralPurposeConfig =
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        const ENGINE: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, CONFIG);
        // Encoders of mail write lines.
        let data: Vec<u8> = self.data.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        ENGINE.decode(data).map_err(|error| self.invalid(&format!("is not base64: {error}")))
    }

    /// Its width and height, from the header alone.
    fn size(&self, bytes: &[u8]) -> Result<(u32, u32), ApiError> {
        let (width, height) = self.reader(bytes)?.into_dimensions().map_err(|error| self.unreadable(&error))?;
        let (short, long) = (width.min(height), width.max(height));
        if short == 0 || long.div_ceil(short) > MAX_RATIO {
            let message = format!("is {width} × {height}; one side may be {MAX_RATIO} times as long as the other");
            return Err(self.invalid(&message));
        }
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Err(self.invalid(&format!("is {width} × {height}; at most {MAX_PIXELS} pixels are allowed")));
        }
        Ok((width, height))
    }

    fn reader<'a>(&self, bytes: &'a [u8]) -> Result<ImageReader<Cursor<&'a [u8]>>, ApiError> {
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
        let reader = reader.map_err(|error| self.invalid(&format!("cannot be read: {error}")))?;
        if reader.format().is_none() {
            return Err(self.invalid("is no image that is known here: PNG, JPEG, WebP, GIF and BMP are"));
        }
        Ok(reader)
    }

    fn unreadable(&self, error: &image::ImageError) -> ApiError {
        self.invalid(&format!("is an image that cannot be read: {}", clip(&error.to_string())))
    }

    /// Its pixels, the right way up. Of a moving one the first picture; what is transparent counts as if it were not.
    fn picture(&self, bytes: &[u8]) -> Result<Picture, ApiError> {
        let mut decoder = self.reader(bytes)?.into_decoder().map_err(|error| self.unreadable(&error))?;
        let mut limits = Limits::default();
        limits.max_alloc = Some(MAX_DECODER_BYTES);
        decoder.set_limits(limits).map_err(|error| self.unreadable(&error))?;
        let orientation = decoder.orientation().map_err(|error| self.unreadable(&error))?;
        let mut image = DynamicImage::from_decoder(decoder).map_err(|error| self.unreadable(&error))?;
        image.apply_orientation(orientation);
        let image = image.into_rgb8();
        let (width, height) = image.dimensions();
        let picture = Picture::new(width, height, image.into_raw(), Sha256::digest(bytes).into());
        picture.ok_or_else(|| self.invalid("has no pixels"))
    }
}

/// A prompt with what stands for images, as text with `marker` in their places, and the images in that order.
pub(super) fn find(prompt: &str, images: &[Image], marker: &str) -> Result<(String, Vec<Arc<Picture>>), ApiError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let wrong = || ApiError::invalid("messages", "the messages name an image that they do not have");
    let mut pieces = prompt.split(PLACE.as_str());
    let mut text = pieces.next().unwrap_or_default().to_owned();
    let mut wanted = Vec::new();
    for piece in pieces {
        let (number, rest) = piece.split_once(END).ok_or_else(wrong)?;
        wanted.push(number.parse::<usize>().ok().and_then(|number| images.get(number)).ok_or_else(wrong)?);
        text.push_str(marker);
        text.push_str(rest);
    }
    if wanted.len() > MAX_IMAGES {
        return Err(wrong());
    }
    let files = wanted.iter().map(|image| image.bytes()).collect::<Result<Vec<_>, _>>()?;
    let mut pixels = 0;
    for (image, bytes) in wanted.iter().zip(&files) {
        let (width, height) = image.size(bytes)?;
        pixels += u64::from(width) * u64::from(height);
        if pixels > MAX_ALL_PIXELS {
            let message = format!("is one too many: the images of a request may have {MAX_ALL_PIXELS} pixels together");
            return Err(image.invalid(&message));
        }
    }
    let _turn = (pixels > LARGE).then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));
    let decoded = wanted.iter().zip(&files).map(|(image, bytes)| image.picture(bytes).map(Arc::new));
    Ok((text, decoded.collect::<Result<_, _>>()?))
}

/// A text whose middle was cut out, where the cut goes through what stands for an image: then without all of that.
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
mod tests {
    use image::codecs::png::PngEncoder;
    use image::{ExtendedColorType, ImageEncoder};
    use serde_json::json;

    use super::*;

    fn encoded(bytes: &[u8]) -> String {
        format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
    }

    /// A grey PNG.
    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let pixels = vec![100; width as usize * height as usize];
        PngEncoder::new(&mut bytes).write_image(&pixels, width, height, ExtendedColorType::L8).unwrap();
        bytes
    }

    fn taken(urls: &[String]) -> (String, Vec<Image>) {
        let mut images = Vec::new();
        let places = urls
            .iter()
            .map(|url| take("messages[0].content[1]", &json!({"image_url": {"url": url}}), &mut images).unwrap());
        (places.collect::<Vec<_>>().join(" and "), images)
    }

    fn refusal(url: String) -> String {
        let (text, images) = taken(&[url]);
        let error = find(&text, &images, "<m>").unwrap_err();
        assert_eq!(
            (error.status, error.param.as_deref()),
            (http::StatusCode::BAD_REQUEST, Some("messages[0].content[1].image_url.url"))
        );
        error.message
    }

    #[test]
    fn images_find_their_places() {
        let (text, images) = taken(&[encoded(&png(3, 2)), encoded(&png(4, 5))]);
        let (first, second) = text.split_once(" and ").unwrap();
        let sizes = |text: &str| {
            let (text, pictures) = find(text, &images, "<m>").unwrap();
            (text, pictures.iter().map(|picture| (picture.width(), picture.height())).collect::<Vec<_>>())
        };
        assert_eq!(sizes(&format!("a {first} b {second}")), ("a <m> b <m>".to_owned(), vec![(3, 2), (4, 5)]));
        assert_eq!(sizes(&format!("{second}{first}")), ("<m><m>".to_owned(), vec![(4, 5), (3, 2)]));
        assert_eq!(sizes(&format!("only {second}")), ("only <m>".to_owned(), vec![(4, 5)]), "a template left one out");
        assert_eq!(sizes("none"), ("none".to_owned(), vec![]));
        assert!(find(&first.replace("0__>", "7__>"), &images, "<m>").is_err());
        assert!(find(PLACE.as_str(), &images, "<m>").is_err());
    }

    #[test]
    fn a_cut_leaves_images_whole_or_out() {
        let (both, _) = taken(&[encoded(&png(3, 2)), encoded(&png(4, 5))]);
        let text = format!("Look at {both} here, and répondez.");
        let (first, second) = both.split_once(" and ").unwrap();
        for from in (0..text.len()).filter(|&from| text.is_char_boundary(from)) {
            for to in (from..text.len()).filter(|&to| text.is_char_boundary(to)) {
                let mended = mend(&text, format!("{} […] {}", &text[..from], &text[to..]));
                let left = mended.replace(first, "").replace(second, "");
                assert!(!left.contains("__") && !left.contains("image_"), "{from}..{to}: {mended}");
                assert!(mended.contains("[…]") || from == to, "{mended}");
            }
        }
        assert_eq!(mend("no image", "no […] ge".to_owned()), "no […] ge");
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let mut images = Vec::new();
        for (part, param) in [
            (json!({}), "c.image_url"),
            (json!({"image_url": 7}), "c.image_url"),
            (json!({"image_url": {}}), "c.image_url.url"),
            (json!({"image_url": {"url": "https://example.com/a.png"}}), "c.image_url.url"),
            (json!({"image_url": "http://169.254.169.254/"}), "c.image_url"),
            (json!({"image_url": "file:///etc/passwd"}), "c.image_url"),
            (json!({"image_url": "data:image/png,abc"}), "c.image_url"),
        ] {
            let error = take("c", &part, &mut images).unwrap_err();
            assert_eq!((error.status, error.param.as_deref()), (http::StatusCode::BAD_REQUEST, Some(param)), "{part}");
        }
        for _ in 0..MAX_IMAGES {
            take("c", &json!({"image_url": "data:;base64,AAAA"}), &mut images).unwrap();
        }
        assert!(take("c", &json!({"image_url": "data:;base64,AAAA"}), &mut images).is_err(), "too many");

        assert!(refusal("data:image/png;base64,?".to_owned()).contains("base64"));
        assert!(refusal(encoded(b"hello")).contains("PNG, JPEG"));
        assert!(refusal(encoded(&png(30, 30)[..60])).contains("cannot be read"), "cut off");
        let mut broken = png(30, 30);
        broken[45] ^= 0xff;
        assert!(refusal(encoded(&broken)).contains("cannot be read"));
        assert!(refusal(encoded(&png(1, 300))).contains("times as long"));
    }

    /// A header alone: nothing of the size that it says is taken.
    #[test]
    fn a_bomb_does_not_go_off() {
        let mut bomb = png(1, 1);
        let say = |bomb: &mut Vec<u8>, width: u32, height: u32| {
            bomb[16..20].copy_from_slice(&width.to_be_bytes());
            bomb[20..24].copy_from_slice(&height.to_be_bytes());
            let sum = crc(&bomb[12..29]);
            bomb[29..33].copy_from_slice(&sum.to_be_bytes());
        };
        say(&mut bomb, 100_000, 100_000);
        assert!(refusal(encoded(&bomb)).contains("pixels are allowed"));
        say(&mut bomb, 5_000, 5_000);
        let (text, images) = taken(&vec![encoded(&bomb); 3]);
        let error = find(&text, &images, "<m>").unwrap_err();
        assert!(error.message.contains("together"), "{}", error.message);
    }

    /// CRC-32 of a PNG's chunk.
    fn crc(bytes: &[u8]) -> u32 {
        let step = |sum: u32, byte: &u8| {
            (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 })
        };
        !bytes.iter().fold(!0, step)
    }

    #[test]
    fn forms_of_base64_that_clients_send() {
        let bytes = png(2, 2);
        let standard = base64::engine::general_purpose::STANDARD.encode(&bytes);
        let lines: Vec<&str> = standard.as_bytes().chunks(20).map(|line| std::str::from_utf8(line).unwrap()).collect();
        for data in [standard.clone(), standard.trim_end_matches('=').to_owned(), lines.join("\n")] {
            let (text, images) = taken(&[format!("data:image/png;charset=utf-8;base64,{data}")]);
            assert_eq!(find(&text, &images, "<m>").unwrap().1.len(), 1);
        }
    }
}

//! Pictures: from the bytes of a file to pixels, within bounds.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use sha2::{Digest, Sha256};

use super::Attachment;
use crate::api::error::{ApiError, clip};
use crate::engine::Picture;

/// Pixels that one image may have.
pub const MAX_PIXELS: u64 = 32 << 20;

/// Pixels that all images of a request may have together.
pub const MAX_ALL_PIXELS: u64 = 64 << 20;

/// How many times longer one side of an image may be than the other.
pub const MAX_RATIO: u32 = 200;

/// Pixels from which on requests are decoded one after the other, for the memory that it takes.
pub(super) const LARGE: u64 = 4 << 20;

/// Bytes that a decoder may take for itself.
const MAX_DECODER_BYTES: u64 = 384 << 20;

/// The pixels of an image, from its header alone; others of the request have so many already.
pub(super) fn check(image: &Attachment, bytes: &[u8], others: u64) -> Result<u64, ApiError> {
    let (width, height) = reader(image, bytes)?.into_dimensions().map_err(|error| unreadable(image, &error))?;
    let (short, long) = (width.min(height), width.max(height));
    if short == 0 || long.div_ceil(short) > MAX_RATIO {
        let message = format!("is {width} × {height}; one side may be {MAX_RATIO} times as long as the other");
        return Err(image.invalid(&message));
    }
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        return Err(image.invalid(&format!("is {width} × {height}; at most {MAX_PIXELS} pixels are allowed")));
    }
    if others + pixels > MAX_ALL_PIXELS {
        let message = format!("is one too many: the images of a request may have {MAX_ALL_PIXELS} pixels together");
        return Err(image.invalid(&message));
    }
    Ok(pixels)
}

/// Its pixels, the right way up. Of a moving one the first picture; what is transparent counts as if it were not.
pub(super) fn picture(image: &Attachment, bytes: &[u8]) -> Result<Picture, ApiError> {
    let mut decoder = reader(image, bytes)?.into_decoder().map_err(|error| unreadable(image, &error))?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    decoder.set_limits(limits).map_err(|error| unreadable(image, &error))?;
    let orientation = decoder.orientation().map_err(|error| unreadable(image, &error))?;
    let mut whole = DynamicImage::from_decoder(decoder).map_err(|error| unreadable(image, &error))?;
    whole.apply_orientation(orientation);
    let rgb = whole.into_rgb8();
    let (width, height) = rgb.dimensions();
    let picture = Picture::new(width, height, rgb.into_raw(), Sha256::digest(bytes).into());
    picture.ok_or_else(|| image.invalid("has no pixels"))
}

fn reader<'a>(image: &Attachment, bytes: &'a [u8]) -> Result<ImageReader<Cursor<&'a [u8]>>, ApiError> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let reader = reader.map_err(|error| image.invalid(&format!("cannot be read: {error}")))?;
    if reader.format().is_none() {
        return Err(image.invalid("is no image that is known here: PNG, JPEG, WebP, GIF and BMP are"));
    }
    Ok(reader)
}

fn unreadable(image: &Attachment, error: &image::ImageError) -> ApiError {
    image.invalid(&format!("is an image that cannot be read: {}", clip(&error.to_string())))
}

//! Pure: pictures and sound in a prompt, and how they stand among its tokens. What the engine says of pictures holds for
//! sound too.
//!
//! A picture is one piece or several, each of so many embeddings, which stand in the prompt as tokens that no vocabulary
//! has: the first names the piece, the others say that it goes on. So the same picture is the same tokens and another is
//! not, and whatever compares, counts or cuts tokens needs to know nothing else. A piece is never cut: a prompt goes on
//! from another's cells only at a border.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::ffi::Pieces;
use super::request::Token;

/// A piece goes on, one position further.
const NEXT: Token = -2;

/// A piece goes on at the same position: with M-RoPE a picture takes fewer positions than embeddings.
const SAME: Token = -3;

/// The name of the first piece; others have lower ones.
const FIRST: Token = -4;

/// Pieces whose names are remembered; one that was forgotten gets another name and is computed again.
const MAX_NAMES: usize = 4096;

/// An image: RGB, three bytes for each pixel, line by line.
pub struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
    digest: [u8; 32],
}

impl Picture {
    /// `digest` tells it from all others: of the bytes that it was made of. `None` when there are not three bytes for
    /// each pixel, or no pixels.
    #[must_use]
    pub fn new(width: u32, height: u32, pixels: Vec<u8>, digest: [u8; 32]) -> Option<Self> {
        let bytes = usize::try_from(width).ok()?.checked_mul(usize::try_from(height).ok()?)?.checked_mul(3)?;
        (bytes > 0 && pixels.len() == bytes).then_some(Self { width, height, pixels, digest })
    }

    /// Pixels of a line.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Lines.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    pub(super) fn pixels(&self) -> &[u8] {
        &self.pixels
    }
}

impl fmt::Debug for Picture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, height, .. } = self;
        formatter.debug_struct("Picture").field("width", width).field("height", height).finish_non_exhaustive()
    }
}

/// Seconds of sound that every projector computes at once: as many as llama.cpp takes memory for when it loads one.
pub(super) const SECONDS_AT_ONCE: u32 = 30;

/// Sound: one channel, samples between -1 and 1.
pub struct Sound {
    rate: u32,
    samples: Vec<f32>,
    digest: [u8; 32],
}

impl Sound {
    /// `rate`: samples in a second, see [`Engine::audio_rate`](super::Engine::audio_rate). `digest` tells it from all
    /// others: of the bytes that it was made of. Silence is added up to a whole tenth of a second: llama.cpp aborts on
    /// shorter pieces, and projectors part sound at whole seconds. `None` when there are no samples, or some are no numbers
    /// between -1 and 1.
    #[must_use]
    pub fn new(rate: u32, mut samples: Vec<f32>, digest: [u8; 32]) -> Option<Self> {
        let tenth = usize::try_from(rate / 10).ok().filter(|tenth| *tenth > 0)?;
        if samples.is_empty() || !samples.iter().all(|sample| sample.abs() <= 1.0) {
            return None;
        }
        samples.resize(samples.len().next_multiple_of(tenth), 0.0);
        Some(Self { rate, samples, digest })
    }

    /// Samples in a second.
    #[must_use]
    pub fn rate(&self) -> u32 {
        self.rate
    }

    /// How long it is, in seconds, rounded up.
    #[must_use]
    pub fn seconds(&self) -> u32 {
        u32::try_from(self.samples.len().div_ceil(self.rate as usize)).unwrap_or(u32::MAX)
    }

    /// Its samples, one after the other.
    #[must_use]
    pub fn samples(&self) -> &[f32] {
        &self.samples
    }
}

impl fmt::Debug for Sound {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rate, samples, .. } = self;
        formatter.debug_struct("Sound").field("rate", rate).field("samples", &samples.len()).finish_non_exhaustive()
    }
}

/// What a prompt may have beside text.
#[derive(Clone, Debug)]
pub enum Medium {
    /// An image.
    Image(Arc<Picture>),
    /// A sound.
    Audio(Arc<Sound>),
}

impl Medium {
    pub(super) fn digest(&self) -> [u8; 32] {
        match self {
            Self::Image(picture) => picture.digest,
            Self::Audio(sound) => sound.digest,
        }
    }

    /// What counts towards [`MAX_MEDIA_ALIVE`]: an image, or half a minute of sound.
    pub(super) fn share(&self) -> usize {
        match self {
            Self::Image(_) => 1,
            Self::Audio(sound) => sound.seconds().div_ceil(SECONDS_AT_ONCE) as usize,
        }
    }
}

impl From<Arc<Picture>> for Medium {
    fn from(picture: Arc<Picture>) -> Self {
        Self::Image(picture)
    }
}

impl From<Arc<Sound>> for Medium {
    fn from(sound: Arc<Sound>) -> Self {
        Self::Audio(sound)
    }
}

/// A prompt with pictures.
#[derive(Clone, Debug)]
pub struct MediaPrompt {
    /// Its tokens, those that stand for embeddings among them.
    pub tokens: Vec<Token>,
    /// Its pictures.
    pub media: Media,
}

/// The pictures of a prompt, in its order; the default is none.
#[derive(Clone, Debug, Default)]
pub struct Media {
    pub(super) pieces: Vec<MediaPiece>,
    _alive: Option<Arc<Share>>,
}

impl Media {
    pub(super) fn new(pieces: Vec<MediaPiece>, alive: Share) -> Self {
        Self { pieces, _alive: Some(Arc::new(alive)) }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The piece at a place in the prompt.
    pub(super) fn at(&self, place: usize) -> Option<&MediaPiece> {
        self.pieces.iter().find(|piece| piece.range().contains(&place))
    }

    /// Where the next piece begins, from a place on.
    pub(super) fn next(&self, place: usize) -> Option<usize> {
        self.pieces.iter().map(|piece| piece.start).find(|&start| start >= place)
    }

    /// The position of a place in the prompt or behind it that is not within a piece.
    pub(super) fn position(&self, place: usize) -> usize {
        let before = self.pieces.iter().filter(|piece| piece.range().end <= place);
        place - before.map(|piece| piece.tokens - piece.positions).sum::<usize>()
    }

    /// Whether these are the tokens that stand for them.
    pub(super) fn fits(&self, prompt: &[Token]) -> bool {
        let mut place = 0;
        for piece in &self.pieces {
            let range = piece.range();
            let text = prompt.get(place..range.start);
            let own = prompt.get(range.clone());
            if !text.is_some_and(|text| text.iter().all(|&token| token >= 0)) || !own.is_some_and(|own| piece.is(own)) {
                return false;
            }
            place = range.end;
        }
        prompt.get(place..).is_some_and(|text| text.iter().all(|&token| token >= 0))
    }
}

/// Images, and half minutes of sound, of prompts that may be there at the same time: they stay, scaled, until their
/// requests have been answered.
pub const MAX_MEDIA_ALIVE: usize = 128;

/// Why a prompt with images or sound cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MediaError {
    /// Other requests have as many as there may be.
    #[error("other requests have {limit} images or half minutes of audio already")]
    TooMany {
        /// Images and half minutes that there may be.
        limit: usize,
    },
    /// Something is wrong with text, images or sound.
    #[error("{0}")]
    Invalid(String),
}

impl From<String> for MediaError {
    fn from(reason: String) -> Self {
        Self::Invalid(reason)
    }
}

impl From<&str> for MediaError {
    fn from(reason: &str) -> Self {
        Self::Invalid(reason.to_owned())
    }
}

/// How many images and half minutes of sound there are.
#[derive(Debug, Default)]
pub(super) struct Alive(AtomicUsize);

/// Those of one request, which count until it is gone.
#[derive(Debug)]
pub(super) struct Share {
    of: Arc<Alive>,
    count: usize,
}

impl Alive {
    pub(super) fn take(alive: &Arc<Self>, count: usize) -> Result<Share, MediaError> {
        let more = |there: usize| there.checked_add(count).filter(|&all| all <= MAX_MEDIA_ALIVE);
        let taken = alive.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.map_err(|_| MediaError::TooMany { limit: MAX_MEDIA_ALIVE })?;
        Ok(Share { of: Arc::clone(alive), count })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// A picture, or a part of one, in a prompt.
#[derive(Clone)]
pub(super) struct MediaPiece {
    /// Where it comes from; its pixels stay for as long as the request.
    pub(super) pieces: Arc<Pieces>,
    /// Its number there.
    pub(super) index: usize,
    /// What tells it from others.
    pub(super) name: Token,
    /// Place of its first token.
    pub(super) start: usize,
    pub(super) tokens: usize,
    pub(super) positions: usize,
    /// It is of a sound.
    pub(super) sound: bool,
    /// It is to be computed at once, each embedding seeing all others.
    pub(super) non_causal: bool,
}

impl MediaPiece {
    pub(super) fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.tokens
    }

    fn is(&self, tokens: &[Token]) -> bool {
        tokens.iter().copied().eq(stand_ins(self.name, self.tokens, self.positions))
    }
}

impl fmt::Debug for MediaPiece {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, start, tokens, .. } = self;
        formatter.debug_struct("MediaPiece").field("name", name).field("start", start).field("tokens", tokens).finish()
    }
}

/// The tokens that stand for a piece.
pub(super) fn stand_ins(name: Token, tokens: usize, positions: usize) -> impl Iterator<Item = Token> {
    (0..tokens).map(move |place| match place {
        0 => name,
        _ if place < positions => NEXT,
        _ => SAME,
    })
}

/// The last place up to `place` at which a prompt can be cut.
pub(super) fn border(tokens: &[Token], place: usize) -> usize {
    let inside = |place: &usize| tokens.get(*place).is_some_and(|&token| token == NEXT || token == SAME);
    (0..=place).rev().find(|place| !inside(place)).unwrap_or(0)
}

/// Positions that tokens take which end at a border.
pub(super) fn positions(tokens: &[Token]) -> usize {
    tokens.iter().filter(|&&token| token != SAME).count()
}

/// Whether so many tokens take as many positions.
pub(super) fn is_even(tokens: &[Token]) -> bool {
    !tokens.contains(&SAME)
}

/// Names of pieces: digest of the picture, and number of the piece among its.
#[derive(Debug, Default)]
pub(super) struct Names(Mutex<NameTable>);

#[derive(Debug, Default)]
struct NameTable {
    known: HashMap<([u8; 32], u32), (Token, u64)>,
    given: Token,
    clock: u64,
}

impl Names {
    /// The name of a piece; `None` when there are no more, after two thousand million.
    pub(super) fn of(&self, digest: [u8; 32], number: u32) -> Option<Token> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let NameTable { known, given, clock } = &mut *table;
        *clock += 1;
        if let Some((name, used_at)) = known.get_mut(&(digest, number)) {
            *used_at = *clock;
            return Some(*name);
        }
        if known.len() >= MAX_NAMES {
            // Half at once, so that this is rare.
            let mut times: Vec<u64> = known.values().map(|(_, used_at)| *used_at).collect();
            let (_, &mut middle, _) = times.select_nth_unstable(MAX_NAMES / 2);
            known.retain(|_, (_, used_at)| *used_at >= middle);
        }
        let name = FIRST.checked_sub(*given)?;
        *given += 1;
        known.insert((digest, number), (name, *clock));
        Some(name)
    }
}

/// Bytes of embeddings that are kept.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// Embeddings that were computed lately. The last ones are always there, whatever they take.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The last used one last.
    entries: Vec<(Token, Arc<[f32]>)>,
}

impl Kept {
    pub(super) fn get(&mut self, name: Token) -> Option<Arc<[f32]>> {
        let index = self.entries.iter().position(|(known, _)| *known == name)?;
        let entry = self.entries.remove(index);
        let found = Arc::clone(&entry.1);
        self.entries.push(entry);
        Some(found)
    }

    pub(super) fn insert(&mut self, name: Token, embeddings: Arc<[f32]>) {
        self.entries.retain(|(known, _)| *known != name);
        self.entries.push((name, embeddings));
        while self.entries.len() > 1 && self.bytes() > MAX_KEPT_BYTES {
            self.entries.remove(0);
        }
    }

    fn bytes(&self) -> usize {
        self.entries.iter().map(|(_, embeddings)| size_of_val::<[f32]>(embeddings)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_never_cut() {
        let piece: Vec<Token> = stand_ins(FIRST, 5, 3).collect();
        assert_eq!(piece, [FIRST, NEXT, NEXT, SAME, SAME]);
        let prompt = [&[7, 8], &piece[..], &[9]].concat();
        let borders: Vec<usize> = (0..=prompt.len()).map(|place| border(&prompt, place)).collect();
        assert_eq!(borders, [0, 1, 2, 2, 2, 2, 2, 7, 8]);
        assert_eq!((positions(&prompt), positions(&prompt[..7]), positions(&prompt[..2])), (6, 5, 2));
        assert!(!is_even(&prompt) && is_even(&prompt[..2]));
    }

    #[test]
    fn there_are_never_too_many_images() {
        let alive = Arc::default();
        let most = Alive::take(&alive, MAX_MEDIA_ALIVE - 1).unwrap();
        let one = Alive::take(&alive, 1).unwrap();
        assert!(Alive::take(&alive, 1).is_err());
        drop(one);
        assert!(Alive::take(&alive, 2).is_err() && Alive::take(&alive, 1).is_ok());
        drop(most);
        assert!(Alive::take(&alive, MAX_MEDIA_ALIVE).is_ok());
    }

    #[test]
    fn names_tell_pieces_apart() {
        let names = Names::default();
        let name = |byte, number| names.of([byte; 32], number).unwrap();
        assert_eq!((name(1, 0), name(1, 1), name(2, 0)), (FIRST, FIRST - 1, FIRST - 2));
        assert_eq!((name(1, 0), name(2, 0)), (FIRST, FIRST - 2), "remembered");
        for number in 0..u32::try_from(MAX_NAMES).unwrap() {
            name(3, number);
            name(2, 0);
        }
        assert_eq!(name(2, 0), FIRST - 2, "used all the time");
        assert!(name(1, 0) < FIRST - 1000, "forgotten, and its name is not given again");
        assert!(names.0.lock().unwrap().known.len() <= MAX_NAMES);
    }

    #[test]
    fn embeddings_are_kept_within_a_bound() {
        let mut kept = Kept::default();
        let large = |part: usize| Arc::<[f32]>::from(vec![0.0; MAX_KEPT_BYTES / 4 / part]);
        kept.insert(-4, large(2));
        kept.insert(-5, large(4));
        assert!(kept.get(-4).is_some() && kept.get(-5).is_some() && kept.get(-6).is_none());
        assert!(kept.get(-4).is_some());
        kept.insert(-6, large(2));
        assert!(kept.get(-5).is_none(), "of no use for longest");
        assert!(kept.get(-4).is_some() && kept.bytes() <= MAX_KEPT_BYTES);
        kept.insert(-7, Arc::from(vec![0.0; MAX_KEPT_BYTES]));
        assert!(kept.get(-7).is_some() && kept.entries.len() == 1, "too large, but needed now");
    }
}

//! Projectors: from pictures to embeddings.

use std::any::Any;
use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use altiplano_crds::model_deployment::FlashAttention;
use llama_cpp_sys_2 as sys;

use super::params::flash_attention_type;
use super::{Model, backend, log, shim};
use crate::engine::media::{Medium, SECONDS_AT_ONCE};
use crate::engine::request::Token;
use crate::runner::protocol::MemoryUse;

/// How a projector is loaded.
#[derive(Clone, Debug)]
pub(in crate::engine) struct ProjectorParams<'path> {
    /// The file.
    pub(in crate::engine) path: &'path Path,
    /// llama.cpp's name of the device; `None`: the CPU.
    pub(in crate::engine) device: Option<&'path str>,
    /// CPU threads.
    pub(in crate::engine) threads: u32,
    /// Flash attention.
    pub(in crate::engine) flash_attention: FlashAttention,
}

/// What a projector's file asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in crate::engine) struct ProjectorNeeds {
    /// Bytes per device, host memory as "CPU"; all of them in `weights_bytes`.
    pub(in crate::engine) memory: Vec<MemoryUse>,
    /// Tokens that have to fit into one micro-batch.
    pub(in crate::engine) together: u32,
}

/// A loaded projector; clones share it. What is done here may be done by several threads.
#[derive(Clone)]
pub(in crate::engine) struct Projector {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<shim::Projector>,
    marker: String,
    facts: shim::ProjectorFacts,
    /// Numbers in an embedding.
    width: usize,
    /// Tokens that can be computed at once.
    together: usize,
    /// Whose embeddings they are; outlives the projector.
    _model: Model,
}

// SAFETY: mtmd splits prompts on any thread and on several at once; encoding takes the one `Encoder` mutably.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the projector is ours, and nobody uses it any more.
        unsafe { shim::altiplano_projector_free(self.raw.as_ptr()) };
    }
}

/// What computes with a projector; there is one of each.
pub(in crate::engine) struct Encoder {
    projector: Projector,
}

/// A prompt in pieces, of text, pictures and sound.
pub(in crate::engine) struct Pieces {
    raw: NonNull<sys::mtmd_input_chunks>,
    projector: Projector,
}

// SAFETY: nothing changes the pieces once they are made.
unsafe impl Send for Pieces {}
// SAFETY: as above.
unsafe impl Sync for Pieces {}

/// One piece of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Piece<'a> {
    /// Text.
    Text(&'a [Token]),
    /// A picture or a sound, or a part of one.
    Medium {
        /// Number of that picture or sound.
        medium: usize,
        /// It is a sound.
        sound: bool,
        /// Embeddings, and cells of the KV cache.
        tokens: usize,
        /// By how much the position after it is higher.
        positions: usize,
        /// Each embedding sees all others.
        non_causal: bool,
    },
}

/// The text that stands for a picture, for mtmd's own needs where there are none.
const NO_MARKER: &str = "<__media__>";

impl ProjectorParams<'_> {
    fn raw<T>(&self, marker: &str, call: impl FnOnce(&shim::ProjectorParams) -> T) -> Result<T, String> {
        backend::backend()?;
        let path = CString::new(self.path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
        let device = self.device.map(CString::new).transpose().map_err(|error| error.to_string())?;
        let marker = CString::new(marker).map_err(|error| error.to_string())?;
        Ok(call(&shim::ProjectorParams {
            path: path.as_ptr(),
            device: device.as_ref().map_or(ptr::null(), |device| device.as_ptr()),
            marker: marker.as_ptr(),
            threads: i32::try_from(self.threads.max(1)).unwrap_or(1),
            flash_attention: flash_attention_type(self.flash_attention),
        }))
    }

    /// What the projector would take; no weights are read. The error is llama.cpp's own words.
    pub(in crate::engine) fn needs(&self) -> Result<ProjectorNeeds, String> {
        let empty = shim::Memory { device: ptr::null(), model: 0, context: 0, compute: 0, mapped: 0 };
        let mut entries = [empty; 64];
        let mut needs = shim::ProjectorNeeds { most_tokens: 0, non_causal: false };
        let mut error = shim::Error::new();
        let count = self.raw(NO_MARKER, |params| {
            // SAFETY: the strings end with a zero and live through the call, and the array has as many entries as is said.
            unsafe {
                shim::altiplano_projector_memory(
                    params,
                    entries.as_mut_ptr(),
                    entries.len(),
                    &raw mut needs,
                    &raw mut error,
                )
            }
        })?;
        if count == usize::MAX {
            let text = error.text();
            return Err(if text.is_empty() { "it is no projector that llama.cpp knows".to_owned() } else { text });
        }
        let together = if needs.non_causal { u32::try_from(needs.most_tokens).unwrap_or(0) } else { 0 };
        let memory = entries.iter().take(count).map(|entry| MemoryUse {
            // SAFETY: the names are literals or those of devices, which live as long as the process.
            device: unsafe { shim::device_name(entry) },
            weights_bytes: entry.model,
            ..MemoryUse::default()
        });
        Ok(ProjectorNeeds { memory: memory.collect(), together })
    }
}

impl Projector {
    /// Loads a projector for a model and computes one picture, so that all memory is taken. `marker` stands in texts
    /// where a picture belongs; contexts compute `together` tokens at once. The error is llama.cpp's own words.
    pub(in crate::engine) fn load(
        model: &Model,
        params: &ProjectorParams<'_>,
        marker: String,
        together: u32,
    ) -> Result<(Self, Encoder), String> {
        if model.is_dry_run() {
            return Err("the weights were not read".to_owned());
        }
        let mut error = shim::Error::new();
        let (raw, errors) = log::with_errors(|| {
            params.raw(&marker, |params| {
                // SAFETY: the model is alive and outlives the projector; the strings end with a zero.
                unsafe { shim::altiplano_projector_new(model.raw(), params, &raw mut error) }
            })
        });
        let Some(raw) = NonNull::new(raw?) else {
            let text = error.text();
            return Err(if text.is_empty() { errors } else { text });
        };
        // SAFETY: the projector was just made.
        let facts = unsafe { shim::altiplano_projector_facts_of(raw.as_ptr()) };
        // SAFETY: the model is alive.
        let width = usize::try_from(unsafe { sys::llama_model_n_embd_inp(model.raw()) }).unwrap_or(0);
        let together = together as usize;
        let inner = Inner { raw, marker, facts, width, together, _model: model.clone() };
        let projector = Self { inner: Arc::new(inner) };
        Ok((projector.clone(), Encoder { projector }))
    }

    /// Whether it reads images.
    pub(in crate::engine) fn sees(&self) -> bool {
        self.inner.facts.vision
    }

    /// Samples of a second of the sound that it reads; `None`: it reads no sound.
    pub(in crate::engine) fn audio_rate(&self) -> Option<u32> {
        u32::try_from(self.inner.facts.sample_rate).ok().filter(|rate| self.inner.facts.audio && *rate > 0)
    }

    /// What stands in a text where a picture or a sound belongs.
    pub(in crate::engine) fn marker(&self) -> &str {
        &self.inner.marker
    }

    /// Splits a text with a marker for each picture and sound, in their order. They are scaled and made spectra as the
    /// projector wants them, which takes milliseconds.
    pub(in crate::engine) fn split(&self, text: &str, add_special: bool, media: &[Medium]) -> Result<Pieces, String> {
        if text.matches(self.marker()).count() != media.len() {
            return Err("the text has not as many places as there are images and sounds".to_owned());
        }
        let raw_media = media.iter().map(|medium| self.raw_medium(medium)).collect::<Result<Vec<_>, _>>()?;
        let mut error = shim::Error::new();
        let (raw, errors) = log::with_errors(|| {
            // SAFETY: the projector is alive; text and media live through the call, each picture has three bytes for each
            // of its pixels, and each sound as many samples as is said, and some.
            unsafe {
                shim::altiplano_media_split(
                    self.inner.raw.as_ptr(),
                    text.as_ptr().cast(),
                    text.len(),
                    add_special,
                    raw_media.as_ptr(),
                    raw_media.len(),
                    &raw mut error,
                )
            }
        });
        let raw = NonNull::new(raw).ok_or_else(|| if errors.is_empty() { error.text() } else { errors })?;
        let pieces = Pieces { raw, projector: self.clone() };
        self.check(&pieces, media)?;
        Ok(pieces)
    }

    fn raw_medium(&self, medium: &Medium) -> Result<shim::Medium, &'static str> {
        match medium {
            Medium::Image(picture) if self.sees() => Ok(shim::Medium {
                width: picture.width(),
                height: picture.height(),
                pixels: picture.pixels().as_ptr(),
                samples: ptr::null(),
                count: 0,
            }),
            Medium::Image(_) => Err("this projector reads no images"),
            Medium::Audio(sound) if self.audio_rate() == Some(sound.rate()) => Ok(shim::Medium {
                width: 0,
                height: 0,
                pixels: ptr::null(),
                samples: sound.samples().as_ptr(),
                count: sound.samples().len(),
            }),
            Medium::Audio(_) if self.audio_rate().is_some() => Err("the sound has another sample rate"),
            Medium::Audio(_) => Err("this projector reads no audio"),
        }
    }

    /// Whether each piece can be computed with the memory that there is.
    fn check(&self, pieces: &Pieces, media: &[Medium]) -> Result<(), String> {
        let mut parts = vec![0_u32; media.len()];
        for piece in (0..pieces.len()).filter_map(|index| pieces.get(index)) {
            let Piece::Medium { medium, tokens, non_causal, .. } = piece else { continue };
            if non_causal && tokens > self.inner.together {
                let most = self.inner.together;
                return Err(format!("an image has {tokens} tokens, and {most} can be computed at once"));
            }
            match parts.get_mut(medium) {
                Some(parts) if tokens > 0 => *parts += 1,
                _ => return Err("a part of an image or a sound has no tokens".to_owned()),
            }
        }
        for (medium, parts) in media.iter().zip(parts) {
            // Memory was taken for so many; a projector that does not part longer sound itself would need more, or has no
            // positions for it and aborts.
            if let Medium::Audio(sound) = medium
                && sound.seconds() > SECONDS_AT_ONCE * parts
            {
                return Err(format!(
                    "this model reads {SECONDS_AT_ONCE} seconds of audio at once, not {}",
                    sound.seconds()
                ));
            }
        }
        Ok(())
    }
}

impl Pieces {
    /// How many there are.
    pub(in crate::engine) fn len(&self) -> usize {
        // SAFETY: the pieces are alive.
        unsafe { shim::altiplano_media_count(self.raw.as_ptr()) }
    }

    /// One of them.
    pub(in crate::engine) fn get(&self, index: usize) -> Option<Piece<'_>> {
        let mut out = shim::Piece { kind: 0, medium: 0, tokens: 0, positions: 0, non_causal: false, text: ptr::null() };
        let projector = self.projector.inner.raw.as_ptr();
        // SAFETY: projector and pieces are alive; the index is checked there.
        if !unsafe { shim::altiplano_media_piece(projector, self.raw.as_ptr(), index, &raw mut out) } {
            return None;
        }
        if out.kind != sys::MTMD_INPUT_CHUNK_TYPE_TEXT {
            let positions = usize::try_from(out.positions).ok()?;
            let shim::Piece { kind, medium, tokens, non_causal, .. } = out;
            let sound = kind == sys::MTMD_INPUT_CHUNK_TYPE_AUDIO;
            return Some(Piece::Medium { medium, sound, tokens, positions, non_causal });
        }
        if out.text.is_null() || out.tokens == 0 {
            return Some(Piece::Text(&[]));
        }
        // SAFETY: mtmd's own array of so many tokens, which lives as long as the pieces.
        Some(Piece::Text(unsafe { std::slice::from_raw_parts(out.text, out.tokens) }))
    }

    /// Positions of a picture or sound that begins at `first`, section by section.
    pub(in crate::engine) fn positions(&self, index: usize, first: usize) -> Option<Vec<i32>> {
        let Some(Piece::Medium { tokens, .. }) = self.get(index) else { return None };
        let first = i32::try_from(first).ok()?;
        let mut out = vec![0; tokens * self.projector.sections()];
        let projector = self.projector.inner.raw.as_ptr();
        // SAFETY: projector and pieces are alive, and the array has as many entries as is said.
        let known = unsafe {
            shim::altiplano_media_positions(projector, self.raw.as_ptr(), index, first, out.as_mut_ptr(), out.len())
        };
        known.then_some(out)
    }
}

impl Projector {
    /// Numbers in the position of a token.
    fn sections(&self) -> usize {
        if self.inner.facts.mrope { 4 } else { 1 }
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        // SAFETY: the pieces are ours, and nobody uses them any more.
        unsafe { sys::mtmd_input_chunks_free(self.raw.as_ptr()) };
    }
}

/// What is called between two parts of an encoder's graph.
struct Pause<'a> {
    go_on: &'a mut dyn FnMut() -> bool,
    panic: Option<Box<dyn Any + Send>>,
}

impl Encoder {
    /// The embeddings of a picture or sound, one after the other. `go_on` is called about every few milliseconds of work; its
    /// false ends it: `Ok(None)`. The error is llama.cpp's own words.
    pub(in crate::engine) fn encode(
        &mut self,
        pieces: &Pieces,
        index: usize,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Vec<f32>>, String> {
        if !Arc::ptr_eq(&self.projector.inner, &pieces.projector.inner) {
            return Err("a picture for another projector".to_owned());
        }
        let Some(Piece::Medium { tokens, .. }) = pieces.get(index) else { return Err("no picture".to_owned()) };
        let mut out = vec![0.0; tokens * self.projector.inner.width];
        let mut pause = Pause { go_on, panic: None };
        let mut error = shim::Error::new();
        let (result, errors) = log::with_errors(|| {
            // SAFETY: projector and pieces are alive, nobody else encodes, `out` has as many entries as is said, and
            // `pause` lives through the call, which alone uses it.
            unsafe {
                shim::altiplano_media_encode(
                    self.projector.inner.raw.as_ptr(),
                    pieces.raw.as_ptr(),
                    index,
                    out.as_mut_ptr(),
                    out.len(),
                    on_pause,
                    (&raw mut pause).cast(),
                    &raw mut error,
                )
            }
        });
        if let Some(panic) = pause.panic {
            panic::resume_unwind(panic);
        }
        match result {
            0 => Ok(Some(out)),
            1 => Ok(None),
            _ => Err(format!("{}: {errors}", error.text())),
        }
    }
}

unsafe extern "C" fn on_pause(data: *mut c_void) -> bool {
    // SAFETY: `encode` passes this, and it is there for as long as the call.
    let pause = unsafe { &mut *data.cast::<Pause<'_>>() };
    // A panic must not go through C++.
    match panic::catch_unwind(AssertUnwindSafe(|| (pause.go_on)())) {
        Ok(go_on) => go_on,
        Err(panic) => {
            pause.panic = Some(panic);
            false
        }
    }
}

/// Has llama.cpp's own helper read a prompt as sequence 0 of an empty context, and returns the row of its last token.
#[cfg(test)]
pub(in crate::engine) fn read_by_helper(pieces: &Pieces, context: &mut super::Context) -> Result<i32, String> {
    let mut end = 0;
    let batch = i32::try_from(context.batch()).map_err(|error| error.to_string())?;
    // SAFETY: all three are alive, and nobody else uses the context or encodes.
    let result = unsafe {
        let projector = shim::altiplano_projector_context(pieces.projector.inner.raw.as_ptr());
        sys::mtmd_helper_eval_chunks(projector, context.raw(), pieces.raw.as_ptr(), 0, 0, batch, true, &raw mut end)
    };
    if result == 0 { Ok(context.last_row()) } else { Err(format!("code {result}")) }
}

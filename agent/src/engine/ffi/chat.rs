//! Declarations of `shim_chat.h`, made safe: chat templates, and what reads the output of a model that was given one.

use std::ffi::{CStr, CString, c_char};
use std::ptr::NonNull;

use llama_cpp_sys_2::llama_model;

use super::Model;

/// Bytes of stack that a call is given: more than `ALTIPLANO_CHAT_STACK`. Memory is taken only for what is used of it.
const STACK: usize = 256 << 20;

/// The compiled chat templates of a model.
pub(in crate::engine) struct ChatTemplates {
    raw: NonNull<RawChat>,
}

// SAFETY: nothing changes it once it is made, and llama.cpp shares a template's program between threads itself.
unsafe impl Send for ChatTemplates {}
// SAFETY: as above.
unsafe impl Sync for ChatTemplates {}

impl ChatTemplates {
    /// Compiles `source`, or without one the templates in the model's file. Without a model, `bos` and `eos` are the
    /// texts of its tokens. The error is llama.cpp's own words.
    pub(in crate::engine) fn new(
        model: Option<&Model>,
        source: Option<&str>,
        bos: &str,
        eos: &str,
    ) -> Result<Self, String> {
        if model.is_none() && source.is_none() {
            return Err("there is no chat template".to_owned());
        }
        let text = |text: &str| CString::new(text).map_err(|_| "the template has a zero byte".to_owned());
        let source = source.map(text).transpose()?;
        let (bos, eos) = (text(bos)?, text(eos)?);
        let model = model.map_or(std::ptr::null(), |model| model.raw().cast_const());
        let mut error = Error::new();
        let raw = on_large_stack(|| {
            let source = source.as_ref().map_or(std::ptr::null(), |source| source.as_ptr());
            // SAFETY: the model, if there is one, and the strings live through the call, which keeps none of them.
            unsafe { altiplano_chat_new(model, source, bos.as_ptr(), eos.as_ptr(), &raw mut error) }
        });
        NonNull::new(raw).map(|raw| Self { raw }).ok_or_else(|| error.text())
    }

    /// What the templates can do, as a JSON object of booleans.
    pub(in crate::engine) fn capabilities(&self) -> Result<String, String> {
        self.text(|raw, out, error| {
            // SAFETY: the templates are alive, and the shim fills `out` when it returns 0.
            unsafe { altiplano_chat_capabilities(raw, out, error) }
        })
    }

    /// Renders a conversation: JSON in, JSON out, as `shim_chat.cpp` reads and writes it.
    pub(in crate::engine) fn apply(&self, request: &str) -> Result<String, String> {
        self.text(|raw, out, error| {
            // SAFETY: as above; the request is as long as is said.
            unsafe { altiplano_chat_apply(raw, request.as_ptr().cast(), request.len(), out, error) }
        })
    }

    fn text(&self, call: impl FnOnce(*const RawChat, *mut Text, *mut Error) -> i32) -> Result<String, String> {
        let mut out = Text::none();
        let mut error = Error::new();
        let code = on_large_stack(|| call(self.raw.as_ptr(), &raw mut out, &raw mut error));
        if code == 0 { Ok(out.take()) } else { Err(error.text()) }
    }
}

impl Drop for ChatTemplates {
    fn drop(&mut self) {
        // A tree is freed by recursion.
        on_large_stack(|| {
            // SAFETY: it is ours and is not used any more.
            unsafe { altiplano_chat_free(self.raw.as_ptr()) }
        });
    }
}

/// Reads the output of one request.
pub(in crate::engine) struct ChatReader {
    raw: NonNull<RawReader>,
}

// SAFETY: it holds no state of a thread; it is used by one at a time, because every use takes `&mut`.
unsafe impl Send for ChatReader {}

impl ChatReader {
    /// The arguments are what [`ChatTemplates::apply`] said.
    pub(in crate::engine) fn new(format: i32, parser: &str, generation_prompt: &str) -> Result<Self, String> {
        let mut error = Error::new();
        let raw = on_large_stack(|| {
            // SAFETY: the texts are as long as is said.
            unsafe {
                altiplano_chat_reader_new(
                    format,
                    parser.as_ptr().cast(),
                    parser.len(),
                    generation_prompt.as_ptr().cast(),
                    generation_prompt.len(),
                    &raw mut error,
                )
            }
        });
        NonNull::new(raw).map(|raw| Self { raw }).ok_or_else(|| error.text())
    }

    /// The message that `output` is, as JSON; `partial`: more of it may come.
    pub(in crate::engine) fn read(&mut self, output: &str, partial: bool) -> Result<String, String> {
        let mut out = Text::none();
        let mut error = Error::new();
        let code = on_large_stack(|| {
            // SAFETY: the reader is alive, the output is as long as is said, and the shim fills `out` when it returns 0.
            unsafe {
                altiplano_chat_read(
                    self.raw.as_ptr(),
                    output.as_ptr().cast(),
                    output.len(),
                    partial,
                    &raw mut out,
                    &raw mut error,
                )
            }
        });
        if code == 0 { Ok(out.take()) } else { Err(error.text()) }
    }
}

impl Drop for ChatReader {
    fn drop(&mut self) {
        // SAFETY: it is ours and is not used any more.
        unsafe { altiplano_chat_reader_free(self.raw.as_ptr()) };
    }
}

/// Templates and parsers recurse as deep as what they are given nests.
fn on_large_stack<T>(call: impl FnOnce() -> T) -> T {
    stacker::grow(STACK, call)
}

/// The shim's `altiplano_chat`.
#[repr(C)]
struct RawChat {
    _opaque: [u8; 0],
}

/// The shim's `altiplano_chat_reader`.
#[repr(C)]
struct RawReader {
    _opaque: [u8; 0],
}

/// Text of a caught exception.
#[repr(C)]
struct Error {
    text: [c_char; 4096],
}

impl Error {
    fn new() -> Self {
        Self { text: [0; 4096] }
    }

    fn text(&self) -> String {
        // SAFETY: the shim writes with snprintf, which ends the text with a zero within the array, and the array
        // begins as zeros.
        unsafe { CStr::from_ptr(self.text.as_ptr()) }.to_string_lossy().into_owned()
    }
}

/// Text that the shim has allocated.
#[repr(C)]
struct Text {
    data: *mut c_char,
    size: usize,
}

impl Text {
    fn none() -> Self {
        Self { data: std::ptr::null_mut(), size: 0 }
    }

    fn take(self) -> String {
        if self.data.is_null() {
            return String::new();
        }
        // SAFETY: the shim has written `size` bytes there, and nobody else has them.
        let bytes = unsafe { std::slice::from_raw_parts(self.data.cast::<u8>(), self.size) };
        let text = String::from_utf8_lossy(bytes).into_owned();
        // SAFETY: the shim allocated it, and it is not used any more.
        unsafe { altiplano_text_free(self) };
        text
    }
}

unsafe extern "C" {
    fn altiplano_text_free(text: Text);
    fn altiplano_chat_new(
        model: *const llama_model,
        source: *const c_char,
        bos: *const c_char,
        eos: *const c_char,
        error: *mut Error,
    ) -> *mut RawChat;
    fn altiplano_chat_free(chat: *mut RawChat);
    fn altiplano_chat_capabilities(chat: *const RawChat, out: *mut Text, error: *mut Error) -> i32;
    fn altiplano_chat_apply(
        chat: *const RawChat,
        request: *const c_char,
        size: usize,
        out: *mut Text,
        error: *mut Error,
    ) -> i32;
    fn altiplano_chat_reader_new(
        format: i32,
        parser: *const c_char,
        parser_size: usize,
        generation_prompt: *const c_char,
        prompt_size: usize,
        error: *mut Error,
    ) -> *mut RawReader;
    fn altiplano_chat_reader_free(reader: *mut RawReader);
    fn altiplano_chat_read(
        reader: *const RawReader,
        text: *const c_char,
        size: usize,
        partial: bool,
        out: *mut Text,
        error: *mut Error,
    ) -> i32;
}

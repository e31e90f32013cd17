//! LoRA adapters.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

use llama_cpp_sys_2::{self as sys, llama_adapter_lora};

use super::{Model, log};

/// A LoRA adapter beside the weights of its model.
pub(in crate::engine) struct Adapter {
    raw: NonNull<llama_adapter_lora>,
    /// Whose it is: llama.cpp frees the adapter with the model.
    _model: Model,
}

// SAFETY: llama.cpp ties an adapter to no thread, and nothing changes it once it is loaded.
unsafe impl Send for Adapter {}

impl Adapter {
    /// Reads an adapter. To be called before the model has a context: llama.cpp plans contexts with the adapters that
    /// are there. The error is llama.cpp's own words.
    pub(in crate::engine) fn load(model: &Model, path: &Path) -> Result<Self, String> {
        if model.is_dry_run() {
            return Err("the weights were not read".to_owned());
        }
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
        let (raw, errors) = log::with_errors(|| {
            // SAFETY: the model is alive, nobody else uses it yet, and the path ends with a zero. llama.cpp catches
            // what it throws.
            unsafe { sys::llama_adapter_lora_init(model.raw(), name.as_ptr()) }
        });
        let raw = NonNull::new(raw).ok_or(errors)?;
        Ok(Self { raw, _model: model.clone() })
    }

    pub(super) fn raw(&self) -> NonNull<llama_adapter_lora> {
        self.raw
    }
}

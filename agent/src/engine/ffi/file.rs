//! The header of a model file.

use std::ffi::{CStr, CString};
use std::path::Path;
use std::ptr;

use llama_cpp_sys_2 as sys;

/// Whether the file names a tensor so. Of a split model only the first part is looked at.
pub(in crate::engine) fn file_has_tensor(path: &Path, name: &CStr) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_encoded_bytes()) else { return false };
    let params = sys::gguf_init_params { no_alloc: true, ctx: ptr::null_mut() };
    // SAFETY: the path is a C string that lives through the call; nothing is allocated for tensors. llama.cpp answers null
    // for what it cannot read, and it has read this header when the model was loaded.
    let file = unsafe { sys::gguf_init_from_file(path.as_ptr(), params) };
    if file.is_null() {
        return false;
    }
    // SAFETY: the file is there and not used after it is freed; the name is a C string.
    unsafe {
        let found = sys::gguf_find_tensor(file, name.as_ptr()) >= 0;
        sys::gguf_free(file);
        found
    }
}

//! The drivers behind devices, which ggml does not name.

use std::ffi::{CStr, c_char};

use super::shim;

/// More devices than any machine has.
const MAX_DEVICES: usize = 64;

/// Vulkan's devices by name, each with its driver's name and version. For a child that only looks: it makes an instance
/// of its own.
pub(in crate::engine) fn vulkan_drivers() -> Vec<(String, String)> {
    let empty = shim::Driver { device: [0; 256], name: [0; 256], version: [0; 256] };
    let mut found = vec![empty; MAX_DEVICES];
    // SAFETY: the array has as many entries as is said.
    let count = unsafe { shim::altiplano_vulkan_drivers(found.as_mut_ptr(), found.len()) };
    found.iter().take(count).map(|driver| (text(&driver.device), words(driver))).collect()
}

/// Whether CUDA could have devices here: it is built in, and NVIDIA's driver is there.
#[cfg(feature = "cuda")]
pub(in crate::engine) fn has_cuda() -> bool {
    // SAFETY: has no arguments; loads a library that CUDA loads too, once.
    unsafe { shim::altiplano_cuda_driver() }
}

/// Whether CUDA could have devices here: it is built in, and NVIDIA's driver is there.
#[cfg(not(feature = "cuda"))]
pub(in crate::engine) fn has_cuda() -> bool {
    false
}

fn words(driver: &shim::Driver) -> String {
    format!("{} {}", text(&driver.name), text(&driver.version)).trim().to_owned()
}

fn text(characters: &[c_char; 256]) -> String {
    // SAFETY: the shim writes with snprintf, which ends the text with a zero within the array, and the array begins as
    // zeros.
    unsafe { CStr::from_ptr(characters.as_ptr()) }.to_string_lossy().into_owned()
}

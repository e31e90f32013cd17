//! Backends and devices.

use std::ffi::CStr;
use std::sync::OnceLock;

use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::{LlamaBackendDeviceType, list_llama_ggml_backend_devices};
use llama_cpp_sys_2 as sys;

use super::log;
use crate::cgroup::{self, GroupMemory};

/// A device as llama.cpp sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::engine) struct Device {
    /// llama.cpp's index.
    pub(in crate::engine) index: usize,
    /// llama.cpp's name, such as "Vulkan0" or "CPU".
    pub(in crate::engine) name: String,
    /// What the driver calls it.
    pub(in crate::engine) description: String,
    /// The backend.
    pub(in crate::engine) backend: String,
    /// GPU, `IntegratedGPU`, Accelerator or CPU.
    pub(in crate::engine) kind: &'static str,
    /// Bytes in all.
    pub(in crate::engine) total: u64,
    /// Bytes free right now.
    pub(in crate::engine) free: u64,
}

/// Keeps llama.cpp from looking for Vulkan devices in this process.
///
/// Before anything else of llama.cpp, which looks at it when it starts.
pub(in crate::engine) fn without_vulkan() {
    // SAFETY: a runner calls this when it has read its configuration, before it starts its first thread, so nobody reads
    // or changes the environment meanwhile.
    unsafe { std::env::set_var("GGML_DISABLE_VULKAN", "1") }
}

/// llama.cpp, initialised once in a process; logs go to tracing from then on.
pub(super) fn backend() -> Result<&'static LlamaBackend, String> {
    static BACKEND: OnceLock<Result<LlamaBackend, String>> = OnceLock::new();
    BACKEND
        .get_or_init(|| {
            log::install();
            LlamaBackend::init().map_err(|error| error.to_string())
        })
        .as_ref()
        .map_err(Clone::clone)
}

/// llama.cpp's own version, such as "0.6.0".
pub(in crate::engine) fn version() -> String {
    // SAFETY: a pointer to a constant that ends with a zero byte.
    unsafe { CStr::from_ptr(sys::llama_version()) }.to_string_lossy().into_owned()
}

/// The devices of this process; the first call opens them.
pub(in crate::engine) fn devices() -> Result<Vec<Device>, String> {
    backend()?;
    Ok(list_llama_ggml_backend_devices()
        .into_iter()
        .map(|device| Device {
            index: device.index,
            name: device.name,
            description: device.description,
            backend: device.backend,
            kind: match device.device_type {
                LlamaBackendDeviceType::Gpu => "GPU",
                LlamaBackendDeviceType::IntegratedGpu => "IntegratedGPU",
                LlamaBackendDeviceType::Accelerator => "Accelerator",
                LlamaBackendDeviceType::Cpu | LlamaBackendDeviceType::Unknown => "CPU",
            },
            total: device.memory_total as u64,
            free: device.memory_free as u64,
        })
        .collect())
}

/// Bytes that can still be had on a device; `None` where nobody knows. llama.cpp calls all of the machine's memory
/// free, so for the CPU the kernel and the control group are asked.
pub(in crate::engine) fn available_bytes(device: &str) -> Option<u64> {
    if device != "CPU" {
        return devices().ok()?.into_iter().find(|found| found.name == device).map(|found| found.free);
    }
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo_available(&text));
    match (machine, cgroup::tightest().map(GroupMemory::left)) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_says() {
        assert_eq!(meminfo_available("MemTotal:  5 kB\nMemAvailable:    3 kB\n"), Some(3072));
        assert_eq!(meminfo_available("MemTotal:  5 kB\n"), None);
        assert!(available_bytes("CPU").is_some_and(|bytes| bytes > 0));
        assert_eq!(available_bytes("Abacus0"), None);
    }

    #[test]
    fn the_cpu_is_always_there() {
        let found = devices().expect("llama.cpp starts");
        assert!(found.iter().any(|device| device.kind == "CPU" && device.total > 0), "{found:?}");
    }
}

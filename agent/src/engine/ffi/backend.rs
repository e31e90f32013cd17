//! Backends and devices.

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_sys_2 as sys;

use super::log;
use crate::cgroup::{self, GroupMemory};

/// The variable by which CUDA is told what devices there are.
pub(super) const CUDA_DEVICES: &str = "CUDA_VISIBLE_DEVICES";

/// A device as llama.cpp sees it, whether or not this process has opened it.
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
}

/// What only a device that is open says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::engine) struct DeviceMemory {
    /// Bytes in all.
    pub(in crate::engine) total: u64,
    /// Bytes free right now.
    pub(in crate::engine) free: u64,
    /// Its place on PCI, such as `0000:17:00.0`; empty where the backend does not say.
    pub(in crate::engine) pci: String,
}

impl Device {
    /// Opens the device: CUDA takes some hundred MiB of it for a process that has asked.
    pub(in crate::engine) fn open(&self) -> DeviceMemory {
        let mut props = std::mem::MaybeUninit::<sys::ggml_backend_dev_props>::zeroed();
        // SAFETY: the index is of the list, which only grows; zeros are valid in all fields, and it writes to no others.
        let props = unsafe {
            sys::ggml_backend_dev_get_props(sys::ggml_backend_dev_get(self.index), props.as_mut_ptr());
            props.assume_init()
        };
        // SAFETY: null, or the device's own text.
        let pci = unsafe { text(props.device_id) };
        DeviceMemory { total: props.memory_total as u64, free: unwrapped(props.memory_free as u64), pci }
    }
}

/// Keeps llama.cpp from looking for GPUs in this process.
///
/// Before anything else of llama.cpp, which looks at it when it starts.
pub(in crate::engine) fn without_gpus() {
    // SAFETY: a runner calls this when it has read its configuration, before it starts its first thread, so nobody reads
    // or changes the environment meanwhile.
    unsafe {
        std::env::set_var("GGML_DISABLE_VULKAN", "1");
        std::env::set_var(CUDA_DEVICES, "");
    }
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

/// The devices of this process. Not by the bindings' list, which opens each: a worker takes memory of those alone that it was
/// granted.
pub(in crate::engine) fn devices() -> Result<Vec<Device>, String> {
    backend()?;
    // SAFETY: of a list that only grows; the device, its backend and their texts live as long as the process.
    let device = |index| unsafe {
        let device = sys::ggml_backend_dev_get(index);
        Device {
            index,
            name: text(sys::ggml_backend_dev_name(device)),
            description: text(sys::ggml_backend_dev_description(device)),
            backend: text(sys::ggml_backend_reg_name(sys::ggml_backend_dev_backend_reg(device))),
            kind: match sys::ggml_backend_dev_type(device) {
                sys::GGML_BACKEND_DEVICE_TYPE_GPU => "GPU",
                sys::GGML_BACKEND_DEVICE_TYPE_IGPU => "IntegratedGPU",
                sys::GGML_BACKEND_DEVICE_TYPE_ACCEL => "Accelerator",
                _ => "CPU",
            },
        }
    };
    // SAFETY: has no arguments; the first call makes the list, once.
    Ok((0..unsafe { sys::ggml_backend_dev_count() }).map(device).collect())
}

/// # Safety
///
/// Null, or a text that ends with a zero and lives until the call returns.
unsafe fn text(characters: *const c_char) -> String {
    if characters.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(characters) }.to_string_lossy().into_owned()
}

/// A driver may allow a process less than it has taken (`VK_EXT_memory_budget`), and llama.cpp says the difference without a
/// sign.
fn unwrapped(free: u64) -> u64 {
    if i64::try_from(free).is_ok() { free } else { 0 }
}

/// Bytes that can still be had on a device; `None` where nobody knows. llama.cpp calls all of the machine's memory
/// free, so for the CPU the kernel and the control group are asked.
pub(in crate::engine) fn available_bytes(device: &str) -> Option<u64> {
    if device != "CPU" {
        return devices().ok()?.into_iter().find(|found| found.name == device).map(|found| found.open().free);
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
    fn less_than_nothing_is_not_much() {
        assert_eq!(unwrapped(5), 5);
        assert_eq!(unwrapped(5_u64.wrapping_sub(7)), 0);
    }

    #[test]
    fn the_cpu_is_always_there() {
        let found = devices().expect("llama.cpp starts");
        assert!(found.iter().any(|device| device.kind == "CPU" && device.open().total > 0), "{found:?}");
    }
}

//! The devices that there are, and those that the agent granted.

use super::EngineError;
use crate::engine::ffi::{self, Device, DeviceMemory};
use crate::nvml;
use crate::runner::protocol::{ProbeReport, ProbedDevice, RunnerConfig};

/// The devices that llama.cpp sees in this process, the CPU last. It opens them.
pub(in crate::engine) fn probe() -> Result<ProbeReport, EngineError> {
    // Before they are opened, which takes memory of them.
    let seen = nvml::look();
    if cfg!(feature = "cuda") && !ffi::has_cuda() {
        tracing::warn!("no NVIDIA driver (libcuda.so.1) here, so no CUDA devices");
    }
    let found = ffi::devices().map_err(EngineError::Internal)?;
    let vulkan = ffi::vulkan_drivers();
    let mut devices: Vec<_> = found
        .into_iter()
        .map(|device| {
            let DeviceMemory { total, free, pci } = device.open();
            let Device { index: _, name, description, backend, kind } = device;
            let driver = driver_of(&backend, &description, &vulkan);
            let mut probed = ProbedDevice {
                id: name,
                description,
                backend,
                kind: kind.to_owned(),
                memory_total_bytes: total,
                memory_free_bytes: free,
                driver,
                pci,
                ..ProbedDevice::default()
            };
            if let Some(seen) = &seen {
                seen.complete(&mut probed);
            }
            probed
        })
        .collect();
    once_each(&mut devices);
    devices.sort_by_key(|device| device.kind == "CPU");
    let mut backends: Vec<String> = Vec::new();
    for device in &devices {
        if !backends.contains(&device.backend) {
            backends.push(device.backend.clone());
        }
    }
    Ok(ProbeReport { backends, devices })
}

/// A GPU that CUDA has is not Vulkan's too: its memory is there once.
fn once_each(devices: &mut Vec<ProbedDevice>) {
    let of_cuda: Vec<String> =
        devices.iter().filter(|device| device.backend == "CUDA").map(|d| d.pci.clone()).collect();
    devices.retain(|device| device.backend != "Vulkan" || device.pci.is_empty() || !of_cuda.contains(&device.pci));
}

/// The driver of a device and its version; empty where nobody says.
fn driver_of(backend: &str, description: &str, vulkan: &[(String, String)]) -> String {
    let kernel = |module: &str| {
        let version = std::fs::read_to_string(format!("/sys/module/{module}/version")).ok()?;
        Some(version.trim().to_owned())
    };
    match backend {
        "Vulkan" => vulkan.iter().find(|(device, _)| device == description).map(|(_, driver)| driver.clone()),
        "CUDA" => kernel("nvidia").map(|version| format!("NVIDIA {version}")),
        "ROCm" => kernel("amdgpu").map(|version| format!("amdgpu {version}")),
        _ => None,
    }
    .unwrap_or_default()
}

/// llama.cpp's indices of the devices that the agent granted. No layer on them means no device: a context that is not
/// used would still take memory there.
pub(super) fn granted(config: &RunnerConfig, found: &[Device]) -> Result<Vec<usize>, EngineError> {
    if !config.uses_gpu() {
        return Ok(Vec::new());
    }
    let wanted = config.devices.iter().filter(|name| *name != "CPU");
    wanted
        .map(|name| {
            let device = found.iter().find(|device| device.name == *name && device.kind != "CPU");
            device.map(|device| device.index).ok_or_else(|| EngineError::UnknownDevice(name.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_of_two_backends_is_there_once() {
        let device = |id: &str, pci: &str| ProbedDevice {
            id: id.to_owned(),
            backend: id.trim_end_matches(char::is_numeric).to_owned(),
            pci: pci.to_owned(),
            ..ProbedDevice::default()
        };
        let left = |mut devices: Vec<ProbedDevice>| {
            once_each(&mut devices);
            devices.into_iter().map(|device| device.id).collect::<Vec<_>>()
        };
        let (nvidia, amd) = ("0000:17:00.0", "0000:65:00.0");
        assert_eq!(
            left(vec![device("CUDA0", nvidia), device("Vulkan0", amd), device("Vulkan1", nvidia), device("CPU", "")]),
            ["CUDA0", "Vulkan0", "CPU"]
        );
        assert_eq!(left(vec![device("Vulkan0", nvidia), device("Vulkan1", nvidia)]), ["Vulkan0", "Vulkan1"]);
        assert_eq!(left(vec![device("CUDA0", ""), device("Vulkan0", "")]), ["CUDA0", "Vulkan0"]);
    }

    #[test]
    fn devices_are_granted_by_name() {
        let device = |index, name: &str, kind| Device {
            index,
            name: name.to_owned(),
            description: String::new(),
            backend: String::new(),
            kind,
        };
        let found = [device(0, "CPU", "CPU"), device(1, "Vulkan0", "GPU"), device(2, "Vulkan1", "GPU")];
        let config = |devices: &[&str], gpu_layers| RunnerConfig {
            devices: devices.iter().map(|&name| name.to_owned()).collect(),
            gpu_layers,
            ..crate::engine::tests::config("/nowhere".into())
        };
        assert_eq!(granted(&config(&[], None), &found), Ok(vec![]));
        assert_eq!(granted(&config(&["CPU"], None), &found), Ok(vec![]));
        assert_eq!(granted(&config(&["Vulkan1", "Vulkan0"], None), &found), Ok(vec![2, 1]));
        assert_eq!(granted(&config(&["Vulkan1"], Some(0)), &found), Ok(vec![]));
        assert_eq!(granted(&config(&["CUDA0"], None), &found), Err(EngineError::UnknownDevice("CUDA0".to_owned())));
    }
}

//! The devices that there are, and those that the agent granted.

use super::EngineError;
use crate::engine::ffi::{self, Device};
use crate::runner::protocol::{ProbeReport, ProbedDevice, RunnerConfig};

/// The devices that llama.cpp sees in this process, the CPU last.
pub(in crate::engine) fn probe() -> Result<ProbeReport, EngineError> {
    let found = ffi::devices().map_err(EngineError::Internal)?;
    let vulkan = ffi::vulkan_drivers();
    let mut devices: Vec<_> = found
        .into_iter()
        .map(|device| {
            let Device { index: _, name, description, backend, kind, total, free } = device;
            let driver = driver_of(&backend, &description, &vulkan);
            ProbedDevice {
                id: name,
                description,
                backend,
                kind: kind.to_owned(),
                memory_total_bytes: total,
                memory_free_bytes: free,
                driver,
            }
        })
        .collect();
    devices.sort_by_key(|device| device.kind == "CPU");
    let mut backends: Vec<String> = Vec::new();
    for device in &devices {
        if !backends.contains(&device.backend) {
            backends.push(device.backend.clone());
        }
    }
    Ok(ProbeReport { backends, devices })
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
    fn devices_are_granted_by_name() {
        let device = |index, name: &str, kind| Device {
            index,
            name: name.to_owned(),
            description: String::new(),
            backend: String::new(),
            kind,
            total: 1,
            free: 1,
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

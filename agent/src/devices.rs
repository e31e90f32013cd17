//! The devices of this machine and where on them a model may go.
//!
//! They are enumerated by a child that ends ([`Runner::probe`](crate::runner::spawn::Runner::probe)): a process that
//! has looked at a GPU holds a context on it, and the agent must not.

use std::collections::BTreeSet;

use altiplano_crds::model_deployment::{EngineSpec, GpuPolicy};

use crate::ledger::{Ledger, Need, bytes};
use crate::runner::protocol::{MemoryUse, Part, ProbeReport, ProbedDevice};

/// llama.cpp's name of host memory.
pub const CPU: &str = "CPU";

/// Most devices that a status holds.
const MAX_DEVICES: usize = 32;

/// The devices of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// llama.cpp's backends, such as "CPU" and "Vulkan".
    pub backends: Vec<String>,
    /// The devices that can hold a model, the CPU last. Its bytes are those that the agent may use.
    pub list: Vec<ProbedDevice>,
    /// Bytes that a process takes of a device by opening it, where that was measured. A probe that opened it took them too.
    pub process_bytes: Need,
}

/// A place for a model: the devices that its worker may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// llama.cpp's names; empty is the CPU alone.
    pub devices: Vec<String>,
    /// The devices that the dry run is made on: the first of the same kind, so that eight equal GPUs need one dry run.
    pub estimate_on: Vec<String>,
    /// How much of the model they get.
    pub share: Share,
}

/// How much of a model goes to GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// What the spec says: all, unless it names a number.
    #[default]
    Asked,
    /// As much as there is room for: which part is to be chosen when dry runs have said what each takes.
    Fitting,
    /// This part.
    Part(Part),
}

/// What a dry run is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trial {
    /// llama.cpp's names of the devices; empty is the CPU alone.
    pub devices: Vec<String>,
    /// Parts of the model are asked about, too.
    pub parts: bool,
}

impl Devices {
    /// From the probe; host memory is bounded by what the agent's cgroup allows.
    #[must_use]
    pub fn new(report: ProbeReport, memory_limit: u64) -> Self {
        let ProbeReport { backends, devices } = report;
        let mut list: Vec<ProbedDevice> = devices.into_iter().filter(|device| device.kind != "Accelerator").collect();
        if !list.iter().any(is_cpu) {
            list.push(ProbedDevice {
                id: CPU.to_owned(),
                description: CPU.to_owned(),
                backend: CPU.to_owned(),
                kind: CPU.to_owned(),
                memory_total_bytes: memory_limit,
                memory_free_bytes: memory_limit,
                ..ProbedDevice::default()
            });
        }
        for device in &mut list {
            if is_cpu(device) {
                CPU.clone_into(&mut device.id);
                device.memory_total_bytes = match device.memory_total_bytes {
                    0 => memory_limit,
                    total => total.min(memory_limit),
                };
            }
        }
        list.sort_by_key(is_cpu);
        list.dedup_by(|a, b| a.id == b.id);
        let excess = list.len().saturating_sub(MAX_DEVICES);
        list.drain(..excess);
        Self { backends, list, process_bytes: Need::new() }
    }

    /// As they were probed, to look at them again.
    #[must_use]
    pub fn report(&self) -> ProbeReport {
        ProbeReport { backends: self.backends.clone(), devices: self.list.clone() }
    }

    /// Bytes per device. An integrated GPU's memory is the host's and has no account of its own.
    #[must_use]
    pub fn capacity(&self) -> Need {
        self.list
            .iter()
            .filter(|device| !shares_host_memory(device) || is_cpu(device))
            .map(|device| (device.id.clone(), device.memory_total_bytes))
            .collect()
    }

    /// The same, where a process takes so much of each device by opening it.
    #[must_use]
    pub fn with_process_bytes(self, process_bytes: Need) -> Self {
        Self { process_bytes, ..self }
    }

    /// The same, where models may take at most so many bytes of each GPU: others may hold the rest.
    #[must_use]
    pub fn limited(mut self, bytes: u64) -> Self {
        for device in self.list.iter_mut().filter(|device| !shares_host_memory(device)) {
            device.memory_total_bytes = device.memory_total_bytes.min(bytes);
        }
        self
    }

    /// Whether a driver of its own knows how much of the device is in use.
    #[must_use]
    pub fn has_driver(&self, device: &str) -> bool {
        self.list.iter().any(|known| known.id == device && !shares_host_memory(known))
    }

    /// Bytes of each device that its driver says are in use, those left out that the probe took itself.
    pub fn used(&self) -> impl Iterator<Item = (&str, u64)> {
        let with_driver = self.list.iter().filter(|device| !shares_host_memory(device));
        with_driver.map(|device| {
            let free = device.memory_free_bytes.min(device.memory_total_bytes);
            let own = self.process_bytes.get(&device.id).copied().filter(|_| !device.unopened).unwrap_or(0);
            (device.id.as_str(), (device.memory_total_bytes - free).saturating_sub(own))
        })
    }

    /// Bytes on the ledger's accounts of a worker that takes these: what its process takes of each device comes on top.
    #[must_use]
    pub fn worker_need(&self, memory: &[MemoryUse]) -> Need {
        let mut need = self.need(memory);
        for (device, bytes) in &mut need {
            *bytes += self.process_bytes.get(device).copied().unwrap_or(0);
        }
        need
    }

    /// Bytes on the ledger's accounts.
    #[must_use]
    pub fn need(&self, memory: &[MemoryUse]) -> Need {
        let mut need = Need::new();
        for part in memory {
            *need.entry(self.account(&part.device).to_owned()).or_default() += part.total();
        }
        need
    }

    fn account<'a>(&self, device: &'a str) -> &'a str {
        match self.list.iter().find(|known| known.id == device) {
            Some(known) if !shares_host_memory(known) => device,
            // Also what llama.cpp calls "CUDA_Host", "CPU_REPACK" and the like.
            _ => CPU,
        }
    }

    /// Where a model may go, tier after tier: one GPU, all GPUs of one backend together, a part of it there and the rest on
    /// the CPU (unless the spec names the part), the CPU. Within a tier the one with most room first. Empty when the
    /// model needs a GPU and there is none; one that needs a GPU is there as a whole, or in the part that the spec names.
    #[must_use]
    pub fn tiers(&self, engine: &EngineSpec, ledger: &Ledger) -> Vec<Vec<Target>> {
        let on_cpu = || vec![Target { devices: Vec::new(), estimate_on: Vec::new(), share: Share::Asked }];
        let gpus = self.gpus();
        let no_layers = engine.gpu_layers == Some(0);
        match engine.gpu {
            GpuPolicy::Never => vec![on_cpu()],
            GpuPolicy::Preferred if gpus.is_empty() || no_layers => vec![on_cpu()],
            GpuPolicy::Required if no_layers => Vec::new(),
            GpuPolicy::Preferred => {
                let whole = gpu_tiers(&gpus, ledger);
                let is_free = engine.gpu_layers.is_none() && engine.experts_on_cpu.is_none();
                // Where there are several, all of them hold the largest part.
                let parts = whole.last().filter(|_| is_free).cloned().map(|targets| {
                    targets.into_iter().map(|target| Target { share: Share::Fitting, ..target }).collect()
                });
                whole.into_iter().chain(parts).chain([on_cpu()]).collect()
            }
            GpuPolicy::Required => gpu_tiers(&gpus, ledger),
        }
    }

    /// GPUs, integrated ones only where there is no other: as llama.cpp chooses.
    #[must_use]
    pub fn gpus(&self) -> Vec<&ProbedDevice> {
        let of = |kind: &str| self.list.iter().filter(|device| device.kind == kind).collect::<Vec<_>>();
        let discrete = of("GPU");
        if discrete.is_empty() { of("IntegratedGPU") } else { discrete }
    }
}

fn gpu_tiers(gpus: &[&ProbedDevice], ledger: &Ledger) -> Vec<Vec<Target>> {
    let like = |gpu: &ProbedDevice| {
        let same = |other: &&&ProbedDevice| {
            other.backend == gpu.backend
                && other.description == gpu.description
                && other.memory_total_bytes == gpu.memory_total_bytes
        };
        gpus.iter().find(same).map_or_else(|| gpu.id.clone(), |first| first.id.clone())
    };
    let mut by_room = gpus.to_vec();
    by_room.sort_by_key(|gpu| (std::cmp::Reverse(ledger.free(&gpu.id)), gpu.id.clone()));
    let share = Share::Asked;
    let single = by_room
        .iter()
        .map(|gpu| Target { devices: vec![gpu.id.clone()], estimate_on: vec![like(gpu)], share })
        .collect();
    let backends: BTreeSet<&str> = gpus.iter().map(|gpu| gpu.backend.as_str()).collect();
    let together = backends.into_iter().filter_map(|backend| {
        let all: Vec<String> = gpus.iter().filter(|gpu| gpu.backend == backend).map(|gpu| gpu.id.clone()).collect();
        (all.len() > 1).then(|| Target { devices: all.clone(), estimate_on: all, share })
    });
    [single, together.collect::<Vec<_>>()].into_iter().filter(|tier: &Vec<Target>| !tier.is_empty()).collect()
}

impl Target {
    /// The dry run's bytes, moved from the device that it was made on to the one that is meant.
    #[must_use]
    pub fn translate(&self, mut memory: Vec<MemoryUse>) -> Vec<MemoryUse> {
        if let ([meant], [made_on]) = (self.devices.as_slice(), self.estimate_on.as_slice()) {
            for part in memory.iter_mut().filter(|part| part.device == *made_on) {
                part.device.clone_from(meant);
            }
        }
        memory
    }

    /// The other way round: a worker's bytes as the dry run would have said them.
    #[must_use]
    pub fn translate_back(&self, memory: Vec<MemoryUse>) -> Vec<MemoryUse> {
        let Self { devices, estimate_on, share } = self.clone();
        Self { devices: estimate_on, estimate_on: devices, share }.translate(memory)
    }

    /// The dry run that says what the model takes here.
    #[must_use]
    pub fn trial(&self) -> Trial {
        Trial { devices: self.estimate_on.clone(), parts: self.share != Share::Asked }
    }

    /// Whether it is the CPU alone.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.devices.is_empty()
    }
}

/// What people should know about a device's memory, of which others hold so many bytes.
#[must_use]
pub fn note(device: &ProbedDevice, foreign: u64) -> Option<String> {
    let mig = (device.mig || device.description.contains(" MIG ")).then(|| {
        "a MIG slice: its memory is its own, its cache and its copying may be shared with other slices".to_owned()
    });
    let shared = (foreign > 0).then(|| {
        format!(
            "others than this agent hold {} of it, as where GPUs are shared in time slices: what is free is not guaranteed",
            bytes(foreign)
        )
    });
    let notes: Vec<String> = mig.into_iter().chain(shared).collect();
    (!notes.is_empty()).then(|| notes.join("; "))
}

fn is_cpu(device: &ProbedDevice) -> bool {
    device.kind == CPU
}

fn shares_host_memory(device: &ProbedDevice) -> bool {
    device.kind != "GPU"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str, kind: &str, gib: u64) -> ProbedDevice {
        ProbedDevice {
            id: id.to_owned(),
            description: format!("a {kind}"),
            backend: id.trim_end_matches(char::is_numeric).to_owned(),
            kind: kind.to_owned(),
            memory_total_bytes: gib << 30,
            memory_free_bytes: 1 << 30,
            ..ProbedDevice::default()
        }
    }

    fn devices(list: Vec<ProbedDevice>) -> (Devices, Ledger) {
        let devices = Devices::new(ProbeReport { backends: Vec::new(), devices: list }, 16 << 30);
        let mut ledger = Ledger::default();
        ledger.set_capacity(devices.capacity());
        (devices, ledger)
    }

    fn tiers(list: Vec<ProbedDevice>, gpu: GpuPolicy) -> String {
        tiers_of(list, gpu, EngineSpec::default())
    }

    fn tiers_of(list: Vec<ProbedDevice>, gpu: GpuPolicy, engine: EngineSpec) -> String {
        let (devices, mut ledger) = devices(list);
        if ledger.capacity("CUDA0") > 0 {
            ledger.reserve(1, "m", Need::from([("CUDA0".to_owned(), 1)])).unwrap();
        }
        let show = |target: &Target| {
            let part = if target.share == Share::Fitting { "a part on " } else { "" };
            if target.is_cpu() { CPU.to_owned() } else { format!("{part}{}", target.devices.join("+")) }
        };
        let tiers = devices.tiers(&EngineSpec { gpu, ..engine }, &ledger);
        tiers.iter().map(|tier| tier.iter().map(show).collect::<Vec<_>>().join(", ")).collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn where_a_model_may_go() {
        let two = || vec![device("CUDA0", "GPU", 24), device("CUDA1", "GPU", 24), device("CPU", "CPU", 64)];
        assert_eq!(tiers(two(), GpuPolicy::Required), "CUDA1, CUDA0 | CUDA0+CUDA1");
        assert_eq!(tiers(two(), GpuPolicy::Preferred), "CUDA1, CUDA0 | CUDA0+CUDA1 | a part on CUDA0+CUDA1 | CPU");
        // What the spec names is not chosen here.
        let named = || EngineSpec { gpu_layers: Some(5), ..EngineSpec::default() };
        assert_eq!(tiers_of(two(), GpuPolicy::Preferred, named()), "CUDA1, CUDA0 | CUDA0+CUDA1 | CPU");
        assert_eq!(tiers_of(two(), GpuPolicy::Required, named()), "CUDA1, CUDA0 | CUDA0+CUDA1");
        let named = EngineSpec { experts_on_cpu: Some(false), ..EngineSpec::default() };
        assert_eq!(tiers_of(two(), GpuPolicy::Preferred, named), "CUDA1, CUDA0 | CUDA0+CUDA1 | CPU");
        assert_eq!(tiers(two(), GpuPolicy::Never), "CPU");
        let none = || vec![device("CPU", "CPU", 64)];
        assert_eq!(tiers(none(), GpuPolicy::Required), "");
        assert_eq!(tiers(none(), GpuPolicy::Preferred), "CPU");
        let laptop = || vec![device("Vulkan0", "IntegratedGPU", 64), device("CPU", "CPU", 64)];
        assert_eq!(tiers(laptop(), GpuPolicy::Preferred), "Vulkan0 | a part on Vulkan0 | CPU");
    }

    #[test]
    fn host_memory_is_what_the_cgroup_allows() {
        let (devices, _) = devices(vec![device("CUDA0", "GPU", 24), device("CPU", "CPU", 64)]);
        assert_eq!(devices.capacity(), Need::from([("CPU".to_owned(), 16 << 30), ("CUDA0".to_owned(), 24 << 30)]));
    }

    #[test]
    fn what_drivers_say() {
        let laptop =
            || vec![device("CUDA0", "GPU", 24), device("Vulkan0", "IntegratedGPU", 64), device("CPU", "CPU", 64)];
        let (devices, _) = devices(laptop());
        assert_eq!(devices.used().collect::<Vec<_>>(), [("CUDA0", 23 << 30)]);
        let devices = devices.with_process_bytes(Need::from([("CUDA0".to_owned(), 1 << 30)]));
        assert_eq!(devices.used().collect::<Vec<_>>(), [("CUDA0", 22 << 30)]);
        let mut outside = devices.clone();
        outside.list[0].unopened = true;
        assert_eq!(outside.used().collect::<Vec<_>>(), [("CUDA0", 23 << 30)], "who looked took nothing");
        let used = ["CUDA0", "CPU"].map(|device| MemoryUse {
            device: device.to_owned(),
            weights_bytes: 1,
            ..MemoryUse::default()
        });
        assert_eq!(
            devices.worker_need(&used),
            Need::from([("CPU".to_owned(), 1), ("CUDA0".to_owned(), (1 << 30) + 1)])
        );
        assert_eq!(
            devices.clone().limited(1 << 29).used().collect::<Vec<_>>(),
            [("CUDA0", 0)],
            "others may hold the rest"
        );
        assert!(devices.has_driver("CUDA0") && !devices.has_driver("Vulkan0") && !devices.has_driver("CPU"));
    }

    #[test]
    fn notes_on_devices() {
        let named =
            |description: &str| ProbedDevice { description: description.to_owned(), ..device("CUDA0", "GPU", 24) };
        let whole = named("NVIDIA H200");
        assert_eq!(note(&whole, 0), None);
        let mig = note(&named("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), 0).unwrap();
        assert!(mig.contains("MIG"), "{mig}");
        assert_eq!(note(&ProbedDevice { mig: true, ..whole.clone() }, 0), Some(mig), "as the driver's library says");
        let shared = note(&whole, 3 << 30).unwrap();
        assert!(shared.contains("3.0Gi") && shared.contains("not guaranteed"), "{shared}");
    }

    #[test]
    fn pinned_and_integrated_memory_is_the_hosts() {
        let (devices, _) = devices(vec![device("Vulkan0", "IntegratedGPU", 64), device("CPU", "CPU", 64)]);
        let part = |device: &str| MemoryUse { device: device.to_owned(), weights_bytes: 1, ..MemoryUse::default() };
        let need = devices.need(&[part("Vulkan0"), part("Vulkan_Host"), part("CPU")]);
        assert_eq!(need, Need::from([("CPU".to_owned(), 3)]));
    }
}

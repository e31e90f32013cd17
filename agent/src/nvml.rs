//! What NVIDIA's management library says of GPUs: it needs no context on them, so a look at their memory takes none of it.
//!
//! For children that look at devices and end. The library belongs to the driver and is loaded while the program runs: where
//! it is absent, CUDA alone is asked.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use crate::runner::protocol::{ProbeReport, ProbedDevice};

/// As it is called where programs run; containers have it by this name alone.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// More than any machine has.
const MAX_GPUS: u32 = 64;

/// The backend whose devices it knows.
const CUDA: &str = "CUDA";

/// What the library says at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The driver's version.
    driver: String,
    gpus: Vec<Gpu>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Gpu {
    bus: Bus,
    free_bytes: u64,
    /// Cut into slices: its memory is that of all of them.
    mig: bool,
}

/// Domain, bus, device and function on PCI: the library writes the domain with eight digits, CUDA with four.
type Bus = (u32, u32, u32, u32);

/// Looks at the GPUs; `None` where the library is not, or llama.cpp has no CUDA here.
pub(crate) fn look() -> Option<Seen> {
    if !cfg!(feature = "cuda") {
        return None;
    }
    ask(LIBRARY).inspect_err(|error| tracing::debug!(%error, "the driver's library says nothing of GPUs")).ok()
}

fn ask(library: &str) -> Result<Seen, NvmlError> {
    let nvml = Nvml::builder().lib_path(library.as_ref()).init()?;
    let driver = nvml.sys_driver_version()?;
    let gpus = (0..nvml.device_count()?.min(MAX_GPUS)).filter_map(|index| {
        let gpu = gpu(&nvml, index);
        // One that is lost, or whose driver is older than the call: CUDA has to say it.
        gpu.inspect_err(|error| tracing::debug!(%error, index, "the driver's library does not know this GPU")).ok()?
    });
    Ok(Seen { driver, gpus: gpus.collect() })
}

fn gpu(nvml: &Nvml, index: u32) -> Result<Option<Gpu>, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let mig = match device.mig_mode() {
        Ok(mode) => mode.current != 0,
        Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => false,
        Err(error) => return Err(error),
    };
    let free_bytes = device.memory_info()?.free;
    Ok(bus(&device.pci_info()?.bus_id).map(|bus| Gpu { bus, free_bytes, mig }))
}

/// Of `00000000:17:00.0` or `0000:17:00.0`. A part of a GPU, which llama.cpp can make up, has another form and is no GPU.
fn bus(id: &str) -> Option<Bus> {
    let (domain, rest) = id.trim().split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let number = |digits: &str| u32::from_str_radix(digits, 16).ok();
    Some((number(domain)?, number(bus)?, number(device)?, number(function)?))
}

impl Seen {
    /// Says of a CUDA device what the library knows of it. The memory of a MIG slice only CUDA knows.
    pub(crate) fn complete(&self, device: &mut ProbedDevice) {
        if device.backend != CUDA {
            return;
        }
        device.driver = self.driver();
        let Some(gpu) = self.gpu(device) else { return };
        device.mig = gpu.mig;
        if device.kind == "GPU" && !gpu.mig {
            device.memory_free_bytes = gpu.free_bytes.min(device.memory_total_bytes);
            device.unopened = true;
        }
    }

    /// The same devices with what is free now; `None` where one of them, or its driver, is another than it was, or where it
    /// has to be opened to know.
    pub(crate) fn again(&self, mut known: ProbeReport) -> Option<ProbeReport> {
        let mut gpus = known.devices.iter_mut().filter(|device| device.kind == "GPU").peekable();
        gpus.peek()?;
        for device in gpus {
            let gpu = self.gpu(device).filter(|gpu| !gpu.mig && device.unopened && device.driver == self.driver())?;
            device.memory_free_bytes = gpu.free_bytes.min(device.memory_total_bytes);
        }
        Some(known)
    }

    fn gpu(&self, device: &ProbedDevice) -> Option<&Gpu> {
        let bus = bus(&device.pci)?;
        self.gpus.iter().find(|gpu| gpu.bus == bus)
    }

    fn driver(&self) -> String {
        format!("NVIDIA {}", self.driver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str, kind: &str, pci: &str) -> ProbedDevice {
        ProbedDevice {
            id: id.to_owned(),
            backend: id.trim_end_matches(char::is_numeric).to_owned(),
            kind: kind.to_owned(),
            memory_total_bytes: 80,
            memory_free_bytes: 70,
            pci: pci.to_owned(),
            ..ProbedDevice::default()
        }
    }

    fn seen(gpus: &[(&str, u64, bool)]) -> Seen {
        let gpu = |&(id, free_bytes, mig): &(&str, u64, bool)| Gpu { bus: bus(id).expect("a bus"), free_bytes, mig };
        Seen { driver: "580.65".to_owned(), gpus: gpus.iter().map(gpu).collect() }
    }

    #[test]
    fn an_absent_library_is_no_error() {
        let error = ask("libnvidia-ml-of-nobody.so.1").expect_err("there is none");
        assert!(matches!(error, NvmlError::LibloadingError(_)), "{error:?}");
        if !cfg!(feature = "cuda") {
            assert_eq!(look(), None);
        }
    }

    #[test]
    fn places_on_pci() {
        for (id, expected) in [
            ("00000000:17:00.0", Some((0, 0x17, 0, 0))),
            ("0000:17:00.0", Some((0, 0x17, 0, 0))),
            ("0000:C1:00.1", Some((0, 0xc1, 0, 1))),
            ("00010000:00:1f.0", Some((0x10000, 0, 0x1f, 0))),
            ("0000:17:00.0-v1", None),
            ("", None),
            ("17:00.0", None),
            ("0000:17:00", None),
            ("0000:1g:00.0", None),
        ] {
            assert_eq!(bus(id), expected, "{id}");
        }
    }

    /// What a device is called by afterwards: free bytes, whether they are from outside, MIG, driver.
    #[test]
    fn what_it_knows_of_a_device() {
        let whole = seen(&[("00000000:17:00.0", 75, false), ("00000000:65:00.0", 90, false)]);
        let sliced = seen(&[("00000000:17:00.0", 75, true)]);
        for (case, seen, device, expected) in [
            ("a GPU", &whole, device("CUDA0", "GPU", "0000:17:00.0"), (75, true, false, "NVIDIA 580.65")),
            ("never more than all", &whole, device("CUDA1", "GPU", "0000:65:00.0"), (80, true, false, "NVIDIA 580.65")),
            ("a slice", &sliced, device("CUDA0", "GPU", "0000:17:00.0"), (70, false, true, "NVIDIA 580.65")),
            ("not on its list", &whole, device("CUDA0", "GPU", "0000:99:00.0"), (70, false, false, "NVIDIA 580.65")),
            ("a part", &whole, device("CUDA0", "GPU", "0000:17:00.0-v0"), (70, false, false, "NVIDIA 580.65")),
            (
                "the host's memory",
                &whole,
                device("CUDA0", "IntegratedGPU", "0000:17:00.0"),
                (70, false, false, "NVIDIA 580.65"),
            ),
            ("of another backend", &whole, device("Vulkan0", "GPU", "0000:17:00.0"), (70, false, false, "")),
            ("the CPU", &whole, device("CPU", "CPU", ""), (70, false, false, "")),
        ] {
            let mut device = device;
            seen.complete(&mut device);
            let said = (device.memory_free_bytes, device.unopened, device.mig, device.driver.as_str());
            assert_eq!(said, expected, "{case}");
        }
    }

    #[test]
    fn a_second_look() {
        let before = seen(&[("00000000:17:00.0", 75, false), ("00000000:65:00.0", 30, false)]);
        let report = |mut devices: Vec<ProbedDevice>| {
            for device in &mut devices {
                before.complete(device);
            }
            ProbeReport { backends: Vec::new(), devices }
        };
        let two = || {
            let gpus = [device("CUDA0", "GPU", "0000:17:00.0"), device("CUDA1", "GPU", "0000:65:00.0")];
            report(gpus.into_iter().chain([device("CPU", "CPU", "")]).collect())
        };
        let now = seen(&[("00000000:65:00.0", 60, false), ("00000000:17:00.0", 10, false)]);
        let free =
            |report: ProbeReport| report.devices.iter().map(|device| device.memory_free_bytes).collect::<Vec<_>>();
        assert_eq!(now.again(two()).map(free), Some(vec![10, 60, 70]));

        let one = |device| report(vec![device, self::device("CPU", "CPU", "")]);
        let mut another = now.clone();
        another.driver = "590.1".to_owned();
        for (case, seen, known) in [
            ("a GPU is lost", &seen(&[("00000000:17:00.0", 10, false)]), two()),
            ("it has been cut", &seen(&[("00000000:17:00.0", 10, true), ("00000000:65:00.0", 60, false)]), two()),
            ("another driver", &another, two()),
            ("of another backend", &now, one(device("Vulkan0", "GPU", "0000:17:00.0"))),
            ("a part", &now, one(device("CUDA0", "GPU", "0000:17:00.0-v0"))),
            ("no GPU", &now, one(device("Vulkan0", "IntegratedGPU", ""))),
            ("nothing", &now, ProbeReport::default()),
        ] {
            assert_eq!(seen.again(known), None, "{case}");
        }
    }
}

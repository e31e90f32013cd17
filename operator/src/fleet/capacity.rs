//! Memory, as far as the operator reckons with it: two pools per node (accelerators together, and the host).
//!
//! The operator picks the node, the agent picks the devices; so pools are enough here, and an agent that cannot lay a
//! model out over its devices refuses it, which the planner remembers.
//!
//! What is *guaranteed* is the memory of pinned models (`unload.policy: Never`) and of models of higher priority. The
//! others may share memory in turn: the agent unloads the idle one. So a model fits when it has room beside what is
//! guaranteed, and nodes where it has room beside everything are preferred.

use altiplano_crds::ModelNodeStatus;
use altiplano_crds::conditions::states;
use altiplano_crds::model_deployment::{GpuPolicy, UnloadPolicy};
use altiplano_crds::model_node::{Device, ModelState};

use super::seen::Model;

/// Bytes that a model needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// On accelerators.
    pub accelerator: i64,
    /// In host memory.
    pub host: i64,
}

impl Need {
    /// Over both pools.
    #[must_use]
    pub fn total(self) -> i64 {
        self.accelerator.saturating_add(self.host)
    }

    /// The same, all of it in host memory.
    #[must_use]
    pub fn on_host(self) -> Self {
        Self { accelerator: 0, host: self.total() }
    }

    /// The greater of both, pool by pool.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { accelerator: self.accelerator.max(other.accelerator), host: self.host.max(other.host) }
    }

    /// What the agent has answered to an estimate, or has predicted for a model that it holds. `None` when it has said
    /// nothing about memory yet.
    #[must_use]
    pub fn of_state(state: &ModelState, status: &ModelNodeStatus) -> Option<Self> {
        let mut need = Self::default();
        let mut add = |device: &str, bytes: i64| {
            let bytes = bytes.max(0);
            if is_accelerator(device, &status.devices) {
                need.accelerator = need.accelerator.saturating_add(bytes);
            } else {
                need.host = need.host.saturating_add(bytes);
            }
        };
        if !state.required_bytes.is_empty() {
            state.required_bytes.iter().for_each(|required| add(&required.device, required.bytes));
        } else if !state.memory.is_empty() {
            state.memory.iter().for_each(|memory| add(&memory.device, memory.predicted_bytes));
        } else if state.state != states::ESTIMATED {
            return None;
        }
        Some(need)
    }
}

/// GPUs have memory of their own to be counted; other accelerators of llama.cpp (BLAS, AMX) compute in host memory.
fn counts_as_accelerator(device: &Device) -> bool {
    matches!(device.kind.as_str(), "GPU" | "IntegratedGPU")
}

fn is_accelerator(id: &str, devices: &[Device]) -> bool {
    devices.iter().find(|device| device.id == id).map_or(id != "CPU", counts_as_accelerator)
}

/// Memory of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pools {
    /// Of all accelerators together.
    pub accelerator: i64,
    /// What the agent may use of the host's.
    pub host: i64,
}

impl Pools {
    /// What the agent reports, without what other processes hold. Host memory that it does not report is no limit.
    #[must_use]
    pub fn of(status: &ModelNodeStatus) -> Self {
        let sum = |accelerator: bool| {
            let devices = status.devices.iter().filter(move |device| counts_as_accelerator(device) == accelerator);
            let own = |device: &Device| {
                device.memory_total_bytes.max(0).saturating_sub(device.memory_foreign_bytes.max(0)).max(0)
            };
            devices.map(own).fold(0_i64, i64::saturating_add)
        };
        let host = sum(false);
        Self { accelerator: sum(true), host: if host == 0 { i64::MAX } else { host } }
    }
}

/// What kind of node an estimate is good for: nodes of one shape get one answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape(String);

impl Shape {
    /// Backends and memory of the accelerators, memory in whole GiB. Host memory has no part in it: it differs between
    /// machines of one kind by what else runs there, and changes no estimate.
    #[must_use]
    pub fn of(status: &ModelNodeStatus) -> Self {
        let mut devices: Vec<String> = status
            .devices
            .iter()
            .filter(|device| counts_as_accelerator(device))
            .map(|device| format!("{}/{}Gi", device.backend, device.memory_total_bytes >> 30))
            .collect();
        devices.sort();
        Self(devices.join("+"))
    }
}

/// A model on a node, as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Priority.
    pub priority: i32,
    /// Whether it never leaves memory.
    pub pinned: bool,
    /// What it needs.
    pub need: Need,
}

impl Claim {
    /// The model's claim.
    #[must_use]
    pub fn of(model: &Model, need: Need) -> Self {
        Self { priority: model.spec.placement.priority, pinned: model.spec.unload.policy == UnloadPolicy::Never, need }
    }

    /// Whether `other` can never be made to leave for this one.
    fn yields_to(&self, other: &Self) -> bool {
        other.pinned || other.priority > self.priority
    }
}

/// One of a node's two pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pool {
    /// Accelerators.
    Accelerator,
    /// Host memory.
    Host,
}

impl Pool {
    fn need(self, need: Need) -> i64 {
        match self {
            Self::Accelerator => need.accelerator,
            Self::Host => need.host,
        }
    }

    fn size(self, pools: Pools) -> i64 {
        match self {
            Self::Accelerator => pools.accelerator,
            Self::Host => pools.host,
        }
    }
}

/// There is room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Fullness of the fuller pool afterwards, in thousandths; above 1000 models take turns.
    pub permille: i64,
    /// Whether the model would run on the CPU although it prefers a GPU.
    pub fallback: bool,
}

/// There is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// In which pool.
    pub pool: Pool,
    /// Bytes that the model needs there.
    pub required: i64,
    /// Bytes that there are.
    pub total: i64,
    /// Bytes that others hold for good.
    pub held: i64,
}

/// Whether a model fits beside those that are there. `accelerator_need` is what was estimated on such a node.
///
/// # Errors
/// The shortage, with the numbers.
pub fn fits(pools: Pools, there: &[Claim], claim: Claim, gpu: GpuPolicy) -> Result<Fit, Shortage> {
    match fits_as(pools, there, claim) {
        Ok(permille) => Ok(Fit { permille, fallback: false }),
        Err(shortage) if shortage.pool == Pool::Accelerator && gpu == GpuPolicy::Preferred => {
            let on_host = Claim { need: claim.need.on_host(), ..claim };
            // The shortage of accelerator memory is the one that the user can do something about.
            fits_as(pools, there, on_host).map(|permille| Fit { permille, fallback: true }).map_err(|_| shortage)
        }
        Err(shortage) => Err(shortage),
    }
}

fn fits_as(pools: Pools, there: &[Claim], claim: Claim) -> Result<i64, Shortage> {
    let mut fullest = 0;
    for pool in [Pool::Accelerator, Pool::Host] {
        let (required, total) = (pool.need(claim.need), pool.size(pools));
        if required == 0 {
            continue;
        }
        let sum = |claims: &mut dyn Iterator<Item = &Claim>| {
            claims.map(|claim| pool.need(claim.need)).fold(0_i64, i64::saturating_add)
        };
        let held = sum(&mut there.iter().filter(|other| claim.yields_to(other)));
        if required.saturating_add(held) > total {
            return Err(Shortage { pool, required, total, held });
        }
        // A pinned newcomer must leave room for each of the others that it may not push out.
        for (index, other) in there.iter().enumerate() {
            let protected = other.priority >= claim.priority && other.yields_to(&claim);
            if !protected || pool.need(other.need) == 0 {
                continue;
            }
            let beside = sum(&mut there
                .iter()
                .enumerate()
                .filter_map(|(at, third)| (at != index && other.yields_to(third)).then_some(third)));
            let needed = pool.need(other.need).saturating_add(beside);
            if needed.saturating_add(required) > total {
                return Err(Shortage { pool, required, total, held: needed });
            }
        }
        let committed = sum(&mut there.iter()).saturating_add(required);
        fullest = fullest.max(committed.saturating_mul(1000) / total.max(1));
    }
    Ok(fullest)
}

/// Bytes for people, as Kubernetes writes quantities: "5.0Gi".
#[must_use]
pub fn quantity(bytes: i64) -> String {
    const UNITS: [(&str, i64); 4] = [("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];
    match UNITS.iter().find(|(_, size)| bytes >= *size) {
        Some((unit, size)) => {
            let tenths = bytes.saturating_mul(10) / size;
            format!("{}.{}{unit}", tenths / 10, tenths % 10)
        }
        None => bytes.max(0).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: i64 = 1 << 30;

    fn claim(gib: i64, priority: i32, pinned: bool) -> Claim {
        Claim { priority, pinned, need: Need { accelerator: gib * GIB, host: 0 } }
    }

    fn pools(gib: i64) -> Pools {
        Pools { accelerator: gib * GIB, host: 64 * GIB }
    }

    #[test]
    fn table_of_fits() {
        let shortage = |required: i64, held: i64| Shortage {
            pool: Pool::Accelerator,
            required: required * GIB,
            total: 8 * GIB,
            held: held * GIB,
        };
        let fit = |permille| Ok(Fit { permille, fallback: false });
        let cases = [
            ("alone", vec![], claim(4, 0, false), fit(500)),
            ("too big for the device", vec![], claim(9, 0, false), Err(shortage(9, 0))),
            ("beside one that can be unloaded", vec![claim(6, 0, false)], claim(6, 0, false), fit(1500)),
            ("beside a pinned one", vec![claim(6, 0, true)], claim(6, 0, false), Err(shortage(6, 6))),
            ("beside one of higher priority", vec![claim(6, 1, false)], claim(6, 0, false), Err(shortage(6, 6))),
            ("over one of lower priority", vec![claim(6, -1, false)], claim(6, 0, true), fit(1500)),
            ("pinned, beside an equal", vec![claim(6, 0, false)], claim(6, 0, true), Err(shortage(6, 6))),
            ("pinned, with room", vec![claim(4, 0, false)], claim(4, 0, true), fit(1000)),
        ];
        for (name, there, newcomer, expected) in cases {
            assert_eq!(fits(pools(8), &there, newcomer, GpuPolicy::Required), expected, "{name}");
        }
    }

    #[test]
    fn preferred_falls_back_to_the_host() {
        let fit = fits(pools(8), &[claim(6, 0, true)], claim(6, 0, false), GpuPolicy::Preferred);
        assert_eq!(fit, Ok(Fit { permille: 93, fallback: true }));
        let fit = fits(pools(8), &[], claim(100, 0, false), GpuPolicy::Preferred);
        assert!(fit.is_err_and(|shortage| shortage.pool == Pool::Accelerator), "the GPU's shortage is told");
    }

    #[test]
    fn quantities_read_like_kubernetes() {
        assert_eq!(quantity(0), "0");
        assert_eq!(quantity(1023), "1023");
        assert_eq!(quantity(5 * GIB), "5.0Gi");
        assert_eq!(quantity(GIB * 3 / 2), "1.5Gi");
        assert_eq!(quantity(300 << 20), "300.0Mi");
    }
}

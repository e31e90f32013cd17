//! Memory for a context of another size: what it takes, and whether it can be had.

use std::collections::BTreeSet;

use crate::engine::ffi::available_bytes;
use crate::runner::grants::{Grants, Refusal};
use crate::runner::protocol::MemoryUse;

/// Memory of one device around a change of size, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceRoom {
    /// Its name.
    pub(super) device: String,
    /// What can be had there now; `None`: nobody knows.
    pub(super) available: Option<u64>,
    /// What the context takes there now.
    pub(super) now: u64,
    /// What the other one will take there.
    pub(super) then: u64,
    /// What the buffer that the state moves through takes beside.
    pub(super) staging: u64,
}

impl DeviceRoom {
    fn more(&self, way: Way) -> u64 {
        match way {
            Way::Beside => self.then,
            Way::Instead => self.then.saturating_sub(self.now),
        }
    }
}

/// How another size is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Both contexts fit beside each other.
    Beside,
    /// The old one goes before the new one comes.
    Instead,
}

/// The memory around a change of a context that takes `now`. `then` is what llama.cpp reckons for the other one; where it
/// cannot, each cell takes what it takes now.
pub(super) fn around(now: &[MemoryUse], then: Result<Vec<MemoryUse>, String>, from: u32, to: u32) -> Vec<DeviceRoom> {
    let then = then.unwrap_or_else(|reason| {
        tracing::debug!(from, to, reason, "llama.cpp does not say what another size takes");
        let scaled = |device: &MemoryUse| MemoryUse {
            device: device.device.clone(),
            context_bytes: device.total().div_ceil(u64::from(from.max(1))).saturating_mul(u64::from(to)),
            ..MemoryUse::default()
        };
        now.iter().map(scaled).collect()
    });
    let total = |memory: &[MemoryUse], device: &str| {
        memory.iter().filter(|part| part.device == device).map(MemoryUse::total).sum::<u64>()
    };
    let names: BTreeSet<&str> = now.iter().chain(&then).map(|part| part.device.as_str()).collect();
    let one = |device: &str| DeviceRoom {
        device: device.to_owned(),
        available: available_bytes(device),
        now: total(now, device),
        then: total(&then, device),
        staging: 0,
    };
    names.into_iter().map(one).collect()
}

/// Judges a change to `to` cells; the error says what is missing. A tenth of what is free stays free: on a CPU an
/// allocation does not fail, the kernel ends the process when the memory is touched.
pub(super) fn way(devices: &[DeviceRoom], to: u32) -> Result<Way, String> {
    let mut way = Way::Beside;
    for room in devices {
        let DeviceRoom { device, available: Some(available), staging, .. } = room else { continue };
        let usable = available / 10 * 9;
        let needed = |way| room.more(way).saturating_add(*staging);
        if needed(Way::Instead) > usable {
            let more = needed(Way::Instead);
            return Err(format!(
                "a context of {to} cells needs {more} bytes more on {device}, where {available} are free"
            ));
        }
        if needed(Way::Beside) > usable {
            way = Way::Instead;
        }
    }
    Ok(way)
}

/// Bytes per device that a change of size takes at its height, beyond what is taken now.
pub(super) fn more(devices: &[DeviceRoom], way: Way) -> Vec<MemoryUse> {
    let one = |room: &DeviceRoom| MemoryUse {
        device: room.device.clone(),
        context_bytes: room.more(way),
        other_bytes: room.staging,
        ..MemoryUse::default()
    };
    devices.iter().map(one).filter(|more| more.total() > 0).collect()
}

/// Gets memory for a context of `to` cells in place of the one there is. The ledger is asked first: what others hold it may
/// have them leave, where the device alone only knows that it is not there. What nobody can leave is no passing refusal; what
/// a GPU lacks though the ledger has it, a process has that the ledger did not know of, and may leave.
pub(super) fn acquire(devices: &[DeviceRoom], to: u32, grants: Option<&dyn Grants>) -> Result<(), Refusal> {
    grants.map_or(Ok(()), |grants| grants.ask(&more(devices, Way::Instead)))?;
    way(devices, to).map(drop).map_err(|reason| {
        let Some(grants) = grants else { return Refusal { reason, passing: false } };
        grants.give_back();
        let host: Vec<_> = devices.iter().filter(|room| room.device == "CPU").cloned().collect();
        Refusal { reason, passing: way(&host, to).is_ok() }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn room(device: &str, available: Option<u64>, now: u64, staging: u64) -> DeviceRoom {
        DeviceRoom { device: device.to_owned(), available, now, then: 2 * now, staging }
    }

    #[test]
    fn what_a_change_takes_at_its_height() {
        let devices = [room("CPU", None, 0, 7), room("GPU", None, 100, 0), room("IDLE", None, 0, 0)];
        let bytes =
            |way| more(&devices, way).iter().map(|more| (more.device.clone(), more.total())).collect::<Vec<_>>();
        assert_eq!(bytes(Way::Beside), [("CPU".to_owned(), 7), ("GPU".to_owned(), 200)]);
        assert_eq!(bytes(Way::Instead), [("CPU".to_owned(), 7), ("GPU".to_owned(), 100)]);
    }

    #[test]
    fn what_llama_cpp_reckons_counts_before_what_a_cell_takes() {
        let part =
            |device: &str, bytes| MemoryUse { device: device.to_owned(), context_bytes: bytes, ..MemoryUse::default() };
        let now = [part("CPU", 1001), part("GPU", 10)];
        let seen = |then| {
            let rooms = around(&now, then, 10, 20);
            rooms.iter().map(|room| (room.device.clone(), room.now, room.then)).collect::<Vec<_>>()
        };
        let expected = [("CPU", 1001, 1500), ("GPU", 10, 0), ("NEW", 0, 7)];
        assert_eq!(
            seen(Ok(vec![part("NEW", 7), part("CPU", 1500)])),
            expected.map(|(d, now, then)| (d.to_owned(), now, then))
        );
        let expected = [("CPU", 1001, 2020), ("GPU", 10, 20)];
        assert_eq!(seen(Err(String::new())), expected.map(|(d, now, then)| (d.to_owned(), now, then)));
    }

    #[test]
    fn both_contexts_fit_or_one_or_none() {
        let device = |available, now, staging| room("D", available, now, staging);
        let cases = [
            (vec![device(Some(1000), 100, 0)], Ok(Way::Beside)),
            (vec![device(None, 100, 0)], Ok(Way::Beside)),
            (vec![device(Some(200), 100, 0)], Ok(Way::Instead)),
            (vec![device(Some(200), 100, 100)], Err(())),
            (vec![device(Some(100), 100, 0)], Err(())),
            (vec![device(Some(1000), 100, 0), device(Some(150), 100, 0)], Ok(Way::Instead)),
        ];
        for (devices, expected) in cases {
            assert_eq!(way(&devices, 20).map_err(|_| ()), expected, "{devices:?}");
        }
        let shrink = [DeviceRoom { then: 50, ..device(Some(100), 100, 80) }];
        assert_eq!(way(&shrink, 10), Ok(Way::Instead));
        let error = way(&[DeviceRoom { then: 300, ..device(Some(7), 100, 0) }], 30).expect_err("too much");
        assert_eq!(error, "a context of 30 cells needs 200 bytes more on D, where 7 are free");
    }

    /// Answers so, and remembers what was said.
    struct Answers(Result<(), Refusal>, Mutex<Vec<&'static str>>);

    impl Grants for Answers {
        fn ask(&self, _more: &[MemoryUse]) -> Result<(), Refusal> {
            self.1.lock().expect("a lock").push("asked");
            self.0.clone()
        }

        fn give_back(&self) {
            self.1.lock().expect("a lock").push("given back");
        }
    }

    /// A device that others fill is the ledger's matter; where the ledger knows of no room there is none.
    #[test]
    fn the_ledger_has_the_first_word_and_the_device_the_last() {
        let (there, lacks) = (Some(1000), Some(10));
        let held = Refusal::passing("held by others");
        let missing = "a context of 20 cells needs 100 bytes more on D, where 10 are free";
        let cases = [
            // available, the ledger, what comes of it, what was said
            (there, Some(Ok(())), Ok(()), vec!["asked"]),
            (lacks, Some(Err(held.clone())), Err(held.clone()), vec!["asked"]),
            (there, Some(Err(held.clone())), Err(held), vec!["asked"]),
            (lacks, Some(Ok(())), Err(Refusal::passing(missing)), vec!["asked", "given back"]),
            (lacks, None, Err(Refusal { reason: missing.to_owned(), passing: false }), vec![]),
            (there, None, Ok(()), vec![]),
        ];
        for (available, ledger, expected, said) in cases {
            let answers = ledger.map(|answer| Answers(answer, Mutex::default()));
            let grants = answers.as_ref().map(|answers| answers as &dyn Grants);
            assert_eq!(acquire(&[room("D", available, 100, 0)], 20, grants), expected);
            assert_eq!(answers.map(|answers| answers.1.into_inner().expect("a lock")).unwrap_or_default(), said);
        }
        // Host memory that the kernel does not have is nobody's to leave.
        let granted = Answers(Ok(()), Mutex::default());
        let refused = acquire(&[room("D", there, 100, 0), room("CPU", lacks, 100, 0)], 20, Some(&granted));
        assert!(refused.is_err_and(|refusal| !refusal.passing));
    }
}

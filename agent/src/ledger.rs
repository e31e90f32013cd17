//! The ledger: bytes per device, and who holds them. Pure.
//!
//! Bytes are reserved before a worker starts (what llama.cpp's dry run says) and come back when it has exited. Nothing
//! is ever granted beyond a device's capacity.

use std::collections::BTreeMap;
use std::fmt;

use crate::runner::supervise::WorkerId;

/// Bytes per device, by llama.cpp's name; "CPU" is host memory.
pub type Need = BTreeMap<String, u64>;

/// Bytes per device, and who holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    capacity: Need,
    holdings: BTreeMap<WorkerId, Holding>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Holding {
    holder: String,
    bytes: Need,
    /// Granted beyond that, until a measurement settles it.
    growth: Need,
}

impl Holding {
    fn of(&self, device: &str) -> u64 {
        self.bytes.get(device).copied().unwrap_or(0) + self.growth.get(device).copied().unwrap_or(0)
    }
}

/// There is not enough room, with the numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The device that lacks room.
    pub device: String,
    /// Bytes asked for.
    pub needed: u64,
    /// Bytes not promised to anybody.
    pub free: u64,
    /// Bytes of the device.
    pub capacity: u64,
    /// Who holds how much of it, the largest first.
    pub holders: Vec<Holder>,
}

/// Somebody who holds memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// "namespace/name".
    pub who: String,
    /// Bytes.
    pub bytes: u64,
    /// Why it keeps them, in a word or two; `None` where nobody has asked.
    pub why: Option<&'static str>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, needed, free, capacity, holders } = self;
        write!(f, "needs {} on {device}, which has {} of {} free", bytes(*needed), bytes(*free), bytes(*capacity))?;
        for (number, Holder { who, bytes: held, why }) in holders.iter().take(3).enumerate() {
            let lead = if number == 0 { "; held by" } else { "," };
            write!(f, "{lead} {who} {}", bytes(*held))?;
            if let Some(why) = why {
                write!(f, " ({why})")?;
            }
        }
        if let Some(more) = holders.len().checked_sub(3).filter(|more| *more > 0) {
            write!(f, " and {more} more")?;
        }
        Ok(())
    }
}

impl Ledger {
    /// The devices that there are now. What is held stays held.
    pub fn set_capacity(&mut self, capacity: Need) {
        self.capacity = capacity;
    }

    /// Bytes of a device; 0 for one that is not there.
    #[must_use]
    pub fn capacity(&self, device: &str) -> u64 {
        self.capacity.get(device).copied().unwrap_or(0)
    }

    /// Bytes of a device that are promised.
    #[must_use]
    pub fn held(&self, device: &str) -> u64 {
        self.holdings.values().map(|holding| holding.of(device)).sum()
    }

    /// Bytes of a device that are promised to nobody.
    #[must_use]
    pub fn free(&self, device: &str) -> u64 {
        self.capacity(device).saturating_sub(self.held(device))
    }

    /// What one worker holds.
    #[must_use]
    pub fn holding(&self, worker: WorkerId) -> Option<&Need> {
        self.holdings.get(&worker).map(|holding| &holding.bytes)
    }

    /// Whether there is room for `need`.
    pub fn check(&self, need: &Need) -> Result<(), Shortage> {
        match need.iter().find(|(device, needed)| **needed > self.free(device)) {
            None => Ok(()),
            Some((device, needed)) => Err(self.shortage(device, *needed)),
        }
    }

    /// Whether there would be room for `need` if nobody held anything.
    pub fn check_empty(&self, need: &Need) -> Result<(), Shortage> {
        match need.iter().find(|(device, needed)| **needed > self.capacity(device)) {
            None => Ok(()),
            Some((device, needed)) => Err(self.shortage(device, *needed)),
        }
    }

    /// Promises `need` to a worker, all of it or nothing.
    pub fn reserve(&mut self, worker: WorkerId, holder: &str, need: Need) -> Result<(), Shortage> {
        self.check(&need)?;
        self.holdings.insert(worker, Holding { holder: holder.to_owned(), bytes: need, growth: Need::new() });
        Ok(())
    }

    /// Keeps `need` from everybody else, whether it is there or not: for one that is next.
    pub fn claim(&mut self, worker: WorkerId, holder: &str, need: Need) {
        self.holdings.insert(worker, Holding { holder: holder.to_owned(), bytes: need, growth: Need::new() });
    }

    /// Measured bytes replace the predicted ones. They are a fact, so they count even beyond the capacity.
    pub fn settle(&mut self, worker: WorkerId, measured: Need) {
        if let Some(holding) = self.holdings.get_mut(&worker) {
            holding.bytes = measured;
            holding.growth.clear();
        }
    }

    /// Promises a worker more than it holds, all of it or nothing. [`Ledger::settle`] ends the promise.
    pub fn grow(&mut self, worker: WorkerId, more: &Need) -> Result<(), Shortage> {
        self.check(more)?;
        if let Some(holding) = self.holdings.get_mut(&worker) {
            for (device, bytes) in more {
                *holding.growth.entry(device.clone()).or_default() += bytes;
            }
        }
        Ok(())
    }

    /// What the worker was promised beyond its holding is not taken after all.
    pub fn shrink(&mut self, worker: WorkerId) {
        if let Some(holding) = self.holdings.get_mut(&worker) {
            holding.growth.clear();
        }
    }

    /// Forgets all workers but these.
    pub fn keep(&mut self, stays: impl Fn(WorkerId) -> bool) {
        self.holdings.retain(|worker, _| stays(*worker));
    }

    /// The worker has exited.
    pub fn release(&mut self, worker: WorkerId) {
        self.holdings.remove(&worker);
    }

    fn shortage(&self, device: &str, needed: u64) -> Shortage {
        let mut by_holder: BTreeMap<&str, u64> = BTreeMap::new();
        for holding in self.holdings.values() {
            let held = holding.of(device);
            if held > 0 {
                *by_holder.entry(&holding.holder).or_default() += held;
            }
        }
        let holder = |(who, held): (&str, u64)| Holder { who: who.to_owned(), bytes: held, why: None };
        let mut holders: Vec<Holder> = by_holder.into_iter().map(holder).collect();
        holders.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.who.cmp(&b.who)));
        let (free, capacity) = (self.free(device), self.capacity(device));
        Shortage { device: device.to_owned(), needed, free, capacity, holders }
    }
}

/// Bytes for people: "5.0Gi", "12Mi", "17B".
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["Ki", "Mi", "Gi", "Ti"];
    let Some((unit, name)) = UNITS.iter().enumerate().rev().find_map(|(power, name)| {
        let unit = 1_u64 << (10 * (power + 1));
        (count >= unit).then_some((unit, name))
    }) else {
        return format!("{count}B");
    };
    let tenths = u128::from(count) * 10 / u128::from(unit);
    if tenths < 100 { format!("{}.{}{name}", tenths / 10, tenths % 10) } else { format!("{}{name}", tenths / 10) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn need(pairs: &[(&str, u64)]) -> Need {
        pairs.iter().map(|(device, bytes)| ((*device).to_owned(), *bytes)).collect()
    }

    #[test]
    fn a_refusal_has_the_numbers() {
        let mut ledger = Ledger::default();
        ledger.set_capacity(need(&[("CUDA0", 24 << 30), ("CPU", 64 << 30)]));
        ledger.reserve(1, "a/small", need(&[("CUDA0", 4 << 30), ("CPU", 1 << 30)])).unwrap();
        ledger.reserve(2, "a/large", need(&[("CUDA0", 15 << 30)])).unwrap();
        let refusal = ledger.reserve(3, "a/more", need(&[("CPU", 1 << 30), ("CUDA0", 8 << 30)])).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "needs 8.0Gi on CUDA0, which has 5.0Gi of 24Gi free; held by a/large 15Gi, a/small 4.0Gi"
        );
        assert_eq!(ledger.free("CPU"), 63 << 30, "a refusal takes nothing");
    }

    #[test]
    fn a_device_that_is_not_there_has_no_room() {
        assert_eq!(Ledger::default().check(&need(&[("CUDA9", 1)])).unwrap_err().capacity, 0);
        assert_eq!(Ledger::default().check(&need(&[("CUDA9", 0)])), Ok(()));
    }

    #[test]
    fn bytes_for_people() {
        let cases = [(0, "0B"), (1023, "1023B"), (1024, "1.0Ki"), (8 << 20, "8.0Mi"), (150 << 30, "150Gi")];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(bytes(u64::MAX), "16777215Ti");
    }

    proptest! {
        #[test]
        fn never_over_capacity(
            capacity in prop::array::uniform2(0_u64..1000),
            calls in prop::collection::vec((0_u64..8, 0_u64..600, 0_u64..600, 0_u8..4), 0..60),
        ) {
            let mut ledger = Ledger::default();
            ledger.set_capacity(need(&[("GPU", capacity[0]), ("CPU", capacity[1])]));
            for (worker, gpu, cpu, call) in calls {
                let wanted = need(&[("GPU", gpu), ("CPU", cpu)]);
                match call {
                    0 => ledger.release(worker),
                    2 if ledger.holding(worker).is_some() => {
                        let fits = gpu <= ledger.free("GPU") && cpu <= ledger.free("CPU");
                        prop_assert_eq!(ledger.grow(worker, &wanted).is_ok(), fits);
                    }
                    3 if ledger.holding(worker).is_some() => ledger.shrink(worker),
                    1 => {
                        // A measurement at or below the promise.
                        let held = ledger.holding(worker).cloned().unwrap_or_default();
                        let measured = held.iter().map(|(d, b)| (d.clone(), (*b).min(wanted[d]))).collect();
                        ledger.settle(worker, measured);
                    }
                    _ if ledger.holding(worker).is_none() => {
                        let had = ledger.clone();
                        let fits = gpu <= ledger.free("GPU") && cpu <= ledger.free("CPU");
                        let granted = ledger.reserve(worker, "m", wanted).is_ok();
                        prop_assert_eq!(granted, fits);
                        if !granted {
                            prop_assert_eq!(&ledger, &had, "a refusal changes nothing");
                        }
                    }
                    _ => {}
                }
                for device in ["GPU", "CPU"] {
                    prop_assert!(ledger.held(device) <= ledger.capacity(device));
                    prop_assert_eq!(ledger.held(device) + ledger.free(device), ledger.capacity(device));
                }
            }
        }

        #[test]
        fn a_measurement_above_the_promise_stops_all_grants(over in 1_u64..1000, more in 1_u64..1000) {
            let mut ledger = Ledger::default();
            ledger.set_capacity(need(&[("GPU", 1000)]));
            ledger.reserve(1, "m", need(&[("GPU", 900)])).unwrap();
            ledger.settle(1, need(&[("GPU", 1000 + over)]));
            prop_assert_eq!(ledger.free("GPU"), 0);
            prop_assert!(ledger.reserve(2, "n", need(&[("GPU", more)])).is_err());
            ledger.release(1);
            prop_assert!(ledger.reserve(2, "n", need(&[("GPU", more)])).is_ok());
        }
    }
}

//! The ledger: bytes per device, and who holds them. Pure.
//!
//! Bytes are reserved before a worker starts (what llama.cpp's dry run says). When it has exited, host memory is back at
//! once, a device's only when its driver says so ([`Ledger::look`]). What others have taken of a device is no room.
//! Nothing is ever granted beyond what is left of a device's capacity.

use std::collections::BTreeMap;
use std::fmt;

use crate::runner::supervise::WorkerId;

/// Bytes per device, by llama.cpp's name; "CPU" is host memory.
pub type Need = BTreeMap<String, u64>;

/// Bytes per device, and who holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    capacity: Need,
    /// Bytes that are in use and that nobody here holds.
    foreign: Need,
    holdings: BTreeMap<WorkerId, Holding>,
}

/// In the name of bytes that are nobody's any more, or never were.
const OTHERS: &str = "other processes";

/// What a driver counts and a worker does not: that little more in use than expected says nothing of others (64 MiB).
const ROUNDING_BYTES: u64 = 64 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Holding {
    holder: String,
    bytes: Need,
    /// Granted beyond that, until a measurement settles it.
    growth: Need,
    /// The bytes are measured, so they have been taken.
    taken: bool,
    /// The worker has ended, and the driver has not said yet that the bytes are back.
    ended: bool,
}

impl Holding {
    fn new(holder: &str, bytes: Need) -> Self {
        Self { holder: holder.to_owned(), bytes, growth: Need::new(), taken: false, ended: false }
    }

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

    /// Bytes of a device that are in use and that nobody here holds, by the driver's word of its last look.
    #[must_use]
    pub fn foreign(&self, device: &str) -> u64 {
        self.foreign.get(device).copied().unwrap_or(0)
    }

    /// Bytes of a device that are promised to nobody and that nobody else has.
    #[must_use]
    pub fn free(&self, device: &str) -> u64 {
        self.capacity(device).saturating_sub(self.held(device)).saturating_sub(self.foreign(device))
    }

    /// What one worker holds.
    #[must_use]
    pub fn holding(&self, worker: WorkerId) -> Option<&Need> {
        self.holdings.get(&worker).filter(|holding| !holding.ended).map(|holding| &holding.bytes)
    }

    /// Bytes of a device that one worker holds or is promised.
    #[must_use]
    pub fn held_by(&self, worker: WorkerId, device: &str) -> u64 {
        self.holdings.get(&worker).map_or(0, |holding| holding.of(device))
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
        self.holdings.insert(worker, Holding::new(holder, need));
        Ok(())
    }

    /// Keeps `need` from everybody else, whether it is there or not: for one that is next.
    pub fn claim(&mut self, worker: WorkerId, holder: &str, need: Need) {
        self.holdings.insert(worker, Holding::new(holder, need));
    }

    /// Measured bytes replace the predicted ones. They are a fact, so they count even beyond the capacity.
    pub fn settle(&mut self, worker: WorkerId, measured: Need) {
        if let Some(holding) = self.alive(worker) {
            holding.bytes = measured;
            holding.growth.clear();
            holding.taken = true;
        }
    }

    /// A worker has taken what it was promised, as far as anybody knows.
    pub fn taken(&mut self, worker: WorkerId) {
        if let Some(holding) = self.alive(worker) {
            holding.taken = true;
        }
    }

    /// The worker holds so much of a device now. What it was promised beyond stays promised.
    pub fn hold(&mut self, worker: WorkerId, device: &str, bytes: u64) {
        if let Some(known) = self.alive(worker).and_then(|holding| holding.bytes.get_mut(device)) {
            *known = bytes;
        }
    }

    /// As if a worker held so much less.
    pub fn expect_less(&mut self, worker: WorkerId, less: &Need) {
        if let Some(holding) = self.alive(worker) {
            for (device, held) in &mut holding.bytes {
                *held = held.saturating_sub(less.get(device).copied().unwrap_or(0));
            }
        }
    }

    /// Promises a worker more than it holds, all of it or nothing. [`Ledger::settle`] ends the promise.
    pub fn grow(&mut self, worker: WorkerId, more: &Need) -> Result<(), Shortage> {
        self.check(more)?;
        if let Some(holding) = self.alive(worker) {
            for (device, bytes) in more {
                *holding.growth.entry(device.clone()).or_default() += bytes;
            }
        }
        Ok(())
    }

    /// Whether a worker could be promised more than it holds if nobody else held anything.
    #[must_use]
    pub fn could_grow(&self, worker: WorkerId, more: &Need) -> bool {
        let held = |device: &str| self.holdings.get(&worker).map_or(0, |holding| holding.of(device));
        more.iter().all(|(device, bytes)| held(device).saturating_add(*bytes) <= self.capacity(device))
    }

    /// What the worker was promised beyond its holding is not taken after all. Whether there was any.
    pub fn shrink(&mut self, worker: WorkerId) -> bool {
        self.alive(worker).is_some_and(|holding| !std::mem::take(&mut holding.growth).is_empty())
    }

    /// Forgets all workers but these.
    pub fn keep(&mut self, stays: impl Fn(WorkerId) -> bool) {
        self.holdings.retain(|worker, _| stays(*worker));
    }

    /// Nobody holds it any more, and nobody asks a driver about it.
    pub fn release(&mut self, worker: WorkerId) {
        self.holdings.remove(&worker);
    }

    /// The worker has exited: what it held is free, but of these devices only when their driver says so.
    pub fn end(&mut self, worker: WorkerId, has_driver: impl Fn(&str) -> bool) {
        let Some(holding) = self.alive(worker) else { return };
        holding.ended = true;
        for (device, bytes) in std::mem::take(&mut holding.growth) {
            *holding.bytes.entry(device).or_default() += bytes;
        }
        holding.bytes.retain(|device, bytes| *bytes > 0 && has_driver(device));
        if holding.bytes.is_empty() {
            self.holdings.remove(&worker);
        }
    }

    /// As if all that ended workers held were back.
    pub fn expect_back(&mut self) {
        self.holdings.retain(|_, holding| !holding.ended);
    }

    fn alive(&mut self, worker: WorkerId) -> Option<&mut Holding> {
        self.holdings.get_mut(&worker).filter(|holding| !holding.ended)
    }

    /// Bytes of a device that ended workers held and that are not back yet.
    #[must_use]
    pub fn missing(&self, device: &str) -> u64 {
        self.holdings.values().filter(|holding| holding.ended).map(|holding| holding.of(device)).sum()
    }

    /// Whether what ended workers held is back on all devices.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.holdings.values().all(|holding| !holding.ended)
    }

    /// So much of a device is in use that nobody here holds; little of it does not count.
    pub fn set_foreign(&mut self, device: &str, bytes: u64) {
        if bytes > ROUNDING_BYTES {
            self.foreign.insert(device.to_owned(), bytes);
        } else {
            self.foreign.remove(device);
        }
    }

    /// A driver says how much of its device is in use, by all processes. With `patient` what ended workers held may still
    /// be on its way back; without, what is missing counts as foreign from now on.
    pub fn look(&mut self, device: &str, used: u64, patient: bool) {
        let alive = |only_taken: bool| -> u64 {
            let alive = self.holdings.values().filter(|holding| !holding.ended && (holding.taken || !only_taken));
            alive.map(|holding| holding.of(device)).sum()
        };
        // Those that are loading have taken some of what they are promised, nobody knows how much.
        let (least, most) = (used.saturating_sub(alive(false)), used.saturating_sub(alive(true)));
        let missing = self.missing(device);
        let is_back = missing == 0 || most <= self.foreign(device).saturating_add(ROUNDING_BYTES);
        if !is_back && patient {
            return;
        }
        for holding in self.holdings.values_mut().filter(|holding| holding.ended) {
            holding.bytes.remove(device);
        }
        self.holdings.retain(|_, holding| !holding.ended || !holding.bytes.is_empty());
        self.set_foreign(device, least);
    }

    fn shortage(&self, device: &str, needed: u64) -> Shortage {
        let mut by_holder: BTreeMap<&str, u64> = BTreeMap::new();
        for holding in self.holdings.values() {
            let held = holding.of(device);
            if held > 0 {
                *by_holder.entry(&holding.holder).or_default() += held;
            }
        }
        let foreign = self.foreign(device);
        if foreign > 0 {
            by_holder.insert(OTHERS, foreign);
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

    /// What a driver says, and what is free then: [loading, ready, ended] hold 100 each of 1000.
    #[test]
    fn memory_is_free_when_the_driver_says_so() {
        const MIB: u64 = 1 << 20;
        // (used, patient) in MiB; then (missing, foreign, free).
        for (looks, expected) in [
            (&[][..], (100, 0, 700)),
            // All of it is still there.
            (&[(300, true)], (100, 0, 700)),
            // It may be the loading one's memory that is in use, so it is not sure yet.
            (&[(200, true)], (100, 0, 700)),
            (&[(110, true)], (0, 0, 800)),
            // Somebody else has taken some: what is missing is not back as long as that may be it.
            (&[(350, true)], (100, 0, 700)),
            (&[(350, false)], (0, 150, 650)),
            (&[(350, false), (350, true)], (0, 150, 650)),
            (&[(350, false), (120, true)], (0, 0, 800)),
            // A driver that says more than there is.
            (&[(5000, false)], (0, 4800, 0)),
            (&[(0, true)], (0, 0, 800)),
        ] {
            let mut ledger = Ledger::default();
            ledger.set_capacity(need(&[("GPU", 1000 * MIB), ("CPU", 1000 * MIB)]));
            for worker in 1..=3 {
                ledger.reserve(worker, "m", need(&[("GPU", 100 * MIB), ("CPU", 100 * MIB)])).unwrap();
            }
            ledger.settle(2, need(&[("GPU", 100 * MIB), ("CPU", 100 * MIB)]));
            ledger.end(3, |device| device == "GPU");
            assert_eq!(ledger.held("CPU"), 200 * MIB, "a process that has ended holds no host memory");
            for (used, patient) in looks {
                ledger.look("GPU", used * MIB, *patient);
            }
            let found = (ledger.missing("GPU") / MIB, ledger.foreign("GPU") / MIB, ledger.free("GPU") / MIB);
            assert_eq!(found, expected, "{looks:?}");
            assert_eq!(ledger.is_settled(), expected.0 == 0);
        }
    }

    #[test]
    fn a_refusal_names_other_processes() {
        let mut ledger = Ledger::default();
        ledger.set_capacity(need(&[("CUDA0", 24 << 30)]));
        ledger.reserve(1, "a/small", need(&[("CUDA0", 4 << 30)])).unwrap();
        ledger.look("CUDA0", 20 << 30, true);
        let refusal = ledger.check(&need(&[("CUDA0", 8 << 30)])).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "needs 8.0Gi on CUDA0, which has 4.0Gi of 24Gi free; held by other processes 16Gi, a/small 4.0Gi"
        );
        assert!(ledger.check_empty(&need(&[("CUDA0", 8 << 30)])).is_ok(), "they may go");
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
            calls in prop::collection::vec((0_u64..8, 0_u64..600, 0_u64..600, 0_u8..6), 0..60),
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
                    3 if ledger.holding(worker).is_some() => _ = ledger.shrink(worker),
                    4 => ledger.end(worker, |device| device == "GPU"),
                    5 => ledger.look("GPU", gpu << 20, cpu % 2 == 0),
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
                    let spoken_for = ledger.held(device) + ledger.foreign(device);
                    prop_assert_eq!(ledger.free(device), ledger.capacity(device).saturating_sub(spoken_for));
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

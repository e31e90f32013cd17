//! The control group (v2 or v1) that bounds this process's memory. Beyond its limit the kernel ends processes of its own
//! choice, in a container perhaps all of them.
//!
//! Files of the kernel only: reading them takes microseconds.

use std::path::{Path, PathBuf};

/// A group's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupMemory {
    /// Of all processes in it; what the kernel does not let them pass.
    pub limit: u64,
    /// What the kernel cannot take back by itself: anonymous and shared memory, and its own. Pages of files, such as
    /// mapped weights, are not in it.
    pub used: u64,
    /// Percent of the last ten seconds in which none of its processes got on for want of memory; of version 1, of the
    /// machine's.
    pub stalled_percent: u8,
    /// Times that it was at its limit, since it was made.
    pub limit_hits: u64,
}

impl GroupMemory {
    /// Bytes before the kernel ends somebody.
    #[must_use]
    pub const fn left(self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// Bytes of host memory that this process may use: the tightest limit of its groups, or what the machine has.
#[must_use]
pub fn host_memory_limit() -> u64 {
    let meminfo = read(Path::new("/proc/meminfo")).unwrap_or_default();
    let limits = own_groups().filter_map(|group| group.limit(&read)).min();
    limits.unwrap_or(u64::MAX).min(total(&meminfo).unwrap_or(u64::MAX))
}

/// Of the groups with a limit the one that has least left; `None` where nothing bounds this process but the machine.
#[must_use]
pub fn tightest() -> Option<GroupMemory> {
    own_groups().filter_map(|group| group.memory(&read)).min_by_key(|memory| memory.left())
}

/// Whether the kernel ends all processes of a group of this one at once when memory runs out (version 2 alone; a
/// container's runtime decides).
#[must_use]
pub fn ends_together() -> bool {
    own_groups().any(|group| group.ends_together(&read))
}

/// Bytes that this process holds of host memory and that only its end gives back for sure: anonymous and shared, not
/// mapped files.
#[must_use]
pub fn held_bytes() -> Option<u64> {
    held(&read(Path::new("/proc/self/status"))?)
}

fn held(status: &str) -> Option<u64> {
    let kib = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some((kib("RssAnon:")? + kib("RssShmem:")?) * 1024)
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn own_groups() -> impl Iterator<Item = Group> {
    groups(&read(Path::new("/proc/self/cgroup")).unwrap_or_default()).into_iter()
}

fn total(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?;
    Some(kib.trim().parse::<u64>().ok()?.saturating_mul(1024))
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Group {
    V1(PathBuf),
    V2(PathBuf),
}

/// The groups that bound a process's memory, by its `/proc/PID/cgroup`: its own and every ancestor. In a container the
/// path may be the host's and the root its own.
fn groups(cgroup: &str) -> Vec<Group> {
    let mut found = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let ancestors = Path::new(path.trim_start_matches('/')).ancestors();
        if controllers.is_empty() {
            found.extend(ancestors.map(|ancestor| Group::V2(Path::new("/sys/fs/cgroup").join(ancestor))));
        } else if controllers.split(',').any(|controller| controller == "memory") {
            found.extend(ancestors.map(|ancestor| Group::V1(Path::new("/sys/fs/cgroup/memory").join(ancestor))));
        }
    }
    found
}

impl Group {
    fn limit(&self, read: &dyn Fn(&Path) -> Option<String>) -> Option<u64> {
        let file = match self {
            Self::V1(dir) => dir.join("memory.limit_in_bytes"),
            Self::V2(dir) => dir.join("memory.max"),
        };
        // v2 says "max", v1 a number that no machine has.
        let limit = read(&file)?.trim().parse().ok()?;
        (limit < 1 << 60).then_some(limit)
    }

    fn memory(&self, read: &dyn Fn(&Path) -> Option<String>) -> Option<GroupMemory> {
        let limit = self.limit(read)?;
        let stat = |dir: &Path, names: &[&str]| {
            let text = read(&dir.join("memory.stat"))?;
            let value = |name: &&str| {
                text.lines().find_map(|line| line.strip_prefix(*name)?.strip_prefix(' ')?.parse::<u64>().ok())
            };
            Some(names.iter().filter_map(value).sum())
        };
        let used = match self {
            // Kernel memory is in another file there, and in none on newer kernels.
            Self::V1(dir) => {
                let kernel = read(&dir.join("memory.kmem.usage_in_bytes")).and_then(|text| text.trim().parse().ok());
                stat(dir, &["total_rss", "total_shmem"])? + kernel.unwrap_or(0)
            }
            Self::V2(dir) => stat(dir, &["anon", "shmem", "kernel"])?,
        };
        let number = |path: &Path| read(path).and_then(|text| text.trim().parse().ok());
        let (pressure, limit_hits) = match self {
            // Processes stand still where the whole machine lacks memory, too: only with hits of the own limit it counts.
            Self::V1(dir) => (read(Path::new("/proc/pressure/memory")), number(&dir.join("memory.failcnt"))),
            Self::V2(dir) => {
                let hits = read(&dir.join("memory.events"))
                    .and_then(|text| text.lines().find_map(|line| line.strip_prefix("max ")?.trim().parse().ok()));
                (read(&dir.join("memory.pressure")), hits)
            }
        };
        let stalled_percent = pressure.as_deref().and_then(stalled).unwrap_or(0);
        Some(GroupMemory { limit, used, stalled_percent, limit_hits: limit_hits.unwrap_or(0) })
    }

    fn ends_together(&self, read: &dyn Fn(&Path) -> Option<String>) -> bool {
        match self {
            Self::V1(_) => false,
            Self::V2(dir) => read(&dir.join("memory.oom.group")).is_some_and(|text| text.trim() == "1"),
        }
    }
}

/// Of the kernel's pressure stall information: `full avg10=…`, in whole percent.
fn stalled(pressure: &str) -> Option<u8> {
    let full = pressure.lines().find_map(|line| line.strip_prefix("full "))?;
    let average = full.split_whitespace().find_map(|field| field.strip_prefix("avg10="))?;
    average.split('.').next()?.parse::<u8>().ok().map(|percent| percent.min(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(path: &Path) -> Option<String> {
        let text = match path.to_str()? {
            "/sys/fs/cgroup/kubepods/pod1/memory.max" => "max\n",
            "/sys/fs/cgroup/kubepods/memory.max" => "4294967296\n",
            "/sys/fs/cgroup/kubepods/memory.events" => "low 0\nhigh 2\nmax 17\noom 0\n",
            "/sys/fs/cgroup/kubepods/memory.pressure" => {
                "some avg10=40.31 avg60=1.0 avg300=0.0 total=9\nfull avg10=31.99 avg60=0.5 avg300=0.0 total=7\n"
            }
            "/sys/fs/cgroup/kubepods/memory.oom.group" => "1\n",
            "/proc/pressure/memory" => "some avg10=3.0 total=9\nfull avg10=2.50 total=7\n",
            "/sys/fs/cgroup/memory/a/memory.failcnt" => "5\n",
            "/sys/fs/cgroup/kubepods/memory.stat" => "anon 1000\nanon_thp 7\nfile 5000\nkernel 30\nshmem 200\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes" => "9223372036854771712",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes" => "1073741824",
            "/sys/fs/cgroup/memory/a/memory.stat" => "cache 9\nrss 1\ntotal_cache 90\ntotal_rss 2000\n",
            "/sys/fs/cgroup/memory/a/memory.kmem.usage_in_bytes" => "50\n",
            _ => return None,
        };
        Some(text.to_owned())
    }

    #[test]
    fn limits_and_use_of_both_versions() {
        let found = |cgroup| groups(cgroup).iter().filter_map(|group| group.memory(&files)).collect::<Vec<_>>();
        assert_eq!(
            found("0::/kubepods/pod1\n"),
            [GroupMemory { limit: 4 << 30, used: 1230, stalled_percent: 31, limit_hits: 17 }]
        );
        assert_eq!(
            found("5:cpu:/x\n4:memory:/a/b\n"),
            [GroupMemory { limit: 1 << 30, used: 2050, stalled_percent: 2, limit_hits: 5 }]
        );
        assert_eq!(found("5:cpu:/x\n"), []);
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       8388608 kB\n"), Some(8 << 30));
        assert!(host_memory_limit() > 1 << 20);
        let together = |cgroup| groups(cgroup).iter().any(|group| group.ends_together(&files));
        assert!(together("0::/kubepods/pod1\n") && !together("4:memory:/a/b\n") && !together("0::/else\n"));
    }

    #[test]
    fn what_the_kernel_says_of_pressure_and_of_a_process() {
        assert_eq!(stalled("full avg10=100.00 avg60=1"), Some(100));
        assert_eq!(stalled("some avg10=100.00 avg60=1\n"), None);
        assert_eq!(stalled("full total=1"), None);
        let status = "VmRSS:\t 900 kB\nRssAnon:\t     100 kB\nRssFile:\t 700 kB\nRssShmem:\t      7 kB\n";
        assert_eq!(held(status), Some(107 * 1024));
        assert_eq!(held("RssAnon:\t 1 kB\n"), None);
        assert!(held_bytes().is_some_and(|bytes| bytes > 0));
    }
}

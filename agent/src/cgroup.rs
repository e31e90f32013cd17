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
        Some(GroupMemory { limit, used })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(path: &Path) -> Option<String> {
        let text = match path.to_str()? {
            "/sys/fs/cgroup/kubepods/pod1/memory.max" => "max\n",
            "/sys/fs/cgroup/kubepods/memory.max" => "4294967296\n",
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
        assert_eq!(found("0::/kubepods/pod1\n"), [GroupMemory { limit: 4 << 30, used: 1230 }]);
        assert_eq!(found("5:cpu:/x\n4:memory:/a/b\n"), [GroupMemory { limit: 1 << 30, used: 2050 }]);
        assert_eq!(found("5:cpu:/x\n"), []);
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       8388608 kB\n"), Some(8 << 30));
        assert!(host_memory_limit() > 1 << 20);
    }
}

//! The store's directory.
//!
//! ```text
//! lock                 held by the one process that uses the directory
//! <key>.gguf           a whole and checked file
//! <key>.json           what is known of it
//! <key>.partial        a file that is arriving, kept when the download breaks off
//! <key>.partial.json   what a resumed download must agree with
//! <key>.header         the beginning of a file that is not here, as long as that one, with a hole for the rest
//! <key>.refused.json   a file with a wrong digest, so that it is not downloaded again until it changes
//! ```
//!
//! The key is a hash of everything the source says. It is not the content's digest: who knows a digest has not shown
//! that they may read the file.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock, statvfs};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Source, StoreError};

/// What a server says to recognise a file by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub(super) struct Validator {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) etag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) last_modified: Option<String>,
}

impl Validator {
    /// The value for `If-Range`: only a strong tag or a date promises equal bytes.
    pub(super) fn if_range(&self) -> Option<&str> {
        self.etag.as_deref().filter(|tag| !tag.starts_with("W/")).or(self.last_modified.as_deref())
    }
}

/// Beside a whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// For people who look into the directory.
    pub(super) uri: String,
    pub(super) sha256: String,
    pub(super) size_bytes: u64,
    #[serde(flatten)]
    pub(super) validator: Validator,
}

/// Beside a file that is arriving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PartialRecord {
    pub(super) total_bytes: Option<u64>,
    /// The kernel's boot: after a crash of the machine, bytes written just before may read as zeros.
    pub(super) boot_id: String,
    #[serde(flatten)]
    pub(super) validator: Validator,
}

/// Of a file that had another digest than it should.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Refusal {
    pub(super) sha256: String,
    #[serde(flatten)]
    pub(super) validator: Validator,
}

/// The paths of one source's files.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) key: String,
    pub(super) whole: PathBuf,
    pub(super) record: PathBuf,
    pub(super) partial: PathBuf,
    pub(super) partial_record: PathBuf,
    pub(super) refused: PathBuf,
    pub(super) header: PathBuf,
}

impl Slot {
    pub(super) fn new(root: &Path, source: &Source) -> Self {
        let mut hasher = Sha256::new();
        for part in [Some(&source.uri), source.revision.as_ref(), source.sha256.as_ref()] {
            hasher.update(part.map_or("", |p| p));
            hasher.update([0]);
        }
        let mut key = hex(&hasher.finalize());
        key.truncate(40);
        let path = |end: &str| root.join(format!("{key}{end}"));
        Self {
            whole: path(".gguf"),
            record: path(".json"),
            partial: path(".partial"),
            partial_record: path(".partial.json"),
            refused: path(".refused.json"),
            header: path(".header"),
            key,
        }
    }

    /// Removes what has arrived. Blocking.
    pub(super) fn discard_partial(&self) -> Result<(), StoreError> {
        remove_if_there(&self.partial)?;
        remove_if_there(&self.partial_record)
    }

    /// Removes everything of this source; whether there was a file. Blocking.
    pub(super) fn remove(&self) -> Result<bool, StoreError> {
        let was_there = self.whole.exists() || self.partial.exists();
        // The record goes first: a file without one is not trusted.
        for path in [&self.record, &self.whole, &self.partial_record, &self.partial, &self.refused, &self.header] {
            remove_if_there(path)?;
        }
        Ok(was_there)
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|b| [b >> 4, b & 15]).filter_map(|d| char::from_digit(d.into(), 16)).collect()
}

/// Makes the directory and takes its lock, which lasts as long as the returned file. Blocking.
pub(super) fn lock(root: &Path) -> Result<File, StoreError> {
    fs::create_dir_all(root).map_err(StoreError::io(format!("create {}", root.display())))?;
    let path = root.join("lock");
    let file = File::options().create(true).append(true).open(&path);
    let file = file.map_err(StoreError::io(format!("open {}", path.display())))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| StoreError::InUse { root: root.display().to_string() })?;
    Ok(file)
}

/// Removes partial files that nobody has gone on with for so long, and files without a record. Blocking.
pub(super) fn clean(root: &Path, max_age: Duration) -> Result<u64, StoreError> {
    let mut freed = 0;
    for (path, metadata) in entries(root)? {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let is_old =
            metadata.modified().is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > max_age));
        let is_stale =
            is_old && [".partial", ".partial.json", ".refused.json", ".header"].iter().any(|end| name.ends_with(end));
        let is_unrecorded = name.strip_suffix(".gguf").is_some_and(|key| !root.join(format!("{key}.json")).exists());
        if is_stale || is_unrecorded || name.strip_suffix(".tmp").is_some() {
            remove_if_there(&path)?;
            // A header's file has a hole.
            freed += metadata.len().min(metadata.blocks() * 512);
        }
    }
    Ok(freed)
}

/// Bytes of model files on disk, whole and partial, with the key each belongs to. Blocking.
pub(super) fn sizes(root: &Path) -> Result<Vec<(String, u64)>, StoreError> {
    let named = entries(root)?.into_iter().filter_map(|(path, metadata)| {
        let name = path.file_name()?.to_str()?;
        let key = name.strip_suffix(".gguf").or_else(|| name.strip_suffix(".partial"))?;
        Some((key.to_owned(), metadata.len()))
    });
    Ok(named.collect())
}

/// Size and free bytes of the file system. Blocking.
pub(super) fn filesystem(root: &Path) -> Result<(u64, u64), StoreError> {
    let stat = statvfs(root).map_err(io::Error::from);
    let stat = stat.map_err(StoreError::io(format!("look at the file system of {}", root.display())))?;
    Ok((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// Reads a record; one that is missing or broken is none. Blocking.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes a record, whole or not at all. Blocking.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StoreError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let bytes = serde_json::to_vec_pretty(value).map_err(io::Error::from);
    let written = bytes.and_then(|bytes| fs::write(&temporary, bytes)).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // Half of it may be there, on a disk that is full.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(StoreError::io(format!("write {}", path.display())))
}

/// The kernel's name for the time since it started; empty where there is none.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

pub(super) fn remove_if_there(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io(format!("remove {}", path.display()))(e)),
        _ => Ok(()),
    }
}

fn entries(root: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, StoreError> {
    let context = || StoreError::io(format!("list {}", root.display()));
    let mut all = Vec::new();
    for entry in fs::read_dir(root).map_err(context())? {
        let entry = entry.map_err(context())?;
        // A file that went away meanwhile is not there.
        if let Ok(metadata) = entry.metadata() {
            all.push((entry.path(), metadata));
        }
    }
    Ok(all)
}

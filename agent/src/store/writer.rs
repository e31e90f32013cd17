//! Writes, hashes and looks into a file while it arrives, on a thread of its own.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::PathBuf;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::gguf::{self, GgufError};
use super::{StoreError, layout};

/// What is to be written.
pub(super) struct Job {
    pub(super) path: PathBuf,
    /// Keep so many bytes of the file; the rest is cut off.
    pub(super) keep: u64,
    /// Length that the whole file will have, where that is known.
    pub(super) total: Option<u64>,
}

/// What was written.
#[derive(Debug)]
pub(super) struct Written {
    /// Length of the file, what was kept included.
    pub(super) length: u64,
    /// Of the whole file, lower-case hexadecimal.
    pub(super) sha256: String,
}

/// Appends the chunks until the channel closes. A file that shows itself to be no model ends it early. Blocking.
pub(super) fn run(job: &Job, mut chunks: mpsc::Receiver<Bytes>) -> Result<Written, StoreError> {
    let context = || |error| failed(job, error);
    let file = File::options().create(true).read(true).append(true).open(&job.path).map_err(context())?;
    file.set_len(job.keep).map_err(context())?;
    let mut state = Writer { job, file, hasher: Sha256::new(), length: 0, next_look: 4 };
    // What is resumed is hashed again from the disk: only what is really there counts.
    state.rehash().map_err(context())?;
    state.look()?;
    while let Some(chunk) = chunks.blocking_recv() {
        state.file.write_all(&chunk).map_err(context())?;
        state.hasher.update(&chunk);
        state.length += chunk.len() as u64;
        state.look()?;
    }
    state.file.sync_all().map_err(context())?;
    Ok(Written { length: state.length, sha256: layout::hex(&state.hasher.finalize()) })
}

/// Room was claimed for the file, but others may have filled the disk meanwhile.
fn failed(job: &Job, error: io::Error) -> StoreError {
    if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        return StoreError::io(format!("write {}", job.path.display()))(error);
    }
    let written = std::fs::metadata(&job.path).map_or(0, |metadata| metadata.len());
    let free = job.path.parent().and_then(|root| layout::filesystem(root).ok()).map_or(0, |(_, free)| free);
    StoreError::InsufficientStorage {
        needed_bytes: job.total.unwrap_or(written).max(written),
        available_bytes: free.saturating_add(written),
        capacity: "the file system",
    }
}

struct Writer<'a> {
    job: &'a Job,
    file: File,
    hasher: Sha256,
    length: u64,
    /// Length at which the header is tried again; `u64::MAX` when it has been read.
    next_look: u64,
}

impl Writer<'_> {
    fn rehash(&mut self) -> io::Result<()> {
        let mut file = File::open(&self.job.path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => {
                    self.hasher.update(&buffer[..read]);
                    self.length += read as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Reads the header as soon as it has arrived, so that a wrong file costs megabytes and not hours.
    fn look(&mut self) -> Result<(), StoreError> {
        if self.length < self.next_look {
            return Ok(());
        }
        let context = || StoreError::io(format!("read {}", self.job.path.display()));
        let file = File::open(&self.job.path).map_err(context())?;
        match gguf::parse(BufReader::with_capacity(1 << 16, file), self.job.total.unwrap_or(u64::MAX)) {
            Ok(_) => self.next_look = u64::MAX,
            Err(GgufError::HeaderTruncated { .. }) => self.next_look = (self.length * 2).max(1 << 18),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

//! `file://` sources: files that are on the node already. They are used where they are.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{Progress, StoreError, layout};

/// Tells one content of a path from another without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: Option<SystemTime>,
    changed: (i64, i64),
}

/// The real path of a `file://` URL, if it is a file below one of the roots. Blocking.
pub(super) fn resolve(url: &Url, roots: &[PathBuf]) -> Result<(PathBuf, Identity), StoreError> {
    let uri = url.as_str();
    let invalid = |why: &str| StoreError::InvalidSource { uri: uri.to_owned(), why: why.to_owned() };
    let path = url.to_file_path().map_err(|()| invalid("no absolute path on this machine"))?;
    let not_allowed = || StoreError::PathNotAllowed { uri: uri.to_owned() };
    // Links are followed before the roots are compared, or a link would lead out of them.
    let real = match path.canonicalize() {
        Ok(real) => real,
        // Outside of the roots not even the absence of a file is told.
        Err(_) if !is_below(&path, roots) => return Err(not_allowed()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(StoreError::FileNotFound { uri: uri.to_owned() }),
        Err(e) => return Err(StoreError::io(format!("open {uri}"))(e)),
    };
    let is_allowed = roots.iter().filter_map(|root| root.canonicalize().ok()).any(|root| real.starts_with(root));
    if !is_allowed {
        return Err(not_allowed());
    }
    let metadata = fs::metadata(&real).map_err(StoreError::io(format!("look at {uri}")))?;
    if !metadata.is_file() {
        return Err(invalid("it is not a regular file"));
    }
    let identity = Identity {
        path: real.clone(),
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.len(),
        modified: metadata.modified().ok(),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    };
    Ok((real, identity))
}

impl Identity {
    pub(super) fn size(&self) -> u64 {
        self.size
    }
}

/// For a path that cannot be resolved: by its words alone.
fn is_below(path: &Path, roots: &[PathBuf]) -> bool {
    let has_no_dots = path.components().all(|c| c != std::path::Component::ParentDir);
    has_no_dots && roots.iter().any(|root| path.starts_with(root))
}

/// SHA-256 of a file, as lower-case hexadecimal. Blocking.
pub(super) fn digest(
    path: &Path,
    progress: &watch::Sender<Progress>,
    cancel: &CancellationToken,
) -> Result<String, StoreError> {
    let context = || StoreError::io(format!("read {}", path.display()));
    let mut file = File::open(path).map_err(context())?;
    let total = file.metadata().map_err(context())?.len();
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        if cancel.is_cancelled() {
            return Err(StoreError::Cancelled);
        }
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok(layout::hex(&hasher.finalize())),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(context()(e)),
        };
        hasher.update(&buffer[..read]);
        done += read as u64;
        progress.send_replace(Progress { bytes_done: done, bytes_total: Some(total) });
    }
}

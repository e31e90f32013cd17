//! The header of a remote file, without the file: enough for llama.cpp's dry run.

use std::fs::File;
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};

use reqwest::header::ACCEPT_ENCODING;
use reqwest::{Client, StatusCode};
use url::Url;

use super::gguf::{self, GgufError, GgufHeader};
use super::{StoreError, blocking, fetch, layout};

/// Longer headers are had with the file.
const MAX_HEADER_BYTES: usize = 64 << 20;

/// Bytes after which it is first tried whether the header is whole.
const FIRST_LOOK: usize = 1 << 16;

/// A header, and what stands in its file's place.
#[derive(Debug)]
pub(super) struct Peeked {
    pub(super) size_bytes: u64,
    pub(super) header: GgufHeader,
}

/// Reads from the server until the header is whole, and writes it to `path`: a file with a hole where the tensors are, as
/// long as the whole one. `None` where it is too long for that.
pub(super) async fn peek(client: &Client, url: &Url, path: PathBuf) -> Result<Option<Peeked>, StoreError> {
    let failed = |error| fetch::failed(url, error);
    let request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
    let mut response = request.send().await.map_err(failed)?;
    if response.status() != StatusCode::OK {
        return Err(fetch::refused(url, response.status()));
    }
    let total = response.content_length();
    let mut bytes: Vec<u8> = Vec::new();
    let mut next_look = FIRST_LOOK;
    loop {
        let chunk = response.chunk().await.map_err(failed)?;
        bytes.extend_from_slice(chunk.as_deref().unwrap_or_default());
        if bytes.len() < next_look && chunk.is_some() {
            continue;
        }
        match gguf::parse(Cursor::new(&bytes), total.unwrap_or(u64::MAX)) {
            Ok(header) => {
                // The rest is not wanted.
                drop(response);
                let size_bytes = total.unwrap_or(header.needed_bytes);
                return blocking(move || {
                    write(&path, &bytes, size_bytes)?;
                    Ok(Some(Peeked { size_bytes, header }))
                })
                .await;
            }
            Err(GgufError::HeaderTruncated { .. }) if chunk.is_some() && bytes.len() < MAX_HEADER_BYTES => {
                next_look = bytes.len() * 2;
            }
            Err(GgufError::HeaderTruncated { .. }) if chunk.is_some() => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whole or not at all. Blocking.
fn write(path: &Path, bytes: &[u8], length: u64) -> Result<(), StoreError> {
    let temporary = path.with_extension("header.tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        // No more than the file has: what comes behind the header is zeros, and takes no room.
        file.write_all(bytes)?;
        file.set_len(length)
    });
    written
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(StoreError::io(format!("write {}", path.display())))?;
    layout::remove_if_there(&temporary)
}

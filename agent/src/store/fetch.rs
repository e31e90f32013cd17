//! `https://` sources: one download, resumed as often as it breaks off.

use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE,
};
use reqwest::{Client, Response, StatusCode};
use tokio::sync::{OwnedMutexGuard, mpsc, watch};
use url::Url;

use super::address::{AddressPolicy, GuardedResolver};
use super::error::AddressNotAllowed;
use super::layout::{self, PartialRecord, Record, Refusal, Slot, Validator};
use super::quota::Quota;
use super::writer::{self, Written};
use super::{Progress, RetryPolicy, StoreConfig, StoreError, blocking};

/// Hops that a source may take.
const MAX_REDIRECTS: usize = 5;
/// Chunks between the network and the disk: a slow disk slows the network, not the memory.
const CHUNKS_IN_FLIGHT: usize = 16;
/// How far a file of unknown length may grow before the quota is asked again.
const CLAIM_STEP_BYTES: u64 = 8 << 20;

/// Builds the client for remote sources: it reaches only what the policy permits, also after redirects. Blocking.
pub(super) fn client(config: &StoreConfig, policy: Arc<AddressPolicy>) -> Result<Client, StoreError> {
    let (redirect_policy, allow_http) = (Arc::clone(&policy), config.allow_http);
    let redirects = reqwest::redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > MAX_REDIRECTS {
            return attempt.error(format!("more than {MAX_REDIRECTS} redirects"));
        }
        if attempt.url().scheme() == "http" && !allow_http {
            return attempt.error("redirected to http://, which is not allowed");
        }
        match redirect_policy.check_literal(attempt.url()) {
            Ok(()) => attempt.follow(),
            Err(error) => attempt.error(error),
        }
    });
    let failed = |source| StoreError::ClientFailed { source };
    let authorities = match &config.ca_file {
        Some(path) => {
            let pem = std::fs::read(path).map_err(StoreError::io(format!("read {}", path.display())))?;
            reqwest::Certificate::from_pem_bundle(&pem).map_err(failed)?
        }
        None => Vec::new(),
    };
    // reqwest takes the process's provider; that it is there already is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .user_agent(concat!("altiplano-agent/", env!("CARGO_PKG_VERSION")))
        .redirect(redirects)
        .tls_certs_merge(authorities)
        .dns_resolver(GuardedResolver { policy })
        // A proxy would resolve the names itself, past the policy.
        .no_proxy()
        .referer(false)
        .connect_timeout(config.connect_timeout)
        .read_timeout(config.stall_timeout)
        .build()
        .map_err(failed)
}

/// A URL without what may be secret in it: user, password, query.
pub(super) fn display(url: &Url) -> String {
    let mut url = url.clone();
    // These fail for URLs that cannot have such parts.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

/// One file to be downloaded.
pub(super) struct Fetch<'a> {
    pub(super) client: &'a Client,
    pub(super) url: &'a Url,
    pub(super) sha256: Option<&'a str>,
    pub(super) slot: &'a Slot,
    pub(super) quota: &'a Quota,
    pub(super) retry: &'a RetryPolicy,
    pub(super) progress: &'a watch::Sender<Progress>,
    /// Held until the last byte is written, also when the download is given up while a write is under way.
    pub(super) guard: Arc<OwnedMutexGuard<()>>,
}

/// What there is to go on with.
#[derive(Default)]
struct Resume {
    length: u64,
    total: Option<u64>,
    validator: Validator,
}

impl Fetch<'_> {
    /// Downloads, checks and puts the file in its place.
    pub(super) async fn run(&self) -> Result<Record, StoreError> {
        self.check_refusal().await?;
        let mut delay = self.retry.initial_delay;
        let mut attempt = 1;
        let mut may_restart = true;
        loop {
            let Failure { error, was_resumed, validator } = match self.attempt().await {
                Ok(record) => return Ok(record),
                Err(failure) => failure,
            };
            if let StoreError::ChecksumMismatch { got, .. } = &error {
                // The bytes from before the break may be the wrong ones: once, everything anew.
                if was_resumed && may_restart {
                    may_restart = false;
                    continue;
                }
                self.refuse(got.clone(), validator).await?;
            }
            if !error.is_transient() || attempt >= self.retry.attempts {
                return Err(error);
            }
            tracing::info!(uri = %display(self.url), attempt, delay = ?delay, error = %error.detail(), "download broke off");
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(self.retry.max_delay);
            attempt += 1;
        }
    }

    async fn attempt(&self) -> Result<Record, Failure> {
        let resume = self.resume().await?;
        if resume.length > 0 && resume.total == Some(resume.length) {
            // All is here, only the check was interrupted.
            let written = self.receive(None, resume.length, resume.total).await?;
            return self.finish(written, resume.validator, true).await;
        }
        let response = self.request(&resume).await?;
        let headers = response.headers();
        let (keep, total) = match response.status() {
            StatusCode::OK => (0, response.content_length()),
            StatusCode::PARTIAL_CONTENT => self.partial_range(headers, resume.length).await?,
            StatusCode::RANGE_NOT_SATISFIABLE => {
                // The file is shorter now than what is here.
                self.discard().await?;
                return Err(StoreError::DownloadIncomplete { received: 0, expected: resume.length }.into());
            }
            status => return Err(refused(self.url, status).into()),
        };
        let validator = validator(headers);
        self.quota.claim(&self.slot.key, total.unwrap_or(keep)).await?;
        if keep == 0 {
            // Before the new record, or a crash between the two would join old bytes to a new file.
            self.discard().await?;
        }
        let record = PartialRecord { total_bytes: total, boot_id: layout::boot_id(), validator: validator.clone() };
        let path = self.slot.partial_record.clone();
        blocking(move || layout::write_json(&path, &record)).await?;

        let written = match self.receive(Some(response), keep, total).await {
            // Nothing that a later attempt could go on with.
            Err(error @ (StoreError::Gguf(_) | StoreError::InsufficientStorage { .. })) => {
                self.discard().await?;
                return Err(error.into());
            }
            other => other?,
        };
        self.finish(written, validator, keep > 0).await
    }

    /// Sends the request and follows redirects.
    async fn request(&self, resume: &Resume) -> Result<Response, StoreError> {
        let mut request = self.client.get(self.url.clone()).header(ACCEPT_ENCODING, "identity");
        if resume.length > 0 {
            request = request.header(RANGE, format!("bytes={}-", resume.length));
            if let Some(value) = resume.validator.if_range() {
                request = request.header(IF_RANGE, value);
            }
        }
        request.send().await.map_err(|error| self.failed(error))
    }

    /// How many bytes can be kept: none if nothing tells that the rest would belong to them.
    async fn resume(&self) -> Result<Resume, StoreError> {
        let slot = self.slot.clone();
        let is_checked = self.sha256.is_some();
        blocking(move || {
            let length = std::fs::metadata(&slot.partial).map_or(0, |m| m.len());
            let record: Option<PartialRecord> = layout::read_json(&slot.partial_record);
            let kept = record.filter(|record| {
                length > 0
                    && (is_checked || (record.validator.if_range().is_some() && record.boot_id == layout::boot_id()))
                    && record.total_bytes.is_none_or(|total| length <= total)
            });
            if let Some(record) = kept {
                return Ok(Resume { length, total: record.total_bytes, validator: record.validator });
            }
            slot.discard_partial()?;
            Ok(Resume::default())
        })
        .await
    }

    /// Checks `Content-Range` against what was asked for.
    async fn partial_range(&self, headers: &HeaderMap, asked: u64) -> Result<(u64, Option<u64>), StoreError> {
        let range = headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).and_then(parse_content_range);
        match range {
            Some((start, total)) if start == asked && asked > 0 => Ok((asked, total)),
            _ => {
                self.discard().await?;
                let what = format!("asked for the bytes from {asked}, answered with {range:?}");
                Err(StoreError::BadResponse { uri: display(self.url), what })
            }
        }
    }

    /// Takes the body to the disk, behind the bytes that are kept.
    async fn receive(&self, response: Option<Response>, keep: u64, total: Option<u64>) -> Result<Written, StoreError> {
        let (chunks, arriving) = mpsc::channel::<Bytes>(CHUNKS_IN_FLIGHT);
        let job = writer::Job { path: self.slot.partial.clone(), keep, total };
        let guard = Arc::clone(&self.guard);
        let writing = tokio::task::spawn_blocking(move || {
            let written = writer::run(&job, arriving);
            drop(guard);
            written
        });
        let broken = if let Some(response) = response {
            self.pump(response, keep, total, chunks).await.err()
        } else {
            drop(chunks);
            None
        };
        // The writer's error is the cause when the pump ended because of it.
        let written = writing.await.map_err(|e| StoreError::io("write the file")(e.into()))??;
        match (broken, total) {
            (Some(error @ StoreError::InsufficientStorage { .. }), _) | (Some(error), None) => Err(error),
            (_, Some(total)) if written.length < total => {
                Err(StoreError::DownloadIncomplete { received: written.length, expected: total })
            }
            _ => Ok(written),
        }
    }

    /// Hands the body's chunks to the writer until one of the two ends.
    async fn pump(
        &self,
        mut response: Response,
        keep: u64,
        total: Option<u64>,
        chunks: mpsc::Sender<Bytes>,
    ) -> Result<(), StoreError> {
        let mut done = keep;
        let mut claimed = total.unwrap_or(keep);
        self.progress.send_replace(Progress { bytes_done: done, bytes_total: total });
        while let Some(chunk) = response.chunk().await.map_err(|error| self.failed(error))? {
            done += chunk.len() as u64;
            if done > claimed {
                // A file of unknown length claims as it grows.
                self.quota.claim(&self.slot.key, done).await?;
                claimed = done + CLAIM_STEP_BYTES;
            }
            if chunks.send(chunk).await.is_err() {
                break;
            }
            self.progress.send_replace(Progress { bytes_done: done, bytes_total: total });
        }
        if total.is_none() {
            self.quota.claim(&self.slot.key, done).await?;
        }
        Ok(())
    }

    /// Checks what has arrived and moves it to its place.
    async fn finish(&self, written: Written, validator: Validator, was_resumed: bool) -> Result<Record, Failure> {
        let checked = self.put_in_place(written, validator.clone()).await;
        checked.map_err(|error| Failure { error, was_resumed, validator })
    }

    async fn put_in_place(&self, written: Written, validator: Validator) -> Result<Record, StoreError> {
        let slot = self.slot.clone();
        let expected = self.sha256.map(str::to_owned);
        let uri = display(self.url);
        blocking(move || {
            if let Some(expected) = expected.filter(|e| *e != written.sha256) {
                slot.discard_partial()?;
                return Err(StoreError::ChecksumMismatch { expected, got: written.sha256 });
            }
            if let Err(error) = super::gguf::read(&slot.partial) {
                slot.discard_partial()?;
                return Err(error.into());
            }
            let record = Record { uri, sha256: written.sha256, size_bytes: written.length, validator };
            // The file first: the record is what makes it count.
            std::fs::rename(&slot.partial, &slot.whole)
                .map_err(StoreError::io(format!("rename {}", slot.partial.display())))?;
            if let Err(error) = layout::write_json(&slot.record, &record) {
                // A file without its record counts for nothing and takes room.
                slot.remove()?;
                return Err(error);
            }
            layout::remove_if_there(&slot.partial_record)?;
            layout::remove_if_there(&slot.refused)?;
            layout::remove_if_there(&slot.header)?;
            if let Some(directory) = slot.whole.parent() {
                let synced = std::fs::File::open(directory).and_then(|d| d.sync_all());
                synced.map_err(StoreError::io(format!("sync {}", directory.display())))?;
            }
            Ok(record)
        })
        .await
    }

    /// Whether the server still has the file that had the wrong digest; asked without downloading it.
    async fn check_refusal(&self) -> Result<(), StoreError> {
        let Some(expected) = self.sha256 else { return Ok(()) };
        let path = self.slot.refused.clone();
        let Some(refusal) = blocking(move || Ok(layout::read_json::<Refusal>(&path))).await? else { return Ok(()) };
        let mut request = self.client.head(self.url.clone());
        request = match (&refusal.validator.etag, &refusal.validator.last_modified) {
            (Some(etag), _) => request.header(IF_NONE_MATCH, etag),
            (None, Some(date)) => request.header(IF_MODIFIED_SINCE, date),
            (None, None) => return Ok(()),
        };
        // A server that does not answer this is asked for the file itself.
        let Ok(response) = request.send().await else { return Ok(()) };
        let is_same = response.status() == StatusCode::NOT_MODIFIED
            || (response.status() == StatusCode::OK && validator(response.headers()) == refusal.validator);
        if is_same {
            return Err(StoreError::ChecksumMismatch { expected: expected.to_owned(), got: refusal.sha256 });
        }
        Ok(())
    }

    /// Remembers a file with a wrong digest. Without a tag or a date, its return could not be told.
    async fn refuse(&self, sha256: String, validator: Validator) -> Result<(), StoreError> {
        if validator == Validator::default() {
            return Ok(());
        }
        let path = self.slot.refused.clone();
        blocking(move || layout::write_json(&path, &Refusal { sha256, validator })).await
    }

    async fn discard(&self) -> Result<(), StoreError> {
        let slot = self.slot.clone();
        blocking(move || slot.discard_partial()).await
    }

    fn failed(&self, error: reqwest::Error) -> StoreError {
        failed(self.url, error)
    }
}

/// What a status says that brings no file.
pub(super) fn refused(url: &Url, status: StatusCode) -> StoreError {
    let uri = display(url);
    match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => StoreError::FileNotFound { uri },
        status => StoreError::HttpStatus { uri, status: status.as_u16() },
    }
}

/// The error behind reqwest's: a refused address is found in the chain.
pub(super) fn failed(url: &Url, error: reqwest::Error) -> StoreError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        if let Some(refused) = inner.downcast_ref::<AddressNotAllowed>() {
            return refused.clone().into();
        }
        cause = inner.source();
    }
    StoreError::DownloadFailed { uri: display(url), source: error.without_url() }
}

/// An error, and whether bytes from an earlier attempt were part of the file.
struct Failure {
    error: StoreError,
    was_resumed: bool,
    /// Of the file that was refused.
    validator: Validator,
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self { error, was_resumed: false, validator: Validator::default() }
    }
}

fn validator(headers: &HeaderMap) -> Validator {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    Validator { etag: text(ETAG), last_modified: text(LAST_MODIFIED) }
}

/// The first byte and the length of the whole file from `bytes 5-9/10`.
fn parse_content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((start.parse().ok()?, total))
}

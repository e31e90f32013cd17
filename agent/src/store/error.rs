//! Why a model file is not there.

use std::io;
use std::net::IpAddr;

use super::gguf::GgufError;

/// Why a model file could not be had. [`StoreError::reason`] is the condition's reason.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The source is no URI.
    #[error("{uri:?} is not a valid model source: {why}")]
    InvalidSource {
        /// What was given.
        uri: String,
        /// What is wrong with it.
        why: String,
    },
    /// The store cannot fetch from such a source, or was told not to.
    #[error("sources of scheme {scheme}:// are not supported{hint}")]
    UnsupportedScheme {
        /// The scheme.
        scheme: String,
        /// How to change that, where that is possible.
        hint: &'static str,
    },
    /// There is no such file.
    #[error("{uri} does not exist")]
    FileNotFound {
        /// Where it was looked for.
        uri: String,
    },
    /// A local file outside of the roots that the admin has named.
    #[error("{uri} is not below a directory that this node may serve files from")]
    PathNotAllowed {
        /// The file asked for.
        uri: String,
    },
    /// A remote source whose address lies in a network that is not to be reached.
    #[error(transparent)]
    AddressNotAllowed(#[from] AddressNotAllowed),
    /// The server refused.
    #[error("{uri} answered with status {status}")]
    HttpStatus {
        /// Where.
        uri: String,
        /// The HTTP status.
        status: u16,
    },
    /// The server could not be reached, or the connection broke.
    #[error("cannot download {uri}")]
    DownloadFailed {
        /// Where.
        uri: String,
        /// What happened.
        source: reqwest::Error,
    },
    /// Nothing can be fetched, for the lack of certificate authorities.
    #[error("cannot make an HTTPS client")]
    ClientFailed {
        /// What is missing.
        source: reqwest::Error,
    },
    /// The server answered with something that is not HTTP as it should be.
    #[error("cannot download {uri}: {what}")]
    BadResponse {
        /// Where.
        uri: String,
        /// What is wrong.
        what: String,
    },
    /// The connection ended before the file did. What has arrived is kept.
    #[error("the download ended early: {received} of {expected} bytes")]
    DownloadIncomplete {
        /// Bytes on disk.
        received: u64,
        /// Bytes that the server announced.
        expected: u64,
    },
    /// The file is another one.
    #[error("sha256 of the file is {got}, expected {expected}")]
    ChecksumMismatch {
        /// From the spec, lower-case hexadecimal.
        expected: String,
        /// Of the file, lower-case hexadecimal.
        got: String,
    },
    /// The file does not fit.
    #[error("{needed_bytes} bytes are needed and {available_bytes} are free ({capacity})")]
    InsufficientStorage {
        /// Bytes of the file.
        needed_bytes: u64,
        /// Bytes left for it.
        available_bytes: u64,
        /// What sets the limit.
        capacity: &'static str,
    },
    /// The file is not a model that can be loaded.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The disk said no.
    #[error("cannot {action}")]
    Io {
        /// What was tried, with the path.
        action: String,
        /// What the system says.
        source: io::Error,
    },
    /// Another process holds the directory.
    #[error("another process uses the store at {root}")]
    InUse {
        /// The directory.
        root: String,
    },
    /// The caller does not want the file any more. What has arrived is kept.
    #[error("cancelled")]
    Cancelled,
}

/// A network that models must not be fetched from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{host} has address {address}, which models must not be fetched from")]
pub struct AddressNotAllowed {
    /// The host as it was named.
    pub host: String,
    /// The address it has.
    pub address: IpAddr,
}

impl StoreError {
    /// The reason for a condition, in `CamelCase`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidSource { .. } => "InvalidSource",
            Self::UnsupportedScheme { .. } => "UnsupportedScheme",
            Self::FileNotFound { .. } => "FileNotFound",
            Self::PathNotAllowed { .. } => "PathNotAllowed",
            Self::AddressNotAllowed(_) => "AddressNotAllowed",
            Self::HttpStatus { .. } => "HttpStatus",
            Self::DownloadFailed { .. } | Self::ClientFailed { .. } | Self::BadResponse { .. } => "DownloadFailed",
            Self::DownloadIncomplete { .. } => "DownloadIncomplete",
            Self::ChecksumMismatch { .. } => "ChecksumMismatch",
            Self::InsufficientStorage { .. } => "InsufficientStorage",
            Self::Gguf(GgufError::NotGguf { .. }) => "NotGGUF",
            Self::Gguf(GgufError::UnsupportedVersion { .. } | GgufError::UnsupportedTensorType { .. }) => {
                "UnsupportedFormat"
            }
            Self::Gguf(GgufError::HeaderTruncated { .. } | GgufError::Truncated { .. }) => "FileTruncated",
            Self::Gguf(GgufError::Corrupt { .. }) => "CorruptHeader",
            Self::Gguf(GgufError::Io(_)) | Self::Io { .. } => "StorageError",
            Self::InUse { .. } => "StoreInUse",
            Self::Cancelled => "Cancelled",
        }
    }

    /// The message with those of its causes, for a condition.
    #[must_use]
    pub fn detail(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let next = error.to_string();
            // Some libraries repeat the cause in their own message.
            if !text.contains(&next) {
                text.push_str(": ");
                text.push_str(&next);
            }
            cause = error.source();
        }
        text
    }

    /// Whether the same request may do better in a moment.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::HttpStatus { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            Self::DownloadFailed { source, .. } => !source.is_builder() && !source.is_redirect(),
            Self::DownloadIncomplete { .. } => true,
            _ => false,
        }
    }

    pub(super) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}

//! What can go wrong in the engine.

use altiplano_crds::conditions::reasons;

/// Why the engine cannot start or go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The file is not what it should be, or cannot be read.
    #[error("cannot load {path}: {message}")]
    LoadFailed {
        /// The file.
        path: String,
        /// llama.cpp's own words.
        message: String,
    },
    /// llama.cpp does not know the model's architecture.
    #[error("cannot load {path}: {message}")]
    UnknownArchitecture {
        /// The file.
        path: String,
        /// llama.cpp's own words.
        message: String,
    },
    /// The model cannot generate text (an encoder, or one without a vocabulary).
    #[error("the model cannot generate text: {0}")]
    UnsupportedModel(String),
    /// A device that the agent granted is not there.
    #[error("no device {0} in this process")]
    UnknownDevice(String),
    /// Memory ran out.
    #[error("not enough memory: {0}")]
    InsufficientMemory(String),
    /// llama.cpp refused the context's settings.
    #[error("cannot make a context: {0}")]
    ContextFailed(String),
    /// The model cannot have such a context.
    #[error("{0}")]
    UnsupportedContext(String),
    /// The draft model cannot guess for the model.
    #[error("the draft model does not fit the model: {0}")]
    DraftUnfit(String),
    /// A setting that makes no sense.
    #[error("invalid configuration: {0}")]
    InvalidConfig(String),
    /// llama.cpp failed while computing.
    #[error("llama.cpp failed while computing: {0}")]
    DecodeFailed(String),
    /// The request waited in the queue until its deadline.
    #[error("the request waited too long for a free slot")]
    QueueTimeout,
    /// The running sequences leave no room for this one.
    #[error("the context is full: {0}")]
    ContextFull(String),
    /// The grammar, or what the model would say next, leaves nothing that may be said.
    #[error("the output cannot follow its grammar any further: {0}")]
    GrammarFailed(String),
    /// The engine was told to stop before the request ended.
    #[error("the model was unloaded before the request ended")]
    ShutDown,
    /// The thread or another part of the process could not be had.
    #[error("{0}")]
    Internal(String),
}

impl EngineError {
    /// llama.cpp failed while computing, in its own words: drivers take memory then, too, and may have none.
    #[must_use]
    pub(super) fn while_computing(message: String) -> Self {
        if speaks_of_memory(&message) { Self::InsufficientMemory(message) } else { Self::DecodeFailed(message) }
    }

    /// A word for conditions and metric labels.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::LoadFailed { .. } => "LoadFailed",
            Self::UnknownArchitecture { .. } => "UnknownArchitecture",
            Self::UnsupportedModel(_) => "UnsupportedModel",
            Self::UnknownDevice(_) => "UnknownDevice",
            Self::InsufficientMemory(_) => "InsufficientMemory",
            Self::ContextFailed(_) => "ContextFailed",
            // The operator's word for what no node can do.
            Self::UnsupportedContext(_) => reasons::UNSUPPORTED_SPEC,
            Self::DraftUnfit(_) => "DraftUnfit",
            Self::InvalidConfig(_) => "InvalidConfig",
            Self::DecodeFailed(_) => "DecodeFailed",
            Self::QueueTimeout => "QueueTimeout",
            Self::ContextFull(_) => "ContextFull",
            Self::GrammarFailed(_) => "GrammarFailed",
            Self::ShutDown => "ShutDown",
            Self::Internal(_) => "Internal",
        }
    }
}

/// llama.cpp gives no codes, only words.
pub(super) fn speaks_of_memory(message: &str) -> bool {
    let message = message.to_lowercase();
    ["failed to allocate", "unable to allocate", "out of memory", "outofdevicememory", "bad_alloc", "cudamalloc failed"]
        .iter()
        .any(|words| message.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_ran_out_while_computing_is_said() {
        let reason = |message: &str| EngineError::while_computing(message.to_owned()).reason();
        assert_eq!(reason("vk::Device::allocateMemory: ErrorOutOfDeviceMemory"), "InsufficientMemory");
        assert_eq!(reason("code -3: graph_compute failed"), "DecodeFailed");
    }
}

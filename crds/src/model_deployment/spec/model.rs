//! The model: its file, and what goes with it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::hundred;

/// The model file and what goes with it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Where the GGUF file comes from.
    pub source: ModelSource,

    /// Secret in the same namespace with the credential for the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,

    /// Multimodal projector (mmproj), for models that read images or sound. Loaded with the model, on the first of its devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projector: Option<ModelSource>,

    /// Smaller model of the same vocabulary, for speculative decoding; `engine.speculative` says how it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<ModelSource>,

    /// LoRA adapters; a request names one as `<servedName>:<adapter>`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub adapters: Vec<AdapterSpec>,

    /// Jinja chat template that replaces the one in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 65536))]
    pub chat_template: Option<String>,
}

/// Where a file comes from, and how to know that it is the right one.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ModelSource {
    /// `https://host/file.gguf`, `file:///below/an/allowed/root.gguf`, `hf://owner/repository/file.gguf`,
    /// `s3://bucket/key` or `oci://registry/repository:tag`.
    #[schemars(length(min = 8, max = 2048), regex(pattern = r"^(https?|file|hf|s3|oci)://[^\s]+$"))]
    pub uri: String,

    /// Branch, tag or commit, where the source has such a thing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub revision: Option<String>,

    /// The files to take, where the source holds several; the first is the one that is opened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 512)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub files: Vec<String>,

    /// SHA-256 of the file, in 64 lower-case hexadecimal digits. A file with another digest is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = r"^[a-f0-9]{64}$"))]
    pub sha256: Option<String>,
}

/// Names a Secret in the same namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A LoRA adapter.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct AdapterSpec {
    /// Name that a request puts behind the colon.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,

    /// Where the adapter's GGUF file comes from.
    pub source: ModelSource,

    /// Strength of the adapter in percent; 100 is as trained.
    #[serde(default = "hundred")]
    #[schemars(range(min = 0, max = 1000))]
    pub scale_percent: i32,
}

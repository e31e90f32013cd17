//! Reads the header of a GGUF file: what the model is, and whether the file is whole.
//!
//! For files nobody vouches for: every length is checked before it is believed, nothing is allocated by a number from
//! the file, and the checks are at least those of llama.cpp's own reader, which ends the process on some of them.

mod reader;

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use self::reader::{Reader, kind};
use super::ggml_type;

/// More than any model's header has; what lies behind is not read.
const MAX_HEADER_BYTES: u64 = 512 << 20;
/// Of each: far above what exists, low enough to keep in memory.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 18;
const MAX_KEY_BYTES: u64 = 1 << 12;
/// llama.cpp's limit, with the closing zero.
const MAX_TENSOR_NAME_BYTES: u64 = 63;
/// llama.cpp's limit on layers; it aborts above it.
const MAX_BLOCKS: u64 = 512;
/// Longer strings, chat templates among them, are passed over.
const MAX_KEPT_BYTES: u64 = 1 << 10;
const DEFAULT_ALIGNMENT: u64 = 32;

/// What the header says of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufHeader {
    /// `general.architecture`, such as `llama`.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// The quantisation by llama.cpp's name for the file's type, such as `Q4_K_M`; without one in the file, the type
    /// that holds most of the bytes.
    pub quantization: String,
    /// The context length that the model was trained for, in tokens.
    pub trained_context_tokens: Option<u64>,
    /// Number of layers.
    pub block_count: Option<u64>,
    /// Weights in all tensors of this file.
    pub parameter_count: u64,
    /// Number of tensors in this file.
    pub tensor_count: u64,
    /// Whether the file carries a chat template.
    pub has_chat_template: bool,
    /// Number of files the model is split into; 1 when it is not.
    pub split_count: u64,
    /// Length that the header and its tensors need, in bytes.
    pub needed_bytes: u64,
}

/// Why a file is not a model that can be loaded.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The magic number is another one.
    #[error("the file is not a GGUF: it begins with {found}")]
    NotGguf {
        /// The first bytes, readable.
        found: String,
    },
    /// A version of the format that llama.cpp does not read.
    #[error("GGUF version {version} is not supported, only 2 and 3 are")]
    UnsupportedVersion {
        /// The version found.
        version: u32,
    },
    /// A tensor type that llama.cpp does not know.
    #[error("tensor {tensor} has type {number}, which is not supported")]
    UnsupportedTensorType {
        /// Name of the tensor.
        tensor: String,
        /// Number of the type.
        number: u32,
    },
    /// The file ends within its header.
    #[error("the file ends within its header, after {bytes} bytes")]
    HeaderTruncated {
        /// Length of the file, in bytes.
        bytes: u64,
    },
    /// The header is whole and the tensors are not.
    #[error("the file is truncated: {actual} bytes of {needed}")]
    Truncated {
        /// Length that the header asks for, in bytes.
        needed: u64,
        /// Length of the file, in bytes.
        actual: u64,
    },
    /// The header contradicts itself or the format.
    #[error("the header is corrupt at byte {at}: {what}")]
    Corrupt {
        /// Where it was noticed, in bytes from the beginning.
        at: u64,
        /// What is wrong there.
        what: String,
    },
    /// The disk said no.
    #[error("cannot read the file")]
    Io(#[from] io::Error),
}

/// Reads and checks the header of the file. Blocking.
pub fn read(path: &Path) -> Result<GgufHeader, GgufError> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    parse(BufReader::with_capacity(1 << 16, file), length)
}

/// Reads and checks a header. `length` is the whole file's, which may be more than `source` holds yet: then a header
/// that goes on beyond it is [`GgufError::HeaderTruncated`].
pub fn parse(source: impl Read, length: u64) -> Result<GgufHeader, GgufError> {
    let mut reader = Reader::new(source, MAX_HEADER_BYTES);
    let magic: [u8; 4] = match reader.bytes() {
        Ok(magic) => magic,
        Err(GgufError::HeaderTruncated { bytes }) => {
            return Err(GgufError::NotGguf { found: format!("only {bytes} bytes") });
        }
        Err(other) => return Err(other),
    };
    if &magic != b"GGUF" {
        return Err(GgufError::NotGguf { found: format!("\"{}\"", magic.escape_ascii()) });
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::UnsupportedVersion { version });
    }
    let tensor_count = reader.count("tensors", MAX_TENSORS)?;
    let key_count = reader.count("metadata keys", MAX_KEYS)?;
    let metadata = Metadata::read(&mut reader, key_count)?;

    let Some(architecture) = metadata.string("general.architecture").filter(|a| !a.is_empty()) else {
        return Err(reader.corrupt("general.architecture is missing"));
    };
    let alignment = metadata.numbers.get("general.alignment").copied().unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(reader.corrupt(format!("the alignment is {alignment}")));
    }
    let block_count = metadata.number(architecture, "block_count");
    if block_count.is_some_and(|n| n == 0 || n > MAX_BLOCKS) {
        return Err(reader.corrupt(format!("block_count is {}", block_count.unwrap_or(0))));
    }

    let tensors = Tensors::read(&mut reader, tensor_count, alignment)?;
    let data_begin = if tensor_count > 0 { reader.at().next_multiple_of(alignment) } else { reader.at() };
    let needed = data_begin
        .checked_add(tensors.data_bytes)
        .ok_or_else(|| reader.corrupt("the tensors are longer than any file"))?;
    if needed > length {
        return Err(GgufError::Truncated { needed, actual: length });
    }
    let quantization = metadata
        .numbers
        .get("general.file_type")
        .and_then(|n| ggml_type::file_type_name(*n))
        .or_else(|| tensors.bytes_by_type.iter().max_by_key(|(_, bytes)| **bytes).map(|(name, _)| *name))
        .unwrap_or("unknown");
    Ok(GgufHeader {
        architecture: architecture.to_owned(),
        name: metadata.string("general.name").map(str::to_owned),
        quantization: quantization.to_owned(),
        trained_context_tokens: metadata.number(architecture, "context_length"),
        block_count,
        parameter_count: tensors.parameters,
        tensor_count,
        has_chat_template: metadata.keys.contains("tokenizer.chat_template"),
        split_count: metadata.numbers.get("split.count").copied().unwrap_or(1).max(1),
        needed_bytes: needed,
    })
}

/// The metadata that matters: whole numbers and short strings.
struct Metadata {
    keys: HashSet<String>,
    numbers: BTreeMap<String, u64>,
    strings: BTreeMap<String, String>,
}

impl Metadata {
    fn read<R: Read>(reader: &mut Reader<R>, count: u64) -> Result<Self, GgufError> {
        let mut all = Self { keys: HashSet::new(), numbers: BTreeMap::new(), strings: BTreeMap::new() };
        for _ in 0..count {
            let key = reader.string("a metadata key", MAX_KEY_BYTES)?;
            if key.is_empty() {
                return Err(reader.corrupt("a metadata key is empty"));
            }
            if all.keys.contains(&key) {
                return Err(reader.corrupt(format!("the metadata key {key} stands there twice")));
            }
            let kind = reader.u32()?;
            if key == "general.alignment" && kind != kind::U32 {
                return Err(reader.corrupt("general.alignment is not a 32-bit number"));
            }
            match kind {
                kind::ARRAY => reader.skip_array(&key)?,
                kind::STRING => {
                    let length = reader.u64()?;
                    if length > MAX_KEPT_BYTES {
                        reader.skip(length)?;
                    } else if let Ok(value) = String::from_utf8(reader.vec(length)?) {
                        all.strings.insert(key.clone(), value);
                    }
                }
                _ => {
                    if let Some(number) = reader.scalar(&key, kind)? {
                        all.numbers.insert(key.clone(), number);
                    }
                }
            }
            all.keys.insert(key);
        }
        Ok(all)
    }

    fn string(&self, key: &str) -> Option<&str> {
        self.strings.get(key).map(String::as_str)
    }

    fn number(&self, architecture: &str, key: &str) -> Option<u64> {
        self.numbers.get(&format!("{architecture}.{key}")).copied()
    }
}

/// What the tensors' descriptions add up to.
struct Tensors {
    parameters: u64,
    data_bytes: u64,
    bytes_by_type: BTreeMap<&'static str, u64>,
}

impl Tensors {
    fn read<R: Read>(reader: &mut Reader<R>, count: u64, alignment: u64) -> Result<Self, GgufError> {
        let mut all = Self { parameters: 0, data_bytes: 0, bytes_by_type: BTreeMap::new() };
        let mut names = HashSet::new();
        // The padding after the last tensor may be missing from the file.
        let mut next_offset = 0u64;
        for _ in 0..count {
            let name = reader.string("a tensor name", MAX_TENSOR_NAME_BYTES)?;
            let dimensions = reader.u32()?;
            if dimensions > 4 {
                return Err(reader.corrupt(format!("tensor {name} has {dimensions} dimensions")));
            }
            let mut row = 1;
            let mut elements = Some(1u64);
            for i in 0..dimensions {
                let length = reader.u64()?;
                row = if i == 0 { length } else { row };
                elements = elements.and_then(|n| n.checked_mul(length)).filter(|n| i64::try_from(*n).is_ok());
            }
            let number = reader.u32()?;
            let offset = reader.u64()?;
            let Some(kind) = ggml_type::by_number(number) else {
                return Err(GgufError::UnsupportedTensorType { tensor: name, number });
            };
            if !row.is_multiple_of(kind.block) {
                return Err(reader.corrupt(format!("a row of tensor {name} is no multiple of {} weights", kind.block)));
            }
            if offset != next_offset {
                return Err(reader.corrupt(format!("tensor {name} is at offset {offset}, expected {next_offset}")));
            }
            let bytes = elements.and_then(|n| (n / kind.block).checked_mul(kind.block_bytes));
            let sums = elements.zip(bytes).and_then(|(elements, bytes)| {
                let end = offset.checked_add(bytes)?;
                Some((all.parameters.checked_add(elements)?, bytes, end, end.checked_next_multiple_of(alignment)?))
            });
            let Some((parameters, bytes, end, padded)) = sums else {
                return Err(reader.corrupt(format!("tensor {name} is longer than any file")));
            };
            all.parameters = parameters;
            all.data_bytes = end;
            next_offset = padded;
            *all.bytes_by_type.entry(kind.name).or_default() += bytes;
            if !names.insert(name) {
                return Err(reader.corrupt("a tensor name stands there twice"));
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use altiplano_test_models::{Architecture, BadFile, Quantization, Spec, Tokenizer};
    use proptest::prelude::*;

    use super::*;

    /// A good file, small enough to be mutated many times.
    static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("good.gguf");
        Spec { layers: 1, ..Spec::default() }.write(&path).expect("written");
        std::fs::read(path).expect("read")
    });

    fn parse_bytes(bytes: &[u8]) -> Result<GgufHeader, GgufError> {
        parse(bytes, bytes.len() as u64)
    }

    #[test]
    fn headers_of_generated_files_say_what_was_asked_for() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("m.gguf");
        for (architecture, name) in
            [(Architecture::Llama, "llama"), (Architecture::Qwen2, "qwen2"), (Architecture::Gemma3, "gemma3")]
        {
            for (quantization, label) in [
                (Quantization::F32, "F32"),
                (Quantization::F16, "F16"),
                (Quantization::Q8_0, "Q8_0"),
                (Quantization::Q4_0, "Q4_0"),
            ] {
                for tokenizer in [Tokenizer::Bpe, Tokenizer::Spm] {
                    let spec = Spec { architecture, quantization, tokenizer, layers: 3, ..Spec::default() };
                    let written = spec.write(&path).expect("written");
                    let header = read(&path).expect("a good file");
                    assert_eq!(header.architecture, name);
                    assert_eq!(header.quantization, label);
                    assert_eq!(header.name.as_deref(), Some("Altiplano Random"));
                    assert_eq!(header.trained_context_tokens, Some(2048));
                    assert_eq!(header.block_count, Some(3));
                    assert_eq!(header.parameter_count, spec.parameters());
                    assert!(header.has_chat_template);
                    assert!(header.needed_bytes <= written && written - header.needed_bytes < 32, "{header:?}");
                }
            }
        }
    }

    #[test]
    fn bad_files_are_refused_with_their_reason() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for kind in BadFile::ALL {
            let path = dir.path().join(format!("{kind:?}"));
            kind.write(&Spec::default(), &path).expect("written");
            let found = match read(&path) {
                Ok(header) => format!("Ok {}", header.architecture),
                Err(error) => error.to_string(),
            };
            let expected = match kind {
                BadFile::NotGguf => "the file is not a GGUF: it begins with \"<!do\"",
                BadFile::Empty => "the file is not a GGUF: it begins with only 0 bytes",
                BadFile::Truncated => "the file is truncated: ",
                BadFile::TruncatedHeader => "the file ends within its header, after 200 bytes",
                BadFile::CorruptHeader => {
                    "the header is corrupt at byte 32: a metadata key of 1152921504606846976 bytes"
                }
                BadFile::UnknownVersion => "GGUF version 9 is not supported",
                // Which architectures and tensors there are is llama.cpp's to say.
                BadFile::UnknownArchitecture => "Ok guana",
                BadFile::MissingTensor => "Ok llama",
                BadFile::NoLayers => "the header is corrupt",
            };
            assert!(found.starts_with(expected), "{kind:?}: {found}");
        }
    }

    #[test]
    fn a_truncated_file_is_told_with_both_lengths() {
        let needed = parse_bytes(&GOOD).expect("good").needed_bytes;
        let short = &GOOD[..GOOD.len() - 1000];
        match parse_bytes(short) {
            Err(GgufError::Truncated { needed: n, actual }) => {
                assert_eq!((n, actual), (needed, short.len() as u64));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_header_that_has_not_all_arrived_is_told_from_a_truncated_file() {
        let whole = GOOD.len() as u64;
        assert!(matches!(parse(&GOOD[..1000], whole), Err(GgufError::HeaderTruncated { bytes: 1000 })));
        let header_only = whole - parse_bytes(&GOOD).expect("good").parameter_count * 2;
        let arrived = usize::try_from(header_only + 4096).expect("small");
        assert!(parse(&GOOD[..arrived], whole).is_ok());
    }

    #[test]
    fn numbers_that_would_overflow_are_refused() {
        let name = b"blk.0.attn_q.weight";
        let at = GOOD.windows(name.len()).position(|w| w == name).expect("the tensor") + name.len() + 4;
        for huge in [u64::MAX, 1 << 63, 1 << 62] {
            let mut bad = GOOD.clone();
            bad[at..at + 8].copy_from_slice(&huge.to_le_bytes());
            let error = parse_bytes(&bad).expect_err("refused");
            assert!(matches!(error, GgufError::Corrupt { .. }), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// Whatever is in the header: an answer, no panic, and none that claims more than the file holds.
        #[test]
        fn mutated_headers_are_read_or_refused(
            changes in prop::collection::vec((0usize..20_000, any::<u8>()), 1..8),
            numbers in prop::collection::vec((0usize..20_000, prop::sample::select(vec![0, 1, 255, 1 << 16, 1 << 31, 1 << 40, u64::MAX >> 1, u64::MAX])), 0..3),
            keep in prop::option::of(0usize..20_000),
        ) {
            let mut bytes = GOOD.clone();
            for (at, value) in changes {
                bytes[at] = value;
            }
            for (at, value) in numbers {
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            if let Some(keep) = keep {
                bytes.truncate(keep);
            }
            if let Ok(header) = parse_bytes(&bytes) {
                prop_assert!(header.needed_bytes <= bytes.len() as u64);
            }
        }

        #[test]
        fn noise_behind_the_magic_is_read_or_refused(noise in prop::collection::vec(any::<u8>(), 0..400)) {
            let bytes = [b"GGUF\x03\0\0\0".as_slice(), &noise].concat();
            let _ = parse_bytes(&bytes);
        }
    }
}

//! Writes the header of a GGUF file, version 3, little endian.

/// What tensor data is aligned to, the format's default.
pub(crate) const ALIGNMENT: u64 = 32;

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// A header in the making.
#[derive(Debug, Default)]
pub(crate) struct Header {
    keys: u64,
    metadata: Vec<u8>,
    tensors: u64,
    infos: Vec<u8>,
    data: u64,
}

impl Header {
    pub(crate) fn string(&mut self, key: &str, value: &str) {
        self.key(key, STRING);
        put_string(&mut self.metadata, value);
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.key(key, U32);
        self.metadata.extend(value.to_le_bytes());
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.key(key, F32);
        self.metadata.extend(value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) {
        self.key(key, BOOL);
        self.metadata.push(u8::from(value));
    }

    pub(crate) fn strings<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        self.array(key, STRING, values.len() as u64);
        for value in values {
            put_string(&mut self.metadata, value);
        }
    }

    pub(crate) fn i32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = i32>) {
        self.array(key, I32, values.len() as u64);
        self.metadata.extend(values.flat_map(i32::to_le_bytes));
    }

    pub(crate) fn f32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = f32>) {
        self.array(key, F32, values.len() as u64);
        self.metadata.extend(values.flat_map(f32::to_le_bytes));
    }

    pub(crate) fn tensor(&mut self, name: &str, shape: &[u64], ggml_type: u32, bytes: u64) {
        self.tensors += 1;
        put_string(&mut self.infos, name);
        self.infos.extend(u32::try_from(shape.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.infos.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
        self.infos.extend(ggml_type.to_le_bytes());
        self.infos.extend(self.data.to_le_bytes());
        self.data += bytes.next_multiple_of(ALIGNMENT);
    }

    /// The bytes up to where the tensors' data begins.
    pub(crate) fn finish(self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.keys.to_le_bytes());
        out.extend(self.metadata);
        out.extend(self.infos);
        let padded = (out.len() as u64).next_multiple_of(ALIGNMENT);
        out.resize(usize::try_from(padded).unwrap_or(usize::MAX), 0);
        out
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.keys += 1;
        put_string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
    }

    fn array(&mut self, key: &str, kind: u32, length: u64) {
        self.key(key, ARRAY);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(length.to_le_bytes());
    }
}

fn put_string(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

//! Reads the values that a GGUF header is made of, and counts the bytes.

use std::io::{self, Read};

use super::GgufError;

/// `gguf_type`.
pub(super) mod kind {
    pub(in super::super) const U8: u32 = 0;
    pub(in super::super) const I8: u32 = 1;
    pub(in super::super) const U16: u32 = 2;
    pub(in super::super) const I16: u32 = 3;
    pub(in super::super) const U32: u32 = 4;
    pub(in super::super) const I32: u32 = 5;
    pub(in super::super) const F32: u32 = 6;
    pub(in super::super) const BOOL: u32 = 7;
    pub(in super::super) const STRING: u32 = 8;
    pub(in super::super) const ARRAY: u32 = 9;
    pub(in super::super) const U64: u32 = 10;
    pub(in super::super) const I64: u32 = 11;
    pub(in super::super) const F64: u32 = 12;

    /// Bytes of a scalar; `None` for strings, arrays and what does not exist.
    pub(super) fn width(kind: u32) -> Option<u64> {
        match kind {
            U8 | I8 | BOOL => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            _ => None,
        }
    }
}

/// Reads little-endian values and counts the bytes.
pub(super) struct Reader<R> {
    source: io::Take<R>,
    limit: u64,
    at: u64,
}

impl<R: Read> Reader<R> {
    /// Reads at most `limit` bytes.
    pub(super) fn new(source: R, limit: u64) -> Self {
        Self { source: source.take(limit), limit, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn corrupt(&self, what: impl Into<String>) -> GgufError {
        GgufError::Corrupt { at: self.at, what: what.into() }
    }

    /// The source ended: because the file does, or because no header may be this long.
    fn ended(&self) -> GgufError {
        if self.at >= self.limit {
            return self.corrupt(format!("the header is longer than {} bytes", self.limit));
        }
        GgufError::HeaderTruncated { bytes: self.at }
    }

    pub(super) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut buffer = [0; N];
        let mut filled = 0;
        while filled < N {
            match self.source.read(&mut buffer[filled..]) {
                Ok(0) => return Err(self.ended()),
                Ok(n) => {
                    filled += n;
                    self.at += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(buffer)
    }

    pub(super) fn u32(&mut self) -> Result<u32, GgufError> {
        self.bytes().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, GgufError> {
        self.bytes().map(u64::from_le_bytes)
    }

    pub(super) fn count(&mut self, what: &str, limit: u64) -> Result<u64, GgufError> {
        let count = self.u64()?;
        if count > limit {
            return Err(self.corrupt(format!("{count} {what}, at most {limit} are read")));
        }
        Ok(count)
    }

    /// The caller bounds `length`.
    pub(super) fn vec(&mut self, length: u64) -> Result<Vec<u8>, GgufError> {
        let mut bytes = Vec::new();
        let read = self.source.by_ref().take(length).read_to_end(&mut bytes)? as u64;
        self.at += read;
        if read < length { Err(self.ended()) } else { Ok(bytes) }
    }

    pub(super) fn string(&mut self, what: &str, limit: u64) -> Result<String, GgufError> {
        let length = self.u64()?;
        if length > limit {
            return Err(self.corrupt(format!("{what} of {length} bytes, at most {limit} are read")));
        }
        let bytes = self.vec(length)?;
        String::from_utf8(bytes).map_err(|_| self.corrupt(format!("{what} is not UTF-8")))
    }

    pub(super) fn skip(&mut self, length: u64) -> Result<(), GgufError> {
        if length > self.limit {
            return Err(self.corrupt(format!("a value of {length} bytes")));
        }
        let skipped = io::copy(&mut self.source.by_ref().take(length), &mut io::sink())?;
        self.at += skipped;
        if skipped < length { Err(self.ended()) } else { Ok(()) }
    }

    pub(super) fn skip_array(&mut self, key: &str) -> Result<(), GgufError> {
        let kind = self.u32()?;
        let length = self.u64()?;
        if let Some(width) = kind::width(kind) {
            let bytes =
                length.checked_mul(width).ok_or_else(|| self.corrupt(format!("{key} has {length} elements")))?;
            return self.skip(bytes);
        }
        if kind != kind::STRING {
            return Err(self.corrupt(format!("{key} is an array of type {kind}")));
        }
        // Each string takes eight bytes at least, so the file's end bounds this.
        for _ in 0..length {
            let bytes = self.u64()?;
            self.skip(bytes)?;
        }
        Ok(())
    }

    /// A scalar as a number, where it is a whole one that is not negative.
    pub(super) fn scalar(&mut self, key: &str, kind: u32) -> Result<Option<u64>, GgufError> {
        Ok(match kind {
            kind::U8 => Some(u64::from(u8::from_le_bytes(self.bytes()?))),
            kind::I8 => u64::try_from(i8::from_le_bytes(self.bytes()?)).ok(),
            kind::U16 => Some(u64::from(u16::from_le_bytes(self.bytes()?))),
            kind::I16 => u64::try_from(i16::from_le_bytes(self.bytes()?)).ok(),
            kind::U32 => Some(u64::from(self.u32()?)),
            kind::I32 => u64::try_from(i32::from_le_bytes(self.bytes()?)).ok(),
            kind::U64 => Some(self.u64()?),
            kind::I64 => u64::try_from(i64::from_le_bytes(self.bytes()?)).ok(),
            kind::F32 | kind::F64 | kind::BOOL => {
                self.skip(kind::width(kind).unwrap_or(0))?;
                None
            }
            _ => return Err(self.corrupt(format!("{key} has value type {kind}"))),
        })
    }
}

//! Frames of a stream, byte by byte: server-sent events, and lines of JSON.

use std::collections::VecDeque;

use bytes::Bytes;
use serde::Serialize;

/// Frames on their way out. Each is sent by itself.
#[derive(Debug, Default)]
pub(crate) struct Frames(VecDeque<Bytes>);

impl Frames {
    /// An event without a name; its data is `value` as JSON, which has no line break in it.
    pub(crate) fn data(&mut self, value: &impl Serialize) -> Result<(), serde_json::Error> {
        self.json(b"data: ", value, b"\n\n")
    }

    /// An event called `name`.
    pub(crate) fn event(&mut self, name: &str, value: &impl Serialize) -> Result<(), serde_json::Error> {
        self.json(format!("event: {name}\ndata: ").as_bytes(), value, b"\n\n")
    }

    /// A line of JSON.
    pub(crate) fn line(&mut self, value: &impl Serialize) -> Result<(), serde_json::Error> {
        self.json(b"", value, b"\n")
    }

    /// A frame that is bytes already.
    pub(crate) fn raw(&mut self, frame: Bytes) {
        self.0.push_back(frame);
    }

    /// The next frame to send.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        self.0.pop_front()
    }

    fn json(&mut self, before: &[u8], value: &impl Serialize, after: &[u8]) -> Result<(), serde_json::Error> {
        let mut frame = Vec::with_capacity(256);
        frame.extend_from_slice(before);
        serde_json::to_writer(&mut frame, value)?;
        frame.extend_from_slice(after);
        self.0.push_back(frame.into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_the_text() {
        let mut frames = Frames::default();
        frames.data(&"a\nb\r\n\u{2028}").unwrap();
        frames.event("x", &[1]).unwrap();
        frames.line(&"a\nb").unwrap();
        assert_eq!(frames.pop().unwrap(), "data: \"a\\nb\\r\\n\u{2028}\"\n\n");
        assert_eq!(frames.pop().unwrap(), "event: x\ndata: [1]\n\n");
        assert_eq!(frames.pop().unwrap(), "\"a\\nb\"\n");
        assert_eq!(frames.pop(), None);
    }
}

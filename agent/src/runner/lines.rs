//! Lines of bounded length from a child's output.

use std::collections::VecDeque;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};

/// Longest line that is taken whole, in bytes; what is beyond it in the same line is dropped.
pub(super) const MAX_LINE_BYTES: usize = 64 * 1024;

/// The next line without its end, invalid UTF-8 replaced; `None` at the end of the stream.
pub(crate) async fn next_line(reader: &mut (impl AsyncBufRead + Unpin)) -> std::io::Result<Option<String>> {
    let mut line = Vec::new();
    if (&mut *reader).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') && line.len() == MAX_LINE_BYTES {
        skip_line(reader).await?;
    }
    while matches!(line.last(), Some(b'\n' | b'\r')) {
        line.pop();
    }
    Ok(Some(String::from_utf8_lossy(&line).into_owned()))
}

async fn skip_line(reader: &mut (impl AsyncBufRead + Unpin)) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf().await?;
        if buffer.is_empty() {
            return Ok(());
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let used = end.map_or(buffer.len(), |at| at + 1);
        reader.consume(used);
        if end.is_some() {
            return Ok(());
        }
    }
}

/// The last lines of a stream, each clipped.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail(VecDeque<String>);

impl Tail {
    const LINES: usize = 8;
    const CHARS: usize = 240;

    pub(super) fn push(&mut self, line: &str) {
        if self.0.len() == Self::LINES {
            self.0.pop_front();
        }
        self.0.push_back(altiplano_crds::names::clip(line, Self::CHARS));
    }

    /// The lines, the last one last.
    pub(super) fn text(&self) -> String {
        self.0.iter().map(String::as_str).collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_bounded_and_the_next_one_is_whole() {
        let long = "x".repeat(3 * MAX_LINE_BYTES);
        let text = format!("first\r\n{long}\nthird\nno end");
        let mut reader = tokio::io::BufReader::new(text.as_bytes());
        assert_eq!(next_line(&mut reader).await.unwrap().as_deref(), Some("first"));
        assert_eq!(next_line(&mut reader).await.unwrap().map(|line| line.len()), Some(MAX_LINE_BYTES));
        assert_eq!(next_line(&mut reader).await.unwrap().as_deref(), Some("third"));
        assert_eq!(next_line(&mut reader).await.unwrap().as_deref(), Some("no end"));
        assert_eq!(next_line(&mut reader).await.unwrap(), None);
    }

    #[test]
    fn the_tail_keeps_the_last_lines() {
        let mut tail = Tail::default();
        for number in 0..20 {
            tail.push(&format!("line {number}"));
        }
        assert!(tail.text().starts_with("line 12; ") && tail.text().ends_with("; line 19"), "{}", tail.text());
    }
}

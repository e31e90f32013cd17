//! The worker's side of its connections: a Unix socket that is watched for what comes, and for room only when there is
//! none.
//!
//! tokio's own watches both always, and Linux says of a Unix socket that there is room each time its reader takes
//! something: the thread that moves tokens would be woken twice for every token, on a core that computes.

use std::io::{self, IoSlice, Read as _, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, unix::SocketAddr};

/// Pause after a connection that could not be taken, which is most often for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes connections for [`axum::serve`].
pub(super) struct Listener(pub(super) UnixListener);

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            let accepted = self.0.accept().await;
            match accepted.and_then(|(stream, address)| Ok((Connection::new(stream.into_std()?)?, address))) {
                Ok(accepted) => return accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection was not taken");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// One connection.
pub(super) struct Connection {
    socket: AsyncFd<UnixStream>,
    /// There while a write waits for room.
    room: Option<AsyncFd<UnixStream>>,
}

/// Has a socket watched.
#[expect(deprecated, reason = "its successor is unsafe for types that may change their descriptor; this one does not")]
fn watch(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    AsyncFd::with_interest(socket, interest)
}

impl Connection {
    fn new(socket: UnixStream) -> io::Result<Self> {
        Ok(Self { socket: watch(socket, Interest::READABLE)?, room: None })
    }

    fn poll_write_with(
        &mut self,
        context: &mut Context<'_>,
        write: impl Fn(&UnixStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match write(self.socket.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => {
                    self.room = None;
                    return Poll::Ready(result);
                }
            }
            let room = match self.room.take() {
                Some(room) => room,
                None => watch(self.socket.get_ref().try_clone()?, Interest::WRITABLE)?,
            };
            ready!(self.room.insert(room).poll_write_ready(context))?.clear_ready();
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(context))?;
            match guard.try_io(|socket| socket.get_ref().read(buffer.initialize_unfilled())) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(read) => return Poll::Ready(read.map(|bytes| buffer.advance(bytes))),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_with(context, |mut socket| socket.write(bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(context, |mut socket| socket.write_vectored(pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.get_ref().shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use axum::serve::Listener as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// More than a socket holds goes through, in both directions at once, whole and in order, with a slow reader.
    #[tokio::test]
    async fn much_goes_through() {
        const BYTES: usize = 8 << 20;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let mut listener = Listener(UnixListener::bind(&path).expect("a listener"));
        let sent: Vec<u8> = (0..=250).cycle().take(BYTES).collect();
        let client = tokio::net::UnixStream::connect(&path).await.expect("a connection");
        let (connection, _) = listener.accept().await;

        let begun = Instant::now();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = tokio::io::split(connection);
        let forth = async {
            to_server.write_all(&sent).await.expect("room");
            to_server.shutdown().await.expect("an end");
        };
        let back = async {
            to_client.write_all(&sent).await.expect("room");
            to_client.shutdown().await.expect("an end");
        };
        let read_forth = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let mut all = Vec::new();
            from_client.read_to_end(&mut all).await.expect("bytes");
            all
        };
        let read_back = async {
            let mut all = Vec::new();
            from_server.read_to_end(&mut all).await.expect("bytes");
            all
        };
        let all = async { tokio::join!(forth, back, read_forth, read_back) };
        let ((), (), forth, back) =
            tokio::time::timeout(Duration::from_mins(1), all).await.expect("bytes within a minute");
        assert!(forth == sent && back == sent, "{} and {} bytes after {:?}", forth.len(), back.len(), begun.elapsed());
    }
}

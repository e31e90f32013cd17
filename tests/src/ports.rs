//! Ports for programs that are told which one to listen on. The agent's own tests include this file, too.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// An address on loopback whose port nobody listens on. Until this process ends nobody else gets it from here, in whatever
/// process; and it is not among those that the kernel gives to whoever asks for any.
pub fn free_address() -> io::Result<SocketAddr> {
    /// What says that a port is given away: a name that the kernel forgets with this process.
    static GIVEN: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(61);
    for _ in 0..20_000 {
        let place = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        let port = u16::try_from(10_000 + place).unwrap_or_default();
        let name = std::os::unix::net::SocketAddr::from_abstract_name(format!("altiplano-test-port-{port}"));
        let Ok(mark) = name.and_then(|name| UnixListener::bind_addr(&name)) else { continue };
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            GIVEN.lock().unwrap_or_else(PoisonError::into_inner).push(mark);
            return Ok(address);
        }
    }
    Err(io::Error::other("no port from 10,000 to 29,999 is free"))
}

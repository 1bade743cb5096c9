//! System calls of the packet ports that tokio and socket2 have no wrapper for.
//!
//! [`messages`] compiles everywhere (one call a packet where the system has no `recvmmsg`), [`tun`] too
//! (Linux is the one that has offloads). [`address`] is Linux's; elsewhere tun-rs sets them.

#[cfg(target_os = "linux")]
pub(super) mod address;
pub(super) mod messages;
pub(super) mod tun;

use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

use crate::error::{Error, ErrorKind, Phase, Result};

/// Puts a descriptor into the event loop of this thread.
pub(super) fn watch(fd: OwnedFd, what: &'static str) -> Result<AsyncFd<OwnedFd>> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(Error::new(ErrorKind::ApiMisuse, "a port must be opened on an I/O thread"));
    }
    // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(|refused| {
        let (_, source) = refused.into_parts();
        Error::io(ErrorKind::Device, format_args!("watch {what}"), &source).with_phase(Phase::Connect)
    })
}

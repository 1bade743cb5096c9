//! What the system knows of a TCP connection.

use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Its round trip as TCP has measured it: from the three-way handshake on. Zero of what is not TCP.
#[cfg(target_os = "linux")]
pub(crate) fn round_trip(fd: BorrowedFd<'_>) -> Duration {
    use std::os::fd::AsRawFd;

    // SAFETY: all-zero bytes are a valid `tcp_info`.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the structure outlives the call, which writes as much of it as `len` says; the descriptor is borrowed.
    let got = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if got == 0 { Duration::from_micros(info.tcpi_rtt.into()) } else { Duration::ZERO }
}

/// It is not asked for here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn round_trip(_: BorrowedFd<'_>) -> Duration {
    Duration::ZERO
}

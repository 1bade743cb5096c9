//! The system calls under [`super::FdStream`], none of which waits.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{Interest, unix::AsyncFd};

use crate::error::{Error, ErrorKind, Result};
use crate::fd::nonblocking::NonBlocking;
use crate::fd::{Access, FdKind};

/// Slices that one call takes (`IOV_MAX` of Linux).
const MAX_SLICES: usize = 1024;

/// What the difference matters for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Tcp,
    /// Another stream socket: Unix, vsock, SCTP, MPTCP.
    Socket,
    TerminalMaster,
    /// Pipes, terminals, other devices.
    Other,
}

impl Kind {
    pub(super) fn is_socket(self) -> bool {
        matches!(self, Self::Tcp | Self::Socket)
    }
}

/// A descriptor that may be used without waiting.
#[derive(Debug)]
pub(in crate::stream) struct Descriptor(Own);

#[derive(Debug)]
enum Own {
    /// A socket, or an open file that is non-blocking and ours.
    Plain(OwnedFd),
    /// An open file that is the caller's too.
    Guarded(NonBlocking),
}

impl Descriptor {
    pub(in crate::stream) fn plain(fd: OwnedFd) -> Self {
        Self(Own::Plain(fd))
    }

    pub(super) fn guarded(fd: NonBlocking) -> Self {
        Self(Own::Guarded(fd))
    }

    /// The descriptor of one that was made with [`plain`](Self::plain).
    pub(super) fn into_plain(self) -> OwnedFd {
        match self.0 {
            Own::Plain(fd) => fd,
            Own::Guarded(_) => unreachable!("only plain descriptors are taken back"),
        }
    }

    pub(super) fn receive(&self, kind: Kind, buf: &mut [u8]) -> io::Result<usize> {
        let (fd, start, len) = (self.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len());
        let n = match kind.is_socket() {
            // SAFETY: the kernel writes at most `len` bytes from `start`, all of them in `buf`.
            true => unsafe { libc::recv(fd, start, len, libc::MSG_DONTWAIT) },
            // SAFETY: as above.
            false => unsafe { libc::read(fd, start, len) },
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// SIGPIPE does not come: sockets are told so, and the I/O threads block it.
    pub(super) fn send(&self, kind: Kind, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let (fd, count) = (self.as_raw_fd(), slices.len().min(MAX_SLICES));
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let n = if let [one] = slices
            && kind.is_socket()
        {
            // Less for the system to read than a message.
            // SAFETY: the slice's bytes live through the call.
            unsafe { libc::send(fd, one.as_ptr().cast(), one.len(), flags) }
        } else if kind.is_socket() {
            // SAFETY: all-zero bytes are a valid `msghdr`.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            // `IoSlice` has the layout of `iovec`; sending does not write through it.
            message.msg_iov = slices.as_ptr().cast_mut().cast();
            message.msg_iovlen = count as _;
            // SAFETY: the message's `count` vectors live through the call.
            unsafe { libc::sendmsg(fd, &raw const message, flags) }
        } else {
            // SAFETY: `IoSlice` has the layout of `iovec`, and `count` of them live through the call.
            unsafe { libc::writev(fd, slices.as_ptr().cast(), count as libc::c_int) }
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Bytes of a TCP connection's sending direction that the peer has not acknowledged and still may.
    pub(super) fn unconfirmed(&self) -> usize {
        // The system goes on counting what a reset has left unacknowledged.
        if self.is_over() {
            return 0;
        }
        let mut bytes: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) writes one int, which lives through the call.
        let result = unsafe { libc::ioctl(self.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        if result == 0 { usize::try_from(bytes).unwrap_or(0) } else { 0 }
    }

    /// Whether nothing is sent or received any more: a TCP connection was reset, or has ended both ways.
    fn is_over(&self) -> bool {
        /// `TCP_CLOSE` of Linux.
        const CLOSE: u8 = 7;
        // SAFETY: all-zero bytes are a valid `tcp_info`.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
        let (level, option) = (libc::IPPROTO_TCP, libc::TCP_INFO);
        // SAFETY: the system writes at most `len` bytes, all of them in `info`, which lives through the call.
        let result = unsafe {
            libc::getsockopt(self.as_raw_fd(), level, option, (&raw mut info).cast(), &raw mut len)
        };
        result == 0 && info.tcpi_state == CLOSE
    }

    /// Breaks a TCP connection off, also where a caller's duplicate keeps the socket open.
    pub(super) fn reset_tcp(&self) {
        // For the close that follows, should the next call be refused (a thread waits in the socket).
        let _ = SockRef::from(self).set_linger(Some(Duration::ZERO));
        // SAFETY: all-zero bytes are a valid `sockaddr`.
        let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
        nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
        let len = size_of::<libc::sockaddr>() as libc::socklen_t;
        // SAFETY: the address lives through the call. To connect to AF_UNSPEC is to disconnect: the
        // peer gets an RST at once.
        unsafe { libc::connect(self.as_raw_fd(), &raw const nowhere, len) };
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Own::Plain(fd) => fd.as_fd(),
            Own::Guarded(fd) => fd.as_fd(),
        }
    }
}

/// Puts a descriptor under the care of this thread's event loop, or gives it back with the reason.
pub(in crate::stream) fn register(
    descriptor: Descriptor,
    interest: Interest,
) -> Result<std::result::Result<AsyncFd<Descriptor>, (Descriptor, io::Error)>> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(Error::new(ErrorKind::ApiMisuse, "streams are made on the event loop that uses them"));
    }
    // SAFETY: a `Descriptor` owns an open descriptor and names the same one as long as it lives.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    Ok(registered.map_err(tokio::io::unix::AsyncFdRegisterError::into_parts))
}

/// Three probes more, a third of the silence apart: a dead peer is found after twice `idle`.
pub(super) fn set_keepalive(socket: &SockRef<'_>, idle: Option<Duration>) -> io::Result<()> {
    let Some(idle) = idle else { return Ok(()) };
    let second = Duration::from_secs(1);
    let keepalive =
        TcpKeepalive::new().with_time(idle.max(second)).with_interval((idle / 3).max(second)).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

/// For people: `pipe (reading)`, `terminal /dev/pts/3`.
pub(super) fn describe(fd: BorrowedFd<'_>, kind: &FdKind, access: Access) -> String {
    let direction = match (access.read, access.write) {
        (true, false) => " (reading)",
        (false, true) => " (writing)",
        _ => "",
    };
    // Pipes have no name worth showing: the link reads `pipe:[123]`.
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .ok()
        .filter(|path| path.is_absolute())
        .map_or_else(String::new, |path| format!(" {}", path.display()));
    format!("{kind}{name}{direction}")
}

//! Descriptors that a caller hands over: what they are, and who owns them.
//!
//! An `int` belongs to the caller: it is duplicated ([`duplicate`]) and the caller goes on to close
//! its own. An [`OwnedFd`] is ours. Nothing here reads or writes; making an open file non-blocking
//! and undoing that later is [`nonblocking`].

pub mod nonblocking;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use socket2::SockRef;

use crate::error::{Error, ErrorKind, Result};

/// What a descriptor refers to. A directory, an epoll or event descriptor and the like carry no
/// payload: [`classify`] refuses them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdKind {
    /// A socket.
    Socket(SocketKind),
    /// A pipe's end or a FIFO.
    Pipe,
    /// A terminal.
    Terminal {
        /// The controlling side of a pseudo-terminal, which cannot be opened a second time.
        master: bool,
    },
    /// A queue of a TUN or TAP interface (macvtap included).
    Tun(TunKind),
    /// Another character device (`/dev/null`, a PPP unit).
    Character,
    /// A block device.
    Block,
    /// A plain file.
    File,
}

/// What kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketKind {
    /// `AF_INET`, `AF_INET6`, `AF_UNIX`, …
    pub domain: i32,
    /// How it moves bytes.
    pub socket_type: SocketType,
    /// `IPPROTO_TCP`, `IPPROTO_UDP`, 0 for Unix sockets, …
    pub protocol: i32,
    /// Whether it accepts connections.
    pub listening: bool,
}

/// How a socket moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketType {
    /// Ordered bytes.
    Stream,
    /// Datagrams.
    Datagram,
    /// Connected, whole messages.
    SeqPacket,
    /// Anything else (`SOCK_RAW`, …).
    Other(i32),
}

/// What TUNGETIFF says of a TUN or TAP descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunKind {
    /// The interface's name.
    pub name: String,
    /// `IFF_TUN`, `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR`, … as the kernel keeps them.
    pub flags: i32,
}

impl SocketKind {
    /// A connection over TCP.
    pub fn is_tcp(&self) -> bool {
        matches!(self.domain, libc::AF_INET | libc::AF_INET6)
            && self.socket_type == SocketType::Stream
            && self.protocol == libc::IPPROTO_TCP
    }
}

impl FdKind {
    /// Whether it carries ordered bytes; otherwise it carries whole packets.
    pub fn is_stream(&self) -> bool {
        match self {
            Self::Socket(socket) => socket.socket_type == SocketType::Stream,
            Self::Tun(_) => false,
            Self::Pipe | Self::Terminal { .. } | Self::Character | Self::Block | Self::File => true,
        }
    }
}

impl fmt::Display for FdKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(socket) => write!(f, "{socket}"),
            Self::Pipe => f.write_str("pipe"),
            Self::Terminal { master: false } => f.write_str("terminal"),
            Self::Terminal { master: true } => f.write_str("pseudo-terminal master"),
            Self::Tun(tun) if tun.flags & libc::IFF_TAP != 0 => write!(f, "tap {}", tun.name),
            Self::Tun(tun) => write!(f, "tun {}", tun.name),
            Self::Character => f.write_str("character device"),
            Self::Block => f.write_str("block device"),
            Self::File => f.write_str("file"),
        }
    }
}

impl fmt::Display for SocketKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.domain {
            libc::AF_INET => "IPv4 ",
            libc::AF_INET6 => "IPv6 ",
            libc::AF_UNIX => "Unix ",
            libc::AF_VSOCK => "vsock ",
            libc::AF_PACKET => "packet ",
            libc::AF_NETLINK => "netlink ",
            _ => "",
        };
        let what = match self.socket_type {
            SocketType::Stream if self.listening => "listening socket",
            SocketType::Stream => "stream socket",
            SocketType::Datagram => "datagram socket",
            SocketType::SeqPacket if self.listening => "listening seqpacket socket",
            SocketType::SeqPacket => "seqpacket socket",
            SocketType::Other(_) => "raw socket",
        };
        write!(f, "{family}{what}")
    }
}

/// In which directions an open file may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Open for reading.
    pub read: bool,
    /// Open for writing.
    pub write: bool,
}

impl Access {
    /// Reading alone.
    pub const READ: Self = Self { read: true, write: false };
    /// Writing alone.
    pub const WRITE: Self = Self { read: false, write: true };
}

/// Duplicates a caller's descriptor number; `field` is the option it came in.
///
/// The duplicate shares the open file with the caller's: whoever changes that file's flags changes
/// them for both. What can be no endpoint is refused here, where the caller's number is known.
pub fn duplicate(number: RawFd, field: &'static str) -> Result<OwnedFd> {
    duplicate_known(number, field).map(|(fd, _)| fd)
}

/// The same, with what it is, which had to be asked anyway.
pub(crate) fn duplicate_known(number: RawFd, field: &'static str) -> Result<(OwnedFd, FdKind)> {
    // SAFETY: F_DUPFD_CLOEXEC touches no memory, and for a number that is not open it fails.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(not_usable(number, field, &io::Error::last_os_error()));
    }
    // SAFETY: the kernel just made this descriptor for us, so nobody else owns it.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    let kind = classify_as(copy.as_fd(), number, field)?;
    Ok((copy, kind))
}

/// Opens what is at `path`, waiting for nobody: opening a FIFO would wait for its other end, for ever.
///
/// A FIFO to be read has no end before its first writer has left; one to be written needs its reader.
pub fn open_path(path: &Path, options: &mut OpenOptions, field: &'static str) -> Result<OwnedFd> {
    let file = options.custom_flags(libc::O_NONBLOCK).open(path).map_err(|source| {
        let is_fifo = || path.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo());
        if source.raw_os_error() == Some(libc::ENXIO) && is_fifo() {
            let message = format!("nobody reads the FIFO {}", path.display());
            return Error::new(ErrorKind::Device, message).with_reason("no_reader").with_field(field);
        }
        Error::io(ErrorKind::Device, format_args!("open {}", path.display()), &source).with_field(field)
    })?;
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        let message = format!("{} is a directory", path.display());
        return Err(Error::config(field, message).with_reason("directory"));
    }
    let fd = OwnedFd::from(file);
    nonblocking::clear(fd.as_fd()).map_err(|source| {
        Error::io(ErrorKind::Device, format_args!("use {}", path.display()), &source).with_field(field)
    })?;
    Ok(fd)
}

/// Says what `fd` is; `field` is the option to blame when it can be no endpoint.
pub fn classify(fd: BorrowedFd<'_>, field: &'static str) -> Result<FdKind> {
    classify_as(fd, fd.as_raw_fd(), field)
}

/// The same, with the number by which its owner knows it.
fn classify_as(fd: BorrowedFd<'_>, number: RawFd, field: &'static str) -> Result<FdKind> {
    // First, because most are; whatever else it is says more below.
    if let Ok(socket) = classify_socket(fd) {
        return Ok(FdKind::Socket(socket));
    }
    let unusable = |source: io::Error| not_usable(number, field, &source);
    let kind = metadata(fd).map_err(unusable)?.file_type();
    if kind.is_dir() {
        return Err(
            Error::config(field, format!("descriptor {number} is a directory")).with_reason("directory")
        );
    }
    // Its access mode reads as "for reading", but no read is allowed.
    if open_flags(fd).map_err(unusable)? & libc::O_PATH != 0 {
        return Err(Error::config(field, format!("descriptor {number} was opened with O_PATH: no I/O")));
    }
    if kind.is_socket() {
        return Ok(FdKind::Socket(classify_socket(fd).map_err(unusable)?));
    }
    if kind.is_fifo() {
        return Ok(FdKind::Pipe);
    }
    if kind.is_file() {
        return Ok(FdKind::File);
    }
    if kind.is_block_device() {
        return Ok(FdKind::Block);
    }
    if kind.is_char_device() {
        return classify_character(fd, number, field);
    }
    // epoll, eventfd, timerfd and their kind have no file type at all.
    Err(Error::config(field, format!("descriptor {number} is neither a socket, a pipe, a file nor a device"))
        .with_reason("not_an_endpoint"))
}

/// In which directions `fd` may be used.
pub fn access(fd: BorrowedFd<'_>) -> io::Result<Access> {
    let mode = open_flags(fd)? & libc::O_ACCMODE;
    Ok(Access {
        read: mode == libc::O_RDONLY || mode == libc::O_RDWR,
        write: mode == libc::O_WRONLY || mode == libc::O_RDWR,
    })
}

/// [`access`] of a descriptor of this kind, with the option to blame.
pub(crate) fn checked_access(fd: BorrowedFd<'_>, kind: &FdKind, field: &'static str) -> Result<Access> {
    if matches!(kind, FdKind::Socket(_)) {
        return Ok(Access { read: true, write: true }); // by definition: it need not be asked
    }
    access(fd).map_err(|source| not_usable(fd.as_raw_fd(), field, &source))
}

/// Whether a socket is connected, or was: a connection that is gone says why when it is used.
pub(crate) fn has_peer(fd: BorrowedFd<'_>) -> bool {
    match SockRef::from(&fd).peer_addr() {
        Err(source) if source.raw_os_error() == Some(libc::ENOTCONN) => {
            let gone = libc::POLLERR | libc::POLLRDHUP;
            let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: gone, revents: 0 };
            // SAFETY: one pollfd that outlives the call, which does not wait.
            let answered = unsafe { libc::poll(&raw mut poll, 1, 0) } == 1;
            answered && poll.revents & gone != 0
        }
        // Whatever else is wrong with it is said where it is opened.
        _ => true,
    }
}

/// The open file's status flags (`O_NONBLOCK`, the access mode, …).
pub fn open_flags(fd: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: F_GETFL touches no memory.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 { Err(io::Error::last_os_error()) } else { Ok(flags) }
}

/// Device and inode, which name the object behind an open file.
pub(crate) fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let metadata = metadata(fd)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn metadata(fd: BorrowedFd<'_>) -> io::Result<std::fs::Metadata> {
    // SAFETY: the descriptor is open while `fd` lives, and ManuallyDrop never closes it.
    let file = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(fd.as_raw_fd()) });
    file.metadata()
}

fn classify_socket(fd: BorrowedFd<'_>) -> io::Result<SocketKind> {
    let socket = SockRef::from(&fd);
    let domain = socket.domain()?.into();
    let socket_type = match i32::from(socket.r#type()?) {
        libc::SOCK_STREAM => SocketType::Stream,
        libc::SOCK_DGRAM => SocketType::Datagram,
        libc::SOCK_SEQPACKET => SocketType::SeqPacket,
        other => SocketType::Other(other),
    };
    Ok(SocketKind {
        domain,
        socket_type,
        // Unix sockets have one protocol, and datagram sockets do not listen: no need to ask.
        protocol: if domain == libc::AF_UNIX { 0 } else { socket.protocol()?.map_or(0, i32::from) },
        listening: socket_type != SocketType::Datagram && socket.is_listener()?,
    })
}

fn classify_character(fd: BorrowedFd<'_>, number: RawFd, field: &'static str) -> Result<FdKind> {
    let raw = fd.as_raw_fd();
    // SAFETY: isatty touches no memory of ours.
    if unsafe { libc::isatty(raw) } == 1 {
        let mut index: libc::c_uint = 0;
        // SAFETY: TIOCGPTN writes one unsigned int, and only for a pseudo-terminal's master.
        let master = unsafe { libc::ioctl(raw, libc::TIOCGPTN, &raw mut index) } == 0;
        return Ok(FdKind::Terminal { master });
    }
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes at most one `ifreq`. It is no terminal, and no other class of
    // character device gives this number (type 'T', 210) another meaning.
    if unsafe { libc::ioctl(raw, TUNGETIFF, &raw mut request) } == 0 {
        // SAFETY: `zeroed` left the last byte 0 and the kernel ends names within IFNAMSIZ.
        let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
        // SAFETY: TUNGETIFF fills the flags of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        return Ok(FdKind::Tun(TunKind {
            name: name.to_string_lossy().into_owned(),
            flags: i32::from(flags as u16),
        }));
    }
    if io::Error::last_os_error().raw_os_error() == Some(libc::EBADFD) {
        return Err(Error::config(
            field,
            format!("descriptor {number} is /dev/net/tun, but not yet a queue of an interface (TUNSETIFF)"),
        )
        .with_reason("not_attached"));
    }
    Ok(FdKind::Character)
}

fn not_usable(number: RawFd, field: &'static str, source: &io::Error) -> Error {
    if source.raw_os_error() == Some(libc::EBADF) {
        return Error::config(field, format!("descriptor {number} is not open")).with_reason("not_open");
    }
    Error::io(ErrorKind::Device, format_args!("use descriptor {number}"), source).with_field(field)
}

/// `_IOR('T', 210, unsigned int)`; libc does not name it.
#[cfg(not(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc64"
)))]
const TUNGETIFF: libc::Ioctl = 0x8004_54d2_u32 as libc::Ioctl;
#[cfg(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc64"
))]
const TUNGETIFF: libc::Ioctl = 0x4004_54d2;

//! Sockets that a listener binds itself, and the path of a Unix socket that goes with it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::address::UnixAddress;
use crate::stream::fd::SocketOptions;
use crate::stream::resolve::resolve;

/// Tries to find one port that is free at every address of a name.
const PORT_TRIES: usize = 8;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// TCP. Without a host, at every address of this machine, IPv6 and IPv4. Port 0 takes a free one.
    Tcp {
        /// A name (every address of it) or an address in text.
        host: Option<String>,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(UnixAddress),
}

/// How to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// Connections that the kernel keeps until they are accepted.
    pub backlog: u16,
    /// Accepted connections that may be open at a time; accepting pauses at the limit.
    pub max_connections: u32,
    /// Whether the address `::` takes IPv4 too. (No host at all does in any case, and another IPv6
    /// address never.)
    pub dual_stack: bool,
    /// Share the port with other sockets that say the same (SO_REUSEPORT).
    pub reuse_port: bool,
    /// Permissions of a Unix socket's path; `None` leaves them to the process's umask.
    pub unix_mode: Option<u32>,
    /// Replace a Unix socket's path on which nobody listens any more.
    pub replace_stale: bool,
    /// Take connections to addresses of others that the system's rules lead here (TPROXY). A right.
    pub transparent: bool,
    /// Options of accepted sockets.
    pub socket: SocketOptions,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            backlog: 1024,
            // Below the usual limit of 1,024 descriptors only where a program raised it; above, the
            // listener pauses by itself.
            max_connections: 4096,
            dual_stack: false,
            reuse_port: false,
            unix_mode: None,
            replace_stale: false,
            transparent: false,
            socket: SocketOptions::default(),
        }
    }
}

/// The path of a Unix socket that we made. It is removed with its listener, if it is still ours.
pub(super) struct OwnPath {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// A fork's copy must not remove what its parent listens on.
    pid: u32,
}

/// Bound and listening sockets that do not block.
pub(super) async fn bind(
    address: &ListenAddress,
    options: &ListenOptions,
    deadline: Instant,
) -> Result<(Vec<OwnedFd>, Option<OwnPath>)> {
    match address {
        ListenAddress::Tcp { host: None, port } => Ok((vec![bind_everywhere(*port, options)?], None)),
        ListenAddress::Tcp { host: Some(host), port } => {
            let addresses = resolve(host, *port, deadline).await?;
            Ok((bind_all(&addresses, options)?, None))
        }
        ListenAddress::Unix(address) => bind_unix(address, options).map(|(fd, path)| (vec![fd], path)),
    }
}

/// One socket for both families where there is IPv6, an IPv4 one where there is not.
fn bind_everywhere(port: u16, options: &ListenOptions) -> Result<OwnedFd> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    match bind_tcp(any, true, options) {
        Err(source) if no_such_family(&source) => {
            let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            bind_tcp(any, false, options).map_err(|source| bind_failed(&format!("tcp {any}"), &source))
        }
        bound => bound.map_err(|source| bind_failed(&format!("tcp port {port}"), &source)),
    }
}

/// A socket for each address, all with the same port.
fn bind_all(addresses: &[SocketAddr], options: &ListenOptions) -> Result<Vec<OwnedFd>> {
    let mut last = None;
    for _ in 0..PORT_TRIES {
        let mut bound = Vec::with_capacity(addresses.len());
        let mut port = None;
        last = None;
        for &address in addresses {
            let at = SocketAddr::new(address.ip(), port.unwrap_or(address.port()));
            let dual_stack = options.dual_stack && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
            match bind_tcp(at, dual_stack, options) {
                Ok(fd) => {
                    port =
                        Some(local_port(&fd).map_err(|source| bind_failed(&format!("tcp {at}"), &source))?);
                    bound.push(fd);
                }
                // `localhost` has an IPv6 address also where the machine has no IPv6.
                Err(source) if no_such_family(&source) && addresses.len() > 1 && at.is_ipv6() => {
                    last.get_or_insert((at, source));
                }
                Err(source) => {
                    last = Some((at, source));
                    bound.clear();
                    break;
                }
            }
        }
        if !bound.is_empty() {
            return Ok(bound);
        }
        // The free port of the first address was taken at another one: a new first port may do.
        let in_use = matches!(&last, Some((_, source)) if source.raw_os_error() == Some(libc::EADDRINUSE));
        if !(in_use && addresses.len() > 1 && addresses[0].port() == 0) {
            break;
        }
    }
    Err(match last {
        Some((at, source)) => bind_failed(&format!("tcp {at}"), &source),
        None => Error::new(ErrorKind::Bind, "there is no address to listen at"),
    })
}

fn bind_tcp(address: SocketAddr, dual_stack: bool, options: &ListenOptions) -> io::Result<OwnedFd> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    // A port whose last connections are still in TIME_WAIT is free for us.
    socket.set_reuse_address(true)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    if options.transparent {
        set_transparent(&socket, address)?;
    }
    if address.is_ipv6() {
        // Said either way: the system's default differs from machine to machine.
        socket.set_only_v6(!dual_stack)?;
    }
    socket.bind(&address.into())?;
    socket.listen(i32::from(options.backlog))?;
    Ok(socket.into())
}

/// Lets a socket have an address that is not this machine's.
pub(in crate::stream) fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv4() {
        return socket.set_ip_transparent_v4(true);
    }
    let on: libc::c_int = 1;
    let (start, len) = ((&raw const on).cast(), size_of_val(&on) as libc::socklen_t);
    // SAFETY: the option is an int, which lives through the call.
    let failed =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_IPV6, libc::IPV6_TRANSPARENT, start, len) };
    if failed != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn local_port(fd: &OwnedFd) -> io::Result<u16> {
    let address = socket2::SockRef::from(fd).local_addr()?;
    Ok(address.as_socket().map_or(0, |address| address.port()))
}

fn bind_unix(address: &UnixAddress, options: &ListenOptions) -> Result<(OwnedFd, Option<OwnPath>)> {
    let system = address.to_system()?;
    let what = format!("unix {address}");
    let failed = |source: io::Error| bind_failed(&what, &source);
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None).map_err(failed)?;
    if let Some(mode) = options.unix_mode {
        if mode & !0o777 != 0 {
            return Err(Error::config("unix_mode", format!("permissions are 0o000 to 0o777, not {mode:#o}")));
        }
        // SAFETY: fchmod touches no memory. The path that bind makes takes the socket's mode (less
        // the umask), so there is no moment with other permissions.
        if unsafe { libc::fchmod(socket.as_raw_fd(), mode) } != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
    }
    let UnixAddress::Path(path) = address else {
        socket.bind(&system).map_err(failed)?;
        socket.listen(i32::from(options.backlog)).map_err(failed)?;
        return Ok((socket.into(), None));
    };
    if let Err(source) = socket.bind(&system) {
        let stale = source.raw_os_error() == Some(libc::EADDRINUSE) && is_stale(path, &system);
        if !(stale && options.replace_stale) {
            let error = failed(source);
            return Err(if stale { error.with_reason("stale") } else { error });
        }
        std::fs::remove_file(path).map_err(failed)?;
        socket.bind(&system).map_err(failed)?;
    }
    let own_path = OwnPath::new(path).map_err(failed)?;
    socket.listen(i32::from(options.backlog)).map_err(failed)?;
    Ok((socket.into(), Some(own_path)))
}

/// A socket's path on which nobody listens.
fn is_stale(path: &Path, system: &SockAddr) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = || {
        let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
        match probe.connect(system) {
            Err(source) => Ok(source.raw_os_error() == Some(libc::ECONNREFUSED)),
            Ok(()) => Ok::<_, io::Error>(false),
        }
    };
    is_socket && refused().unwrap_or(false)
}

impl OwnPath {
    fn new(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self {
            // The working directory may change.
            path: std::path::absolute(path)?,
            device: metadata.dev(),
            inode: metadata.ino(),
            pid: std::process::id(),
        })
    }
}

impl Drop for OwnPath {
    fn drop(&mut self) {
        let ours = self.pid == std::process::id()
            && std::fs::symlink_metadata(&self.path)
                .is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode));
        if ours && let Err(source) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), error = %source, "cannot remove a socket's path");
        }
    }
}

/// The machine has no such family, or has it without any address.
fn no_such_family(source: &io::Error) -> bool {
    matches!(source.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn bind_failed(what: &str, source: &io::Error) -> Error {
    let error =
        Error::io(ErrorKind::Bind, format_args!("listen at {what}"), source).with_phase(Phase::Connect);
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => error.with_reason("in_use"),
        Some(libc::EADDRNOTAVAIL) => error.with_reason("not_local"),
        _ => error,
    }
}

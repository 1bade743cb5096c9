//! Connectors: TCP with happy eyeballs, and Unix sockets. Everything ends at one deadline.

#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout_at};

use super::address::{Address, UnixAddress};
use super::eyeballs::{interleave, race};
use super::fd::descriptor::{Descriptor, register};
use super::fd::{FdStream, SocketOptions, socket_interest};
use super::listen::bind::set_transparent;
use super::resolve::resolve;
use crate::error::{Error, ErrorKind, Phase, Result};

/// Longest pause between two tries at a Unix listener whose queue is full: the system says nothing
/// when it has room again.
const MAX_FULL_PAUSE: Duration = Duration::from_millis(100);

/// How to connect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Address to connect from; only addresses of its family are tried. Port 0 is any.
    pub local: Option<SocketAddr>,
    /// Whether that may be an address of another machine, whose packets come back here. A right.
    pub transparent: bool,
    /// Options of the connected socket.
    pub socket: SocketOptions,
}

/// Connects to `host` (a name or an address) over TCP.
pub async fn connect_tcp(
    host: &str,
    port: u16,
    options: &ConnectOptions,
    deadline: Instant,
) -> Result<FdStream> {
    let target = match host.contains(':') {
        true => format!("tcp [{host}]:{port}"),
        false => format!("tcp {host}:{port}"),
    };
    let found = resolve(host, port, deadline).await?;
    let mut addresses = interleave(&found);
    if let Some(local) = options.local {
        addresses.retain(|address| address.is_ipv6() == local.is_ipv6());
        if addresses.is_empty() {
            let message = format!("{target} has no address of the family of {local}");
            return Err(Error::config("local_address", message).with_phase(Phase::Connect));
        }
    }
    race(&addresses, deadline, |address| attempt(address, options))
        .await
        .map_err(|failures| failures.into_error(&target))
}

/// Connects to a Unix stream socket.
pub async fn connect_unix(address: &UnixAddress, deadline: Instant) -> Result<FdStream> {
    let socket = unix_socket(Type::STREAM, address, &format!("connect to unix {address}"), deadline).await?;
    connected(socket.into(), false)
}

/// A connected Unix socket of either kind that is accepted; one whose listener's queue is full is tried until the
/// deadline.
pub(crate) async fn unix_socket(
    socket_type: Type,
    address: &UnixAddress,
    what: &str,
    deadline: Instant,
) -> Result<Socket> {
    let system = address.to_system()?;
    let failed = |source: io::Error| connect_failed(what, &source);
    let mut pause = Duration::from_millis(1);
    loop {
        let socket = Socket::new(Domain::UNIX, socket_type.nonblocking().cloexec(), None).map_err(failed)?;
        match socket.connect(&system) {
            Ok(()) => return Ok(socket),
            // The listener's queue is full.
            Err(source) if source.kind() == io::ErrorKind::WouldBlock => {
                if timeout_at(deadline, sleep(pause)).await.is_err() {
                    let message =
                        format!("{what}: its queue is full, and nobody accepted before the deadline");
                    return Err(Error::new(ErrorKind::ConnectDeadline, message).with_phase(Phase::Connect));
                }
                pause = (pause * 2).min(MAX_FULL_PAUSE);
            }
            Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(failed(source)),
        }
    }
}

/// One try at one address.
async fn attempt(address: SocketAddr, options: &ConnectOptions) -> Result<FdStream> {
    let failed = |source: io::Error| connect_failed(&address.to_string(), &source);
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP)).map_err(failed)?;
    if let Some(local) = options.local {
        bind_local(&socket, local, options.transparent)?;
    }
    let mut stream = match socket.connect(&address.into()) {
        Ok(()) => connected(socket.into(), true)?,
        Err(source) if in_progress(&source) => {
            // Watched only from here on: a socket that does not connect yet counts as hung up.
            let io = register(Descriptor::plain(socket.into()), socket_interest(true))?
                .map_err(|(_, source)| failed(source))?;
            finish(&io).await.map_err(failed)?;
            let (local, peer) = addresses(io.get_ref()).map_err(failed)?;
            refuse_self(&local, &peer)?;
            FdStream::registered(io, true, &local, &peer)
        }
        Err(source) => return Err(failed(source)),
    };
    stream.set_own_options(&options.socket)?;
    Ok(stream)
}

fn bind_local(socket: &Socket, local: SocketAddr, transparent: bool) -> Result<()> {
    let address = SockAddr::from(local);
    let allowed = if transparent { set_transparent(socket, local) } else { Ok(()) };
    // The port is chosen when the peer is known, so that many connections can share it.
    let bound = allowed.and_then(|()| match local.port() {
        0 => bind_address_no_port(socket).and_then(|()| socket.bind(&address)),
        _ => socket.set_reuse_address(true).and_then(|()| socket.bind(&address)),
    });
    bound.map_err(|source| {
        Error::io(ErrorKind::Bind, format_args!("bind the local address {local}"), &source)
            .with_field("local_address")
            .with_phase(Phase::Connect)
    })
}

fn bind_address_no_port(socket: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let on: libc::c_int = 1;
    let (start, len) = ((&raw const on).cast(), size_of_val(&on) as libc::socklen_t);
    // SAFETY: the option is an int, which lives through the call.
    let failed = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, start, len)
    };
    if failed != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until the system has an answer.
async fn finish(io: &AsyncFd<Descriptor>) -> io::Result<()> {
    loop {
        let mut guard = poll_fn(|cx| io.poll_write_ready(cx)).await?;
        let socket = SockRef::from(io.get_ref());
        if let Some(source) = socket.take_error()? {
            return Err(source);
        }
        match socket.peer_addr() {
            Ok(_) => return Ok(()),
            // Woken early. (Closed stays ready: it will not get better.)
            Err(source)
                if source.raw_os_error() == Some(libc::ENOTCONN) && !guard.ready().is_write_closed() =>
            {
                guard.clear_ready();
            }
            Err(source) => return Err(source),
        }
    }
}

fn connected(fd: OwnedFd, is_tcp: bool) -> Result<FdStream> {
    let (local, peer) = addresses(&fd).map_err(|source| connect_failed("connect", &source))?;
    refuse_self(&local, &peer)?;
    FdStream::between(fd, is_tcp, &local, &peer)
}

fn addresses(fd: &impl AsFd) -> io::Result<(Address, Address)> {
    let socket = SockRef::from(fd);
    Ok((Address::from_system(&socket.local_addr()?), Address::from_system(&socket.peer_addr()?)))
}

/// A connection to a free port of this machine may be given that very port to come from, and then
/// connects to itself. Nobody listened.
fn refuse_self(local: &Address, peer: &Address) -> Result<()> {
    if matches!(local, Address::Inet(_)) && local == peer {
        let source = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        return Err(connect_failed(&format!("{peer}: the connection would be to itself"), &source));
    }
    Ok(())
}

fn in_progress(source: &io::Error) -> bool {
    matches!(source.raw_os_error(), Some(libc::EINPROGRESS | libc::EINTR))
}

fn connect_failed(what: &str, source: &io::Error) -> Error {
    Error::io(ErrorKind::Connect, what, source).with_phase(Phase::Connect)
}

//! The one listener, for TCP and Unix sockets, bound here or handed over.
//!
//! It accepts as long as its limit of open connections allows and waits where the system is out of
//! descriptors. At the limit it can ask for a place that nobody is served on yet. What is accepted is a [`FdStream`] that gives its place back when it goes.

pub(super) mod bind;
pub mod service;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockAddr, SockRef};
use tokio::io::{Interest, unix::AsyncFd};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use self::bind::OwnPath;
pub use self::bind::{ListenAddress, ListenOptions};
use super::address::Address;
use super::fd::{FdStream, SocketOptions};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::fd::nonblocking::NonBlocking;
use crate::fd::{self, FdKind, SocketType};
use crate::stats::Counter;
use crate::sys::NotForChildren;

/// First and longest pause where the system has no descriptor or memory for a connection.
const EXHAUSTED_PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

const NEVER_CLOSED: &str = "the semaphore is never closed";
/// First and longest pause in which one who was asked to give way may leave.
const GIVE_WAY_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Connections that may break before they are accepted, one after another, until that counts as a
/// condition of the system and the listener pauses.
const MAX_ABORTED_RUN: u32 = 64;

/// Accepts connections from one or more listening sockets.
pub struct Listener {
    sockets: Vec<ListenSocket>,
    /// Where the next look begins, so that no socket starves another.
    turn: usize,
    places: Arc<Semaphore>,
    max_connections: u32,
    options: SocketOptions,
    /// Removed from the file system when the listener goes.
    own_paths: Vec<OwnPath>,
    stats: Arc<ListenerStats>,
    /// Asked where all places or all of the system's are taken and somebody comes; whether one may be given up.
    when_full: Option<Box<dyn Fn() -> bool + Send + Sync>>,
}

struct ListenSocket {
    /// Gone before the socket is.
    _not_for_children: Option<NotForChildren>,
    io: AsyncFd<NonBlocking>,
    is_tcp: bool,
    local: Address,
}

/// One accepted connection.
pub struct Accepted {
    /// The stream, which holds a place of the listener's limit.
    pub stream: FdStream,
    /// Who connected.
    pub peer: Address,
    /// To which of our addresses.
    pub local: Address,
}

/// An accepted connection that no event loop watches yet: it is opened where it will be used.
pub struct AcceptedSocket {
    fd: OwnedFd,
    is_tcp: bool,
    options: SocketOptions,
    permit: Permit,
    /// Who connected.
    pub peer: Address,
    /// To which of our addresses.
    pub local: Address,
}

/// A place within a listener's limit, given back when dropped.
#[derive(Debug)]
pub struct Permit {
    _place: OwnedSemaphorePermit,
}

/// A connection, its peer and the place of the socket among the listener's, or an error and the place.
type AcceptResult = std::result::Result<(OwnedFd, Address, usize), (io::Error, usize)>;

/// What a listener has done.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections that broke before they were accepted.
    pub aborted: Counter,
    /// Times that accepting waited because the limit of open connections was reached.
    pub limit_pauses: Counter,
    /// Times that accepting waited because the system was out of descriptors or memory.
    pub exhausted_pauses: Counter,
}

impl Listener {
    /// Binds and listens. The deadline is for looking a name up.
    pub async fn bind(address: &ListenAddress, options: &ListenOptions, deadline: Instant) -> Result<Self> {
        let (sockets, own_path) = bind::bind(address, options, deadline).await?;
        let sockets = sockets.into_iter().map(|fd| ListenSocket::new(fd, true)).collect::<Result<_>>()?;
        Self::new(sockets, own_path.into_iter().collect(), options)
    }

    /// One listener of several: their sockets share the first one's limit and options.
    pub fn united(mut first: Self, others: Vec<Self>) -> Self {
        for mut other in others {
            first.sockets.append(&mut other.sockets);
            first.own_paths.append(&mut other.own_paths);
        }
        first
    }

    /// Takes sockets that listen already (inherited ones); `field` is the option to blame.
    ///
    /// They may be shared with other processes: `O_NONBLOCK`, which accepting needs, is set as long
    /// as this lives. A path of a Unix socket stays where it is.
    pub fn adopt(fds: Vec<OwnedFd>, field: &'static str, options: &ListenOptions) -> Result<Self> {
        for fd in &fds {
            match fd::classify(fd.as_fd(), field)? {
                FdKind::Socket(socket) if socket.listening && socket.socket_type == SocketType::Stream => {}
                kind => {
                    let message = format!("this {kind} does not listen for streams");
                    return Err(Error::config(field, message).with_reason("not_listening"));
                }
            }
        }
        let sockets: Result<_> = fds.into_iter().map(|fd| ListenSocket::new(fd, false)).collect();
        Self::new(sockets.map_err(|error: Error| error.with_field(field))?, Vec::new(), options)
    }

    fn new(sockets: Vec<ListenSocket>, own_paths: Vec<OwnPath>, options: &ListenOptions) -> Result<Self> {
        let max_connections = options.max_connections;
        if max_connections == 0 || max_connections as usize > Semaphore::MAX_PERMITS {
            return Err(Error::config(
                "max_connections",
                format!("must be at least 1, not {max_connections}"),
            ));
        }
        Ok(Self {
            sockets,
            turn: 0,
            places: Arc::new(Semaphore::new(max_connections as usize)),
            max_connections,
            options: options.socket.clone(),
            own_paths,
            stats: Arc::default(),
            when_full: None,
        })
    }

    /// Has this called where the limit is reached, or the system has no room, and somebody waits: a connection that
    /// nobody serves yet can give its place up. It says whether one may.
    pub(crate) fn when_full(&mut self, ask: impl Fn() -> bool + Send + Sync + 'static) {
        self.when_full = Some(Box::new(ask));
    }

    /// Where it listens; empty once it is closed.
    pub fn local_addresses(&self) -> Vec<Address> {
        self.sockets.iter().map(|socket| socket.local.clone()).collect()
    }

    /// Its counters.
    pub fn stats(&self) -> &Arc<ListenerStats> {
        &self.stats
    }

    /// How many accepted connections are open.
    pub fn open_connections(&self) -> usize {
        self.max_connections as usize - self.places.available_permits()
    }

    /// The next connection. Waits while the limit is reached or the system has no room. If cancelled,
    /// no connection is lost.
    pub async fn accept(&mut self) -> Result<Accepted> {
        loop {
            let socket = self.accept_socket().await?;
            let (peer, local) = (socket.peer.clone(), socket.local.clone());
            match socket.open() {
                Ok(stream) => return Ok(Accepted { stream, peer, local }),
                // It is not any more what it was a moment ago, or this process has no room for it.
                Err(error) => {
                    tracing::debug!(%peer, %error, "an accepted connection cannot be used");
                    self.stats.aborted.add(1);
                    sleep(EXHAUSTED_PAUSE.0).await;
                }
            }
        }
    }

    /// The same for an event loop that is not this one.
    pub async fn accept_socket(&mut self) -> Result<AcceptedSocket> {
        if self.sockets.is_empty() {
            return Err(Error::new(ErrorKind::Closed, "the listener is closed"));
        }
        let place = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                self.stats.limit_pauses.add(1);
                self.freed_place().await
            }
        };
        let (mut pause, longest) = EXHAUSTED_PAUSE;
        let mut aborted_run = 0;
        loop {
            let (source, local) = match poll_fn(|cx| self.poll_accept(cx)).await {
                Ok((fd, peer, at)) => {
                    let (is_tcp, listening_at) = (self.sockets[at].is_tcp, &self.sockets[at].local);
                    match local_address(&fd, listening_at) {
                        Ok(local) => {
                            self.stats.accepted.add(1);
                            let (options, permit) = (self.options.clone(), Permit { _place: place });
                            return Ok(AcceptedSocket { fd, is_tcp, options, permit, peer, local });
                        }
                        Err(source) => (source, listening_at),
                    }
                }
                Err((source, at)) => (source, &self.sockets[at].local),
            };
            aborted_run += 1;
            if !is_exhausted(&source) {
                if !is_aborted(&source) {
                    let what = format_args!("accept a connection at {local}");
                    return Err(Error::io(ErrorKind::Device, what, &source).with_phase(Phase::Connect));
                }
                self.stats.aborted.add(1);
                if aborted_run < MAX_ABORTED_RUN {
                    continue;
                }
            }
            // The connection waits in the kernel's queue, and readiness says so all the time.
            tracing::warn!(listener = %local, error = %source, ?pause, "no connection can be accepted now");
            self.stats.exhausted_pauses.add(1);
            if let Some(ask) = &self.when_full {
                ask();
            }
            sleep(pause).await;
            pause = (pause * 2).min(longest);
            aborted_run = 0;
        }
    }

    /// The one connection that is wanted; the listener closes behind it.
    pub async fn accept_one(mut self) -> Result<Accepted> {
        self.accept().await
    }

    /// Stops accepting: closes the sockets and removes our own path. What was accepted goes on.
    pub fn close(&mut self) {
        self.sockets.clear();
        self.own_paths.clear();
    }

    /// Stops accepting and waits until the accepted connections have ended.
    pub async fn drain(&mut self, deadline: Instant) -> Result<()> {
        self.close();
        match timeout_at(deadline, self.places.acquire_many(self.max_connections)).await {
            Ok(_) => Ok(()),
            Err(_) => {
                let message = format!("{} accepted connections are still open", self.open_connections());
                Err(Error::new(ErrorKind::CloseDeadline, message).with_phase(Phase::Close))
            }
        }
    }

    /// The next place that becomes free.
    async fn freed_place(&mut self) -> OwnedSemaphorePermit {
        let mut freed = pin!(Arc::clone(&self.places).acquire_owned());
        let (mut pause, longest) = GIVE_WAY_PAUSE;
        loop {
            let place = tokio::select! {
                biased;
                place = &mut freed => Some(place),
                () = poll_fn(|cx| self.poll_newcomer(cx)) => None,
            };
            let place = match place {
                Some(place) => place,
                None => {
                    let Some(ask) = &self.when_full else { return (&mut freed).await.expect(NEVER_CLOSED) };
                    // Whoever was let in may not be known yet, or be served by now; who leaves takes its time.
                    ask();
                    match timeout(pause, &mut freed).await {
                        Ok(place) => place,
                        Err(_) => {
                            pause = (pause * 2).min(longest);
                            continue;
                        }
                    }
                }
            };
            return place.expect(NEVER_CLOSED);
        }
    }

    /// Whether a connection waits in the kernel's queue.
    fn poll_newcomer(&self, cx: &mut Context<'_>) -> Poll<()> {
        let waits = self.sockets.iter().any(|socket| socket.poll_newcomer(cx).is_ready());
        if waits { Poll::Ready(()) } else { Poll::Pending }
    }

    /// One connection of any socket, or what a socket said instead and which.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<AcceptResult> {
        for step in 0..self.sockets.len() {
            let at = (self.turn + step) % self.sockets.len();
            match self.sockets[at].poll_accept(cx) {
                Poll::Pending => {}
                Poll::Ready(result) => {
                    self.turn = at + 1;
                    return Poll::Ready(match result {
                        Ok((fd, peer)) => Ok((fd, peer, at)),
                        Err(source) => Err((source, at)),
                    });
                }
            }
        }
        Poll::Pending
    }
}

impl AsFd for AcceptedSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AcceptedSocket {
    /// Where the client wanted to go, where the system's rules led it here (REDIRECT, DNAT) instead. A
    /// connection that came by TPROXY has it as its own address.
    pub fn redirected_from(&self) -> Option<SocketAddr> {
        let Address::Inet(local) = &self.local else { return None };
        let socket = SockRef::from(&self.fd);
        let said = match local.ip() {
            IpAddr::V4(_) => socket.original_dst_v4(),
            IpAddr::V6(_) => socket.original_dst_v6(),
        };
        let wanted = said.ok()?.as_socket()?;
        let place = |address: &SocketAddr| (address.ip().to_canonical(), address.port());
        (place(&wanted) != place(local)).then_some(wanted)
    }

    /// The stream, on the event loop that will use it. It holds its place of the listener's limit.
    pub fn open(self) -> Result<FdStream> {
        let mut stream = FdStream::between(self.fd, self.is_tcp, &self.local, &self.peer)?;
        stream.set_own_options(&self.options)?;
        stream.hold(self.permit);
        Ok(stream)
    }
}

/// To which of our addresses a connection came.
fn local_address(fd: &OwnedFd, listening_at: &Address) -> io::Result<Address> {
    match listening_at {
        // Bound to all addresses, it came to one of them.
        Address::Inet(_) => Ok(Address::from_system(&SockRef::from(fd).local_addr()?)),
        other => Ok(other.clone()),
    }
}

impl ListenSocket {
    /// `ours`: made here, for this process alone.
    fn new(fd: OwnedFd, ours: bool) -> Result<Self> {
        let failed = |source: io::Error| Error::io(ErrorKind::Bind, "use a listening socket", &source);
        let is_tcp = matches!(fd::classify(fd.as_fd(), "fd")?, FdKind::Socket(socket) if socket.is_tcp());
        let local = Address::from_system(&SockRef::from(&fd).local_addr().map_err(failed)?);
        let fd = NonBlocking::new(fd).map_err(failed)?;
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(Error::new(
                ErrorKind::ApiMisuse,
                "listeners are made on the event loop that uses them",
            ));
        }
        // SAFETY: a `NonBlocking` owns an open descriptor and names the same one as long as it lives.
        let io = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
            .map_err(|refused| failed(refused.into_parts().1))?;
        let not_for_children = ours.then(|| NotForChildren::new(io.get_ref().as_fd()));
        Ok(Self { _not_for_children: not_for_children, io, is_tcp, local })
    }

    fn poll_newcomer(&self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // What is wrong with the socket is said by who accepts.
            let Ok(mut guard) = std::task::ready!(self.io.poll_read_ready(cx)) else {
                return Poll::Ready(());
            };
            let mut asked =
                libc::pollfd { fd: self.io.get_ref().as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, which lives through the call.
            if unsafe { libc::poll(&raw mut asked, 1, 0) } != 0 {
                return Poll::Ready(());
            }
            guard.clear_ready();
        }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(OwnedFd, Address)>> {
        loop {
            let mut guard = std::task::ready!(self.io.poll_read_ready(cx))?;
            match accept4(self.io.get_ref()) {
                Err(source) if source.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

fn accept4(listener: &NonBlocking) -> io::Result<(OwnedFd, Address)> {
    // SAFETY: accept4 fills at most the storage it is given and says how much of it.
    let (fd, peer) = unsafe {
        SockAddr::try_init(|storage, len| {
            let fd = libc::accept4(listener.as_raw_fd(), storage.cast(), len, libc::SOCK_CLOEXEC);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
        })?
    };
    // SAFETY: the kernel just made this descriptor for us, so nobody else owns it.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Address::from_system(&peer)))
}

/// The system has no room, and the connection waits.
fn is_exhausted(source: &io::Error) -> bool {
    matches!(
        source.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::ENOSPC)
    )
}

/// That connection is gone; the next may be fine (accept(2): treat these like EAGAIN).
fn is_aborted(source: &io::Error) -> bool {
    matches!(
        source.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::ECONNRESET
                | libc::EPERM
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
                | libc::ETIMEDOUT
        )
    )
}

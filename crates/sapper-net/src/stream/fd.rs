//! A stream over one descriptor that epoll accepts: sockets, pipe ends, terminals.
//!
//! The caller's open file never gets `O_NONBLOCK`: sockets are used with `MSG_DONTWAIT`, pipes and
//! terminals are opened again, and what is left borrows the flag ([`crate::fd::nonblocking`]). Two
//! descriptors become one stream in [`super::joined`]; what epoll refuses is read by threads in
//! [`super::blocking`].

pub(super) mod descriptor;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{Interest, unix::AsyncFd};
use tokio::time::Sleep;

use self::descriptor::{Descriptor, Kind};
use super::address::Address;
use super::listen::Permit;
use super::{BoxStream, RecordMarks, Stream};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::fd::nonblocking::{NonBlocking, reopen};
use crate::fd::{self, Access, FdKind, SocketKind, SocketType};
use crate::stats::EndpointStats;

/// How long to wait where the event loop says "hung up" for good but the system says "not yet": a
/// pseudo-terminal between two users, a socket with an error queue. Rare, so slow is good enough.
const HUNG_UP_RETRY: Duration = Duration::from_millis(10);

/// Bytes that TCP cannot send yet and takes all the same. With the system's own megabytes a slow reader's bytes lie
/// there and come out in bursts of that size, each of which keeps the cores from everybody else; a few batches of
/// ours are enough to keep a fast reader busy.
pub const MOST_UNSENT: u32 = 256 * 1024;

/// Bytes that lie in a socket on their way from another program on this machine, and half of what lies there on its way
/// to one (the system takes twice of both, for its own books). There is no path that more of them would fill, and
/// whoever empties a socket of megabytes keeps a core that long. No less: segments are 64 KB here, and where fewer than two
/// of them fit, each waits 40 ms for its acknowledgement.
pub const MOST_NEAR: usize = 64 * 1024;
/// The first of the two where bulk comes and nobody else's bytes wait for us ([`Stream::widen`]). A socket stays so wide:
/// made smaller, it would drop what is on its way.
pub const MOST_NEAR_ALONE: usize = 3 * MOST_NEAR;

/// Options of connected sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Ask a silent TCP peer whether it is still there after this long, then three times more at a
    /// third of it. `None` leaves the system's default: never.
    pub keepalive: Option<Duration>,
    /// Bytes that may wait in the system before TCP can send them ([`MOST_UNSENT`]); beyond it the socket takes no
    /// more. What is urgent goes behind what waits there. Of sockets that we make.
    pub most_unsent: u32,
    /// A TCP connection that goes before our direction was ended in order is reset, also where this process is
    /// killed: the peer does not take a part for the whole. Of sockets that we make.
    pub reset_unless_ended: bool,
    /// Where the other end is on this machine at most [`MOST_NEAR`] bytes wait in the system, twice as many on their
    /// way out. Otherwise that is left to the system, as with every other end. Of sockets that we make.
    pub short_near: bool,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self { keepalive: None, most_unsent: MOST_UNSENT, reset_unless_ended: false, short_near: false }
    }
}

/// Ordered bytes over one descriptor.
pub struct FdStream {
    /// `None` once both directions are over.
    io: Option<AsyncFd<Descriptor>>,
    kind: Kind,
    access: Access,
    read_ended: bool,
    write_ended: bool,
    /// Why the connection is lost. The system says so once; afterwards it says "end of stream".
    broken: Option<Error>,
    /// Why writes fail; the peer's bytes may still come (it only reads no more).
    write_failed: Option<Error>,
    read_retry: Option<Pin<Box<Sleep>>>,
    write_retry: Option<Pin<Box<Sleep>>>,
    /// A caller's socket had Nagle's algorithm on.
    restore_nagle: bool,
    /// Closing the socket resets the connection, until our direction is ended.
    resets: bool,
    /// Kept short on its way in, and not [widened](Stream::widen) yet.
    is_short: bool,
    stats: Arc<EndpointStats>,
    description: String,
    peer: Option<SocketAddr>,
    local: Option<SocketAddr>,
    /// Given back to the listener when the stream goes.
    permit: Option<Permit>,
}

/// Makes a stream of a descriptor that is ours, whatever kind it is. `field` is the option to blame.
///
/// Call it on the event loop that will use the stream. A socket must be connected; a listening one
/// is [`super::listen::Listener::adopt`]'s, and what carries packets is no stream.
pub fn open_fd(fd: OwnedFd, field: &'static str, options: &SocketOptions) -> Result<BoxStream> {
    let kind = fd::classify(fd.as_fd(), field)?;
    open_kind(fd, kind, field, options)
}

/// The same, of a descriptor that was looked at already.
pub(crate) fn open_kind(
    fd: OwnedFd,
    kind: FdKind,
    field: &'static str,
    options: &SocketOptions,
) -> Result<BoxStream> {
    let access = fd::checked_access(fd.as_fd(), &kind, field)?;
    open_one(fd, kind, field, access, options, Arc::default())
}

/// The same, in the directions of `access` only.
pub(super) fn open_one(
    fd: OwnedFd,
    kind: FdKind,
    field: &'static str,
    access: Access,
    options: &SocketOptions,
    stats: Arc<EndpointStats>,
) -> Result<BoxStream> {
    let failed = |source: io::Error| {
        Error::io(ErrorKind::Device, format_args!("use {kind}"), &source).with_field(field)
    };
    let description = match kind {
        // A socket is described by its addresses.
        FdKind::Socket(_) => String::new(),
        _ => descriptor::describe(fd.as_fd(), &kind, access),
    };
    match kind {
        FdKind::Socket(socket) => {
            let mut stream = FdStream::from_socket(fd, socket, field)?;
            stream.adopt_tcp_options(options)?;
            stream.access = access;
            stream.read_ended = !access.read;
            stream.stats = stats;
            return Ok(Box::new(stream));
        }
        FdKind::Tun(_) => return Err(Error::config(field, format!("{kind} carries packets, not a stream"))),
        FdKind::File | FdKind::Block => return super::blocking::open(fd, &description, access, stats),
        FdKind::Pipe | FdKind::Terminal { .. } | FdKind::Character => {}
    }
    let own = match kind {
        FdKind::Pipe | FdKind::Terminal { master: false } => reopen(fd.as_fd()).ok(),
        _ => None,
    };
    // A FIFO whose last writer left before it was opened again reports no end on the new open file.
    let read_ended = own.is_some() && kind == FdKind::Pipe && access.read && hung_up(fd.as_fd());
    let descriptor = if let Some(own) = own {
        Descriptor::plain(own)
    } else {
        // Before its flags are touched: does epoll take it at all?
        match descriptor::register(Descriptor::plain(fd), Interest::READABLE)? {
            Ok(registered) => {
                let fd = registered.into_inner().into_plain();
                Descriptor::guarded(NonBlocking::new(fd).map_err(failed)?)
            }
            Err((descriptor, source)) if source.raw_os_error() == Some(libc::EPERM) => {
                return super::blocking::open(descriptor.into_plain(), &description, access, stats);
            }
            Err((_, source)) => return Err(failed(source)),
        }
    };
    let io = descriptor::register(descriptor, interest_in(access))?.map_err(|(_, source)| failed(source))?;
    let kind = match kind {
        FdKind::Terminal { master: true } => Kind::TerminalMaster,
        _ => Kind::Other,
    };
    let mut stream = FdStream::new(io, kind, access, description);
    stream.read_ended |= read_ended;
    stream.stats = stats;
    Ok(Box::new(stream))
}

/// Whether the writers are gone and no byte is left.
fn hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that outlives the call, which does not wait.
    let answered = unsafe { libc::poll(&raw mut poll, 1, 0) } == 1;
    answered && poll.revents & (libc::POLLHUP | libc::POLLIN) == libc::POLLHUP
}

impl FdStream {
    fn new(io: AsyncFd<Descriptor>, kind: Kind, access: Access, description: String) -> Self {
        Self {
            io: Some(io),
            kind,
            access,
            read_ended: !access.read,
            write_ended: false,
            broken: None,
            write_failed: None,
            read_retry: None,
            write_retry: None,
            restore_nagle: false,
            resets: false,
            is_short: false,
            stats: Arc::default(),
            description,
            peer: None,
            local: None,
            permit: None,
        }
    }

    /// Over a connected stream socket that is ours. Its options stay as they are.
    pub fn from_socket(fd: OwnedFd, socket: SocketKind, field: &'static str) -> Result<Self> {
        if socket.socket_type != SocketType::Stream || socket.listening {
            return Err(Error::config(field, format!("the {socket} is no connected stream")));
        }
        let (local, peer) = connection(&fd, field)?;
        Self::between(fd, socket.is_tcp(), &local, &peer).map_err(|error| error.with_field(field))
    }

    /// Over a connected socket that is ours, with its addresses.
    pub(super) fn between(fd: OwnedFd, is_tcp: bool, local: &Address, peer: &Address) -> Result<Self> {
        let io = descriptor::register(Descriptor::plain(fd), socket_interest(is_tcp))?.map_err(
            |(_, source)| {
                Error::io(ErrorKind::Device, format_args!("watch the connection to {peer}"), &source)
            },
        )?;
        Ok(Self::registered(io, is_tcp, local, peer))
    }

    /// The same, where the event loop watches the socket already.
    pub(super) fn registered(io: AsyncFd<Descriptor>, is_tcp: bool, local: &Address, peer: &Address) -> Self {
        let (kind, protocol) = match (is_tcp, peer) {
            (true, _) => (Kind::Tcp, "tcp"),
            (false, Address::Unix(_)) => (Kind::Socket, "unix"),
            (false, _) => (Kind::Socket, "socket"),
        };
        let description = format!("{protocol} {local} -> {peer}");
        let mut stream = Self::new(io, kind, Access { read: true, write: true }, description);
        if let Address::Inet(peer) = peer {
            stream.peer = Some(*peer);
        }
        if let Address::Inet(local) = local {
            stream.local = Some(*local);
        }
        stream
    }

    /// For a socket of our own making: no Nagle, urgent bytes stay in their place, keepalive; how it goes.
    pub(crate) fn set_own_options(&mut self, options: &SocketOptions) -> Result<()> {
        let (Some(io), Kind::Tcp) = (&self.io, self.kind) else { return Ok(()) };
        let socket = SockRef::from(io.get_ref());
        let lingers = options.reset_unless_ended.then_some(Duration::ZERO);
        let near = (options.short_near && self.is_near()).then_some(MOST_NEAR);
        self.resets = lingers.is_some();
        self.is_short = near.is_some();
        socket
            .set_tcp_nodelay(true)
            .and_then(|()| socket.set_out_of_band_inline(true))
            .and_then(|()| descriptor::set_keepalive(&socket, options.keepalive))
            .and_then(|()| socket.set_tcp_notsent_lowat(options.most_unsent))
            .and_then(|()| near.map_or(Ok(()), |most| socket.set_recv_buffer_size(most)))
            .and_then(|()| near.map_or(Ok(()), |most| socket.set_send_buffer_size(2 * most)))
            .and_then(|()| lingers.map_or(Ok(()), |none| socket.set_linger(Some(none))))
            .map_err(|source| self.option_failed(&source))
    }

    /// For a caller's socket: no Nagle as long as we use it, keepalive if asked for.
    fn adopt_tcp_options(&mut self, options: &SocketOptions) -> Result<()> {
        let (Some(io), Kind::Tcp) = (&self.io, self.kind) else { return Ok(()) };
        let socket = SockRef::from(io.get_ref());
        let nodelay = socket.tcp_nodelay().map_err(|source| self.option_failed(&source))?;
        if !nodelay {
            socket.set_tcp_nodelay(true).map_err(|source| self.option_failed(&source))?;
        }
        descriptor::set_keepalive(&socket, options.keepalive)
            .map_err(|source| self.option_failed(&source))?;
        self.restore_nagle = !nodelay;
        Ok(())
    }

    /// Whether the other end is on this machine: at a loopback address, or at the one that is ours too.
    fn is_near(&self) -> bool {
        let (Some(peer), Some(local)) = (self.peer, self.local) else { return false };
        let (peer, local) = (peer.ip().to_canonical(), local.ip().to_canonical());
        peer.is_loopback() || peer == local
    }

    fn option_failed(&self, source: &io::Error) -> Error {
        Error::io(ErrorKind::Device, format_args!("set the options of {}", self.description), source)
            .with_phase(Phase::Connect)
    }

    /// The place among a listener's connections that this one takes.
    pub(crate) fn hold(&mut self, permit: Permit) {
        self.permit = Some(permit);
    }

    fn failed(&self, what: &str, source: &io::Error) -> Error {
        Error::io(ErrorKind::ConnectionLost, format_args!("{what} {}", self.description), source)
            .with_phase(Phase::Transfer)
    }

    /// Ends writing for a reason. A lost connection ends reading too, behind the bytes that wait; EPIPE
    /// says nothing of them.
    fn write_fails(&mut self, what: &str, source: &io::Error) -> Error {
        let error = self.failed(what, source);
        if source.raw_os_error() != Some(libc::EPIPE) {
            self.broken.get_or_insert_with(|| error.clone());
        }
        self.write_failed = Some(error.clone());
        self.write_ended = true;
        self.close_if_done();
        error
    }

    /// What a read returns when there is nothing more to read.
    fn end(&mut self) -> Poll<Result<usize>> {
        self.read_ended = true;
        match &self.broken {
            Some(error) => Poll::Ready(Err(error.clone())),
            None => Poll::Ready(Ok(0)),
        }
    }

    /// Closes the descriptor when neither direction needs it. (A socket stays: closing it with bytes
    /// unread would reset what the peer has not yet fetched.)
    fn close_if_done(&mut self) {
        let read_done = self.read_ended || !self.access.read;
        let write_done = self.write_ended || !self.access.write;
        if !self.kind.is_socket() && read_done && write_done {
            self.io = None;
        }
    }

    fn socket(&self) -> Option<SockRef<'_>> {
        self.io.as_ref().filter(|_| self.kind.is_socket()).map(|io| SockRef::from(io.get_ref()))
    }
}

impl Stream for FdStream {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        _marks: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        loop {
            if self.read_ended {
                return self.end();
            }
            ready!(poll_retry(&mut self.read_retry, cx));
            let Some(io) = &self.io else { return self.end() };
            let mut guard = match ready!(io.poll_read_ready(cx)) {
                Ok(guard) => guard,
                Err(source) => return Poll::Ready(Err(event_loop_gone(&source))),
            };
            self.stats.receive_calls.add(1);
            match io.get_ref().receive(self.kind, buf) {
                Ok(0) => return self.end(),
                Ok(n) => {
                    // A TCP read that is short has drained the queue, unless it stopped before an
                    // urgent byte; new bytes raise a new event. Other kinds stop short for their own
                    // reasons (descriptors that travel along, packet-mode pipes, lines): there the
                    // next read finds out.
                    if n < buf.len() && self.kind == Kind::Tcp && !has_urgent(io) {
                        guard.clear_ready();
                    }
                    self.stats.bytes_received.add(n as u64);
                    return Poll::Ready(Ok(n));
                }
                Err(source) => match source.kind() {
                    io::ErrorKind::WouldBlock => {
                        if guard.ready().is_read_closed() {
                            self.read_retry = Some(Box::pin(tokio::time::sleep(HUNG_UP_RETRY)));
                        }
                        guard.clear_ready();
                    }
                    io::ErrorKind::Interrupted => {}
                    // The last user of the other side left.
                    _ if self.kind == Kind::TerminalMaster && source.raw_os_error() == Some(libc::EIO) => {
                        return self.end();
                    }
                    _ => {
                        self.broken = Some(self.failed("read from", &source));
                        return self.end();
                    }
                },
            }
        }
    }

    fn widen(&mut self) {
        if std::mem::take(&mut self.is_short)
            && let Some(io) = &self.io
        {
            // An offer: where it is not taken, the bytes come in smaller portions.
            let _ = SockRef::from(io.get_ref()).set_recv_buffer_size(MOST_NEAR_ALONE);
        }
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.read_ended {
            return Poll::Ready(Ok(()));
        }
        ready!(poll_retry(&mut self.read_retry, cx));
        let Some(io) = &self.io else { return Poll::Ready(Ok(())) };
        // Ready stays ready: the read that follows clears it.
        match ready!(io.poll_read_ready(cx)) {
            Ok(_) => Poll::Ready(Ok(())),
            Err(source) => Poll::Ready(Err(event_loop_gone(&source))),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        if self.write_ended {
            let failed = self.write_failed.clone();
            return Poll::Ready(Err(failed.unwrap_or_else(|| written_after_end(&self.description))));
        }
        if !self.access.write {
            let message = format!("{} is not open for writing", self.description);
            return Poll::Ready(Err(Error::new(ErrorKind::Device, message).with_reason("read_only")));
        }
        loop {
            ready!(poll_retry(&mut self.write_retry, cx));
            let Some(io) = &self.io else {
                return Poll::Ready(Err(written_after_end(&self.description)));
            };
            let mut guard = match ready!(io.poll_write_ready(cx)) {
                Ok(guard) => guard,
                Err(source) => return Poll::Ready(Err(event_loop_gone(&source))),
            };
            self.stats.send_calls.add(1);
            match io.get_ref().send(self.kind, slices) {
                Ok(n) => {
                    // Short means that the queue is full, and TCP has promised an event for room.
                    if self.kind == Kind::Tcp && n < slices.iter().map(|slice| slice.len()).sum() {
                        guard.clear_ready();
                    }
                    self.stats.bytes_sent.add(n as u64);
                    return Poll::Ready(Ok(n));
                }
                Err(source) => match source.kind() {
                    io::ErrorKind::WouldBlock => {
                        if guard.ready().is_write_closed() {
                            self.write_retry = Some(Box::pin(tokio::time::sleep(HUNG_UP_RETRY)));
                        }
                        guard.clear_ready();
                    }
                    io::ErrorKind::Interrupted => {}
                    _ => return Poll::Ready(Err(self.write_fails("write to", &source))),
                },
            }
        }
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.write_ended {
            return Poll::Ready(self.write_failed.clone().map_or(Ok(()), Err));
        }
        let ended = self.socket().map(|socket| {
            // From here on what is queued arrives, and the end behind it, whenever the descriptor is closed. In
            // this order: killed in between, all that was to be said is said.
            let kept = if self.resets { socket.set_linger(None) } else { Ok(()) };
            kept.and_then(|()| socket.shutdown(Shutdown::Write))
        });
        if let Some(Err(source)) = ended {
            return Poll::Ready(Err(self.write_fails("end", &source)));
        }
        self.resets = false;
        self.write_ended = true;
        self.close_if_done();
        Poll::Ready(Ok(()))
    }

    fn reset(&mut self, _code: u64) {
        if self.kind == Kind::Tcp {
            if let Some(io) = self.io.take() {
                io.get_ref().reset_tcp();
            }
            let error =
                Error::new(ErrorKind::ConnectionLost, format!("{} was reset by this side", self.description))
                    .with_reason("reset_here");
            self.write_failed.get_or_insert_with(|| error.clone());
            self.broken.get_or_insert(error);
            self.read_ended = true;
        } else if let Some(socket) = self.socket() {
            // There is nothing stronger for the other kinds; a peer that is gone already is fine.
            let _ = socket.shutdown(Shutdown::Write);
        }
        self.write_ended = true;
        self.close_if_done();
    }

    fn stop(&mut self, _code: u64) {
        if let Some(socket) = self.socket() {
            // On TCP the peer hears of it when it sends more after our own end. It may be gone.
            let _ = socket.shutdown(Shutdown::Read);
        }
        self.read_ended = true;
        self.close_if_done();
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.io.as_ref().map(|io| io.get_ref().as_fd())
    }

    fn is_movable(&self) -> bool {
        true
    }

    fn moved(&mut self) -> Result<()> {
        let Some(io) = self.io.take() else { return Ok(()) };
        let interest = match self.kind {
            Kind::Tcp | Kind::Socket => socket_interest(self.kind == Kind::Tcp),
            Kind::TerminalMaster | Kind::Other => interest_in(self.access),
        };
        let registered = descriptor::register(io.into_inner(), interest)?;
        self.io = Some(registered.map_err(|(_, source)| self.failed("watch", &source))?);
        Ok(())
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn unconfirmed(&self) -> usize {
        match &self.io {
            Some(io) if self.kind == Kind::Tcp => io.get_ref().unconfirmed(),
            _ => 0,
        }
    }

    fn peer_address(&self) -> Option<SocketAddr> {
        self.peer
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.local
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl Drop for FdStream {
    fn drop(&mut self) {
        if self.restore_nagle
            && let Some(socket) = self.socket()
        {
            // A connection that is gone has nothing to restore.
            let _ = socket.set_tcp_nodelay(false);
        }
    }
}

/// Both addresses of a connected socket.
fn connection(fd: &OwnedFd, field: &'static str) -> Result<(Address, Address)> {
    let socket = SockRef::from(fd);
    let peer = socket.peer_addr().map_err(|source| match (source.raw_os_error(), socket.take_error()) {
        (Some(libc::ENOTCONN), Ok(Some(why))) => {
            Error::io(ErrorKind::ConnectionLost, "the connection is gone already", &why)
                .with_phase(Phase::Connect)
        }
        (Some(libc::ENOTCONN), _) => {
            Error::config(field, "the socket is not connected").with_reason("not_connected")
        }
        _ => Error::io(ErrorKind::Device, "ask for the peer's address", &source).with_field(field),
    })?;
    let local = socket.local_addr().map_err(|source| {
        Error::io(ErrorKind::Device, "ask for the local address", &source).with_field(field)
    })?;
    Ok((Address::from_system(&local), Address::from_system(&peer)))
}

/// Urgent data is heard of through the priority event only.
fn interest_in(access: Access) -> Interest {
    match (access.read, access.write) {
        (true, false) => Interest::READABLE,
        (false, true) => Interest::WRITABLE,
        _ => Interest::READABLE | Interest::WRITABLE,
    }
}

pub(super) fn socket_interest(is_tcp: bool) -> Interest {
    let both = Interest::READABLE | Interest::WRITABLE;
    if is_tcp { both | Interest::PRIORITY } else { both }
}

/// An urgent byte lies, or may lie, in the queue: reads stop before it.
fn has_urgent(io: &AsyncFd<Descriptor>) -> bool {
    io.try_io(Interest::PRIORITY, |_| Ok(())).is_ok()
}

fn poll_retry(retry: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> Poll<()> {
    if let Some(sleep) = retry {
        ready!(sleep.as_mut().poll(cx));
        *retry = None;
    }
    Poll::Ready(())
}

fn event_loop_gone(source: &io::Error) -> Error {
    Error::io(ErrorKind::Closed, "the event loop has ended", source)
}

/// A defect of the caller, worded alike for every stream.
pub(crate) fn written_after_end(description: &str) -> Error {
    Error::new(ErrorKind::Closed, format!("{description}: written after the end was sent"))
}

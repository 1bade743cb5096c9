//! Packet port over a connected `SOCK_DGRAM` or `SOCK_SEQPACKET` socket: one datagram is one packet.
//!
//! Unix sockets, socket pairs and connected UDP sockets; the packet port that needs no rights. What is
//! not here: UDP sockets with several peers ([`super::udp`]).

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use sapper_proto::packet::PacketBatch;
use socket2::{SockRef, Type};
use tokio::io::unix::AsyncFd;

use super::spec::BoundPath;
use super::sys::{messages, watch};
use super::{PacketKind, PacketPort, PortAbilities};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stats::{DropReason, EndpointStats};
use crate::stream::address::canonical;

/// Largest packet when nobody says otherwise: one TLS record.
pub const DEFAULT_MAX_PACKET: usize = 16_384;

/// Largest that may be asked for: an IPv6 packet without a jumbo payload.
pub const LARGEST_PACKET: usize = 65_535 + 40;

/// How to use a datagram socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatagramOptions {
    /// Larger packets are dropped and counted, in both directions. A batch holds more packets the
    /// smaller this is.
    pub max_packet: usize,
    /// What lies at a packet's first byte.
    pub kind: PacketKind,
}

impl Default for DatagramOptions {
    fn default() -> Self {
        Self { max_packet: DEFAULT_MAX_PACKET, kind: PacketKind::Ip }
    }
}

/// A connected datagram or sequenced-packet socket. It never touches the socket's flags or options.
pub struct DatagramPort {
    io: AsyncFd<OwnedFd>,
    flavour: Flavour,
    options: DatagramOptions,
    /// The peer's end was seen (sequenced packets only).
    ended: bool,
    /// Removed when the port goes.
    _bound: Option<BoundPath>,
    stats: Arc<EndpointStats>,
}

/// What the socket's errors and empty messages mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flavour {
    /// An empty message is the end, EPIPE a lost peer.
    SeqPacket,
    /// A refused connection is final: the peer's socket is gone.
    UnixDatagram,
    /// A refused connection tells of an earlier datagram; the peer may come back.
    Udp,
}

impl DatagramPort {
    /// Takes the socket. Must be called on an I/O thread.
    pub fn new(fd: OwnedFd, options: DatagramOptions) -> Result<Self> {
        if !(1..=LARGEST_PACKET).contains(&options.max_packet) {
            return Err(Error::config(
                "max_packet",
                format!("must be from 1 to {LARGEST_PACKET}, not {}", options.max_packet),
            ));
        }
        let flavour = Flavour::of(&fd)?;
        let io = watch(fd, "the datagram socket")?;
        Ok(Self { io, flavour, options, ended: false, _bound: None, stats: Arc::default() })
    }

    /// Owns the path that its socket was bound to.
    pub(super) fn with_bound_path(mut self, path: Option<BoundPath>) -> Self {
        self._bound = path;
        self
    }

    /// Whether nothing more can come: the peer shut its direction down and nothing waits.
    fn peer_has_ended(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.io.as_raw_fd(), events: RDHUP, revents: 0 };
        // SAFETY: one valid entry, no waiting.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        // Asked in this order: behind its end nothing is added to what waits.
        ready == 1 && poll.revents & (RDHUP | libc::POLLHUP) != 0 && self.waiting_bytes() == 0
    }

    /// Bytes of all messages that wait; empty ones are none.
    fn waiting_bytes(&self) -> libc::c_int {
        let mut bytes = 0;
        // SAFETY: the call writes one `int`. Where it fails, it writes none.
        unsafe { libc::ioctl(self.io.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        bytes
    }

    /// The error of a send that says something about the peer, or what else to do.
    fn judge_send_error(&self, error: &io::Error) -> SendProblem {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => SendProblem::Wait,
            Some(libc::EINTR) => SendProblem::Again,
            Some(libc::EMSGSIZE) => SendProblem::Drop(DropReason::TooLarge),
            // No event follows when the system has memory again, so waiting could last for ever.
            Some(libc::ENOBUFS | libc::ENOMEM) => SendProblem::Drop(DropReason::Refused),
            Some(libc::ECONNREFUSED) if self.flavour == Flavour::Udp => SendProblem::AgainAfterRefusal,
            Some(libc::EPERM | libc::EACCES | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ENETDOWN)
                if self.flavour == Flavour::Udp =>
            {
                SendProblem::Drop(DropReason::Refused)
            }
            Some(
                libc::ECONNREFUSED
                | libc::ENOTCONN
                | libc::EDESTADDRREQ
                | libc::ENOENT
                | libc::EPIPE
                | libc::ECONNRESET,
            ) => SendProblem::Fail(ErrorKind::ConnectionLost),
            _ => SendProblem::Fail(ErrorKind::Device),
        }
    }
}

/// `POLLRDHUP` where it exists: elsewhere `POLLHUP` alone tells.
#[cfg(any(target_os = "linux", target_os = "android"))]
const RDHUP: libc::c_short = libc::POLLRDHUP;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const RDHUP: libc::c_short = 0;

enum SendProblem {
    Wait,
    Again,
    AgainAfterRefusal,
    Drop(DropReason),
    Fail(ErrorKind),
}

impl Flavour {
    fn of(fd: &OwnedFd) -> Result<Self> {
        let socket = SockRef::from(fd);
        let wrong = |what: &str| Error::new(ErrorKind::Device, what).with_phase(Phase::Connect);
        let kind = socket.r#type().map_err(|source| {
            Error::io(ErrorKind::Device, "a datagram port needs a socket", &source).with_phase(Phase::Connect)
        })?;
        let local = socket
            .local_addr()
            .map_err(|source| Error::io(ErrorKind::Device, "read the socket's address", &source))?;
        match kind {
            Type::SEQPACKET => Ok(Self::SeqPacket),
            Type::DGRAM if local.is_ipv4() || local.is_ipv6() => {
                if socket.peer_addr().is_err() {
                    return Err(wrong("this UDP socket is not connected: name its peer, or use a UDP port"));
                }
                Ok(Self::Udp)
            }
            Type::DGRAM => Ok(Self::UnixDatagram),
            _ => Err(wrong("this socket carries a byte stream: a packet port over it needs a framing")),
        }
    }
}

impl PacketPort for DatagramPort {
    fn abilities(&self) -> PortAbilities {
        PortAbilities::plain(self.options.max_packet, self.options.kind)
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        assert!(batch.has_room(self.options.max_packet), "a batch has room for one packet");
        while !self.ended {
            let mut guard = match ready!(self.io.poll_read_ready(cx)) {
                Ok(guard) => guard,
                Err(source) => return Poll::Ready(Err(receive_error(ErrorKind::Device, &source))),
            };
            self.stats.receive_calls.add(1);
            match messages::receive_many(self.io.get_ref().as_fd(), batch, self.options.max_packet) {
                Ok(received) => {
                    if received.drained {
                        // The queue's next message makes a new event: no call is needed to learn that
                        // there is none now.
                        guard.clear_ready();
                    }
                    self.stats.packets_received.add(received.packets);
                    self.stats.bytes_received.add(received.bytes);
                    self.stats.receive_drops.add(DropReason::TooLarge, received.too_large);
                    if received.last_is_empty && self.flavour == Flavour::SeqPacket {
                        self.ended = self.peer_has_ended();
                    }
                    if received.packets > 0 {
                        return Poll::Ready(Ok(true));
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => guard.clear_ready(),
                    Some(libc::EINTR) => {}
                    Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH)
                        if self.flavour == Flavour::Udp =>
                    {
                        self.stats.drops.add(DropReason::Refused, 1);
                    }
                    Some(libc::ECONNREFUSED | libc::ENOTCONN) => {
                        return Poll::Ready(Err(receive_error(ErrorKind::ConnectionLost, &error)));
                    }
                    _ => return Poll::Ready(Err(receive_error(ErrorKind::Device, &error))),
                },
            }
        }
        Poll::Ready(Ok(false))
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        match ready!(self.io.poll_read_ready(cx)) {
            Ok(_) => Poll::Ready(Ok(())),
            Err(source) => Poll::Ready(Err(receive_error(ErrorKind::Device, &source))),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        let abilities = self.abilities();
        let mut refusals = 0;
        while let Some(first) = batch.get(0) {
            if let Some(reason) = abilities.refuses(first) {
                self.stats.drops.add(reason, 1);
                batch.advance(1);
                continue;
            }
            let mut guard = match ready!(self.io.poll_write_ready(cx)) {
                Ok(guard) => guard,
                Err(source) => return Poll::Ready(Err(send_error(ErrorKind::Device, &source))),
            };
            let run = batch.iter().take_while(|&packet| abilities.refuses(packet).is_none());
            self.stats.send_calls.add(1);
            match messages::send_many(self.io.get_ref().as_fd(), run.map(|packet| packet.data)) {
                Ok(sent) => {
                    let bytes = batch.iter().take(sent).map(|packet| packet.data.len() as u64).sum();
                    self.stats.packets_sent.add(sent as u64);
                    self.stats.bytes_sent.add(bytes);
                    batch.advance(sent);
                }
                Err(error) => match self.judge_send_error(&error) {
                    SendProblem::Wait => guard.clear_ready(),
                    SendProblem::Again => {}
                    // Each refusal answers a datagram that was sent before, so there are not many. A
                    // second one in a row is taken for this packet's.
                    SendProblem::AgainAfterRefusal => {
                        self.stats.drops.add(DropReason::Refused, 1);
                        refusals += 1;
                        if refusals > 1 {
                            batch.advance(1);
                            refusals = 0;
                        }
                    }
                    SendProblem::Drop(reason) => {
                        self.stats.drops.add(reason, 1);
                        batch.advance(1);
                    }
                    SendProblem::Fail(kind) => return Poll::Ready(Err(send_error(kind, &error))),
                },
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.flavour == Flavour::SeqPacket {
            // Only sequenced packets have an end. A peer that is gone needs none.
            let _ = SockRef::from(self.io.get_ref()).shutdown(std::net::Shutdown::Write);
        }
        Poll::Ready(Ok(()))
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.io.get_ref().as_fd())
    }

    fn is_movable(&self) -> bool {
        true
    }

    fn moved(&mut self) -> Result<()> {
        let again = self.io.get_ref().try_clone().map_err(|source| {
            Error::io(ErrorKind::ResourceLimit, "duplicate the datagram socket", &source)
        })?;
        self.io = watch(again, "the datagram socket")?;
        Ok(())
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        let socket = SockRef::from(self.io.get_ref());
        match self.flavour {
            Flavour::SeqPacket => format!("seqpacket fd {}", self.io.as_raw_fd()),
            Flavour::UnixDatagram => format!("datagram fd {}", self.io.as_raw_fd()),
            Flavour::Udp => match (socket.local_addr(), socket.peer_addr()) {
                (Ok(local), Ok(peer)) => match (local.as_socket(), peer.as_socket()) {
                    (Some(local), Some(peer)) => format!("udp {} -> {}", canonical(local), canonical(peer)),
                    _ => format!("udp fd {}", self.io.as_raw_fd()),
                },
                _ => format!("udp fd {}", self.io.as_raw_fd()),
            },
        }
    }
}

fn receive_error(kind: ErrorKind, source: &io::Error) -> Error {
    Error::io(kind, "receive from the datagram socket", source).with_phase(Phase::Transfer)
}

fn send_error(kind: ErrorKind, source: &io::Error) -> Error {
    Error::io(kind, "send to the datagram socket", source).with_phase(Phase::Transfer)
}

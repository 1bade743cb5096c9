//! One UDP socket with several users: each is a packet port.
//!
//! A user takes what comes from one peer, what a classifier recognises at its first bytes, or the
//! rest. One task on one I/O thread reads the socket and hands over in batches; sending needs nobody
//! in between. Datagrams that the kernel joined (GRO) stay together, and what leaves is joined for
//! the kernel to cut (GSO), where it can.
//!
//! What is not here: connected sockets with one owner, which are [`super::datagram`]'s.

mod reader;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};

use quinn_udp::{EcnCodepoint, Transmit, UdpSockRef, UdpSocketState};
use sapper_proto::packet::{Checksum, Ecn, Gso, HEADROOM, PacketBatch};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::sys::watch;
use super::{PacketKind, PacketPort, PortAbilities, give_batch, wire_packets};
use crate::buffer::{BLOCK, Buffer};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stats::{DropReason, EndpointStats};

/// The largest payload of a UDP datagram over IPv4; over IPv6 it is 20 bytes more.
pub const LARGEST_DATAGRAM: usize = 65_507;

/// How to use a UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpOptions {
    /// Larger datagrams are dropped and counted when they are to be sent.
    pub max_packet: usize,
    /// What lies at a datagram's first byte.
    pub kind: PacketKind,
    /// Bytes that the kernel may hold for us, in each direction, where it lets us choose.
    pub buffer: usize,
}

impl Default for UdpOptions {
    fn default() -> Self {
        Self { max_packet: LARGEST_DATAGRAM, kind: PacketKind::Opaque, buffer: 2 << 20 }
    }
}

/// Looks at a datagram's bytes and says whether they are its user's.
pub type Classifier = Box<dyn Fn(&[u8]) -> bool + Send>;

/// A bound socket. It is closed when the last clone and the last port are gone.
#[derive(Clone)]
pub struct UdpSocket(Arc<Owned>);

struct Owned {
    shared: Arc<Shared>,
    reader: AbortHandle,
}

struct Shared {
    socket: Socket,
    state: UdpSocketState,
    local: SocketAddr,
    options: UdpOptions,
    users: Mutex<Users>,
    /// The reader's counters.
    stats: Arc<EndpointStats>,
}

#[derive(Default)]
struct Users {
    /// In the order of their registration; the first that recognises a datagram has it.
    classifiers: Vec<(Classifier, Arc<User>)>,
    peers: HashMap<SocketAddr, Arc<User>>,
    rest: Option<Arc<User>>,
    failed: Option<Error>,
}

/// What the reader and one port share.
struct User {
    queue: Mutex<Queue>,
    stats: Arc<EndpointStats>,
}

/// Batches that wait for one user: one call of the reader may bring so many trains of 64 KB. What
/// does not fit is dropped and counted, because a slow user must not hold the others up.
const QUEUE_BATCHES: usize = 6;

#[derive(Default)]
struct Queue {
    /// None of them is empty but the last, which is kept to be filled.
    batches: VecDeque<PacketBatch>,
    /// The address of ours that the peer last wrote to.
    local: Option<IpAddr>,
    failed: Option<Error>,
    waker: Option<Waker>,
}

/// How a port is found again when it goes.
#[derive(Clone, Copy, Debug)]
enum Key {
    Classifier,
    Peer(SocketAddr),
    Rest,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What it guards is whole after each statement: a panic elsewhere leaves nothing half done. A
    // classifier that panics took nothing yet.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl UdpSocket {
    /// Binds and begins to read. Must be called on an I/O thread, which stays the reader's.
    ///
    /// A socket of an unspecified IPv6 address takes IPv4 as well.
    pub fn bind(local: SocketAddr, options: UdpOptions) -> Result<Self> {
        let failed = |kind, source: &io::Error| {
            Error::io(kind, format_args!("bind a UDP socket to {local}"), source).with_phase(Phase::Connect)
        };
        let domain = Domain::for_address(local);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))
            .map_err(|source| failed(ErrorKind::ResourceLimit, &source))?;
        if local.is_ipv6() {
            let only = !local.ip().is_unspecified();
            socket.set_only_v6(only).map_err(|source| failed(ErrorKind::Bind, &source))?;
        }
        socket.bind(&local.into()).map_err(|source| failed(ErrorKind::Bind, &source))?;
        Self::adopt(socket.into(), options)
    }

    /// Takes a bound socket that is ours, with its options and flags.
    pub fn adopt(fd: OwnedFd, options: UdpOptions) -> Result<Self> {
        if !(1..=LARGEST_DATAGRAM).contains(&options.max_packet) {
            return Err(Error::config(
                "max_packet",
                format!("must be from 1 to {LARGEST_DATAGRAM}, not {}", options.max_packet),
            ));
        }
        let failed = |source: &io::Error| {
            Error::io(ErrorKind::Device, "set up a UDP socket", source).with_phase(Phase::Connect)
        };
        let socket = Socket::from(fd);
        let local = socket.local_addr().map_err(|source| failed(&source))?;
        let Some(local) = local.as_socket() else {
            return Err(Error::new(ErrorKind::Device, "this is no UDP socket").with_phase(Phase::Connect));
        };
        // As much as the system allows; less is no error.
        let _ = socket.set_recv_buffer_size(options.buffer);
        let _ = socket.set_send_buffer_size(options.buffer);
        let state = UdpSocketState::new(UdpSockRef::from(&socket)).map_err(|source| failed(&source))?;
        let read = socket.try_clone().map_err(|source| failed(&source))?;
        let io = watch(read.into(), "the UDP socket")?;
        let shared = Arc::new(Shared {
            socket,
            state,
            local,
            options,
            users: Mutex::default(),
            stats: Arc::default(),
        });
        let reader = tokio::spawn(reader::read(Arc::clone(&shared), io)).abort_handle();
        Ok(Self(Arc::new(Owned { shared, reader })))
    }

    /// Where it is bound.
    pub fn local_address(&self) -> SocketAddr {
        self.0.shared.local
    }

    /// What the reader did: system calls, datagrams, those that nobody wanted.
    pub fn stats(&self) -> &Arc<EndpointStats> {
        &self.0.shared.stats
    }

    /// A port for what comes from `peer` and no classifier has recognised. It sends to that peer.
    pub fn port_for_peer(&self, peer: SocketAddr) -> Result<UdpPort> {
        self.attach(Key::Peer(canonical(peer)), None)
    }

    /// A port for the datagrams, of any peer, that `classifier` recognises. It runs for each datagram
    /// on the reader's thread: a look at the first bytes, not more. Each packet says its peer.
    pub fn port_for_class(&self, classifier: Classifier) -> Result<UdpPort> {
        self.attach(Key::Classifier, Some(classifier))
    }

    /// A port for all that is nobody else's. Each packet says its peer.
    pub fn port_for_rest(&self) -> Result<UdpPort> {
        self.attach(Key::Rest, None)
    }

    fn attach(&self, key: Key, classifier: Option<Classifier>) -> Result<UdpPort> {
        let user = Arc::new(User { queue: Mutex::default(), stats: Arc::default() });
        let mut users = lock(&self.0.shared.users);
        if let Some(error) = &users.failed {
            return Err(error.clone());
        }
        let taken =
            |what: &str| Err(Error::new(ErrorKind::Busy, format!("this socket has a port for {what}")));
        match (key, classifier) {
            (Key::Classifier, Some(classifier)) => users.classifiers.push((classifier, Arc::clone(&user))),
            (Key::Peer(peer), _) if users.peers.contains_key(&peer) => return taken(&peer.to_string()),
            (Key::Peer(peer), _) => drop(users.peers.insert(peer, Arc::clone(&user))),
            (Key::Rest, _) if users.rest.is_some() => return taken("all the rest"),
            (Key::Rest, _) => users.rest = Some(Arc::clone(&user)),
            (Key::Classifier, None) => unreachable!("its caller has one"),
        }
        drop(users);
        Ok(UdpPort {
            socket: self.clone(),
            key,
            user,
            local: None,
            front_sent: 0,
            joined: Buffer::new(),
            writer: None,
        })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// IPv4 as IPv4, also where an IPv6 socket wraps it.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// One user's port.
pub struct UdpPort {
    socket: UdpSocket,
    key: Key,
    user: Arc<User>,
    /// Where answers to the peer come from, on a socket of several addresses.
    local: Option<IpAddr>,
    /// Bytes of the batch's first packet that left, where it needs several calls.
    front_sent: usize,
    /// Datagrams copied one behind the other, for the kernel to cut.
    joined: Buffer,
    /// Our own watch on the socket, once it had no room: the other users have theirs.
    writer: Option<AsyncFd<OwnedFd>>,
}

impl Drop for UdpPort {
    fn drop(&mut self) {
        let mut users = lock(&self.socket.0.shared.users);
        match self.key {
            Key::Classifier => users.classifiers.retain(|(_, user)| !Arc::ptr_eq(user, &self.user)),
            Key::Peer(peer) => drop(users.peers.remove(&peer)),
            Key::Rest => users.rest = None,
        }
    }
}

/// Packets at the front of a batch that leave in one call.
struct Run {
    packets: usize,
    peer: SocketAddr,
    ecn: Ecn,
    segment: Option<usize>,
}

impl UdpPort {
    /// The peer of this port, where it has only one.
    pub fn peer(&self) -> Option<SocketAddr> {
        match self.key {
            Key::Peer(peer) => Some(peer),
            Key::Classifier | Key::Rest => None,
        }
    }

    fn shared(&self) -> &Shared {
        &self.socket.0.shared
    }

    /// What goes next, or why the first packet does not.
    fn next_run(&self, batch: &PacketBatch) -> Result<Run, DropReason> {
        let Some(first) = batch.get(0) else { return Err(DropReason::Malformed) };
        if let Some(reason) = self.abilities().refuses(first) {
            return Err(reason);
        }
        let peer = self.peer().or(first.meta.peer).ok_or(DropReason::NoRoute)?;
        let mut run = Run { packets: 1, peer, ecn: first.meta.ecn, segment: None };
        let most = self.shared().state.max_gso_segments();
        if first.meta.gso == Gso::Datagrams || most < 2 {
            return Ok(run);
        }
        let (len, mut bytes) = (first.data.len(), first.data.len());
        for packet in batch.iter().skip(1).take(most - 1) {
            let same = packet.meta.gso == Gso::None
                && packet.meta.checksum == Checksum::Unverified
                && packet.meta.ecn == run.ecn
                && self.peer().or(packet.meta.peer) == Some(run.peer);
            let fits =
                (1..=len).contains(&packet.data.len()) && bytes + packet.data.len() <= LARGEST_DATAGRAM;
            if !same || !fits {
                break;
            }
            bytes += packet.data.len();
            run.packets += 1;
            run.segment = Some(len);
            if packet.data.len() < len {
                break;
            }
        }
        Ok(run)
    }

    fn transmit(&self, run: &Run, contents: &[u8], segment: Option<usize>) -> io::Result<()> {
        let shared = self.shared();
        let destination = match run.peer {
            SocketAddr::V4(v4) if shared.local.is_ipv6() => {
                SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port()))
            }
            peer => peer,
        };
        let ecn = EcnCodepoint::from_bits(run.ecn as u8);
        let transmit = Transmit { destination, ecn, contents, segment_size: segment, src_ip: self.local };
        self.user.stats.send_calls.add(1);
        shared.state.try_send(UdpSockRef::from(&shared.socket), &transmit)
    }

    /// Sends what is at the front, or drops what does not go. `Ok(false)`: the socket has no room.
    fn send_front(&mut self, batch: &mut PacketBatch) -> Result<bool> {
        let run = match self.next_run(batch) {
            Ok(run) => run,
            Err(reason) => {
                self.give_up(batch, 1, reason);
                return Ok(true);
            }
        };
        let Some(first) = batch.get(0) else { return Ok(true) };
        let rest = first.data.get(self.front_sent..).unwrap_or(first.data);
        let (contents, segment) = if run.packets > 1 {
            self.joined.consume(self.joined.len());
            for packet in batch.iter().take(run.packets) {
                self.joined.extend(packet.data);
            }
            (self.joined.data(), run.segment)
        } else if first.meta.gso == Gso::Datagrams {
            let size = usize::from(first.meta.gso_size).max(1);
            let most = self.shared().state.max_gso_segments().min(LARGEST_DATAGRAM / size).max(1);
            let part = &rest[..rest.len().min(size * most)];
            (part, (part.len() > size).then_some(size))
        } else {
            (rest, None)
        };
        let (bytes, datagrams) = (contents.len(), segment.map_or(1, |size| contents.len().div_ceil(size)));
        let result = self.transmit(&run, contents, segment);
        match result.map_err(|error| error.raw_os_error()) {
            Ok(()) => {
                self.sent(datagrams as u64, bytes);
                if run.packets == 1 && bytes < rest.len() {
                    self.front_sent += bytes;
                } else {
                    self.front_sent = 0;
                    batch.advance(run.packets);
                }
            }
            Err(Some(libc::EAGAIN)) => return Ok(false),
            // The kernel or the device does not cut for us. From now on nothing is joined, and the
            // same packets are tried once more.
            Err(Some(libc::EIO | libc::EINVAL))
                if segment.is_some() && self.shared().state.max_gso_segments() < 2 => {}
            Err(Some(libc::EMSGSIZE)) => self.give_up(batch, run.packets, DropReason::TooLarge),
            Err(Some(errno @ (libc::EBADF | libc::ENOTSOCK))) => {
                let source = io::Error::from_raw_os_error(errno);
                return Err(
                    Error::io(ErrorKind::Device, "send a datagram", &source).with_phase(Phase::Transfer)
                );
            }
            // No route, a firewall, no memory: the next one may get through.
            Err(_) => self.give_up(batch, run.packets, DropReason::Refused),
        }
        Ok(true)
    }

    fn sent(&self, packets: u64, bytes: usize) {
        self.user.stats.packets_sent.add(packets);
        self.user.stats.bytes_sent.add(bytes as u64);
    }

    fn give_up(&mut self, batch: &mut PacketBatch, packets: usize, reason: DropReason) {
        // Joined datagrams count as what they are; anything else large is no datagram at all.
        let lost = batch.iter().take(packets).map(|packet| match packet.meta.gso {
            Gso::Datagrams => wire_packets(packet),
            _ => 1,
        });
        let lost = lost.sum();
        self.user.stats.drops.add(reason, lost);
        self.front_sent = 0;
        batch.advance(packets);
    }
}

impl PacketPort for UdpPort {
    fn abilities(&self) -> PortAbilities {
        let UdpOptions { max_packet, kind, .. } = self.shared().options;
        PortAbilities { datagrams: true, ..PortAbilities::plain(max_packet, kind) }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        let mut queue = lock(&self.user.queue);
        let several = queue.batches.len() > 1;
        let Some(waiting) = queue.batches.front_mut().filter(|waiting| !waiting.is_empty()) else {
            if let Some(error) = &queue.failed {
                return Poll::Ready(Err(error.clone()));
            }
            queue.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let before = batch.len();
        // A batch of the usual size takes the place of the full one: nothing is copied.
        if batch.is_empty() && batch.has_room(BLOCK - HEADROOM) {
            std::mem::swap(batch, waiting);
        } else {
            while let Some(packet) = waiting.get(0)
                && batch.push(packet.data, *packet.meta)
            {
                waiting.advance(1);
            }
            assert!(batch.len() > before, "a batch has room for one packet");
        }
        if several
            && waiting.is_empty()
            && let Some(empty) = queue.batches.pop_front()
        {
            give_batch(empty);
        }
        // An answer comes from where the peer's datagram went to, where that is not clear already.
        if matches!(self.key, Key::Peer(_)) && self.shared().local.ip().is_unspecified() {
            self.local = queue.local;
        }
        drop(queue);
        let (mut packets, mut bytes) = (0, 0);
        for packet in (before..batch.len()).filter_map(|index| batch.get(index)) {
            packets += wire_packets(packet);
            bytes += packet.data.len();
        }
        self.user.stats.packets_received.add(packets);
        self.user.stats.bytes_received.add(bytes as u64);
        Poll::Ready(Ok(true))
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut queue = lock(&self.user.queue);
        let waits = queue.batches.front().is_some_and(|waiting| !waiting.is_empty());
        if !waits && queue.failed.is_none() {
            queue.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        while !batch.is_empty() {
            if self.send_front(batch)? {
                continue;
            }
            if self.writer.is_none() {
                let copy = self.shared().socket.try_clone().map_err(|source| {
                    Error::io(ErrorKind::ResourceLimit, "watch a UDP socket", &source)
                        .with_phase(Phase::Transfer)
                })?;
                self.writer = Some(watch(copy.into(), "a UDP socket")?);
            }
            let Some(writer) = &self.writer else { continue };
            // One more try follows, in case there was room before the readiness was cleared.
            ready!(writer.poll_write_ready(cx))
                .map_err(|source| Error::io(ErrorKind::Device, "wait for a UDP socket", &source))?
                .clear_ready();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        // Datagrams have no end.
        Poll::Ready(Ok(()))
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared().socket.as_fd())
    }

    fn release_idle(&mut self) {
        let mut queue = lock(&self.user.queue);
        if let Some(empty) = queue.batches.pop_front_if(|waiting| waiting.is_empty()) {
            give_batch(empty);
        }
        drop(queue);
        self.joined.consume(self.joined.len());
        self.joined.release();
        self.writer = None;
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.user.stats
    }

    fn describe(&self) -> String {
        let local = self.shared().local;
        match self.key {
            Key::Peer(peer) => format!("udp {local} -> {peer}"),
            Key::Classifier => format!("udp {local} (a class of datagrams)"),
            Key::Rest => format!("udp {local}"),
        }
    }

    fn offloads(&self) -> Vec<(&'static str, String)> {
        let state = &self.shared().state;
        let say = |segments: usize| match segments {
            0 | 1 => "off: the system has none".to_owned(),
            n => format!("on: {n} datagrams a call"),
        };
        vec![("udp_gso", say(state.max_gso_segments())), ("udp_gro", say(state.gro_segments()))]
    }
}

//! Packet port over a TUN or TAP interface: created, attached to by name, or an adopted descriptor.
//!
//! With the virtio-net header the kernel hands over and takes super-packets: one system call moves up
//! to 64 KB. Each packet on its way into the interface costs a call and a walk through the network
//! stack, so runs of packets are joined before ([`gro`](sapper_proto::packet::gro)) where the
//! interface takes that: here and not in the pump, because what is joined is a list of slices for one
//! `writev` and never lies anywhere as a whole.
//!
//! What is not here: routes, and anything that outlives the port.

mod device;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use device::{Device, Gone};
use sapper_proto::packet::gro::{Coalescer, MOST_TCP_PACKETS};
use sapper_proto::packet::ip::{self, Version};
use sapper_proto::packet::{Gso, Offloads, PacketBatch, PacketMeta, virtio};

use super::{PacketKind, PacketPort, PortAbilities, wire_packets};
use crate::error::{Error, Result};
use crate::stats::{DropReason, EndpointStats};

/// The longest that one read may bring: an IP super-packet, or the same with Ethernet and VLAN headers.
const LONGEST_READ: usize = 65_535 + 18;

/// What lies in front of each packet of the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunHeader {
    /// Nothing.
    None,
    /// Linux packet information: flags and protocol (4 bytes).
    PacketInformation,
    /// The address family, as utun has it (4 bytes).
    Utun,
    /// A virtio-net header (10 or 12 bytes), which is what offload needs.
    VirtioNet,
}

impl TunHeader {
    /// The word for it in options.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::PacketInformation => "pi",
            Self::Utun => "utun",
            Self::VirtioNet => "vnet",
        }
    }
}

/// How to use a TUN or TAP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunOptions {
    /// Ethernet frames (TAP) instead of IP packets (TUN). An adopted descriptor says itself what it is.
    pub ethernet: bool,
    /// What lies in front of each packet. Of an adopted descriptor `None` stands for what it says
    /// itself, which is a virtio-net header or nothing: packet information cannot be read back, so it
    /// has to be named. An interface that is opened by name gets what fits `offload`.
    pub header: Option<TunHeader>,
    /// Take and give super-packets where the system can.
    pub offload: bool,
    /// Addresses with their prefix lengths for the interface.
    pub addresses: Vec<(IpAddr, u8)>,
    /// MTU for the interface; `None` leaves it as it is.
    pub mtu: Option<u16>,
    /// Bring the interface up; otherwise its state is left as it is.
    pub up: bool,
}

impl Default for TunOptions {
    fn default() -> Self {
        Self { ethernet: false, header: None, offload: true, addresses: Vec::new(), mtu: None, up: true }
    }
}

/// A TUN or TAP interface.
pub struct TunPort {
    device: Device,
    gone: Gone,
    /// Kept only while packets flow.
    coalescer: Option<Box<Coalescer>>,
    stats: Arc<EndpointStats>,
}

/// What became of one packet.
enum Written {
    Taken,
    Wait,
    Drop(DropReason),
    /// This kind of super-packet is not taken after all.
    NoUso,
    Fail(Error),
}

impl TunPort {
    /// Creates the interface `name`, or attaches to it where it exists. An empty name, or one with
    /// `%d`, lets the system choose. Must be called on an I/O thread, whose network namespace counts.
    pub fn open(name: &str, options: &TunOptions) -> Result<Self> {
        Ok(Self::over(Device::open(name, options)?))
    }

    /// Finds what is wrong with the options of a descriptor that somebody else opened, and changes nothing.
    pub fn check(fd: BorrowedFd<'_>, options: &TunOptions) -> Result<()> {
        device::header_of(fd, options.header).map(drop)
    }

    /// Takes a descriptor that somebody else opened. Its `O_NONBLOCK` is as before afterwards; its
    /// other settings stay as they are, but for the offloads where `offload` asks for them. Addresses,
    /// MTU and state are the business of who opened it.
    pub fn adopt(fd: OwnedFd, options: &TunOptions) -> Result<Self> {
        Ok(Self::over(Device::adopt(fd, options)?))
    }

    fn over(device: Device) -> Self {
        let gone = Gone::of(&device);
        Self { device, gone, coalescer: None, stats: Arc::default() }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Reads one packet into the batch: `None` when none waits.
    fn read_packet(&self, batch: &mut PacketBatch) -> Result<Option<()>> {
        let header = self.device.header_len();
        let Some(room) = batch.reserve_with_prefix(header, LONGEST_READ) else { return Ok(None) };
        // SAFETY: the pointer and the length are those of a slice that lives through the call.
        let n = unsafe { libc::read(self.device.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
        self.stats.receive_calls.add(1);
        let Ok(n) = usize::try_from(n) else {
            let source = io::Error::last_os_error();
            return match source.raw_os_error() {
                Some(libc::EAGAIN) => Ok(None),
                Some(libc::EINTR) => Ok(Some(())),
                _ => Err(self.device.failed("read a packet from", &source)),
            };
        };
        if n == 0 {
            // No packet is empty: only what is no TUN at all ends like this.
            return Err(self.device.ended());
        }
        match self.decode(&room[..n], header) {
            Ok(meta) => {
                let len = n - header;
                self.stats
                    .packets_received
                    .add(wire_packets(sapper_proto::packet::Packet { data: &room[header..n], meta: &meta }));
                self.stats.bytes_received.add(len as u64);
                batch.commit(len, meta);
            }
            Err(reason) => {
                let unused = self.stats.packets_received.get() == 0;
                if unused && let Some(error) = self.device.has_another_header(&room[..n]) {
                    return Err(error);
                }
                self.stats.receive_drops.add(reason, 1);
            }
        }
        Ok(Some(()))
    }

    /// What travels with a packet that was read. The kernel is believed no more than anybody.
    fn decode(&self, bytes: &[u8], header: usize) -> Result<PacketMeta, DropReason> {
        let (head, packet) = bytes.split_at_checked(header).ok_or(DropReason::Malformed)?;
        if packet.is_empty() {
            return Err(DropReason::Malformed);
        }
        if let (TunHeader::VirtioNet, Some(head)) = (self.device.header, head.first_chunk()) {
            let decoded = if self.device.ethernet {
                virtio::decode_frame(head, packet)
            } else {
                virtio::decode(head, packet)
            };
            return decoded.map_err(|error| match error {
                virtio::VirtioError::Packet(_) => DropReason::Malformed,
                _ => DropReason::BadOffload,
            });
        }
        if !self.device.ethernet {
            ip::check_len(packet).map_err(|_| DropReason::Malformed)?;
        }
        Ok(PacketMeta::default())
    }

    /// Writes one packet that lies in slices behind its header.
    fn write_packet<'a>(
        &self,
        meta: &PacketMeta,
        headers: &'a [u8],
        payloads: impl Iterator<Item = &'a [u8]>,
    ) -> Written {
        let mut head = [0; 12];
        let head = match self.device.encode_header(&mut head, meta, headers) {
            Ok(len) => &head[..len],
            Err(reason) => return Written::Drop(reason),
        };
        let mut slices = [IoSlice::new(&[]); MOST_TCP_PACKETS + 2];
        slices[0] = IoSlice::new(head);
        slices[1] = IoSlice::new(headers);
        let mut count = 2;
        for payload in payloads {
            slices[count] = IoSlice::new(payload);
            count += 1;
        }
        let slices = if head.is_empty() { &slices[1..count] } else { &slices[..count] };
        self.stats.send_calls.add(1);
        loop {
            // SAFETY: an `IoSlice` has the form of an `iovec`, and the slices live through the call.
            let n = unsafe {
                libc::writev(self.device.as_raw_fd(), slices.as_ptr().cast(), slices.len() as libc::c_int)
            };
            if n >= 0 {
                return Written::Taken;
            }
            let source = io::Error::last_os_error();
            return match source.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EAGAIN) => Written::Wait,
                // The interface is down, or the system has no memory: the next packet may get through.
                Some(libc::EIO | libc::ENOBUFS | libc::ENOMEM | libc::ENETDOWN) => {
                    Written::Drop(DropReason::Refused)
                }
                Some(libc::EINVAL) if meta.gso == Gso::Udp => Written::NoUso,
                Some(libc::EINVAL) if let Some(error) = self.device.refuses_header() => Written::Fail(error),
                Some(libc::EINVAL | libc::E2BIG) => Written::Drop(DropReason::Malformed),
                Some(libc::EMSGSIZE) => Written::Drop(DropReason::TooLarge),
                _ => Written::Fail(self.device.failed("write a packet to", &source)),
            };
        }
    }

    fn sent(&self, packets: u64, bytes: usize) {
        self.stats.packets_sent.add(packets);
        self.stats.bytes_sent.add(bytes as u64);
    }

    /// Drops what the interface may not be given.
    fn drop_refused(&self, batch: &mut PacketBatch) {
        let abilities = self.abilities();
        if batch.iter().any(|packet| abilities.refuses(packet).is_some()) {
            batch.retain(|packet| match abilities.refuses(packet) {
                Some(reason) => {
                    self.stats.drops.add(reason, 1);
                    false
                }
                None => true,
            });
        }
    }

    /// Writes the packets one by one. `Ok(false)`: the interface takes no more now.
    fn send_each(&mut self, batch: &mut PacketBatch) -> Result<bool> {
        while let Some(packet) = batch.get(0) {
            match self.write_packet(packet.meta, packet.data, std::iter::empty()) {
                Written::Taken => self.sent(wire_packets(packet), packet.data.len()),
                Written::Wait => return Ok(false),
                Written::Drop(reason) => self.stats.drops.add(reason, 1),
                Written::NoUso => {
                    self.device.give_up_uso();
                    self.stats.drops.add(DropReason::BadOffload, 1);
                }
                Written::Fail(error) => return Err(error),
            }
            batch.advance(1);
        }
        Ok(true)
    }

    /// Joins what can be joined and writes that.
    fn send_coalesced(&mut self, batch: &mut PacketBatch) -> Result<bool> {
        let offloads = self.device.offloads;
        let mut coalescer = self.coalescer.take().unwrap_or_else(|| Box::new(Coalescer::new(offloads)));
        let outputs = coalescer.coalesce(batch);
        let mut taken = 0;
        let mut result = Ok(true);
        while taken < outputs {
            let Some(output) = coalescer.output(batch, taken) else { break };
            match self.write_packet(&output.meta, output.headers, output.payloads()) {
                Written::Taken => {
                    let packets = if output.packets > 1 || output.meta.gso == Gso::None {
                        output.packets as u64
                    } else {
                        wire_packets(sapper_proto::packet::Packet {
                            data: output.headers,
                            meta: &output.meta,
                        })
                    };
                    self.sent(packets, output.len);
                }
                Written::Wait => {
                    result = Ok(false);
                    break;
                }
                Written::Drop(reason) => self.stats.drops.add(reason, output.packets as u64),
                Written::NoUso => {
                    self.device.give_up_uso();
                    if output.packets == 1 {
                        self.stats.drops.add(DropReason::BadOffload, 1);
                        taken += 1;
                    }
                    // What is left is joined again, without this kind.
                    coalescer.take(batch, taken);
                    return Ok(true);
                }
                Written::Fail(error) => {
                    result = Err(error);
                    break;
                }
            }
            taken += 1;
        }
        coalescer.take(batch, taken);
        self.coalescer = Some(coalescer);
        result
    }
}

impl PacketPort for TunPort {
    fn abilities(&self) -> PortAbilities {
        let Offloads { checksum, tso4, tso6, uso } = self.device.offloads;
        PortAbilities {
            max_packet: self.device.max_packet(),
            tso4,
            tso6,
            uso,
            partial_checksum: checksum,
            datagrams: false,
            wants_coalescing: tso4 || tso6 || uso,
            kind: if self.device.ethernet { PacketKind::Ethernet } else { PacketKind::Ip },
        }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        assert!(batch.has_room(LONGEST_READ), "a batch has room for one packet");
        let before = batch.len();
        loop {
            ready!(self.poll_receivable(cx))?;
            let mut guard = ready!(self.device.poll_readable(cx))?;
            while batch.has_room(LONGEST_READ) {
                if self.read_packet(batch)?.is_none() {
                    guard.clear_ready();
                    break;
                }
            }
            if batch.len() > before {
                return Poll::Ready(Ok(true));
            }
        }
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        match self.device.poll_readable(cx) {
            Poll::Ready(ready) => Poll::Ready(ready.map(|_| ())),
            Poll::Pending if self.gone.poll(cx) => Poll::Ready(Err(self.device.ended())),
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        loop {
            self.drop_refused(batch);
            if batch.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let joins = batch.len() > 1 && self.abilities().wants_coalescing;
            let takes_more = if joins { self.send_coalesced(batch) } else { self.send_each(batch) };
            if !takes_more? {
                // Only now: an interface that is down is never writable, and drops what it is given.
                // One more try follows, in case it took more before the readiness was cleared.
                ready!(self.device.poll_writable(cx))?.clear_ready();
            }
        }
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        // An interface has no end.
        Poll::Ready(Ok(()))
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.as_fd())
    }

    fn release_idle(&mut self) {
        self.coalescer = None;
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        self.device.describe()
    }

    fn offloads(&self) -> Vec<(&'static str, String)> {
        self.device.say_offloads()
    }
}

//! Load for the demo and for tests: a [`Source`] that sends stamped units and a [`Meter`] that counts
//! them, checks that none is missing or torn, and measures how long each was under way.
//!
//! Each has one plain thread that blocks: the load must not share the event loops of what it loads.
//! A unit is an IPv6 packet on a packet descriptor, or a block of fixed length in a stream; its first
//! payload bytes are its number and the time at which it was sent. Not here: figures that are
//! compared with other programs; those are the benches', which measure from outside.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::stats::{Counter, LatencyHistogram};

/// An IPv6 header; the stamp follows it.
const HEADER: usize = 40;
/// Number and time.
const STAMP: usize = 16;
/// Units that one system call moves.
const BATCH: usize = 32;
/// How long a thread waits before it looks whether it should end.
const SLICE: Duration = Duration::from_millis(50);

/// What a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// An IPv6 packet of this many bytes, on a descriptor that keeps packets.
    Packet(usize),
    /// This many bytes of a stream.
    Block(usize),
}

impl Unit {
    /// Checks the length; `field` is the option to blame.
    pub fn check(self, field: &'static str) -> Result<Self> {
        let (len, least, most) = match self {
            Self::Packet(len) => (len, HEADER + STAMP, 65_535),
            Self::Block(len) => (len, STAMP, 1 << 20),
        };
        if (least..=most).contains(&len) {
            Ok(self)
        } else {
            Err(Error::config(field, format!("a unit has {least} to {most} bytes, not {len}")))
        }
    }

    fn len(self) -> usize {
        match self {
            Self::Packet(len) | Self::Block(len) => len,
        }
    }

    fn stamp_at(self) -> usize {
        match self {
            Self::Packet(_) => HEADER,
            Self::Block(_) => 0,
        }
    }

    /// A unit with everything but its stamp.
    fn blank(self) -> Vec<u8> {
        let mut unit: Vec<u8> = (0..self.len()).map(|i| (i * 31) as u8).collect();
        if let Self::Packet(len) = self {
            unit[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 59, 64]); // version 6, no next header
            unit[4..6].copy_from_slice(&((len - HEADER) as u16).to_be_bytes());
            unit[8..24].copy_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            unit[24..40].copy_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        }
        unit
    }
}

/// What a source or a meter has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// Units sent or received.
    pub units: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Units whose number was jumped over.
    pub lost: u64,
    /// Units that are not what was sent.
    pub torn: u64,
    /// Median time under way.
    pub latency_p50: Duration,
    /// 99 of 100 took no longer.
    pub latency_p99: Duration,
    /// The longest.
    pub latency_max: Duration,
}

struct Shared {
    stop: AtomicBool,
    units: Counter,
    bytes: Counter,
    lost: Counter,
    torn: Counter,
    latency: LatencyHistogram,
}

/// A thread that sends or receives. Dropping it ends the thread.
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Sends units into `fd`, `rate` a second, or as many as it takes (0).
    pub fn source(fd: OwnedFd, unit: Unit, rate: u64) -> Result<Self> {
        Self::spawn("sapper-source", move |shared| source(&fd, unit, rate, shared))
    }

    /// Receives units from `fd`.
    pub fn meter(fd: OwnedFd, unit: Unit) -> Result<Self> {
        Self::spawn("sapper-meter", move |shared| meter(&fd, unit, shared))
    }

    fn spawn(name: &str, work: impl FnOnce(&Shared) -> io::Result<()> + Send + 'static) -> Result<Self> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            units: Counter::default(),
            bytes: Counter::default(),
            lost: Counter::default(),
            torn: Counter::default(),
            latency: LatencyHistogram::fine(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // A peer that is gone ends the load; what was counted until then is what there is to say.
            let _ = work(&theirs);
        });
        let thread =
            thread.map_err(|source| Error::io(ErrorKind::ResourceLimit, "start a load thread", &source))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Counts until now.
    pub fn snapshot(&self) -> LoadSnapshot {
        let shared = &self.shared;
        let quantile = |q| shared.latency.quantile(q).unwrap_or_default();
        LoadSnapshot {
            units: shared.units.get(),
            bytes: shared.bytes.get(),
            lost: shared.lost.get(),
            torn: shared.torn.get(),
            latency_p50: quantile(0.5),
            latency_p99: quantile(0.99),
            latency_max: shared.latency.largest(),
        }
    }

    /// Ends the thread and waits for that.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Nanoseconds of a clock that all processes of the machine share.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the timespec outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Waits until `fd` is ready, at most [`SLICE`].
fn wait(fd: &OwnedFd, events: libc::c_short) {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd that outlives the call.
    unsafe { libc::poll(&mut poll, 1, SLICE.as_millis() as i32) };
}

/// Whether an error only says that it is not the time.
fn is_later(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS))
}

fn source(fd: &OwnedFd, unit: Unit, rate: u64, shared: &Shared) -> io::Result<()> {
    let mut batch: Vec<Vec<u8>> = (0..BATCH).map(|_| unit.blank()).collect();
    let (started, mut number) = (Instant::now(), 0u64);
    while !shared.stop.load(Relaxed) {
        let due = if rate == 0 {
            BATCH
        } else {
            let due = (started.elapsed().as_secs_f64() * rate as f64) as u64;
            if due <= number {
                std::thread::sleep(Duration::from_micros(200).min(SLICE));
                continue;
            }
            ((due - number) as usize).min(BATCH)
        };
        for (i, one) in batch[..due].iter_mut().enumerate() {
            let at = unit.stamp_at();
            one[at..at + 8].copy_from_slice(&(number + i as u64).to_le_bytes());
            one[at + 8..at + 16].copy_from_slice(&now().to_le_bytes());
        }
        let sent = match unit {
            Unit::Packet(_) => send_packets(fd, &batch[..due], shared)?,
            Unit::Block(_) => send_blocks(fd, &batch[..due], shared)?,
        };
        number += sent as u64;
        shared.units.add(sent as u64);
        shared.bytes.add((sent * unit.len()) as u64);
    }
    Ok(())
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// One message for each slice; they point to the slices.
fn messages(slices: &mut [libc::iovec]) -> Vec<libc::mmsghdr> {
    let message = |slice: &mut libc::iovec| {
        // SAFETY: zero is a valid value of every field of a mmsghdr.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = slice;
        message.msg_hdr.msg_iovlen = 1;
        message
    };
    slices.iter_mut().map(message).collect()
}

fn send_packets(fd: &OwnedFd, packets: &[Vec<u8>], shared: &Shared) -> io::Result<usize> {
    let mut slices: Vec<_> = packets.iter().map(|packet| iovec(packet)).collect();
    let mut messages = messages(&mut slices);
    let mut sent = 0;
    while sent < messages.len() && !shared.stop.load(Relaxed) {
        let left = &mut messages[sent..];
        // SAFETY: `left`, the slices and the packets that they point to outlive the call.
        let n = unsafe {
            libc::sendmmsg(
                fd.as_raw_fd(),
                left.as_mut_ptr(),
                left.len() as u32,
                (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
            )
        };
        if n >= 0 {
            sent += n as usize;
            continue;
        }
        let error = io::Error::last_os_error();
        if !is_later(&error) {
            return Err(error);
        }
        wait(fd, libc::POLLOUT);
    }
    Ok(sent)
}

fn send_blocks(fd: &OwnedFd, blocks: &[Vec<u8>], shared: &Shared) -> io::Result<usize> {
    for (index, block) in blocks.iter().enumerate() {
        let mut rest = &block[..];
        while !rest.is_empty() {
            // SAFETY: the bytes outlive the call.
            let n = unsafe {
                libc::send(
                    fd.as_raw_fd(),
                    rest.as_ptr().cast(),
                    rest.len(),
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            };
            if n >= 0 {
                rest = &rest[n as usize..];
                continue;
            }
            let error = io::Error::last_os_error();
            if !is_later(&error) {
                return Err(error);
            }
            if shared.stop.load(Relaxed) {
                return Ok(index);
            }
            wait(fd, libc::POLLOUT);
        }
    }
    Ok(blocks.len())
}

/// Looks at a unit's stamp.
fn take_stamp(unit: Unit, bytes: &[u8], arrived: u64, expected: &mut u64, shared: &Shared) {
    let at = unit.stamp_at();
    let read = |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().expect("eight bytes"));
    let (number, sent) = (read(at), read(at + 8));
    // A number from nowhere would count a loss of billions: it is no stamp.
    if sent > arrived || number.abs_diff(*expected) > 1 << 32 {
        shared.torn.add(1);
        return;
    }
    shared.lost.add(number.saturating_sub(*expected));
    *expected = number + 1;
    shared.units.add(1);
    shared.bytes.add(unit.len() as u64);
    shared.latency.record(Duration::from_nanos(arrived - sent));
}

fn meter(fd: &OwnedFd, unit: Unit, shared: &Shared) -> io::Result<()> {
    match unit {
        Unit::Packet(_) => meter_packets(fd, unit, shared),
        Unit::Block(_) => meter_blocks(fd, unit, shared),
    }
}

fn meter_packets(fd: &OwnedFd, unit: Unit, shared: &Shared) -> io::Result<()> {
    let room = unit.len() + 1;
    let mut bytes = vec![0u8; BATCH * room];
    let mut expected = 0;
    while !shared.stop.load(Relaxed) {
        let mut slices: Vec<_> = bytes
            .chunks_mut(room)
            .map(|slot| libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() })
            .collect();
        let mut messages = messages(&mut slices);
        // SAFETY: the messages, the slices and `bytes` outlive the call, and nothing reads `bytes` in it.
        let n = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        if n < 0 {
            let error = io::Error::last_os_error();
            if !is_later(&error) {
                return Err(error);
            }
            wait(fd, libc::POLLIN);
            continue;
        }
        let arrived = now();
        for (message, packet) in messages[..n as usize].iter().zip(bytes.chunks(room)) {
            if message.msg_len as usize == unit.len() {
                take_stamp(unit, packet, arrived, &mut expected, shared);
            } else {
                shared.torn.add(1);
            }
        }
    }
    Ok(())
}

fn meter_blocks(fd: &OwnedFd, unit: Unit, shared: &Shared) -> io::Result<()> {
    let mut bytes = vec![0u8; (256 * 1024usize).next_multiple_of(unit.len())];
    let (mut filled, mut expected) = (0, 0);
    while !shared.stop.load(Relaxed) {
        let free = &mut bytes[filled..];
        // SAFETY: `free` is writable for its length during the call.
        let n =
            unsafe { libc::recv(fd.as_raw_fd(), free.as_mut_ptr().cast(), free.len(), libc::MSG_DONTWAIT) };
        if n == 0 {
            return Ok(());
        }
        if n < 0 {
            let error = io::Error::last_os_error();
            if !is_later(&error) {
                return Err(error);
            }
            wait(fd, libc::POLLIN);
            continue;
        }
        filled += n as usize;
        let arrived = now();
        let whole = filled - filled % unit.len();
        for block in bytes[..whole].chunks(unit.len()) {
            take_stamp(unit, block, arrived, &mut expected, shared);
        }
        bytes.copy_within(whole..filled, 0);
        filled -= whole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;
    use crate::becomes::assert_becomes;

    fn until(load: &Load, units: u64) -> LoadSnapshot {
        assert_becomes(true, || load.snapshot().units >= units);
        load.snapshot()
    }

    #[test]
    fn packets_arrive_whole_and_are_measured() {
        let (one, other) = UnixDatagram::pair().unwrap();
        let unit = Unit::Packet(1280).check("size").unwrap();
        let meter = Load::meter(other.into(), unit).unwrap();
        let mut source = Load::source(one.into(), unit, 0).unwrap();
        let seen = until(&meter, 10_000);
        assert_eq!((seen.lost, seen.torn), (0, 0));
        assert!(seen.latency_p50 > Duration::ZERO && seen.latency_p50 <= seen.latency_p99);
        source.stop();
        assert!(source.snapshot().units >= seen.units);
    }

    #[test]
    fn blocks_of_a_stream_are_found_again() {
        let (one, other) = UnixStream::pair().unwrap();
        let unit = Unit::Block(5_000).check("size").unwrap();
        let meter = Load::meter(other.into(), unit).unwrap();
        let _source = Load::source(one.into(), unit, 0).unwrap();
        let seen = until(&meter, 1_000);
        assert_eq!((seen.lost, seen.torn), (0, 0));
    }

    #[test]
    fn a_loss_and_a_torn_packet_are_counted() {
        let (one, other) = UnixDatagram::pair().unwrap();
        let unit = Unit::Packet(100);
        let meter = Load::meter(other.into(), unit).unwrap();
        let mut packet = unit.blank();
        let mut send = |number: u64| {
            packet[HEADER..HEADER + 8].copy_from_slice(&number.to_le_bytes());
            packet[HEADER + 8..HEADER + 16].copy_from_slice(&now().to_le_bytes());
            one.send(&packet).unwrap();
        };
        send(0);
        send(3);
        one.send(b"short").unwrap();
        send(4);
        let seen = until(&meter, 3);
        assert_eq!((seen.lost, seen.torn), (2, 1));
    }

    #[test]
    fn lengths_are_checked() {
        assert_eq!(Unit::Packet(20).check("size").unwrap_err().field(), Some("size"));
        assert_eq!(Unit::Block(0).check("size").unwrap_err().field(), Some("size"));
    }
}

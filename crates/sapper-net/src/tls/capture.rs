//! A capture: the ciphertext of connections with their secrets, as one pcapng file that an analyser reads
//! without a key log beside it.
//!
//! What TLS sent and received is put into TCP packets that were never on a wire: whatever carried it, an
//! analyser knows TCP. Connections never wait for the disk: what does not fit in front of the writer is
//! left out, counted, and seen as missing by the reader; secrets are not left out.
//!
//! What is not here: packets inside a tunnel ([`crate::port::tap`]).

use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use sapper_proto::packet::checksum;
use sapper_proto::pcapng::{self, Direction, LinkType, Record};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime;

/// Bytes that wait for the disk at most: what a busy connection moves in about ten milliseconds.
const MOST_WAITING: usize = 8 * 1024 * 1024;
/// Ciphertext of one packet: what an IPv4 length can say, with room for headers.
const MOST_IN_A_PACKET: usize = 65_000;
/// Where connections without addresses are said to be.
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SERVER_PORT: u16 = 443;
const FIRST_CLIENT_PORT: u16 = 49_152;

const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
const CHECKSUM_IN_TCP: usize = 16;
const SYN: u8 = 0x02;
const PUSH: u8 = 0x08;
const ACK: u8 = 0x10;
const FIN: u8 = 0x01;

/// A file that captures go to. Whoever reads it reads the traffic.
pub(crate) struct Capture {
    shared: Arc<Shared>,
    writer: Mutex<Writer>,
}

enum Writer {
    /// Nobody has connected yet, and the file is as it was.
    Idle(File, PathBuf),
    Running,
}

struct Shared {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

struct Waiting {
    bytes: Vec<u8>,
    flows: u16,
    lost: u64,
    /// No more comes, and: everything is written.
    ended: bool,
    done: bool,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Capture")
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a file is, whatever it is called: its device and number.
type FileNumber = (u64, u64);

/// The captures that are open.
static OPEN: Mutex<Vec<(FileNumber, Weak<Capture>)>> = Mutex::new(Vec::new());

impl Capture {
    /// The capture of a file, which it shares with whoever captures into that already: a second writer would
    /// destroy what the first one writes, and options that are read again go on where they were.
    pub(crate) fn of(path: &PathBuf) -> Result<Arc<Self>> {
        let made = Self::open(path)?;
        let Some(number) = made.number() else {
            return Ok(Arc::new(made)); // devices keep nothing
        };
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, one)| one.strong_count() > 0);
        let there = open.iter().find(|(known, _)| *known == number).and_then(|(_, one)| one.upgrade());
        Ok(there.unwrap_or_else(|| {
            let made = Arc::new(made);
            open.push((number, Arc::downgrade(&made)));
            made
        }))
    }

    fn number(&self) -> Option<FileNumber> {
        match &*self.writer.lock().unwrap_or_else(PoisonError::into_inner) {
            Writer::Idle(file, _) => {
                let found = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
                Some((found.dev(), found.ino()))
            }
            Writer::Running => None,
        }
    }

    /// Opens the file, making it where there is none; what it holds stays until somebody connects.
    fn open(path: &PathBuf) -> Result<Self> {
        let failed = |what: &str| Error::config("capture_file", format!("{}: {what}", path.display()));
        // Who reads a FIFO may pause for ever, and the end of a capture waits for what it writes to.
        let is_queue = |kind: std::fs::FileType| kind.is_fifo() || kind.is_socket();
        if std::fs::metadata(path).is_ok_and(|found| is_queue(found.file_type())) {
            return Err(failed("this is no file"));
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| failed(&error.to_string()))?;
        let waiting = Waiting { bytes: Vec::new(), flows: 0, lost: 0, ended: false, done: false };
        let shared = Arc::new(Shared { waiting: Mutex::new(waiting), more: Condvar::new() });
        Ok(Self { shared, writer: Mutex::new(Writer::Idle(file, path.clone())) })
    }

    /// A connection begins.
    pub(crate) fn flow(
        &self,
        is_client: bool,
        local: Option<SocketAddr>,
        peer: Option<SocketAddr>,
    ) -> Result<Flow> {
        self.start()?;
        let number = {
            let mut waiting = self.shared.lock();
            waiting.flows = waiting.flows.wrapping_add(1);
            waiting.flows
        };
        let known = local.zip(peer).map(|(local, peer)| (plain(local), plain(peer)));
        let (local, peer) =
            known.filter(|(local, peer)| local.is_ipv4() == peer.is_ipv4()).unwrap_or_else(|| {
                let client =
                    SocketAddr::new(NOWHERE, FIRST_CLIENT_PORT + number % (u16::MAX - FIRST_CLIENT_PORT));
                let server = SocketAddr::new(NOWHERE, SERVER_PORT);
                if is_client { (client, server) } else { (server, client) }
            });
        let mut flow = Flow {
            shared: Arc::clone(&self.shared),
            ends: [local, peer],
            sent: 0,
            received: 0,
            held: Vec::new(),
            holds: true,
        };
        // An analyser takes who begins for the client.
        let ours = [Direction::Outbound, Direction::Inbound];
        let [first, second] = if is_client { ours } else { [ours[1], ours[0]] };
        flow.packet(first, SYN, &[]);
        flow.count(first, 1);
        flow.packet(second, SYN | ACK, &[]);
        flow.count(second, 1);
        flow.packet(first, ACK, &[]);
        Ok(flow)
    }

    /// A line of the key log.
    pub(crate) fn secret(&self, line: &str) {
        let text = zeroize::Zeroizing::new(format!("{line}\n"));
        let mut waiting = self.shared.lock();
        // Twice as far as packets: without secrets those cannot be read.
        if waiting.bytes.len() < 2 * MOST_WAITING && !waiting.ended {
            pcapng::tls_key_log(&mut waiting.bytes, &text);
            self.shared.more.notify_all();
        }
    }

    /// Empties the file and starts its thread, once.
    fn start(&self) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, path) = match std::mem::replace(&mut *writer, Writer::Running) {
            Writer::Idle(file, path) => (file, path),
            Writer::Running => return Ok(()),
        };
        let begun = self.begin(file, &path);
        // Nobody will write, so nobody waits for that.
        self.shared.lock().done = begun.is_err();
        begun
    }

    fn begin(&self, file: File, path: &Path) -> Result<()> {
        // Devices have no length.
        if file.metadata().is_ok_and(|found| found.is_file()) {
            // What was there may have been for everybody. Another owner's is as it is.
            let _ = file.set_permissions(Permissions::from_mode(0o600));
            file.set_len(0).map_err(|source| {
                Error::io(ErrorKind::Device, format_args!("empty {}", path.display()), &source)
                    .with_field("capture_file")
            })?;
        }
        let mut head = Vec::new();
        pcapng::section_header(&mut head, concat!("sapper ", env!("CARGO_PKG_VERSION")));
        pcapng::interface(&mut head, LinkType::Raw, 0, "tls");
        {
            let mut waiting = self.shared.lock();
            head.append(&mut waiting.bytes);
            waiting.bytes = head;
        }
        let shared = Arc::clone(&self.shared);
        let name = path.to_owned();
        runtime::spawn_thread("sapper-capture", move || write(file, &name, &shared)).map_err(|source| {
            Error::io(ErrorKind::ResourceLimit, "start the capture's thread", &source)
                .with_field("capture_file")
        })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let mut waiting = self.shared.lock();
        waiting.ended = true;
        self.shared.more.notify_all();
        if matches!(self.writer.get_mut().unwrap_or_else(PoisonError::into_inner), Writer::Running) {
            // The disk may take its time: the writer takes a block at a time and never stops.
            while !waiting.done {
                waiting = self.shared.more.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Writes what waits, until the capture ends.
fn write(mut file: File, path: &Path, shared: &Shared) {
    let mut block = Vec::new();
    let mut failed = false;
    loop {
        let mut waiting = shared.lock();
        while waiting.bytes.is_empty() && !waiting.ended {
            waiting = shared.more.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if waiting.bytes.is_empty() {
            if waiting.lost > 0 {
                let packets = waiting.lost;
                tracing::warn!(path = %path.display(), packets, "the disk was too slow for all of a capture");
            }
            waiting.done = true;
            shared.more.notify_all();
            return;
        }
        block.clear();
        std::mem::swap(&mut block, &mut waiting.bytes);
        drop(waiting);
        if !failed && let Err(error) = file.write_all(&block) {
            let path = path.display();
            tracing::warn!(%path, %error, "a capture's file cannot be written; the capture is off");
            failed = true;
        }
    }
}

/// One connection in a capture.
pub(crate) struct Flow {
    shared: Arc<Shared>,
    /// Ours and the peer's.
    ends: [SocketAddr; 2],
    /// Sequence numbers.
    sent: u32,
    received: u32,
    /// What came during the handshake and waits for the secrets that it leads to: a reader wants them first.
    held: Vec<u8>,
    holds: bool,
}

impl Flow {
    /// Ciphertext that came.
    pub(crate) fn received(&mut self, bytes: &[u8]) {
        if self.holds {
            self.held.extend_from_slice(bytes);
        } else {
            self.data(Direction::Inbound, bytes);
        }
    }

    /// Ciphertext that left.
    pub(crate) fn sent(&mut self, bytes: &[u8]) {
        self.data(Direction::Outbound, bytes);
    }

    /// The engine has seen what came, and told its secrets.
    pub(crate) fn explained(&mut self, done: bool) {
        let held = std::mem::take(&mut self.held);
        self.data(Direction::Inbound, &held);
        self.holds = !done;
    }

    fn data(&mut self, direction: Direction, bytes: &[u8]) {
        for part in bytes.chunks(MOST_IN_A_PACKET) {
            self.packet(direction, PUSH | ACK, part);
            self.count(direction, part.len());
        }
    }

    fn count(&mut self, direction: Direction, bytes: usize) {
        let number = match direction {
            Direction::Outbound => &mut self.sent,
            Direction::Inbound => &mut self.received,
        };
        *number = number.wrapping_add(bytes as u32);
    }

    fn packet(&self, direction: Direction, flags: u8, payload: &[u8]) {
        let [local, peer] = self.ends;
        let (from, to, sequence, acknowledged) = match direction {
            Direction::Outbound => (local, peer, self.sent, self.received),
            Direction::Inbound => (peer, local, self.received, self.sent),
        };
        let mut waiting = self.shared.lock();
        if waiting.bytes.len() + payload.len() > MOST_WAITING {
            waiting.lost += 1;
            return;
        }
        let acknowledged = if flags & ACK == 0 { 0 } else { acknowledged };
        let data = segment(from, to, sequence, acknowledged, flags, payload);
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
        let original_len = data.len();
        let record = Record { interface: 0, timestamp, direction, data: &data, original_len, comment: None };
        pcapng::packet(&mut waiting.bytes, &record);
        self.shared.more.notify_all();
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.explained(true);
        self.packet(Direction::Outbound, FIN | ACK, &[]);
    }
}

/// IPv4 addresses as such, also where a socket of both versions has them.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A TCP segment in an IP packet, with its checksums.
fn segment(
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let len = TCP_HEADER + payload.len();
    let mut packet = Vec::with_capacity(40 + len);
    match (from.ip(), to.ip()) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&(len as u16).to_be_bytes());
            packet.extend_from_slice(&[TCP, 64]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
        }
        (from, to) => {
            let octets = |address| match address {
                IpAddr::V4(address) => Ipv4Addr::octets(&address),
                IpAddr::V6(_) => Ipv4Addr::LOCALHOST.octets(),
            };
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&((20 + len) as u16).to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0x40, 0, 64, TCP, 0, 0]);
            packet.extend_from_slice(&octets(from));
            packet.extend_from_slice(&octets(to));
            let sum = checksum::ipv4_header(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
    }
    let start = packet.len();
    let pseudo = checksum::pseudo_header(&packet, TCP, len).unwrap_or(0);
    packet.extend_from_slice(&from.port().to_be_bytes());
    packet.extend_from_slice(&to.port().to_be_bytes());
    packet.extend_from_slice(&sequence.to_be_bytes());
    packet.extend_from_slice(&acknowledged.to_be_bytes());
    packet.extend_from_slice(&[0x50, flags, 0xff, 0xff]);
    // The field begins as the pseudo-header's sum; completing it adds the rest.
    packet.extend_from_slice(&pseudo.to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(payload);
    checksum::complete(&mut packet, start, CHECKSUM_IN_TCP);
    packet
}

#[cfg(test)]
mod tests {
    use sapper_proto::packet::checksum::{Verdict, verify};

    use super::*;

    #[test]
    fn segments_are_whole_packets_of_both_ip_versions() {
        for (from, to) in [("192.0.2.1:5", "192.0.2.2:443"), ("[2001:db8::1]:5", "[2001:db8::2]:443")] {
            for len in [0, 1, MOST_IN_A_PACKET] {
                let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
                let packet = segment(from, to, 7, 9, ACK, &vec![3; len]);
                assert_eq!(verify(&packet), Verdict::Right, "{len}");
            }
        }
    }

    #[test]
    fn a_file_has_one_capture_whoever_names_it_and_a_new_one_when_that_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("capture"), folder.path().join("link"));
        let first = Capture::of(&path).unwrap();
        drop(first.flow(true, None, None).unwrap());
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let second = Capture::of(&link).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert!(!Arc::ptr_eq(&first, &Capture::of(&folder.path().join("other")).unwrap()));
        drop(first);
        drop(second.flow(true, None, None).unwrap());
        drop(second);
        let ends = |bytes: &[u8]| bytes.windows(4).filter(|word| *word == [0x0a, 0x0d, 0x0d, 0x0a]).count();
        let both = std::fs::read(&path).unwrap();
        assert_eq!(ends(&both), 1, "one section, begun once");
        drop(Capture::of(&path).unwrap().flow(true, None, None).unwrap());
        let anew = std::fs::read(&path).unwrap();
        assert!(anew.len() < both.len(), "what was there is replaced");
    }

    #[test]
    fn a_file_stays_until_somebody_connects_and_is_whole_when_the_capture_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("capture");
        std::fs::write(&path, b"from before").unwrap();
        let capture = Capture::open(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"from before");
        let mut flow = capture.flow(true, None, None).unwrap();
        flow.received(b"held until the secret");
        capture.secret("CLIENT_RANDOM 00 11");
        flow.explained(true);
        flow.received(b"then at once");
        drop(flow);
        drop(capture);
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written[..4], [0x0a, 0x0d, 0x0d, 0x0a]);
        let place = |what: &[u8]| written.windows(what.len()).position(|part| part == what).unwrap();
        assert!(place(b"CLIENT_RANDOM 00 11") < place(b"held until the secret"));
        assert!(place(b"held until the secret") < place(b"then at once"));
    }

    #[test]
    fn what_does_not_fit_is_counted_but_secrets_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let capture = Capture::open(&folder.path().join("capture")).unwrap();
        let mut flow = capture.flow(false, None, None).unwrap();
        // No thread empties this one.
        let waiting = Waiting { bytes: vec![0; MOST_WAITING], flows: 0, lost: 0, ended: false, done: false };
        let shared = Arc::new(Shared { waiting: Mutex::new(waiting), more: Condvar::new() });
        flow.shared = Arc::clone(&shared);
        flow.sent(b"no room");
        assert_eq!((shared.lock().lost, flow.sent), (1, 1 + 7));
        let idle = File::open("/dev/null").unwrap();
        let writer = Mutex::new(Writer::Idle(idle, PathBuf::new()));
        let full = Capture { shared: Arc::clone(&shared), writer };
        full.secret("CLIENT_RANDOM 00 11");
        assert!(shared.lock().bytes.len() > MOST_WAITING);
        shared.lock().bytes.resize(2 * MOST_WAITING, 0);
        full.secret("CLIENT_RANDOM 00 11");
        assert_eq!(shared.lock().bytes.len(), 2 * MOST_WAITING);
    }
}

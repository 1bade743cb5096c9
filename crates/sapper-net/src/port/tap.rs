//! A tap: copies of the packets that pass a pump, written as pcapng by a thread of its own.
//!
//! The pump never waits for the disk: packets go into blocks, blocks into a queue of fixed length,
//! and what does not fit is counted as lost. Format: `docs/bridge.md`; reader: Wireshark, tcpdump.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use sapper_proto::filter::Filter;
use sapper_proto::pcapng::{self, LinkType, Record};

use super::{PacketBatch, PacketKind};
use crate::error::{Direction, Error, ErrorKind, Result};

/// Blocks that wait for the disk: 4 MiB, about half a second of a busy tunnel.
const QUEUE: usize = 16;

/// A block is handed over when it is this full.
const BLOCK_BYTES: usize = 256 * 1024;

/// No packet of IP is smaller: it is an IPv4 header.
const SMALLEST: Record<'static> = Record {
    interface: 0,
    timestamp: 0,
    direction: pcapng::Direction::Inbound,
    data: &[0; 20],
    original_len: 20,
    comment: None,
};

/// Where packets are copied to.
#[derive(Clone, Debug)]
pub struct TapOptions {
    /// The file; an existing one is replaced.
    pub path: PathBuf,
    /// Which packets, in the language of `docs/bridge.md`; `None` is all of them.
    pub filter: Option<String>,
    /// The file ends before it grows beyond this.
    pub max_bytes: Option<u64>,
    /// At most this much of each packet.
    pub snap_len: u32,
}

impl TapOptions {
    /// Parses the filter and opens the file, making it where there is none; what an older one holds
    /// stays until the tap starts. A mistake is an error of the field `tap`, or of `tap.filter`.
    pub fn open(&self) -> Result<TapFile> {
        let parse = |text: &String| {
            Filter::parse(text).map_err(|error| Error::config("tap.filter", error.to_string()))
        };
        let filter = self.filter.as_ref().map(parse).transpose()?;
        if let Some(most) = self.max_bytes {
            let mut least = beginning(LinkType::Raw, self.snap_len);
            pcapng::packet(&mut least, &SMALLEST);
            if most < least.len() as u64 {
                let text = format!("at least {}: what a file begins with, and one packet", least.len());
                return Err(Error::config("tap.max_bytes", text).with_reason("out_of_range"));
            }
        }
        // Who reads a FIFO may pause for ever, and the end of a tap waits for what it writes to.
        let is_queue = |kind: std::fs::FileType| kind.is_fifo() || kind.is_socket();
        if std::fs::metadata(&self.path).is_ok_and(|found| is_queue(found.file_type())) {
            let message = format!("{} is no file: a tap writes to one", self.path.display());
            return Err(Error::config("tap", message).with_reason("not_a_file"));
        }
        let opened = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            // For whatever takes the path's place meanwhile; to a file it means nothing.
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.path);
        let file = opened.map_err(|source| self.failed("create", &source))?;
        Ok(TapFile { file, filter, options: self.clone() })
    }

    fn failed(&self, what: &str, source: &std::io::Error) -> Error {
        Error::io(ErrorKind::Device, format_args!("{what} {}", self.path.display()), source).with_field("tap")
    }
}

/// What became of a tap's packets. It outlives the tap; its text is for people.
#[derive(Debug, Default)]
pub struct TapStats {
    written: AtomicU64,
    lost: AtomicU64,
    full: AtomicBool,
    failure: OnceLock<Failure>,
}

/// Why a tap is off.
#[derive(Debug)]
struct Failure {
    text: String,
    errno: Option<i32>,
    /// Whether whoever ended the tap has heard of it.
    told: AtomicBool,
}

impl TapStats {
    /// Why the file could not be written any more.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(|failure| failure.text.as_str())
    }

    /// The same as an error, once.
    pub fn tell_failure(&self) -> Result<()> {
        match self.failure.get() {
            Some(failure) if !failure.told.swap(true, Relaxed) => {
                let text = format!("the tap's file could not be written: {}", failure.text);
                let error = Error::new(ErrorKind::Device, text).with_field("tap");
                Err(match failure.errno {
                    Some(errno) => error.with_errno(errno),
                    None => error,
                })
            }
            _ => Ok(()),
        }
    }

    fn lose(&self, packets: u64) {
        self.lost.fetch_add(packets, Relaxed);
    }
}

impl fmt::Display for TapStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (written, lost) = (self.written.load(Relaxed), self.lost.load(Relaxed));
        match self.failure() {
            Some(why) => write!(f, "off: {why}; {written} packets written, {lost} lost"),
            None if self.full.load(Relaxed) => write!(f, "full: {written} packets written, {lost} lost"),
            None => write!(f, "{written} packets written, {lost} lost"),
        }
    }
}

/// A tap's file, open; nothing is written yet.
#[derive(Debug)]
pub struct TapFile {
    file: File,
    filter: Option<Filter>,
    options: TapOptions,
}

/// A running tap, shared by the two directions. The file is complete when the last clone is gone.
#[derive(Clone)]
pub struct Tap(Arc<Shared>);

struct Shared {
    filter: Option<Filter>,
    link: LinkType,
    snap_len: u32,
    max_bytes: u64,
    block: Mutex<Block>,
    stats: Arc<TapStats>,
}

/// Bytes on their way to the disk, and how many packets they are.
type Full = (Vec<u8>, u64);

struct Block {
    bytes: Vec<u8>,
    /// Bytes of the file so far, those that wait included.
    written: u64,
    /// Packets in `bytes`.
    packets: u64,
    full: bool,
    queue: Option<SyncSender<Full>>,
    /// Blocks that come back from the writer.
    empty: Receiver<Vec<u8>>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Tap {
    /// Replaces what the file holds and starts its thread; `kind` is what the packets are.
    pub fn start(file: TapFile, kind: PacketKind) -> Result<Self> {
        let link = match kind {
            PacketKind::Ethernet => LinkType::Ethernet,
            PacketKind::Ip | PacketKind::Opaque => LinkType::Raw,
        };
        let TapFile { file, filter, options } = file;
        // Devices have no length.
        if file.metadata().is_ok_and(|found| found.is_file()) {
            file.set_len(0).map_err(|source| options.failed("empty", &source))?;
        }
        let bytes = beginning(link, options.snap_len);
        let (queue, inbox) = sync_channel::<Full>(QUEUE);
        let (give_back, empty) = sync_channel(QUEUE + 1);
        let stats = Arc::new(TapStats::default());
        let (told, path) = (Arc::clone(&stats), options.path.clone());
        let writer = std::thread::Builder::new()
            .name("sapper-tap".into())
            .spawn(move || write_blocks(file, &path, &inbox, &give_back, &told))
            .map_err(|source| Error::io(ErrorKind::ResourceLimit, "start the tap's thread", &source))?;
        Ok(Self(Arc::new(Shared {
            filter,
            link,
            snap_len: options.snap_len,
            max_bytes: options.max_bytes.unwrap_or(u64::MAX),
            block: Mutex::new(Block {
                written: bytes.len() as u64,
                bytes,
                packets: 0,
                full: false,
                queue: Some(queue),
                empty,
                writer: Some(writer),
            }),
            stats,
        })))
    }

    /// Copies the packets of `batch` that the filter wants. Both directions run in one task, so the
    /// lock is never contended.
    pub fn record(&self, direction: Direction, batch: &PacketBatch) {
        let shared = &*self.0;
        let mut block = shared.block.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if block.full {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
        let direction = match direction {
            Direction::Encapsulate => pcapng::Direction::Outbound,
            Direction::Decapsulate => pcapng::Direction::Inbound,
        };
        for packet in batch.iter() {
            if shared.filter.as_ref().is_some_and(|filter| !filter.matches(shared.link, packet.data)) {
                continue;
            }
            let kept = packet.data.len().min(shared.snap_len as usize);
            let record = Record {
                interface: 0,
                timestamp: now,
                direction,
                data: &packet.data[..kept],
                original_len: packet.data.len(),
                comment: None,
            };
            let grown = record.block_len() as u64;
            if block.written + grown > shared.max_bytes {
                block.full = true;
                shared.stats.full.store(true, Relaxed);
                break;
            }
            pcapng::packet(&mut block.bytes, &record);
            block.written += grown;
            block.packets += 1;
            if block.bytes.len() >= BLOCK_BYTES {
                block.hand_over(shared);
            }
        }
    }

    /// Writes what waits, so that a reader of the file sees it soon. Called when a pump goes idle.
    pub fn flush(&self) {
        let mut block = self.0.block.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        block.hand_over(&self.0);
    }

    /// What became of its packets so far, and later.
    pub fn stats(&self) -> &Arc<TapStats> {
        &self.0.stats
    }
}

/// What the file begins with, with room for a block behind it.
fn beginning(link: LinkType, snap_len: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK_BYTES + 66_000);
    pcapng::section_header(&mut bytes, concat!("sapper ", env!("CARGO_PKG_VERSION")));
    pcapng::interface(&mut bytes, link, snap_len, "bridge");
    bytes
}

impl Block {
    fn hand_over(&mut self, shared: &Shared) {
        if self.bytes.is_empty() {
            return;
        }
        let fresh = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(BLOCK_BYTES + 66_000));
        let full = std::mem::replace(&mut self.bytes, fresh);
        let packets = std::mem::take(&mut self.packets);
        let Some(queue) = &self.queue else { return };
        match queue.try_send((full, packets)) {
            Ok(()) => {}
            Err(
                TrySendError::Full((mut back, packets)) | TrySendError::Disconnected((mut back, packets)),
            ) => {
                // The block is lost whole: a cut one would not be a valid file.
                shared.stats.lose(packets);
                self.written -= back.len() as u64;
                back.clear();
                self.bytes = back;
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let block = self.block.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !block.bytes.is_empty()
            && let Some(queue) = &block.queue
        {
            // The end may wait for the disk: the writer takes a block at a time and never stops.
            let _ = queue.send((std::mem::take(&mut block.bytes), block.packets));
        }
        block.queue = None;
        if let Some(writer) = block.writer.take() {
            let _ = writer.join();
        }
    }
}

fn write_blocks(
    mut file: File,
    path: &Path,
    inbox: &Receiver<Full>,
    give_back: &SyncSender<Vec<u8>>,
    stats: &TapStats,
) {
    for (mut block, packets) in inbox {
        if stats.failure().is_none()
            && let Err(error) = file.write_all(&block)
        {
            let path = path.display();
            tracing::warn!(%path, %error, "the tap's file cannot be written; the tap is off");
            let (text, errno) = (error.to_string(), error.raw_os_error());
            let _ = stats.failure.set(Failure { text, errno, told: AtomicBool::new(false) });
        }
        match stats.failure() {
            None => drop(stats.written.fetch_add(packets, Relaxed)),
            Some(_) => stats.lose(packets),
        }
        block.clear();
        let _ = give_back.try_send(block);
    }
}

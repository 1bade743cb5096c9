//! A tap: copies of the packets that pass a pump, written as pcapng by a thread of its own.
//!
//! The pump never waits for the disk: packets go into blocks, blocks into a queue of fixed length,
//! and what does not fit is counted as lost. Nor does its end: the thread writes what is left, and
//! tells when it has ([`TapStats::over`]). Format: `docs/bridge.md`; reader: Wireshark, tcpdump.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use sapper_proto::filter::Filter;
use sapper_proto::pcapng::{self, LinkType, Record};
use tokio::sync::watch;

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
    over: watch::Sender<bool>,
    /// The thread, for the tap that comes next.
    writer: Mutex<Option<JoinHandle<()>>>,
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
    /// Returns when nothing more is written. Until the tap itself is gone, something may be.
    pub async fn over(&self) {
        // The sender is `self`'s: it cannot go first.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

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

/// A running tap, shared by the two directions. What is left is written when the last clone is gone.
#[derive(Clone)]
pub struct Tap(Arc<Shared>);

struct Shared {
    filter: Option<Filter>,
    link: LinkType,
    snap_len: u32,
    max_bytes: u64,
    block: Mutex<Block>,
    /// What comes behind all that is in the queue, which may be full.
    last: Arc<Mutex<Option<Full>>>,
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
}

impl Tap {
    /// Starts its thread, which replaces what the file holds; `kind` is what the packets are. The tap that was
    /// there before ends first: it may be the same file's.
    pub fn start(file: TapFile, kind: PacketKind, before: Option<&TapStats>) -> Result<Self> {
        let link = match kind {
            PacketKind::Ethernet => LinkType::Ethernet,
            PacketKind::Ip | PacketKind::Opaque => LinkType::Raw,
        };
        let TapFile { file, filter, options } = file;
        let bytes = beginning(link, options.snap_len);
        let (queue, inbox) = sync_channel::<Full>(QUEUE);
        let (give_back, empty) = sync_channel(QUEUE + 1);
        let (stats, last) = (Arc::new(TapStats::default()), Arc::default());
        let writer = Writer {
            file,
            path: options.path,
            inbox,
            last: Arc::clone(&last),
            give_back,
            stats: Arc::clone(&stats),
            before: before.and_then(|before| lock(&before.writer).take()),
        };
        let started = std::thread::Builder::new()
            .name("sapper-tap".into())
            .spawn(move || writer.run())
            .map_err(|source| Error::io(ErrorKind::ResourceLimit, "start the tap's thread", &source))?;
        *lock(&stats.writer) = Some(started);
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
            }),
            last,
            stats,
        })))
    }

    /// Copies the packets of `batch` that the filter wants. Both directions run in one task, so the
    /// lock is never contended.
    pub fn record(&self, direction: Direction, batch: &PacketBatch) {
        let shared = &*self.0;
        let mut block = lock(&shared.block);
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
        let mut block = lock(&self.0.block);
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
        let block = self.block.get_mut().unwrap_or_else(PoisonError::into_inner);
        *lock(&self.last) = Some((std::mem::take(&mut block.bytes), block.packets));
        // The end of the queue, with which the writer's begins.
        block.queue = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the thread has.
struct Writer {
    file: File,
    path: PathBuf,
    inbox: Receiver<Full>,
    last: Arc<Mutex<Option<Full>>>,
    give_back: SyncSender<Vec<u8>>,
    stats: Arc<TapStats>,
    before: Option<JoinHandle<()>>,
}

impl Writer {
    fn run(mut self) {
        if let Some(before) = self.before.take() {
            let _ = before.join();
        }
        // Devices have no length.
        if self.file.metadata().is_ok_and(|found| found.is_file())
            && let Err(error) = self.file.set_len(0)
        {
            self.fail(&error);
        }
        while let Ok((mut block, packets)) = self.inbox.recv() {
            self.write(&block, packets);
            block.clear();
            let _ = self.give_back.try_send(block);
        }
        let last = lock(&self.last).take();
        if let Some((block, packets)) = last {
            self.write(&block, packets);
        }
        self.stats.over.send_replace(true);
    }

    fn write(&mut self, block: &[u8], packets: u64) {
        if self.stats.failure().is_none()
            && let Err(error) = self.file.write_all(block)
        {
            self.fail(&error);
        }
        match self.stats.failure() {
            None => drop(self.stats.written.fetch_add(packets, Relaxed)),
            Some(_) => self.stats.lose(packets),
        }
    }

    fn fail(&self, error: &std::io::Error) {
        let path = self.path.display();
        tracing::warn!(%path, %error, "the tap's file cannot be written; the tap is off");
        let (text, errno) = (error.to_string(), error.raw_os_error());
        let _ = self.stats.failure.set(Failure { text, errno, told: AtomicBool::new(false) });
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::time::Duration;

    use sapper_proto::packet::PacketMeta;

    use super::*;

    /// A tap into `file`, with one packet in it.
    fn tapped(file: File, before: Option<&TapStats>) -> Tap {
        let path = PathBuf::from("tap");
        let options = TapOptions { path, filter: None, max_bytes: None, snap_len: 65_535 };
        let file = TapFile { file, filter: None, options };
        let tap = Tap::start(file, PacketKind::Ip, before).unwrap();
        record(&tap);
        tap
    }

    fn record(tap: &Tap) {
        let mut batch = PacketBatch::new(2_000, 1);
        assert!(batch.push(&[0x45; 1_000], PacketMeta::default()));
        tap.record(Direction::Encapsulate, &batch);
    }

    async fn is_over(stats: &TapStats) -> bool {
        tokio::time::timeout(Duration::from_millis(20), stats.over()).await.is_ok()
    }

    #[tokio::test]
    async fn nobody_waits_for_a_disk_that_stalls() {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        // As much as it takes: whoever writes more waits.
        // SAFETY: both descriptors are open, and the call sets what the kernel keeps for the pipe.
        let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETPIPE_SZ) };
        let filling = vec![7; size as usize];
        writer.write_all(&filling).unwrap();
        let tap = tapped(File::from(OwnedFd::from(writer)), None);
        let stats = Arc::clone(tap.stats());
        drop(tap); // on the thread that has all others to serve
        assert!(!is_over(&stats).await);

        let mut read = vec![0; filling.len()];
        reader.read_exact(&mut read).unwrap();
        stats.over().await;
        let mut written = Vec::new();
        reader.read_to_end(&mut written).unwrap();
        assert!(written.len() > 1_000);
        assert_eq!(stats.to_string(), "1 packets written, 0 lost");
    }

    #[tokio::test]
    async fn a_tap_that_takes_another_s_file_begins_behind_its_end() {
        let file = tempfile::tempfile().unwrap();
        let first = tapped(file.try_clone().unwrap(), None);
        first.flush();
        let before = Arc::clone(first.stats());
        while before.written.load(Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        let again = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let second = tapped(again, Some(&before));
        second.flush();
        assert!(!is_over(second.stats()).await);
        assert_ne!(file.metadata().unwrap().len(), 0);
        record(&first);
        drop(first);
        let stats = Arc::clone(second.stats());
        drop(second);
        stats.over().await;
        assert_eq!(before.to_string(), "2 packets written, 0 lost");
        let mut whole = beginning(LinkType::Raw, 65_535);
        pcapng::packet(&mut whole, &Record { data: &[0x45; 1_000], original_len: 1_000, ..SMALLEST });
        assert_eq!(
            file.metadata().unwrap().len(),
            whole.len() as u64,
            "one packet, and nothing of the first"
        );
    }
}

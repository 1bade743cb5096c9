//! Files and devices that epoll refuses. (Pairs of them do not exist, so the suite's rules that apply
//! to one end are here.)

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::stream::fd::{SocketOptions, open_fd};
use crate::stream::ops::{flush, read, read_full, readable, send_eof, write_all};

fn open_file(file: File) -> BoxStream {
    open_fd(file.into(), "sink", &SocketOptions::default()).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

async fn read_all(stream: &mut dyn Stream) -> Vec<u8> {
    let mut buf = vec![0; 10_000];
    let mut all = Vec::new();
    loop {
        readable(stream).await.unwrap();
        match read(stream, &mut buf).await.unwrap() {
            0 => return all,
            n => all.extend_from_slice(&buf[..n]),
        }
    }
}

#[tokio::test]
async fn a_file_is_read_to_its_end_in_order() {
    let mut file = tempfile::tempfile().unwrap();
    let content = pattern(3 * BLOCK + 17);
    file.write_all(&content).unwrap();
    file.rewind().unwrap();
    let mut stream = open_file(file);
    assert!(read_all(stream.as_mut()).await == content);
    assert_eq!(read(stream.as_mut(), &mut [0; 4]).await.unwrap(), 0, "the end stays the end");
    let stats = stream.stats();
    assert_eq!(stats.bytes_received.get(), content.len() as u64);
    assert!(stats.receive_calls.get() >= (content.len() / CHUNK) as u64);
    assert!(stream.describe().starts_with("file /"), "{}", stream.describe());
}

#[tokio::test]
async fn what_was_flushed_is_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out");
    let mut stream = open_file(File::create(&path).unwrap());
    let content = pattern(2 * BLOCK + 5);
    write_all(stream.as_mut(), &content[..BLOCK]).await.unwrap();
    flush(stream.as_mut()).await.unwrap();
    assert!(std::fs::read(&path).unwrap() == content[..BLOCK]);
    write_all(stream.as_mut(), &content[BLOCK..]).await.unwrap();
    // The end flushes first; then the file is closed.
    send_eof(stream.as_mut()).await.unwrap();
    send_eof(stream.as_mut()).await.unwrap();
    assert!(std::fs::read(&path).unwrap() == content);
    assert_eq!(stream.stats().bytes_sent.get(), content.len() as u64);
    let error = write_all(stream.as_mut(), b"late").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert_eq!(read(stream.as_mut(), &mut [0; 4]).await.unwrap(), 0, "opened for writing, it yields nothing");
}

#[tokio::test]
async fn a_file_for_reading_refuses_writes_and_a_dropped_writer_still_writes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out");
    let mut live = live_threads();
    let mut writer = open_file(File::create(&path).unwrap());
    write_all(writer.as_mut(), b"queued").await.unwrap();
    drop(writer);
    let read_only = File::open(&path).unwrap();
    let mut reader = open_file(read_only);
    let error = write_all(reader.as_mut(), b"x").await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Device, Some("read_only")));
    send_eof(reader.as_mut()).await.unwrap();
    drop(reader);
    // Others may run beside us; with theirs, ours end.
    timeout(Duration::from_secs(60), live.wait_for(|&live| live == 0)).await.expect("threads end").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"queued");
}

#[tokio::test]
async fn devices_without_end_and_without_room() {
    let mut zero = open_file(File::open("/dev/zero").unwrap());
    let mut buf = vec![1; 3 * BLOCK];
    assert_eq!(read_full(zero.as_mut(), &mut buf).await.unwrap(), buf.len());
    assert!(buf.iter().all(|&byte| byte == 0));

    let mut null = open_file(File::options().read(true).write(true).open("/dev/null").unwrap());
    assert_eq!(read(null.as_mut(), &mut [0; 4]).await.unwrap(), 0);
    write_all(null.as_mut(), &buf).await.unwrap();
    flush(null.as_mut()).await.unwrap();

    let mut full = open_file(File::options().write(true).open("/dev/full").unwrap());
    write_all(full.as_mut(), b"x").await.unwrap();
    let error = flush(full.as_mut()).await.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Device, Some(libc::ENOSPC)));
    assert!(error.message().contains("/dev/full"), "{error}");
    assert!(write_all(full.as_mut(), b"x").await.is_err());
}

#[tokio::test]
async fn a_file_that_nobody_reads_is_not_read_ahead_without_bound() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern(4 * BLOCK)).unwrap();
    file.rewind().unwrap();
    let mut shared = file.try_clone().unwrap();
    let mut stream = open_file(file);
    readable(stream.as_mut()).await.unwrap();
    drop(stream);
    live_threads().wait_for(|&live| live == 0).await.unwrap();
    // The queue and what the thread held.
    assert!(shared.stream_position().unwrap() <= (BLOCK + CHUNK) as u64);
}

#[tokio::test]
async fn a_thread_that_waits_for_a_silent_device_ends_with_its_stream() {
    // A pipe is not refused by epoll, but it is silent, and reading it would block.
    let (silent, _writer) = io::pipe().unwrap();
    let stream = open(silent.into(), "silent", Access::READ, Arc::default()).unwrap();
    drop(stream);
    live_threads().wait_for(|&live| live == 0).await.unwrap();

    // A full one takes nothing.
    let (mut read_end, full) = io::pipe().unwrap();
    // SAFETY: F_GETPIPE_SZ touches no memory.
    let capacity = unsafe { libc::fcntl(full.as_raw_fd(), libc::F_GETPIPE_SZ) } as usize;
    let mut full = File::from(OwnedFd::from(full));
    full.write_all(&vec![0; capacity]).unwrap();
    let mut stream = open(full.into(), "full", Access::WRITE, Arc::default()).unwrap();
    write_all(stream.as_mut(), b"never").await.unwrap();
    drop(stream);
    live_threads().wait_for(|&live| live == 0).await.unwrap();
    let mut left = Vec::new();
    read_end.read_to_end(&mut left).unwrap();
    assert_eq!(left.len(), capacity);
}

#[tokio::test]
async fn pushing_back_a_reset_or_a_stop_ends_the_threads() {
    let mut stream = open_file(File::options().read(true).write(true).open("/dev/null").unwrap());
    stream.stop(1);
    stream.reset(2);
    assert!(write_all(stream.as_mut(), b"x").await.is_err());
    assert_eq!(read(stream.as_mut(), &mut [0; 4]).await.unwrap(), 0);
    live_threads().wait_for(|&live| live == 0).await.unwrap();
}

#[test]
fn the_threads_take_no_signals() {
    let (mask, asked) = std::sync::mpsc::channel();
    runtime::spawn_thread("sapper-mask", move || {
        // SAFETY: all-zero bytes are a valid `sigset_t`, and the call fills it.
        let blocked = unsafe {
            let mut now: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut now);
            [libc::SIGPIPE, libc::SIGINT, libc::SIGTERM, libc::SIGSEGV]
                .map(|signal| libc::sigismember(&raw const now, signal))
        };
        let _ = mask.send(blocked);
    })
    .unwrap();
    assert_eq!(asked.recv().unwrap(), [1, 1, 1, 0]);
    // The maker's own mask is as before.
    // SAFETY: as in the thread.
    let own = unsafe {
        let mut now: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut now);
        libc::sigismember(&raw const now, libc::SIGTERM)
    };
    assert_eq!(own, 0);
}

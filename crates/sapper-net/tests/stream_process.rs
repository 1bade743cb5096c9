//! What streams and listeners leave behind, and what they do when the process has nothing left: these
//! count or limit the whole process's descriptors, so they run one after another in their own.

#[path = "common/becomes.rs"]
mod becomes;

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use becomes::assert_becomes;
use sapper_net::stream::BoxStream;
use sapper_net::stream::address::Address;
use sapper_net::stream::conformance::leaves_nothing;
use sapper_net::stream::connect::{ConnectOptions, connect_tcp};
use sapper_net::stream::fd::{SocketOptions, open_fd};
use sapper_net::stream::joined::open_pair;
use sapper_net::stream::listen::{ListenAddress, ListenOptions, Listener};
use sapper_net::stream::memory;
use tokio::time::Instant;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn run(test: impl Future<Output = ()>) {
    let _alone = alone();
    let event_loop = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // What is made once (the event loop's signal pipe, the resolver's own files) is made now.
    drop(event_loop());
    let _ = ("localhost", 1).to_socket_addrs();
    let before = descriptors();
    event_loop().block_on(test);
    // A look-up's thread that is about to end still holds the event loop it has just woken.
    assert_becomes(before, descriptors);
}

fn open(fd: impl Into<std::os::fd::OwnedFd>) -> BoxStream {
    open_fd(fd.into(), "sink", &SocketOptions::default()).unwrap()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn every_kind_of_stream_leaves_no_descriptor() {
    run(async {
        leaves_nothing(|| async {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (open(one), open(listener.accept().unwrap().0))
        })
        .await;
        leaves_nothing(|| async {
            let (one, other) = UnixStream::pair().unwrap();
            (open(one), open(other))
        })
        .await;
        leaves_nothing(|| async {
            let ((read_one, write_other), (read_other, write_one)) =
                (io::pipe().unwrap(), io::pipe().unwrap());
            let pair = |read: io::PipeReader, write: io::PipeWriter| {
                open_pair(read.into(), write.into(), ["read", "write"], &SocketOptions::default()).unwrap()
            };
            (pair(read_one, write_one), pair(read_other, write_other))
        })
        .await;
        leaves_nothing(|| async {
            let (one, other) = memory::pair(1000);
            (Box::new(one) as BoxStream, Box::new(other) as BoxStream)
        })
        .await;
    });
}

#[test]
fn threads_of_files_end_with_their_descriptors() {
    run(async {
        let mut live = sapper_net::stream::blocking::live_threads();
        let before = descriptors();
        for _ in 0..20 {
            drop(open(std::fs::File::options().read(true).write(true).open("/dev/null").unwrap()));
        }
        live.wait_for(|&live| live == 0).await.unwrap();
        assert_becomes(before, descriptors);
    });
}

#[test]
fn losers_of_a_connection_race_are_closed() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let deadline = Instant::now() + Duration::from_secs(30);
        let before = descriptors();
        for _ in 0..10 {
            drop(connect_tcp("localhost", port, &ConnectOptions::default(), deadline).await.unwrap());
            // Refused everywhere.
            assert!(connect_tcp("localhost", 1, &ConnectOptions::default(), deadline).await.is_err());
        }
        assert_becomes(before, descriptors);
    });
}

/// Lets the process open no further descriptor until it is dropped.
struct NoMoreDescriptors(libc::rlimit);

impl NoMoreDescriptors {
    fn now() -> Self {
        let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: getrlimit fills the structure it is given.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut before) }, 0);
        Self::set(libc::rlimit { rlim_cur: 0, ..before });
        Self(before)
    }

    fn set(limit: libc::rlimit) {
        // SAFETY: setrlimit reads the structure it is given.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    }
}

impl Drop for NoMoreDescriptors {
    fn drop(&mut self) {
        Self::set(self.0);
    }
}

#[test]
fn a_listener_waits_where_the_process_is_out_of_descriptors() {
    let _alone = alone();
    // Time stands still but for the pauses: a busy loop would never let it pass.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let address = ListenAddress::Tcp { host: Some("127.0.0.1".into()), port: 0 };
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut listener = Listener::bind(&address, &ListenOptions::default(), deadline).await.unwrap();
        let Address::Inet(at) = listener.local_addresses()[0].clone() else { panic!("no address") };
        let client = TcpStream::connect::<SocketAddr>(at).unwrap();
        let none_left = NoMoreDescriptors::now();
        let start = Instant::now();
        let accepting = tokio::time::timeout(Duration::from_secs(10), listener.accept()).await;
        assert!(accepting.is_err(), "there was no descriptor for it");
        assert_eq!(start.elapsed(), Duration::from_secs(10));
        let pauses = listener.stats().exhausted_pauses.get();
        // 10, 20, 40, … 640 ms, then one a second.
        assert!((10..=30).contains(&pauses), "{pauses} pauses");
        assert_eq!(listener.open_connections(), 0);
        drop(none_left);
        let accepted = listener.accept().await.unwrap();
        assert_eq!(accepted.peer, Address::Inet(client.local_addr().unwrap()));
    });
}

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use tokio::sync::Notify;
use tokio::task::yield_now;

use super::*;
use crate::port::PacketPort;
use crate::port::datagram::{DatagramOptions, DatagramPort};
use crate::stream::fd::{SocketOptions, open_fd};
use crate::stream::ops::{read_full, write_all};
use crate::stream::{BoxStream, Stream};

const DEADLINE: Duration = Duration::from_secs(30);

fn here() -> String {
    std::thread::current().name().unwrap_or_default().to_owned()
}

/// The other I/O threads, as seen from a task; none where there is one core.
fn other_thread() -> Option<usize> {
    let threads = &runtime().unwrap().threads;
    (0..threads.len()).find(|index| format!("sapper-io-{index}") != here())
}

/// Runs `work` on an I/O thread and gives what it gives.
fn on_io_thread<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let (answer, answered) = mpsc::channel();
    spawn("test", async move { answer.send(work.await).unwrap() }).unwrap();
    answered.recv_timeout(DEADLINE).unwrap()
}

#[test]
fn a_task_goes_on_where_it_moves_to() {
    let (before, after, other) = on_io_thread(async {
        let (before, other) = (here(), other_thread());
        if let Some(index) = other {
            move_to(index).await;
        }
        (before, here(), other)
    });
    match other {
        Some(index) => assert_eq!(after, format!("sapper-io-{index}")),
        None => assert_eq!(after, before, "there is one I/O thread alone"),
    }
}

#[tokio::test]
async fn a_task_of_another_runtime_stays() {
    let before = std::thread::current().id();
    move_to(0).await;
    assert_eq!(std::thread::current().id(), before);
}

#[test]
fn a_stream_and_a_port_go_on_on_another_thread() {
    fn stream(fd: impl Into<OwnedFd>) -> BoxStream {
        open_fd(fd.into(), "sink", &SocketOptions::default()).unwrap()
    }
    async fn both_ways(one: &mut dyn Stream, other: &mut dyn Stream) {
        let mut buf = [0; 5];
        write_all(one, b"hello").await.unwrap();
        assert_eq!(read_full(other, &mut buf).await.unwrap(), 5);
        write_all(other, b"again").await.unwrap();
        assert_eq!(read_full(one, &mut buf).await.unwrap(), 5);
        assert_eq!(&buf, b"again");
    }
    on_io_thread(async {
        let (one, other) = UnixStream::pair().unwrap();
        let (mut one, mut other) = (stream(one), stream(other));
        both_ways(one.as_mut(), other.as_mut()).await;
        let (socket, far) = UnixDatagram::pair().unwrap();
        let mut port = DatagramPort::new(socket.into(), DatagramOptions::default()).unwrap();
        if let Some(index) = other_thread() {
            move_to(index).await;
        }
        assert!(one.is_movable() && port.is_movable());
        one.moved().unwrap();
        other.moved().unwrap();
        both_ways(one.as_mut(), other.as_mut()).await;
        port.moved().unwrap();
        let waiting = std::future::poll_fn(|cx| port.poll_receivable(cx));
        let (received, ()) = tokio::join!(waiting, async { far.send(b"packet").map(drop).unwrap() });
        received.unwrap();
    });
}

#[test]
fn what_begins_together_begins_on_one_thread_and_a_crowd_spreads() {
    let threads = runtime().unwrap().threads.len();
    let (told, hear) = mpsc::channel();
    let end = Arc::new(Notify::new());
    for _ in 0..24 * threads {
        let (told, end) = (told.clone(), Arc::clone(&end));
        spawn("test", async move {
            let ended = end.notified();
            told.send(here()).unwrap();
            ended.await;
        })
        .unwrap();
    }
    let places: Vec<_> = (0..24 * threads).map(|_| hear.recv_timeout(DEADLINE).unwrap()).collect();
    end.notify_waiters();
    let used: HashSet<_> = places.iter().collect();
    assert_eq!(used.len(), threads, "{places:?}");
}

#[test]
fn busy_tasks_of_one_thread_part() {
    let Some(other) = on_io_thread(async { other_thread() }) else { return };
    let (told, hear) = mpsc::channel();
    let parted = Arc::new(AtomicBool::new(false));
    for _ in 0..2 {
        let (told, parted) = (told.clone(), Arc::clone(&parted));
        spawn("test", async move {
            // Both on one thread, whatever else runs now.
            move_to(other).await;
            settled();
            let (begun, mut share) = (Instant::now(), Share::new());
            let mut looked = Instant::now();
            while !parted.load(Relaxed) && begun.elapsed() < DEADLINE {
                let spin = Instant::now();
                while spin.elapsed() < Duration::from_millis(1) {
                    std::hint::spin_loop();
                }
                if looked.elapsed() > Duration::from_millis(100) {
                    looked = Instant::now();
                    if let Some(index) = share.better_thread() {
                        move_to(index).await;
                        parted.store(true, Relaxed);
                    }
                }
                yield_now().await;
            }
            told.send(here()).unwrap();
        })
        .unwrap();
    }
    let ends: Vec<_> = (0..2).map(|_| hear.recv_timeout(2 * DEADLINE).unwrap()).collect();
    assert!(parted.load(Relaxed), "{ends:?}");
}

#[test]
fn a_move_must_gain_and_is_not_undone() {
    for (here, mine, there, gains) in [
        (1000, 500, 0, true),    // one of two busy tasks, beside an idle thread
        (1000, 1000, 0, false),  // it has the thread to itself
        (500, 500, 500, false),  // where it went, neither gains anything
        (1000, 500, 400, false), // too little
        (1000, 300, 400, true),
    ] {
        assert_eq!(balance::gains(here, mine, there), gains, "{here} {mine} {there}");
    }
}

#[test]
fn a_thread_that_is_needed_again_and_again_lingers() {
    let (near, far) = UnixStream::pair().unwrap();
    spawn("test", async move {
        let mut stream = open_fd(near.into(), "source", &SocketOptions::default()).unwrap();
        let mut byte = [0; 1];
        while read_full(stream.as_mut(), &mut byte).await.unwrap() == 1 {
            write_all(stream.as_mut(), &byte).await.unwrap();
        }
    })
    .unwrap();
    let lingered = || -> Duration { runtime().unwrap().threads.iter().map(Thread::lingered).sum() };
    let (before, begun) = (lingered(), Instant::now());
    // Where the machine has little time for this, an answer may take longer than a thread waits: for a while.
    while lingered() == before {
        assert!(begun.elapsed() < DEADLINE, "it never lingered");
        for _ in 0..100 {
            (&far).write_all(b"x").unwrap();
            (&far).read_exact(&mut [0]).unwrap();
        }
    }
}

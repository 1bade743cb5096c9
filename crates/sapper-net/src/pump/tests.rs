//! How much a pump moves in one turn, and sinks that read no more. What else it does with ends and errors is tested with
//! its owners.

use std::sync::atomic::AtomicUsize;
use std::task::{Wake, Waker};

use super::*;
use crate::runtime;
use crate::stream::{RecordMarks, Stream, memory, ops};

const WAITING: usize = 400 * 1024;
const ROOM: usize = 1 << 20;

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// Bytes that each turn moved of those that wait, until the pump waits for more.
async fn moved_by_turns(turns: Turns) -> Vec<u64> {
    let (mut peer, network) = memory::pair(ROOM);
    let (sink, _reader) = memory::pair(ROOM);
    ops::write_all(&mut peer, &vec![7; WAITING]).await.unwrap();
    let options = || FlowOptions { turns, ..FlowOptions::new(Arc::default()) };
    let decapsulate = options();
    let stats = Arc::clone(&decapsulate.stats);
    let mut pump = Pump::new(Ends::Streams(Box::new(network), Box::new(sink)), options(), decapsulate);

    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let (mut moved, mut before) = (Vec::new(), 0);
    loop {
        assert!(pump.poll(&mut Context::from_waker(&waker), PumpMode::Run).is_pending());
        moved.push(stats.bytes.get() - before);
        before = stats.bytes.get();
        if woken.0.swap(0, Relaxed) == 0 {
            return moved;
        }
    }
}

#[tokio::test]
async fn a_long_turn_moves_all_that_waits() {
    assert_eq!(moved_by_turns(Turns::Long).await, [WAITING as u64]);
}

#[tokio::test]
async fn a_short_turn_moves_little_and_is_taken_up_again() {
    let moved = moved_by_turns(Turns::Short).await;
    assert!(moved.len() > 1 && moved.iter().all(|n| *n <= 2 * 128 * 1024), "{moved:?}");
    assert_eq!(moved.iter().sum::<u64>(), WAITING as u64);
}

#[tokio::test]
async fn bulk_is_told_to_the_thread_that_would_wait_for_more() {
    assert!(!runtime::pumped_bulk());
    moved_by_turns(Turns::Short).await;
    assert!(runtime::pumped_bulk());
}

#[tokio::test]
async fn a_new_sink_gets_what_the_old_one_did_not_want() {
    let (mut peer, network) = memory::pair(ROOM);
    let (sink, mut gone) = memory::pair(ROOM);
    gone.abandon();
    let options = || FlowOptions::new(Arc::default());
    let mut pump = Pump::new(Ends::Streams(Box::new(network), Box::new(sink)), options(), options());
    let mut cx = Context::from_waker(Waker::noop());
    assert!(pump.poll(&mut cx, PumpMode::Run).is_pending());

    let (new, mut reader) = memory::pair(ROOM);
    pump.swap_sink(Sink::Stream(Box::new(new))).unwrap();
    ops::write_all(&mut peer, b"later").await.unwrap();
    assert!(pump.poll(&mut cx, PumpMode::Run).is_pending());
    let mut read = [0; 8];
    assert_eq!(ops::read(&mut reader, &mut read).await.unwrap(), 5);
    assert_eq!(&read[..5], b"later");

    // The network's end is told to this sink, and to one that comes behind it.
    ops::send_eof(&mut peer).await.unwrap();
    let (next, mut next_reader) = memory::pair(ROOM);
    assert!(pump.poll(&mut cx, PumpMode::Run).is_pending());
    assert_eq!(ops::read(&mut reader, &mut read).await.unwrap(), 0);
    pump.swap_sink(Sink::Stream(Box::new(next))).unwrap();
    assert!(pump.poll(&mut cx, PumpMode::Run).is_pending());
    assert_eq!(ops::read(&mut next_reader, &mut read).await.unwrap(), 0);
}

/// The end that a reader of the sink's meets, whose network breaks off behind some bytes, `written` to it in vain.
async fn end_of_a_broken_network(orderly: bool) -> Result<usize> {
    let (mut peer, network) = memory::pair(ROOM);
    let (sink, mut program) = memory::pair(ROOM);
    let options = || FlowOptions::new(Arc::default());
    let mut pump = Pump::new(Ends::Streams(Box::new(network), Box::new(sink)), options(), options());
    ops::write_all(&mut program, b"in vain").await.unwrap();
    ops::write_all(&mut peer, b"half").await.unwrap();
    peer.stop(1); // a write meets it before a read does
    let mut cx = Context::from_waker(Waker::noop());
    assert!(pump.poll(&mut cx, PumpMode::Run).is_pending());
    if orderly {
        ops::send_eof(&mut peer).await.unwrap();
    } else {
        peer.reset(2);
    }
    let Poll::Ready(Err(error)) = pump.poll(&mut cx, PumpMode::Run) else { panic!("it goes on") };
    assert_eq!((error.kind(), error.stream_code()), (ErrorKind::ConnectionLost, Some(1)), "{error}");
    // As their owner ends them.
    let Ends::Streams(_, sink) = pump.ends() else { unreachable!() };
    sink.fail(&error);
    let mut read = [0; 8];
    assert_eq!(ops::read(&mut program, &mut read).await.unwrap(), 4);
    ops::read(&mut program, &mut read).await
}

#[tokio::test]
async fn a_network_that_broke_under_a_write_is_no_orderly_end_for_the_sink() {
    assert_eq!(end_of_a_broken_network(false).await.unwrap_err().kind(), ErrorKind::ConnectionLost);
    // What the peer said before is.
    assert_eq!(end_of_a_broken_network(true).await.unwrap(), 0);
}

/// What a sink got of a network that broke off in order behind `WAITING` bytes under a write, when it began to read `late`.
async fn read_late(late: Duration) -> (usize, bool) {
    let (mut peer, network) = memory::pair(ROOM);
    let (sink, mut program) = memory::pair(64 * 1024);
    let options = || FlowOptions::new(Arc::default());
    let mut pump = Pump::new(Ends::Streams(Box::new(network), Box::new(sink)), options(), options());
    ops::write_all(&mut program, b"in vain").await.unwrap();
    ops::write_all(&mut peer, &vec![7; WAITING]).await.unwrap();
    ops::send_eof(&mut peer).await.unwrap();
    peer.stop(1);
    let mut ended = false;
    let mut turn = |ended: &mut bool| {
        *ended = *ended || pump.poll(&mut Context::from_waker(Waker::noop()), PumpMode::Run).is_ready();
    };
    turn(&mut ended);
    tokio::time::advance(late).await;
    turn(&mut ended);
    let (mut read, mut buffer) = (0, vec![0; WAITING]);
    let mut marks = RecordMarks::ignored();
    loop {
        match program.poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer, &mut marks) {
            Poll::Ready(got) => match got.unwrap() {
                0 => return (read, true),
                n => read += n,
            },
            Poll::Pending if ended => return (read, false),
            Poll::Pending => turn(&mut ended),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_sink_gets_what_came_before_the_network_broke() {
    assert_eq!(read_late(Duration::ZERO).await, (WAITING, true));
    assert_eq!(read_late(LAST_WORDS_OF_SLOW_SINKS / 2).await, (WAITING, true));
    // Who only writes has to hear of it too.
    let (read, _) = read_late(LAST_WORDS_OF_SLOW_SINKS * 2).await;
    assert!(read < WAITING, "{read}");
}

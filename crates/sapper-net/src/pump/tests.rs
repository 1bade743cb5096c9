//! How much a pump moves in one turn. What it does with ends and errors is tested with its owners.

use std::sync::atomic::AtomicUsize;
use std::task::{Wake, Waker};

use super::*;
use crate::stream::{memory, ops};

const WAITING: usize = 200 * 1024;
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
    assert!(moved.len() > 1 && moved.iter().all(|n| *n <= 2 * 64 * 1024), "{moved:?}");
    assert_eq!(moved.iter().sum::<u64>(), WAITING as u64);
}

//! A machine of either role against any bytes: no panic, nothing told that was not there, no memory held
//! beyond its bounds.
//!
//! Input: a byte that says what the machine is, one for the size of the pieces, then the stream. The
//! seeds begin with a hello, so that frames of ours are reached.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sapper_proto::tunnel::frame::Token;
use sapper_proto::tunnel::mux::{Config, Event, Mux, Overflow};

fuzz_target!(|bytes: &[u8]| {
    let Some((&[what, piece], stream)) = bytes.split_first_chunk() else { return };
    let mut now = Duration::from_secs(1);
    let config = Config {
        overflow: if what & 4 == 0 { Overflow::Pause } else { Overflow::Reset },
        max_unread: 2_000,
        max_unread_plain: 500,
        max_streams: 20,
        ..Config::default()
    };
    let mut mux: Mux<Vec<u8>> = if what & 1 == 0 {
        Mux::initiator(config, (what & 2 == 0).then(Vec::new), now)
    } else {
        Mux::acceptor(config, (what & 2 == 0).then_some(now), 2, now)
    };
    let (mut at, mut end) = (0, 0);
    'pieces: while end < stream.len() {
        end = stream.len().min(end + usize::from(piece).max(1));
        now += Duration::from_millis(3);
        while mux.want_read() {
            let Ok(input) = mux.handle_bytes(&stream[at..end], now) else { break 'pieces };
            assert!(input.consumed <= end - at);
            let none = input.event.is_none();
            match input.event {
                Some(Event::Data(key, range)) => {
                    assert!(range.end <= input.consumed && !range.is_empty());
                    assert!(mux.unread(key).is_some_and(|unread| unread as usize >= range.len()));
                    // One in two streams has an end that takes nothing.
                    if key.id & 2 == 0 {
                        mux.consumed(key, range.len() as u32, now);
                        mux.ready(key);
                    }
                }
                Some(Event::Hello(hello)) if what & 1 == 1 => {
                    assert!(!mux.resume(&hello, Vec::new(), now));
                    mux.answer([1; 16], Token([2; 32]), Vec::new(), now);
                }
                Some(Event::Ended(key)) => mux.finish(key),
                _ => {}
            }
            while mux.poll_event().is_some() {}
            at += input.consumed;
            if input.consumed == 0 && none {
                break;
            }
        }
        mux.handle_timeout(now);
        while let Some(turn) = mux.poll_turn(now) {
            assert!(mux.send(turn.key, vec![7; turn.max.min(9) as usize], now));
            mux.not_ready(turn.key);
        }
        let mut slices = Vec::new();
        mux.poll_transmit(&mut slices, 100, now);
        let taken = slices.iter().map(|slice| slice.len()).sum();
        mux.transmitted(taken, now);
        assert!(mux.gauges().streams <= 20);
    }
});

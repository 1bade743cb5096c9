//! What lies on the wire, byte by byte; hostile and perturbed bytes.

use proptest::prelude::*;

use super::*;
use crate::packet::testing::hex;

fn hello_bytes(resume: u8, session: &str, token: &str, received: u64, application: &str) -> Vec<u8> {
    let length = 81 + application.len() / 2;
    hex(&format!(
        "{length:08x} 00000000 10 01 01 00{resume:02x} 0000001f 00004000 00004000 00400000 {} {} {received:016x} {application}",
        session.repeat(16),
        token.repeat(32)
    ))
}

#[test]
fn a_session_byte_by_byte() {
    let mut pair = Pair::new(quiet(), quiet());
    let now = pair.now;
    let greeting = pair.client.transmit_all(now);
    assert_eq!(greeting, hello_bytes(0, "00", "00", 0, "636c69656e74"));
    assert_eq!(pair.server.transmit_all(now), b"", "it waits for the hello");
    pair.server.receive(&greeting, now).unwrap();
    let answer = pair.server.transmit_all(now);
    let (hello, ping) = answer.split_at(answer.len() - 17);
    assert_eq!(hello, hello_bytes(0, "ab", "cd", 0, "736572766572"));
    assert_eq!(ping, hex("0000000d 00000000 11 0000000005f5e100"), "100 seconds in microseconds");
    pair.client.receive(&answer, now).unwrap();
    assert_eq!(
        pair.client.transmit_all(now),
        hex("0000000d 00000000 12 0000000005f5e100 0000000d 00000000 11 0000000005f5e100")
    );

    let id = pair.server.open(now);
    pair.server.write(id, b"GET");
    pair.server.finish(id);
    let bytes = pair.server.transmit_all(now);
    assert_eq!(bytes, hex("00000008 00001000 20 0000 00  00000008 00001000 01 474554  00000005 00001000 22"));
    pair.client.receive(&bytes, now).unwrap();
    assert_eq!((pair.client.side(id).got.as_slice(), pair.client.side(id).ended), (&b"GET"[..], true));
    pair.client.reset(id, now);
    assert_eq!(pair.client.transmit_all(now), hex("0000000b 00001000 23 00000005 6e6f"));
    // 33 bytes of frames have come.
    let later = now + ACK_DELAY;
    assert_eq!(pair.client.mux.poll_timeout(), Some(later));
    assert_eq!(pair.client.transmit_all(later), hex("0000000d 00000000 13 0000000000000021"));
    pair.client.mux.go_away(Code::SHUTDOWN, "bye");
    assert_eq!(
        pair.client.transmit_all(later),
        hex("00000010 00000000 24 00001000 00000008 627965"),
        "with the last stream that it took"
    );
}

#[test]
fn credit_on_the_wire() {
    let small = Config { window: 100, max_window: 100, ..quiet() };
    let mut pair = Pair::greeted(small, quiet());
    let now = pair.now;
    let id = pair.server.open(now);
    pair.server.write(id, &[7; 150]);
    let bytes = pair.server.transmit_all(now);
    assert_eq!(bytes.len(), 12 + 9 + 100, "not more than its credit");
    pair.client.receive(&bytes, now).unwrap();
    assert_eq!(pair.client.transmit_all(now), hex("00000009 00001000 21 00000064"));
}

fn refused(bytes: &[u8]) -> MuxError {
    let mut pair = Pair::greeted(quiet(), quiet());
    let now = pair.now;
    let id = pair.server.open(now);
    pair.run();
    assert_eq!(id, 0x1000);
    pair.client.receive(bytes, now).unwrap_err()
}

#[test]
fn what_a_peer_must_not_do() {
    let frame = |stream, kind, payload: &[u8]| {
        [&Header { stream, kind, payload: payload.len() as u32 }.encode()[..], payload].concat()
    };
    use super::super::super::frame::Header;
    assert_eq!(refused(&frame(0x1001, Kind::Open, &[0; 3])), MuxError::OpenId(0x1001));
    assert_eq!(refused(&frame(0x0ffe, Kind::Open, &[0; 3])), MuxError::OpenId(0x0ffe));
    assert_eq!(refused(&frame(0x1000, Kind::Open, &[0; 3])), MuxError::OpenId(0x1000));
    assert_eq!(refused(&frame(0x1002, Kind::Data, b"x")), MuxError::OpenId(0x1002));
    assert_eq!(refused(&frame(0x1002, Kind::Fin, b"")), MuxError::OpenId(0x1002));
    let too_much = Header { stream: 0x1000, kind: Kind::Data, payload: 16 * 1024 + 1 };
    assert_eq!(refused(&too_much.encode()), MuxError::Credit(0x1000));
    let ends = [frame(0x1000, Kind::Fin, b""), frame(0x1000, Kind::Data, b"x")].concat();
    assert_eq!(refused(&ends), MuxError::AfterEnd(0x1000));
    let ends = [frame(0x1000, Kind::Fin, b""), frame(0x1000, Kind::Fin, b"")].concat();
    assert_eq!(refused(&ends), MuxError::AfterEnd(0x1000));
    let credit = frame(0x1000, Kind::Window, &(1u32 << 31).to_be_bytes());
    assert_eq!(refused(&credit), MuxError::Window(0x1000));
    assert_eq!(refused(&frame(0, Kind::Ack, &9u64.to_be_bytes())), MuxError::Count(9));
    let hello = hello_bytes(0, "00", "00", 0, "");
    assert_eq!(refused(&hello), MuxError::NotNow(Kind::Hello));
    assert!(matches!(refused(&hex("04000001")), MuxError::Frame(_)));
    assert!(matches!(refused(&frame(0x1002, Kind::Open, &[0, 0, 5])), MuxError::Frame(_)));
}

/// Neither end may speak of a stream that nobody has opened: not beyond the newest, not in front of the first, not of
/// the other parity. Of one that is over it may: its frame was under way.
#[test]
fn a_frame_of_a_stream_that_never_was() {
    let frame = |stream: u32, (kind, payload): &(u8, &[u8])| {
        let length = 5 + payload.len() as u32;
        [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[*kind], payload].concat()
    };
    let kinds: [(u8, &[u8]); 7] =
        [(1, b"x"), (1, b""), (2, b""), (3, b""), (0x21, &[0, 0, 0, 1]), (0x22, b""), (0x23, &[0; 4])];
    for kind in &kinds {
        for id in [0x0ffe, 0x1004, 0x1000 + (1 << 31), 1, 0x1001, u32::MAX - 1] {
            for from_client in [true, false] {
                let mut pair = Pair::greeted(quiet(), quiet());
                let now = pair.now;
                let first = pair.server.open(now);
                let second = pair.server.open(now);
                assert_eq!((first, second), (0x1000, 0x1002));
                pair.run();
                pair.server.reset(first, now);
                pair.run();
                let end = if from_client { &mut pair.server } else { &mut pair.client };
                end.receive(&frame(first, kind), now).unwrap();
                assert_eq!(end.mux.stats().late_frames, 1);
                assert_eq!(end.receive(&frame(id, kind), now), Err(MuxError::OpenId(id)), "{kind:?}");
            }
        }
    }
}

/// Before the first stream there is none that could be over; behind a session that is lost neither.
#[test]
fn nobody_speaks_of_streams_before_the_first_one() {
    let data = hex("00000006 00001000 01 78");
    let mut pair = Pair::greeted(quiet(), quiet());
    let now = pair.now;
    assert_eq!(pair.client.receive(&data, now), Err(MuxError::OpenId(0x1000)));
    assert_eq!(pair.server.receive(&data, now), Err(MuxError::OpenId(0x1000)));
}

#[test]
fn a_hello_without_streams_and_frames_that_were_not_agreed() {
    let mut server = End::new(Mux::acceptor(quiet(), Some(START), 2, START));
    let mut hello = hello_bytes(0, "00", "00", 0, "");
    hello[16] = 0b1110;
    assert_eq!(server.receive(&hello, START), Err(MuxError::Capabilities));
    let no_ping = Config { capabilities: Capabilities(1), ..quiet() };
    let mut pair = Pair::greeted(quiet(), no_ping);
    assert_eq!(pair.client.mux.capabilities(), Capabilities::STREAMS);
    assert_eq!(pair.client.mux.session(), None);
    let ping = hex("0000000d 00000000 11 0000000000000000");
    assert_eq!(pair.server.receive(&ping, START), Err(MuxError::NotNow(Kind::Ping)));
    assert!(!pair.client.mux.handle_carrier_lost(START), "it cannot be resumed");
    assert_eq!(pair.client.mux.poll_event(), Some(Event::SessionLost));
    // Where there are no original peers, a carrier begins with a hello.
    let own = Config { plain: false, ..quiet() };
    let mut server = End::new(Mux::acceptor(own, Some(START), 2, START));
    assert_eq!(server.receive(&hex("00000005 00000001 01"), START), Err(MuxError::NotNow(Kind::Data)));
}

#[test]
fn a_peer_that_acknowledges_nothing_does_not_fill_our_memory() {
    let config = Config { replay: 8 * 1024, ..quiet() };
    let mut pair = Pair::greeted(config, quiet());
    let now = pair.now;
    let id = pair.server.open(now);
    pair.run();
    pair.client.write(id, &[1; 100_000]);
    pair.client.turns(now);
    assert!(pair.client.mux.gauges().held <= 8 * 1024, "payload stops at the bound");
    // Answers to its frames go on for a while, and then the connection ends.
    let open = |id: u32| [&hex("00000008")[..], &id.to_be_bytes(), &hex("20 0000 00")].concat();
    pair.client.mux.go_away(Code::SHUTDOWN, "");
    let mut id = 0x1002;
    let error = loop {
        if let Err(error) = pair.client.receive(&open(id), now) {
            break error;
        }
        assert!(pair.client.mux.want_read() && id < 0x20000);
        pair.client.transmit_all(now);
        id += 2;
    };
    assert!(matches!(error, MuxError::Unacknowledged(_)), "{error}");
}

/// A whole conversation as the client receives it.
fn conversation() -> Vec<u8> {
    let mut pair = Pair::new(quiet(), quiet());
    let now = pair.now;
    let hello = pair.client.transmit_all(now);
    pair.server.receive(&hello, now).unwrap();
    let mut bytes = pair.server.transmit_all(now);
    for len in [0, 1, 700] {
        let id = pair.server.open(now);
        pair.server.write(id, &pattern(len, 1));
        pair.server.finish(id);
    }
    let id = pair.server.open(now);
    bytes.extend(pair.server.transmit_all(now));
    pair.server.reset(id, now);
    pair.server.mux.go_away(Code::NONE, "bye");
    bytes.extend(pair.server.transmit_all(now));
    bytes
}

proptest! {
    #[test]
    fn perturbed_bytes_do_not_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        piece in 1usize..400,
    ) {
        let mut bytes = conversation();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let mut client = End::new(Mux::initiator(quiet(), Some(Vec::new()), START));
        client.transmit_all(START);
        for piece in bytes.chunks(piece) {
            if client.receive(piece, START).is_err() {
                break;
            }
            client.transmit_all(START);
        }
    }

    #[test]
    fn random_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), plain: bool) {
        let mut end = End::new(Mux::initiator(quiet(), (!plain).then(Vec::new), START));
        let _ = end.receive(&bytes, START);
        let mut end = End::new(Mux::acceptor(quiet(), (!plain).then_some(START), 7, START));
        let _ = end.receive(&bytes, START);
    }

    #[test]
    fn pieces_do_not_matter(piece in 1usize..800) {
        let bytes = conversation();
        let mut client = End::new(Mux::initiator(quiet(), Some(Vec::new()), START));
        for piece in bytes.chunks(piece) {
            client.receive(piece, START).unwrap();
        }
        let got: Vec<_> = client.sides.values().map(|side| side.got.clone()).collect();
        prop_assert_eq!(got, vec![vec![], pattern(1, 1), pattern(700, 1), vec![]]);
        prop_assert_eq!(client.sides.values().last().unwrap().reset, Some(Code::DENIED));
    }
}

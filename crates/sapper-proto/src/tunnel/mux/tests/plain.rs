//! Original peers, in both roles, and the change to our own frames.

use super::*;
use crate::packet::testing::hex;

fn server() -> End {
    End::new(Mux::acceptor(quiet(), None, 0x1001, START))
}

fn client() -> End {
    End::new(Mux::initiator(quiet(), None, START))
}

#[test]
fn a_server_dials_through_an_original_client_at_once() {
    let mut server = server();
    let id = server.open(START);
    assert_eq!(server.transmit_all(START), hex("00000005 00001000 01"), "so that a service can speak first");
    server.write(id, b"hi");
    assert_eq!(server.transmit_all(START), hex("00000007 00001000 01 6869"));
    server.receive(&hex("00000006 00001000 01 2a 00000005 00001000 02"), START).unwrap();
    let side = server.side(id);
    assert_eq!((side.got.as_slice(), side.closed), (&[42][..], true));
    assert_eq!(server.mux.gauges().streams, 0);
    assert_eq!(server.transmit_all(START), b"", "the original says no more either");
}

#[test]
fn what_an_original_client_closes_is_delivered_first() {
    let mut server = server();
    let id = server.open(START);
    server.transmit_all(START);
    server.sides.get_mut(&id).unwrap().stalled = true;
    server.receive(&hex("00000006 00001000 01 2a 00000005 00001000 02"), START).unwrap();
    assert_eq!(server.mux.gauges().streams, 1, "its visitor has not read");
    server.unstall(id, START);
    assert_eq!(server.mux.gauges().streams, 0);
}

#[test]
fn a_visitors_end_is_held_back_from_an_original_client() {
    let mut server = server();
    let id = server.open(START);
    server.write(id, b"q");
    server.finish(id);
    assert_eq!(server.transmit_all(START), hex("00000005 00001000 01 00000006 00001000 01 71"));
    let linger = quiet().linger.unwrap();
    // The service answers for a long time, with pauses.
    let mut now = START;
    for _ in 0..5 {
        now += linger - MS;
        server.mux.handle_timeout(now);
        server.receive(&hex("00000006 00001000 01 2a"), now).unwrap();
        assert_eq!(server.transmit_all(now), b"");
    }
    assert_eq!(server.side(id).got.len(), 5, "0 of 5 bytes with the original");
    assert!(server.mux.poll_timeout().unwrap() <= now + linger);
    now += linger;
    server.mux.handle_timeout(now);
    assert_eq!(server.transmit_all(now), hex("00000005 00001000 02"));
    server.poll_events(now);
    assert!(server.side(id).closed);
    assert_eq!((server.mux.gauges().streams, server.mux.poll_timeout()), (0, None));
    // Where the service ends first, its close is enough.
    let id = server.open(now);
    server.finish(id);
    server.transmit_all(now);
    server.receive(&hex("00000005 00001002 02"), now).unwrap();
    server.mux.handle_timeout(now + linger);
    assert_eq!(server.transmit_all(now + linger), b"");
    assert!(server.side(id).closed);
}

#[test]
fn a_client_opens_what_an_original_server_names_and_never_twice() {
    let mut client = client();
    client.receive(&hex("00000006 12345678 01 61"), START).unwrap();
    let id = 0x1234_5678;
    assert_eq!((client.side(id).got.as_slice(), &client.side(id).info), (&b"a"[..], &None));
    client.write(id, b"bye");
    client.finish(id);
    assert_eq!(client.transmit_all(START), hex("00000008 12345678 01 627965 00000005 12345678 02"));
    client.poll_events(START);
    assert!(client.side(id).closed);
    // The original still sends: no phantom.
    client.receive(&hex("00000006 12345678 01 62 00000005 12345678 02"), START).unwrap();
    assert_eq!((client.sides.len(), client.mux.gauges().streams, client.mux.stats().late_frames), (1, 0, 2));
    // After a while the id may be somebody else's.
    let later = START + TOMBSTONE_LIFE;
    client.sides.clear();
    client.receive(&hex("00000005 12345678 01"), later).unwrap();
    assert_eq!(client.sides.len(), 1);
}

#[test]
fn a_close_that_comes_first_opens_nothing_and_an_error_ends_at_once() {
    let mut client = client();
    client.receive(&hex("00000007 00000009 02 ffff 00000006 00000009 01 61"), START).unwrap();
    assert_eq!(client.mux.gauges().streams, 0, "a reason may travel there, and is passed over");
    client.receive(&hex("00000006 0000000a 01 61 00000006 0000000a 03 00"), START).unwrap();
    assert_eq!(client.side(10).reset, Some(Code::CONNECTION_RESET));
    client.receive(&hex("00000006 0000000c 01 61"), START).unwrap();
    client.reset(12, START);
    assert_eq!(
        client.transmit_all(START),
        hex("00000005 0000000c 03"),
        "nothing in it but what the original knows"
    );
}

/// An original client has every id from its server: one that this server never gave is no client's.
#[test]
fn a_client_names_no_stream_that_its_server_did_not_open() {
    for kind in [1, 2, 3] {
        let frame = |id: u32| [&hex("00000005")[..], &id.to_be_bytes(), &[kind]].concat();
        let mut server = server();
        let early = server.receive(&frame(0x1000), START);
        assert_eq!(early, Err(MuxError::OpenId(0x1000)), "nobody has come yet");
        server.inbox.clear();
        let id = server.open(START);
        server.transmit_all(START);
        server.reset(id, START);
        server.receive(&frame(id), START).unwrap();
        assert_eq!(server.mux.stats().late_frames, 1, "it was under way");
        for wrong in [id - 2, id + 1, id + 2] {
            assert_eq!(server.receive(&frame(wrong), START), Err(MuxError::OpenId(wrong)));
            server.inbox.clear();
        }
    }
}

#[test]
fn frames_of_ours_are_none_to_an_original() {
    for kind in ["00", "04", "20", "22", "13"] {
        let payload = if kind == "13" {
            "0000000d 00000000 13 0000000000000000".into()
        } else {
            format!("00000005 00000001 {kind}")
        };
        for mut end in [client(), server()] {
            let error = end.receive(&hex(&payload), START).unwrap_err();
            let own = if kind == "20" { "Message is not valid" } else { "" };
            assert!(matches!(error, MuxError::Frame(_)), "{kind} {error} {own}");
        }
    }
    // Not even a hello, where no offer was made.
    let hello = End::new(Mux::initiator(quiet(), Some(Vec::new()), START)).transmit_all(START);
    assert!(server().receive(&hello, START).is_err());
}

#[test]
fn a_frame_of_64_mebibytes_is_streamed_through() {
    let mut client = client();
    client.receive(&hex("04000000 00000009 01"), START).unwrap();
    let piece = vec![1; 1024 * 1024];
    for _ in 0..64 {
        client.receive(&piece, START).unwrap();
        client.sides.get_mut(&9).unwrap().got.clear();
    }
    // 64 MiB less the header's five bytes; these five are the next frame's.
    assert_eq!(client.inbox.len(), 5);
    assert_eq!(client.mux.stats().payload.1, 64 * 1024 * 1024 - 5);
}

#[test]
fn what_an_original_peer_sends_to_a_stalled_end_is_bounded() {
    for overflow in [Overflow::Pause, Overflow::Reset] {
        let config = Config { overflow, max_unread_plain: 1000, ..quiet() };
        let mut client = End::new(Mux::initiator(config, None, START));
        client.receive(&hex("00000005 00000009 01 00000005 0000000a 01"), START).unwrap();
        client.sides.get_mut(&9).unwrap().stalled = true;
        let frame = [&hex("00000195 00000009 01")[..], &[7; 400]].concat();
        for _ in 0..3 {
            client.receive(&frame, START).unwrap();
        }
        client.receive(&hex("00000006 0000000a 01 61"), START).unwrap();
        if overflow == Overflow::Pause {
            assert!(!client.mux.want_read());
            assert_eq!((client.side(9).got.len(), client.side(10).got.len()), (1200, 0));
            client.unstall(9, START);
            client.receive(&[], START).unwrap();
            assert_eq!(client.side(10).got.len(), 1);
        } else {
            assert_eq!((client.side(9).reset, client.side(10).got.len()), (Some(Code::OVERFLOW), 1));
            assert_eq!(client.transmit_all(START), hex("00000005 00000009 03"));
            assert_eq!((client.mux.gauges().unread, client.mux.stats().overflows), (0, 1));
        }
    }
}

#[test]
fn an_original_client_has_a_limit_of_streams() {
    let config = Config { max_streams: 2, ..quiet() };
    let mut client = End::new(Mux::initiator(config, None, START));
    for id in [1u32, 2, 3, 3] {
        let frame = [&hex("00000006")[..], &id.to_be_bytes(), &[1, 0x61]].concat();
        client.receive(&frame, START).unwrap();
    }
    assert_eq!((client.mux.gauges().streams, client.mux.stats().refused), (2, 1));
    assert_eq!(client.transmit_all(START), hex("00000005 00000003 03"));
}

#[test]
fn visitors_wait_until_it_is_known_who_is_there() {
    let mut server = End::new(Mux::acceptor(quiet(), Some(START + 1000 * MS), 0x1000, START));
    let id = server.open(START);
    server.write(id, b"early");
    assert_eq!(server.transmit_all(START), b"");
    assert_eq!(server.mux.poll_timeout(), Some(START + 1000 * MS));
    server.mux.handle_timeout(START + 1000 * MS);
    let bytes = server.transmit_all(START + 1000 * MS);
    assert_eq!(bytes, hex("00000005 00001000 01 0000000a 00001000 01 6561726c79"));
}

/// A hello that comes late, at each point of a frame that is being sent: what was opened before stays
/// plain, what comes after is ours, and no byte is lost, with a broken carrier behind it too.
#[test]
fn a_late_hello_is_welcome_at_any_point() {
    let payload = pattern(40, 3);
    for point in 0..=58 {
        let mut pair = Pair::new(quiet(), quiet());
        let hello = pair.client.transmit_all(pair.now);
        pair.now += 2000 * MS;
        let now = pair.now;
        pair.server.mux.handle_timeout(now);
        let plain = pair.server.open(now);
        pair.server.write(plain, &payload);
        let mut bytes = pair.server.transmit(point, now);
        assert_eq!(bytes.len(), point.min(58));
        pair.server.receive(&hello, now).unwrap();
        let ours = pair.server.open(now);
        pair.server.write(ours, &payload);
        bytes.extend(pair.server.transmit_all(now));
        pair.client.receive(&bytes, now).unwrap();
        pair.run();
        for (id, is_plain) in [(plain, true), (ours, false)] {
            assert_eq!(pair.client.side(id).got, payload, "cut at {point}");
            assert_eq!(pair.server.mux.is_plain(pair.server.keys[&id]), Some(is_plain));
        }
        pair.cut();
        pair.client.write(plain, &payload);
        pair.reattach();
        pair.server.write(plain, &payload);
        pair.run();
        assert_eq!(pair.server.side(plain).got, payload);
        assert_eq!(pair.client.side(plain).got, payload.repeat(2));
    }
}

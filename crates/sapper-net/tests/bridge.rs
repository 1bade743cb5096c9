//! The bridge from outside: two bridges face to face over a socket pair, cleartext at both far ends.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::Duration;

use common::*;
use sapper_net::bridge::{BridgeDirection, BridgeState, CdTunnelRole};
use sapper_net::error::{Direction, ErrorKind, Phase};
use sapper_proto::framing::Framing;

#[test]
fn bytes_cross_both_ways_and_half_close_is_kept() {
    for credentials in all_credentials() {
        let (near, far) = raw_pair(&credentials);
        near.start_both(&far);
        let (mut a, mut b) = (near.cleartext(), far.cleartext());
        a.write_all(b"question").unwrap();
        a.shutdown(Shutdown::Write).unwrap();
        let mut question = Vec::new();
        b.read_to_end(&mut question).unwrap();
        assert_eq!(question, b"question");
        b.write_all(b"answer after your end").unwrap();
        b.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        a.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"answer after your end");
        assert_orderly(&near, &far);
    }
}

#[test]
fn much_data_arrives_whole_in_both_directions_at_once() {
    for credentials in all_credentials() {
        let (near, far) = raw_pair(&credentials);
        near.start_both(&far);
        let ends = [(near.cleartext(), far.cleartext()), (far.cleartext(), near.cleartext())];
        let copies: Vec<_> = ends
            .into_iter()
            .map(|(mut from, mut to)| {
                let bytes = pattern(8 << 20);
                let expected = bytes.clone();
                let writer = std::thread::spawn(move || {
                    from.write_all(&bytes).unwrap();
                    from.shutdown(Shutdown::Write).unwrap();
                });
                let reader = std::thread::spawn(move || {
                    let mut got = Vec::new();
                    to.read_to_end(&mut got).unwrap();
                    assert!(got == expected, "{} bytes", got.len());
                });
                [writer, reader]
            })
            .collect();
        copies.into_iter().flatten().for_each(|thread| thread.join().unwrap());
        assert_orderly(&near, &far);
        let stats = near.bridge().stats();
        assert_eq!(stats.encapsulate.bytes, 8 << 20);
        assert_eq!(stats.decapsulate.bytes, 8 << 20);
        assert!(stats.transport.records_sent >= (8 << 20) / 16_384);
    }
}

#[test]
fn packets_keep_their_bounds_one_record_each() {
    for framing in [Framing::Ip { v4: true, v6: true }, Framing::U16, Framing::U32] {
        let (near, far) = packet_pair(&psk(), framing);
        near.start_both(&far);
        let (a, b) = (near.packets(), far.packets());
        let mut buf = [0; 2000];
        for (n, size) in [40usize, 1280, 999, 1500].into_iter().enumerate() {
            let packet = ipv6_packet(size, n as u8);
            a.send(&packet).unwrap();
            let got = b.recv(&mut buf).unwrap();
            assert!(buf[..got] == packet[..], "{framing:?} {size}");
            b.send(&packet).unwrap();
            assert_eq!(a.recv(&mut buf).unwrap(), size);
        }
        near.bridge().stop(PATIENCE);
        assert_orderly(&near, &far);
        assert_eq!(near.bridge().stats().transport.records_sent, 4);
        assert_eq!(far.bridge().stats().decapsulate.packets, 4);
    }
}

#[test]
fn a_bad_header_ends_the_bridge_with_the_culprit_named() {
    let (near, far) = packet_pair(&psk(), Framing::U16);
    let (near, far) = (near, far.with_framing(Framing::Ip { v4: false, v6: true }));
    near.start_both(&far);
    near.packets().send(b"not an IP packet at all").unwrap();
    let error = far.wait_closed().expect("the far end must refuse");
    assert_eq!(error.kind(), ErrorKind::RemoteProtocol);
    assert_eq!(error.phase(), Some(Phase::Transfer));
    assert_eq!(error.direction(), Some(Direction::Decapsulate));
}

#[test]
fn handshake_and_superframe_hello_have_one_deadline() {
    let (near, far) = packet_pair(&psk(), Framing::U16);
    // What had gone by before counts for the handshake, so what is left is what the hello has too.
    let near = near.with_framing(Framing::Superframe).with_deadlines(|deadlines| {
        deadlines.handshake = 2 * PATIENCE;
        deadlines.spent = 2 * PATIENCE - Duration::from_secs(2);
    });
    far.ask_handshake(1);
    near.bridge().start().unwrap();
    let error = near.wait_closed().expect("the far end, which nobody starts, says no hello");
    assert_eq!((error.kind(), error.phase()), (ErrorKind::HandshakeDeadline, Some(Phase::Handshake)));
}

#[test]
fn stop_takes_effect_while_a_peer_stalls_the_handshake() {
    let (silent, ours) = UnixStream::pair().unwrap();
    let (sink, _held) = UnixStream::pair().unwrap();
    let end = End::client(&psk(), OwnedFd::from(ours), OwnedFd::from(sink), None);
    end.ask_handshake(1);
    end.bridge().stop(Duration::ZERO);
    let error = end.answer(1).expect_err("stopped");
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert!(end.wait_closed().is_none());
    drop(silent);
}

#[test]
fn a_drain_before_the_handshake_delivers_what_waits_once_it_is_done() {
    let (near, far) = raw_pair(&psk());
    near.cleartext().write_all(b"said before anything").unwrap();
    near.bridge().start().unwrap();
    near.bridge().stop(2 * PATIENCE);
    far.bridge().start().unwrap();
    let mut heard = Vec::new();
    far.cleartext().read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"said before anything");
    assert!(near.wait_closed().is_none());
}

#[test]
fn a_drain_that_is_over_before_payload_flows_is_told() {
    let (silent, ours) = UnixStream::pair().unwrap();
    let (sink, _held) = UnixStream::pair().unwrap();
    let end = End::client(&psk(), OwnedFd::from(ours), OwnedFd::from(sink), None);
    end.bridge().start().unwrap();
    end.bridge().stop(Duration::from_millis(50));
    let error = end.wait_closed().expect("what waits at the sink is lost");
    assert_eq!((error.kind(), error.phase()), (ErrorKind::CloseDeadline, Some(Phase::Close)));
    drop(silent);
}

#[test]
fn a_handshake_that_never_ends_meets_its_deadline() {
    let (_silent, ours) = UnixStream::pair().unwrap();
    let (sink, _held) = UnixStream::pair().unwrap();
    let end = End::client(&psk(), OwnedFd::from(ours), OwnedFd::from(sink), None)
        .with_deadlines(|deadlines| deadlines.handshake = Duration::from_millis(50));
    end.ask_handshake(1);
    let error = end.answer(1).expect_err("late");
    assert_eq!((error.kind(), error.phase()), (ErrorKind::HandshakeDeadline, Some(Phase::Handshake)));
    assert!(end.wait_closed().is_none(), "an error is delivered once");
}

#[test]
fn stop_takes_effect_while_the_sink_is_full() {
    let (near, far) = raw_pair(&psk());
    near.start_both(&far);
    let a = near.cleartext();
    a.set_nonblocking(true).unwrap();
    let block = vec![7; 65_536];
    // Nobody reads at the far end: fills every buffer between here and there.
    assert_becomes(true, || {
        while (&a).write(&block).is_ok() {}
        near.bridge().stats().encapsulate.backpressure > Duration::ZERO
    });
    far.bridge().stop(Duration::from_millis(50));
    near.bridge().stop(Duration::from_millis(50));
    near.wait_closed();
    far.wait_closed();
}

#[test]
fn a_drain_delivers_what_waits() {
    let (near, far) = raw_pair(&psk());
    near.start_both(&far);
    near.bridge().pause(Direction::Encapsulate).unwrap();
    let mut a = near.cleartext();
    a.write_all(&pattern(100_000)).unwrap();
    near.bridge().stop(PATIENCE);
    let mut got = Vec::new();
    far.cleartext().read_to_end(&mut got).unwrap();
    assert!(got == pattern(100_000), "{} bytes", got.len());
    assert_eq!(near.wait_closed().map(|error| error.to_string()), None);
    assert_eq!(near.bridge().state(), BridgeState::Closed);
}

#[test]
fn a_paused_direction_waits_and_loses_nothing() {
    let (near, far) = raw_pair(&psk());
    near.bridge().pause(Direction::Encapsulate).unwrap();
    near.start_both(&far);
    let (mut a, mut b) = (near.cleartext(), far.cleartext());
    a.write_all(b"held").unwrap();
    b.write_all(b"free").unwrap();
    let mut four = [0; 4];
    a.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"free");
    b.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(b.read(&mut four).is_err(), "the other direction is paused");
    near.bridge().resume(Direction::Encapsulate).unwrap();
    b.set_read_timeout(Some(PATIENCE)).unwrap();
    b.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"held");
}

#[test]
fn however_often_a_direction_is_paused_its_last_word_counts() {
    const OFTEN: usize = 1_000;
    let (near, far) = raw_pair(&psk());
    let change = |last: Direction| {
        for direction in [Direction::Encapsulate, Direction::Decapsulate] {
            for _ in 0..OFTEN {
                near.bridge().pause(direction).unwrap();
                near.bridge().resume(direction).unwrap();
            }
        }
        near.bridge().pause(last).unwrap();
    };
    change(Direction::Decapsulate); // while it is new
    near.start_both(&far);
    let (mut a, mut b) = (near.cleartext(), far.cleartext());
    let mut four = [0; 4];
    a.write_all(b"free").unwrap();
    b.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"free");
    change(Direction::Encapsulate); // while it runs
    near.update_keys().unwrap(); // it is taken after what came before, and there is room for it
    b.write_all(b"open").unwrap();
    a.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"open");
    a.write_all(b"held").unwrap();
    b.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(b.read(&mut four).is_err(), "it was paused last");
    near.bridge().resume(Direction::Encapsulate).unwrap();
    b.set_read_timeout(Some(PATIENCE)).unwrap();
    b.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"held");
    for end in [&near, &far] {
        end.bridge().stop(Duration::ZERO);
        end.wait_closed();
    }
    assert_eq!(near.bridge().pause(Direction::Encapsulate).unwrap_err().kind(), ErrorKind::Closed);
}

#[test]
fn the_sink_is_swapped_without_a_lost_byte() {
    let (near, far) = raw_pair(&psk());
    near.start_both(&far);
    let (mut a, mut b) = (near.cleartext(), far.cleartext());
    a.write_all(b"old").unwrap();
    let mut three = [0; 3];
    b.read_exact(&mut three).unwrap();
    let (new_inside, mut new_outside) = UnixStream::pair().unwrap();
    far.swap_sink(OwnedFd::from(new_inside)).unwrap();
    a.write_all(b"new").unwrap();
    new_outside.read_exact(&mut three).unwrap();
    assert_eq!(&three, b"new");
    new_outside.write_all(b"yes").unwrap();
    a.read_exact(&mut three).unwrap();
    assert_eq!(&three, b"yes");
}

#[test]
fn an_encrypting_bridge_takes_no_data_but_goes_on_after_key_updates() {
    let (near, far) = raw_pair(&certificates());
    let near = near.with_direction(BridgeDirection::EncryptOnly);
    near.start_both(&far);
    near.update_keys().unwrap();
    far.update_keys().unwrap();
    let mut a = near.cleartext();
    a.write_all(b"one way").unwrap();
    let mut seven = [0; 7];
    let mut b = far.cleartext();
    b.read_exact(&mut seven).unwrap();
    assert_eq!(&seven, b"one way");
    b.write_all(b"not wanted").unwrap();
    let error = near.wait_closed().expect("data from the peer is an error");
    assert_eq!((error.kind(), error.alert()), (ErrorKind::RemoteProtocol, Some(10)));
}

#[test]
fn a_decrypting_bridge_reads_nothing_from_its_sink() {
    let (near, far) = raw_pair(&certificates());
    let near = near.with_direction(BridgeDirection::DecryptOnly);
    near.start_both(&far);
    let (mut a, mut b) = (near.cleartext(), far.cleartext());
    a.write_all(b"stays").unwrap();
    b.write_all(b"comes").unwrap();
    b.shutdown(Shutdown::Write).unwrap();
    let mut got = [0; 5];
    a.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"comes");
    assert_eq!(near.wait_closed().map(|error| error.to_string()), None);
    assert_eq!(near.bridge().stats().encapsulate.bytes, 0);
}

#[test]
fn silence_meets_the_idle_deadline() {
    let (near, far) = raw_pair(&psk());
    let near = near.with_deadlines(|deadlines| deadlines.idle = Some(Duration::from_millis(300)));
    near.start_both(&far);
    let error = near.wait_closed().expect("idle");
    assert_eq!(error.kind(), ErrorKind::IdleDeadline);
}

#[test]
fn both_roles_of_a_device_tunnel_agree_and_no_packet_is_lost() {
    let (near, far) = packet_pair(&psk(), Framing::Ip { v4: false, v6: true });
    near.handshake_both(&far);
    far.ask_cdtunnel(7, CdTunnelRole::Server(device_parameters(1280)));
    near.ask_cdtunnel(8, CdTunnelRole::Client { mtu: 16_000 });
    assert_eq!(near.cdtunnel_answer(8).mtu, 1280);
    assert_eq!(far.cdtunnel_answer(7).mtu, 1280);
    // The device may send at once: its packets lie right behind its reply.
    far.bridge().start().unwrap();
    far.packets().send(&ipv6_packet(500, 3)).unwrap();
    near.bridge().start().unwrap();
    let mut buf = [0; 2000];
    assert_eq!(near.packets().recv(&mut buf).unwrap(), 500);
}

#[test]
fn a_caller_that_keeps_its_descriptor_keeps_its_flags() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let kept = theirs.try_clone().unwrap();
    let flags = |fd: &UnixDatagram| {
        // SAFETY: F_GETFL on an open descriptor.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }
    };
    let before = flags(&kept);
    {
        let (transport, _peer) = UnixStream::pair().unwrap();
        let end = End::client(&psk(), transport.into(), theirs.into(), Some(Framing::U16));
        end.ask_handshake(1);
        end.bridge().stop(Duration::ZERO);
        end.wait_closed();
    }
    assert_eq!(flags(&kept), before);
    drop(ours);
}

fn assert_orderly(near: &End, far: &End) {
    for end in [near, far] {
        let error = end.wait_closed();
        assert!(error.is_none(), "{error:?}");
    }
}

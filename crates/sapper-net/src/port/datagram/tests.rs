use std::future::poll_fn;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;

use sapper_proto::packet::PacketMeta;
use socket2::{Domain, Socket};

use super::super::conformance::{self, Subject};
use super::super::{give_batch, take_batch};
use super::*;

fn port(fd: impl Into<OwnedFd>, max_packet: usize) -> DatagramPort {
    DatagramPort::new(fd.into(), DatagramOptions { max_packet, kind: PacketKind::Ip }).unwrap()
}

fn seqpacket_pair() -> (OwnedFd, OwnedFd) {
    let (a, b) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    (a.into(), b.into())
}

fn udp_pair(address: &str) -> (UdpSocket, UdpSocket) {
    let (a, b) = (UdpSocket::bind(address).unwrap(), UdpSocket::bind(address).unwrap());
    a.connect(b.local_addr().unwrap()).unwrap();
    b.connect(a.local_addr().unwrap()).unwrap();
    (a, b)
}

fn subject(a: impl Into<OwnedFd>, b: impl Into<OwnedFd>, max_packet: usize) -> Subject {
    let (port, far) = (port(a, max_packet), port(b, max_packet));
    let lossless = port.flavour != Flavour::Udp;
    let ends = port.flavour == Flavour::SeqPacket;
    Subject { port: Box::new(port), far: Box::new(far), lossless, ends }
}

#[tokio::test]
async fn unix_datagram_sockets_conform() {
    for max_packet in [1280, DEFAULT_MAX_PACKET, LARGEST_PACKET] {
        conformance::check(async || {
            let (a, b) = UnixDatagram::pair().unwrap();
            subject(a, b, max_packet)
        })
        .await;
    }
}

#[tokio::test]
async fn unix_datagram_sockets_that_are_no_pair_conform() {
    let directory = tempfile::tempdir().unwrap();
    let number = std::cell::Cell::new(0);
    conformance::check(async || {
        number.set(number.get() + 2);
        let [a, b] = [number.get(), number.get() + 1].map(|n| directory.path().join(n.to_string()));
        let (left, right) = (UnixDatagram::bind(&a).unwrap(), UnixDatagram::bind(&b).unwrap());
        left.connect(b).unwrap();
        right.connect(a).unwrap();
        subject(left, right, 1500)
    })
    .await;
}

#[tokio::test]
async fn sequenced_packets_conform() {
    conformance::check(async || {
        let (a, b) = seqpacket_pair();
        subject(a, b, DEFAULT_MAX_PACKET)
    })
    .await;
}

#[tokio::test]
async fn connected_udp_sockets_conform() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        conformance::check(async || {
            let (a, b) = udp_pair(address);
            subject(a, b, 1400)
        })
        .await;
    }
}

#[tokio::test]
async fn a_message_above_the_maximum_is_dropped_and_counted_when_it_comes() {
    let (a, b) = UnixDatagram::pair().unwrap();
    let mut port = port(a, 100);
    b.send(&[1; 101]).unwrap();
    b.send(&[]).unwrap();
    b.send(&[2; 100]).unwrap();
    let mut batch = take_batch();
    assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
    assert_eq!(batch.iter().map(|packet| packet.data.to_vec()).collect::<Vec<_>>(), [vec![2; 100]]);
    assert_eq!((port.stats.drops.total(), port.stats.receive_drops.total()), (0, 1));
    assert_eq!(port.stats.packets_received.get(), 1);
    give_batch(batch);
}

#[tokio::test]
async fn an_empty_message_is_not_the_end_of_sequenced_packets() {
    let (a, b) = seqpacket_pair();
    let mut port = port(a, 1000);
    let far = SockRef::from(&b);
    let mut batch = take_batch();
    far.send(&[]).unwrap();
    far.send(b"after").unwrap();
    assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
    assert_eq!(batch.get(0).unwrap().data, b"after");
    far.send(&[]).unwrap();
    let pending = poll_fn(|cx| Poll::Ready(port.poll_receive(cx, &mut batch).is_pending())).await;
    assert!(pending);
    far.send(b"last").unwrap();
    drop(b);
    batch.clear();
    assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
    assert_eq!(batch.get(0).unwrap().data, b"last");
    assert!(!poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
}

#[tokio::test]
async fn what_waits_behind_an_empty_message_comes_before_the_end() {
    // Wherever a batch ends.
    for before in 0..70 {
        let (a, b) = seqpacket_pair();
        let mut port = port(a, 1000);
        let far = SockRef::from(&b);
        for _ in 0..before {
            far.send(b"before").unwrap();
        }
        far.send(&[]).unwrap();
        for _ in 0..5 {
            far.send(b"after").unwrap();
        }
        drop(b);
        let (mut batch, mut packets) = (take_batch(), 0);
        while poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap() {
            packets += batch.len();
            batch.clear();
        }
        assert_eq!(packets, before + 5);
    }
}

#[tokio::test]
async fn a_peer_that_is_gone_is_a_lost_connection() {
    for (a, b) in [seqpacket_pair(), {
        let (a, b) = UnixDatagram::pair().unwrap();
        (a.into(), b.into())
    }] {
        let mut port = port(a, 1000);
        drop(b);
        let mut batch = take_batch();
        batch.push(b"to nobody", PacketMeta::default());
        let error = poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap_err();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::ConnectionLost, Some(Phase::Transfer)));
        assert!(error.errno().is_some());
    }
}

#[tokio::test]
async fn a_udp_peer_may_come_back() {
    let (a, b) = udp_pair("127.0.0.1:0");
    let address = b.local_addr().unwrap();
    let from = a.local_addr().unwrap();
    let mut port = port(a, 1000);
    drop(b);
    let mut batch = take_batch();
    // The first one is refused, which the next ones hear of.
    for _ in 0..4 {
        batch.push(b"to nobody", PacketMeta::default());
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    }
    assert!(port.stats.drops.total() > 0);
    let back = UdpSocket::bind(address).unwrap();
    back.connect(from).unwrap();
    back.send(b"hello").unwrap();
    assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
    assert_eq!(batch.get(0).unwrap().data, b"hello");
}

#[tokio::test]
async fn the_callers_flags_and_options_stay_as_they_are() {
    let (a, b) = UnixDatagram::pair().unwrap();
    let (kept, ours) = (a.try_clone().unwrap(), a);
    let flags = || crate::fd::open_flags(kept.as_fd()).unwrap();
    let before = flags();
    let mut port = port(ours, 1000);
    b.send(b"x").unwrap();
    let mut batch = take_batch();
    assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
    poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    assert_eq!(flags(), before);
    assert_eq!(before & libc::O_NONBLOCK, 0, "it would have been seen");
}

#[tokio::test]
async fn what_is_no_connected_datagram_socket_is_refused() {
    let stream = std::os::unix::net::UnixStream::pair().unwrap().0;
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for (fd, word) in
        [(OwnedFd::from(stream), "framing"), (udp.into(), "not connected"), (file.into(), "socket")]
    {
        let error = DatagramPort::new(fd, DatagramOptions::default()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.message().contains(word), "{error}");
    }
    let (a, _b) = UnixDatagram::pair().unwrap();
    for max_packet in [0, LARGEST_PACKET + 1] {
        let options = DatagramOptions { max_packet, kind: PacketKind::Ip };
        let error = DatagramPort::new(a.try_clone().unwrap().into(), options).err().unwrap();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("max_packet")));
    }
}

#[test]
fn outside_of_an_event_loop_it_says_so() {
    let (a, _b) = UnixDatagram::pair().unwrap();
    let error = DatagramPort::new(a.into(), DatagramOptions::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::ApiMisuse);
}

mod kernel;

use std::cell::OnceCell;
use std::future::{Future, poll_fn};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixDatagram;

use sapper_proto::packet::{Checksum, Packet};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::super::conformance::{self, Subject, packet, super_packet};
use super::super::datagram::{DatagramOptions, DatagramPort};
use super::super::testing::{Join, in_namespace, ip, new_namespace};
use super::super::{give_batch, take_batch};
use super::*;
use crate::becomes::assert_becomes;
use crate::error::ErrorKind;
use crate::fd::open_flags;

const A4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 90, 0, 1));
const B4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 90, 0, 2));
const A6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd90, 0, 0, 0, 0, 0, 0, 1));
const B6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd90, 0, 0, 0, 0, 0, 0, 2));

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn options(offload: bool) -> TunOptions {
    TunOptions { offload, ..TunOptions::default() }
}

/// A socket pair behaves as a TUN does, but for its ioctls: the headers can be tested without rights.
fn over(fd: impl Into<OwnedFd>, header: TunHeader) -> TunPort {
    TunPort::over(Device::over(fd.into(), header, true, false).unwrap())
}

async fn send(port: &mut TunPort, packets: &[(Vec<u8>, PacketMeta)]) {
    let mut batch = take_batch();
    for (data, meta) in packets {
        assert!(batch.push(data, *meta));
    }
    poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    give_batch(batch);
}

async fn receive(port: &mut TunPort) -> Result<Vec<(Vec<u8>, PacketMeta)>> {
    let mut batch = take_batch();
    assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await?);
    let packets = batch.iter().map(|packet| (packet.data.to_vec(), *packet.meta)).collect();
    give_batch(batch);
    Ok(packets)
}

fn dropped(port: &TunPort, reason: DropReason) -> u64 {
    let stats = &port.stats;
    [&stats.drops, &stats.receive_drops]
        .map(|drops| drops.iter().find(|drop| drop.0 == reason).unwrap().1)
        .iter()
        .sum()
}

#[tokio::test]
async fn every_header_conforms() {
    for header in [TunHeader::None, TunHeader::PacketInformation, TunHeader::Utun, TunHeader::VirtioNet] {
        conformance::check(async || {
            let (a, b) = UnixDatagram::pair().unwrap();
            let (mut port, mut far) = (over(a, header), over(b, header));
            // A socket takes no datagram of more than its buffer; an interface has an MTU.
            port.device.set_max_packet(9000);
            far.device.set_max_packet(9000);
            Subject { port: Box::new(port), far: Box::new(far), lossless: true, ends: false }
        })
        .await;
    }
}

#[tokio::test]
async fn headers_lie_in_front_of_the_packet() {
    let packet = packet(1, 60);
    let mut v4 = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    v4[10] = 1;
    for (header, six, four) in [
        (TunHeader::None, vec![], vec![]),
        (TunHeader::PacketInformation, vec![0, 0, 0x86, 0xdd], vec![0, 0, 0x08, 0x00]),
        (TunHeader::Utun, vec![0, 0, 0, 30], vec![0, 0, 0, 2]),
        (TunHeader::VirtioNet, vec![0; 10], vec![0; 10]),
    ] {
        let (a, b) = UnixDatagram::pair().unwrap();
        let mut port = over(a, header);
        send(&mut port, &[(packet.clone(), PacketMeta::default()), (v4.clone(), PacketMeta::default())])
            .await;
        for (head, packet) in [(six, &packet), (four, &v4)] {
            let mut buffer = [0; 200];
            let n = b.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..n], [head, packet.clone()].concat(), "{header:?}");
        }
    }
}

#[tokio::test]
async fn super_packets_and_partial_checksums_pass_the_virtio_header() {
    let (a, b) = UnixDatagram::pair().unwrap();
    let (mut port, mut far) = (over(a, TunHeader::VirtioNet), over(b, TunHeader::VirtioNet));
    port.device.offloads = Offloads::ALL;
    port.device.set_max_packet(1500);
    let (data, meta) = super_packet(60_000, 1400);
    send(&mut port, &[(data.clone(), meta)]).await;
    let received = receive(&mut far).await.unwrap();
    assert!(received[0].0 == data);
    assert_eq!(received[0].1, meta);
    assert_eq!(port.stats.packets_sent.get(), far.stats.packets_received.get());
}

#[tokio::test]
async fn runs_of_packets_are_joined_before_a_write() {
    let (a, b) = UnixDatagram::pair().unwrap();
    let (mut port, mut far) = (over(a, TunHeader::VirtioNet), over(b, TunHeader::VirtioNet));
    port.device.offloads = Offloads::ALL;
    let packets: Vec<_> = (0..40).map(|number| (packet(number, 1280), PacketMeta::default())).collect();
    send(&mut port, &packets).await;
    assert_eq!((port.stats.send_calls.get(), port.stats.packets_sent.get()), (1, 40));
    let (data, meta) = receive(&mut far).await.unwrap().remove(0);
    assert_eq!((meta.gso, meta.gso_size), (Gso::Udp, 1232));
    // Cut again they are what they were.
    let mut cut = PacketBatch::new(1 << 18, 256);
    let mut whole = PacketBatch::new(1 << 18, 256);
    whole.push(&data, meta);
    sapper_proto::packet::gso::Segmenter::new().segment(&mut whole, &mut cut, 1500);
    assert!(cut.iter().map(|packet| packet.data.to_vec()).eq(packets.into_iter().map(|packet| packet.0)));
    port.release_idle();
    assert!(port.coalescer.is_none());
}

#[tokio::test]
async fn a_full_queue_keeps_what_was_not_joined_yet() {
    let (a, b) = UnixDatagram::pair().unwrap();
    SockRef::from(&a).set_send_buffer_size(100_000).unwrap();
    let (mut port, mut far) = (over(a, TunHeader::VirtioNet), over(b, TunHeader::VirtioNet));
    port.device.offloads = Offloads::ALL;
    // Runs of 3 to 5 packets: after some of them the socket takes no more.
    let lengths = (0..250).map(|n| if n % 4 == 3 { 900 } else { 1000 });
    let mut batch = take_batch();
    for (number, len) in lengths.clone().enumerate() {
        assert!(batch.push(&packet(number as u64, len), PacketMeta::default()));
    }
    let pending = poll_fn(|cx| Poll::Ready(port.poll_send(cx, &mut batch).is_pending())).await;
    assert!(pending && batch.len() < 250 && !batch.is_empty(), "{pending} {}", batch.len());
    let mut numbers = Vec::new();
    let sending = async {
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    };
    let receiving = async {
        while numbers.len() < 250 {
            for (data, meta) in receive(&mut far).await.unwrap() {
                let size = if meta.gso == Gso::None { data.len() - 48 } else { usize::from(meta.gso_size) };
                numbers.extend(
                    data[48..].chunks(size).map(|chunk| u64::from_be_bytes(chunk[..8].try_into().unwrap())),
                );
            }
        }
    };
    tokio::join!(sending, receiving);
    assert!(numbers.into_iter().eq(0..250), "each packet once and in order");
}

#[tokio::test]
async fn the_kernels_header_is_believed_no_more_than_anybodys() {
    let (a, b) = UnixDatagram::pair().unwrap();
    let mut port = over(a, TunHeader::VirtioNet);
    let good = packet(1, 60);
    let send = |head: [u8; 10], packet: &[u8]| b.send(&[&head[..], packet].concat()).unwrap();
    send([0; 10], &good);
    send([1, 0, 0, 0, 0, 0, 0xff, 0xff, 6, 0], &good);
    send([0, 4, 0, 0, 0, 4, 40, 0, 16, 0], &good);
    send([0; 10], &good[..50]);
    b.send(&[0; 5]).unwrap();
    send([0; 10], &good);
    let received = receive(&mut port).await.unwrap();
    assert_eq!(received, vec![(good, PacketMeta::default()); 2]);
    assert_eq!((dropped(&port, DropReason::BadOffload), dropped(&port, DropReason::Malformed)), (2, 2));
}

#[tokio::test]
async fn a_header_that_was_not_named_is_noticed_at_the_first_packet() {
    let good = packet(1, 60);
    for (head, word) in [([0, 0, 0x86, 0xdd], "pi"), ([0, 0, 0, 30], "utun")] {
        let (a, b) = UnixDatagram::pair().unwrap();
        let mut port = over(a, TunHeader::None);
        b.send(&[&head[..], &good].concat()).unwrap();
        let error = receive(&mut port).await.unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("header")));
        assert!(error.message().contains(word), "{error}");
    }
}

#[tokio::test]
async fn a_header_that_was_named_and_is_not_there_is_noticed_at_the_first_packet() {
    let bare = packet(1, 60);
    let before_virtio = [&[0, 0, 0x86, 0xdd][..], &[0; 10], &bare].concat();
    for (header, bytes, hint) in [
        (TunHeader::PacketInformation, &bare, "\"pi\" was named"),
        (TunHeader::Utun, &bare, "\"utun\" was named"),
        (TunHeader::VirtioNet, &before_virtio, "IFF_NO_PI"),
    ] {
        let (a, b) = UnixDatagram::pair().unwrap();
        b.send(bytes).unwrap();
        let error = receive(&mut over(a, header)).await.unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("header")));
        assert!(error.message().contains(hint), "{error}");
    }
}

#[tokio::test]
async fn the_callers_blocking_mode_is_as_before_afterwards() {
    for was_blocking in [true, false] {
        let (a, _b) = UnixDatagram::pair().unwrap();
        a.set_nonblocking(!was_blocking).unwrap();
        let ours = a.try_clone().unwrap();
        let before = open_flags(a.as_fd()).unwrap();
        let port = over(ours, TunHeader::None);
        assert_ne!(open_flags(a.as_fd()).unwrap() & libc::O_NONBLOCK, 0);
        drop(port);
        assert_eq!(open_flags(a.as_fd()).unwrap(), before);
    }
}

#[tokio::test]
async fn what_is_no_tun_is_not_adopted() {
    let (a, _b) = UnixDatagram::pair().unwrap();
    let before = open_flags(a.as_fd()).unwrap();
    let error = TunPort::adopt(a.try_clone().unwrap().into(), &options(true)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert_eq!(open_flags(a.as_fd()).unwrap(), before);
    let error = TunPort::open("a-name-of-16-byte", &options(true)).err().unwrap();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("tun")));
    let wrong = vec![(A4, 33)];
    let error = TunPort::open("", &TunOptions { addresses: wrong, ..options(true) }).err().unwrap();
    assert_eq!(error.field(), Some("addresses"));
}

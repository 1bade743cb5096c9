use std::future::poll_fn;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use sapper_proto::packet::PacketMeta;

use super::super::conformance::{self, Subject};
use super::super::take_batch;
use super::*;

const V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

fn bind(local: SocketAddr) -> UdpSocket {
    UdpSocket::bind(local, UdpOptions { max_packet: 1500, ..UdpOptions::default() }).unwrap()
}

fn batch_of(datagrams: &[Vec<u8>], meta: PacketMeta) -> PacketBatch {
    let mut batch = take_batch();
    for datagram in datagrams {
        assert!(batch.push(datagram, meta));
    }
    batch
}

async fn send(port: &mut UdpPort, datagrams: &[Vec<u8>], meta: PacketMeta) {
    let mut batch = batch_of(datagrams, meta);
    poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    give_batch(batch);
}

/// Receives `count` datagrams with their state; joined ones are taken apart.
async fn receive(port: &mut UdpPort, count: usize) -> Vec<(Vec<u8>, PacketMeta)> {
    let mut datagrams = Vec::new();
    let receiving = async {
        while datagrams.len() < count {
            let mut batch = take_batch();
            assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
            for packet in batch.iter() {
                let size =
                    if packet.meta.gso == Gso::None { usize::MAX } else { packet.meta.gso_size.into() };
                datagrams.extend(packet.data.chunks(size).map(|datagram| (datagram.to_vec(), *packet.meta)));
            }
            give_batch(batch);
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), receiving).await.is_ok(), "too few came");
    datagrams
}

fn numbered(count: usize, len: usize) -> Vec<Vec<u8>> {
    (0..count).map(|n| [&(n as u32).to_be_bytes()[..], &vec![n as u8; len - 4]].concat()).collect()
}

fn dropped(stats: &EndpointStats, reason: DropReason) -> u64 {
    [&stats.drops, &stats.receive_drops]
        .map(|drops| drops.iter().find(|drop| drop.0 == reason).unwrap().1)
        .iter()
        .sum()
}

#[tokio::test]
async fn ports_of_two_sockets_conform() {
    for local in [V4, V6] {
        conformance::check(async || {
            let (a, b) = (bind(local), bind(local));
            let port = a.port_for_peer(b.local_address()).unwrap();
            let far = b.port_for_peer(a.local_address()).unwrap();
            Subject { port: Box::new(port), far: Box::new(far), lossless: false, ends: false }
        })
        .await;
    }
}

#[tokio::test]
async fn datagrams_of_one_length_leave_and_arrive_joined() {
    let (a, b) = (bind(V4), bind(V4));
    let mut port = a.port_for_peer(b.local_address()).unwrap();
    let mut far = b.port_for_rest().unwrap();
    let mut datagrams = numbered(40, 1200);
    datagrams.push(vec![9; 100]);
    datagrams.push(vec![8; 300]);
    send(&mut port, &datagrams, PacketMeta::default()).await;
    assert_eq!(port.stats().send_calls.get(), 2, "a run with its shorter end, and the next one");
    assert_eq!(port.stats().packets_sent.get(), 42);
    let received = receive(&mut far, 42).await;
    assert!(received.iter().map(|got| &got.0).eq(&datagrams));
    assert!(received.iter().all(|got| got.1.peer == Some(a.local_address())));
    assert_eq!(received[0].1.gso, Gso::Datagrams, "{:?}", far.offloads());
    // A train goes on as it came: the answer is one call, too.
    let meta = PacketMeta { gso: Gso::Datagrams, gso_size: 1200, ..PacketMeta::default() };
    let train = datagrams[..20].concat();
    let meta = PacketMeta { peer: Some(a.local_address()), ..meta };
    send(&mut far, std::slice::from_ref(&train), meta).await;
    assert_eq!((far.stats().send_calls.get(), far.stats().packets_sent.get()), (1, 20));
    assert!(receive(&mut port, 20).await.into_iter().map(|got| got.0).eq(datagrams[..20].iter().cloned()));
}

#[tokio::test]
async fn a_kernel_that_does_not_cut_gets_one_datagram_a_call() {
    let std_socket = std::net::UdpSocket::bind(V4).unwrap();
    let on: libc::c_int = 1;
    // Without checksums there is no segmentation either.
    // SAFETY: the pointer and the length are those of an int.
    let set = unsafe {
        libc::setsockopt(
            std_socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const on).cast(),
            4,
        )
    };
    assert_eq!(set, 0);
    let a = UdpSocket::adopt(std_socket.into(), UdpOptions::default()).unwrap();
    let b = bind(V4);
    let mut port = a.port_for_peer(b.local_address()).unwrap();
    let mut far = b.port_for_rest().unwrap();
    let datagrams = numbered(10, 1000);
    send(&mut port, &datagrams, PacketMeta::default()).await;
    let meta = PacketMeta { gso: Gso::Datagrams, gso_size: 1000, ..PacketMeta::default() };
    send(&mut port, &[datagrams.concat()], meta).await;
    let received = receive(&mut far, 20).await;
    assert!(received.into_iter().map(|got| got.0).eq(datagrams.iter().chain(&datagrams).cloned()));
    assert_eq!((port.stats().drops.total(), port.stats().packets_sent.get()), (0, 20));
    assert!(port.offloads()[0].1.starts_with("off"), "{:?}", port.offloads());
}

#[tokio::test]
async fn classes_peers_and_the_rest_get_their_own() {
    let (a, b, c) = (bind(V4), bind(V4), bind(V4));
    let mut from_b = b.port_for_peer(a.local_address()).unwrap();
    let mut from_c = c.port_for_peer(a.local_address()).unwrap();
    let mut odd = a.port_for_class(Box::new(|datagram| datagram[3] % 2 == 1)).unwrap();
    let mut peer = a.port_for_peer(b.local_address()).unwrap();
    let mut rest = a.port_for_rest().unwrap();
    assert_eq!(a.port_for_peer(b.local_address()).err().unwrap().kind(), ErrorKind::Busy);
    assert_eq!(a.port_for_rest().err().unwrap().kind(), ErrorKind::Busy);
    // One train that the kernel joins, with datagrams for two users in it.
    let datagrams = numbered(16, 800);
    send(&mut from_b, &datagrams, PacketMeta::default()).await;
    send(&mut from_c, &datagrams[..4], PacketMeta::default()).await;
    let pick = |parity| datagrams.iter().skip(parity).step_by(2).cloned().collect::<Vec<_>>();
    let data = |got: Vec<(Vec<u8>, PacketMeta)>| got.into_iter().map(|got| got.0).collect::<Vec<_>>();
    assert!(data(receive(&mut peer, 8).await) == pick(0));
    assert!(data(receive(&mut rest, 2).await) == pick(0)[..2]);
    let odd_ones = receive(&mut odd, 10).await;
    assert!(odd_ones.iter().filter(|got| got.1.peer == Some(b.local_address())).count() == 8);
    // Nobody is left for these.
    drop((peer, odd, rest));
    send(&mut from_b, &datagrams[..3], PacketMeta::default()).await;
    let mut again = a.port_for_peer(c.local_address()).unwrap();
    send(&mut from_c, &datagrams[..1], PacketMeta::default()).await;
    receive(&mut again, 1).await;
    assert_eq!(dropped(a.stats(), DropReason::NoRoute), 3);
}

#[tokio::test]
async fn a_slow_user_loses_its_own_datagrams_only() {
    let (a, b) = (bind(V4), bind(V4));
    let mut from = b.port_for_peer(a.local_address()).unwrap();
    let slow = a.port_for_class(Box::new(|datagram| datagram[0] == 1)).unwrap();
    let mut quick = a.port_for_rest().unwrap();
    let marked = |mark: u8| vec![vec![mark; 1000]; 60];
    // More than the slow one's queue holds, in portions that the socket's own buffer takes.
    for _ in 0..40 {
        send(&mut from, &marked(1), PacketMeta::default()).await;
        send(&mut from, &marked(2), PacketMeta::default()).await;
        assert_eq!(receive(&mut quick, 60).await.len(), 60);
    }
    assert!(dropped(slow.stats(), DropReason::QueueFull) > 0);
    assert_eq!(quick.stats().drops.total(), 0);
}

#[tokio::test]
async fn ecn_travels_both_ways() {
    for local in [V4, V6] {
        let (a, b) = (bind(local), bind(local));
        let mut port = a.port_for_peer(b.local_address()).unwrap();
        let mut far = b.port_for_rest().unwrap();
        for ecn in [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce] {
            send(&mut port, &[vec![1; 10]], PacketMeta { ecn, ..PacketMeta::default() }).await;
            assert_eq!(receive(&mut far, 1).await[0].1.ecn, ecn);
        }
    }
}

#[tokio::test]
async fn a_socket_of_all_addresses_answers_from_the_one_that_was_asked() {
    for unspecified in [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)] {
        let server = bind(SocketAddr::new(unspecified, 0));
        let client = std::net::UdpSocket::bind(V4).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let peer = client.local_addr().unwrap();
        let mut port = server.port_for_peer(peer).unwrap();
        assert_eq!(port.peer(), Some(peer));
        let asked = SocketAddr::from(([127, 0, 0, 2], server.local_address().port()));
        client.send_to(b"question", asked).unwrap();
        assert_eq!(receive(&mut port, 1).await[0].1.peer, Some(peer), "IPv4 is IPv4 on any socket");
        send(&mut port, &[b"answer".to_vec()], PacketMeta::default()).await;
        let mut buffer = [0; 20];
        assert_eq!(client.recv_from(&mut buffer).unwrap(), (6, asked));
    }
}

#[tokio::test]
async fn what_goes_nowhere_is_dropped_and_counted() {
    let a = bind(V4);
    let mut port = a.port_for_rest().unwrap();
    send(&mut port, &[vec![1; 10]], PacketMeta::default()).await;
    assert_eq!(dropped(port.stats(), DropReason::NoRoute), 1, "no peer was named");
    let peer = Some("[2001:db8::1]:9".parse().unwrap());
    send(&mut port, &[vec![1; 10]], PacketMeta { peer, ..PacketMeta::default() }).await;
    assert_eq!(dropped(port.stats(), DropReason::Refused), 1, "IPv6 on an IPv4 socket");
    assert_eq!(a.port_for_peer(V4).unwrap().describe(), format!("udp {} -> {V4}", a.local_address()));
}

#[tokio::test]
async fn the_address_is_free_after_the_last_user() {
    let a = bind(V4);
    let local = a.local_address();
    let mut port = a.port_for_rest().unwrap();
    drop(a);
    let b = std::net::UdpSocket::bind(V4).unwrap();
    b.send_to(b"still here", local).unwrap();
    receive(&mut port, 1).await;
    assert!(std::net::UdpSocket::bind(local).is_err());
    drop(port);
    // The reader goes when its thread next looks.
    while std::net::UdpSocket::bind(local).is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_cannot_be_bound_is_said() {
    let taken = std::net::UdpSocket::bind(V4).unwrap();
    let error = UdpSocket::bind(taken.local_addr().unwrap(), UdpOptions::default()).err().unwrap();
    assert_eq!((error.kind(), error.phase()), (ErrorKind::Bind, Some(Phase::Connect)));
    let options = UdpOptions { max_packet: LARGEST_DATAGRAM + 1, ..UdpOptions::default() };
    assert_eq!(UdpSocket::bind(V4, options).err().unwrap().field(), Some("max_packet"));
}

#[tokio::test]
async fn an_idle_port_holds_no_batch() {
    let (a, b) = (bind(V4), bind(V4));
    let mut port = a.port_for_peer(b.local_address()).unwrap();
    let mut far = b.port_for_rest().unwrap();
    send(&mut port, &numbered(5, 100), PacketMeta::default()).await;
    receive(&mut far, 5).await;
    assert!(port.joined.holds_memory());
    port.release_idle();
    far.release_idle();
    assert!(!port.joined.holds_memory() && lock(&far.user.queue).batches.is_empty());
}

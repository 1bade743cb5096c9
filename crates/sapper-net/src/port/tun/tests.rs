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
    port.stats.drops.iter().find(|drop| drop.0 == reason).unwrap().1
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
    for (head, word) in [([0, 0, 0x86, 0xdd], "packet_information"), ([0, 0, 0, 30], "utun")] {
        let (a, b) = UnixDatagram::pair().unwrap();
        let mut port = over(a, TunHeader::None);
        b.send(&[&head[..], &good].concat()).unwrap();
        let error = receive(&mut port).await.unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("tun_header")));
        assert!(error.message().contains(word), "{error}");
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

// From here on with a real kernel behind it.

/// A socket that sees and sends the IPv6 packets of an interface.
fn packet_socket(interface: &str) -> DatagramPort {
    let protocol = i32::from((libc::ETH_P_IPV6 as u16).to_be());
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(protocol))).unwrap();
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: the name ends with a zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    // SAFETY: all-zero bytes are a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_IPV6 as u16).to_be();
    address.sll_ifindex = index as i32;
    // SAFETY: the pointer and the length are those of the address.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
    };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    let options = DatagramOptions { max_packet: 65_535, kind: PacketKind::Ip };
    DatagramPort::new(socket.into(), options).unwrap()
}

#[test]
fn a_kernels_tun_conforms() {
    in_namespace(|| {
        // The kernel would talk by itself: solicitations, listener reports.
        std::fs::write("/proc/sys/net/ipv6/conf/default/addr_gen_mode", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/default/router_solicitations", "0").unwrap();
        for header in [TunHeader::None, TunHeader::PacketInformation] {
            run(conformance::check(async || {
                let options = TunOptions { header: Some(header), ..options(false) };
                let port = TunPort::open("conform%d", &options).unwrap();
                let far = packet_socket(port.name());
                Subject { port: Box::new(port), far: Box::new(far), lossless: false, ends: false }
            }));
        }
    });
}

/// Two interfaces in two namespaces, joined. `test` gets sockets of the first namespace and runs in
/// the second, beside the pump.
fn joined(
    a: TunOptions,
    b: TunOptions,
    test: impl FnOnce(Socket, Socket) + Send + 'static,
) -> (TunPort, TunPort) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let kind = if a.ethernet { "tap" } else { "tun" };
    let a =
        TunPort::open(&format!("{kind}a"), &TunOptions { addresses: vec![(A4, 24), (A6, 64)], ..a }).unwrap();
    let domain = Domain::IPV6;
    let tcp = Socket::new(domain, Type::STREAM, None).unwrap();
    let udp = Socket::new(domain, Type::DGRAM, None).unwrap();
    udp.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into()).unwrap();
    new_namespace().unwrap();
    let b =
        TunPort::open(&format!("{kind}b"), &TunOptions { addresses: vec![(B4, 24), (B6, 64)], ..b }).unwrap();
    let mut pair = Join::new(a, b);
    runtime.block_on(async {
        let (done, over) = tokio::sync::oneshot::channel();
        // A thread inherits the namespace.
        let tester = std::thread::spawn(move || {
            test(tcp, udp);
            let _ = done.send(());
        });
        tokio::select! {
            ended = pair.run() => panic!("a port ended: {ended:?}"),
            _ = over => {}
        }
        if let Err(panic) = tester.join() {
            std::panic::resume_unwind(panic);
        }
    });
    (pair.a, pair.b)
}

fn mapped(address: IpAddr, port: u16) -> SocketAddr {
    match address {
        IpAddr::V4(v4) => SocketAddr::from((v4.to_ipv6_mapped(), port)),
        IpAddr::V6(v6) => SocketAddr::from((v6, port)),
    }
}

/// Bytes that differ everywhere.
fn content(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A TCP connection from the first namespace to `to`, the bytes both ways.
fn tcp_both_ways(socket: Socket, to: IpAddr, len: usize) {
    let listener = TcpListener::bind((to, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    socket.connect(&mapped(to, port).into()).unwrap();
    let mut stream = std::net::TcpStream::from(socket);
    let bytes = content(len);
    stream.write_all(&bytes).unwrap();
    let mut back = vec![0; len];
    stream.read_exact(&mut back).unwrap();
    echo.join().unwrap();
    assert!(back == bytes);
}

/// Datagrams that the kernel gets as one large packet, and an answer to each.
fn udp_both_ways(socket: Socket, to: IpAddr) {
    let server = UdpSocket::bind((to, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    for socket in [SockRef::from(&server), SockRef::from(&socket)] {
        socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    }
    let client = UdpSocket::from(socket);
    let size: libc::c_int = 1000;
    // SAFETY: the pointer and the length are those of an int.
    let set = unsafe {
        libc::setsockopt(client.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const size).cast(), 4)
    };
    assert_eq!(set, 0);
    let bytes = content(10_500);
    client.send_to(&bytes, mapped(to, port)).unwrap();
    let mut received = Vec::new();
    let mut buffer = [0; 2000];
    while received.len() < bytes.len() {
        let (n, peer) = server.recv_from(&mut buffer).unwrap();
        assert!(n <= 1000);
        received.extend_from_slice(&buffer[..n]);
        server.send_to(&buffer[..n], peer).unwrap();
    }
    assert!(received == bytes, "each datagram once, whole and in order");
    let mut back = Vec::new();
    while back.len() < bytes.len() {
        let n = client.recv(&mut buffer).unwrap();
        back.extend_from_slice(&buffer[..n]);
    }
    assert!(back == bytes);
}

const MEGABYTES: usize = 8 << 20;

#[test]
fn tcp_and_udp_pass_two_interfaces_with_offload() {
    for (a, b) in [(A4, B4), (A6, B6)] {
        in_namespace(move || {
            let _ = a;
            let (a, b) = joined(options(true), options(true), move |tcp, udp| {
                tcp_both_ways(tcp, b, MEGABYTES);
                udp_both_ways(udp, b);
            });
            for port in [&a, &b] {
                let stats = &port.stats;
                assert!(port.abilities().tso4 && port.abilities().tso6, "{:?}", port.offloads());
                let (packets, calls) = (stats.packets_received.get(), stats.receive_calls.get());
                assert!(packets > 2 * calls, "super-packets: {packets} packets in {calls} calls");
                assert_eq!(stats.drops.total(), 0);
            }
            assert!(a.describe().contains("virtio-net TSO4 TSO6"), "{}", a.describe());
        });
    }
}

#[test]
fn super_packets_are_cut_for_an_interface_without_offload_and_joined_for_one_with() {
    for to in [B4, B6] {
        in_namespace(move || {
            let (a, b) = joined(options(true), options(false), move |tcp, udp| {
                tcp_both_ways(tcp, to, MEGABYTES);
                udp_both_ways(udp, to);
            });
            assert_eq!(b.stats.packets_sent.get(), b.stats.send_calls.get(), "one packet a call");
            let (sent, calls) = (a.stats.packets_sent.get(), a.stats.send_calls.get());
            assert!(sent > calls + calls / 2, "joined: {sent} packets in {calls} calls");
            assert!(b.offloads().iter().all(|(_, state)| state.starts_with("off: ")));
        });
    }
}

#[test]
fn frames_pass_two_taps() {
    for offload in [true, false] {
        in_namespace(move || {
            let options = TunOptions { ethernet: true, ..options(offload) };
            let (a, b) =
                joined(options.clone(), options, move |tcp, _| tcp_both_ways(tcp, B4, MEGABYTES / 4));
            assert_eq!(a.abilities().kind, PacketKind::Ethernet);
            assert_eq!((a.stats.drops.total(), b.stats.drops.total()), (0, 0));
            assert_eq!(a.abilities().max_packet, 1518);
        });
    }
}

#[test]
fn an_interface_that_is_down_refuses_and_one_that_is_deleted_ends_the_port() {
    in_namespace(|| {
        run(async {
            let mut port = TunPort::open("gone0", &TunOptions { up: false, ..options(true) }).unwrap();
            send(&mut port, &[(packet(1, 100), PacketMeta::default())]).await;
            assert_eq!(dropped(&port, DropReason::Refused), 1);
            // A reader that waits must hear of it.
            let mut batch = take_batch();
            let mut waited = false;
            let error = poll_fn(|cx| {
                let polled = port.poll_receive(cx, &mut batch);
                if !waited && polled.is_pending() {
                    waited = true;
                    ip("link del gone0").unwrap();
                }
                polled
            })
            .await
            .unwrap_err();
            assert_eq!((error.kind(), error.reason()), (ErrorKind::Device, Some("gone")));
            assert!(error.message().contains("gone0"), "{error}");
            batch.push(&packet(1, 100), PacketMeta::default());
            let error = poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap_err();
            assert_eq!(error.reason(), Some("gone"));
        });
    });
}

#[test]
fn the_maximum_follows_the_interfaces_mtu() {
    in_namespace(|| {
        run(async {
            let mut port = TunPort::open("mtu0", &TunOptions { mtu: Some(1400), ..options(true) }).unwrap();
            assert_eq!(port.abilities().max_packet, 1400);
            ip("link set mtu0 mtu 1300").unwrap();
            port.device.forget_mtu();
            assert_eq!(port.abilities().max_packet, 1300);
            send(&mut port, &[(packet(1, 1301), PacketMeta::default())]).await;
            assert_eq!(dropped(&port, DropReason::TooLarge), 1);
        });
    });
}

#[test]
fn addresses_are_there_when_the_port_is() {
    in_namespace(|| {
        run(async {
            ip("tuntap add mode tun name kept1").unwrap();
            let addresses = vec![(A4, 24), (B4, 24), (A6, 64), (B6, 128)];
            for name in ["fresh1", "kept1", "kept1"] {
                let options = TunOptions { addresses: addresses.clone(), ..options(true) };
                let port = TunPort::open(name, &options).unwrap();
                for (address, _) in &addresses {
                    UdpSocket::bind((*address, 0)).unwrap();
                }
                drop(port);
            }
            let wrong = TunOptions { addresses: vec![("::".parse().unwrap(), 64)], ..options(true) };
            let error = TunPort::open("wrong1", &wrong).err().unwrap();
            assert!(error.message().contains("::/64") && error.errno().is_some(), "{error}");
            assert!(ip("link show wrong1").is_err(), "nothing stays of it");
        });
    });
}

#[test]
fn interfaces_that_exist_are_attached_to() {
    in_namespace(|| {
        run(async {
            ip("tuntap add mode tun name kept0").unwrap();
            ip("tuntap add mode tun name queues0 multi_queue").unwrap();
            ip("link set kept0 mtu 1234").unwrap();
            for name in ["kept0", "queues0"] {
                let port = TunPort::open(name, &options(true)).unwrap();
                assert_eq!(port.name(), name);
                drop(port);
                ip(&format!("link show {name}")).unwrap();
            }
            let port = TunPort::open("kept0", &options(false)).unwrap();
            assert_eq!(port.abilities().max_packet, 1234);
            let error = TunPort::open("kept0", &options(false)).err().unwrap();
            assert!(error.message().contains("another program"), "{error}");
            drop(port);
            let tap = TunOptions { ethernet: true, ..options(false) };
            let error = TunPort::open("kept0", &tap).err().unwrap();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Device, Some(libc::EINVAL)));
            let fresh = TunPort::open("fresh0", &options(true)).unwrap();
            drop(fresh);
            assert!(ip("link show fresh0").is_err(), "a new interface goes with its port");
        });
    });
}

/// Opens a TUN as a caller would, with flags of its own.
fn open_raw(name: &str, flags: libc::c_int, vnet_header: libc::c_int) -> OwnedFd {
    let fd = OwnedFd::from(std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap());
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF reads and writes the `ifreq`.
    assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    if vnet_header > 0 {
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const vnet_header) };
        assert_eq!(set, 0);
    }
    fd
}

#[test]
fn adopted_descriptors_are_asked_what_they_are() {
    in_namespace(|| {
        run(async {
            let plain = open_raw("plain0", libc::IFF_TUN | libc::IFF_NO_PI, 0);
            let named = |header| TunOptions { header: Some(header), ..options(true) };
            let adopt = |fd: &OwnedFd, header| TunPort::adopt(fd.try_clone().unwrap(), &named(header));
            let error = adopt(&plain, TunHeader::VirtioNet).err().unwrap();
            assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("tun_header")));
            let port = adopt(&plain, TunHeader::None).unwrap();
            assert!(!port.abilities().tso4 && port.offloads()[1].1.contains("no virtio-net header"));
            drop(port);
            assert_eq!(open_flags(plain.as_fd()).unwrap() & libc::O_NONBLOCK, 0);

            let large = open_raw("large0", libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR, 24);
            let error = adopt(&large, TunHeader::VirtioNet).err().unwrap();
            assert!(error.message().contains("24 bytes"), "{error}");
            let error = adopt(&large, TunHeader::None).err().unwrap();
            assert_eq!(error.field(), Some("tun_header"));

            let able = open_raw("able0", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, 0);
            let unnamed = TunOptions { header: None, ..options(true) };
            let port = TunPort::adopt(able.try_clone().unwrap(), &unnamed).unwrap();
            assert!(port.device.header == TunHeader::VirtioNet && port.abilities().tso4);
            let mut configured = unnamed;
            configured.mtu = Some(1400);
            let error = TunPort::adopt(able, &configured).err().unwrap();
            assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("mtu")));
        });
    });
}

#[test]
fn a_virtio_header_of_twelve_bytes_works() {
    in_namespace(|| {
        run(async {
            ip("tuntap add mode tun name twelve0").unwrap();
            let fd = open_raw("twelve0", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, 12);
            ip("addr add 10.90.0.1/24 dev twelve0").unwrap();
            ip("link set twelve0 up").unwrap();
            let options = TunOptions { header: Some(TunHeader::VirtioNet), ..options(true) };
            let mut port = TunPort::adopt(fd, &options).unwrap();
            assert_eq!(port.device.header_len(), 12);
            let socket = UdpSocket::bind((A4, 0)).unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
            let to = SocketAddr::from((B4, 4000));
            socket.send_to(b"hello", to).unwrap();
            loop {
                let received = receive(&mut port).await.unwrap();
                // The kernel's own chatter may come first.
                if let Some((data, meta)) = received.iter().find(|(data, _)| data[0] == 0x45) {
                    assert_eq!(&data[28..], b"hello");
                    assert!(matches!(meta.checksum, Checksum::Partial { .. }), "its checksum was left to us");
                    let mut back = data.clone();
                    let (source, destination) = back[12..20].split_at_mut(4);
                    source.swap_with_slice(destination);
                    let (source, destination) = back[20..24].split_at_mut(2);
                    source.swap_with_slice(destination);
                    assert!(port.abilities().refuses(Packet { data: &back, meta }).is_none());
                    send(&mut port, &[(back, *meta)]).await;
                    break;
                }
            }
            let mut buffer = [0; 10];
            assert_eq!(socket.recv_from(&mut buffer).unwrap(), (5, to));
        });
    });
}

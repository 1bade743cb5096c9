//! With a real kernel behind it, in namespaces of the tests' own.

use super::*;

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
) -> Join<TunPort, TunPort> {
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
    pair
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
            let pair = joined(options(true), options(true), move |tcp, udp| {
                tcp_both_ways(tcp, b, MEGABYTES);
                udp_both_ways(udp, b);
            });
            for (port, super_packets) in [&pair.a, &pair.b].into_iter().zip(pair.super_packets()) {
                assert!(port.abilities().tso4 && port.abilities().tso6, "{:?}", port.offloads());
                // How many there are is a matter of timing.
                assert!(super_packets > 0);
                assert_eq!(port.stats.drops.total(), 0);
            }
            assert!(pair.a.describe().contains("virtio-net TSO4 TSO6"), "{}", pair.a.describe());
        });
    }
}

#[test]
fn super_packets_are_cut_for_an_interface_without_offload_and_joined_for_one_with() {
    for to in [B4, B6] {
        in_namespace(move || {
            let pair = joined(options(true), options(false), move |tcp, udp| {
                tcp_both_ways(tcp, to, MEGABYTES);
                udp_both_ways(udp, to);
            });
            let (a, b) = (pair.a, pair.b);
            assert_eq!(b.stats.packets_sent.get(), b.stats.send_calls.get(), "one packet a call");
            let (sent, calls) = (a.stats.packets_sent.get(), a.stats.send_calls.get());
            assert!(sent > calls, "joined: {sent} packets in {calls} calls");
            assert!(b.offloads().iter().all(|(_, state)| state.starts_with("off: ")));
        });
    }
}

#[test]
fn frames_pass_two_taps() {
    for offload in [true, false] {
        in_namespace(move || {
            let options = TunOptions { ethernet: true, ..options(offload) };
            let pair = joined(options.clone(), options, move |tcp, _| tcp_both_ways(tcp, B4, MEGABYTES / 4));
            let (a, b) = (pair.a, pair.b);
            assert_eq!(a.abilities().kind, PacketKind::Ethernet);
            assert_eq!((a.stats.drops.total(), b.stats.drops.total()), (0, 0));
            assert_eq!(a.abilities().max_packet, 1518);
        });
    }
}

/// Opens an interface that was just let go. A program that another test starts holds its descriptor, as all
/// others, until it is under way.
fn open_again(name: &str, options: &TunOptions) -> TunPort {
    let opened = OnceCell::new();
    assert_becomes(None, || match TunPort::open(name, options) {
        Ok(port) => opened.set(port).err().map(|_| unreachable!("it is opened once")),
        Err(error) => Some(error.to_string()).inspect(|_| assert_eq!(error.errno(), Some(libc::EBUSY))),
    });
    opened.into_inner().unwrap()
}

/// An interface goes with the last descriptor of it, see [`open_again`].
fn assert_vanishes(name: &str) {
    assert_becomes(false, || ip(&format!("link show {name}")).is_ok());
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
                let port = open_again(name, &options);
                for (address, _) in &addresses {
                    UdpSocket::bind((*address, 0)).unwrap();
                }
                drop(port);
            }
            let wrong = TunOptions { addresses: vec![("::".parse().unwrap(), 64)], ..options(true) };
            let error = TunPort::open("wrong1", &wrong).err().unwrap();
            assert!(error.message().contains("::/64") && error.errno().is_some(), "{error}");
            assert_vanishes("wrong1");
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
            let port = open_again("kept0", &options(false));
            assert_eq!(port.abilities().max_packet, 1234);
            let error = TunPort::open("kept0", &options(false)).err().unwrap();
            assert!(error.message().contains("another program"), "{error}");
            drop(port);
            let tap = TunOptions { ethernet: true, ..options(false) };
            let refused = || TunPort::open("kept0", &tap).err().map(|error| (error.kind(), error.errno()));
            assert_becomes(Some((ErrorKind::Device, Some(libc::EINVAL))), refused);
            let fresh = TunPort::open("fresh0", &options(true)).unwrap();
            drop(fresh);
            assert_vanishes("fresh0");
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
            assert_eq!((error.kind(), error.field()), (ErrorKind::Config, None));
            assert!(error.message().contains("header=vnet"), "{error}");
            // It is found without taking anything, in the words that were typed.
            let spec = crate::endpoint::EndpointSpec::from_fd_with_header(
                plain.try_clone().unwrap(),
                "sink",
                Some(TunHeader::VirtioNet),
            );
            let error = spec.unwrap().check(crate::fd::Access { read: true, write: true }).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            let error = adopt(&plain, TunHeader::Utun).err().unwrap();
            assert!(error.message().contains("macOS"), "{error}");
            // Only packets tell that there is no packet information: here the first one that is written.
            let mut port = adopt(&plain, TunHeader::PacketInformation).unwrap();
            ip("link set plain0 up").unwrap();
            let mut batch = take_batch();
            batch.push(&packet(1, 60), PacketMeta::default());
            let error = poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap_err();
            assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("header")));
            drop(port);
            let port = adopt(&plain, TunHeader::None).unwrap();
            assert!(!port.abilities().tso4 && port.offloads()[1].1.contains("no virtio-net header"));
            drop(port);
            assert_eq!(open_flags(plain.as_fd()).unwrap() & libc::O_NONBLOCK, 0);

            let large = open_raw("large0", libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR, 24);
            let error = adopt(&large, TunHeader::VirtioNet).err().unwrap();
            assert!(error.message().contains("24 bytes"), "{error}");
            let error = adopt(&large, TunHeader::None).err().unwrap();
            assert!(error.message().contains("header=none"), "{error}");

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

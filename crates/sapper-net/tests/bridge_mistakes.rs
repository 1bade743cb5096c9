//! Bridges without TLS (packets to packets, packets to a stream), and options that are refused when the
//! bridge is made rather than when it runs.

mod common;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use common::*;
use sapper_net::bridge::{
    Bridge, BridgeDirection, BridgeOptions, BridgeState, ControlMailbox, Deadlines, Event, PacketOptions,
    Reply, SideOptions, SideTls,
};
use sapper_net::endpoint::EndpointSpec;
use sapper_net::error::{Error, ErrorKind};
use sapper_net::mailbox::{Body, Mailbox};
use sapper_net::port::tap::TapOptions;
use sapper_net::tls::Role;
use sapper_proto::framing::Framing;

/// Without TLS, over two descriptors.
fn options(transport: impl Into<OwnedFd>, sink: impl Into<OwnedFd>) -> BridgeOptions {
    let side = |fd: OwnedFd, field| SideOptions {
        endpoint: EndpointSpec::from_fd(fd, field).unwrap(),
        tls: None,
        initial_data: Vec::new(),
        field,
    };
    BridgeOptions {
        transport: side(transport.into(), "network"),
        sink: side(sink.into(), "sink"),
        direction: BridgeDirection::Duplex,
        framing: None,
        sink_framing: None,
        packets: PacketOptions::default(),
        deadlines: Deadlines::default(),
        peer_policy: None,
        upgrade: None,
        tap: None,
    }
}

fn refused(options: BridgeOptions) -> (ErrorKind, Option<&'static str>, Option<&'static str>) {
    let reply = Reply::new(Mailbox::new().unwrap(), 0);
    let error = Bridge::new(options, reply).err().expect("it must be refused");
    (error.kind(), error.field().map(|field| &*field.to_owned().leak()), error.reason())
}

/// What ended a bridge without TLS.
fn closed(mailbox: &ControlMailbox) -> Option<Error> {
    loop {
        for message in mailbox.drain() {
            if let Body::Event(Event::Closed(error)) = message.body {
                return error;
            }
        }
        assert!(mailbox.wait(Some(PATIENCE)), "it does not end");
    }
}

#[test]
fn two_packet_ports_are_joined_without_a_framing() {
    let (a, network) = UnixDatagram::pair().unwrap();
    let (b, sink) = UnixDatagram::pair().unwrap();
    let mailbox = Mailbox::new().unwrap();
    let bridge = Bridge::new(options(network, sink), Reply::new(mailbox, 0)).unwrap();
    bridge.start().unwrap();
    let mut buf = [0; 100];
    for socket in [&a, &b] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.send(b"no packet that anybody knows").unwrap();
        assert_eq!(to.recv(&mut buf).unwrap(), 28);
    }
    assert_becomes((1, 1, 1), || {
        let stats = bridge.stats();
        (stats.encapsulate.packets, stats.decapsulate.packets, stats.transport.packets_received)
    });
}

#[test]
fn a_packet_port_and_a_stream_are_joined_whichever_comes_first() {
    for swapped in [false, true] {
        let (a, datagrams) = UnixDatagram::pair().unwrap();
        let (mut b, stream) = UnixStream::pair().unwrap();
        let (datagrams, stream) = (OwnedFd::from(datagrams), OwnedFd::from(stream));
        let mut options = if swapped { options(datagrams, stream) } else { options(stream, datagrams) };
        options.framing = Some(Framing::U16);
        let bridge = Bridge::new(options, Reply::new(Mailbox::new().unwrap(), 0)).unwrap();
        bridge.start().unwrap();
        a.set_read_timeout(Some(PATIENCE)).unwrap();
        b.set_read_timeout(Some(PATIENCE)).unwrap();
        a.send(b"abc").unwrap();
        let mut framed = [0; 5];
        b.read_exact(&mut framed).unwrap();
        assert_eq!(&framed, b"\0\x03abc");
        b.write_all(b"\0\x02hi").unwrap();
        assert_eq!(a.recv(&mut [0; 10]).unwrap(), 2);
    }
}

#[test]
fn mistakes_are_found_when_the_bridge_is_made() {
    let datagrams = || OwnedFd::from(UnixDatagram::pair().unwrap().0);
    let stream = || OwnedFd::from(UnixStream::pair().unwrap().0);
    let (read, write) = std::io::pipe().unwrap();
    let (read, write) = (OwnedFd::from(read), OwnedFd::from(write));
    let unconnected = || OwnedFd::from(UnixDatagram::unbound().unwrap());
    let config = ErrorKind::Config;
    let framed = |options: BridgeOptions, framing| BridgeOptions { framing: Some(framing), ..options };

    let unused = Some("unused");
    assert_eq!(
        refused(framed(options(datagrams(), datagrams()), Framing::U16)),
        (config, Some("framing"), unused)
    );
    assert_eq!(refused(options(stream(), datagrams())), (config, Some("framing"), None));
    assert_eq!(refused(options(datagrams(), stream())), (config, Some("framing"), None));
    let superframes = framed(options(stream(), stream()), Framing::Superframe);
    assert_eq!(refused(superframes), (config, Some("sink_framing"), None));
    let mut both = framed(options(datagrams(), stream()), Framing::U16);
    both.sink_framing = Some(Framing::U32);
    assert_eq!(refused(both), (config, Some("framing"), unused));
    let mut early = options(datagrams(), datagrams());
    early.transport.initial_data = b"x".to_vec();
    assert_eq!(refused(early), (config, Some("initial_data"), None));

    let wrong = Some("wrong_direction");
    for (fd, fine) in [(&read, BridgeDirection::EncryptOnly), (&write, BridgeDirection::DecryptOnly)] {
        for direction in [BridgeDirection::Duplex, BridgeDirection::EncryptOnly, BridgeDirection::DecryptOnly]
        {
            let made = || BridgeOptions { direction, ..options(stream(), fd.try_clone().unwrap()) };
            if direction == fine {
                Bridge::new(made(), Reply::new(Mailbox::new().unwrap(), 0)).unwrap();
            } else {
                assert_eq!(refused(made()), (config, Some("sink"), wrong), "{direction:?}");
            }
        }
    }
    // The network's end is written to where the sink's is read, and TLS needs it both ways.
    let one_way =
        |fd: &OwnedFd, direction| BridgeOptions { direction, ..options(fd.try_clone().unwrap(), stream()) };
    assert_eq!(refused(one_way(&read, BridgeDirection::EncryptOnly)), (config, Some("network"), wrong));
    let mut tls = one_way(&write, BridgeDirection::EncryptOnly);
    let server = |config| Some(SideTls { config, role: Role::Server, early: None });
    tls.transport.tls = server(psk().server);
    assert_eq!(refused(tls), (config, Some("network"), wrong));
    assert_eq!(
        refused(framed(options(stream(), unconnected()), Framing::U16)),
        (config, Some("sink"), Some("not_connected"))
    );

    for (network, field) in [(true, "credentials"), (false, "sink_credentials")] {
        let mut options = options(stream(), stream());
        let side = if network { &mut options.transport } else { &mut options.sink };
        side.tls = server(certificates().client);
        assert_eq!(refused(options), (config, Some(field), None));
    }
    for (network, field) in [(true, "server_hostname"), (false, "sink_hostname")] {
        for name in [None, Some(""), Some("two words"), Some("a\0b")] {
            let mut options = options(stream(), stream());
            let role = Role::Client { server_name: name.map(str::to_owned) };
            let side = if network { &mut options.transport } else { &mut options.sink };
            side.tls = Some(SideTls { config: certificates().client, role, early: None });
            assert_eq!(refused(options), (config, Some(field), None), "{name:?}");
        }
    }
    let mut packets = options(datagrams(), datagrams());
    packets.transport.tls = server(psk().server);
    assert_eq!(refused(packets), (config, Some("network"), Some("packets")));
}

#[test]
fn a_plain_bridge_that_only_encrypts_refuses_data_and_hears_of_the_end() {
    for sent in [&b"data"[..], b""] {
        let (mut peer, network) = UnixStream::pair().unwrap();
        let (_held, sink) = UnixStream::pair().unwrap();
        let mailbox = Mailbox::new().unwrap();
        let options = BridgeOptions { direction: BridgeDirection::EncryptOnly, ..options(network, sink) };
        let bridge = Bridge::new(options, Reply::new(Arc::clone(&mailbox), 0)).unwrap();
        bridge.start().unwrap();
        peer.write_all(sent).unwrap();
        if sent.is_empty() {
            bridge.stop(Duration::ZERO);
        }
        let error = closed(&mailbox);
        assert_eq!(error.map(|error| error.kind()), (!sent.is_empty()).then_some(ErrorKind::RemoteProtocol));
    }
}

#[test]
fn a_tap_that_cannot_be_written_is_found_when_it_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let name = std::ffi::CString::new(fifo.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: the name ends with a zero byte and lives through the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let tapped = |path: &std::path::Path| {
        let tap = TapOptions { path: path.to_owned(), filter: None, max_bytes: None, snap_len: 65_535 };
        let ends = (UnixDatagram::pair().unwrap().0, UnixDatagram::pair().unwrap().0);
        BridgeOptions { tap: Some(tap), ..options(ends.0, ends.1) }
    };
    let missing = directory.path().join("no such folder/tap");
    assert_eq!(refused(tapped(&missing)), (ErrorKind::Device, Some("tap"), None));
    assert_eq!(refused(tapped(directory.path())), (ErrorKind::Device, Some("tap"), None));
    assert_eq!(refused(tapped(&fifo)), (ErrorKind::Config, Some("tap"), Some("not_a_file")));
    // Another mistake leaves no file behind, and an older file is kept until payload flows.
    let path = directory.path().join("tap");
    refused(BridgeOptions { framing: Some(Framing::U16), ..tapped(&path) });
    assert!(!path.exists());
    std::fs::write(&path, b"an older file").unwrap();
    let bridge = Bridge::new(tapped(&path), Reply::new(Mailbox::new().unwrap(), 0)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"an older file");
    drop(bridge);
    assert_eq!(std::fs::read(&path).unwrap(), b"an older file");
}

#[test]
fn a_tap_named_during_the_handshake_is_not_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tap");
    let (near, far) = packet_pair(&psk(), Framing::U16);
    near.ask_handshake(1);
    assert_becomes(BridgeState::Handshaking, || near.bridge().state());
    let tap = TapOptions { path: path.clone(), filter: None, max_bytes: None, snap_len: 65_535 };
    near.bridge().set_tap(Some(tap), near.reply(2));
    near.answer(2).unwrap();
    far.ask_handshake(1);
    near.answer(1).unwrap();
    far.answer(1).unwrap();
    near.bridge().start().unwrap();
    far.bridge().start().unwrap();
    near.packets().send(b"seen").unwrap();
    far.packets().recv(&mut [0; 10]).unwrap();
    near.bridge().stop(PATIENCE);
    assert!(near.wait_closed().is_none());
    assert!(std::fs::read(&path).unwrap().windows(4).any(|bytes| bytes == b"seen"));
}

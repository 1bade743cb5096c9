//! The listener over loopback.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use tokio::time::timeout;

use super::*;
use crate::stream::address::UnixAddress;
use crate::stream::ops::{read, read_full, write_all};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn tcp(host: Option<&str>) -> ListenAddress {
    ListenAddress::Tcp { host: host.map(str::to_owned), port: 0 }
}

fn unix(path: &Path) -> ListenAddress {
    ListenAddress::Unix(UnixAddress::Path(path.to_owned()))
}

async fn bind(address: &ListenAddress, options: &ListenOptions) -> Listener {
    Listener::bind(address, options, soon()).await.unwrap()
}

async fn loopback(options: &ListenOptions) -> Listener {
    bind(&tcp(Some("127.0.0.1")), options).await
}

fn inet(listener: &Listener) -> SocketAddr {
    match listener.local_addresses()[0] {
        Address::Inet(address) => address,
        ref other => panic!("{other}"),
    }
}

/// Whether the next accept would have to wait, now and after the event loop had a look.
async fn waits(listener: &mut Listener) -> bool {
    timeout(Duration::from_millis(20), listener.accept()).await.is_err()
}

#[tokio::test]
async fn what_is_accepted_knows_both_addresses() {
    let mut listener = loopback(&ListenOptions::default()).await;
    let client = TcpStream::connect(inet(&listener)).unwrap();
    let mut accepted = listener.accept().await.unwrap();
    assert_eq!(accepted.peer, Address::Inet(client.local_addr().unwrap()));
    assert_eq!(accepted.local, Address::Inet(client.peer_addr().unwrap()));
    io::Write::write_all(&mut &client, b"hello").unwrap();
    let mut buf = [0; 5];
    assert_eq!(read_full(&mut accepted.stream, &mut buf).await.unwrap(), 5);
    let fd = crate::stream::Stream::as_fd(&accepted.stream).unwrap();
    assert!(SockRef::from(&fd).tcp_nodelay().unwrap());
    assert_eq!((listener.stats().accepted.get(), listener.open_connections()), (1, 1));
}

#[tokio::test]
async fn without_a_host_both_families_reach_it_and_with_one_only_its_own() {
    let mut everywhere = bind(&tcp(None), &ListenOptions::default()).await;
    let port = inet(&everywhere).port();
    let has_ipv6 = inet(&everywhere).is_ipv6();
    let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    // An IPv4 client of the IPv6 socket is an IPv4 client, at either end and in the stream's own words.
    let accepted = everywhere.accept().await.unwrap();
    let shown = crate::stream::Stream::describe(&accepted.stream);
    assert_eq!(accepted.peer, Address::Inet(client.local_addr().unwrap()));
    assert_eq!(accepted.local.to_string(), format!("127.0.0.1:{port}"));
    assert_eq!(shown, format!("tcp {} -> {}", accepted.local, accepted.peer));
    if has_ipv6 {
        let _client = TcpStream::connect(("::1", port)).unwrap();
        let accepted = everywhere.accept().await.unwrap();
        assert_eq!(accepted.local.to_string(), format!("[::1]:{port}"));

        let only = bind(&tcp(Some("::")), &ListenOptions::default()).await;
        assert!(TcpStream::connect(("127.0.0.1", inet(&only).port())).is_err());
        let both = bind(&tcp(Some("::")), &ListenOptions { dual_stack: true, ..Default::default() }).await;
        TcpStream::connect(("127.0.0.1", inet(&both).port())).unwrap();
    }
}

#[tokio::test]
async fn a_name_is_listened_at_with_one_port_and_no_address_starves() {
    let mut listener = bind(&tcp(Some("localhost")), &ListenOptions::default()).await;
    let addresses: Vec<SocketAddr> = listener
        .local_addresses()
        .iter()
        .map(|address| match address {
            Address::Inet(address) => *address,
            other => panic!("{other}"),
        })
        .collect();
    assert!(
        addresses.iter().all(|address| address.port() == addresses[0].port() && address.ip().is_loopback())
    );
    let clients: Vec<TcpStream> =
        addresses.iter().cycle().take(8).map(|address| TcpStream::connect(address).unwrap()).collect();
    let mut reached = Vec::new();
    for _ in 0..clients.len() {
        reached.push(listener.accept().await.unwrap().local);
    }
    for address in addresses {
        assert!(reached.contains(&Address::Inet(address)));
    }
}

#[tokio::test]
async fn accepting_pauses_at_the_limit_until_a_connection_goes() {
    let mut listener = loopback(&ListenOptions { max_connections: 2, ..Default::default() }).await;
    let clients = [(); 3].map(|()| TcpStream::connect(inet(&listener)).unwrap());
    let first = listener.accept().await.unwrap();
    let _second = listener.accept().await.unwrap();
    assert!(waits(&mut listener).await);
    assert_eq!((listener.stats().limit_pauses.get(), listener.open_connections()), (1, 2));
    // Waiting for the place and giving it back happen in one task here: the wake-up is what counts.
    let (third, ()) = tokio::join!(listener.accept(), async { drop(first) });
    let mut third = third.unwrap();
    io::Write::write_all(&mut &clients[2], b"3").unwrap();
    let mut buf = [0; 1];
    assert_eq!(read(&mut third.stream, &mut buf).await.unwrap(), 1);
    assert_eq!(&buf, b"3");

    let error =
        Listener::bind(&tcp(None), &ListenOptions { max_connections: 0, ..Default::default() }, soon()).await;
    assert_eq!(error.err().expect("no connection at all").field(), Some("max_connections"));
}

#[tokio::test]
async fn a_cancelled_accept_loses_no_connection() {
    let mut listener = loopback(&ListenOptions { max_connections: 1, ..Default::default() }).await;
    assert!(waits(&mut listener).await);
    assert_eq!(listener.open_connections(), 0, "the place is given back");
    let _client = TcpStream::connect(inet(&listener)).unwrap();
    listener.accept().await.unwrap();
}

#[tokio::test]
async fn a_drain_stops_accepting_and_waits_for_the_accepted() {
    let mut listener = loopback(&ListenOptions::default()).await;
    let address = inet(&listener);
    let mut client = TcpStream::connect(address).unwrap();
    let mut accepted = listener.accept().await.unwrap();
    let error = listener.drain(Instant::now() + Duration::from_millis(20)).await.unwrap_err();
    assert_eq!((error.kind(), error.phase()), (ErrorKind::CloseDeadline, Some(Phase::Close)));
    assert!(error.message().starts_with("1 "), "{error}");
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
    assert_eq!(listener.accept().await.err().expect("closed").kind(), ErrorKind::Closed);
    // What was accepted goes on.
    write_all(&mut accepted.stream, b"bye").await.unwrap();
    io::Read::read_exact(&mut client, &mut [0; 3]).unwrap();
    let (drained, ()) = tokio::join!(listener.drain(soon()), async { drop(accepted) });
    drained.unwrap();
}

#[tokio::test]
async fn one_accept_closes_the_listener_behind_it() {
    let listener = loopback(&ListenOptions::default()).await;
    let address = inet(&listener);
    let _client = TcpStream::connect(address).unwrap();
    let _accepted = listener.accept_one().await.unwrap();
    assert!(TcpStream::connect(address).is_err());
}

#[tokio::test]
async fn our_own_path_goes_with_the_listener_and_nobody_elses() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let options = ListenOptions { unix_mode: Some(0o600), ..Default::default() };
    let mut listener = bind(&unix(&path), &options).await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let _client = UnixStream::connect(&path).unwrap();
    let accepted = listener.accept().await.unwrap();
    assert_eq!(accepted.local.to_string(), path.display().to_string());
    assert_eq!(accepted.peer, Address::Unix(UnixAddress::Unnamed));

    let error =
        Listener::bind(&unix(&path), &ListenOptions { replace_stale: true, ..Default::default() }, soon())
            .await;
    let error = error.err().expect("somebody listens");
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Bind, Some("in_use")));
    drop(listener);
    assert!(!path.exists());

    // Another one took the name meanwhile.
    let listener = bind(&unix(&path), &options).await;
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
}

#[tokio::test]
async fn a_stale_path_is_said_to_be_and_replaced_only_when_asked_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    let error = Listener::bind(&unix(&path), &ListenOptions::default(), soon()).await.err().expect("in use");
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Bind, Some("stale")));
    let replace = ListenOptions { replace_stale: true, ..Default::default() };
    bind(&unix(&path), &replace).await;

    // A file is nobody's stale socket.
    std::fs::write(&path, b"precious").unwrap();
    let error = Listener::bind(&unix(&path), &replace, soon()).await.err().expect("a file");
    assert_eq!(error.reason(), Some("in_use"));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    let wrong = ListenOptions { unix_mode: Some(0o1777), ..Default::default() };
    let error =
        Listener::bind(&unix(&directory.path().join("x")), &wrong, soon()).await.err().expect("no mode");
    assert_eq!(error.field(), Some("unix_mode"));
}

#[tokio::test]
async fn an_abstract_name_has_no_path() {
    let name = UnixAddress::Abstract(format!("sapper listener {}", std::process::id()).into_bytes());
    let mut listener = bind(&ListenAddress::Unix(name.clone()), &ListenOptions::default()).await;
    let client = crate::stream::connect::connect_unix(&name, soon()).await.unwrap();
    let accepted = listener.accept().await.unwrap();
    assert_eq!(accepted.local, Address::Unix(name));
    drop(client);
}

#[tokio::test]
async fn an_address_that_cannot_be_bound_says_why() {
    let taken = loopback(&ListenOptions::default()).await;
    let port = inet(&taken).port();
    for (host, port, reason) in [("127.0.0.1", port, "in_use"), ("192.0.2.1", 0, "not_local")] {
        let address = ListenAddress::Tcp { host: Some(host.into()), port };
        let error = Listener::bind(&address, &ListenOptions::default(), soon()).await.err().expect(host);
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Bind, Some(reason)), "{error}");
        assert!(error.message().contains(host), "{error}");
    }
}

#[tokio::test]
async fn handed_over_sockets_are_as_before_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let unix = UnixListener::bind(&path).unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let fds = vec![OwnedFd::from(unix.try_clone().unwrap()), OwnedFd::from(tcp.try_clone().unwrap())];
    let mut listener = Listener::adopt(fds, "listen", &ListenOptions::default()).unwrap();
    let _one = UnixStream::connect(&path).unwrap();
    let _other = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let (first, second) = (listener.accept().await.unwrap(), listener.accept().await.unwrap());
    assert_ne!(first.local, second.local);
    drop(listener);
    for fd in [unix.as_fd(), tcp.as_fd()] {
        assert_eq!(fd::open_flags(fd).unwrap() & libc::O_NONBLOCK, 0);
    }
    assert!(path.exists(), "not our path");

    let (connected, _peer) = UnixStream::pair().unwrap();
    let error = Listener::adopt(vec![connected.into()], "listen", &ListenOptions::default())
        .err()
        .expect("no listener");
    assert_eq!((error.field(), error.reason()), (Some("listen"), Some("not_listening")));
}

#[tokio::test]
async fn a_peer_that_left_the_queue_is_no_error() {
    let mut listener = loopback(&ListenOptions::default()).await;
    let gone = TcpStream::connect(inet(&listener)).unwrap();
    SockRef::from(&gone).set_linger(Some(Duration::ZERO)).unwrap();
    drop(gone);
    let client = TcpStream::connect(inet(&listener)).unwrap();
    // Either the dead one is not seen at all, or it is a stream that says so.
    let first = listener.accept().await.unwrap();
    if first.peer != Address::Inet(client.local_addr().unwrap()) {
        let mut stream = first.stream;
        assert_eq!(read(&mut stream, &mut [0; 4]).await.unwrap_err().kind(), ErrorKind::ConnectionLost);
        assert_eq!(listener.accept().await.unwrap().peer, Address::Inet(client.local_addr().unwrap()));
    }
}

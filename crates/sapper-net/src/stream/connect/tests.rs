//! Connectors against real listeners.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use super::*;
use crate::stream::Stream;
use crate::stream::fd::MOST_UNSENT;
use crate::stream::ops::{read_full, write_all};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

async fn tcp(host: &str, port: u16) -> Result<FdStream> {
    connect_tcp(host, port, &ConnectOptions::default(), soon()).await
}

fn port_of(listener: &TcpListener) -> u16 {
    listener.local_addr().unwrap().port()
}

/// A port on which nobody listens.
fn free_port() -> u16 {
    port_of(&TcpListener::bind("127.0.0.1:0").unwrap())
}

#[tokio::test]
async fn addresses_of_both_families_and_names() {
    for bound in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(bound) else { continue };
        let address = listener.local_addr().unwrap();
        // A name has addresses of both families; nobody listens at one of them.
        for host in [address.ip().to_string().as_str(), "localhost"] {
            let result = tcp(host, address.port()).await;
            if result.is_err() && host == "localhost" && address.is_ipv6() {
                // This machine's `localhost` is IPv4 only.
                continue;
            }
            let mut stream = result.unwrap();
            let (accepted, peer) = listener.accept().unwrap();
            assert_eq!(stream.peer_address(), Some(address));
            assert_eq!(stream.describe(), format!("tcp {peer} -> {address}"));
            io::Write::write_all(&mut &accepted, b"hi").unwrap();
            let mut buf = [0; 2];
            assert_eq!(read_full(&mut stream, &mut buf).await.unwrap(), 2);
        }
    }
}

#[tokio::test]
async fn our_own_sockets_send_at_once_and_keep_urgent_bytes_in_line() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = ConnectOptions {
        socket: SocketOptions { keepalive: Some(Duration::from_secs(60)), ..SocketOptions::default() },
        ..ConnectOptions::default()
    };
    let stream = connect_tcp("127.0.0.1", port_of(&listener), &options, soon()).await.unwrap();
    let fd = stream.as_fd().unwrap();
    let socket = SockRef::from(&fd);
    assert!(
        socket.tcp_nodelay().unwrap() && socket.out_of_band_inline().unwrap() && socket.keepalive().unwrap()
    );
    assert_eq!(socket.tcp_notsent_lowat().unwrap(), MOST_UNSENT);
}

#[tokio::test]
async fn a_refusal_names_the_address_and_the_errno() {
    let port = free_port();
    let error = tcp("127.0.0.1", port).await.err().expect("nobody listens");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Connect, Some(libc::ECONNREFUSED)));
    assert_eq!(error.phase(), Some(Phase::Connect));
    assert!(error.message().contains(&format!("127.0.0.1:{port}")), "{error}");
    let error = tcp("", port).await.err().expect("no name");
    assert_eq!(error.kind(), ErrorKind::Config);
}

/// Fills a listener's queue, so that further connections get no answer.
fn fill(listener: &TcpListener) -> Vec<Socket> {
    let address = SockAddr::from(listener.local_addr().unwrap());
    // SAFETY: listen touches no memory.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let mut held = Vec::new();
    while !is_full(listener) {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // It goes on without us where it takes longer.
        let _ = socket.connect_timeout(&address, Duration::from_millis(50));
        held.push(socket);
        assert!(held.len() < 64, "the queue has no end");
    }
    held
}

/// Whether the kernel refuses a further connection to a listener: it says how many wait, and the most.
fn is_full(listener: &TcpListener) -> bool {
    // SAFETY: all-zero bytes are a valid `tcp_info`.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the pointer and the length are those of the structure.
    let got = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    assert_eq!(got, 0);
    info.tcpi_unacked > info.tcpi_sacked
}

#[tokio::test]
async fn no_answer_ends_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _held = fill(&listener);
    let deadline = Instant::now() + Duration::from_millis(100);
    let options = ConnectOptions::default();
    let error =
        connect_tcp("127.0.0.1", port_of(&listener), &options, deadline).await.err().expect("no answer");
    assert_eq!(error.kind(), ErrorKind::ConnectDeadline);
    assert!(error.message().contains("no answer"), "{error}");
}

#[tokio::test]
async fn a_silent_address_does_not_keep_the_next_from_connecting() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let _held = fill(&silent);
    let listener = TcpListener::bind("127.0.0.2:0").unwrap();
    let addresses = [silent.local_addr().unwrap(), listener.local_addr().unwrap()];
    let options = ConnectOptions::default();
    let stream = race(&addresses, soon(), |address| attempt(address, &options)).await.unwrap();
    assert_eq!(stream.peer_address(), Some(addresses[1]));
}

#[tokio::test]
async fn the_local_address_is_the_one_asked_for() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let from = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));
    let options = ConnectOptions { local: Some((from, 0).into()), ..ConnectOptions::default() };
    let _stream = connect_tcp("localhost", port_of(&listener), &options, soon()).await.unwrap();
    assert_eq!(listener.accept().unwrap().1.ip(), from);

    for (local, kind) in [("[::1]:0", ErrorKind::Config), ("192.0.2.1:0", ErrorKind::Bind)] {
        let options = ConnectOptions { local: Some(local.parse().unwrap()), ..ConnectOptions::default() };
        let error = connect_tcp("127.0.0.1", port_of(&listener), &options, soon()).await.err().expect(local);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(local.trim_end_matches(":0")), "{error}");
    }
}

#[tokio::test]
async fn a_connection_to_itself_is_a_refusal() {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let options = ConnectOptions { local: Some(address), ..ConnectOptions::default() };
    let error = connect_tcp("127.0.0.1", address.port(), &options, soon()).await.err().expect("itself");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Connect, Some(libc::ECONNREFUSED)));
    assert!(error.message().contains("itself"), "{error}");
}

#[tokio::test]
async fn unix_sockets_by_path_and_by_abstract_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut stream = connect_unix(&UnixAddress::Path(path.clone()), soon()).await.unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    write_all(&mut stream, b"hi").await.unwrap();
    let mut buf = [0; 2];
    io::Read::read_exact(&mut accepted, &mut buf).unwrap();
    assert_eq!(stream.describe(), format!("unix (unnamed) -> {}", path.display()));

    let name = format!("sapper test {}", std::process::id()).into_bytes();
    let address = UnixAddress::Abstract(name);
    let listening = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    listening.bind(&address.to_system().unwrap()).unwrap();
    listening.listen(1).unwrap();
    connect_unix(&address, soon()).await.unwrap();

    drop(listener);
    let error = connect_unix(&UnixAddress::Path(path), soon()).await.err().expect("nobody listens");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Connect, Some(libc::ECONNREFUSED)));
    let missing = directory.path().join("missing");
    let error = connect_unix(&UnixAddress::Path(missing), soon()).await.err().expect("no path");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Connect, Some(libc::ENOENT)));
    assert!(error.message().contains("missing"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_unix_listener_with_a_full_queue_is_tried_again_until_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let address = UnixAddress::Path(directory.path().join("socket"));
    let listening = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    listening.bind(&address.to_system().unwrap()).unwrap();
    listening.listen(0).unwrap();
    let _queued = connect_unix(&address, soon()).await.unwrap();
    let start = Instant::now();
    let error = connect_unix(&address, start + Duration::from_secs(3)).await.err().expect("full");
    assert_eq!((error.kind(), start.elapsed()), (ErrorKind::ConnectDeadline, Duration::from_secs(3)));

    let room = async {
        sleep(Duration::from_secs(1)).await;
        listening.accept().unwrap()
    };
    let (connected, _accepted) = tokio::join!(connect_unix(&address, soon()), room);
    connected.unwrap();
}

//! Descriptors of every kind through the suite, and what only descriptors can get wrong.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;

use socket2::{Domain, Socket, Type};

use super::*;
use crate::fd::open_flags;
use crate::stream::conformance::{Abilities, check};
use crate::stream::joined::open_pair;
use crate::stream::ops::{flush, read, read_full, readable, send_eof, write_all};

const TCP: Abilities = Abilities { reset_seen: true, stop_seen: false, codes: false };
const OTHERS: Abilities = Abilities { reset_seen: false, stop_seen: true, codes: false };

fn open(fd: impl Into<OwnedFd>) -> BoxStream {
    open_fd(fd.into(), "sink", &SocketOptions::default()).unwrap()
}

fn tcp_pair(host: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((host, 0)).unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

#[expect(clippy::print_stderr, reason = "a test that cannot run says why")]
fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

fn is_nonblocking(fd: &impl AsFd) -> bool {
    open_flags(fd.as_fd()).unwrap() & libc::O_NONBLOCK != 0
}

fn terminal() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    let (none, no_settings) = (std::ptr::null_mut(), std::ptr::null());
    // SAFETY: openpty writes two descriptors; the other arguments may be null.
    let failed =
        unsafe { libc::openpty(&raw mut master, &raw mut slave, none, no_settings, std::ptr::null()) };
    assert_eq!(failed, 0, "{}", io::Error::last_os_error());
    // SAFETY: both were just made for us.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

#[tokio::test]
async fn conformance_of_tcp_over_ipv4() {
    check(TCP, || async {
        let (one, other) = tcp_pair("127.0.0.1");
        (open(one), open(other))
    })
    .await;
}

#[tokio::test]
async fn conformance_of_tcp_over_ipv6() {
    if let Err(source) = TcpListener::bind("[::1]:0") {
        return skipped(&format!("no IPv6 here: {source}"));
    }
    check(TCP, || async {
        let (one, other) = tcp_pair("::1");
        (open(one), open(other))
    })
    .await;
}

#[tokio::test]
async fn conformance_of_unix_sockets() {
    check(OTHERS, || async {
        let (one, other) = UnixStream::pair().unwrap();
        (open(one), open(other))
    })
    .await;
}

#[tokio::test]
async fn conformance_of_a_pair_of_pipes() {
    check(OTHERS, || async {
        let ((read_one, write_other), (read_other, write_one)) = (io::pipe().unwrap(), io::pipe().unwrap());
        let pair = |read: io::PipeReader, write: io::PipeWriter| {
            open_pair(read.into(), write.into(), ["read", "write"], &SocketOptions::default()).unwrap()
        };
        (pair(read_one, write_one), pair(read_other, write_other))
    })
    .await;
}

#[tokio::test]
async fn a_callers_flags_are_never_touched_on_sockets_pipes_and_terminals() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    let (read, write) = io::pipe().unwrap();
    let (_master, slave) = terminal();
    let files: [OwnedFd; 4] = [socket.into(), read.into(), write.into(), slave];
    for file in files {
        let stream = open(file.try_clone().unwrap());
        assert!(!is_nonblocking(&file), "{}", stream.describe());
        drop(stream);
        assert!(!is_nonblocking(&file));
    }
}

#[tokio::test]
async fn a_shared_terminal_master_gets_its_flags_back_and_its_hang_up_is_the_end() {
    let (master, slave) = terminal();
    let mut stream = open(master.try_clone().unwrap());
    assert!(is_nonblocking(&master), "it cannot be opened a second time");
    raw_mode(&slave);
    let mut other = open(slave);
    write_all(other.as_mut(), b"typed").await.unwrap();
    let mut buf = [0; 16];
    assert_eq!(read(stream.as_mut(), &mut buf).await.unwrap(), 5);
    write_all(stream.as_mut(), b"shown").await.unwrap();
    assert_eq!(read_full(other.as_mut(), &mut buf[..5]).await.unwrap(), 5);
    drop(other);
    assert_eq!(read(stream.as_mut(), &mut buf).await.unwrap(), 0);
    drop(stream);
    assert!(!is_nonblocking(&master));
}

fn raw_mode(terminal: &OwnedFd) {
    use std::os::fd::AsRawFd;
    // SAFETY: all-zero bytes are a valid `termios`, which the calls fill and read.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings), 0);
        libc::cfmakeraw(&raw mut settings);
        assert_eq!(libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const settings), 0);
    }
}

#[tokio::test]
async fn lines_of_a_terminal_do_not_get_stuck_behind_a_short_read() {
    let (master, slave) = terminal();
    let mut stream = open(slave);
    // Two lines at once: each read returns one of them.
    let mut keyboard = File::from(master);
    io::Write::write_all(&mut keyboard, b"one\ntwo\n").unwrap();
    let mut buf = [0; 64];
    assert_eq!(read(stream.as_mut(), &mut buf).await.unwrap(), 4);
    assert_eq!(read(stream.as_mut(), &mut buf).await.unwrap(), 4);
    assert_eq!(&buf[..4], b"two\n");
}

#[tokio::test]
async fn urgent_data_does_not_hide_what_follows() {
    let (one, other) = tcp_pair("127.0.0.1");
    SockRef::from(&other).set_out_of_band_inline(true).unwrap();
    io::Write::write_all(&mut &one, b"before").unwrap();
    SockRef::from(&one).send_out_of_band(b"!").unwrap();
    io::Write::write_all(&mut &one, b"after").unwrap();
    let mut stream = open(other);
    let mut buf = [0; 64];
    let mut got = Vec::new();
    // The system ends a read before the urgent byte although more is there.
    while got.len() < 12 {
        let n = read(stream.as_mut(), &mut buf).await.unwrap();
        assert_ne!(n, 0);
        got.extend_from_slice(&buf[..n]);
    }
    assert_eq!(got, b"before!after");
}

#[tokio::test]
async fn a_short_read_saves_the_second_call_on_tcp() {
    let (one, other) = tcp_pair("127.0.0.1");
    let mut stream = open(other);
    let mut buf = [0; 64];
    for round in 1..=5 {
        io::Write::write_all(&mut &one, b"12345").unwrap();
        assert_eq!(read(stream.as_mut(), &mut buf).await.unwrap(), 5);
        let idle = std::future::poll_fn(|cx| Poll::Ready(stream.poll_readable(cx).is_pending())).await;
        assert!(idle, "drained, and known without asking");
        assert_eq!(stream.stats().receive_calls.get(), round);
    }
}

#[tokio::test]
async fn a_descriptor_that_travels_along_does_not_hide_what_follows() {
    let (one, other) = UnixStream::pair().unwrap();
    send_with_descriptor(&one, b"first");
    io::Write::write_all(&mut &one, b"second").unwrap();
    let mut stream = open(other);
    let mut buf = [0; 64];
    assert_eq!(read_full(stream.as_mut(), &mut buf[..11]).await.unwrap(), 11);
    assert_eq!(&buf[..11], b"firstsecond");
}

fn send_with_descriptor(socket: &UnixStream, bytes: &[u8]) {
    use std::os::fd::AsRawFd;
    let mut slice = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = [0_u64; 8];
    // SAFETY: all-zero bytes are a valid `msghdr`; the control buffer is aligned and large enough for
    // one descriptor, and everything lives through the call.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut slice;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as _;
        libc::CMSG_DATA(header).cast::<libc::c_int>().write_unaligned(socket.as_raw_fd());
        assert_eq!(libc::sendmsg(socket.as_raw_fd(), &raw const message, 0), bytes.len() as isize);
    }
}

#[tokio::test]
async fn a_reset_says_so_with_its_errno_also_after_a_write_has_heard_of_it() {
    let (one, other) = tcp_pair("127.0.0.1");
    let mut stream = open(other);
    SockRef::from(&one).set_linger(Some(Duration::ZERO)).unwrap();
    drop(one);
    // The system tells the first call that asks; the read behind it must not see an orderly end.
    let error = write_all(stream.as_mut(), b"x").await.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::ConnectionLost, Some(libc::ECONNRESET)));
    for _ in 0..2 {
        readable(stream.as_mut()).await.unwrap();
        let error = read(stream.as_mut(), &mut [0; 4]).await.unwrap_err();
        assert_eq!(error.errno(), Some(libc::ECONNRESET));
    }
    let error = send_eof(stream.as_mut()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
}

#[tokio::test]
async fn a_reset_reaches_the_peer_although_the_caller_keeps_a_duplicate() {
    let (one, other) = tcp_pair("127.0.0.1");
    let mut stream = open(one.try_clone().unwrap());
    let mut peer = open(other);
    write_all(stream.as_mut(), b"x").await.unwrap();
    stream.reset(0);
    assert_eq!(read_full(peer.as_mut(), &mut [0; 1]).await.unwrap(), 1);
    let error = read(peer.as_mut(), &mut [0; 4]).await.unwrap_err();
    assert_eq!(error.errno(), Some(libc::ECONNRESET));
    assert!(one.peer_addr().is_err(), "the caller's socket is not connected any more");
}

#[tokio::test]
async fn nagle_is_off_while_we_use_a_callers_socket_and_back_afterwards() {
    let (one, _other) = tcp_pair("127.0.0.1");
    let stream = open(one.try_clone().unwrap());
    assert!(one.nodelay().unwrap());
    drop(stream);
    assert!(!one.nodelay().unwrap());
    one.set_nodelay(true).unwrap();
    drop(open(one.try_clone().unwrap()));
    assert!(one.nodelay().unwrap(), "it was off before");
}

#[tokio::test]
async fn keepalive_is_what_was_asked_for() {
    let (one, _other) = tcp_pair("127.0.0.1");
    let options = SocketOptions { keepalive: Some(Duration::from_secs(30)), ..SocketOptions::default() };
    let stream = open_fd(one.try_clone().unwrap().into(), "sink", &options).unwrap();
    let socket = SockRef::from(&one);
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
    drop(stream);
}

#[tokio::test]
async fn a_connection_that_was_reset_before_it_came_to_us_is_lost_not_wrong() {
    let (one, other) = tcp_pair("127.0.0.1");
    SockRef::from(&one).set_linger(Some(Duration::ZERO)).unwrap();
    drop(one);
    let error = open_fd(other.into(), "socket", &SocketOptions::default()).err().expect("it is gone");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::ConnectionLost, Some(libc::ECONNRESET)));

    let unconnected = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let error =
        open_fd(unconnected.into(), "socket", &SocketOptions::default()).err().expect("not connected");
    assert_eq!(
        (error.kind(), error.field(), error.reason()),
        (ErrorKind::Config, Some("socket"), Some("not_connected"))
    );
}

#[tokio::test]
async fn one_way_pipes_say_which_way_they_go() {
    let (read_end, write_end) = io::pipe().unwrap();
    let (mut reader, mut writer) = (open(read_end), open(write_end));
    let error = write_all(reader.as_mut(), b"x").await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Device, Some("read_only")));
    send_eof(reader.as_mut()).await.unwrap();
    assert_eq!(read(writer.as_mut(), &mut [0; 4]).await.unwrap(), 0);
    write_all(writer.as_mut(), b"still works").await.unwrap();
    flush(writer.as_mut()).await.unwrap();
    let mut buf = [0; 11];
    assert_eq!(read_full(reader.as_mut(), &mut buf).await.unwrap(), 11);
    // The end of a pipe is its closing, and nobody who reads is an error, not a signal.
    drop(reader);
    let error = write_all(writer.as_mut(), b"x").await.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::ConnectionLost, Some(libc::EPIPE)));
}

#[tokio::test]
async fn a_pipe_whose_writer_left_before_we_came_has_its_bytes_and_its_end() {
    for bytes in [&b""[..], b"left behind"] {
        let (read_end, mut write_end) = io::pipe().unwrap();
        io::Write::write_all(&mut write_end, bytes).unwrap();
        drop(write_end);
        let mut stream = open(read_end);
        let mut buf = [0; 32];
        assert_eq!(read_full(stream.as_mut(), &mut buf).await.unwrap(), bytes.len());
        assert_eq!(&buf[..bytes.len()], bytes);
    }
}

#[tokio::test]
async fn a_fifo_works_like_a_pipe_also_without_its_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    let text = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the path ends with a NUL and lives through the call.
    assert_eq!(unsafe { libc::mkfifo(text.as_ptr(), 0o600) }, 0);
    // Both open modes at once: nobody waits for the other end.
    let both = File::options().read(true).write(true).open(&path).unwrap();
    let read_end = File::open(&path).unwrap();
    let writer = File::options().write(true).open(&path).unwrap();
    drop(both);
    drop(writer);
    // Its last writer is gone before it is opened a second time.
    assert_eq!(read(open(read_end).as_mut(), &mut [0; 4]).await.unwrap(), 0);

    // Nobody has opened it for writing yet: that is no end.
    use std::os::unix::fs::OpenOptionsExt;
    let early = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let mut stream = open(early);
    let idle = std::future::poll_fn(|cx| Poll::Ready(stream.poll_readable(cx).is_pending())).await;
    assert!(idle, "it waits for a writer");
    let mut writer = File::options().write(true).open(&path).unwrap();
    io::Write::write_all(&mut writer, b"late").unwrap();
    drop(writer);
    let mut buf = [0; 8];
    assert_eq!(read_full(stream.as_mut(), &mut buf).await.unwrap(), 4);
}

#[tokio::test]
async fn more_slices_than_the_system_takes_are_a_short_write() {
    let (one, other) = UnixStream::pair().unwrap();
    let (mut stream, _peer) = (open(one), other);
    let slices = vec![IoSlice::new(b"x"); 3000];
    let n = std::future::poll_fn(|cx| stream.poll_write(cx, &slices)).await.unwrap();
    assert!((1..=1024).contains(&n));
}

#[test]
fn outside_an_event_loop_it_says_so() {
    let (one, _other) = UnixStream::pair().unwrap();
    let error = open_fd(one.into(), "sink", &SocketOptions::default()).err().expect("no event loop");
    assert_eq!(error.kind(), ErrorKind::ApiMisuse);
}

#[tokio::test]
async fn sockets_are_small_towards_this_machine_alone() {
    let options = SocketOptions { short_near: true, ..SocketOptions::default() };
    let own = |text: &str| Address::Inet(text.parse().unwrap());
    for (local, peer, near) in [
        ("127.0.0.1:1", "127.0.0.1:2", true),
        ("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.2]:2", true),
        ("192.0.2.1:1", "192.0.2.1:2", true),
        ("[2001:db8::1]:1", "[2001:db8::1]:2", true),
        ("192.0.2.1:1", "192.0.2.2:2", false),
        ("[2001:db8::1]:1", "[2001:db8::2]:2", false),
    ] {
        let (socket, _other) = tcp_pair("127.0.0.1");
        let mut stream = FdStream::between(socket.into(), true, &own(local), &own(peer)).unwrap();
        stream.set_own_options(&options).unwrap();
        let socket = stream.socket().unwrap();
        let sizes = [socket.recv_buffer_size().unwrap(), socket.send_buffer_size().unwrap()];
        // The system doubles what it is asked for.
        assert_eq!(sizes == [2 * MOST_NEAR, 4 * MOST_NEAR], near, "{local} -> {peer}: {sizes:?}");
        stream.widen();
        let widened = stream.socket().unwrap().recv_buffer_size().unwrap();
        assert_eq!(widened, if near { 2 * MOST_NEAR_ALONE } else { sizes[0] }, "{local} -> {peer}");
    }
}

/// Our end of a connection that is reset unless it is ended, and the other one.
fn resetting() -> (FdStream, TcpStream) {
    let (one, other) = tcp_pair("127.0.0.1");
    let (local, peer) = connection(&one.try_clone().unwrap().into(), "sink").unwrap();
    let mut stream = FdStream::between(one.into(), true, &local, &peer).unwrap();
    let options = SocketOptions { reset_unless_ended: true, ..SocketOptions::default() };
    stream.set_own_options(&options).unwrap();
    (stream, other)
}

#[tokio::test]
async fn a_connection_that_goes_unended_is_reset_where_that_is_asked_for() {
    let (mut stream, mut other) = resetting();
    write_all(&mut stream, b"a part").await.unwrap();
    // Its end is heard, ours is not said.
    other.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read(&mut stream, &mut [0; 4]).await.unwrap(), 0);
    drop(stream);
    let error = io::Read::read_to_end(&mut other, &mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_connection_that_was_ended_keeps_what_is_queued() {
    for its_end_first in [false, true] {
        let (mut stream, mut other) = resetting();
        if its_end_first {
            other.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read(&mut stream, &mut [0; 4]).await.unwrap(), 0);
        }
        // More than the other side takes at once: it reads when ours is closed.
        write_all(&mut stream, &[7]).await.unwrap();
        let mut queued = 1;
        let full = std::future::poll_fn(|cx| {
            while let Poll::Ready(n) = stream.poll_write(cx, &[IoSlice::new(&[7; 65_536])]) {
                queued += n.unwrap();
            }
            Poll::Ready(stream.unconfirmed() > 0)
        });
        assert!(full.await, "all of it has arrived already");
        send_eof(&mut stream).await.unwrap();
        drop(stream);
        let mut got = Vec::new();
        io::Read::read_to_end(&mut other, &mut got).unwrap();
        assert_eq!(got.len(), queued);
    }
}

#[tokio::test]
async fn after_a_reset_nothing_waits_to_be_confirmed() {
    let (mut stream, other) = resetting();
    // It is gone, and bytes for it are answered with a reset.
    drop(other);
    assert_eq!(read(&mut stream, &mut [0; 4]).await.unwrap(), 0);
    write_all(&mut stream, b"too late").await.unwrap();
    let heard = async {
        while stream.unconfirmed() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), heard).await.expect("a reset is the end of it");
    let lost = std::future::poll_fn(|cx| stream.poll_write(cx, &[IoSlice::new(b"more")])).await;
    assert_eq!(lost.unwrap_err().kind(), ErrorKind::ConnectionLost);
}

//! What each kind of descriptor is taken for, and that flags are as before afterwards.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::nonblocking::{NonBlocking, reopen};
use super::*;

fn pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = io::pipe().unwrap();
    (read.into(), write.into())
}

/// A pseudo-terminal: master and slave.
pub(crate) fn terminal() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: openpty writes two descriptors; the other arguments may be null.
    let failed = unsafe {
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(failed, 0, "{}", io::Error::last_os_error());
    // SAFETY: both were just made for us.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

fn is_nonblocking(fd: &impl AsFd) -> bool {
    open_flags(fd.as_fd()).unwrap() & libc::O_NONBLOCK != 0
}

#[test]
fn each_kind_is_recognised() {
    let (read, write) = pipe();
    assert_eq!(classify(read.as_fd(), "sink").unwrap(), FdKind::Pipe);
    assert_eq!(access(read.as_fd()).unwrap(), Access { read: true, write: false });
    assert_eq!(access(write.as_fd()).unwrap(), Access { read: false, write: true });

    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    assert_eq!(classify(null.as_fd(), "sink").unwrap(), FdKind::Character);
    assert_eq!(access(null.as_fd()).unwrap(), Access { read: true, write: true });
    assert_eq!(classify(tempfile::tempfile().unwrap().as_fd(), "sink").unwrap(), FdKind::File);

    let (master, slave) = terminal();
    assert_eq!(classify(master.as_fd(), "sink").unwrap(), FdKind::Terminal { master: true });
    assert_eq!(classify(slave.as_fd(), "sink").unwrap(), FdKind::Terminal { master: false });

    let tcp = std::net::TcpListener::bind("[::1]:0").unwrap();
    let FdKind::Socket(socket) = classify(tcp.as_fd(), "sink").unwrap() else { panic!("a socket") };
    assert!(socket.is_tcp() && socket.listening);
    assert_eq!(socket.to_string(), "IPv6 listening socket");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let FdKind::Socket(socket) = classify(udp.as_fd(), "sink").unwrap() else { panic!("a socket") };
    assert_eq!((socket.socket_type, socket.is_tcp()), (SocketType::Datagram, false));
    let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let kind = classify(unix.as_fd(), "sink").unwrap();
    assert!(kind.is_stream());
    assert_eq!(kind.to_string(), "Unix stream socket");
}

#[test]
fn what_cannot_be_an_endpoint_names_the_field() {
    let directory = File::open("/").unwrap();
    let error = classify(directory.as_fd(), "sink").unwrap_err();
    assert_eq!(
        (error.kind(), error.field(), error.reason()),
        (ErrorKind::Config, Some("sink"), Some("directory"))
    );

    // SAFETY: epoll_create1 touches no memory and makes a descriptor for us.
    let epoll = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    let error = classify(epoll.as_fd(), "socket").unwrap_err();
    assert_eq!((error.field(), error.reason()), (Some("socket"), Some("not_an_endpoint")));

    if let Ok(tun) = File::options().read(true).write(true).open("/dev/net/tun") {
        let error = classify(tun.as_fd(), "sink").unwrap_err();
        assert_eq!((error.field(), error.reason()), (Some("sink"), Some("not_attached")));
    }

    let ours = directory.as_raw_fd();
    let error = duplicate(ours, "sink").unwrap_err();
    assert_eq!((error.field(), error.reason()), (Some("sink"), Some("directory")));
    assert!(error.message().contains(&format!("descriptor {ours} is")), "{error}");

    let error = open_path(Path::new("/"), File::options().read(true), "sink").unwrap_err();
    assert_eq!(
        (error.field(), error.reason(), error.message()),
        (Some("sink"), Some("directory"), "/ is a directory")
    );

    for number in [-1, 1 << 20] {
        let error = duplicate(number, "sink").unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("sink")));
        assert_eq!(error.reason(), Some("not_open"));
    }
}

#[test]
fn a_duplicate_is_another_descriptor_that_closes_on_exec() {
    let (read, _write) = pipe();
    let copy = duplicate(read.as_raw_fd(), "sink").unwrap();
    assert_ne!(copy.as_raw_fd(), read.as_raw_fd());
    assert_eq!(identity(copy.as_fd()).unwrap(), identity(read.as_fd()).unwrap());
    // SAFETY: F_GETFD touches no memory.
    assert_eq!(unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_GETFD) }, libc::FD_CLOEXEC);
}

#[test]
fn opening_again_leaves_the_callers_flag_alone() {
    let (read, write) = pipe();
    let (_master, slave) = terminal();
    for fd in [&read, &write, &slave] {
        let again = reopen(fd.as_fd()).unwrap();
        assert!(is_nonblocking(&again));
        assert!(!is_nonblocking(fd));
        assert_eq!(access(again.as_fd()).unwrap(), access(fd.as_fd()).unwrap());
    }
}

#[test]
fn the_flag_goes_with_its_last_user() {
    let (master, _slave) = terminal();
    let first = NonBlocking::new(master.try_clone().unwrap()).unwrap();
    let second = NonBlocking::new(master.try_clone().unwrap()).unwrap();
    assert!(is_nonblocking(&master));
    drop(first);
    assert!(is_nonblocking(&second), "the second user still needs it");
    drop(second);
    assert!(!is_nonblocking(&master));
}

#[test]
fn a_flag_that_was_there_before_stays() {
    let (master, _slave) = terminal();
    set_nonblocking(&master);
    drop(NonBlocking::new(master.try_clone().unwrap()).unwrap());
    assert!(is_nonblocking(&master));
}

fn set_nonblocking(fd: &OwnedFd) {
    let flags = open_flags(fd.as_fd()).unwrap();
    // SAFETY: F_SETFL touches no memory.
    assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }, 0);
}

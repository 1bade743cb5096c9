//! Endpoints as plain data: what Python and the command line hand over, parsed there, opened here.
//!
//! A descriptor is looked at when its specification is made, so that a wrong one is refused before
//! anything is connected; everything that waits waits in [`EndpointSpec::open`], on the event loop
//! that will use the endpoint.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::error::{Error, ErrorKind, Phase, Result, seconds};
use crate::fd::{self, Access, FdKind, SocketType};
use crate::port::spec::{PortSpec, open_port};
use crate::port::tun::{TunHeader, TunOptions};
use crate::port::{BoxPort, PacketKind};
use crate::stream::BoxStream;
use crate::stream::address::{Address, UnixAddress};
use crate::stream::connect::{ConnectOptions, connect_tcp, connect_unix};
use crate::stream::door::Door;
use crate::stream::fd::{SocketOptions, open_kind};
use crate::stream::joined::{join, open_pair};
use crate::stream::listen::{AcceptedSocket, ListenAddress, ListenOptions, Listener};
use crate::stream::resolve::check_host;

/// Families whose sockets talk to the system, or see what is others': nobody's packets are theirs to carry.
#[cfg(any(target_os = "linux", target_os = "android"))]
const NO_PAYLOAD: [i32; 3] = [libc::AF_PACKET, libc::AF_NETLINK, libc::AF_ALG];
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const NO_PAYLOAD: [i32; 0] = [];

/// One end of a bridge, not open yet.
pub enum EndpointSpec {
    /// A TCP connection to be made.
    Tcp {
        /// A name or an address in text.
        host: String,
        /// The port.
        port: u16,
        /// How to connect.
        options: ConnectOptions,
    },
    /// A connection to a Unix stream socket.
    Unix(UnixAddress),
    /// The one connection that is accepted there.
    Listen {
        /// Where to listen.
        address: ListenAddress,
        /// How to listen.
        options: ListenOptions,
    },
    /// A descriptor that is ours; of a listening socket, the one connection that it accepts.
    Fd(FdSpec),
    /// A descriptor for each direction.
    FdPair {
        /// What is read.
        read: FdSpec,
        /// What is written.
        write: FdSpec,
    },
    /// A stream that exists already and needs no event loop: a foreign transport, memory.
    Stream(BoxStream),
    /// The half behind a program's door, which is the bridge's from the opening on.
    Door(Arc<Door>),
    /// An accepted connection.
    Accepted(AcceptedSocket),
    /// What the first one gives to read, and the second one takes to write.
    Joined(Box<(EndpointSpec, EndpointSpec)>),
    /// Whole packets.
    Port(PortSpec),
}

/// A descriptor that carries a stream.
#[derive(Debug)]
pub struct FdSpec {
    fd: OwnedFd,
    kind: FdKind,
    field: &'static str,
    options: SocketOptions,
}

/// How long opening may take.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Looking a name up and connecting, together.
    pub connect: Duration,
    /// Waiting for the one connection of a listener; `None` waits as long as it takes.
    pub accept: Option<Duration>,
    /// The largest packet that will be moved (packet ports).
    pub max_packet: usize,
}

/// An endpoint of either kind.
pub enum Opened {
    /// Ordered bytes.
    Stream(BoxStream),
    /// Whole packets.
    Port(BoxPort),
}

impl FdSpec {
    /// Of a descriptor that is ours (a caller's number is duplicated first: [`fd::duplicate`]);
    /// `field` is the option to blame for what it is.
    pub fn new(fd: OwnedFd, field: &'static str, options: SocketOptions) -> Result<Self> {
        let kind = fd::classify(fd.as_fd(), field)?;
        if !kind.is_stream() {
            return Err(Error::config(field, format!("a {kind} carries packets, not a stream"))
                .with_reason("packets"));
        }
        Ok(Self { fd, kind, field, options })
    }

    /// The stream over it, on the event loop that will use it.
    fn open(self) -> Result<BoxStream> {
        open_kind(self.fd, self.kind, self.field, &self.options)
    }

    /// What the descriptor is.
    pub fn kind(&self) -> &FdKind {
        &self.kind
    }

    fn is_listener(&self) -> bool {
        matches!(&self.kind, FdKind::Socket(socket) if socket.listening && socket.socket_type == SocketType::Stream)
    }

    /// Refuses a socket without a peer, and a descriptor that does not allow what is asked of it.
    fn check(&self, needs: Access) -> Result<()> {
        if matches!(self.kind, FdKind::Socket(_)) && !self.is_listener() && !fd::has_peer(self.fd.as_fd()) {
            return Err(not_connected(&self.kind, self.field));
        }
        check_access(self.fd.as_fd(), &self.kind, self.field, needs)
    }
}

impl EndpointSpec {
    /// Of a descriptor that is ours, a stream's or a packet port's; `field` is the option to blame.
    pub fn from_fd(fd: OwnedFd, field: &'static str) -> Result<Self> {
        Self::from_fd_with_header(fd, field, None)
    }

    /// The same, with the name of what lies in front of each packet of a TUN or TAP descriptor. `None`
    /// is what the descriptor says itself; another kind of descriptor has no header.
    pub fn from_fd_with_header(fd: OwnedFd, field: &'static str, header: Option<TunHeader>) -> Result<Self> {
        let kind = fd::classify(fd.as_fd(), field)?;
        Self::of_kind(fd, kind, field, header)
    }

    /// The same of a duplicate of a caller's descriptor.
    pub fn from_number(number: RawFd, field: &'static str, header: Option<TunHeader>) -> Result<Self> {
        let (fd, kind) = fd::duplicate_known(number, field)?;
        Self::of_kind(fd, kind, field, header)
    }

    fn of_kind(fd: OwnedFd, kind: FdKind, field: &'static str, header: Option<TunHeader>) -> Result<Self> {
        if header.is_some() && !matches!(kind, FdKind::Tun(_)) {
            let message = format!("only a TUN or TAP descriptor has a header, and {field} is a {kind}");
            return Err(Error::config("header", message).with_reason("unused"));
        }
        match kind {
            FdKind::Tun(_) => Ok(Self::Port(PortSpec::TunFd {
                fd,
                options: TunOptions { header, ..TunOptions::default() },
                field,
            })),
            FdKind::Socket(socket) => {
                match socket.socket_type {
                    _ if NO_PAYLOAD.contains(&socket.domain) => {
                        Err(Error::config(field, format!("a {socket} is no endpoint"))
                            .with_reason("not_an_endpoint"))
                    }
                    SocketType::Datagram | SocketType::SeqPacket if socket.listening => Err(Error::config(
                        field,
                        format!("a {socket} is no endpoint: accept its connection first"),
                    )
                    .with_reason("listening")),
                    SocketType::Datagram | SocketType::SeqPacket => {
                        Ok(Self::Port(PortSpec::Datagram { fd, socket, kind: PacketKind::Ip, field }))
                    }
                    SocketType::Stream => {
                        Ok(Self::Fd(FdSpec { fd, kind, field, options: SocketOptions::default() }))
                    }
                    SocketType::Other(_) => Err(Error::config(field, format!("a {socket} is no endpoint"))
                        .with_reason("not_an_endpoint")),
                }
            }
            _ => Ok(Self::Fd(FdSpec { fd, kind, field, options: SocketOptions::default() })),
        }
    }

    /// This process's standard input and output; both stay open for their other users.
    pub fn stdio(field: &'static str) -> Result<Self> {
        let half = |number| FdSpec::new(fd::duplicate(number, field)?, field, SocketOptions::default());
        Ok(Self::FdPair { read: half(libc::STDIN_FILENO)?, write: half(libc::STDOUT_FILENO)? })
    }

    /// Whether it carries packets.
    pub fn is_port(&self) -> bool {
        match self {
            Self::Tcp { .. } | Self::Unix(_) | Self::Listen { .. } => false,
            Self::Fd(_) | Self::FdPair { .. } | Self::Stream(_) | Self::Door(_) | Self::Accepted(_) => false,
            Self::Joined(_) => false,
            Self::Port(_) => true,
        }
    }

    /// Whether opening it waits for a peer to come.
    pub fn is_listener(&self) -> bool {
        match self {
            Self::Listen { .. } => true,
            Self::Fd(spec) => spec.is_listener(),
            Self::Joined(halves) => halves.0.is_listener() || halves.1.is_listener(),
            Self::Tcp { .. } | Self::Unix(_) | Self::FdPair { .. } | Self::Stream(_) => false,
            Self::Door(_) | Self::Accepted(_) | Self::Port(_) => false,
        }
    }

    /// Whether opening it makes a connection, or looks a name up.
    pub fn connects(&self) -> bool {
        match self {
            Self::Tcp { .. } | Self::Unix(_) | Self::Listen { .. } => true,
            Self::Port(spec) => matches!(spec, PortSpec::Udp { .. }),
            Self::Joined(halves) => halves.0.connects() || halves.1.connects(),
            Self::Fd(_) | Self::FdPair { .. } | Self::Stream(_) | Self::Door(_) | Self::Accepted(_) => false,
        }
    }

    /// Finds what is wrong with it without waiting: a host that can be none, a socket without a peer, a
    /// descriptor that does not allow what is asked of it. Whoever knows the option to blame adds it.
    pub fn check(&self, needs: Access) -> Result<()> {
        match self {
            Self::Tcp { host, .. } => check_host(host),
            Self::Unix(address) => address.to_system().map(drop),
            Self::Listen { address: ListenAddress::Tcp { host: Some(host), .. }, .. } => check_host(host),
            Self::Listen { address: ListenAddress::Unix(address), .. } => address.to_system().map(drop),
            Self::Listen { .. } | Self::Stream(_) | Self::Door(_) | Self::Accepted(_) => Ok(()),
            Self::Joined(halves) if halves.0.is_port() || halves.1.is_port() => {
                Err(Error::new(ErrorKind::Config, "packets cannot be joined to a stream")
                    .with_reason("packets"))
            }
            Self::Joined(halves) => {
                halves.0.check(Access::READ)?;
                halves.1.check(Access::WRITE)
            }
            Self::Fd(spec) => spec.check(needs),
            Self::FdPair { read, write } => {
                read.check(Access::READ)?;
                write.check(Access::WRITE)
            }
            Self::Port(spec) => spec.check(needs),
        }
    }

    /// Opens it, on the event loop that will use it.
    pub async fn open(self, options: &OpenOptions) -> Result<Opened> {
        let deadline = Instant::now() + options.connect;
        let stream: BoxStream = match self {
            Self::Tcp { host, port, options } => {
                Box::new(connect_tcp(&host, port, &options, deadline).await?)
            }
            Self::Unix(address) => Box::new(connect_unix(&address, deadline).await?),
            Self::Listen { address, options: listen } => {
                let listener = Listener::bind(&address, &listen, deadline).await?;
                accept_one(listener, options.accept).await?
            }
            Self::Fd(spec) if spec.is_listener() => {
                let listen = ListenOptions { socket: spec.options, ..ListenOptions::default() };
                let listener = Listener::adopt(vec![spec.fd], spec.field, &listen)?;
                accept_one(listener, options.accept).await?
            }
            Self::Fd(spec) => spec.open()?,
            Self::FdPair { read, write } => {
                open_pair(read.fd, write.fd, [read.field, write.field], &read.options)?
            }
            Self::Stream(stream) => stream,
            Self::Door(door) => door.take()?,
            Self::Accepted(socket) => Box::new(socket.open()?),
            Self::Joined(halves) => {
                let (read, write) = *halves;
                let read = Box::pin(read.open_stream(options)).await?;
                join(read, Box::pin(write.open_stream(options)).await?)
            }
            Self::Port(spec) => {
                return Ok(Opened::Port(open_port(spec, options.max_packet, deadline).await?));
            }
        };
        Ok(Opened::Stream(stream))
    }

    async fn open_stream(self, options: &OpenOptions) -> Result<BoxStream> {
        match self.open(options).await? {
            Opened::Stream(stream) => Ok(stream),
            Opened::Port(_) => Err(Error::new(ErrorKind::Config, "packets cannot be joined to a stream")),
        }
    }
}

/// Refuses a descriptor that is not open in a direction in which it will be used.
pub(crate) fn check_access(
    fd: BorrowedFd<'_>,
    kind: &FdKind,
    field: &'static str,
    needs: Access,
) -> Result<()> {
    let allowed = fd::checked_access(fd, kind, field)?;
    let missing = match (needs.read && !allowed.read, needs.write && !allowed.write) {
        (true, _) => "reading",
        (_, true) => "writing",
        _ => return Ok(()),
    };
    let message = format!("this {kind} is not open for {missing}");
    Err(Error::config(field, message).with_reason("wrong_direction"))
}

pub(crate) fn not_connected(kind: &FdKind, field: &'static str) -> Error {
    Error::config(field, format!("this {kind} is not connected")).with_reason("not_connected")
}

async fn accept_one(listener: Listener, patience: Option<Duration>) -> Result<BoxStream> {
    let at = listener.local_addresses().iter().map(Address::to_string).collect::<Vec<_>>().join(", ");
    let accepting = listener.accept_one();
    let accepted = match patience {
        None => accepting.await?,
        Some(patience) => timeout(patience, accepting).await.unwrap_or_else(|_| {
            let message = format!("nobody connected to {at} within {}", seconds(patience));
            Err(Error::new(ErrorKind::ConnectDeadline, message).with_phase(Phase::Connect))
        })?,
    };
    Ok(Box::new(accepted.stream))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::stream::ops::{read_full, send_eof, write_all};

    const SOON: OpenOptions = OpenOptions {
        connect: Duration::from_secs(20),
        accept: Some(Duration::from_secs(20)),
        max_packet: 1500,
    };

    async fn open(spec: EndpointSpec) -> BoxStream {
        assert!(!spec.is_port());
        match spec.open(&SOON).await.unwrap() {
            Opened::Stream(stream) => stream,
            Opened::Port(_) => panic!("a stream's specification opened a port"),
        }
    }

    fn spec(fd: impl Into<OwnedFd>) -> FdSpec {
        FdSpec::new(fd.into(), "sink", SocketOptions::default()).unwrap()
    }

    async fn say_hello(mut one: BoxStream, mut other: BoxStream) {
        write_all(one.as_mut(), b"hello").await.unwrap();
        send_eof(one.as_mut()).await.unwrap();
        let mut buf = [0; 8];
        assert_eq!(read_full(other.as_mut(), &mut buf).await.unwrap(), 5);
    }

    #[tokio::test]
    async fn a_listener_takes_one_connection_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let address = UnixAddress::Path(path.clone());
        let listen = EndpointSpec::Listen {
            address: ListenAddress::Unix(address.clone()),
            options: ListenOptions::default(),
        };
        assert!(listen.is_listener());
        // The first poll binds, so the connector finds the path.
        let (accepted, connected) = tokio::join!(biased; open(listen), open(EndpointSpec::Unix(address)));
        assert!(!path.exists(), "the path goes with the listener");
        say_hello(connected, accepted).await;
    }

    #[tokio::test]
    async fn a_listening_descriptor_gives_its_one_connection() {
        let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listening.local_addr().unwrap().port();
        let listen = EndpointSpec::Fd(spec(listening.try_clone().unwrap()));
        assert!(listen.is_listener());
        let connect =
            EndpointSpec::Tcp { host: "127.0.0.1".into(), port, options: ConnectOptions::default() };
        let (accepted, connected) = tokio::join!(open(listen), open(connect));
        say_hello(accepted, connected).await;
        // The caller's own listener still works as it did: it blocks.
        assert_eq!(fd::open_flags(listening.as_fd()).unwrap() & libc::O_NONBLOCK, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_comes() {
        let options = ListenOptions::default();
        let address = ListenAddress::Tcp { host: Some("127.0.0.1".into()), port: 0 };
        let opening = EndpointSpec::Listen { address, options }.open(&SOON).await;
        let error = opening.err().expect("nobody connects");
        assert_eq!(error.kind(), ErrorKind::ConnectDeadline);
        assert!(error.message().contains("127.0.0.1:"), "{error}");
    }

    #[tokio::test]
    async fn descriptors_alone_and_in_pairs() {
        let (one, other) = UnixStream::pair().unwrap();
        say_hello(open(EndpointSpec::Fd(spec(one))).await, open(EndpointSpec::Fd(spec(other))).await).await;
        let ((read_one, write_one), (read_two, write_two)) =
            (std::io::pipe().unwrap(), std::io::pipe().unwrap());
        let one = open(EndpointSpec::FdPair { read: spec(read_two), write: spec(write_one) }).await;
        let other = open(EndpointSpec::FdPair { read: spec(read_one), write: spec(write_two) }).await;
        say_hello(one, other).await;
    }

    #[tokio::test]
    async fn what_cannot_be_opened_names_its_option() {
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let error = FdSpec::new(udp.into(), "sink", SocketOptions::default()).unwrap_err();
        assert_eq!(
            (error.kind(), error.field(), error.reason()),
            (ErrorKind::Config, Some("sink"), Some("packets"))
        );

        for kind in [socket2::Type::SEQPACKET, socket2::Type::RAW] {
            let (domain, protocol) = match kind {
                socket2::Type::RAW => (socket2::Domain::IPV4, Some(socket2::Protocol::ICMPV4)),
                _ => (socket2::Domain::UNIX, None),
            };
            // A raw socket takes a right that the tests may not have.
            let Ok(socket) = socket2::Socket::new(domain, kind, protocol) else { continue };
            if kind == socket2::Type::SEQPACKET {
                let name = format!("sapper seqpacket {}", std::process::id()).into_bytes();
                socket.bind(&UnixAddress::Abstract(name).to_system().unwrap()).unwrap();
                socket.listen(1).unwrap();
            }
            let error = EndpointSpec::from_fd(socket.into(), "sink").err().expect("no endpoint");
            assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("sink")), "{error}");
        }

        for family in NO_PAYLOAD {
            // The system may have none of it, or ask for a right.
            let kind = if family == libc::AF_ALG { socket2::Type::SEQPACKET } else { socket2::Type::DGRAM };
            let Ok(socket) = socket2::Socket::new(family.into(), kind, None) else { continue };
            let error = EndpointSpec::from_fd(socket.into(), "sink").err().expect("nobody's packets");
            assert_eq!((error.field(), error.reason()), (Some("sink"), Some("not_an_endpoint")), "{error}");
        }

        let (read, _write) = std::io::pipe().unwrap();
        let headed = EndpointSpec::from_fd_with_header(read.into(), "sink", Some(TunHeader::None));
        let error = headed.err().expect("a pipe has no header");
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("header")), "{error}");

        let unconnected = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let error = EndpointSpec::Fd(spec(unconnected)).open(&SOON).await.err().expect("not connected");
        assert_eq!((error.field(), error.reason()), (Some("sink"), Some("not_connected")));

        let (read, write) = std::io::pipe().unwrap();
        let swapped = EndpointSpec::FdPair { read: spec(write), write: spec(read) };
        let error = swapped.open(&SOON).await.err().expect("the wrong way round");
        assert_eq!((error.field(), error.reason()), (Some("sink"), Some("wrong_direction")));
    }

    const BOTH: Access = Access { read: true, write: true };

    fn mistake(spec: &EndpointSpec, needs: Access) -> Option<&'static str> {
        let error = spec.check(needs).err()?;
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        Some(error.reason().unwrap_or("no reason"))
    }

    #[test]
    fn a_mistake_is_found_without_opening() {
        let socket = |domain, kind| -> OwnedFd { socket2::Socket::new(domain, kind, None).unwrap().into() };
        for (domain, kind) in [
            (socket2::Domain::IPV4, socket2::Type::STREAM),
            (socket2::Domain::IPV6, socket2::Type::STREAM),
            (socket2::Domain::UNIX, socket2::Type::STREAM),
            (socket2::Domain::IPV4, socket2::Type::DGRAM),
            (socket2::Domain::UNIX, socket2::Type::DGRAM),
            (socket2::Domain::UNIX, socket2::Type::SEQPACKET),
        ] {
            let spec = EndpointSpec::from_fd(socket(domain, kind), "sink").unwrap();
            assert_eq!(mistake(&spec, BOTH), Some("not_connected"), "{domain:?} {kind:?}");
        }
        // From one that is bound, datagrams can be read all the same.
        let bound =
            EndpointSpec::from_fd(socket(socket2::Domain::UNIX, socket2::Type::DGRAM), "sink").unwrap();
        assert_eq!(mistake(&bound, Access::READ), None);

        let (read, write) = std::io::pipe().unwrap();
        let (read, write) = (OwnedFd::from(read), OwnedFd::from(write));
        for (fd, fine) in [(&read, Access::READ), (&write, Access::WRITE)] {
            let half = EndpointSpec::Fd(spec(fd.try_clone().unwrap()));
            assert_eq!(mistake(&half, fine), None);
            assert_eq!(mistake(&half, BOTH), Some("wrong_direction"));
        }
        let pair = |read: &OwnedFd, write: &OwnedFd| EndpointSpec::FdPair {
            read: spec(read.try_clone().unwrap()),
            write: spec(write.try_clone().unwrap()),
        };
        assert_eq!(mistake(&pair(&read, &write), BOTH), None);
        assert_eq!(mistake(&pair(&write, &read), BOTH), Some("wrong_direction"));

        let host = EndpointSpec::Tcp { host: "a\0b".into(), port: 1, options: ConnectOptions::default() };
        assert_eq!(mistake(&host, BOTH), Some("host"));
        let long = UnixAddress::Path("x".repeat(108).into());
        assert!(mistake(&EndpointSpec::Unix(long.clone()), BOTH).is_some());
        let address = ListenAddress::Unix(long);
        assert!(
            mistake(&EndpointSpec::Listen { address, options: ListenOptions::default() }, BOTH).is_some()
        );
    }

    #[test]
    fn a_connection_that_is_gone_is_no_mistake() {
        let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = std::net::TcpStream::connect(listening.local_addr().unwrap()).unwrap();
        let theirs = listening.accept().unwrap().0;
        socket2::SockRef::from(&theirs).set_linger(Some(Duration::ZERO)).unwrap();
        drop(theirs);
        // The reset is there: nothing else makes a read fail.
        assert!(std::io::Read::read(&mut &ours, &mut [0]).is_err());
        assert_eq!(mistake(&EndpointSpec::Fd(spec(ours)), BOTH), None);
        let (one, other) = UnixStream::pair().unwrap();
        drop(other);
        assert_eq!(mistake(&EndpointSpec::Fd(spec(one)), BOTH), None);
    }
}

//! Packet ports as plain data, opened on the event loop that will use them.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::time::Instant;

use super::counter::CounterPort;
use super::datagram::{DatagramOptions, DatagramPort};
use super::tun::{TunOptions, TunPort};
use super::{BoxPort, PacketKind};
use crate::endpoint::{check_access, not_connected};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::fd::{self, Access, FdKind, SocketKind, SocketType};
use crate::stream::address::UnixAddress;
use crate::stream::connect::unix_socket;
use crate::stream::resolve::{check_host, resolve};

/// A packet port, not open yet. `field` is the option to blame for what it names.
#[derive(Debug)]
pub enum PortSpec {
    /// A TUN or TAP interface by name, created where it does not exist. The network namespace is that
    /// of the I/O threads: for another one, open the interface there and hand the descriptor over.
    Tun {
        /// The interface; an empty name, or one with `%d`, lets the system choose.
        name: String,
        /// What it is to be.
        options: TunOptions,
        /// The option it came in.
        field: &'static str,
    },
    /// A TUN or TAP descriptor that is ours.
    TunFd {
        /// The descriptor.
        fd: OwnedFd,
        /// What lies in front of each packet, and whether to use offload.
        options: TunOptions,
        /// The option it came in.
        field: &'static str,
    },
    /// A connected datagram or sequenced-packet socket that is ours.
    Datagram {
        /// The socket.
        fd: OwnedFd,
        /// What it was found to be.
        socket: SocketKind,
        /// What lies at a packet's first byte.
        kind: PacketKind,
        /// The option it came in.
        field: &'static str,
    },
    /// A Unix datagram socket to connect to.
    UnixDatagram {
        /// The other end's name.
        path: UnixAddress,
        /// Our own name, without which the other end cannot answer. A path goes with the port.
        bind: Option<UnixAddress>,
        /// The option it came in.
        field: &'static str,
    },
    /// A Unix sequenced-packet socket to connect to: packets with an end.
    Seqpacket {
        /// Its name.
        path: UnixAddress,
        /// The option it came in.
        field: &'static str,
    },
    /// A UDP socket with one peer.
    Udp {
        /// The peer's name, or its address in text.
        host: String,
        /// The peer's port.
        port: u16,
        /// Where it is bound; `None` lets the system choose.
        bind: Option<SocketAddr>,
        /// The option it came in.
        field: &'static str,
    },
    /// Counts what it is given, and gives nothing.
    Counter,
}

impl PortSpec {
    /// Finds what is wrong with it without waiting: see [`crate::endpoint::EndpointSpec::check`].
    pub fn check(&self, needs: Access) -> Result<()> {
        match self {
            Self::TunFd { fd, field, options } => {
                check_access(fd.as_fd(), &fd::classify(fd.as_fd(), field)?, field, needs)?;
                TunPort::check(fd.as_fd(), options)
            }
            // From a Unix socket datagrams can be read without a peer to send them to.
            Self::Datagram { socket, .. }
                if !needs.write
                    && socket.socket_type == SocketType::Datagram
                    && socket.domain == libc::AF_UNIX =>
            {
                Ok(())
            }
            Self::Datagram { fd, socket, field, .. } if !fd::has_peer(fd.as_fd()) => {
                Err(not_connected(&FdKind::Socket(*socket), field))
            }
            Self::Datagram { .. } => Ok(()),
            Self::UnixDatagram { path, bind, .. } => {
                path.to_system()?;
                bind.as_ref().map_or(Ok(()), |own| own.to_system().map(drop))
            }
            Self::Seqpacket { path, .. } => path.to_system().map(drop),
            Self::Udp { host, bind, .. } => {
                check_host(host)?;
                // A name may have addresses of both versions.
                let address = host.split('%').next().and_then(|address| address.parse::<IpAddr>().ok());
                match (address, bind) {
                    (Some(peer), Some(own)) if peer.is_ipv4() != own.is_ipv4() => {
                        Err(of_another_version(host, *bind))
                    }
                    _ => Ok(()),
                }
            }
            Self::Tun { .. } | Self::Counter => Ok(()),
        }
    }

    /// What an interface's packets are; other ports carry anything.
    pub fn interface(&self) -> Option<PacketKind> {
        let ethernet = match self {
            Self::Tun { options, .. } => options.ethernet,
            Self::TunFd { fd, field, .. } => match fd::classify(fd.as_fd(), field) {
                Ok(FdKind::Tun(tun)) => tun.flags & libc::IFF_TAP != 0,
                _ => return None,
            },
            _ => return None,
        };
        Some(if ethernet { PacketKind::Ethernet } else { PacketKind::Ip })
    }
}

/// Opens it; looking a name up and a listener whose queue is full may take until the deadline, nothing else waits. `max_packet` is the
/// largest packet that the caller will move; an interface has its MTU.
pub async fn open_port(spec: PortSpec, max_packet: usize, deadline: Instant) -> Result<BoxPort> {
    let datagram = |fd: OwnedFd, kind| DatagramPort::new(fd, DatagramOptions { max_packet, kind });
    Ok(match spec {
        PortSpec::Tun { name, options, field } => {
            Box::new(TunPort::open(&name, &options).map_err(|error| error.with_field(field))?)
        }
        PortSpec::TunFd { fd, options, field } => {
            Box::new(TunPort::adopt(fd, &options).map_err(|error| error.with_field(field))?)
        }
        PortSpec::Datagram { fd, kind, field, .. } => {
            Box::new(datagram(fd, kind).map_err(|error| error.with_field(field))?)
        }
        PortSpec::UnixDatagram { path, bind, field } => {
            let (socket, bound) =
                connect_unix_datagram(&path, bind.as_ref()).map_err(|error| error.with_field(field))?;
            Box::new(datagram(socket.into(), PacketKind::Ip)?.with_bound_path(bound))
        }
        PortSpec::Seqpacket { path, field } => {
            let what = format!("connect to {path}");
            let socket = unix_socket(Type::SEQPACKET, &path, &what, deadline).await;
            let socket = socket.map_err(|error| error.with_field(field))?;
            Box::new(datagram(socket.into(), PacketKind::Ip)?)
        }
        PortSpec::Udp { host, port, bind, field } => {
            let socket = connect_udp(&host, port, bind, deadline).await;
            let socket = socket.map_err(|error| error.with_field(field))?;
            Box::new(datagram(socket.into(), PacketKind::Ip)?)
        }
        PortSpec::Counter => Box::new(CounterPort::new(max_packet)),
    })
}

/// A path that a socket was bound to; it goes with its owner.
#[derive(Debug)]
pub(super) struct BoundPath(PathBuf);

impl Drop for BoundPath {
    fn drop(&mut self) {
        // Somebody may have removed it before us.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn connect_unix_datagram(
    to: &UnixAddress,
    bind: Option<&UnixAddress>,
) -> Result<(Socket, Option<BoundPath>)> {
    let address = to.to_system()?;
    let socket = new_socket(Domain::UNIX, Type::DGRAM)?;
    let mut bound = None;
    if let Some(own) = bind {
        socket.bind(&own.to_system()?).map_err(|source| failed(ErrorKind::Bind, "bind to", own, &source))?;
        if let UnixAddress::Path(path) = own {
            bound = Some(BoundPath(path.clone()));
        }
    }
    socket.connect(&address).map_err(|source| failed(ErrorKind::Connect, "connect to", to, &source))?;
    Ok((socket, bound))
}

/// A UDP connection sends nothing, so the first address that the system has a way to is it.
async fn connect_udp(host: &str, port: u16, bind: Option<SocketAddr>, deadline: Instant) -> Result<Socket> {
    let peers = resolve(host, port, deadline).await?;
    let mut last = None;
    for peer in peers {
        if bind.is_some_and(|own| own.is_ipv4() != peer.is_ipv4()) {
            continue;
        }
        let socket = new_socket(Domain::for_address(peer), Type::DGRAM)?;
        if let Some(own) = bind {
            socket.bind(&own.into()).map_err(|source| failed(ErrorKind::Bind, "bind to", &own, &source))?;
        }
        match socket.connect(&SockAddr::from(peer)) {
            Ok(()) => return Ok(socket),
            Err(source) => last = Some(failed(ErrorKind::Connect, "connect to", &peer, &source)),
        }
    }
    Err(last.unwrap_or_else(|| of_another_version(host, bind)))
}

fn of_another_version(host: &str, bind: Option<SocketAddr>) -> Error {
    let own = bind.map(|own| own.to_string()).unwrap_or_default();
    Error::new(ErrorKind::Config, format!("{host} has no address of the IP version of {own}"))
}

fn new_socket(domain: Domain, socket_type: Type) -> Result<Socket> {
    let failed = |source: std::io::Error| {
        Error::io(ErrorKind::Connect, "make a socket", &source).with_phase(Phase::Connect)
    };
    let socket = Socket::new(domain, socket_type, None).map_err(failed)?;
    // A receiver whose queue is full would make a blocking send wait.
    socket.set_nonblocking(true).map_err(failed)?;
    Ok(socket)
}

fn failed(kind: ErrorKind, what: &str, name: &dyn std::fmt::Display, source: &std::io::Error) -> Error {
    Error::io(kind, format_args!("{what} {name}"), source).with_phase(Phase::Connect)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    use sapper_proto::packet::PacketMeta;

    use super::super::{PacketPort, take_batch};
    use super::*;

    async fn open(spec: PortSpec) -> Result<BoxPort> {
        open_port(spec, 1500, Instant::now() + Duration::from_secs(20)).await
    }

    async fn send(port: &mut dyn PacketPort, data: &[u8]) {
        let mut batch = take_batch();
        batch.push(data, PacketMeta::default());
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    }

    #[tokio::test]
    async fn unix_sockets_are_connected_and_their_own_path_goes_with_them() {
        let directory = tempfile::tempdir().unwrap();
        let (theirs, ours) = (directory.path().join("theirs"), directory.path().join("ours"));
        let far = UnixDatagram::bind(&theirs).unwrap();
        let spec = PortSpec::UnixDatagram {
            path: UnixAddress::Path(theirs),
            bind: Some(UnixAddress::Path(ours.clone())),
            field: "sink",
        };
        let mut port = open(spec).await.unwrap();
        send(port.as_mut(), b"to them").await;
        let mut buffer = [0; 20];
        let (n, from) = far.recv_from(&mut buffer).unwrap();
        assert_eq!((n, from.as_pathname()), (7, Some(ours.as_path())));
        far.send_to(b"to us", &ours).unwrap();
        let mut batch = take_batch();
        assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap());
        assert_eq!(batch.get(0).unwrap().data, b"to us");
        drop(port);
        assert!(!ours.exists());
    }

    #[tokio::test]
    async fn udp_is_connected_by_name_and_by_address() {
        for (host, address) in
            [("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0"), ("localhost", "127.0.0.1:0")]
        {
            let far = std::net::UdpSocket::bind(address).unwrap();
            let port = far.local_addr().unwrap().port();
            let bind = Some(address.parse().unwrap());
            let spec = PortSpec::Udp { host: host.to_owned(), port, bind, field: "sink" };
            let mut port = open(spec).await.unwrap();
            send(port.as_mut(), b"by address").await;
            assert_eq!(far.recv(&mut [0; 20]).unwrap(), 10);
        }
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_said_by_kind_and_field() {
        let seqpacket =
            |path: &str| PortSpec::Seqpacket { path: UnixAddress::Path(path.into()), field: "sink" };
        let error = open(seqpacket("/nowhere/at/all")).await.err().unwrap();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::Connect, Some(Phase::Connect)));
        assert!(error.message().contains("/nowhere/at/all"));
        assert_eq!(error.field(), Some("sink"));
        let error = open(seqpacket(&"x".repeat(200))).await.err().unwrap();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("sink")));
        let bind = Some("127.0.0.1:0".parse().unwrap());
        let spec = PortSpec::Udp { host: "::1".to_owned(), port: 9, bind, field: "sink" };
        let error = open(spec).await.err().unwrap();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("sink")));
    }

    #[tokio::test]
    async fn a_counter_needs_nothing() {
        let mut port = open(PortSpec::Counter).await.unwrap();
        send(port.as_mut(), b"counted").await;
        assert_eq!(port.stats().packets_sent.get(), 1);
    }
}

//! Packet ports as plain data, opened on the event loop that will use them.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use socket2::{Domain, SockAddr, Socket, Type};

use super::counter::CounterPort;
use super::datagram::{DatagramOptions, DatagramPort};
use super::tun::{TunOptions, TunPort};
use super::{BoxPort, PacketKind};
use crate::error::{Error, ErrorKind, Phase, Result};

/// A packet port, not open yet.
#[derive(Debug)]
pub enum PortSpec {
    /// Takes and counts every packet.
    Counter,
    /// A TUN or TAP interface by name, created where it does not exist. The network namespace is that
    /// of the I/O threads: for another one, open the interface there and hand the descriptor over.
    Tun {
        /// The interface; an empty name, or one with `%d`, lets the system choose.
        name: String,
        /// What it is to be.
        options: TunOptions,
    },
    /// A TUN or TAP descriptor that is ours.
    TunFd {
        /// The descriptor.
        fd: OwnedFd,
        /// What lies in front of each packet, and whether to use offload.
        options: TunOptions,
    },
    /// A connected datagram or sequenced-packet socket that is ours.
    Datagram {
        /// The socket.
        fd: OwnedFd,
        /// What lies at a packet's first byte.
        kind: PacketKind,
    },
    /// A Unix socket of packets to connect to.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Sequenced packets instead of datagrams: only these have an end.
        sequenced: bool,
        /// What lies at a packet's first byte.
        kind: PacketKind,
    },
    /// A UDP socket with one peer.
    Udp {
        /// Where it is bound; `None` lets the system choose.
        local: Option<SocketAddr>,
        /// The peer.
        peer: SocketAddr,
        /// What lies at a packet's first byte.
        kind: PacketKind,
    },
}

/// Opens it. `max_packet` is the largest packet that the caller will move; an interface has its MTU.
pub async fn open_port(spec: PortSpec, max_packet: usize) -> Result<BoxPort> {
    let datagram = |fd: OwnedFd, kind| -> Result<BoxPort> {
        Ok(Box::new(DatagramPort::new(fd, DatagramOptions { max_packet, kind })?))
    };
    match spec {
        PortSpec::Counter => Ok(Box::new(CounterPort::new(max_packet))),
        PortSpec::Tun { name, options } => Ok(Box::new(TunPort::open(&name, &options)?)),
        PortSpec::TunFd { fd, options } => Ok(Box::new(TunPort::adopt(fd, &options)?)),
        PortSpec::Datagram { fd, kind } => datagram(fd, kind),
        PortSpec::Unix { path, sequenced, kind } => {
            let socket_type = if sequenced { Type::SEQPACKET } else { Type::DGRAM };
            let address = SockAddr::unix(&path)
                .map_err(|_| Error::config("path", format!("{} is too long", path.display())))?;
            let socket = connect(Domain::UNIX, socket_type, None, &address, &path.display())?;
            datagram(socket.into(), kind)
        }
        PortSpec::Udp { local, peer, kind } => {
            if let Some(local) = local
                && local.is_ipv4() != peer.is_ipv4()
            {
                return Err(Error::config("local", format!("{local} cannot reach {peer}: other IP version")));
            }
            let local = local.map(SockAddr::from);
            let socket = connect(Domain::for_address(peer), Type::DGRAM, local, &peer.into(), &peer)?;
            datagram(socket.into(), kind)
        }
    }
}

/// Connects a socket whose connecting waits for nobody.
fn connect(
    domain: Domain,
    socket_type: Type,
    local: Option<SockAddr>,
    to: &SockAddr,
    name: &dyn std::fmt::Display,
) -> Result<Socket> {
    let failed = |kind, what: &str, source: &std::io::Error| {
        Error::io(kind, format_args!("{what} {name}"), source).with_phase(Phase::Connect)
    };
    let socket = Socket::new(domain, socket_type, None)
        .map_err(|source| failed(ErrorKind::Connect, "make a socket for", &source))?;
    // A listener with a full queue would make a blocking connect wait.
    socket
        .set_nonblocking(true)
        .map_err(|source| failed(ErrorKind::Connect, "set up the socket for", &source))?;
    if let Some(local) = local {
        socket.bind(&local).map_err(|source| failed(ErrorKind::Bind, "bind the socket for", &source))?;
    }
    socket.connect(to).map_err(|source| failed(ErrorKind::Connect, "connect to", &source))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::os::unix::net::UnixDatagram;

    use sapper_proto::packet::PacketMeta;

    use super::super::{PacketPort, take_batch};
    use super::*;

    async fn send(port: &mut dyn PacketPort, data: &[u8]) {
        let mut batch = take_batch();
        batch.push(data, PacketMeta::default());
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    }

    #[tokio::test]
    async fn sockets_are_connected_by_path_and_by_address() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let far = UnixDatagram::bind(&path).unwrap();
        let kind = PacketKind::Ip;
        let spec = PortSpec::Unix { path: path.clone(), sequenced: false, kind };
        let mut port = open_port(spec, 1500).await.unwrap();
        send(port.as_mut(), b"by path").await;
        let mut buffer = [0; 20];
        assert_eq!(far.recv(&mut buffer).unwrap(), 7);

        for address in ["127.0.0.1:0", "[::1]:0"] {
            let far = std::net::UdpSocket::bind(address).unwrap();
            let peer = far.local_addr().unwrap();
            let local = Some(address.parse().unwrap());
            let mut port = open_port(PortSpec::Udp { local, peer, kind }, 1500).await.unwrap();
            send(port.as_mut(), b"by address").await;
            assert_eq!(far.recv(&mut buffer).unwrap(), 10);
        }
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_said_by_kind_and_field() {
        let kind = PacketKind::Ip;
        let path = PathBuf::from("/nowhere/at/all");
        let error = open_port(PortSpec::Unix { path, sequenced: true, kind }, 1500).await.err().unwrap();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::Connect, Some(Phase::Connect)));
        assert!(error.message().contains("/nowhere/at/all"));
        let path = PathBuf::from("x".repeat(200));
        let error = open_port(PortSpec::Unix { path, sequenced: true, kind }, 1500).await.err().unwrap();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("path")));
        let local = Some("127.0.0.1:0".parse().unwrap());
        let peer = "[::1]:9".parse().unwrap();
        let error = open_port(PortSpec::Udp { local, peer, kind }, 1500).await.err().unwrap();
        assert_eq!(error.field(), Some("local"));
    }
}

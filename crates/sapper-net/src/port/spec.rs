//! Packet ports as plain data, opened on the event loop that will use them.

use std::os::fd::OwnedFd;

use super::datagram::{DatagramOptions, DatagramPort};
use super::{BoxPort, PacketKind};
use crate::error::Result;

/// A packet port, not open yet.
#[derive(Debug)]
pub enum PortSpec {
    /// A connected datagram or sequenced-packet socket that is ours.
    Datagram {
        /// The socket.
        fd: OwnedFd,
        /// What lies at a packet's first byte.
        kind: PacketKind,
    },
}

/// Opens it. `max_packet` is the largest packet that the caller will move.
pub async fn open_port(spec: PortSpec, max_packet: usize) -> Result<BoxPort> {
    match spec {
        PortSpec::Datagram { fd, kind } => {
            Ok(Box::new(DatagramPort::new(fd, DatagramOptions { max_packet, kind })?))
        }
    }
}

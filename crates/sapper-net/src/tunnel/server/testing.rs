//! A server's options for tests.

use std::time::Duration;

use sapper_proto::tunnel::ip_list::VisitorRule;
use sapper_proto::tunnel::mux::Overflow;

use super::ServerOptions;
use crate::tunnel::Common;
use crate::tunnel::limit::Limits;

/// The first of its public ports.
pub(super) const FIRST: u16 = 40_000;

/// With so many public ports.
pub(super) fn options(ports: u16) -> ServerOptions {
    ServerOptions {
        host: None,
        port: 0,
        visitor_host: None,
        public_ports: (FIRST, FIRST + ports - 1),
        asked_ports: None,
        asked_hosts: Vec::new(),
        max_services: 1,
        tls: None,
        visitor_tls: None,
        filter: None,
        visitors: VisitorRule::default(),
        visitor_filter: None,
        service_filter: None,
        visitor_rate: None,
        max_clients: 100,
        max_handshakes: 100,
        max_visitors: 1,
        max_streams: 1,
        visitor_limits: Limits::default(),
        client_limits: Limits::default(),
        service_limits: Limits::default(),
        lease_file: None,
        shared_leases: false,
        lease_time: Duration::from_secs(86_400),
        common: Common {
            handshake_timeout: Duration::from_secs(10),
            grace: Duration::ZERO,
            overflow: Overflow::Pause,
            linger: Duration::ZERO,
        },
    }
}

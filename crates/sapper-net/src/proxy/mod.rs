//! The TLS proxy: terminates, originates or re-encrypts TLS for any TCP or Unix service, or passes it on
//! by the name that the client asks for.
//!
//! - [`Proxy`]: the handle. Any thread may hold it.
//! - `accept`: one task that accepts and hands connections to the I/O threads.
//! - `connection`: one task a connection: PROXY header, hello, TLS, the pump; `reach`: the way to the service.
//! - `upgrade`: what is said between TLS and payload, `two_sided` where that goes through both ends; `route`: which service; `limits`: how many, how often; `metrics`: what happened.
//!
//! What a connection is served by ([`ServiceOptions`]) is exchanged as a whole by [`Proxy::reload`];
//! connections keep what they began with. What is not here: TLS itself, and how credentials are read again
//! ([`crate::tls`]).

mod accept;
mod connection;
mod control;
mod header;
mod limits;
mod metrics;
mod reach;
mod route;
mod two_sided;
mod upgrade;

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

pub use control::Proxy;
pub(crate) use limits::Buckets;
pub use limits::Rate;
pub use metrics::{ConnectionSnapshot, ProxyEvent, ProxyState, ProxyStats};
use route::Routes;
use sapper_proto::proxy_protocol;
use sapper_proto::upgrade::Upgrade;

use crate::error::{Error, Result};
use crate::stream::address::UnixAddress;
use crate::stream::listen::{ListenAddress, ListenOptions};
use crate::tls::Role;
use crate::tls::config::TlsConfig;
use crate::tls::options::IpRange;

/// Services of one way: their tries share one deadline.
const MAX_UPSTREAMS: usize = 32;

/// Everything that a proxy is made from.
pub struct ProxyOptions {
    /// Where it listens; all of them share one limit of connections.
    pub listen: Vec<Listen>,
    /// How.
    pub listen_options: ListenOptions,
    /// What connections are served by.
    pub service: ServiceOptions,
}

/// A place to listen at.
pub enum Listen {
    /// Bound here.
    Address(ListenAddress),
    /// A listening socket that is ours (a service manager's, or a caller's duplicate).
    Socket(OwnedFd),
}

/// What a connection is served by.
pub struct ServiceOptions {
    /// Where connections go. One without names takes those that no other one wants.
    pub routes: Vec<RouteOptions>,
    /// What all clients say in clear before their TLS: they speak before they name a server.
    pub upgrade: Option<Upgrade>,
    /// Who is believed about the client behind it: connections from there must begin with a PROXY header.
    pub proxy_from: Vec<IpRange>,
    /// Whether clients of our Unix sockets are believed as well.
    pub proxy_from_unix: bool,
    /// Handshakes under way at a time. Further ones wait for their turn, under their deadline.
    pub max_handshakes: u32,
    /// New connections of one address.
    pub rate: Option<Rate>,
    /// Limits of waiting.
    pub deadlines: Deadlines,
    /// Whether every connection's end is an event, not only those that went wrong.
    pub tell_connections: bool,
}

/// Limits of a proxy's waiting.
#[derive(Clone, Debug)]
pub struct Deadlines {
    /// From the accepted connection to the end of the client's handshake, PROXY header included.
    pub handshake: Duration,
    /// Finding the service, connecting, and its handshake.
    pub connect: Duration,
    /// A connection on which nothing moves for this long ends.
    pub idle: Option<Duration>,
}

/// One way through the proxy.
#[derive(Clone)]
pub struct RouteOptions {
    /// Server names that take this way, `*.` in front for any one label. Empty: all others.
    pub names: Vec<String>,
    /// What clients speak.
    pub inbound: Inbound,
    /// Where the service is: the first one that answers. Those that just failed are tried last.
    pub upstreams: Vec<Upstream>,
    /// Connect with the client's address as ours, so that the service sees it (IP_TRANSPARENT).
    pub keep_source: bool,
    /// TLS to the service.
    pub upstream_tls: Option<UpstreamTls>,
    /// Tell the service who connected.
    pub send_proxy: Option<proxy_protocol::Version>,
}

/// What clients speak.
#[derive(Clone)]
pub enum Inbound {
    /// No TLS.
    Plain,
    /// TLS that ends here.
    Tls(Arc<TlsConfig>),
    /// TLS that is passed on as it is.
    PassThrough,
}

/// Where a service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstream {
    /// TCP, by name or address.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix stream socket.
    Unix(UnixAddress),
    /// Where the client wanted to go, before the system's rules led it here.
    Original,
}

/// TLS to a service.
#[derive(Clone)]
pub struct UpstreamTls {
    /// Shared configuration.
    pub config: Arc<TlsConfig>,
    /// Name to check and to send. `None` is the service's host, or where it has none the client's own wish.
    pub server_name: Option<String>,
    /// What is said in clear before it.
    pub upgrade: Option<Upgrade>,
}

impl std::fmt::Display for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(address) => write!(f, "unix:{address}"),
            Self::Original => f.write_str("original"),
        }
    }
}

/// Checked options, shared by the connections that they serve.
struct Service {
    routes: Routes,
    upgrade: Option<Upgrade>,
    /// Whether a way leads where the client wanted to go.
    goes_to_original: bool,
    proxy_from: Vec<IpRange>,
    proxy_from_unix: bool,
    max_handshakes: u32,
    rate: Option<Rate>,
    deadlines: Deadlines,
    tell_connections: bool,
}

impl Service {
    /// Finds what is wrong without waiting for anybody.
    fn check(options: ServiceOptions) -> Result<Self> {
        let ServiceOptions {
            routes,
            upgrade,
            proxy_from,
            proxy_from_unix,
            max_handshakes,
            rate,
            deadlines,
            tell_connections,
        } = options;
        for (field, time) in [
            ("handshake_timeout", Some(deadlines.handshake)),
            ("connect_timeout", Some(deadlines.connect)),
            ("idle_timeout", deadlines.idle),
        ] {
            if time.is_some_and(|time| time.is_zero()) {
                return Err(Error::config(field, "must be above zero"));
            }
        }
        if max_handshakes == 0 {
            return Err(Error::config("max_handshakes", "must be at least 1"));
        }
        if let Some(rate) = &rate {
            rate.check()?;
        }
        for (index, route) in routes.iter().enumerate() {
            let of_route = |error: Error| error.of_table(format_args!("routes.{index}"));
            check_upgrades(upgrade, route).map_err(|error| match error.field() {
                // One for all ways.
                Some("upgrade") => error,
                _ => of_route(error),
            })?;
            check_route(route).map_err(of_route)?;
        }
        let original = |route: &RouteOptions| route.upstreams.contains(&Upstream::Original);
        let goes_to_original = routes.iter().any(original);
        let routes = Routes::new(routes)?;
        Ok(Self {
            routes,
            upgrade,
            goes_to_original,
            proxy_from,
            proxy_from_unix,
            max_handshakes,
            rate,
            deadlines,
            tell_connections,
        })
    }
}

/// Finds what is wrong with one way; the field is as in a table of the ways.
fn check_route(route: &RouteOptions) -> Result<()> {
    if let Inbound::Tls(config) = &route.inbound {
        config.check(&Role::Server).map_err(of_clients)?;
    }
    if let Some(tls) = &route.upstream_tls {
        if matches!(route.inbound, Inbound::PassThrough) {
            return Err(Error::config(
                "pass_through",
                "the client's TLS goes to the service: no other TLS around it",
            ));
        }
        for upstream in &route.upstreams {
            let name = match (&tls.server_name, upstream) {
                (Some(name), _) | (None, Upstream::Tcp { host: name, .. }) => name.clone(),
                // Known when a client asks for one; where none does, its connection ends.
                (None, Upstream::Unix(_) | Upstream::Original) => continue,
            };
            let role = Role::Client { server_name: Some(name) };
            tls.config.check(&role).map_err(of_upstream)?;
        }
    }
    if route.upstreams.is_empty() || route.upstreams.len() > MAX_UPSTREAMS {
        return Err(Error::config("to", format!("names 1 to {MAX_UPSTREAMS} services")));
    }
    for (index, upstream) in route.upstreams.iter().enumerate() {
        if let Upstream::Unix(address) = upstream {
            let field = entry("to", index, route.upstreams.len());
            address.to_system().map_err(|error| Error::config(field, error.message()))?;
        }
    }
    Ok(())
}

/// What one of a list is called; the only one may have been given without a list.
fn entry(list: &'static str, index: usize, of: usize) -> Cow<'static, str> {
    if of == 1 { list.into() } else { format!("{list}.{index}").into() }
}

/// A mistake of the TLS with clients, which is a table of its own.
fn of_clients(error: Error) -> Error {
    error.of_table("tls").with_field("tls")
}

/// A mistake of the TLS to services, whose options are called as those of the TLS with clients are.
fn of_upstream(error: Error) -> Error {
    match error.field() {
        Some("server_hostname") => error.in_field("upstream_name"),
        _ => error.of_table("upstream_tls").with_field("upstream_tls"),
    }
}

/// Upgrades belong to TLS that begins or ends here, and both sides speak one protocol.
fn check_upgrades(upgrade: Option<Upgrade>, route: &RouteOptions) -> Result<()> {
    let upstream = route.upstream_tls.as_ref().and_then(|tls| tls.upgrade);
    if upgrade.is_some_and(Upgrade::is_two_sided) && !route.names.is_empty() {
        let text = "the service speaks before a client can name one: there is one way, without names";
        return Err(Error::config("upgrade", text).with_reason("two_sided"));
    }
    if upgrade.is_some() && !matches!(route.inbound, Inbound::Tls(_)) {
        return Err(Error::config("upgrade", "is for clients whose TLS ends here: it needs tls"));
    }
    if let (Some(one), Some(other)) = (upgrade, upstream)
        && !one.is_protocol_of(other)
    {
        return Err(Error::config("upstream_upgrade", format!("clients speak {}", one.name())));
    }
    Ok(())
}

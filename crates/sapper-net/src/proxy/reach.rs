//! The way to the service: the first one that answers of those that a route names.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sapper_proto::upgrade::Upgrade;
use tokio::time::{Instant, timeout_at};

use super::connection::Subject;
use super::control::Shared;
use super::metrics::{Connection, ProxyEvent};
use super::{Inbound, Upstream, header};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::address::Address;
use crate::stream::connect::{ConnectOptions, connect_tcp, connect_unix};
use crate::stream::fd::SocketOptions;
use crate::stream::{BoxStream, ops};
use crate::tls::Role;
use crate::tls::config::TlsConfig;
use crate::tls::stream::TlsStream;
use crate::upgrade::{NO_APPLICATION_PROTOCOL, Upgrading};

/// Asks a silent service whether it is still there, so that a lost one does not hold a client for ever.
const KEEPALIVE: Duration = Duration::from_secs(120);

/// A service, ready but for what an upgrade still says behind its TLS.
pub(super) struct Reached {
    pub(super) stream: BoxStream,
    pub(super) upgrading: Option<Box<Upgrading>>,
    /// Its TLS, where that needs the client ([`super::two_sided`]).
    pub(super) pending: Option<Pending>,
}

/// TLS to a service that was not begun.
pub(super) struct Pending {
    pub(super) upgrade: Upgrade,
    pub(super) config: Arc<TlsConfig>,
    pub(super) role: Role,
}

/// A service that answers, handshake included. Each gets its share of the time that is left.
pub(super) async fn reach(
    subject: &Subject,
    shared: &Shared,
    connection: &Connection,
    time: Duration,
) -> Result<Reached> {
    let end = Instant::now() + time;
    let order = shared.metrics.best_first(&subject.route.upstreams);
    let mut left = order.len();
    loop {
        let upstream = order[order.len() - left];
        let name = upstream.to_string();
        connection.facts().upstream = Some(name.clone());
        let now = Instant::now();
        let until = now + end.saturating_duration_since(now) / left as u32;
        let tried = timeout_at(until, connect(subject, upstream, until)).await;
        let error = match tried.unwrap_or_else(|_| Err(late(&name, until - now))) {
            Ok(reached) => {
                shared.metrics.upstream_answered(&name);
                return Ok(reached);
            }
            Err(error) => error,
        };
        shared.metrics.upstream_failed(&name);
        left -= 1;
        if left == 0 {
            return Err(error);
        }
        let connection = connection.snapshot();
        shared.tell(ProxyEvent { connection, outcome: "retry", error: Some(error) });
    }
}

fn late(name: &str, time: Duration) -> Error {
    let text = format!("{name}: no connection and handshake within {:.1} s", time.as_secs_f64());
    Error::new(ErrorKind::ConnectDeadline, text).with_phase(Phase::Connect)
}

/// One service: connected, told who comes, and shaken hands with.
async fn connect(subject: &Subject, upstream: &Upstream, until: Instant) -> Result<Reached> {
    let route = &subject.route;
    let socket = SocketOptions { keepalive: Some(KEEPALIVE), short_near: true, ..SocketOptions::default() };
    let mut options = ConnectOptions { socket, ..ConnectOptions::default() };
    if let (true, Address::Inet(source)) = (route.keep_source, &subject.parties.source) {
        // Its port is taken: by the client's connection to us.
        options.local = Some(SocketAddr::new(source.ip(), 0));
        options.transparent = true;
    }
    let mut stream: BoxStream = match upstream {
        Upstream::Tcp { host, port } => Box::new(connect_tcp(host, *port, &options, until).await?),
        Upstream::Unix(address) => Box::new(connect_unix(address, until).await?),
        Upstream::Original => {
            let text = "the client connected to this proxy itself: no rule of the system led it here";
            let nowhere = || Error::new(ErrorKind::NotFound, text).with_phase(Phase::Connect);
            let wanted = subject.original.ok_or_else(nowhere)?;
            Box::new(
                connect_tcp(&wanted.ip().to_canonical().to_string(), wanted.port(), &options, until).await?,
            )
        }
    };
    if let Some(version) = route.send_proxy {
        let server_name = subject.server_name.as_deref();
        let verified = matches!(&route.inbound, Inbound::Tls(config) if config.verifies_peers());
        let info = subject.info.as_ref();
        let header = header::write(version, &subject.parties, info, verified, server_name);
        ops::write_all(stream.as_mut(), &header).await?;
        ops::flush(stream.as_mut()).await?;
    }
    let Some(tls) = &route.upstream_tls else {
        return Ok(Reached { stream, upgrading: None, pending: None });
    };
    let host = match upstream {
        Upstream::Tcp { host, .. } => Some(host),
        // The name that the client asked for, where it asked for one.
        Upstream::Unix(_) | Upstream::Original => subject.server_name.as_ref(),
    };
    let role = Role::Client { server_name: tls.server_name.as_ref().or(host).cloned() };
    if let Some(upgrade) = tls.upgrade.filter(|upgrade| upgrade.is_two_sided()) {
        let pending = Some(Pending { upgrade, config: Arc::clone(&tls.config), role });
        return Ok(Reached { stream, upgrading: None, pending });
    }
    let mut upgrading = tls.upgrade.map(|upgrade| Box::new(Upgrading::new(upgrade, &role, Vec::new())));
    let ciphertext = match &mut upgrading {
        Some(upgrading) => upgrading.until_tls(stream.as_mut(), None).await?,
        None => Vec::new(),
    };
    let (mut stream, info) = TlsStream::handshake(stream, &tls.config, &role, &ciphertext).await?;
    if let Some(Err(error)) = upgrading.as_ref().map(|upgrading| upgrading.check(&info)) {
        stream.abort(NO_APPLICATION_PROTOCOL).await;
        return Err(error.with_alert(NO_APPLICATION_PROTOCOL));
    }
    Ok(Reached { stream: Box::new(stream), upgrading, pending: None })
}

//! Upgrades whose words go through both ends (MySQL's log-in): the service greets before the client's TLS.
//!
//! So the service is connected first, and it costs a stranger one connection to it. What a client is told in
//! clear is the service's greeting. A service that has greeted is not exchanged for another one.
//!
//! Not here: the words ([`crate::upgrade`]), and upgrades of one end, which come one after another
//! (`connection`, `reach`, `upgrade`).

use std::sync::Arc;
use std::time::Duration;

use sapper_proto::upgrade::Upgrade;
use tokio::time::{Instant, timeout_at};

use super::connection::{Counted, FirstBytes};
use super::control::Shared;
use super::header;
use super::metrics::{Agreed, Connection};
use super::reach::{Pending, Reached};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::address::Address;
use crate::stream::{BoxStream, Stream, memory};
use crate::tls::config::TlsConfig;
use crate::tls::stream::TlsStream;
use crate::tls::{HandshakeInfo, Role};
use crate::upgrade::{NO_APPLICATION_PROTOCOL, Upgrading};

/// Between two upgrades of one connection: the packets of one log-in.
const BETWEEN: usize = 64 * 1024;

/// A client whose upgrade has not begun.
pub(super) struct PendingClient {
    pub(super) upgrade: Upgrade,
    pub(super) config: Arc<TlsConfig>,
    /// Where it comes from.
    pub(super) source: Address,
}

/// Why there is no log-in: the side that failed (an outcome's word), and how.
pub(super) type Failure = (&'static str, Error);

/// Both ends with payload behind a log-in.
pub(super) type LoggedIn = (BoxStream, BoxStream, FirstBytes);

/// Speaks until both ends have nothing but payload. `read` came from the client already.
pub(super) async fn log_in(
    client: BoxStream,
    of_client: Option<PendingClient>,
    reached: Reached,
    read: Vec<u8>,
    time: Duration,
    told: (&Shared, &Connection),
) -> Result<LoggedIn, Failure> {
    let until = Instant::now() + time;
    let late = |_| {
        let text = format!("the log-in with its TLS was not done within {:.1} s", time.as_secs_f64());
        Err(("handshake", Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake)))
    };
    timeout_at(until, speak(client, of_client, reached, read, told)).await.unwrap_or_else(late)
}

async fn speak(
    mut client: BoxStream,
    of_client: Option<PendingClient>,
    reached: Reached,
    read: Vec<u8>,
    told: (&Shared, &Connection),
) -> Result<LoggedIn, Failure> {
    let of_handshake = |error| ("handshake", error);
    let of_upstream = |error| ("upstream", error);
    let Reached { stream: mut upstream, pending, .. } = reached;
    match (of_client, pending) {
        (Some(pending), None) => {
            let begun = Upgrading::new(pending.upgrade, &Role::Server, read);
            let (client, up) =
                client_end(client, upstream.as_mut(), begun, &pending, told).await.map_err(of_handshake)?;
            let (to_upstream, to_client) = up.into_payload();
            Ok((Box::new(client), upstream, FirstBytes { to_upstream, to_client }))
        }
        (None, Some(pending)) => {
            let (upstream, up) =
                upstream_end(upstream, client.as_mut(), pending, read).await.map_err(of_upstream)?;
            let (to_client, to_upstream) = up.into_payload();
            Ok((client, Box::new(upstream), FirstBytes { to_upstream, to_client }))
        }
        // Each is the other's inside.
        (Some(of_client), Some(of_service)) => {
            let (mut near, mut far) = memory::pair(BETWEEN);
            let begun = Upgrading::new(of_client.upgrade, &Role::Server, read);
            let ((client, one), (upstream, other)) = tokio::try_join!(
                async { client_end(client, &mut near, begun, &of_client, told).await.map_err(of_handshake) },
                async { upstream_end(upstream, &mut far, of_service, Vec::new()).await.map_err(of_upstream) },
            )?;
            // Packets of the log-in are used up between them; only payload is left.
            let (to_upstream, _) = one.into_payload();
            let (to_client, _) = other.into_payload();
            Ok((Box::new(client), Box::new(upstream), FirstBytes { to_upstream, to_client }))
        }
        (None, None) => Ok((client, upstream, FirstBytes { to_upstream: read, to_client: Vec::new() })),
    }
}

async fn client_end(
    mut client: BoxStream,
    inner: &mut dyn Stream,
    mut up: Upgrading,
    pending: &PendingClient,
    (shared, connection): (&Shared, &Connection),
) -> Result<(TlsStream, Upgrading)> {
    let ciphertext = up.until_tls(client.as_mut(), Some(&mut *inner)).await?;
    let place = shared.shakes_hands(&pending.source);
    let counted = Counted::new(&shared.metrics.handshaking);
    let started = Instant::now();
    let (mut tls, info) = tokio::select! {
        shaken = shake(client, &pending.config, &Role::Server, &ciphertext, &up) => shaken?,
        error = place.gives_way() => return Err(error),
    };
    shared.metrics.shook_hands(&info, started.elapsed());
    drop((place, counted));
    {
        let mut facts = connection.facts();
        facts.server_name.clone_from(&info.server_name);
        facts.client_cn = header::common_name(&info);
        facts.info = Some(Agreed::of(&info));
    }
    up.until_payload(&mut tls, inner).await?;
    Ok((tls, up))
}

async fn upstream_end(
    mut upstream: BoxStream,
    inner: &mut dyn Stream,
    pending: Pending,
    read: Vec<u8>,
) -> Result<(TlsStream, Upgrading)> {
    let Pending { upgrade, config, role } = pending;
    let mut up = Upgrading::new(upgrade, &role, Vec::new());
    up.received_inside(read);
    let ciphertext = up.until_tls(upstream.as_mut(), Some(&mut *inner)).await?;
    let (mut tls, _) = shake(upstream, &config, &role, &ciphertext, &up).await?;
    up.until_payload(&mut tls, inner).await?;
    Ok((tls, up))
}

async fn shake(
    stream: BoxStream,
    config: &TlsConfig,
    role: &Role,
    ciphertext: &[u8],
    up: &Upgrading,
) -> Result<(TlsStream, HandshakeInfo)> {
    let (mut tls, info) = TlsStream::handshake(stream, config, role, ciphertext).await?;
    if let Err(error) = up.check(&info) {
        tls.abort(NO_APPLICATION_PROTOCOL).await;
        return Err(error.with_alert(NO_APPLICATION_PROTOCOL));
    }
    Ok((tls, info))
}

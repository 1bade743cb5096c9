//! A client until it is let in: TLS, its credentials, the filter's answer, a place and a public port.

use std::sync::Arc;
use std::time::Duration;

use sapper_proto::tunnel::lease::{Lessee, TokenHash, Wanted};
use sapper_proto::tunnel::w3p::{
    Acknowledgement, Credentials, Refusal, Retry, ServerHandshake, Speech, TLS_ALERT, recognise,
};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout;

use super::registry::{self, Client, Order, Place};
use super::session::tell;
use super::{Shared, lock};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::handshakes::{Handshake, Progress};
use crate::mailbox::Subject;
use crate::stream::BoxStream;
use crate::tls::Role;
use crate::tunnel::greeting;
use crate::tunnel::notice::TunnelInfo;
use crate::tunnel::public::{PublicPort, shake};

/// How long a session that nobody uses may take to give way.
const GIVES_WAY: Duration = Duration::from_secs(5);

/// A client that has its answer.
pub(super) struct Admitted {
    pub(super) carrier: BoxStream,
    /// Its credentials, as the table of leases knows them.
    pub(super) owner: TokenHash,
    /// `None` where every port is taken, one of them by a session of the same credentials, or kept for them: the
    /// client may be the one that it waits for.
    pub(super) public: Option<(PublicPort, Place)>,
    /// `None` where there are as many clients as there may be, one of them the same.
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

/// A client that is not let in.
pub(super) struct Turned {
    pub(super) error: Error,
    /// What it hears last: sent once the error is told, which no end of the server may keep back.
    pub(super) word: Option<(BoxStream, Vec<u8>)>,
}

impl From<Error> for Turned {
    fn from(error: Error) -> Self {
        Self { error, word: None }
    }
}

pub(super) async fn admit(
    shared: &Shared,
    stream: BoxStream,
    info: &mut TunnelInfo,
    place: &Handshake,
) -> Result<Admitted, Turned> {
    let deadline = shared.options().common.handshake_timeout;
    let (mut carrier, credentials) =
        timeout(deadline, introduce(shared, stream, info, place)).await.unwrap_or_else(|_| {
            let text = format!("the client's handshake took more than {} s", deadline.as_secs_f64());
            Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake).into())
        })?;
    info.credentials.clone_from(&credentials.text);
    place.reached(Progress::Asked);
    let owner = hash(b"credentials:", credentials.text.as_bytes());
    if let Err(error) = allowed(shared, &mut carrier, info).await {
        let (code, retry) = match error.kind() {
            ErrorKind::PolicyDenied => {
                nobody_comes_back(shared, owner).await;
                ("rejected", Retry::Never)
            }
            // Nobody said no: it may be let in the next time.
            _ if error.reason() == Some("undecided") => ("undecided", Retry::Usual),
            _ => return Err(error.into()),
        };
        tell(shared, "client-authentication-failed", info, None);
        return Err(refused(carrier, code, error, retry));
    }
    let permit = match free_place(shared) {
        // It may be the one that a session waits for: then it is not one more.
        Err(_) if lock(&shared.registry).port_of(owner).is_none() => another_client(shared).await,
        permit => permit,
    };
    let bound = match &permit {
        Err(error) => Err(error.clone()),
        Ok(_) => {
            registry::bind(
                &shared.registry,
                (Lessee { token: owner, client: owner, credentials: owner }, None, &Client::default()),
                Wanted::Any,
                None,
                &shared.gate,
            )
            .await
        }
    };
    let public = match bound {
        Ok(bound) => Some(bound),
        Err(error) => {
            let port = {
                let registry = lock(&shared.registry);
                let expected = permit.is_ok() && error.reason() == Some("no_port");
                registry.port_of(owner).or_else(|| registry.kept_for(owner).filter(|_| expected))
            };
            let Some(port) = port else {
                let code = if permit.is_err() { "too_many_clients" } else { "no_port" };
                return Err(refused(carrier, code, error, Retry::Usual));
            };
            info.port = port;
            None
        }
    };
    shared.leases_changed();
    if let Some((_, place)) = &public {
        info.port = place.port;
    }
    Ok(Admitted { carrier, owner, public, permit: permit.ok() })
}

/// The filter's no is about these credentials, whole, and the client of each session that waits says the same ones: it
/// would hear that no before it could ask for its session, and not come again. Visitors need not wait for it. Who does
/// not know the credentials cannot say them.
async fn nobody_comes_back(shared: &Shared, owner: TokenHash) {
    let waiting = lock(&shared.registry).waiting(owner);
    for orders in waiting {
        let _ = orders.send(Order::Refused).await;
    }
}

/// A place among the clients. Where there is none, a session that waits for its client for a while and has no visitors
/// gives way: its client gets the same port when it comes. One with visitors does not: they would be reset for good,
/// where the newcomer comes again.
pub(super) async fn another_client(shared: &Shared) -> Result<OwnedSemaphorePermit> {
    let mut asked = Vec::new();
    loop {
        let full = match free_place(shared) {
            Ok(permit) => return Ok(permit),
            Err(full) => full,
        };
        let waiting = lock(&shared.registry).waits_idly(&asked);
        let Some((id, orders)) = waiting else { return Err(full) };
        asked.push(id);
        let (done, gone) = oneshot::channel();
        let _ = orders.send(Order::GiveWay(done)).await;
        let _ = timeout(GIVES_WAY, gone).await;
    }
}

fn free_place(shared: &Shared) -> Result<OwnedSemaphorePermit> {
    Arc::clone(&shared.clients).try_acquire_owned().map_err(|_| full())
}

/// Why nobody else is let in.
pub(super) fn full() -> Error {
    Error::new(ErrorKind::ResourceLimit, "the server has as many clients as it takes")
        .with_phase(Phase::Handshake)
        .with_reason("too_many_clients")
}

fn refused(carrier: BoxStream, code: &str, error: Error, retry: Retry) -> Turned {
    let refusal = Refusal { code: code.to_owned(), message: error.message().to_owned(), retry };
    Turned { error, word: Some((carrier, Acknowledgement::Refused(refusal).encode())) }
}

/// What nobody has decided: who was asked failed, or was too late.
pub(super) fn undecided() -> Error {
    Error::new(ErrorKind::ResourceLimit, "the server could not decide about the client")
        .with_phase(Phase::Handshake)
        .with_reason("undecided")
}

/// TLS where it is spoken, and the credentials.
async fn introduce(
    shared: &Shared,
    mut carrier: BoxStream,
    info: &TunnelInfo,
    place: &Handshake,
) -> Result<(BoxStream, Credentials), Turned> {
    let deadline = shared.options().common.handshake_timeout;
    let mut bytes = Vec::new();
    if let Some(tls) = shared.options().tls.clone() {
        while recognise(&bytes).is_none() {
            if greeting::more(&mut carrier, &mut bytes).await? == 0 {
                return Err(greeting::ended("before it said anything").into());
            }
        }
        if recognise(&bytes) == Some(Speech::W3p) {
            let error = Error::new(
                ErrorKind::IncompatiblePeer,
                "the client speaks W3PTUNL without TLS, this port speaks TLS",
            )
            .with_phase(Phase::Handshake)
            .with_reason("plain_at_tls_port");
            return Err(refused(carrier, "tls_required", error, Retry::Never));
        }
        place.reached(Progress::Speaks);
        let initial = std::mem::take(&mut bytes);
        carrier = shake(carrier, tls, Role::Server, initial, deadline).await?;
    }
    let mut handshake = ServerHandshake::new(deadline);
    let confirmed = || {
        place.reached(Progress::Speaks);
        tell(shared, "client-protocol-confirmed", info, None);
    };
    match greeting::credentials(&mut carrier, &mut bytes, &mut handshake, confirmed).await {
        Ok(credentials) => Ok((carrier, credentials)),
        Err(error) => {
            let speaks_tls = error.reason() == Some("tls_at_plain_port");
            Err(Turned { error, word: speaks_tls.then(|| (carrier, TLS_ALERT.to_vec())) })
        }
    }
}

/// The filter's answer. A client that leaves, or says more, while it is being decided about is out.
async fn allowed(shared: &Shared, carrier: &mut BoxStream, info: &TunnelInfo) -> Result<()> {
    let Some(deadline) = shared.options().filter else { return Ok(()) };
    let (mailbox, key) = shared.teller.mailbox();
    let subject = Subject::TunnelClient {
        id: info.id,
        credentials: info.credentials.clone(),
        address: info.client.clone(),
    };
    let mut early = Vec::new();
    let answer = tokio::select! {
        biased;
        more = greeting::more(carrier, &mut early) => {
            return Err(match more? {
                0 => greeting::ended("while its credentials were looked at"),
                _ => Error::new(
                    ErrorKind::RemoteProtocol,
                    "the client sent more before its handshake was answered",
                )
                .with_phase(Phase::Handshake),
            });
        }
        answer = mailbox.ask(key, subject, deadline) => answer,
    };
    match answer {
        Some(true) => Ok(()),
        Some(false) => Err(Error::new(ErrorKind::PolicyDenied, "Client rejected by connection filter")
            .with_phase(Phase::Handshake)),
        None => Err(undecided()),
    }
}

/// What a table knows of a secret.
pub(super) fn hash(what: &[u8], text: &[u8]) -> TokenHash {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    context.update(what);
    context.update(text);
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

//! A client's way to the server: the connection, TLS, the handshake, and what a refusal means.

use std::sync::Arc;

use sapper_proto::tunnel::frame::Capabilities;
use sapper_proto::tunnel::w3p::{Acknowledgement, ClientHandshake, Refusal, Retry};
use sapper_proto::tunnel::words::Asked;
use tokio::time::{Instant, timeout};

use super::{ClientOptions, KEEPALIVE, Shared};
use crate::error::{Error, ErrorKind, Phase};
use crate::stream::BoxStream;
use crate::stream::connect::{ConnectOptions, connect_tcp};
use crate::stream::fd::SocketOptions;
use crate::tls::Role;
use crate::tunnel::notice::Notice;
use crate::tunnel::public::shake;
use crate::tunnel::service::Exposed;
use crate::tunnel::{MOST_UNSENT, greeting};

/// What a server granted.
pub(super) struct Granted {
    pub(super) carrier: BoxStream,
    pub(super) rest: Vec<u8>,
    pub(super) port: u16,
    pub(super) capabilities: Option<Capabilities>,
}

/// Why there is no tunnel, and whether another try may help.
pub(super) struct Refused {
    pub(super) error: Error,
    pub(super) retry: Retry,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        // What a certificate or an option says will be so the next time; but servers are mended and restarted.
        let retry = if error.kind() == ErrorKind::Config { Retry::Never } else { Retry::Usual };
        Self { error, retry }
    }
}

/// A carrier with a finished handshake. A server that is `known` has taken this client the same way before.
pub(super) async fn connect(
    options: &ClientOptions,
    shared: &Shared,
    known: bool,
) -> Result<Granted, Refused> {
    let limit = options.common.handshake_timeout;
    let socket =
        SocketOptions { keepalive: Some(KEEPALIVE), most_unsent: MOST_UNSENT, ..SocketOptions::default() };
    let how = ConnectOptions { socket, ..ConnectOptions::default() };
    let stream = connect_tcp(&options.host, options.port, &how, Instant::now() + limit).await?;
    let mut carrier: BoxStream = Box::new(stream);
    if let Some((config, name)) = &options.tls {
        let role = Role::Client { server_name: name.clone() };
        let shaken = shake(carrier, Arc::clone(config), role, Vec::new(), limit).await;
        carrier = shaken.map_err(|error| greeting::perhaps_plain(error, known))?;
    }
    let tell = |name| shared.teller.tell(Notice { name, ..Notice::default() });
    tell("tunnel-connection-established");
    let handshake = ClientHandshake::new(&options.credentials, limit)
        .map_err(|error| Error::config("authentication_credentials", error.to_string()))?;
    let heard = (|| tell("authentication-credentials-sent"), || tell("tunnel-protocol-confirmed"));
    let talk = greeting::acknowledgement(&mut carrier, &handshake, heard, known);
    let (answer, rest) = timeout(limit, talk).await.unwrap_or_else(|_| {
        let text = format!("the server did not answer within {} s", limit.as_secs_f64());
        Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake))
    })?;
    match answer {
        Acknowledgement::Refused(refusal) => Err(refused(refusal)),
        Acknowledgement::Accepted { port, offer } => {
            let capabilities = offer.and_then(|offer| offer.common(Capabilities::ALL));
            if !capabilities.is_some_and(|common| common.has(Capabilities::SERVICES)) {
                takes_one(&options.services, port)?;
            }
            Ok(Granted { carrier, rest, port, capabilities })
        }
    }
}

/// A server of the original has one port for its client, and cannot be asked for another.
fn takes_one(services: &[Exposed], port: u16) -> Result<(), Refused> {
    let no = |text: String| Error::new(ErrorKind::IncompatiblePeer, text).with_phase(Phase::Handshake);
    let never = |error| Err(Refused { error, retry: Retry::Never });
    if services.len() > 1 {
        let text = format!("the server takes one service of a client, not {}", services.len());
        return never(no(text).with_reason("one_service"));
    }
    let Some(Asked { ports, host, .. }) = services.first().map(|exposed| &exposed.asked) else {
        return Ok(());
    };
    if host.is_some() || ports.is_some_and(|(first, last)| !(first..=last).contains(&port)) {
        let text = format!("the server cannot be asked for a public port, and gave {port}");
        return never(no(text).with_reason("public_port"));
    }
    Ok(())
}

pub(super) fn refused(Refusal { code, message, retry }: Refusal) -> Refused {
    // Words that a server of ours says; of others only the text is passed on.
    let word = &*code;
    let reason = match word {
        "no_port" => "no_port",
        "port_taken" | "in_use" => "port_taken",
        "port_not_allowed" => "port_not_allowed",
        "host_not_allowed" => "host_not_allowed",
        "too_many_services" => "too_many_services",
        "too_many_clients" => "too_many_clients",
        "service_rejected" => "service_rejected",
        "tls_required" => "plain_at_tls_port",
        "services" => "services",
        "replaced" => "replaced",
        "undecided" => "undecided",
        _ => "refused",
    };
    let kind = match reason {
        "refused" if word == "rejected" => ErrorKind::CredentialsRejected,
        "plain_at_tls_port" | "services" => ErrorKind::IncompatiblePeer,
        "no_port" | "port_taken" | "too_many_clients" | "undecided" => ErrorKind::Connect,
        // Whatever it is: the same would be refused again.
        "refused" if retry != Retry::Never => ErrorKind::Connect,
        _ => ErrorKind::PolicyDenied,
    };
    let text = match word {
        "tls_required" => greeting::SPEAKS_TLS.to_owned(),
        _ if message.is_empty() => code,
        _ => message,
    };
    let error = Error::new(kind, text).with_phase(Phase::Handshake).with_reason(reason);
    Refused { error, retry }
}

/// A refusal whose text says which service it is about.
pub(super) fn about(refusal: Refusal, service: Option<u16>, services: &[Exposed]) -> Refusal {
    let name = service.and_then(|at| services.get(usize::from(at))).map(|exposed| &exposed.asked.name);
    match name.filter(|name| !name.is_empty()) {
        Some(name) => Refusal { message: format!("service {name}: {}", refusal.message), ..refusal },
        None => refusal,
    }
}

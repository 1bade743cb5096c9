//! The public port of a tunnel: where visitors come in.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use sapper_proto::tunnel::ip_list::VisitorRule;
use sapper_proto::tunnel::w3p::{Speech, TLS_ALERT, recognise};
use sapper_proto::tunnel::words::is_host;
use tokio::sync::Semaphore;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

use super::STREAM;
use super::greeting;
use super::limit::Visitors;
use super::link::{BoxFuture, Connected};
use super::notice::{ServiceInfo, Teller, TunnelInfo};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::mailbox::Subject;
use crate::proxy::{Buckets, Rate};
use crate::stream::BoxStream;
use crate::stream::address::Address;
use crate::stream::listen::{AcceptedSocket, ListenAddress, ListenOptions, Listener};
use crate::tls::config::TlsConfig;
use crate::tls::greeting::check;
use crate::tls::stream::TlsStream;
use crate::tls::{Role, SharedTlsConfig};

/// How long a name in the address may be looked up.
const LOOK_UP: Duration = Duration::from_secs(10);

/// A listening port and who waits at it.
pub(super) struct PublicPort {
    accepting: BoxFuture<(Listener, Result<AcceptedSocket>)>,
    gate: Arc<Gate>,
    /// Where it was told to be.
    host: Option<String>,
    /// Where it is.
    addresses: Vec<IpAddr>,
}

/// Somebody who connected.
pub(super) struct Visitor {
    socket: AcceptedSocket,
    /// As it was when the visitor came.
    door: Arc<PublicOptions>,
}

/// How public ports are made, and what a visitor passes before it gets a stream. Exchanged while they
/// listen: each visitor meets what is current when it comes.
pub(super) struct Gate(Mutex<Arc<PublicOptions>>);

impl Gate {
    pub(super) fn new(options: PublicOptions) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Arc::new(options))))
    }

    pub(super) fn current(&self) -> Arc<PublicOptions> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn replace(&self, options: PublicOptions) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(options);
    }
}

/// What there is at a gate.
pub(super) struct PublicOptions {
    pub(super) host: Option<String>,
    pub(super) max_visitors: u32,
    pub(super) tls: Option<SharedTlsConfig>,
    pub(super) handshake: Duration,
    /// Who may come in, by address.
    pub(super) rule: VisitorRule,
    /// Whether somebody is asked about each visitor, and how long an answer may take; none means no.
    pub(super) ask: Option<Duration>,
    /// The same about what each client of our own kind wants to expose.
    pub(super) ask_services: Option<Duration>,
    /// What visitors from one address may do.
    pub(super) visitors: Option<Arc<Visitors>>,
    /// Visitors of all tunnels.
    pub(super) places: Arc<Semaphore>,
    /// How often one address may come, whichever port.
    pub(super) frequency: Option<Arc<Frequency>>,
}

/// How often one address may visit a server.
pub(super) struct Frequency {
    rate: Rate,
    buckets: Mutex<Buckets>,
}

impl Frequency {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, buckets: Mutex::default() }
    }

    /// The same where the rate is: who came too often before still did.
    pub(super) fn kept(before: Option<&Arc<Self>>, rate: Rate) -> Arc<Self> {
        let same = before.filter(|before| before.rate == rate);
        same.map_or_else(|| Arc::new(Self::new(rate)), Arc::clone)
    }

    fn allows(&self, address: IpAddr) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.take(address, &self.rate, std::time::Instant::now())
    }
}

impl PublicPort {
    /// Binds it on this thread's event loop; at `host`, where that is not the usual one.
    pub(super) async fn bind(port: u16, host: Option<IpAddr>, gate: &Arc<Gate>) -> Result<Self> {
        let options = gate.current();
        let host = host.map_or_else(|| options.host.clone(), |host| Some(host.to_string()));
        let address = ListenAddress::Tcp { host: host.clone(), port };
        let listen = ListenOptions {
            max_connections: options.max_visitors,
            dual_stack: true,
            socket: STREAM,
            ..ListenOptions::default()
        };
        let listener = Listener::bind(&address, &listen, Instant::now() + LOOK_UP).await?;
        let addresses = listener.local_addresses().iter().filter_map(ip).collect();
        Ok(Self { accepting: Box::pin(accept(listener)), gate: Arc::clone(gate), host, addresses })
    }

    /// Where visitors come in, where that is not where a client came in: what leads it here leads visitors there as
    /// well, whatever it is called on its way.
    pub(super) fn elsewhere(&self, came_in: Option<IpAddr>) -> Option<String> {
        if self.addresses.iter().any(|at| at.is_unspecified() || Some(*at) == came_in) {
            return None;
        }
        let named = self.host.clone().filter(|host| is_host(host));
        named.or_else(|| self.addresses.first().map(ToString::to_string))
    }

    pub(super) fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Result<Visitor>> {
        let (listener, accepted) = ready!(self.accepting.as_mut().poll(cx));
        self.accepting = Box::pin(accept(listener));
        let door = self.gate.current();
        Poll::Ready(accepted.map(|socket| Visitor { socket, door }))
    }
}

/// An address of IP, of IPv4 as that.
pub(super) fn ip(address: &Address) -> Option<IpAddr> {
    match address {
        Address::Inet(address) => Some(address.ip().to_canonical()),
        _ => None,
    }
}

async fn accept(mut listener: Listener) -> (Listener, Result<AcceptedSocket>) {
    let accepted = listener.accept_socket().await;
    (listener, accepted)
}

impl Visitor {
    /// The stream, or what it takes first: a program's answer, a TLS handshake. Who may not come in is an error.
    pub(super) fn greeting(
        self,
        teller: &Arc<Teller>,
        info: Option<&Arc<TunnelInfo>>,
        service: &ServiceInfo,
    ) -> std::result::Result<BoxStream, BoxFuture<Connected>> {
        let Self { socket, door } = self;
        let from = match &socket.peer {
            Address::Inet(peer) => Some(*peer),
            _ => None,
        };
        let mut stream: BoxStream = match socket.open() {
            Ok(stream) => Box::new(stream),
            Err(error) => return Err(Box::pin(std::future::ready(Err(error)))),
        };
        let from = match from {
            Some(from) if door.rule.admits(from.ip()) => from,
            _ => {
                stream.reset(0);
                let who = from.map_or_else(|| "somebody".to_owned(), |from| from.ip().to_string());
                return Err(Box::pin(std::future::ready(Err(denied(&format!("{who} may not visit"))))));
            }
        };
        if door.frequency.as_ref().is_some_and(|frequency| !frequency.allows(from.ip())) {
            stream.reset(0);
            let error = Error::new(ErrorKind::ResourceLimit, format!("{} visits too often", from.ip()))
                .with_phase(Phase::Handshake)
                .with_reason("visitor_rate");
            return Err(Box::pin(std::future::ready(Err(error))));
        }
        if let Some(deadline) = door.ask {
            let (teller, info) = (Arc::clone(teller), info.cloned().unwrap_or_default());
            let port = service.port;
            return Err(Box::pin(async move {
                if !asked(&teller, &info, port, from.to_string(), deadline).await {
                    stream.reset(0);
                    return Err(denied(&format!("the visitor filter did not let {from} in")));
                }
                match &door.tls {
                    Some(tls) => welcome(stream, Arc::clone(tls), door.handshake).await,
                    None => Ok(stream),
                }
            }));
        }
        match &door.tls {
            None => Ok(stream),
            Some(tls) => Err(Box::pin(welcome(stream, Arc::clone(tls), door.handshake))),
        }
    }
}

/// TLS with a visitor. One that speaks none hears so, in its own words where they are known.
async fn welcome(mut stream: BoxStream, tls: Arc<TlsConfig>, deadline: Duration) -> Connected {
    let (began, mut said) = (Instant::now(), Vec::new());
    let first = async {
        // One that ends is told by the handshake.
        while !check(&said, false)? && greeting::more(&mut stream, &mut said).await? > 0 {}
        Ok::<_, Error>(())
    };
    let error = match timeout(deadline, first).await {
        Ok(Err(error)) if error.kind() == ErrorKind::IncompatiblePeer => error,
        Ok(Err(error)) => return Err(error),
        Ok(Ok(())) | Err(_) => {
            let handshake = TlsStream::handshake(stream, &tls, &Role::Server, &said);
            let left = deadline.saturating_sub(began.elapsed());
            return in_time(timeout(left, handshake).await, deadline);
        }
    };
    let word = if recognise(&said) == Some(Speech::Http) { greeting::HTTP_WORD } else { &TLS_ALERT };
    greeting::last_word(&mut stream, word).await;
    Err(greeting::plain_visitor(&error))
}

fn denied(text: &str) -> Error {
    Error::new(ErrorKind::PolicyDenied, text).with_phase(Phase::Handshake).with_reason("visitor")
}

/// The program's answer about one visitor, who came to `port`.
async fn asked(teller: &Teller, info: &TunnelInfo, port: u16, visitor: String, deadline: Duration) -> bool {
    let (mailbox, key) = teller.mailbox();
    let subject = Subject::TunnelVisitor {
        id: info.id,
        credentials: info.credentials.clone(),
        client: info.client.clone(),
        lease: info.lease.clone(),
        port,
        negotiated: info.negotiated,
        services: info
            .services
            .iter()
            .cloned()
            .map(|service| (service.name, service.port, service.host))
            .collect(),
        visitor,
    };
    mailbox.ask(key, subject, deadline).await == Some(true)
}

/// A TLS handshake with its deadline. `initial` was read already.
pub(super) async fn shake(
    stream: BoxStream,
    tls: Arc<TlsConfig>,
    role: Role,
    initial: Vec<u8>,
    deadline: Duration,
) -> Connected {
    in_time(timeout(deadline, TlsStream::handshake(stream, &tls, &role, &initial)).await, deadline)
}

fn in_time<T>(shaken: std::result::Result<Result<(TlsStream, T)>, Elapsed>, deadline: Duration) -> Connected {
    match shaken {
        Ok(Ok((stream, _))) => Ok(Box::new(stream)),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let message = format!("the TLS handshake took more than {} s", deadline.as_secs_f64());
            Err(Error::new(ErrorKind::HandshakeDeadline, message).with_phase(Phase::Handshake))
        }
    }
}

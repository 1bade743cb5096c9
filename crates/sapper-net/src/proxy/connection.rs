//! One connection, from the accepted socket to its last event. It lives on one I/O thread.
//!
//! PROXY header (from who is trusted) -> what is said before TLS -> hello (where routes need it) -> TLS -> the service, with TLS of its
//! own and a PROXY header where asked for -> the pump. Nothing is asked of the service before the client's
//! handshake is done: strangers cost it nothing. (But where its own words come first: `two_sided`.)

use std::future::{Future, poll_fn};
use std::net::{SocketAddr, UdpSocket};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use sapper_proto::client_hello::{ClientHello, ClientHelloError, Peek};
use sapper_proto::parsed::Parsed;
use sapper_proto::upgrade::Upgrade;
use tokio::task::unconstrained;
use tokio::time::{Instant, timeout, timeout_at};

use super::accept::Guard;
use super::control::Shared;
use super::header::{self, Parties};
use super::metrics::{Agreed, Connection, ProxyEvent};
use super::reach::{self, Reached};
use super::two_sided::{self, PendingClient};
use super::{Inbound, RouteOptions, Service, upgrade};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::handshakes::{Handshake, Progress};
use crate::pump::{Ends, FlowOptions, IdleClock, Pump, PumpMode, Turns};
use crate::runtime;
use crate::stream::address::Address;
use crate::stream::listen::{Accepted, AcceptedSocket};
use crate::stream::{BoxStream, Stream, ops};
use crate::tls::stream::TlsStream;
use crate::tls::{HandshakeInfo, Role};
use crate::upgrade::{NO_APPLICATION_PROTOCOL, Upgrading};

/// Alerts (RFC 8446, section 6.2): the service is not there; nobody here has that name.
const INTERNAL_ERROR: u8 = 80;
const UNRECOGNIZED_NAME: u8 = 112;

/// Read at a time before a connection's way is known.
const FIRST_READ: usize = 4096;
/// How long last words may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Why a connection is over.
struct End {
    outcome: &'static str,
    error: Option<Error>,
}

/// What a connection's pump does next.
enum Turn {
    /// It is over.
    Over(End),
    /// It goes on on another I/O thread.
    Move(usize),
}

/// Both ends, ready for payload.
struct Established {
    client: BoxStream,
    upstream: BoxStream,
    first: FirstBytes,
}

/// Payload that was received before the pump runs.
#[derive(Default)]
pub(super) struct FirstBytes {
    pub(super) to_upstream: Vec<u8>,
    pub(super) to_client: Vec<u8>,
}

/// What is known of a client whose handshake is done.
pub(super) struct Subject {
    pub(super) route: Arc<RouteOptions>,
    pub(super) parties: Parties,
    pub(super) info: Option<HandshakeInfo>,
    pub(super) server_name: Option<String>,
    /// Where it wanted to go, before the system's rules led it here.
    pub(super) original: Option<SocketAddr>,
}

/// Such a client.
struct Greeted {
    client: BoxStream,
    subject: Subject,
    /// Read already and not TLS of ours: what a hello that is passed on begins with, or payload.
    first_bytes: Vec<u8>,
    /// What it says before payload, where that is not over with its TLS.
    upgrading: Option<Box<Upgrading>>,
    /// Its TLS, where that needs the service.
    pending: Option<PendingClient>,
}

/// Runs one connection to its end. Not an `async fn`, which would keep its arguments twice.
#[expect(clippy::manual_async_fn, reason = "its arguments are kept once")]
pub(super) fn run(socket: AcceptedSocket, guard: Guard) -> impl Future<Output = ()> + Send {
    async move {
        let shared = &*guard.shared;
        let (peer, local) = (socket.peer.clone(), socket.local.clone());
        let service = shared.service();
        let original = if service.goes_to_original { original(&socket, shared.ports()) } else { None };
        let accepted = match socket.open() {
            Ok(stream) => Accepted { stream, peer, local },
            // Gone, or this thread has no room to watch it: as if it had not come.
            Err(error) => return tracing::debug!(%peer, %error, "an accepted connection cannot be used"),
        };
        let (idle, tell_all) = (service.deadlines.idle, service.tell_connections);
        let connection = shared.metrics.begin(accepted.peer.to_string(), accepted.local.to_string());
        // Boxed: its state is large and short-lived, an idle connection does not carry it.
        let establishing = Box::pin(establish(accepted, original, shared, service, &connection));
        let established = tokio::select! {
            biased;
            () = shared.cut.come() => Err(End::cut()),
            established = establishing => established,
        };
        let End { outcome, error } = match established {
            Ok(established) => transfer(established, shared, &connection, idle).await,
            Err(end) => end,
        };
        let snapshot = shared.metrics.end(&connection, outcome, error.as_ref());
        if tell_all || is_worth_telling(outcome, error.as_ref()) {
            shared.tell(ProxyEvent { connection: snapshot, outcome, error });
        }
    }
}

impl Subject {
    fn new(
        route: Arc<RouteOptions>,
        parties: Parties,
        info: Option<HandshakeInfo>,
        server_name: Option<String>,
    ) -> Self {
        Self { route, parties, info, server_name, original: None }
    }
}

/// Where a connection was to go: by REDIRECT the system remembers it, by TPROXY it is the connection's own
/// address. Who came to us because he wanted to has no other destination.
fn original(socket: &AcceptedSocket, ports: &[u16]) -> Option<SocketAddr> {
    if let Some(wanted) = socket.redirected_from() {
        return Some(wanted);
    }
    let Address::Inet(local) = socket.local else { return None };
    // Only an address of this machine can be bound.
    let is_own = || UdpSocket::bind((local.ip(), 0)).is_ok();
    (!ports.contains(&local.port()) || !is_own()).then_some(local)
}

impl End {
    fn cut() -> Self {
        let error = Error::new(ErrorKind::Closed, "the proxy was stopped");
        Self { outcome: "cut", error: Some(error) }
    }
}

/// What is everyday business is counted only: clients that leave without a goodbye, connections that never
/// said a word (port scans, health checks).
fn is_worth_telling(outcome: &str, error: Option<&Error>) -> bool {
    match outcome {
        "ended" | "idle" | "cut" | "silent" => false,
        "failed" => error.is_some_and(|error| error.kind() != ErrorKind::ConnectionLost),
        _ => true,
    }
}

async fn establish(
    accepted: Accepted,
    original: Option<SocketAddr>,
    shared: &Shared,
    service: Arc<Service>,
    connection: &Connection,
) -> Result<Established, End> {
    let Deadline { until, text } = Deadline::of(service.deadlines.handshake, "the client's handshake");
    let mut stage = "rate";
    let unserved = shared.unserved.enter(accepted.peer.network());
    let greeting = greet(accepted, shared, &service, connection, (&mut stage, &unserved));
    let late = || Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake));
    let greeted = tokio::select! {
        greeted = timeout_at(until, greeting) => greeted.unwrap_or_else(|_| late()),
        error = unserved.gives_way() => Err(error),
        () = shared.no_more_handshakes.come() => return Err(End::cut()),
    };
    let greeted = greeted.map_err(|error| End { outcome: stage, error: Some(error) })?;

    let Greeted { mut client, mut subject, first_bytes, upgrading, pending } = greeted;
    // Where its TLS needs the service, it is not served before that.
    let unserved = pending.is_some().then_some(unserved);
    subject.original = original;
    let started = Instant::now();
    let time = service.deadlines.connect;
    let error = match reach::reach(&subject, shared, connection, time).await {
        Ok(reached) if pending.is_some() || reached.pending.is_some() => {
            shared.metrics.reached(started.elapsed());
            let (time, told) = (service.deadlines.handshake, (shared, connection));
            let logging_in = two_sided::log_in(client, pending, reached, first_bytes, time, told);
            let logged_in = match &unserved {
                Some(place) => tokio::select! {
                    logged_in = logging_in => logged_in,
                    error = place.gives_way() => Err(("handshake", error)),
                    () = shared.no_more_handshakes.come() => return Err(End::cut()),
                },
                None => logging_in.await,
            };
            let (client, upstream, first) =
                logged_in.map_err(|(outcome, error)| End { outcome, error: Some(error) })?;
            return Ok(Established { client, upstream, first });
        }
        Ok(Reached { stream: mut upstream, upgrading: of_upstream, .. }) => {
            shared.metrics.reached(started.elapsed());
            let upgrading = (upgrading, of_upstream);
            let speaking = upgrade::speak(client.as_mut(), upstream.as_mut(), upgrading, first_bytes);
            match timeout(time, speaking).await.unwrap_or_else(|_| Err(upgrade::late(time))) {
                Ok(first) => return Ok(Established { client, upstream, first }),
                Err(error) => {
                    // What never began must not look like an end.
                    if upstream.tls_mut().is_none() {
                        upstream.reset(0);
                    }
                    error
                }
            }
        }
        Err(error) => error,
    };
    break_off(client, &subject.route.inbound).await;
    Err(End { outcome: "upstream", error: Some(error) })
}

/// A moment, and what an error says after it.
struct Deadline {
    until: Instant,
    text: String,
}

impl Deadline {
    fn of(time: Duration, what: &str) -> Self {
        let text = format!("{what} was not done within {:.1} s", time.as_secs_f64());
        Self { until: Instant::now() + time, text }
    }
}

/// The client's part. `stage` is how far it came, and so says its place among those that are not served yet.
async fn greet(
    accepted: Accepted,
    shared: &Shared,
    service: &Service,
    connection: &Connection,
    (stage, unserved): (&mut &'static str, &Handshake),
) -> Result<Greeted> {
    let mut client: BoxStream = Box::new(accepted.stream);
    let mut parties = Parties::of(accepted.peer, accepted.local);
    let mut first_bytes = Vec::new();
    if believes(service, &parties.source) {
        *stage = "silent";
        first_read(client.as_mut(), &mut first_bytes).await?;
        *stage = "proxy_header";
        header::read(client.as_mut(), &mut first_bytes, &mut parties).await?;
        connection.facts().client = parties.source.to_string();
    }
    // Behind a trusted proxy this is the client's own address: one proxy stands for many clients.
    *stage = "rate";
    check_rate(shared, service, &parties.source)?;

    let by_hello = service.routes.by_hello();
    let default = || service.routes.find(None).cloned();
    let plain = default().filter(|route| matches!(route.inbound, Inbound::Plain));
    if let Some(route) = plain {
        let subject = Subject::new(route, parties, None, None);
        return Ok(Greeted { client, subject, first_bytes, upgrading: None, pending: None });
    }
    if let (Some(upgrade), Some(route)) = (service.upgrade.filter(|one| one.is_two_sided()), default())
        && let Inbound::Tls(config) = &route.inbound
    {
        let pending =
            Some(PendingClient { upgrade, config: Arc::clone(config), source: parties.source.clone() });
        let subject = Subject::new(route, parties, None, None);
        return Ok(Greeted { client, subject, first_bytes, upgrading: None, pending });
    }
    // A place among the handshakes is for who has said something.
    *stage = "silent";
    if first_bytes.is_empty() && !service.upgrade.is_some_and(Upgrade::server_speaks_first) {
        first_read(client.as_mut(), &mut first_bytes).await?;
    }
    let mut upgrading = None;
    if let Some(upgrade) = service.upgrade {
        *stage = "handshake";
        let up = upgrading.insert(Box::new(Upgrading::new(upgrade, &Role::Server, first_bytes)));
        first_bytes = up.until_tls(client.as_mut(), None).await?;
        if first_bytes.is_empty() {
            first_read(client.as_mut(), &mut first_bytes).await?;
        }
    }
    *stage = "handshake";
    unserved.reached(Progress::Speaks);
    let place = shared.shakes_hands(&parties.source);
    let begun = Begun { client, parties, first_bytes, upgrading, by_hello };
    tokio::select! {
        greeted = shake_hands(begun, shared, service, connection, stage) => greeted,
        error = place.gives_way() => Err(error),
    }
}

/// A client that has begun its handshake.
struct Begun {
    client: BoxStream,
    parties: Parties,
    first_bytes: Vec<u8>,
    upgrading: Option<Box<Upgrading>>,
    /// Whether its hello says where it goes.
    by_hello: bool,
}

/// The handshake itself.
async fn shake_hands(
    begun: Begun,
    shared: &Shared,
    service: &Service,
    connection: &Connection,
    stage: &mut &'static str,
) -> Result<Greeted> {
    let Begun { mut client, parties, mut first_bytes, upgrading, by_hello } = begun;
    let _counted = Counted::new(&shared.metrics.handshaking);
    let started = Instant::now();
    let mut server_name = None;
    let route = if by_hello {
        *stage = "hello";
        let hello = read_hello(client.as_mut(), &mut first_bytes).await?;
        server_name = hello.server_name;
        connection.facts().server_name.clone_from(&server_name);
        *stage = "route";
        service.routes.find(server_name.as_deref()).cloned()
    } else {
        service.routes.find(None).cloned()
    };
    let Some(route) = route else {
        last_alert(client.as_mut(), UNRECOGNIZED_NAME).await;
        let text = match &server_name {
            Some(name) => format!("there is no way for the server name {name:?}"),
            None => "there is no way for clients that name no server".to_owned(),
        };
        return Err(Error::new(ErrorKind::NotFound, text).with_alert(UNRECOGNIZED_NAME));
    };
    let Inbound::Tls(config) = &route.inbound else {
        let subject = Subject::new(route, parties, None, server_name);
        return Ok(Greeted { client, subject, first_bytes, upgrading, pending: None });
    };
    *stage = "handshake";
    let (mut stream, info) = TlsStream::handshake(client, config, &Role::Server, &first_bytes).await?;
    if let Some(Err(error)) = upgrading.as_ref().map(|upgrading| upgrading.check(&info)) {
        stream.abort(NO_APPLICATION_PROTOCOL).await;
        return Err(error.with_alert(NO_APPLICATION_PROTOCOL));
    }
    shared.metrics.shook_hands(&info, started.elapsed());
    let server_name = info.server_name.clone().or(server_name);
    {
        let mut facts = connection.facts();
        facts.server_name.clone_from(&server_name);
        facts.client_cn = header::common_name(&info);
        facts.info = Some(Agreed::of(&info));
    }
    let subject = Subject::new(route, parties, Some(info), server_name);
    Ok(Greeted { client: Box::new(stream), subject, first_bytes: Vec::new(), upgrading, pending: None })
}

/// Whether connections from there begin with a PROXY header that counts.
fn believes(service: &Service, source: &Address) -> bool {
    match source {
        Address::Inet(source) => service.proxy_from.iter().any(|range| range.contains(source.ip())),
        Address::Unix(_) => service.proxy_from_unix,
        Address::Other(_) => false,
    }
}

fn check_rate(shared: &Shared, service: &Service, source: &Address) -> Result<()> {
    let (Some(rate), Address::Inet(source)) = (&service.rate, source) else { return Ok(()) };
    let mut buckets = shared.buckets.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if buckets.take(source.ip(), rate, std::time::Instant::now()) {
        return Ok(());
    }
    let text = format!("{} connects more often than {} times a second", source.ip(), rate.per_second);
    Err(Error::new(ErrorKind::ResourceLimit, text).with_reason("rate"))
}

/// The first bytes of a connection; there must be some.
async fn first_read(client: &mut dyn Stream, bytes: &mut Vec<u8>) -> Result<()> {
    ops::readable(client).await?;
    read_more(client, bytes).await
}

/// Appends what is there.
pub(super) async fn read_more(client: &mut dyn Stream, bytes: &mut Vec<u8>) -> Result<()> {
    let before = bytes.len();
    bytes.resize(before + FIRST_READ, 0);
    let read = ops::read(client, &mut bytes[before..]).await;
    bytes.truncate(before + read.as_ref().copied().unwrap_or(0));
    match read? {
        0 => Err(Error::new(
            ErrorKind::ConnectionLost,
            "the client closed the connection before its handshake",
        )
        .with_phase(Phase::Handshake)
        .with_reason("truncated")),
        _ => Ok(()),
    }
}

async fn read_hello(client: &mut dyn Stream, bytes: &mut Vec<u8>) -> Result<ClientHello> {
    let mut peek = Peek::new();
    loop {
        match peek.peek(bytes) {
            Ok(Parsed::Done { value, .. }) => return Ok(value),
            Ok(Parsed::NeedMore { .. }) => read_more(client, bytes).await?,
            Err(wrong) => {
                let kind = match wrong {
                    ClientHelloError::NotTls(_) => ErrorKind::IncompatiblePeer,
                    _ => ErrorKind::RemoteProtocol,
                };
                return Err(Error::new(kind, wrong.to_string()).with_phase(Phase::Handshake));
            }
        }
    }
}

/// The service is not there: says so in what the client speaks, and never as an orderly end.
async fn break_off(mut client: BoxStream, inbound: &Inbound) {
    match (inbound, client.tls_mut()) {
        (_, Some(tls)) => tls.abort(INTERNAL_ERROR).await,
        (Inbound::PassThrough, None) => last_alert(client.as_mut(), INTERNAL_ERROR).await,
        (_, None) => client.reset(0),
    }
}

/// A fatal alert in clear to a client whose hello was only looked at.
async fn last_alert(client: &mut dyn Stream, alert: u8) {
    let record = [21, 3, 1, 0, 2, 2, alert];
    let _ = timeout(LAST_WORDS, async {
        ops::write_all(client, &record).await?;
        ops::send_eof(client).await
    })
    .await;
}

/// Payload, until both directions ended.
async fn transfer(
    established: Established,
    shared: &Shared,
    connection: &Connection,
    idle: Option<Duration>,
) -> End {
    let Established { client, upstream, first } = established;
    // Many share a proxy, and often one machine with their services: what one moves the others' bytes wait for.
    let flow = |initial, stats| FlowOptions { initial, turns: Turns::Short, ..FlowOptions::new(stats) };
    let to_client = flow(first.to_client, Arc::clone(&connection.to_client));
    let to_upstream = flow(first.to_upstream, Arc::clone(&connection.to_upstream));
    let mut pump = Pump::new(Ends::Streams(client, upstream), to_client, to_upstream);
    let mut clock = IdleClock::new(idle);
    let mut cut = pin!(shared.cut.come());
    runtime::settled();
    let end = loop {
        // A pump takes turns by itself; a budget that runs out would look like a silent endpoint.
        let turn = unconstrained(poll_fn(|cx| {
            if let Poll::Ready(result) = pump.poll(cx, PumpMode::Run) {
                let outcome = if result.is_ok() { "ended" } else { "failed" };
                return Poll::Ready(Turn::Over(End { outcome, error: result.err() }));
            }
            if let Poll::Ready(result) = clock.poll(cx, &mut pump, false) {
                return Poll::Ready(Turn::Over(End { outcome: "idle", error: result.err() }));
            }
            if cut.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Turn::Over(End::cut()));
            }
            clock.take_move().map_or(Poll::Pending, |thread| Poll::Ready(Turn::Move(thread)))
        }));
        match turn.await {
            Turn::Over(end) => break end,
            Turn::Move(thread) => runtime::move_to(thread).await,
        }
        if let Err(error) = pump.moved() {
            break End { outcome: "failed", error: Some(error) };
        }
        clock.moved();
    };
    let Ends::Streams(client, upstream) = pump.ends() else { return end };
    match end.outcome {
        "ended" => {}
        // Nothing was on its way, so this is an orderly end.
        "idle" => {
            poll_fn(|cx| {
                let _ = (client.poll_send_eof(cx), upstream.poll_send_eof(cx));
                Poll::Ready(())
            })
            .await;
        }
        // Bytes may be missing: no end may look like an orderly one. In TLS it does not by itself.
        _ => {
            for end in [client, upstream] {
                if end.tls_mut().is_none() {
                    end.reset(0);
                }
            }
        }
    }
    end
}

/// One more of something, as long as it lives.
pub(super) struct Counted<'a>(&'a AtomicU64);

impl<'a> Counted<'a> {
    pub(super) fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

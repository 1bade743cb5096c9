//! What a proxy has done, and what happened to it. Counters are native and read when somebody asks; each
//! event is one connection's.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use super::Upstream;
use crate::error::Error;
use crate::pump::FlowStats;
use crate::stats::LatencyHistogram;
use crate::tls::HandshakeInfo;

/// A service that failed is tried last for this long.
const REST: Duration = Duration::from_secs(5);
/// Services whose failures are counted.
const MAX_NAMES: usize = 1024;

/// Where a proxy's life is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyState {
    /// Not started.
    #[default]
    New,
    /// It accepts connections.
    Running,
    /// It accepts no more, and waits for the open ones.
    Draining,
    /// Over.
    Closed,
}

impl ProxyState {
    /// The word that crosses the seam.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Closed => "closed",
        }
    }
}

/// What happened to one connection.
#[derive(Debug)]
pub struct ProxyEvent {
    /// The connection, as it was then.
    pub connection: ConnectionSnapshot,
    /// How it ended: `"ended"`, `"failed"`, `"idle"`, `"cut"`, or where it was refused: `"rate"`, `"proxy_header"`,
    /// `"hello"`, `"route"`, `"handshake"`, `"upstream"`. Or `"retry"`: it goes on, a service did not answer
    /// and another is tried.
    pub outcome: &'static str,
    /// Why, where it was not an orderly end.
    pub error: Option<Error>,
}

/// What is known of one connection.
#[derive(Clone, Debug, Default)]
pub struct ConnectionSnapshot {
    /// Its number since the start.
    pub id: u64,
    /// Who connected: behind a trusted proxy, the client that it named.
    pub client: String,
    /// To which of our addresses.
    pub local: String,
    /// The service.
    pub upstream: Option<String>,
    /// The name that the client asked for.
    pub server_name: Option<String>,
    /// Of the client's TLS, where it ends here.
    pub version: Option<&'static str>,
    /// Its cipher suite.
    pub cipher_suite: Option<String>,
    /// Its application protocol.
    pub alpn: Option<Vec<u8>>,
    /// Whether it resumed a session.
    pub resumed: bool,
    /// The common name of the client's certificate.
    pub client_cn: Option<String>,
    /// Since it was accepted.
    pub age: Duration,
    /// Payload to the service.
    pub to_upstream: u64,
    /// Payload to the client.
    pub to_client: u64,
}

/// Counters of one moment.
#[derive(Clone, Debug, Default)]
pub struct ProxyStats {
    /// Where its life is.
    pub state: ProxyState,
    /// Connections accepted.
    pub accepted: u64,
    /// Connections that are open now.
    pub open: u64,
    /// Handshakes of clients that are under way now.
    pub handshaking: u64,
    /// TLS handshakes of clients that were done, by version.
    pub handshakes: BTreeMap<&'static str, u64>,
    /// How many of them resumed a session.
    pub resumed: u64,
    /// Connections that are over, by outcome.
    pub ended: BTreeMap<&'static str, u64>,
    /// Errors that ended connections, by kind.
    pub errors: BTreeMap<&'static str, u64>,
    /// Tries to reach a service that failed, by service.
    pub upstream_failures: BTreeMap<String, u64>,
    /// Payload to services, open connections included.
    pub to_upstream: u64,
    /// Payload to clients.
    pub to_client: u64,
    /// Median of the time from a client's first byte to the end of its handshake.
    pub handshake_p50: Duration,
    /// 99 of 100 took no longer.
    pub handshake_p99: Duration,
    /// Median of the time until a service was reached, its handshake included.
    pub connect_p50: Duration,
    /// 99 of 100 took no longer.
    pub connect_p99: Duration,
    /// Times that accepting waited for the limit of connections.
    pub limit_pauses: u64,
    /// Times that accepting waited for descriptors or memory.
    pub exhausted_pauses: u64,
    /// Addresses that the rate limit remembers.
    pub rate_addresses: u64,
}

/// One open connection: written by its task, read by whoever asks.
pub(super) struct Connection {
    pub(super) id: u64,
    since: Instant,
    pub(super) local: String,
    pub(super) to_upstream: Arc<FlowStats>,
    pub(super) to_client: Arc<FlowStats>,
    facts: Mutex<Facts>,
}

/// What is learnt of it on the way.
#[derive(Default)]
pub(super) struct Facts {
    pub(super) client: String,
    pub(super) upstream: Option<String>,
    pub(super) server_name: Option<String>,
    pub(super) client_cn: Option<String>,
    pub(super) info: Option<Agreed>,
}

/// What remains of a handshake.
pub(super) struct Agreed {
    version: &'static str,
    cipher_suite: String,
    alpn: Option<Vec<u8>>,
    resumed: bool,
}

impl Agreed {
    pub(super) fn of(info: &HandshakeInfo) -> Self {
        let HandshakeInfo { version, cipher_suite, alpn, resumed, .. } = info;
        Self { version, cipher_suite: cipher_suite.clone(), alpn: alpn.clone(), resumed: *resumed }
    }
}

impl Connection {
    /// What is known, to be added to.
    pub(super) fn facts(&self) -> MutexGuard<'_, Facts> {
        lock(&self.facts)
    }

    pub(super) fn snapshot(&self) -> ConnectionSnapshot {
        let facts = self.facts();
        let agreed = facts.info.as_ref();
        ConnectionSnapshot {
            id: self.id,
            client: facts.client.clone(),
            local: self.local.clone(),
            upstream: facts.upstream.clone(),
            server_name: facts.server_name.clone(),
            version: agreed.map(|agreed| agreed.version),
            cipher_suite: agreed.map(|agreed| agreed.cipher_suite.clone()),
            alpn: agreed.and_then(|agreed| agreed.alpn.clone()),
            resumed: agreed.is_some_and(|agreed| agreed.resumed),
            client_cn: facts.client_cn.clone(),
            age: self.since.elapsed(),
            to_upstream: self.to_upstream.bytes.get(),
            to_client: self.to_client.bytes.get(),
        }
    }
}

/// What happens at connection rate. Bytes are counted by the connections themselves.
#[derive(Default)]
pub(super) struct Metrics {
    next_id: AtomicU64,
    pub(super) handshaking: AtomicU64,
    inner: Mutex<Inner>,
    times: OnceLock<Box<Mutex<Times>>>,
}

#[derive(Default)]
struct Inner {
    open: HashMap<u64, Arc<Connection>>,
    handshakes: BTreeMap<&'static str, u64>,
    resumed: u64,
    ended: BTreeMap<&'static str, u64>,
    errors: BTreeMap<&'static str, u64>,
    upstreams: HashMap<String, Failures>,
    /// Of connections that are over.
    to_upstream: u64,
    to_client: u64,
}

/// Of one service.
#[derive(Default)]
struct Failures {
    count: u64,
    /// The last one, where it has not answered since.
    last: Option<Instant>,
}

/// Histograms have one writer at a time: that is what the lock is for.
#[derive(Default)]
struct Times {
    handshake: LatencyHistogram,
    connect: LatencyHistogram,
}

impl Metrics {
    /// A new connection.
    pub(super) fn begin(&self, client: String, local: String) -> Arc<Connection> {
        let connection = Arc::new(Connection {
            id: self.next_id.fetch_add(1, Relaxed) + 1,
            since: Instant::now(),
            local,
            to_upstream: Arc::new(FlowStats::without_latency()),
            to_client: Arc::new(FlowStats::without_latency()),
            facts: Mutex::new(Facts { client, ..Facts::default() }),
        });
        lock(&self.inner).open.insert(connection.id, Arc::clone(&connection));
        connection
    }

    /// It is over. Gives its last numbers.
    pub(super) fn end(
        &self,
        connection: &Connection,
        outcome: &'static str,
        error: Option<&Error>,
    ) -> ConnectionSnapshot {
        let snapshot = connection.snapshot();
        let mut inner = lock(&self.inner);
        inner.open.remove(&connection.id);
        *inner.ended.entry(outcome).or_default() += 1;
        if let Some(error) = error {
            *inner.errors.entry(error.kind().as_str()).or_default() += 1;
        }
        inner.to_upstream += snapshot.to_upstream;
        inner.to_client += snapshot.to_client;
        snapshot
    }

    pub(super) fn shook_hands(&self, info: &HandshakeInfo, took: Duration) {
        let mut inner = lock(&self.inner);
        *inner.handshakes.entry(info.version).or_default() += 1;
        inner.resumed += u64::from(info.resumed);
        drop(inner);
        lock(self.times.get_or_init(Box::default)).handshake.record(took);
    }

    pub(super) fn reached(&self, took: Duration) {
        lock(self.times.get_or_init(Box::default)).connect.record(took);
    }

    /// Those that have not failed lately come first; otherwise as they were given.
    pub(super) fn best_first<'a>(&self, upstreams: &'a [Upstream]) -> Vec<&'a Upstream> {
        let mut order: Vec<_> = upstreams.iter().collect();
        if order.len() > 1 {
            let inner = lock(&self.inner);
            let last = |one: &Upstream| inner.upstreams.get(&one.to_string()).and_then(|one| one.last);
            order.sort_by_cached_key(|one| last(one).is_some_and(|last| last.elapsed() < REST));
        }
        order
    }

    pub(super) fn upstream_failed(&self, name: &str) {
        let mut inner = lock(&self.inner);
        if !inner.upstreams.contains_key(name) && inner.upstreams.len() >= MAX_NAMES {
            // Reloads may bring new names for ever; the configuration that is in use has far fewer.
            inner.upstreams.clear();
        }
        let one = inner.upstreams.entry(name.to_owned()).or_default();
        one.count += 1;
        one.last = Some(Instant::now());
    }

    pub(super) fn upstream_answered(&self, name: &str) {
        if let Some(one) = lock(&self.inner).upstreams.get_mut(name) {
            one.last = None;
        }
    }

    pub(super) fn connections(&self) -> Vec<ConnectionSnapshot> {
        let mut open: Vec<_> = lock(&self.inner).open.values().map(|one| one.snapshot()).collect();
        open.sort_by_key(|one| one.id);
        open
    }

    /// All that is known here; the rest is the listener's and the limits'.
    pub(super) fn stats(&self) -> ProxyStats {
        let inner = lock(&self.inner);
        let open = |bytes: fn(&Connection) -> u64| inner.open.values().map(|one| bytes(one)).sum::<u64>();
        let mut stats = ProxyStats {
            accepted: self.next_id.load(Relaxed),
            open: inner.open.len() as u64,
            handshaking: self.handshaking.load(Relaxed),
            handshakes: inner.handshakes.clone(),
            resumed: inner.resumed,
            ended: inner.ended.clone(),
            errors: inner.errors.clone(),
            upstream_failures: inner.upstreams.iter().map(|(name, one)| (name.clone(), one.count)).collect(),
            to_upstream: inner.to_upstream + open(|one| one.to_upstream.bytes.get()),
            to_client: inner.to_client + open(|one| one.to_client.bytes.get()),
            ..ProxyStats::default()
        };
        drop(inner);
        if let Some(times) = self.times.get() {
            let times = lock(times);
            let quantile = |times: &LatencyHistogram, q| times.quantile(q).unwrap_or_default();
            stats.handshake_p50 = quantile(&times.handshake, 0.5);
            stats.handshake_p99 = quantile(&times.handshake, 0.99);
            stats.connect_p50 = quantile(&times.connect, 0.5);
            stats.connect_p99 = quantile(&times.connect, 0.99);
        }
        stats
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

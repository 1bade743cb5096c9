//! What the handle and the task share: the state, the stop request, who waits for the end, counters.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;

use super::control::{Reply, Value};
use crate::error::{Direction, Error, ErrorKind, Result};
use crate::port::tap::TapStats;
use crate::pump::FlowStats;
use crate::stats::{EndpointStats, LATENCY_BUCKETS};

/// Where a bridge's life is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BridgeState {
    /// Nothing was asked of it yet.
    New,
    /// Connecting, or shaking hands.
    Handshaking,
    /// Hands were shaken; payload waits for `start`.
    Ready,
    /// Payload flows.
    Running,
    /// It delivers what waits, then ends.
    Draining,
    /// Over; every resource is given back.
    Closed,
}

impl BridgeState {
    /// The word that crosses the seam.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Handshaking => "handshaking",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Closed => "closed",
        }
    }
}

/// Live counters of a bridge: written by its task, read by whoever asks.
#[derive(Default)]
pub struct BridgeStats {
    /// The transport: its packets where there is a framing, else its bytes.
    pub transport: Option<Arc<EndpointStats>>,
    /// TLS: its records.
    pub tls: Option<Arc<EndpointStats>>,
    /// The stream that everything runs over: bytes and system calls.
    pub carrier: Option<Arc<EndpointStats>>,
    /// The sink's endpoint.
    pub sink: Option<Arc<EndpointStats>>,
    /// Cleartext from the sink to the transport.
    pub encapsulate: Arc<FlowStats>,
    /// Cleartext from the transport to the sink.
    pub decapsulate: Arc<FlowStats>,
    /// The latest tap, which may be over.
    pub tap: Option<Arc<TapStats>>,
    /// Facts that do not change while it runs: `("engine", "openssl")`, `("offload.tso", "on")`.
    pub facts: Vec<(String, String)>,
}

/// Counters of one moment, plain numbers.
#[derive(Clone, Debug, Default)]
pub struct StatsSnapshot {
    /// Seconds since payload began to flow; 0 before.
    pub running: Duration,
    /// Cleartext to the network.
    pub encapsulate: FlowSnapshot,
    /// Cleartext from the network.
    pub decapsulate: FlowSnapshot,
    /// The transport.
    pub transport: SideSnapshot,
    /// The sink.
    pub sink: SideSnapshot,
    /// Facts by name: engine, version, suite, offloads in use and if not why.
    pub facts: Vec<(String, String)>,
}

/// One direction.
#[derive(Clone, Debug, Default)]
pub struct FlowSnapshot {
    /// Bytes of payload delivered.
    pub bytes: u64,
    /// Packets delivered (packet endpoints), counted as they would lie on a wire.
    pub packets: u64,
    /// Time in which the destination took nothing while something waited.
    pub backpressure: Duration,
    /// Median time between the receive and the send of the same byte or packet.
    pub latency_p50: Duration,
    /// 99 of 100 took no longer.
    pub latency_p99: Duration,
    /// The longest.
    pub latency_max: Duration,
    /// How many took how long, between the bounds of [`latency_bounds`](crate::stats::latency_bounds).
    pub latency_counts: [u64; LATENCY_BUCKETS],
    /// All of them added up.
    pub latency_sum: Duration,
    /// Drops by reason; reasons without a drop are left out.
    pub drops: Vec<(&'static str, u64)>,
}

/// One endpoint.
#[derive(Clone, Debug, Default)]
pub struct SideSnapshot {
    /// What it is, for people.
    pub description: String,
    /// Bytes received from it.
    pub bytes_received: u64,
    /// Bytes sent to it.
    pub bytes_sent: u64,
    /// Packets received from it.
    pub packets_received: u64,
    /// Packets sent to it.
    pub packets_sent: u64,
    /// TLS records opened.
    pub records_received: u64,
    /// TLS records sealed.
    pub records_sent: u64,
    /// Receiving system calls.
    pub receive_calls: u64,
    /// Sending system calls.
    pub send_calls: u64,
}

/// Shared by the handle and the task.
#[derive(Default)]
pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// Wakes the task for a stop, also while it waits inside a handshake.
    pub(super) stop_wanted: Notify,
}

struct Inner {
    state: BridgeState,
    start_called: bool,
    /// An error ended it between its handshake and its start.
    failed_at_rest: bool,
    /// Latest moment of the end, once a stop was asked for.
    stop_at: Option<Instant>,
    drain: bool,
    /// Nothing is said to the peer at the end.
    aborted: bool,
    waiting: Vec<Reply>,
    stats: BridgeStats,
    descriptions: (String, String),
    /// The transport's, ours and the peer's.
    addresses: (Option<SocketAddr>, Option<SocketAddr>),
    started_at: Option<Instant>,
    unused: Option<Vec<u8>>,
    watched: bool,
    pauses: Pauses,
    /// Whether the task has still to look at them.
    pauses_changed: bool,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            state: BridgeState::New,
            start_called: false,
            failed_at_rest: false,
            stop_at: None,
            drain: false,
            aborted: false,
            waiting: Vec::new(),
            stats: BridgeStats::default(),
            descriptions: Default::default(),
            addresses: (None, None),
            started_at: None,
            unused: None,
            watched: false,
            pauses: Pauses::default(),
            pauses_changed: false,
        }
    }
}

/// Which directions are paused.
#[derive(Clone, Copy, Default)]
pub(super) struct Pauses {
    pub(super) encapsulate: bool,
    pub(super) decapsulate: bool,
}

/// A drop belongs to the direction in which the packet was on its way.
fn note_drops(endpoint: Option<&EndpointStats>, to_it: &mut FlowSnapshot, from_it: &mut FlowSnapshot) {
    let Some(endpoint) = endpoint else { return };
    let sent = endpoint.drops.iter().map(|drop| (drop, true));
    let received = endpoint.receive_drops.iter().map(|drop| (drop, false));
    for ((reason, n), is_to_it) in sent.chain(received).filter(|((_, n), _)| *n > 0) {
        let flow = if is_to_it { &mut *to_it } else { &mut *from_it };
        match flow.drops.iter_mut().find(|(word, _)| *word == reason.as_str()) {
            Some((_, sum)) => *sum += n,
            None => flow.drops.push((reason.as_str(), n)),
        }
    }
}

/// A stop that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StopRequest {
    /// The moment at which everything ends.
    pub(super) at: Instant,
    /// Whether what waits is delivered first.
    pub(super) drain: bool,
}

impl Shared {
    pub(super) fn state(&self) -> BridgeState {
        self.lock().state
    }

    pub(super) fn set_state(&self, state: BridgeState) {
        let mut inner = self.lock();
        if state == BridgeState::Running && inner.started_at.is_none() {
            inner.started_at = Some(Instant::now());
        }
        inner.state = state;
    }

    pub(super) fn watch(&self) {
        self.lock().watched = true;
    }

    pub(super) fn is_watched(&self) -> bool {
        self.lock().watched
    }

    /// Notes the first `start`; a second one, or one on a closed bridge, is refused. Where an error has
    /// just ended it, nobody could know: it is told like any error of a bridge that was started.
    pub(super) fn note_start(&self) -> Result<()> {
        let mut inner = self.lock();
        let is_over = inner.state == BridgeState::Closed && !inner.failed_at_rest;
        if is_over || inner.stop_at.is_some() {
            return Err(Error::new(ErrorKind::Closed, "the bridge is closed"));
        }
        if std::mem::replace(&mut inner.start_called, true) {
            let text = "the bridge was started already";
            return Err(Error::new(ErrorKind::ApiMisuse, text).with_reason("started"));
        }
        Ok(())
    }

    /// Pauses a direction, or ends that. `wake` is called where the task does not know yet that there is
    /// something to look at.
    pub(super) fn set_paused(&self, direction: Direction, paused: bool, wake: impl FnOnce()) {
        let inner = &mut *self.lock();
        match direction {
            Direction::Encapsulate => inner.pauses.encapsulate = paused,
            Direction::Decapsulate => inner.pauses.decapsulate = paused,
        }
        // Under the lock: whoever finds it set finds the task woken too.
        if !std::mem::replace(&mut inner.pauses_changed, true) {
            wake();
        }
    }

    /// The task looks: what is paused now. Later changes wake it again.
    pub(super) fn look_at_pauses(&self) -> Pauses {
        let mut inner = self.lock();
        inner.pauses_changed = false;
        inner.pauses
    }

    /// An error ends it before its start.
    pub(super) fn fail_at_rest(&self) {
        self.lock().failed_at_rest = true;
    }

    pub(super) fn failed_at_rest(&self) -> bool {
        self.lock().failed_at_rest
    }

    pub(super) fn start_called(&self) -> bool {
        self.lock().start_called
    }

    pub(super) fn request_stop(&self, drain: Duration) {
        let at = Instant::now() + drain;
        {
            let mut inner = self.lock();
            if inner.stop_at.is_none_or(|earlier| at < earlier) {
                inner.stop_at = Some(at);
                inner.drain = !drain.is_zero();
            }
        }
        self.stop_wanted.notify_one();
    }

    pub(super) fn request_abort(&self) {
        self.lock().aborted = true;
        self.request_stop(Duration::ZERO);
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.lock().aborted
    }

    pub(super) fn stop_request(&self) -> Option<StopRequest> {
        let inner = self.lock();
        inner.stop_at.map(|at| StopRequest { at, drain: inner.drain })
    }

    /// Ready when a stop is asked for.
    pub(super) async fn stopped(&self) -> StopRequest {
        loop {
            let notified = self.stop_wanted.notified();
            if let Some(request) = self.stop_request() {
                return request;
            }
            notified.await;
        }
    }

    /// Ready when it is time to end for a stop that was asked for: at once, or where payload is to flow soon
    /// (`start` was called) when the time of its drain is over. Later requests shorten that.
    pub(super) async fn stopped_before_payload(&self) -> StopRequest {
        loop {
            let request = self.stopped().await;
            if !request.drain || !self.start_called() {
                return StopRequest { drain: false, ..request };
            }
            tokio::select! {
                biased;
                () = self.stop_wanted.notified() => {}
                () = sleep_until(request.at.into()) => return request,
            }
        }
    }

    pub(super) fn when_closed(&self, reply: Reply) {
        let mut inner = self.lock();
        if inner.state == BridgeState::Closed {
            drop(inner);
            reply.send(Ok(Value::Unit));
        } else {
            inner.waiting.push(reply);
        }
    }

    /// The end: gives those who wait to be told.
    pub(super) fn close(&self) -> Vec<Reply> {
        let mut inner = self.lock();
        inner.state = BridgeState::Closed;
        std::mem::take(&mut inner.waiting)
    }

    /// Bytes read too far, for whoever asks from now on.
    pub(super) fn keep_unused(&self, bytes: Vec<u8>) {
        self.lock().unused = Some(bytes);
    }

    /// Bytes read too far, after the end.
    pub(super) fn take_unused(&self) -> Result<Vec<u8>> {
        let mut inner = self.lock();
        inner
            .unused
            .as_mut()
            .map(std::mem::take)
            .ok_or_else(|| Error::new(ErrorKind::Busy, "the bridge is not closed yet"))
    }

    pub(super) fn set_addresses(&self, local: Option<SocketAddr>, peer: Option<SocketAddr>) {
        self.lock().addresses = (local, peer);
    }

    pub(super) fn addresses(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        self.lock().addresses
    }

    pub(super) fn update_stats(&self, change: impl FnOnce(&mut BridgeStats, &mut (String, String))) {
        let inner = &mut *self.lock();
        change(&mut inner.stats, &mut inner.descriptions);
    }

    pub(super) fn snapshot(&self) -> StatsSnapshot {
        let inner = self.lock();
        let stats = &inner.stats;
        let transport = SideStats {
            description: &inner.descriptions.0,
            packets: stats.transport.as_deref(),
            records: stats.tls.as_deref(),
            bytes: stats.carrier.as_deref().or(stats.transport.as_deref()),
        };
        let sink = stats.sink.as_deref();
        let sink =
            SideStats { description: &inner.descriptions.1, packets: sink, records: sink, bytes: sink };
        let mut encapsulate = stats.encapsulate.snapshot();
        let mut decapsulate = stats.decapsulate.snapshot();
        note_drops(stats.transport.as_deref(), &mut encapsulate, &mut decapsulate);
        note_drops(stats.sink.as_deref(), &mut decapsulate, &mut encapsulate);
        StatsSnapshot {
            running: inner.started_at.map_or(Duration::ZERO, |since| since.elapsed()),
            encapsulate,
            decapsulate,
            transport: transport.snapshot(),
            sink: sink.snapshot(),
            facts: stats
                .facts
                .iter()
                .cloned()
                .chain(stats.tap.iter().map(|tap| ("tap".to_owned(), tap.to_string())))
                .collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Which layer of an endpoint counts what.
struct SideStats<'a> {
    description: &'a str,
    packets: Option<&'a EndpointStats>,
    records: Option<&'a EndpointStats>,
    bytes: Option<&'a EndpointStats>,
}

impl SideStats<'_> {
    fn snapshot(&self) -> SideSnapshot {
        let none = EndpointStats::default();
        let [packets, records, bytes] =
            [self.packets, self.records, self.bytes].map(|layer| layer.unwrap_or(&none));
        SideSnapshot {
            description: self.description.to_owned(),
            bytes_received: bytes.bytes_received.get(),
            bytes_sent: bytes.bytes_sent.get(),
            packets_received: packets.packets_received.get(),
            packets_sent: packets.packets_sent.get(),
            records_received: records.records_received.get(),
            records_sent: records.records_sent.get(),
            receive_calls: bytes.receive_calls.get(),
            send_calls: bytes.send_calls.get(),
        }
    }
}

//! What a tunnel does now, for whoever asks: its counters, its rates, its visitors.
//!
//! Its task writes; any thread reads. What is not here: what happens to a tunnel ([`notice`](super::notice)).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sapper_proto::tunnel::mux::Mux;

use super::notice::ServiceInfo;
use super::payload::Payload;
use super::served::{Served, ServiceStats};

/// A rate is that of the last one to two of these.
const WINDOW: Duration = Duration::from_secs(1);

/// What a tunnel did and holds, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelStats {
    /// Open streams.
    pub streams: u64,
    /// Streams since the beginning.
    pub opened: u64,
    /// Payload towards the other end of the tunnel.
    pub sent: u64,
    /// Payload from it.
    pub received: u64,
    /// What was sent in a second, over the last one or two.
    pub sent_rate: u64,
    /// The same of what was received.
    pub received_rate: u64,
    /// Bytes in memory: unread by sockets, or waiting to be sent or acknowledged.
    pub held: u64,
    /// The smoothed round trip, where it is known.
    pub rtt: Option<Duration>,
    /// Carriers after the first.
    pub resumes: u64,
    /// Since its beginning.
    pub age: Duration,
}

/// One visitor, or the connection to the service that serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisitorStats {
    /// Counted from 1 in each tunnel.
    pub number: u64,
    /// Where the visitor comes from; an original server does not say.
    pub address: Option<SocketAddr>,
    /// Which of the tunnel's services it came to.
    pub service: ServiceInfo,
    /// Since it came.
    pub age: Duration,
    /// Bytes from the socket at this end of the tunnel.
    pub from_socket: u64,
    /// Bytes to it.
    pub to_socket: u64,
}

/// What a tunnel's task writes down. Locks rather than a number each: a reader sees one moment.
#[derive(Debug)]
pub(super) struct Live {
    began: Instant,
    counted: Mutex<Counted>,
    visitors: Mutex<BTreeMap<u64, Arc<Moved>>>,
    services: Mutex<Vec<Arc<Served>>>,
}

#[derive(Debug)]
struct Counted {
    stats: TunnelStats,
    /// Marks that rates count from: the second is at most a window old while something happens.
    before: Mark,
    last: Mark,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Instant,
    sent: u64,
    received: u64,
}

#[derive(Debug)]
struct Moved {
    address: Option<SocketAddr>,
    service: Arc<Served>,
    began: Instant,
    from: AtomicU64,
    to: AtomicU64,
}

/// A visitor's place in the list, as long as it is there.
pub(super) struct Listed {
    live: Arc<Live>,
    number: u64,
    moved: Arc<Moved>,
}

impl Default for Live {
    fn default() -> Self {
        let began = Instant::now();
        let mark = Mark { at: began, sent: 0, received: 0 };
        let counted = Counted { stats: TunnelStats::default(), before: mark, last: mark };
        Self { began, counted: Mutex::new(counted), visitors: Mutex::default(), services: Mutex::default() }
    }
}

impl Counted {
    /// Moves the marks where a window is over, and gives the rates.
    fn look(&mut self, now: Instant) -> (u64, u64) {
        let TunnelStats { sent, received, .. } = self.stats;
        if now.duration_since(self.last.at) >= WINDOW {
            self.before = self.last;
            self.last = Mark { at: now, sent, received };
        }
        let seconds = now.duration_since(self.before.at).as_secs_f64().max(WINDOW.as_secs_f64());
        // Counters begin anew with another session.
        let rate = |count: u64, before: u64| (count.saturating_sub(before) as f64 / seconds) as u64;
        (rate(sent, self.before.sent), rate(received, self.before.received))
    }
}

impl Live {
    /// As the state machine counts.
    pub(super) fn note(&self, mux: &Mux<Payload>, now: Instant) {
        let (gauges, stats) = (mux.gauges(), mux.stats());
        let mut counted = lock(&self.counted);
        counted.stats = TunnelStats {
            streams: gauges.streams as u64,
            opened: stats.opened + stats.accepted,
            sent: stats.payload.0,
            received: stats.payload.1,
            held: (gauges.held + gauges.unread) as u64,
            rtt: gauges.rtt,
            resumes: stats.resumes,
            ..TunnelStats::default()
        };
        counted.look(now);
    }

    /// Its streams are gone: nothing is held any more.
    pub(super) fn emptied(&self) {
        let mut counted = lock(&self.counted);
        (counted.stats.streams, counted.stats.held, counted.stats.rtt) = (0, 0, None);
    }

    /// Adds a visitor.
    pub(super) fn list(
        self: &Arc<Self>,
        number: u64,
        address: Option<SocketAddr>,
        service: Arc<Served>,
    ) -> Listed {
        let (from, to) = (AtomicU64::new(0), AtomicU64::new(0));
        let moved = Arc::new(Moved { address, service, began: Instant::now(), from, to });
        lock(&self.visitors).insert(number, Arc::clone(&moved));
        Listed { live: Arc::clone(self), number, moved }
    }

    /// Now.
    pub(super) fn stats(&self) -> TunnelStats {
        let mut counted = lock(&self.counted);
        let (sent_rate, received_rate) = counted.look(Instant::now());
        TunnelStats { sent_rate, received_rate, age: self.began.elapsed(), ..counted.stats }
    }

    pub(super) fn set_services(&self, services: Vec<Arc<Served>>) {
        *lock(&self.services) = services;
    }

    /// Each of its services, now.
    pub(super) fn services(&self) -> Vec<ServiceStats> {
        lock(&self.services).iter().map(|service| service.stats()).collect()
    }

    /// Those who came first, at most so many.
    pub(super) fn visitors(&self, most: usize) -> Vec<VisitorStats> {
        let one = |(number, moved): (&u64, &Arc<Moved>)| VisitorStats {
            number: *number,
            address: moved.address,
            service: moved.service.info().clone(),
            age: moved.began.elapsed(),
            from_socket: moved.from.load(Ordering::Relaxed),
            to_socket: moved.to.load(Ordering::Relaxed),
        };
        lock(&self.visitors).iter().take(most).map(one).collect()
    }
}

impl Listed {
    /// So many bytes came from its socket, and went to it. One task alone counts.
    pub(super) fn moved(&self, from: u64, to: u64) {
        let add = |count: &AtomicU64, n| count.store(count.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        add(&self.moved.from, from);
        add(&self.moved.to, to);
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut visitors = lock(&self.live.visitors);
        // Another session counts from 1 again: its visitor of that number stays.
        if visitors.get(&self.number).is_some_and(|moved| Arc::ptr_eq(moved, &self.moved)) {
            visitors.remove(&self.number);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let began = Instant::now();
        let mark = Mark { at: began, sent: 0, received: 0 };
        let mut counted = Counted { stats: TunnelStats::default(), before: mark, last: mark };
        let mut at = |millis, sent, received| {
            (counted.stats.sent, counted.stats.received) = (sent, received);
            counted.look(began + Duration::from_millis(millis))
        };
        assert_eq!(at(100, 500, 0), (500, 0), "less than a second counts as one");
        assert_eq!(at(1_000, 1_000, 0), (1_000, 0));
        assert_eq!(at(2_000, 5_000, 10), (4_000, 10));
        assert_eq!(at(2_500, 5_000, 10), (2_666, 6));
        assert_eq!(at(60_000, 5_000, 10), (0, 0), "it forgets what was");
        assert_eq!(at(61_000, 10, 20), (0, 10), "another session counts anew");
    }

    #[test]
    fn visitors_are_listed_while_they_are_there() {
        let live = Arc::new(Live::default());
        let address = "192.0.2.1:4000".parse().unwrap();
        let info = ServiceInfo { name: "web".to_owned(), port: 4000, host: None };
        let service = Arc::new(Served::new(info.clone(), None));
        let (one, two) =
            (live.list(1, Some(address), Arc::clone(&service)), live.list(2, None, Arc::clone(&service)));
        one.moved(5, 0);
        one.moved(2, 9);
        let seen = live.visitors(1);
        assert_eq!(
            seen,
            [VisitorStats {
                number: 1,
                address: Some(address),
                service: info,
                age: seen[0].age,
                from_socket: 7,
                to_socket: 9
            }]
        );
        let again = live.list(1, None, service);
        drop(one);
        assert_eq!(live.visitors(9).len(), 2, "the one that has its number now stays");
        drop((two, again));
        assert_eq!(live.visitors(9), []);
    }
}

//! How much may pass through a tunnel, and how often somebody may visit: of one address, one service, one
//! client, a whole server.
//!
//! What a limit does: bytes a second make a stream wait (nothing is read from the one end, or taken from the
//! other, until it is its turn); bytes in all cut it; visitors and visits send who comes away. Streams that
//! wait for the same limit have their turns in the order in which they asked, a 64th of a second's worth each.
//!
//! What is not here: who waits ([`link`](super::link)), lists of addresses ([`public`](super::public)).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sapper_proto::tunnel::limits::Bucket;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::proxy::Rate;
use crate::stream::address::network;

/// Addresses whose limits are remembered: 4 MB.
const MOST_ADDRESSES: usize = 16_384;
/// Credentials whose limits are remembered: 4 MB. Those of clients that are there stay in any case.
const MOST_OWNERS: usize = 16_384;
/// Visits are counted in thousandths: a rate may be below one a second.
const VISIT: u64 = 1_000;

/// From our socket, and to it.
pub(super) const FROM: usize = 0;
pub(super) const TO: usize = 1;

/// What may pass; `None` is no limit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limits {
    /// Bytes a second, in each direction.
    pub bytes_per_second: Option<u64>,
    /// Bytes in all, both directions together.
    pub total_bytes: Option<u64>,
    /// Visitors at a time.
    pub visitors: Option<u32>,
    /// Visits a second.
    pub visits: Option<Rate>,
    /// Visits in all.
    pub total_visits: Option<u64>,
}

impl Limits {
    /// Refuses what is no limit. 0 lets nothing pass, which is one; but nothing a second waits for ever.
    pub fn check(&self, field: &'static str) -> Result<()> {
        if self.bytes_per_second == Some(0) {
            return Err(Error::config(field, "bytes_per_second must be at least 1"));
        }
        if let Some(rate) = &self.visits {
            rate.check().map_err(|error| error.with_field(field))?;
        }
        Ok(())
    }

    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Whose limit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    Visitor,
    Service,
    Client,
    Server,
}

impl Scope {
    fn name(self) -> &'static str {
        match self {
            Self::Visitor => "visitor",
            Self::Service => "service",
            Self::Client => "client",
            Self::Server => "server",
        }
    }

    /// The limit is reached.
    pub(super) fn reached(self, what: &str) -> Error {
        reached(self, what)
    }
}

fn reached(scope: Scope, what: &str) -> Error {
    let reason = match scope {
        Scope::Visitor => "visitor_limit",
        Scope::Service => "service_limit",
        Scope::Client => "client_limit",
        Scope::Server => "server_limit",
    };
    Error::new(ErrorKind::ResourceLimit, format!("the {} has no {what}", scope.name()))
        .with_phase(Phase::Transfer)
        .with_reason(reason)
}

/// One account. Streams of several tunnels may share it.
#[derive(Debug)]
pub(super) struct Meter {
    scope: Scope,
    /// What is paid for at once.
    chunk: u32,
    /// Whether bytes are limited: otherwise only who comes and goes is looked at.
    counts_bytes: bool,
    began: Instant,
    most_visitors: Option<u32>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// From our sockets, and to them.
    bytes: Option<[Bucket; 2]>,
    bytes_left: Option<u64>,
    visitors: u32,
    visits: Option<Bucket>,
    visits_left: Option<u64>,
}

impl Meter {
    /// `None` where nothing is limited.
    pub(super) fn new(scope: Scope, limits: &Limits) -> Option<Arc<Self>> {
        if limits.is_none() {
            return None;
        }
        let chunk = limits
            .bytes_per_second
            .map_or(u32::MAX, |rate| u32::try_from(rate / 64).unwrap_or(u32::MAX).max(512));
        let bucket = |rate: u64| Bucket::new(rate, (rate / 4).max(u64::from(chunk)), Duration::ZERO);
        let visits = limits.visits.map(|rate| {
            let thousandths = (rate.per_second * VISIT as f64).ceil() as u64;
            Bucket::new(thousandths, u64::from(rate.burst) * VISIT, Duration::ZERO)
        });
        let state = State {
            bytes: limits.bytes_per_second.map(|rate| [bucket(rate), bucket(rate)]),
            bytes_left: limits.total_bytes,
            visitors: 0,
            visits,
            visits_left: limits.total_visits,
        };
        Some(Arc::new(Self {
            scope,
            chunk,
            counts_bytes: limits.bytes_per_second.is_some() || limits.total_bytes.is_some(),
            began: Instant::now(),
            most_visitors: limits.visitors,
            state: Mutex::new(state),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// Somebody comes.
    fn enter(&self, now: Instant) -> Result<()> {
        let mut state = self.state();
        if state.visits_left == Some(0) {
            return Err(self.scope.reached("visit left"));
        }
        if state.bytes_left == Some(0) {
            return Err(self.scope.reached("bytes left"));
        }
        if self.most_visitors.is_some_and(|most| state.visitors >= most) {
            return Err(self.scope.reached("place for another visitor"));
        }
        let time = self.time(now);
        if state.visits.as_mut().is_some_and(|visits| !visits.try_take(VISIT, time)) {
            return Err(self.scope.reached("visit left at this moment"));
        }
        state.visitors += 1;
        state.visits_left = state.visits_left.map(|left| left - 1);
        Ok(())
    }

    /// A visit that was none: another account sent the visitor away.
    fn forget(&self) {
        let mut state = self.state();
        state.visits_left = state.visits_left.map(|left| left + 1);
        if let Some(visits) = &mut state.visits {
            visits.give_back(VISIT);
        }
    }

    /// Somebody who is there already counts here from now on, whether there is a place or not.
    fn join(&self) {
        self.state().visitors += 1;
    }

    fn leave(&self) {
        self.state().visitors -= 1;
    }

    /// Pays for `n` bytes; when they may pass.
    fn reserve(&self, direction: usize, n: u32, now: Instant) -> Instant {
        let time = self.time(now);
        match &mut self.state().bytes {
            None => now,
            Some(buckets) => self.began + buckets[direction].reserve(u64::from(n), time),
        }
    }

    fn give_back(&self, direction: usize, n: u32) {
        if let Some(buckets) = &mut self.state().bytes {
            buckets[direction].give_back(u64::from(n));
        }
    }

    fn bytes_left(&self) -> u64 {
        self.state().bytes_left.unwrap_or(u64::MAX)
    }

    fn passed(&self, n: u32) {
        let mut state = self.state();
        state.bytes_left = state.bytes_left.map(|left| left.saturating_sub(u64::from(n)));
    }

    /// Nobody uses it.
    fn is_idle(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) == 1
    }

    /// Nobody uses it, and a new one with these limits would be the same.
    fn is_as_new(self: &Arc<Self>, limits: &Limits, now: Instant) -> bool {
        let time = self.time(now);
        let paid = |bucket: &mut Bucket| bucket.is_full(time);
        let mut state = self.state();
        self.is_idle()
            && state.bytes.as_mut().is_none_or(|both| both.iter_mut().all(paid))
            && state.visits.as_mut().is_none_or(paid)
            && (state.bytes_left, state.visits_left) == (limits.total_bytes, limits.total_visits)
    }
}

/// The limits of each address, whichever tunnels it visits. An IPv6 visitor has a /64 at its disposal, so that is
/// one address here.
#[derive(Debug)]
pub(super) struct Visitors {
    limits: Limits,
    total_bytes: Option<u64>,
    meters: Mutex<HashMap<u64, Arc<Meter>>>,
}

impl Visitors {
    /// Of one address: bytes a second and visitors at a time; bytes in all are of one visit.
    pub(super) fn new(limits: &Limits) -> Option<Arc<Self>> {
        if limits.is_none() {
            return None;
        }
        let total_bytes = limits.total_bytes;
        let limits = Limits { total_bytes: None, ..limits.clone() };
        Some(Arc::new(Self { limits, total_bytes, meters: Mutex::default() }))
    }

    /// The same where the limits are: who is there, and who was, is remembered.
    pub(super) fn kept(before: Option<&Arc<Self>>, limits: &Limits) -> Option<Arc<Self>> {
        let new = Self::new(limits);
        let same = |new: &Arc<Self>, before: &Arc<Self>| {
            before.limits == new.limits && before.total_bytes == new.total_bytes
        };
        match (new, before) {
            (Some(new), Some(before)) if same(&new, before) => Some(Arc::clone(before)),
            (new, _) => new,
        }
    }

    /// The accounts of a visit from there.
    fn of(&self, address: IpAddr, now: Instant) -> impl Iterator<Item = Arc<Meter>> {
        let visit = Limits { total_bytes: self.total_bytes, ..Limits::default() };
        self.address(address, now).into_iter().chain(Meter::new(Scope::Visitor, &visit))
    }

    fn address(&self, address: IpAddr, now: Instant) -> Option<Arc<Meter>> {
        let mut meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        let key = network(address);
        if let Some(meter) = meters.get(&key) {
            return Some(Arc::clone(meter));
        }
        let meter = Meter::new(Scope::Visitor, &self.limits)?;
        if meters.len() >= MOST_ADDRESSES {
            meters.retain(|_, meter| !meter.is_as_new(&self.limits, now));
        }
        // Whoever has that many addresses is not held up by a limit per address.
        if meters.len() < MOST_ADDRESSES {
            meters.insert(key, Arc::clone(&meter));
        }
        Some(meter)
    }
}

/// The limits of each client of a server, who is whoever says the same credentials: its tunnels share them, those
/// at a time and those one after the other.
#[derive(Debug)]
pub(super) struct Clients {
    most: usize,
    limits: Limits,
    meters: HashMap<[u8; 32], Arc<Meter>>,
}

impl Clients {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { most: MOST_OWNERS, limits: limits.clone(), meters: HashMap::new() }
    }

    /// Other limits for those who come. Where they are the same, what was used up stays so.
    pub(super) fn reload(&mut self, limits: &Limits) {
        if self.limits != *limits {
            *self = Self { most: self.most, ..Self::new(limits) };
        }
    }

    /// The account of who has credentials with this hash; none where nothing is limited.
    pub(super) fn of(&mut self, owner: [u8; 32], now: Instant) -> Option<Arc<Meter>> {
        if let Some(meter) = self.meters.get(&owner) {
            return Some(Arc::clone(meter));
        }
        let meter = Meter::new(Scope::Client, &self.limits)?;
        if self.meters.len() >= self.most {
            self.meters.retain(|_, meter| !meter.is_as_new(&self.limits, now));
        }
        if self.meters.len() >= self.most {
            // Who lets in that many forgets who is not there.
            self.meters.retain(|_, meter| !meter.is_idle());
        }
        self.meters.insert(owner, Arc::clone(&meter));
        Some(meter)
    }
}

/// The limits that hold for all streams of one tunnel.
#[derive(Clone, Debug, Default)]
pub(super) struct Quota {
    pub(super) meters: Vec<Arc<Meter>>,
    pub(super) visitors: Option<Arc<Visitors>>,
    /// Visitors of all tunnels together.
    pub(super) places: Option<Arc<Semaphore>>,
}

impl Quota {
    /// A place among the visitors of all tunnels.
    pub(super) fn place(&self) -> Result<Option<OwnedSemaphorePermit>> {
        let Some(places) = &self.places else { return Ok(None) };
        match Arc::clone(places).try_acquire_owned() {
            Ok(place) => Ok(Some(place)),
            Err(_) => Err(Scope::Server.reached("place for another visitor")),
        }
    }

    /// A visitor comes to a service: what its stream may do, nothing where there are no limits.
    pub(super) fn admit(
        &self,
        service: Option<&Arc<Meter>>,
        visitor: Option<IpAddr>,
    ) -> Result<Option<Box<Throttle>>> {
        if self.meters.is_empty() && service.is_none() && self.visitors.is_none() {
            return Ok(None);
        }
        let now = Instant::now();
        let visitors = self.visitors.as_ref().zip(visitor);
        let visitor = visitors.into_iter().flat_map(|(visitors, from)| visitors.of(from, now));
        let meters = visitor.chain(service.cloned()).chain(self.meters.iter().cloned());
        let mut throttle: Option<Box<Throttle>> = None;
        for meter in meters {
            if let Err(error) = meter.enter(now) {
                // Who is sent away costs nothing, whoever sends.
                throttle.iter().flat_map(|throttle| &throttle.meters).for_each(|entered| entered.forget());
                return Err(error);
            }
            throttle.get_or_insert_default().add(meter);
        }
        Ok(throttle)
    }

    /// What a stream may do from now on that was admitted under other limits. It stays though it has no place, and
    /// what its visit has used counts on where the limits of visitors are the `same`.
    pub(super) fn readmit(
        &self,
        mut before: Option<Box<Throttle>>,
        service: Option<Arc<Meter>>,
        visitor: Option<IpAddr>,
        same: bool,
    ) -> Option<Box<Throttle>> {
        if before.is_none() && self.meters.is_empty() && service.is_none() && self.visitors.is_none() {
            return None;
        }
        let left = before.as_mut().map_or_else(Vec::new, |before| before.surrender());
        let of_visitor = |meter: &&Arc<Meter>| meter.scope == Scope::Visitor;
        let mut meters: Vec<_> = match self.visitors.as_ref().zip(visitor) {
            _ if same => left.iter().filter(of_visitor).cloned().collect(),
            Some((visitors, from)) => visitors.of(from, Instant::now()).collect(),
            None => Vec::new(),
        };
        meters.extend(service.into_iter().chain(self.meters.iter().cloned()));
        let is_in = |meters: &[Arc<Meter>], one| meters.iter().any(|meter| Arc::ptr_eq(meter, one));
        meters.iter().filter(|meter| !is_in(&left, meter)).for_each(|meter| meter.join());
        left.iter().filter(|meter| !is_in(&meters, meter)).for_each(|meter| meter.leave());
        let mut throttle: Option<Box<Throttle>> = None;
        meters.into_iter().for_each(|meter| throttle.get_or_insert_default().add(meter));
        throttle
    }
}

/// What one stream may do. Dropped, it gives back what it did not use.
#[derive(Debug)]
pub(super) struct Throttle {
    meters: Vec<Arc<Meter>>,
    chunk: u32,
    counts_bytes: bool,
    /// Paid for, from our socket and to it.
    paid: [u32; 2],
    /// Since when, where that is to come.
    due: [Option<Instant>; 2],
}

impl Default for Throttle {
    fn default() -> Self {
        Self { meters: Vec::new(), chunk: u32::MAX, counts_bytes: false, paid: [0; 2], due: [None; 2] }
    }
}

/// An answer to [`Throttle::ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum May {
    /// So many bytes may pass, at least one.
    Pass(u32),
    /// Ask again then, after [`Throttle::is_due`].
    At(Instant),
    /// The moment was told already.
    Waits,
    /// Nothing more, ever.
    Never(Scope),
}

impl Throttle {
    fn add(&mut self, meter: Arc<Meter>) {
        self.chunk = self.chunk.min(meter.chunk);
        self.counts_bytes |= meter.counts_bytes;
        self.meters.push(meter);
    }

    /// Gives back what was not used. The accounts, in which it still counts.
    fn surrender(&mut self) -> Vec<Arc<Meter>> {
        self.unused(FROM);
        self.unused(TO);
        std::mem::take(&mut self.meters)
    }

    /// Whether up to `want` bytes may pass now. What is not [`used`](Self::used) is to be
    /// [given back](Self::unused), when nothing more is to pass for now.
    pub(super) fn ask(&mut self, direction: usize, want: u32, now: Instant) -> May {
        if !self.counts_bytes {
            return May::Pass(want);
        }
        if self.due[direction].is_some() {
            return May::Waits;
        }
        let mut left = u64::MAX;
        for meter in &self.meters {
            left = left.min(meter.bytes_left());
            if left == 0 {
                return May::Never(meter.scope);
            }
        }
        if self.paid[direction] == 0 {
            let n = self.chunk.min(want);
            let at = self.meters.iter().map(|meter| meter.reserve(direction, n, now)).max().unwrap_or(now);
            self.paid[direction] = n;
            if at > now {
                self.due[direction] = Some(at);
                return May::At(at);
            }
        }
        May::Pass(self.paid[direction].min(want).min(u32::try_from(left).unwrap_or(u32::MAX)))
    }

    /// So many of them passed.
    pub(super) fn used(&mut self, direction: usize, n: u32) {
        if !self.counts_bytes {
            return;
        }
        self.paid[direction] -= n;
        self.meters.iter().for_each(|meter| meter.passed(n));
    }

    /// No more of them will, for now.
    pub(super) fn unused(&mut self, direction: usize) {
        let n = std::mem::take(&mut self.paid[direction]);
        if n > 0 {
            self.meters.iter().for_each(|meter| meter.give_back(direction, n));
        }
    }

    /// The moment is there.
    pub(super) fn is_due(&mut self, direction: usize) {
        self.due[direction] = None;
    }

    /// The moments that are to come.
    pub(super) fn due(&self) -> [Option<Instant>; 2] {
        self.due
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.unused(FROM);
        self.unused(TO);
        self.meters.iter().for_each(|meter| meter.leave());
    }
}

#[cfg(test)]
mod tests;

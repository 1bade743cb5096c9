//! Both directions between the state machine and sockets: turns, deliveries, ends.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll};

use sapper_proto::tunnel::frame::{Code, OpenInfo};
use sapper_proto::tunnel::mux::{StreamKey, Turn};

use tokio::time::Instant;

use super::jobs::{Done, goodbye};
use super::pieces::Pieces;
use super::slots::Slot;
use super::{End, Link};
use crate::error::Error;
use crate::stream::{BoxStream, RecordMarks};
use crate::tunnel::limit::{FROM, May, Scope, TO};
use crate::tunnel::notice::{DATA, Notice, VISITORS};
use crate::tunnel::payload::{self, Payload};

/// The most that one write takes. Several quanta share it.
const WRITE: usize = 512 * 1024;
/// Writes before the carrier is read again. An original peer, which gives no credit, may take what it is given
/// for ever.
const WRITES: u32 = 4;
/// Visitors that are taken before others have their turn.
const ACCEPTS: u32 = 64;
/// A queue that held more gives its memory back when it is empty.
const KEEP_PENDING: usize = 4 * 1024;
/// What may wait for sockets whose session is over, which no budget counts: what each tunnel may hold anyway.
const UNCOUNTED: usize = 1024 * 1024;

pub(super) const CONNECTED: [&str; 2] = ["visitor-connected", "service-connected"];
pub(super) const DISCONNECTED: [&str; 2] = ["visitor-disconnected", "service-disconnected"];
pub(super) const FAILED: [&str; 2] = ["visitor-error", "service-error"];
/// From our socket, and to it.
const DATA_FROM: [&str; 2] = ["data-from-visitor", "data-from-service"];
const DATA_TO: [&str; 2] = ["data-to-visitor", "data-to-service"];

impl Link {
    /// Reads for the streams whose turn it is and writes what is queued, as long as the carrier takes it.
    pub(super) fn send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        self.owes = true;
        for _ in 0..WRITES {
            self.turns();
            let now = self.now();
            let Some(carrier) = &mut self.carrier else { return moved };
            let mut slices = Vec::new();
            self.mux.poll_transmit(&mut slices, WRITE, now);
            if slices.is_empty() {
                self.owes = false;
                break;
            }
            let written = if self.records {
                // A record for each header would cost more than this copy.
                self.staging.clear();
                slices.iter().for_each(|slice| self.staging.extend_from_slice(slice));
                carrier.poll_write(cx, &[IoSlice::new(&self.staging)])
            } else {
                carrier.poll_write(cx, &slices)
            };
            drop(slices);
            match written {
                Poll::Pending => {
                    self.owes = false;
                    break;
                }
                Poll::Ready(Ok(n)) => {
                    self.mux.transmitted(n, now);
                    moved = true;
                }
                Poll::Ready(Err(error)) => {
                    self.lose_carrier(Some(error));
                    return true;
                }
            }
        }
        if self.records {
            if self.mux.gauges().unsent == 0 {
                self.staging = Vec::new();
            }
            if let Some(carrier) = &mut self.carrier
                && let Poll::Ready(Err(error)) = carrier.poll_flush(cx)
            {
                self.lose_carrier(Some(error));
                return true;
            }
        }
        moved
    }

    fn turns(&mut self) {
        let (now, server) = (self.now(), self.is_server());
        while let Some(Turn { key, max }) = self.mux.poll_turn(now) {
            let Some(slot) = self.slots.get_mut(key) else {
                self.mux.not_ready(key);
                continue;
            };
            let Some(stream) = slot.stream.as_mut().filter(|_| !slot.local_ended) else {
                self.mux.not_ready(key);
                continue;
            };
            // A stream that may send no more is still asked whether it has ended.
            let (max, last) = match &mut slot.throttle {
                None => (max, None),
                Some(throttle) => match throttle.ask(FROM, max, Instant::now()) {
                    May::Pass(n) => (n, None),
                    May::Never(scope) => (1, Some(scope)),
                    May::At(at) => {
                        self.waiting.insert((at, key, FROM));
                        slot.service.paused();
                        self.mux.not_ready(key);
                        continue;
                    }
                    May::Waits => {
                        self.mux.not_ready(key);
                        continue;
                    }
                },
            };
            let mut block = payload::take(max as usize);
            let most = block.len().min(max as usize);
            let mut context = Context::from_waker(&slot.read_waker);
            match stream.poll_read(&mut context, &mut block[..most], &mut RecordMarks::ignored()) {
                Poll::Pending => {
                    payload::give(block);
                    if let Some(throttle) = &mut slot.throttle {
                        throttle.unused(FROM);
                    }
                    self.mux.not_ready(key);
                }
                Poll::Ready(Ok(1..)) if let Some(scope) = last => {
                    payload::give(block);
                    self.limit(key, scope);
                }
                Poll::Ready(Ok(0)) => {
                    payload::give(block);
                    slot.local_ended = true;
                    let both = slot.peer_ended;
                    if !server && slot.first.hears_no_more() {
                        self.tell_mismatch(key, false);
                    }
                    self.mux.finish(key);
                    if both {
                        self.slots.closing.push(key);
                    }
                }
                Poll::Ready(Ok(n)) => {
                    let mismatch = slot.first.hears(!server, &block[..n]);
                    self.teller.copy(&mut slot.copied.0, &block[..n]);
                    if let Some(throttle) = &mut slot.throttle {
                        throttle.used(FROM, n as u32);
                    }
                    let taken = self.mux.send(key, Payload::new(block, n), now);
                    debug_assert!(taken, "a turn is a promise");
                    self.note_data(key, n as u64, 0);
                    if mismatch {
                        self.tell_mismatch(key, true);
                    }
                }
                Poll::Ready(Err(error)) => {
                    payload::give(block);
                    self.fail(key, Code::CONNECTION_RESET, error);
                }
            }
        }
    }

    /// Writes what waits for a stream's socket and then `data`; what is not taken waits.
    pub(super) fn deliver(&mut self, key: StreamKey, data: Pieces<'_>) {
        let server = self.is_server();
        let Some(slot) = self.slots.get_mut(key) else {
            // Nobody is there any more: it counts as delivered.
            let (now, n) = (self.now(), data.len() as u32);
            self.mux.consumed(key, n, now);
            return;
        };
        let Some(stream) = slot.stream.as_mut() else {
            data.parts().for_each(|part| slot.pending.extend(part));
            if slot.over {
                self.retire_if_forgotten(key);
            }
            return;
        };
        let mut context = Context::from_waker(&slot.write_waker);
        let (mut delivered, mut rest, mut failure, mut limit) = (0, data, None, None);
        let mut mismatch = false;
        while !slot.pending.is_empty() || !rest.is_empty() {
            let waiting = slot.pending.len() + rest.len();
            let may = match &mut slot.throttle {
                None => waiting,
                Some(throttle) => match throttle.ask(TO, waiting as u32, Instant::now()) {
                    May::Pass(n) => n as usize,
                    May::Never(scope) => {
                        limit = Some(scope);
                        break;
                    }
                    May::At(at) => {
                        self.waiting.insert((at, key, TO));
                        slot.service.paused();
                        break;
                    }
                    May::Waits => break,
                },
            };
            let (front, back) = slot.pending.as_slices();
            let (slices, count) = rest.behind([front, back], may);
            match stream.poll_write(&mut context, &slices[..count]) {
                Poll::Ready(Ok(n)) => {
                    if let Some(throttle) = &mut slot.throttle {
                        throttle.used(TO, n as u32);
                    }
                    let opening = slot.first.says_nothing(server).then(|| {
                        let mut bytes = slices.iter().flat_map(|slice| slice.iter().copied()).take(n);
                        [bytes.next(), bytes.next()]
                    });
                    let mut written = n;
                    for slice in &slices {
                        let part = written.min(slice.len());
                        self.teller.copy(&mut slot.copied.1, &slice[..part]);
                        written -= part;
                    }
                    delivered += n;
                    let waited = n.min(slot.pending.len());
                    slot.pending.drain(..waited);
                    rest.advance(n - waited);
                    if let Some(opening) = opening {
                        let opening: Vec<u8> = opening.into_iter().flatten().collect();
                        mismatch = slot.first.hears(server, &opening);
                    }
                }
                Poll::Pending => {
                    if let Some(throttle) = &mut slot.throttle {
                        throttle.unused(TO);
                    }
                    break;
                }
                Poll::Ready(Err(error)) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        if failure.is_none() {
            rest.parts().for_each(|part| slot.pending.extend(part));
            if slot.pending.is_empty() && slot.pending.capacity() > KEEP_PENDING {
                slot.pending = VecDeque::new();
            }
            if let Poll::Ready(Err(error)) = stream.poll_flush(&mut context) {
                failure = Some(error);
            }
        }
        if failure.is_none() && slot.pending.is_empty() && slot.peer_ended && !slot.eof_sent {
            match stream.poll_send_eof(&mut context) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => slot.eof_sent = true,
                Poll::Ready(Err(error)) => failure = Some(error),
            }
        }
        let (both, over) = (slot.local_ended && slot.peer_ended, slot.over);
        let ends = server && slot.peer_ended && slot.pending.is_empty() && slot.first.hears_no_more();
        if mismatch || ends {
            self.tell_mismatch(key, mismatch);
        }
        let now = self.now();
        if let Some(error) = failure {
            return self.fail(key, Code::CONNECTION_RESET, error);
        }
        if let Some(scope) = limit {
            self.note_data(key, 0, delivered as u64);
            return self.limit(key, scope);
        }
        if delivered > 0 {
            self.note_data(key, 0, delivered as u64);
            self.mux.consumed(key, delivered as u32, now);
        }
        if over {
            self.retire_if_forgotten(key);
        } else if both {
            self.slots.closing.push(key);
        }
    }

    /// Sockets of streams that the state machine has forgotten say goodbye. False where there were none to look at.
    pub(super) fn retire_closing(&mut self) -> bool {
        let closing = std::mem::take(&mut self.slots.closing);
        for key in &closing {
            self.retire_if_forgotten(*key);
        }
        !closing.is_empty()
    }

    fn retire_if_forgotten(&mut self, key: StreamKey) {
        let waits = self.slots.get(key).is_some_and(|slot| !slot.pending.is_empty());
        if waits {
            return;
        }
        if self.mux.unread(key).is_some() {
            if self.slots.get(key).is_some_and(|slot| !slot.over) {
                // Its last word waits for the carrier.
                self.slots.closing.push(key);
            }
            return;
        }
        self.retire(key);
    }

    /// A stream that is over in order leaves its place; its socket gets what it has still to get, and says goodbye.
    fn retire(&mut self, key: StreamKey) {
        self.tell_untold(key);
        self.tell_if_wanted(DISCONNECTED, key);
        let Some(mut slot) = self.forget(key) else { return };
        let rest = std::mem::take(&mut slot.pending);
        match slot.stream.take() {
            // The peer has said its end and heard ours: nothing can get lost.
            Some(_) if slot.local_ended && slot.eof_sent => {}
            Some(stream) => self.start(Box::pin(goodbye(stream, rest))),
            None => drop(self.slots.undialled.insert(key, rest)),
        }
    }

    /// The state machine gave a place to a new stream: whose it was is forgotten there, perhaps only since this round
    /// began, and leaves.
    fn make_way(&mut self, key: StreamKey) {
        if let Some(before) = self.slots.key(key.slot) {
            self.retire(before);
        }
    }

    /// A stream has had all that it may have.
    fn limit(&mut self, key: StreamKey, scope: Scope) {
        if let Some(slot) = self.slots.get(key) {
            slot.service.cut();
        }
        self.fail(key, Code::LIMIT, scope.reached("bytes left"));
    }

    /// A stream that waited for its limits has its turn.
    pub(super) fn is_due(&mut self, key: StreamKey, direction: usize) {
        let Some(throttle) = self.slots.get_mut(key).and_then(|slot| slot.throttle.as_mut()) else { return };
        throttle.is_due(direction);
        if direction == FROM {
            self.mux.ready(key);
        } else {
            self.deliver(key, Pieces::default());
        }
    }

    /// A stream's place is free, and nothing waits for it.
    fn forget(&mut self, key: StreamKey) -> Option<Box<Slot>> {
        let slot = self.slots.remove(key)?;
        let due = slot.throttle.as_ref().map(|throttle| throttle.due()).unwrap_or_default();
        for (at, direction) in due.into_iter().zip([FROM, TO]) {
            at.map(|at| self.waiting.remove(&(at, key, direction)));
        }
        Some(slot)
    }

    /// Our end of a stream broke.
    pub(super) fn fail(&mut self, key: StreamKey, code: Code, error: Error) {
        let (now, reason) = (self.now(), error.message().to_owned());
        self.mux.reset(key, code, &reason, now);
        self.cut(key, Some(error));
    }

    /// A stream is over at once: so is its socket.
    pub(super) fn cut(&mut self, key: StreamKey, error: Option<Error>) {
        self.tell_untold(key);
        if let Some(error) = error
            && self.teller.wants(VISITORS)
        {
            self.tell_stream(FAILED, key, Notice { error: Some(error), ..Notice::default() });
        }
        self.tell_if_wanted(DISCONNECTED, key);
        if let Some(mut slot) = self.forget(key)
            && let Some(stream) = &mut slot.stream
        {
            stream.reset(0);
        }
    }

    /// The streams are over, since their session is. Whoever has only to take what came, its end included, gets it
    /// where no limit has a say in that; the others are cut.
    pub(super) fn lose_streams(&mut self) {
        let mut uncounted = 0;
        for key in self.slots.keys() {
            let counted = self.mux.unread(key).is_some();
            let whole = self.slots.get(key).is_some_and(|slot| {
                uncounted += if counted { 0 } else { slot.pending.len() };
                let limited = slot.throttle.is_some() && !slot.pending.is_empty();
                slot.peer_ended && !limited && uncounted <= UNCOUNTED
            });
            if !whole {
                self.cut(key, None);
                continue;
            }
            self.tell_untold(key);
            self.tell_if_wanted(DISCONNECTED, key);
            let Some(mut slot) = self.forget(key) else { continue };
            let rest = std::mem::take(&mut slot.pending);
            match slot.stream.take() {
                Some(stream) => self.start(Box::pin(goodbye(stream, rest))),
                None => drop(self.slots.undialled.insert(key, rest)),
            }
        }
    }

    /// The peer opened a stream: its service is dialled.
    pub(super) fn opened(&mut self, key: StreamKey, info: Option<&OpenInfo>) {
        let now = self.now();
        let End::Client(dialers) = &self.end else {
            return self.mux.reset(key, Code::DENIED, "this end takes no streams", now);
        };
        let at = usize::from(info.map_or(0, |info| info.service));
        let Some((dialer, service)) = dialers.get(at).zip(self.services.get(at)) else {
            return self.mux.reset(key, Code::UNREACHABLE, "there is no such service", now);
        };
        let visitor = info.and_then(|info| info.visitor);
        let throttle = match self.quota.admit(service.meter().as_ref(), None) {
            Ok(throttle) => throttle,
            Err(error) => {
                self.mux.reset(key, Code::LIMIT, error.message(), now);
                return self.refused(at as u16, error);
            }
        };
        let dial = Arc::clone(dialer).dial(visitor);
        let service = Arc::clone(service);
        self.make_way(key);
        self.slots.insert(key, (service, throttle), None, visitor, &self.awake, &self.live);
        self.start(Box::pin(async move { Done::Dialled(key, dial.await) }));
    }

    /// Begins a job.
    pub(super) fn start(&mut self, work: super::BoxFuture<Done>) {
        let job = self.jobs.add(work, &self.awake);
        self.work(job);
    }

    /// Goes on with a job.
    pub(super) fn work(&mut self, job: u32) {
        match self.jobs.poll(job) {
            None | Some(Done::Gone) => {}
            Some(Done::Dialled(key, Ok(stream))) => {
                let Some(slot) = self.slots.get_mut(key) else {
                    // Its visitor left, in order or not: so does it.
                    if let Some(rest) = self.slots.undialled.remove(&key) {
                        self.start(Box::pin(goodbye(stream, rest)));
                    }
                    return;
                };
                slot.stream = Some(stream);
                self.tell_if_wanted(CONNECTED, key);
                self.mux.ready(key);
                self.deliver(key, Pieces::default());
            }
            Some(Done::Dialled(key, Err(error))) => {
                use crate::error::ErrorKind;
                let code = match error.kind() {
                    ErrorKind::Connect => Code::REFUSED,
                    ErrorKind::ConnectDeadline => Code::DEADLINE,
                    _ => Code::UNREACHABLE,
                };
                self.slots.undialled.remove(&key);
                if self.slots.get(key).is_some() {
                    self.fail(key, code, error);
                }
            }
            Some(Done::Visitor(service, Ok(stream))) => self.admit(service, stream),
            Some(Done::Visitor(service, Err(error))) => self.refused(service, error),
        }
    }

    /// Whether one more visitor may come.
    pub(super) fn has_room(&self) -> bool {
        self.slots.len() + self.jobs.len() < self.max_visitors
    }

    /// Takes visitors that wait at the public ports.
    pub(super) fn accept_visitors(&mut self) {
        for at in std::mem::take(&mut self.knocked) {
            self.accept_at(at);
        }
    }

    fn accept_at(&mut self, at: u16) {
        for _ in 0..ACCEPTS {
            if !self.has_room() {
                // They wait in the system's queue until somebody leaves.
                return self.full.push(at);
            }
            let End::Server(ports) = &mut self.end else { return };
            let Some(port) = ports.get_mut(usize::from(at)) else { return };
            let (service, waker) = (&self.services[usize::from(at)], &self.accept_wakers[usize::from(at)]);
            match port.poll_accept(&mut Context::from_waker(waker)) {
                Poll::Pending => return,
                Poll::Ready(Ok(visitor)) => {
                    match visitor.greeting(&self.teller, self.info.as_ref(), service.info()) {
                        Ok(stream) => self.admit(at, stream),
                        Err(greeting) => {
                            self.start(Box::pin(async move { Done::Visitor(at, greeting.await) }));
                        }
                    }
                }
                Poll::Ready(Err(error)) => {
                    // A port that breaks does not mend by itself.
                    self.exit = Some(super::Exit::Broken(error));
                    return;
                }
            }
        }
        // The others after what those have to say.
        self.accept_wakers[usize::from(at)].wake_by_ref();
    }

    fn admit(&mut self, at: u16, mut stream: BoxStream) {
        // Let in while the tunnel got other services: it is nobody's visitor any more.
        let Some(service) = self.services.get(usize::from(at)).filter(|_| !self.parts) else {
            return stream.reset(0);
        };
        let service = Arc::clone(service);
        let visitor = stream.peer_address().zip(stream.local_address());
        let from = visitor.map(|(from, _)| from.ip());
        let admitted = self
            .quota
            .place()
            .and_then(|place| Ok((place, self.quota.admit(service.meter().as_ref(), from)?)));
        let (place, throttle) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                self.refused(at, error);
                return stream.reset(0);
            }
        };
        let now = self.now();
        let info = OpenInfo { service: at, visitor, ..OpenInfo::default() };
        let Some(key) = self.mux.open(info, now) else {
            // Too many, or nobody takes new ones: it hears so at once.
            service.refused();
            return stream.reset(0);
        };
        self.make_way(key);
        let slot =
            self.slots.insert(key, (service, throttle), Some(stream), visitor, &self.awake, &self.live);
        slot.place = place;
        self.tell_if_wanted(CONNECTED, key);
        self.mux.ready(key);
    }

    /// A visitor who never got a stream.
    fn refused(&mut self, at: u16, error: Error) {
        if let Some(service) = self.services.get(usize::from(at)) {
            service.refused();
        }
        if self.teller.wants(VISITORS) {
            self.teller.tell(Notice {
                name: FAILED[usize::from(!self.is_server())],
                tunnel: self.info.clone(),
                error: Some(error),
                ..Notice::default()
            });
        }
    }

    fn tell_if_wanted(&self, names: [&'static str; 2], key: StreamKey) {
        if self.teller.wants(VISITORS) {
            // A service that never answered was never connected.
            let was_there = self.slots.get(key).is_some_and(|slot| slot.stream.is_some());
            if was_there {
                self.tell_stream(names, key, Notice::default());
            }
        }
    }

    /// Tells how many bytes moved since the last time.
    pub(super) fn tell_data(&mut self) {
        for key in std::mem::take(&mut self.slots.untold) {
            self.tell_untold(key);
        }
    }

    fn tell_untold(&mut self, key: StreamKey) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        let (from, to) = std::mem::take(&mut slot.untold);
        let copied = std::mem::take(&mut slot.copied);
        if self.teller.wants(DATA) {
            if from > 0 {
                self.tell_stream(
                    DATA_FROM,
                    key,
                    Notice { bytes: from, payload: copied.0, ..Notice::default() },
                );
            }
            if to > 0 {
                self.tell_stream(DATA_TO, key, Notice { bytes: to, payload: copied.1, ..Notice::default() });
            }
        }
    }
}

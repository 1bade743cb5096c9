//! What goes out: turns, payload, ends, credit, link frames.

use std::io::IoSlice;
use std::time::Duration;

use super::super::frame::{Capabilities, Code, Header, Kind, OpenInfo, encode_reason};
use super::log::{Body, OVERHEAD};
use super::table::{List, Stream};
use super::{
    Budget, Event, FRESH_QUANTUM, FRESH_RUN, LEAST_PATH, LEAST_SPAN, LONGEST_TURN, Mux, Phase, Role,
    SHORT_PATH_WINDOW, StreamKey, Turn, growth,
};
use crate::tunnel::frame::HEADER;

/// Four milliseconds of the carrier's rate wait for it: more only makes others wait.
const BACKLOG_SECONDS: f64 = 0.004;
/// A stream that takes half of a small window in no less than this needs no larger one.
const SLOW: Duration = Duration::from_secs(1);
/// The rate is looked at this often.
const RATE_EVERY: Duration = Duration::from_millis(10);

impl<B: AsRef<[u8]>> Mux<B> {
    /// Opens a stream. `None` where the peer or its limit allows no more, and at an initiator before both
    /// have said hello: an original server takes no streams.
    pub fn open(&mut self, info: OpenInfo, now: Duration) -> Option<StreamKey> {
        let limit = if self.common.has(Capabilities::STREAMS) {
            self.peer.max_streams
        } else {
            self.config.max_streams
        };
        let too_early = self.role == Role::Initiator && self.common == Capabilities(0);
        if self.peer_leaves || self.leaving || self.phase == Phase::Over || too_early {
            return None;
        }
        if self.table.len() >= limit.min(self.config.max_streams) as usize {
            return None;
        }
        let mut stream = Stream::new(self.take_id(), now);
        stream.open = Some(Box::new(info));
        let key = self.table.insert(stream);
        self.table.join(key, List::Control);
        self.stats.opened += 1;
        Some(key)
    }

    fn take_id(&mut self) -> u32 {
        loop {
            let id = self.next_id;
            self.next_id = id.wrapping_add(2);
            if id != 0 && id != u32::MAX && self.table.find(id).is_none() {
                self.ours.add(id);
                return id;
            }
        }
    }

    /// The stream has something to send.
    pub fn ready(&mut self, key: StreamKey) {
        let Some(stream) = self.table.get_mut(key) else { return };
        if stream.flags.local_ended {
            return;
        }
        stream.flags.ready = true;
        // Without credit it waits, and before it is opened: either brings it here.
        if stream.open.is_none() && (stream.flags.plain || stream.credit > 0) {
            let list = if stream.flags.fresh { List::Fresh } else { List::Bulk };
            self.table.join(key, list);
        }
    }

    /// The stream has nothing to send (any more).
    pub fn not_ready(&mut self, key: StreamKey) {
        self.table.leave(key, List::Bulk);
        let Some(stream) = self.table.get_mut(key) else { return };
        stream.flags.ready = false;
        stream.flags.fresh = true;
        stream.deficit = 0;
    }

    /// Who may send now, and how much. The same answer until it is followed by [`send`](Self::send) or
    /// [`not_ready`](Self::not_ready).
    pub fn poll_turn(&mut self, now: Duration) -> Option<Turn> {
        self.say_control(now);
        if !self.may_send() || self.log.unsent() >= self.backlog() {
            return None;
        }
        let room = if self.log.keeps() {
            self.config.replay.saturating_sub(self.log.held() + HEADER + OVERHEAD)
        } else {
            usize::MAX
        };
        if room == 0 {
            return None;
        }
        loop {
            let bulk = self.table.first(List::Bulk);
            let fresh =
                self.table.first(List::Fresh).filter(|_| bulk.is_none() || self.fresh_run < FRESH_RUN);
            let key = fresh.or(bulk)?;
            let quantum = if fresh.is_some() { FRESH_QUANTUM } else { LONGEST_TURN };
            let quantum = quantum.min(self.config.quantum);
            let stream = self.table.get_mut(key).expect("it stands in a list");
            let credit = if stream.flags.plain { u32::MAX } else { stream.credit };
            if credit == 0 {
                stream.deficit = 0;
                self.table.leave(key, List::Bulk);
                continue;
            }
            if stream.deficit == 0 {
                stream.deficit = quantum;
                self.fresh_run = if fresh.is_some() { self.fresh_run.saturating_add(1) } else { 0 };
            }
            let max = stream.deficit.min(credit).min(u32::try_from(room).unwrap_or(u32::MAX));
            return Some(Turn { key, max });
        }
    }

    /// Queues payload of the stream whose turn it is, at most as much as the turn allows. False (and
    /// nothing is sent) where the stream is gone or it is too much.
    pub fn send(&mut self, key: StreamKey, payload: B, now: Duration) -> bool {
        let may_send = self.may_send();
        let Some(stream) = self.table.get_mut(key) else { return false };
        let len = payload.as_ref().len();
        let allowed = if stream.flags.plain { u32::MAX } else { stream.credit }.min(stream.deficit);
        if !may_send || stream.flags.local_ended || stream.open.is_some() || len > allowed as usize {
            return false;
        }
        if len == 0 {
            return true;
        }
        let len = len as u32;
        stream.deficit -= len;
        if !stream.flags.plain {
            stream.credit -= len;
        }
        if stream.deficit == 0 {
            stream.flags.fresh = false;
            self.table.leave(key, List::Bulk);
            self.table.join(key, List::Bulk);
        }
        self.log.push(Header { stream: key.id, kind: Kind::Data, payload: len }, Body::Payload(payload));
        self.stats.payload.0 += u64::from(len);
        self.rate_from.get_or_insert((now, 0));
        self.settle();
        true
    }

    /// Our end of the stream sends no more. With an original peer the close is held back while the other
    /// direction goes on, for [`Config::linger`](super::Config::linger) of silence.
    pub fn finish(&mut self, key: StreamKey) {
        self.table.leave(key, List::Bulk);
        let Some(stream) = self.table.get_mut(key) else { return };
        if stream.flags.local_ended {
            return;
        }
        stream.flags.local_ended = true;
        stream.flags.ready = false;
        stream.flags.say_end = true;
        self.table.join(key, List::Control);
    }

    /// Ends the stream at once, both directions. What the caller holds of it is forgotten.
    pub fn reset(&mut self, key: StreamKey, code: Code, reason: &str, now: Duration) {
        let Some(stream) = self.table.get(key) else { return };
        // What was never opened needs no end.
        if stream.open.is_none() && self.phase != Phase::Over {
            if stream.flags.plain {
                self.log.push(Header { stream: key.id, kind: Kind::Error, payload: 0 }, Body::None);
            } else {
                self.push_reset(key.id, code, reason);
            }
            self.stats.resets.0 += 1;
        }
        self.remove(key, now);
    }

    pub(super) fn push_reset(&mut self, id: u32, code: Code, reason: &str) {
        let body = encode_reason(&[], code, reason).into_boxed_slice();
        self.log.push(Header { stream: id, kind: Kind::Reset, payload: body.len() as u32 }, Body::Own(body));
    }

    /// The caller has delivered so much of what it was told: credit for more of it goes out.
    pub fn consumed(&mut self, key: StreamKey, n: u32, now: Duration) {
        let (limit, listened) = (self.config.max_unread_plain, self.want_read());
        let Some(stream) = self.table.get_mut(key) else { return };
        let n = n.min(stream.unread);
        stream.unread -= n;
        self.unread -= n as usize;
        if stream.flags.overfull && stream.unread as usize <= limit / 2 {
            stream.flags.overfull = false;
            self.overfull -= 1;
        }
        // Nothing is owed for nothing: whether the stream will be plain may not be known yet.
        if n > 0 && !stream.flags.plain && !stream.flags.remote_ended {
            stream.owed += n;
            if stream.owed >= stream.window / 2 {
                stream.flags.say_window = true;
                self.table.join(key, List::Control);
            }
        }
        self.settle();
        self.note_listening(listened, now);
        self.remove_if_over(key, now);
    }

    /// Says that no new streams are wanted. Those that are open go on.
    pub fn go_away(&mut self, code: Code, reason: &str) {
        if self.leaving {
            return;
        }
        self.leaving = true;
        if self.common.has(Capabilities::GO_AWAY) {
            let last = self.theirs.last().unwrap_or(0).to_be_bytes();
            let body = encode_reason(&last, code, reason).into_boxed_slice();
            let header = Header { stream: 0, kind: Kind::GoAway, payload: body.len() as u32 };
            self.log.push(header, Body::Own(body));
        }
    }

    /// What the carrier should take now: at most `bytes` bytes, behind what is in `out` already. Headers and
    /// payloads of several frames stand side by side: one write for all of them.
    pub fn poll_transmit<'a>(&'a mut self, out: &mut Vec<IoSlice<'a>>, bytes: usize, now: Duration) {
        /// What one system call takes (IOV_MAX is 1,024; more than this gains nothing).
        const SLICES: usize = 64;
        self.say_control(now);
        self.fill_link(now);
        let this = &*self;
        let slices = out.len() + SLICES;
        let link = &this.link[this.link_taken..];
        if !link.is_empty() {
            let rest = this.rest_before_link();
            if rest > 0 {
                // Alone: the slices may not suffice for all of it.
                return this.log.slices(out, slices, rest.min(bytes));
            }
            out.push(IoSlice::new(&link[..link.len().min(bytes)]));
            if bytes <= link.len() {
                return;
            }
        }
        if this.may_send() {
            this.log.slices(out, slices, bytes - link.len());
        }
    }

    /// What the carrier should take before anybody else can use it: the rest of a frame that is half taken.
    pub fn poll_rest<'a>(&'a self, out: &mut Vec<IoSlice<'a>>) {
        self.log.slices(out, out.len() + 2, self.log.rest());
    }

    /// The carrier took `n` bytes of that.
    pub fn transmitted(&mut self, mut n: usize, now: Duration) {
        let (before, listened) = (self.log.sent(), self.want_read());
        if self.link.len() > self.link_taken {
            let rest = self.rest_before_link().min(n);
            self.advance(rest, now);
            n -= rest;
            let link = n.min(self.link.len() - self.link_taken);
            self.link_taken += link;
            n -= link;
            if self.link_taken == self.link.len() {
                self.link.clear();
                self.link_taken = 0;
                self.link_first = false;
            }
        }
        self.advance(n, now);
        debug_assert!(self.log.sent() >= before);
        self.settle();
        self.note_listening(listened, now);
    }

    fn advance(&mut self, n: usize, now: Duration) {
        if n == 0 {
            return;
        }
        self.log.advance(n);
        let Some((from, bytes)) = &mut self.rate_from else { return };
        *bytes += n;
        let passed = now.saturating_sub(*from);
        if passed >= RATE_EVERY {
            let rate = *bytes as f64 / passed.as_secs_f64();
            // A carrier that something waits for shows what it can; an idle one shows what was asked.
            if self.log.unsent() > 0 {
                self.rate = if rate > self.rate { rate } else { (7.0 * self.rate + rate) / 8.0 };
            }
            self.rate_from = (self.log.unsent() > 0).then_some((now, 0));
        } else if self.log.unsent() == 0 {
            self.rate_from = None;
        }
    }

    /// Bytes of frames that go before link frames.
    fn rest_before_link(&self) -> usize {
        if self.link_first { 0 } else { self.log.before_link() }
    }

    /// How much may wait for the carrier.
    fn backlog(&self) -> usize {
        let (least, most) = self.config.backlog;
        if self.rate == 0.0 {
            most
        } else {
            ((self.rate * BACKLOG_SECONDS) as usize).clamp(least, most.max(least))
        }
    }

    /// Whether frames that are no link frames may go out.
    pub(super) fn may_send(&self) -> bool {
        matches!(self.phase, Phase::Plain | Phase::Greeting | Phase::Open)
    }

    /// Writes what streams have to say besides payload, as long as the carrier keeps up. Streams stand in
    /// the order in which they were opened: ids on the wire rise.
    fn say_control(&mut self, now: Duration) {
        let most = self.config.backlog.1;
        while self.may_send()
            && self.log.unsent() < most
            && let Some(key) = self.table.first(List::Control)
        {
            self.table.leave(key, List::Control);
            self.say_open(key);
            self.say_window(key, now);
            self.say_end(key, now);
        }
        self.settle();
    }

    fn say_open(&mut self, key: StreamKey) {
        let (plain, window) = (!self.common.has(Capabilities::STREAMS), self.config.window);
        let credit = self.peer.window;
        let Some(stream) = self.table.get_mut(key) else { return };
        let Some(info) = stream.open.take() else { return };
        stream.flags.plain = plain;
        let ready = stream.flags.ready;
        if plain {
            // An original client dials when it hears of a stream, whatever it hears. A service that
            // speaks first would wait for its visitor's first byte otherwise.
            self.log.push(Header { stream: key.id, kind: Kind::Data, payload: 0 }, Body::None);
        } else {
            stream.credit = credit;
            (stream.window, stream.allowance) = (window, window);
            let body = info.encode().into_boxed_slice();
            let header = Header { stream: key.id, kind: Kind::Open, payload: body.len() as u32 };
            self.log.push(header, Body::Own(body));
        }
        if ready {
            self.ready(key);
        }
    }

    fn say_window(&mut self, key: StreamKey, now: Duration) {
        let (path, config) = (self.path, &self.config);
        let full = self.budget.as_deref().is_some_and(Budget::is_exhausted);
        let left = if full { 0 } else { config.window_budget.saturating_sub(self.grown) };
        let tight = left < config.window_budget / 4;
        let Some(stream) = self.table.get_mut(key) else { return };
        if !std::mem::take(&mut stream.flags.say_window) || stream.flags.remote_ended {
            return;
        }
        let mut more = std::mem::take(&mut stream.owed);
        stream.counted += u64::from(more);
        let span = now.saturating_sub(stream.credited);
        // Whoever takes what it gets has that much, on any path; whoever takes nothing never asks for more.
        let usual = if tight { config.usual_window / 4 } else { config.usual_window }.max(config.window);
        let mut needed = if span < SLOW { usual } else { 0 };
        let mut back = 0;
        if let Some((path, _)) = path
            && span >= path.max(LEAST_SPAN)
        {
            // What goes within two round trips: a window of less holds the peer up, and one of more only lets more
            // wait on the way, in front of all other streams.
            let going = |time: Duration| {
                let bytes = u128::from(stream.counted) * (2 * time).as_nanos() / span.as_nanos();
                u32::try_from(bytes).unwrap_or(u32::MAX)
            };
            let shared = tight || self.sharing.is_on(now);
            let turns = if shared { 0 } else { going(LEAST_PATH).min(SHORT_PATH_WINDOW) };
            let most = if tight { usual } else { config.max_window };
            needed = needed.max(going(path).max(turns).min(most));
            // One that grew while it was alone gives back what others would wait behind, or would grow by.
            if shared {
                back = stream.window.saturating_sub(needed.max(usual)).min(more);
            }
            (stream.credited, stream.counted) = (now, 0);
        }
        let before = growth(stream, config);
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        // Two steps to the usual one, from there on doubling.
        let most = if stream.window < usual { 3 * stream.window } else { stream.window };
        let step = needed.saturating_sub(stream.window).min(most).min(left);
        stream.window = stream.window + step - back;
        more = more + step - back;
        self.grown = self.grown + growth(stream, config) - before;
        if more == 0 {
            return;
        }
        stream.allowance += more;
        let body = Box::new(more.to_be_bytes());
        self.log.push(Header { stream: key.id, kind: Kind::Window, payload: 4 }, Body::Own(body));
    }

    fn say_end(&mut self, key: StreamKey, now: Duration) {
        let linger = self.config.linger.filter(|_| self.role == Role::Acceptor);
        let Some(stream) = self.table.get_mut(key) else { return };
        if !std::mem::take(&mut stream.flags.say_end) {
            return;
        }
        let plain = stream.flags.plain;
        if plain
            && let Some(linger) = linger
            && !std::mem::replace(&mut stream.flags.lingered, true)
        {
            stream.credited = now;
            self.lingering.insert((now + linger, key));
            return;
        }
        let kind = if plain { Kind::Close } else { Kind::Fin };
        if plain && !std::mem::replace(&mut stream.flags.remote_ended, true) {
            // An original peer's close is the end of both directions.
            self.events.push_back(Event::Closed(key));
        }
        self.log.push(Header { stream: key.id, kind, payload: 0 }, Body::None);
        self.remove_if_over(key, now);
    }
}

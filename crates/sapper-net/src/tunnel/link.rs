//! One tunnel at work: a carrier, the streams on it and their sockets, driven by one task.
//!
//! The state machine is `sapper_proto`'s [`Mux`]; this reads and writes for it. Payload is read from a socket
//! straight into the block that waits for its frame, and is written to a socket straight from the block that
//! the carrier was read into; it is copied once more only where an end does not take it at once.
//!
//! What is not here: handshakes, who may come in, when to connect again. A carrier that breaks is told
//! ([`Exit`]), and the link goes on without one where its session can be resumed.

mod first_words;
mod jobs;
mod output;
mod pieces;
mod renewal;
mod slots;

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use sapper_proto::tunnel::frame::{Code, Hello};
use sapper_proto::tunnel::mux::{Event, Mux, StreamKey};
use tokio::time::{Instant, Sleep, timeout};

use self::jobs::Jobs;
use self::pieces::Pieces;
use self::slots::Slots;
use super::limit::Quota;
use super::live::Live;
use super::notice::{DATA, Notice, StreamInfo, Teller, TunnelInfo};
use super::payload::Payload;
use super::public::PublicPort;
use super::served::Served;
use super::service::Dialer;
use super::wake::{Awake, Token};
use crate::buffer::Buffer;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::{BoxStream, RecordMarks};

/// Turns of reading and writing before other tasks of the thread have theirs.
const ROUNDS: u32 = 2;
/// How long the peer may take for the rest of a frame.
const REST: Duration = Duration::from_secs(5);
/// Events of payload are told at most so often for each stream.
const DATA_EVERY: Duration = Duration::from_millis(100);

/// Why [`Link::run`] returned.
pub(super) enum Exit {
    /// The peer's hello on a carrier that had none yet.
    Hello(Box<Hello>),
    /// The old session goes on.
    Resumed,
    /// The carrier is gone; `true` where the streams wait for another one.
    CarrierLost(Option<Error>, bool),
    /// The grace is over: nobody came back.
    Expired,
    /// The peer broke the protocol.
    Broken(Error),
    /// After [`Link::leave`]: nothing is open any more.
    Idle,
}

/// Which end of the tunnel this is.
pub(super) enum End {
    /// It takes visitors: a port for each service, none before it is decided, and at the end.
    Server(Vec<PublicPort>),
    /// It dials services.
    Client(Arc<[Arc<Dialer>]>),
}

/// The tunnel.
pub(super) struct Link {
    mux: Mux<Payload>,
    carrier: Option<BoxStream>,
    /// Whether each slice that is written becomes a record, so that headers and payload go together.
    records: bool,
    staging: Vec<u8>,
    input: Buffer,
    end: End,
    /// The services, in the order of the client's hello.
    services: Vec<Arc<Served>>,
    /// What may pass through all of them.
    quota: Quota,
    /// Streams that wait for their limits, in which direction.
    waiting: BTreeSet<(Instant, StreamKey, usize)>,
    /// Visitors at a time, those that are still being let in included.
    max_visitors: usize,
    slots: Slots,
    jobs: Jobs,
    awake: Arc<Awake>,
    tokens: Vec<Token>,
    accept_wakers: Vec<Waker>,
    /// Ports at which somebody may wait, and those at which somebody does while there is no room.
    knocked: Vec<u16>,
    full: Vec<u16>,
    timer: Pin<Box<Sleep>>,
    timer_at: Option<Instant>,
    data_at: Option<Instant>,
    began: Instant,
    /// The moment of the round that runs.
    round_at: Option<Duration>,
    /// Something may have come up to send since it was looked.
    owes: bool,
    leaving: bool,
    /// Nothing comes any more, and nobody: what came is still to be delivered.
    parts: bool,
    /// The carrier is not read: more waits for sockets than may.
    full_up: bool,
    peer_leaves: Option<Code>,
    exit: Option<Exit>,
    teller: Arc<Teller>,
    info: Option<Arc<TunnelInfo>>,
    live: Arc<Live>,
}

impl Link {
    /// Of a carrier whose handshake is done; `rest` is what was read behind it. `began` is the moment that the
    /// state machine counts from.
    pub(super) fn new(
        mux: Mux<Payload>,
        carrier: BoxStream,
        rest: &[u8],
        end: End,
        teller: Arc<Teller>,
        began: Instant,
    ) -> Self {
        let awake = Arc::new(Awake::default());
        let mut link = Self {
            mux,
            carrier: None,
            records: false,
            staging: Vec::new(),
            input: Buffer::new(),
            end,
            services: Vec::new(),
            quota: Quota::default(),
            waiting: BTreeSet::new(),
            max_visitors: usize::MAX,
            slots: Slots::default(),
            jobs: Jobs::default(),
            awake,
            tokens: Vec::new(),
            accept_wakers: Vec::new(),
            knocked: Vec::new(),
            full: Vec::new(),
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            timer_at: None,
            data_at: None,
            began,
            round_at: None,
            owes: false,
            leaving: false,
            parts: false,
            full_up: false,
            peer_leaves: None,
            exit: None,
            teller,
            info: None,
            live: Arc::default(),
        };
        link.set_carrier(carrier, rest);
        link
    }

    /// Time as the state machine counts it. It stands still for one round, which asks for it a dozen times.
    pub(super) fn now(&self) -> Duration {
        self.round_at.unwrap_or_else(|| self.began.elapsed())
    }

    /// The state machine, for hellos.
    pub(super) fn mux(&mut self) -> &mut Mux<Payload> {
        &mut self.mux
    }

    /// Says which tunnel this is, for events.
    pub(super) fn set_info(&mut self, info: Arc<TunnelInfo>) {
        self.info = Some(info);
    }

    /// Where it writes down what it does.
    pub(super) fn set_live(&mut self, live: Arc<Live>) {
        self.live = live;
    }

    /// What may pass through all of its services together.
    pub(super) fn set_quota(&mut self, quota: Quota) {
        self.quota = quota;
    }

    /// The services from here on; streams that are there stay with theirs.
    pub(super) fn set_services(&mut self, services: impl IntoIterator<Item = Served>) {
        self.services = services.into_iter().map(Arc::new).collect();
        self.live.set_services(self.services.clone());
    }

    /// The public ports of the services, in the same order, for so many visitors at a time.
    pub(super) fn set_public(&mut self, ports: Vec<PublicPort>, max_visitors: u32) {
        debug_assert_eq!(ports.len(), self.services.len());
        let all = 0..ports.len() as u16;
        self.accept_wakers = all.clone().map(|at| self.awake.waker(Token::Accept(at))).collect();
        self.knocked = all.collect();
        self.max_visitors = max_visitors as usize;
        self.end = End::Server(ports);
    }

    /// Takes the public ports away: nobody new comes in.
    pub(super) fn take_public(&mut self) -> Vec<PublicPort> {
        match &mut self.end {
            End::Server(ports) => std::mem::take(ports),
            End::Client(_) => Vec::new(),
        }
    }

    /// Goes on over another carrier; the old one is dropped.
    pub(super) fn set_carrier(&mut self, mut carrier: BoxStream, rest: &[u8]) {
        self.records = carrier.tls_mut().is_some();
        self.carrier = Some(carrier);
        self.input = Buffer::new();
        if !rest.is_empty() {
            self.input.extend(rest);
        }
    }

    /// Gives carrier and unread bytes away: they belong to another session. First the rest of a frame that is half
    /// sent; `None` where it cannot be.
    pub(super) async fn give_carrier(&mut self) -> Option<(BoxStream, Vec<u8>)> {
        timeout(REST, poll_fn(|cx| self.poll_rest(cx))).await.ok()?.ok()?;
        let rest = self.input.data().to_vec();
        Some((self.carrier.take()?, rest))
    }

    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        loop {
            let now = self.now();
            let mut slices = Vec::new();
            self.mux.poll_rest(&mut slices);
            let Some(carrier) = self.carrier.as_mut().filter(|_| !slices.is_empty()) else {
                return Poll::Ready(Ok(()));
            };
            let written = ready!(carrier.poll_write(cx, &slices))?;
            self.mux.transmitted(written, now);
        }
    }

    /// Takes no more visitors; [`Exit::Idle`] when the last one has gone.
    pub(super) fn leave(&mut self, code: Code, reason: &str) {
        self.leaving = true;
        if let End::Server(ports) = &mut self.end {
            ports.clear();
        }
        self.mux.go_away(code, reason);
    }

    /// Its peer is gone for good: [`Exit::Idle`], and nothing else, when all that came from it is delivered. Nobody new
    /// comes in, and what it still does is not its tunnel's any more.
    pub(super) fn part(&mut self) {
        self.parts = true;
        drop(self.take_public());
        self.carrier = None;
        self.lose_streams();
        std::mem::take(&mut self.live).emptied();
    }

    /// Ends every stream at once.
    pub(super) fn cut_all(&mut self) {
        self.jobs = Jobs::default();
        self.slots.keys().into_iter().for_each(|key| self.cut(key, None));
    }

    /// Whether nobody uses it: no stream, nobody who comes or goes.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.len() == 0 && self.jobs.len() == 0
    }

    /// Gives the carrier away, with nothing on it any more, to be closed in order.
    pub(super) fn take_carrier(&mut self) -> Option<BoxStream> {
        self.carrier.take()
    }

    /// Whether the server gave what this client had to another.
    pub(super) fn is_replaced(&self) -> bool {
        self.peer_leaves == Some(Code::REPLACED)
    }

    /// Works until something happens that is not this one's to decide.
    pub(super) async fn run(&mut self) -> Exit {
        poll_fn(|cx| self.poll(cx)).await
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Exit> {
        self.awake.register(cx.waker());
        // By who called meanwhile; or the carrier takes more again.
        self.owes = true;
        let polled = self.poll_rounds(cx);
        self.live.note(&self.mux, (self.began + self.now()).into_std());
        self.round_at = None;
        polled
    }

    fn poll_rounds(&mut self, cx: &mut Context<'_>) -> Poll<Exit> {
        for round in 0..ROUNDS {
            self.round_at = Some(self.began.elapsed());
            let mut moved = self.look_at_the_awake();
            if moved {
                // Who had nothing to say until now does not wait for what the carrier brought others.
                moved |= self.send(cx);
            }
            let heard = self.read_carrier(cx) | (round == 0 && self.fire_timers(cx));
            self.owes |= heard | self.drain_events(&[]);
            moved |= heard;
            if self.owes {
                moved |= self.send(cx);
            }
            self.owes |= self.drain_events(&[]) | self.retire_closing();
            if !self.full.is_empty() && self.has_room() {
                self.knocked.append(&mut self.full);
                (moved, self.owes) = (true, true);
            }
            if let Some(exit) = self.exit.take() {
                return Poll::Ready(exit);
            }
            let over = self.parts || (self.leaving && self.mux.is_idle());
            if over && self.is_empty() {
                return Poll::Ready(Exit::Idle);
            }
            if !moved {
                self.arm(cx);
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn look_at_the_awake(&mut self) -> bool {
        let mut tokens = std::mem::take(&mut self.tokens);
        self.awake.take(&mut tokens);
        let woke = !tokens.is_empty();
        for token in tokens.drain(..) {
            match token {
                Token::Read(slot) => {
                    if let Some(key) = self.slots.key(slot) {
                        self.mux.ready(key);
                    }
                }
                Token::Write(slot) => {
                    if let Some(key) = self.slots.key(slot) {
                        self.deliver(key, Pieces::default());
                    }
                }
                Token::Job(job) => self.work(job),
                Token::Accept(port) => self.knocked.push(port),
            }
        }
        self.tokens = tokens;
        self.accept_visitors();
        woke
    }

    /// Reads the carrier while the state machine wants more.
    fn read_carrier(&mut self, cx: &mut Context<'_>) -> bool {
        // What waits in front of it has its turn before more is read.
        if !self.understand() || self.is_full_up() || self.exit.is_some() {
            return false;
        }
        let Some(carrier) = &mut self.carrier else { return false };
        // Room for a hello, the longest frame that has to be there whole.
        let space = self.input.reserve(96 * 1024);
        match carrier.poll_read(cx, space, &mut RecordMarks::ignored()) {
            Poll::Ready(Ok(n)) if n > 0 => self.input.commit(n),
            Poll::Ready(ended) => {
                self.lose_carrier(ended.err());
                return true;
            }
            Poll::Pending => {
                self.input.release();
                return false;
            }
        }
        self.understand();
        true
    }

    /// Whether the carrier is left unread, which is said once.
    fn is_full_up(&mut self) -> bool {
        let full_up = !self.mux.want_read();
        if full_up && !self.full_up {
            let held = self.mux.gauges().unread;
            tracing::warn!(held, "a tunnel is read no further: too much waits for sockets that take nothing");
        }
        self.full_up = full_up;
        full_up
    }

    /// Hands what was read to the state machine. False where it ended.
    fn understand(&mut self) -> bool {
        let mut input = std::mem::take(&mut self.input);
        let (mut at, mut fine) = (0, true);
        // Payload of one stream whose frames stand side by side: one write for all of them.
        let mut gathered: Option<(StreamKey, Pieces<'_>)> = None;
        loop {
            let (now, rest) = (self.now(), &input.data()[at..]);
            let more = self.mux.want_read() && !rest.is_empty() && self.exit.is_none();
            let found = match more.then(|| self.mux.handle_bytes(rest, now)) {
                Some(Ok(found)) if found.consumed > 0 || found.event.is_some() => found,
                said => {
                    let delivered = self.deliver_gathered(&mut gathered);
                    if let Some(Err(wrong)) = said {
                        let error = Error::new(ErrorKind::RemoteProtocol, wrong.to_string());
                        let error = error.with_phase(Phase::Transfer);
                        if self.mux.keeps_session(&wrong) {
                            self.lose_carrier(Some(error));
                        } else {
                            self.exit = Some(Exit::Broken(error));
                        }
                        fine = false;
                    } else if delivered {
                        // That may have made room for more.
                        continue;
                    }
                    break;
                }
            };
            at += found.consumed;
            match found.event {
                Some(Event::Data(key, range)) => {
                    let part = &rest[range];
                    let goes_along =
                        gathered.as_mut().is_some_and(|(same, pieces)| *same == key && pieces.push(part));
                    if !goes_along {
                        self.deliver_gathered(&mut gathered);
                        gathered = Some((key, Pieces::of(part)));
                    }
                }
                Some(event) => {
                    self.deliver_gathered(&mut gathered);
                    self.event(event, rest);
                }
                None => {}
            }
            while let Some(event) = self.mux.poll_event() {
                self.deliver_gathered(&mut gathered);
                self.event(event, &[]);
            }
        }
        input.consume(at);
        self.owes |= at > 0;
        // What a carrier that is gone said besides is nobody's.
        if self.carrier.is_some() {
            self.input = input;
        }
        fine
    }

    fn deliver_gathered(&mut self, gathered: &mut Option<(StreamKey, Pieces<'_>)>) -> bool {
        let Some((key, pieces)) = gathered.take() else { return false };
        self.deliver(key, pieces);
        true
    }

    /// Whether there was one.
    fn drain_events(&mut self, data: &[u8]) -> bool {
        let mut told = false;
        while let Some(event) = self.mux.poll_event() {
            self.event(event, data);
            told = true;
        }
        told
    }

    fn event(&mut self, event: Event, data: &[u8]) {
        match event {
            Event::Hello(hello) => self.exit = Some(Exit::Hello(hello)),
            Event::Resumed => self.exit = Some(Exit::Resumed),
            Event::Opened(key, info) => self.opened(key, info.as_deref()),
            Event::Data(key, range) => self.deliver(key, Pieces::of(&data[range])),
            Event::Ended(key) => {
                if let Some(slot) = self.slots.get_mut(key) {
                    slot.peer_ended = true;
                }
                self.deliver(key, Pieces::default());
            }
            Event::Closed(key) => {
                if let Some(slot) = self.slots.get_mut(key) {
                    slot.peer_ended = true;
                    slot.over = true;
                }
                self.deliver(key, Pieces::default());
            }
            Event::Reset(key, code, reason) => {
                let error = reset_by_peer(code, &reason);
                self.cut(key, Some(error));
            }
            Event::GoAway(code, _) => self.peer_leaves = Some(code),
            Event::CarrierDead => {
                let error = Error::new(ErrorKind::IdleDeadline, "the other end of the tunnel is silent")
                    .with_phase(Phase::Transfer);
                self.lose_carrier(Some(error));
            }
            Event::SessionLost => {
                self.lose_streams();
                if self.carrier.is_none() {
                    self.exit = Some(Exit::Expired);
                }
            }
        }
    }

    fn lose_carrier(&mut self, error: Option<Error>) {
        self.carrier = None;
        self.input = Buffer::new();
        let now = self.now();
        // Who said goodbye does not come back to the session.
        let waits = self.mux.handle_carrier_lost(now) && self.peer_leaves.is_none();
        self.drain_events(&[]);
        self.exit = Some(Exit::CarrierLost(error, waits));
    }

    fn fire_timers(&mut self, cx: &mut Context<'_>) -> bool {
        let mut fired = false;
        if self.timer_at.is_some() && self.timer.as_mut().poll(cx).is_ready() {
            self.timer_at = None;
            fired = true;
        }
        let now = self.now();
        if self.due().is_some_and(|at| at <= now) {
            self.mux.handle_timeout(now);
            fired = true;
        }
        let moment = self.began + now;
        while let Some((at, key, direction)) = self.waiting.first().copied()
            && at <= moment
        {
            self.waiting.pop_first();
            self.is_due(key, direction);
            fired = true;
        }
        if self.data_at.is_some_and(|at| at <= moment) {
            self.data_at = None;
            self.tell_data();
        }
        fired
    }

    /// When the state machine has something to do. Not behind the end: what its grace has over what is to be delivered
    /// is the account of it.
    fn due(&self) -> Option<Duration> {
        self.mux.poll_timeout().filter(|_| !self.parts)
    }

    /// Sets the timer to the next moment at which something is due.
    fn arm(&mut self, cx: &mut Context<'_>) {
        let due = self.due().map(|at| self.began + at);
        let turn = self.waiting.first().map(|(at, ..)| *at);
        let next = [due, self.data_at, turn].into_iter().flatten().min();
        let Some(next) = next else {
            self.timer_at = None;
            return;
        };
        if self.timer_at != Some(next) {
            self.timer_at = Some(next);
            self.timer.as_mut().reset(next);
            if self.timer.as_mut().poll(cx).is_ready() {
                self.timer_at = None;
                cx.waker().wake_by_ref();
            }
        }
    }

    /// Bytes of a stream moved: counted now, told later, together with what else moves until then.
    fn note_data(&mut self, key: StreamKey, from: u64, to: u64) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        slot.listed.moved(from, to);
        slot.service.moved(from, to);
        if !self.teller.wants(DATA) {
            return;
        }
        let first = slot.untold == (0, 0);
        slot.untold.0 += from;
        slot.untold.1 += to;
        if first {
            self.slots.untold.push(key);
        }
        self.data_at.get_or_insert_with(|| Instant::now() + DATA_EVERY);
    }

    fn is_server(&self) -> bool {
        matches!(self.end, End::Server(_))
    }

    /// Tells of a stream what `notice` says.
    fn tell_stream(&self, names: [&'static str; 2], key: StreamKey, notice: Notice) {
        let Some(slot) = self.slots.get(key) else { return };
        self.teller.tell(Notice {
            name: names[usize::from(!self.is_server())],
            tunnel: self.info.clone(),
            stream: Some(StreamInfo {
                number: slot.number,
                visitor: slot.visitor.map_or_else(String::new, |(from, _)| from.to_string()),
                service: slot.service.info().name.clone(),
            }),
            ..notice
        });
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Who heard that one came hears that it left.
        self.cut_all();
        self.awake.close();
        self.live.emptied();
    }
}

fn reset_by_peer(code: Code, reason: &str) -> Error {
    let kind = match code {
        Code::REFUSED => ErrorKind::Connect,
        Code::UNREACHABLE => ErrorKind::Unreachable,
        Code::DEADLINE => ErrorKind::ConnectDeadline,
        Code::DENIED => ErrorKind::PolicyDenied,
        Code::LIMIT | Code::OVERFLOW => ErrorKind::ResourceLimit,
        _ => ErrorKind::ConnectionLost,
    };
    let text = if reason.is_empty() { "the other end of the tunnel reset the stream" } else { reason };
    Error::new(kind, text).with_phase(Phase::Transfer).with_stream_code(u64::from(code.0))
}

/// A dial's, a handshake's or an accept's future.
pub(super) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What a connection that was made, or failed, is.
pub(super) type Connected = Result<BoxStream>;

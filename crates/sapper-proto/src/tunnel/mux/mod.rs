//! Streams over one ordered carrier: the frame layer of the tunnel, and of whatever else needs one.
//!
//! A state machine. It owns headers, order and accounts; payload stays in the caller's blocks: what
//! arrives is told as ranges of the caller's buffer, what goes out is a handle that the caller gave and
//! that is dropped when nobody can need it again.
//!
//! - **Who sends is decided here, from where is not.** A caller says that a stream has something
//!   ([`Mux::ready`]) and is told when it is that stream's turn and how much to read
//!   ([`Mux::poll_turn`]). So nothing is queued that credit, fairness or the carrier would keep back: what
//!   waits, waits in the visitor's socket. Turns are a quantum long, round and round; a stream that was
//!   silent goes before those with bulk, a bounded number of times.
//! - **Credit.** Each stream has a window towards each end; a window that its stream empties within two
//!   round trips is doubled, and what it has beyond what the path needs goes back while others say something.
//!   Original peers ([`w3p`](super::w3p)) know no credit: their streams have a bound,
//!   and what happens beyond it is the caller's choice ([`Overflow`]).
//! - **Resume.** All frames but a carrier's own are counted in bytes. What the peer has not acknowledged
//!   is kept; on a new carrier each end says how far it got, and the other goes on from there, in the
//!   middle of a frame if need be.
//!
//! In here: [`table`] streams and lists, [`log`] what goes out, `input` and `output` the two directions,
//! `session` hello, resume and timers, [`ids`] which ids were, [`budget`] memory over all connections,
//! [`sharing`] whether several streams speak, [`config`] bounds and times.

mod budget;
mod config;
mod ids;
mod input;
mod log;
mod output;
mod session;
mod sharing;
mod table;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub use self::budget::Budget;
pub use self::config::{Config, Overflow};
use self::ids::Ids;
use self::log::Log;
use self::sharing::Sharing;
pub use self::table::StreamKey;
use self::table::{Stream, Table};
use super::frame::{Capabilities, Code, FrameError, Hello, Kind, OpenInfo, Token};

/// The longest payload of one frame that we send: the longest that another stream waits for one.
pub const LONGEST_TURN: u32 = 64 * 1024;
/// The quantum of a stream that was silent before.
const FRESH_QUANTUM: u32 = 16 * 1024;
/// Turns that such streams get in a row while others wait with bulk.
const FRESH_RUN: u32 = 16;
/// Ids of streams that ended with plain frames: late frames of theirs must not open them again.
const MOST_TOMBSTONES: usize = 16_384;
/// Streams that a server may begin before it hears our hello; one that begins more is none of ours, and the session
/// waits for another connection.
const MOST_STRANGE: usize = 1024;
/// The longest that a late frame is expected.
const TOMBSTONE_LIFE: Duration = Duration::from_secs(120);
/// A shortest round trip is believed for so long: paths become longer too. Measured while a stream takes all
/// it can, a round trip is mostly what waits, and would let the window grow for no gain.
const PATH_LIFE: Duration = Duration::from_secs(300);
/// Where the path is shorter, what a window has to last for is the turns that two processes have on their cores.
const LEAST_PATH: Duration = Duration::from_micros(550);
/// The most that a window grows to for that, while nobody else waits behind what it lets through.
const SHORT_PATH_WINDOW: u32 = 1536 * 1024;
/// A stream's rate is taken over at least this: what had waited comes in one burst, which is nobody's rate.
const LEAST_SPAN: Duration = Duration::from_millis(4);
/// An acknowledgement waits this long for more to acknowledge.
const ACK_DELAY: Duration = Duration::from_millis(25);
/// Acknowledged at least this often, so that replay buffers stay small.
const ACK_EVERY: u64 = 256 * 1024;
/// Frames that wait because the carrier takes nothing, besides those to be sent once more, beyond which nothing more
/// is read either: only answers to the peer can become so many.
const MOST_UNSENT: usize = 2 * 1024 * 1024;
/// Credit that a hello may name, ours or a peer's.
const MOST_WINDOW: u32 = 1 << 30;
/// Bytes that a connection may hold whatever the budget over all of them says: otherwise a few stalled
/// ones would stop all others.
const BUDGET_FLOOR: usize = 1024 * 1024;

/// Which end of the carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It made the carrier, and says hello first: the tunnel's client.
    Initiator,
    /// It took the carrier: the tunnel's server.
    Acceptor,
}

/// What one call of [`Mux::handle_bytes`] found; [`Mux::poll_event`] may know of more.
#[derive(Debug, Default, PartialEq)]
pub struct Input {
    /// Bytes that are done with. 0 without an event: more bytes are needed.
    pub consumed: usize,
    /// What they mean to the caller.
    pub event: Option<Event>,
}

/// What the caller has to know.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The peer's hello. An acceptor answers it: [`Mux::answer`], or, where it asks to resume a session that
    /// another machine has, that one's [`Mux::resume`] and this one is dropped.
    Hello(Box<Hello>),
    /// The session goes on over the new carrier.
    Resumed,
    /// The peer opened a stream; an original one says nothing about where it comes from.
    Opened(StreamKey, Option<Box<OpenInfo>>),
    /// Payload of a stream, as a range of the bytes that were given. It counts as unread until
    /// [`Mux::consumed`].
    Data(StreamKey, Range<usize>),
    /// The peer sends no more; our direction goes on.
    Ended(StreamKey),
    /// The stream is over in both directions; what was told before is still to be delivered.
    Closed(StreamKey),
    /// The stream is over at once.
    Reset(StreamKey, Code, String),
    /// The peer takes no new streams.
    GoAway(Code, String),
    /// The peer says nothing any more: the carrier should be given up.
    CarrierDead,
    /// Every stream is gone, and all keys with them.
    SessionLost,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The stream.
    pub key: StreamKey,
    /// How much it may send now, at least one byte.
    pub max: u32,
}

/// What the peer did wrong. The connection cannot go on, nor its session, unless it [keeps](Mux::keeps_session) it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MuxError {
    /// A frame that is none.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that is not allowed here.
    #[error("a {0:?} frame is not allowed now")]
    NotNow(Kind),
    /// More than its credit.
    #[error("stream {0}: the peer sent more than its credit")]
    Credit(u32),
    /// Payload behind the end.
    #[error("stream {0}: the peer sent payload after its end")]
    AfterEnd(u32),
    /// More credit than there is.
    #[error("stream {0}: the peer gave more credit than a stream can have")]
    Window(u32),
    /// An id that is not the peer's next, or that no stream has had.
    #[error("stream {0}: there is no such stream, there was none, and the next one is another")]
    OpenId(u32),
    /// An acknowledgement, or a count at resuming, of bytes that it cannot have or said to have.
    #[error("the peer has counted {0} bytes, which is not what it can have")]
    Count(u64),
    /// Nothing is acknowledged.
    #[error("the peer acknowledges nothing, and {0} bytes are held for it")]
    Unacknowledged(usize),
    /// The two have nothing in common.
    #[error("the peer says hello, but knows no streams")]
    Capabilities,
}

/// Counters, since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Streams that we opened.
    pub opened: u64,
    /// Streams that the peer opened.
    pub accepted: u64,
    /// Streams of the peer's that were refused at once.
    pub refused: u64,
    /// Resets that went out, and that came in.
    pub resets: (u64, u64),
    /// Bytes of payload that were queued to go out, and that came in.
    pub payload: (u64, u64),
    /// Frames that came for streams that are over.
    pub late_frames: u64,
    /// Streams that were reset because somebody held too much.
    pub overflows: u64,
    /// Carriers after the first.
    pub resumes: u64,
    /// Bytes that were sent once more.
    pub replayed: u64,
}

/// What is held now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Open streams.
    pub streams: usize,
    /// Bytes that the caller holds.
    pub unread: usize,
    /// Bytes and overhead of frames that may have to be sent (again).
    pub held: usize,
    /// Of these, bytes that no carrier has taken.
    pub unsent: usize,
    /// By how much windows have grown.
    pub grown: usize,
    /// The smoothed round trip.
    pub rtt: Option<Duration>,
}

/// Where the connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// An acceptor that made an offer: until then it waits for a hello, and says nothing.
    Undecided { until: Duration },
    /// An original peer, or one that has not said hello.
    Plain,
    /// An initiator that said hello.
    Greeting,
    /// An acceptor that was greeted, and whose caller has to answer.
    Asked,
    /// Both have said hello.
    Open,
    /// No carrier.
    Detached { until: Duration },
    /// An initiator that asked to resume. A server that has not heard it yet may take it for an original client.
    Resuming { until: Duration },
    /// Nothing comes any more.
    Over,
}

/// What a server that has not heard our hello yet said to the original client that it took us for.
#[derive(Debug, Default)]
struct Strange {
    /// Its streams, in their order.
    ids: Vec<u32>,
    /// Payload that is still to come.
    left: u32,
}

/// A data frame of which a part is still to come.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// `None`: nobody wants it.
    key: Option<StreamKey>,
    left: u32,
    counted: bool,
}

/// What the peer's hello said.
#[derive(Clone, Copy, Debug, Default)]
struct Peer {
    window: u32,
    max_streams: u32,
    ack_every: u64,
}

/// One carrier's (or one session's) streams.
///
/// Order of calls, for each wake-up of the one task that owns it:
///
/// 1. [`handle_bytes`](Self::handle_bytes) with what the carrier gave, as long as
///    [`want_read`](Self::want_read): again with the rest until it consumes nothing; after each call
///    [`poll_event`](Self::poll_event) until there is none.
/// 2. [`handle_timeout`](Self::handle_timeout) when [`poll_timeout`](Self::poll_timeout) has passed, then
///    [`poll_event`](Self::poll_event) again.
/// 3. Whatever the caller has: [`open`](Self::open), [`ready`](Self::ready), [`consumed`](Self::consumed),
///    [`finish`](Self::finish), [`reset`](Self::reset), in any order.
/// 4. [`poll_turn`](Self::poll_turn) until there is none, each answered by [`send`](Self::send) or
///    [`not_ready`](Self::not_ready).
/// 5. [`poll_transmit`](Self::poll_transmit), write, [`transmitted`](Self::transmitted); from 4 on again
///    while the carrier takes something.
///
/// A carrier that broke: [`handle_carrier_lost`](Self::handle_carrier_lost); with a new one an initiator
/// calls [`reattach`](Self::reattach), an acceptor is given the hello of the new one by
/// [`resume`](Self::resume). Bytes of a carrier that were not consumed when it broke are thrown away.
pub struct Mux<B> {
    role: Role,
    config: Config,
    /// An acceptor: whether a hello may come.
    offers: bool,
    phase: Phase,
    table: Table,
    log: Log<B>,
    /// Link frames that wait, and how much of them the carrier took.
    link: Vec<u8>,
    link_taken: usize,
    /// On a new carrier link frames go first, though the log stands in the middle of a frame.
    link_first: bool,
    reading: Option<Reading>,
    /// Whether frames that come are counted, how many bytes have, and of how many the peer was told.
    strange: Strange,
    counts: bool,
    received: u64,
    told: u64,
    ack_at: Option<Duration>,
    common: Capabilities,
    peer: Peer,
    session: [u8; 16],
    token: Token,
    next_id: u32,
    /// Ids that streams have had, those that we opened and those that the peer did.
    ours: Ids,
    theirs: Ids,
    tombstones: BTreeSet<u32>,
    tombstone_order: VecDeque<(Duration, u32)>,
    lingering: BTreeSet<(Duration, StreamKey)>,
    events: VecDeque<Event>,
    unread: usize,
    grown: usize,
    sharing: Sharing,
    overfull: u32,
    budget: Option<Arc<Budget>>,
    charged: usize,
    fresh_run: u32,
    leaving: bool,
    peer_leaves: bool,
    ping_at: Option<Duration>,
    ping_sent: Option<Duration>,
    /// When the latest ping was sent that was answered.
    answered: Option<Duration>,
    pong: Option<[u8; 8]>,
    heard: Duration,
    rtt: Option<Duration>,
    /// What the latest answer took.
    latest: Option<Duration>,
    /// The shortest round trip of late, and when it was: what the path takes without what waits on it.
    path: Option<(Duration, Duration)>,
    /// Bytes a second that the carrier takes while something waits, and the measurement under way.
    rate: f64,
    rate_from: Option<(Duration, usize)>,
    stats: Stats,
}

impl<B: AsRef<[u8]>> Mux<B> {
    /// The end that made the carrier. With `application` it says hello (to a peer that made an offer, or
    /// where there are no original peers); without it the peer is an original one.
    pub fn initiator(config: Config, application: Option<Vec<u8>>, now: Duration) -> Self {
        let mut mux = Self::new(Role::Initiator, config, 1, now);
        if let Some(application) = application {
            mux.greet(false, application);
            mux.phase = Phase::Greeting;
        }
        mux
    }

    /// The end that took the carrier. Where it made an offer, `offered` says until when a hello decides
    /// what the peer is; nothing is sent before. `first_id` is any number, chosen by chance: original
    /// clients expect ids that do not come again soon.
    pub fn acceptor(config: Config, offered: Option<Duration>, first_id: u32, now: Duration) -> Self {
        let mut mux = Self::new(Role::Acceptor, config, first_id, now);
        if let Some(until) = offered {
            mux.offers = true;
            mux.phase = Phase::Undecided { until };
        }
        mux
    }

    fn new(role: Role, mut config: Config, first_id: u32, now: Duration) -> Self {
        config.window = config.window.min(MOST_WINDOW);
        config.max_window = config.max_window.clamp(config.window, MOST_WINDOW);
        config.usual_window = config.usual_window.clamp(config.window, config.max_window);
        config.quantum = config.quantum.clamp(1, LONGEST_TURN);
        // An initiator's ids are odd, an acceptor's even: they never meet.
        let next_id = first_id & !1 | u32::from(role == Role::Initiator);
        Self {
            role,
            config,
            offers: false,
            phase: Phase::Plain,
            table: Table::default(),
            log: Log::new(),
            link: Vec::new(),
            link_taken: 0,
            link_first: false,
            reading: None,
            strange: Strange::default(),
            counts: false,
            received: 0,
            told: 0,
            ack_at: None,
            common: Capabilities(0),
            peer: Peer::default(),
            session: [0; 16],
            token: Token::default(),
            next_id,
            ours: Ids::default(),
            theirs: Ids::default(),
            tombstones: BTreeSet::new(),
            tombstone_order: VecDeque::new(),
            lingering: BTreeSet::new(),
            events: VecDeque::new(),
            unread: 0,
            grown: 0,
            sharing: Sharing::default(),
            overfull: 0,
            budget: None,
            charged: 0,
            fresh_run: 0,
            leaving: false,
            peer_leaves: false,
            ping_at: None,
            ping_sent: None,
            answered: None,
            pong: None,
            heard: now,
            rtt: None,
            latest: None,
            path: None,
            rate: 0.0,
            rate_from: None,
            stats: Stats::default(),
        }
    }

    /// Lets it account to a budget that several connections share.
    pub fn share(&mut self, budget: Arc<Budget>) {
        self.budget = Some(budget);
        self.settle();
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// What is held now.
    pub fn gauges(&self) -> Gauges {
        Gauges {
            streams: self.table.len(),
            unread: self.unread,
            held: self.log.held(),
            unsent: self.log.unsent() + self.link.len() - self.link_taken,
            grown: self.grown,
            rtt: self.rtt,
        }
    }

    /// What both ends can; nothing with an original peer, or before the hellos.
    pub fn capabilities(&self) -> Capabilities {
        self.common
    }

    /// Asks the peer for an answer now ([`answered`](Self::answered)). `false` with one that would give none.
    pub fn ping(&mut self, now: Duration) -> bool {
        let can = self.phase == Phase::Open && self.ping_at.is_some();
        if can {
            self.ping_at = Some(now);
        }
        can
    }

    /// Whether a ping that was sent at `asked` or later has its answer.
    pub fn answered(&self, asked: Duration) -> bool {
        self.answered.is_some_and(|sent| sent >= asked)
    }

    /// Something that the peer answered, other than a ping, took so long: the first that is known of a connection.
    pub fn took(&mut self, sample: Duration) {
        self.latest = Some(sample);
    }

    /// How long an answer of the peer takes, the slower of the latest one and of what they take on average.
    pub fn slowness(&self) -> Option<Duration> {
        self.latest.max(self.rtt)
    }

    /// Whether what is wrong is wrong with the connection alone: the session waits for another one. Until the server's
    /// hello is there, nobody has said that this is the session's server; only what its hello says is about the session.
    pub fn keeps_session(&self, error: &MuxError) -> bool {
        let of_the_hello = matches!(error, MuxError::Count(_) | MuxError::Capabilities);
        matches!(self.phase, Phase::Resuming { .. }) && !of_the_hello
    }

    /// When the peer last said something, or was not listened to.
    pub fn heard(&self) -> Duration {
        self.heard
    }

    /// What a stream holds unread, where it is still there.
    pub fn unread(&self, key: StreamKey) -> Option<u32> {
        Some(self.table.get(key)?.unread)
    }

    /// Whether a stream was opened with plain frames.
    pub fn is_plain(&self, key: StreamKey) -> Option<bool> {
        Some(self.table.get(key)?.flags.plain)
    }

    /// Whether the carrier should be read now.
    pub fn want_read(&self) -> bool {
        if matches!(self.phase, Phase::Resuming { .. }) {
            // Nothing goes on without the peer's hello, and nothing else that it says is kept.
            return true;
        }
        // What is to be said once more is no answer to the peer.
        if self.log.unsent() > self.config.replay + MOST_UNSENT {
            return false;
        }
        self.config.overflow == Overflow::Reset || !(self.holds_too_much() || self.overfull > 0)
    }

    /// Whether nothing is open and nothing waits: after a go-away, the time to leave.
    pub fn is_idle(&self) -> bool {
        self.table.len() == 0 && self.log.unsent() == 0 && self.link.len() == self.link_taken
    }

    fn holds_too_much(&self) -> bool {
        let shared = self.unread > BUDGET_FLOOR && self.budget.as_deref().is_some_and(Budget::is_exhausted);
        shared || self.unread > self.config.max_unread
    }

    /// Who was not listened to has not been silent.
    fn note_listening(&mut self, listened: bool, now: Duration) {
        if !listened && self.want_read() {
            self.heard = now;
        }
    }

    /// Takes a stream out of the table and of all accounts.
    fn remove(&mut self, key: StreamKey, now: Duration) {
        let listened = self.want_read();
        let Some(stream) = self.table.remove(key) else { return };
        self.unread -= stream.unread as usize;
        self.grown -= growth(&stream, &self.config);
        self.overfull -= u32::from(stream.flags.overfull);
        if stream.flags.plain && self.role == Role::Initiator {
            self.bury(key.id, now);
        }
        self.settle();
        self.note_listening(listened, now);
    }

    /// Where both directions are over and the caller has delivered everything.
    fn remove_if_over(&mut self, key: StreamKey, now: Duration) {
        let over = self.table.get(key).is_some_and(|stream| {
            let Stream { flags, unread, .. } = stream;
            flags.local_ended && flags.remote_ended && !flags.say_end && *unread == 0
        });
        if over {
            self.remove(key, now);
        }
    }

    fn bury(&mut self, id: u32, now: Duration) {
        self.sweep(now);
        if self.tombstones.len() >= MOST_TOMBSTONES
            && let Some((_, oldest)) = self.tombstone_order.pop_front()
        {
            self.tombstones.remove(&oldest);
        }
        if self.tombstones.insert(id) {
            self.tombstone_order.push_back((now + TOMBSTONE_LIFE, id));
        }
    }

    fn sweep(&mut self, now: Duration) {
        while let Some((until, id)) = self.tombstone_order.front().copied()
            && until <= now
        {
            self.tombstone_order.pop_front();
            self.tombstones.remove(&id);
        }
    }

    /// Makes the budget agree with what is held.
    fn settle(&mut self) {
        if let Some(budget) = &self.budget {
            let held = self.unread + self.log.held();
            budget.change(self.charged, held);
            self.charged = held;
        }
    }
}

impl<B> Drop for Mux<B> {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget {
            budget.change(self.charged, 0);
        }
    }
}

impl<B> std::fmt::Debug for Mux<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { role, phase, common, received, unread, .. } = self;
        write!(f, "Mux({role:?}, {phase:?}, {common:?}, {} streams, ", self.table.len())?;
        write!(f, "{received} bytes received, {unread} unread)")
    }
}

fn growth(stream: &Stream, config: &Config) -> usize {
    stream.window.saturating_sub(config.window) as usize
}

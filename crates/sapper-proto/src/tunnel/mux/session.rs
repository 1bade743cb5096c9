//! Hello, resume, timers: the life of a session over its carriers.

use std::time::Duration;

use super::super::frame::{Capabilities, HEADER, Header, Hello, Kind, Token};
use super::table::{List, Table};
use super::{ACK_EVERY, Event, Ids, MOST_WINDOW, Mux, MuxError, Peer, Phase, Role, Strange};

impl<B: AsRef<[u8]>> Mux<B> {
    /// The session's id, once there is one that can be resumed.
    pub fn session(&self) -> Option<&[u8; 16]> {
        (self.common.has(Capabilities::RESUME) && self.phase != Phase::Over).then_some(&self.session)
    }

    /// Answers a peer's hello with a new session: its id, its secret (both chosen by chance), and what
    /// the layer above has to say. Only after [`Event::Hello`] at an acceptor.
    pub fn answer(&mut self, session: [u8; 16], token: Token, application: Vec<u8>, now: Duration) {
        if self.phase != Phase::Asked {
            return;
        }
        (self.session, self.token) = (session, token);
        self.greet(false, application);
        self.opened_session(now);
    }

    /// At an acceptor: goes on over a new carrier whose first frame was `hello`. The old carrier, if there
    /// is one, is to be dropped: it is stale. `false`, and nothing happens, where the hello does not name
    /// this session, its secret, and a count that it can have.
    pub fn resume(&mut self, hello: &Hello, application: Vec<u8>, now: Duration) -> bool {
        let here = matches!(self.phase, Phase::Open | Phase::Detached { .. });
        let names = hello.resume && hello.session == self.session && hello.token == self.token;
        if !here || !names || self.role != Role::Acceptor || self.session().is_none() {
            return false;
        }
        let before = self.log.unsent();
        if !self.log.rewind(hello.received) {
            return false;
        }
        self.replayed(before);
        self.drop_link();
        self.greet(true, application);
        self.opened_session(now);
        self.stats.resumes += 1;
        self.events.push_back(Event::Resumed);
        self.settle();
        true
    }

    /// The carrier is gone. `true` where the streams wait for another one; otherwise they are over.
    pub fn handle_carrier_lost(&mut self, now: Duration) -> bool {
        self.drop_link();
        match self.phase {
            Phase::Open if self.common.has(Capabilities::RESUME) => {
                self.phase = Phase::Detached { until: now + self.config.grace };
                true
            }
            Phase::Resuming { until } => {
                self.phase = Phase::Detached { until };
                true
            }
            Phase::Detached { .. } => true,
            Phase::Over => false,
            _ => {
                self.lose_session();
                self.phase = Phase::Over;
                false
            }
        }
    }

    /// At an initiator whose carrier was lost: says hello on a new one. `false` where there is no session
    /// that could go on.
    pub fn reattach(&mut self, application: Vec<u8>, now: Duration) -> bool {
        let Phase::Detached { until } = self.phase else { return false };
        if self.role != Role::Initiator {
            return false;
        }
        self.greet(true, application);
        self.phase = Phase::Resuming { until };
        self.heard = now;
        true
    }

    /// When [`handle_timeout`](Self::handle_timeout) should be called, at the latest.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let phase = match self.phase {
            Phase::Undecided { until } | Phase::Detached { until } | Phase::Resuming { until } => Some(until),
            _ => None,
        };
        // Behind a frame that is half taken nothing can be said: the carrier will ask for more itself.
        let free = self.phase == Phase::Open && self.link.is_empty() && self.log.at_boundary();
        let link = [self.ack_at, self.ping_at].into_iter().flatten().filter(|_| free).min();
        let linger = self.lingering.first().map(|(until, _)| *until).filter(|_| self.may_send());
        [phase, link, linger, self.dead_at()].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Duration) {
        match self.phase {
            Phase::Undecided { until } if now >= until => self.phase = Phase::Plain,
            Phase::Detached { until } | Phase::Resuming { until } if now >= until => {
                self.drop_link();
                self.lose_session();
                self.phase = Phase::Over;
            }
            _ => {}
        }
        if self.dead_at().is_some_and(|at| now >= at) {
            // Said once for each such silence.
            self.heard = now;
            self.events.push_back(Event::CarrierDead);
        }
        while let Some((until, key)) = self.lingering.first().copied()
            && until <= now
            && self.may_send()
        {
            self.lingering.pop_first();
            let linger = self.config.linger.unwrap_or_default();
            let Some(stream) = self.table.get_mut(key).filter(|stream| !stream.flags.remote_ended) else {
                continue;
            };
            if stream.credited + linger > now {
                self.lingering.insert((stream.credited + linger, key));
            } else {
                stream.flags.say_end = true;
                self.table.join(key, List::Control);
            }
        }
        self.sweep(now);
    }

    /// What happened apart from what came in.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When silence means that the peer is gone. Original peers are allowed to be silent.
    fn dead_at(&self) -> Option<Duration> {
        let speaks = match self.phase {
            Phase::Open => self.common.has(Capabilities::PING),
            Phase::Greeting | Phase::Resuming { .. } => true,
            _ => false,
        };
        // It may say what it will while nobody listens.
        (speaks && self.want_read()).then(|| self.heard + self.config.dead_after)
    }

    /// Queues our hello. Behind it, our frames count.
    pub(super) fn greet(&mut self, resume: bool, application: Vec<u8>) {
        let hello = Hello {
            resume,
            capabilities: self.config.capabilities,
            window: self.config.window,
            max_streams: self.config.max_streams,
            replay: u32::try_from(self.config.replay).unwrap_or(u32::MAX),
            session: self.session,
            token: self.token,
            received: self.received,
            application,
        };
        self.link.extend(hello.encode());
        if resume {
            self.link_first = true;
        } else {
            self.log.begin_counting();
        }
    }

    /// The peer's hello.
    pub(super) fn hello(&mut self, hello: Hello, now: Duration) -> Result<Option<Event>, MuxError> {
        let common = self.config.capabilities.common(hello.capabilities);
        if common == Capabilities(0) {
            return Err(MuxError::Capabilities);
        }
        if let Phase::Resuming { .. } = self.phase
            && hello.resume
            && hello.session == self.session
        {
            let before = self.log.unsent();
            if !self.log.rewind(hello.received) {
                return Err(MuxError::Count(hello.received));
            }
            self.replayed(before);
            self.opened_session(now);
            // They have ended with the tunnel that they were of.
            self.strange = Strange::default();
            self.stats.resumes += 1;
            return Ok(Some(Event::Resumed));
        }
        let anew = matches!(self.phase, Phase::Resuming { .. });
        if anew {
            // The server does not know the session any more. This is a new one.
            self.lose_session();
            self.log.begin_counting();
            self.end_the_strange(now);
        }
        self.common = common;
        self.peer = Peer {
            window: hello.window.min(MOST_WINDOW),
            max_streams: hello.max_streams,
            ack_every: u64::from(hello.replay / 16).clamp(1, ACK_EVERY),
        };
        (self.counts, self.received, self.told, self.ack_at) = (true, 0, 0, None);
        if self.role == Role::Acceptor {
            self.phase = Phase::Asked;
        } else {
            (self.session, self.token) = (hello.session, hello.token);
            self.opened_session(now);
        }
        let event = Event::Hello(Box::new(hello));
        if anew {
            // Behind the news that the old session is lost.
            self.events.push_back(event);
            return Ok(None);
        }
        Ok(Some(event))
    }

    /// Both have said hello on this carrier.
    fn opened_session(&mut self, now: Duration) {
        self.phase = Phase::Open;
        if !self.common.has(Capabilities::RESUME) {
            self.log.stop_keeping();
        }
        self.heard = now;
        self.ping_sent = None;
        self.ping_at = self.common.has(Capabilities::PING).then_some(now);
        // The peer's hello or ours has just said how far we are.
        self.told = self.received;
        self.ack_at = None;
        self.path = None;
        self.rate = 0.0;
        self.rate_from = None;
    }

    /// What belonged to a carrier that is gone.
    fn drop_link(&mut self) {
        self.link.clear();
        (self.link_taken, self.link_first) = (0, false);
        (self.pong, self.ping_sent, self.ack_at) = (None, None, None);
        self.strange = Strange::default();
    }

    /// Streams that began while the server had not heard our hello are streams of the new session, of which something
    /// is lost already.
    fn end_the_strange(&mut self, now: Duration) {
        for id in std::mem::take(&mut self.strange.ids) {
            self.theirs.add(id);
            self.log.push(Header { stream: id, kind: Kind::Error, payload: 0 }, super::log::Body::None);
            self.bury(id, now);
        }
    }

    fn replayed(&mut self, unsent_before: usize) {
        self.stats.replayed += self.log.unsent().saturating_sub(unsent_before) as u64;
    }

    /// Every stream is over; what follows, if anything, is a new session.
    fn lose_session(&mut self) {
        self.table = Table::default();
        self.log.clear();
        self.reading = None;
        self.lingering.clear();
        (self.unread, self.grown, self.overfull) = (0, 0, 0);
        (self.counts, self.received, self.told) = (false, 0, 0);
        (self.ours, self.theirs) = (Ids::default(), Ids::default());
        (self.leaving, self.peer_leaves) = (false, false);
        self.events.push_back(Event::SessionLost);
        self.settle();
    }

    /// Writes link frames that are due, where no frame stands half taken.
    pub(super) fn fill_link(&mut self, now: Duration) {
        let boundary = self.link.is_empty() && self.log.at_boundary();
        if self.phase != Phase::Open || !boundary {
            return;
        }
        if let Some(value) = self.pong.take() {
            self.push_link(Kind::Pong, value);
        }
        let behind = self.received - self.told;
        let tells = self.common.has(Capabilities::RESUME) && behind > 0;
        if tells && (behind >= self.peer.ack_every || self.ack_at.is_some_and(|at| now >= at)) {
            self.push_link(Kind::Ack, self.received.to_be_bytes());
            self.told = self.received;
            self.ack_at = None;
        }
        if self.ping_at.is_some_and(|at| now >= at) {
            self.ping_at = Some(now + self.config.ping_every);
            self.ping_sent = Some(now);
            self.push_link(Kind::Ping, (now.as_micros() as u64).to_be_bytes());
        }
    }

    fn push_link(&mut self, kind: Kind, value: [u8; 8]) {
        debug_assert!(HEADER + value.len() == 17);
        self.link.extend(Header { stream: 0, kind, payload: 8 }.encode());
        self.link.extend(value);
    }
}

//! What comes in: one frame, or a piece of a data frame, per call.

use std::time::Duration;

use super::super::frame::{Capabilities, Code, HEADER, Header, Hello, Kind, OpenInfo, Parsed, parse_reason};
use super::table::{List, Stream};
use super::{
    Event, Input, MOST_STRANGE, MOST_UNSENT, Mux, MuxError, Overflow, PATH_LIFE, Phase, Reading, Role,
    StreamKey,
};

/// More credit than this no stream can have.
const MOST_CREDIT: u32 = 1 << 31;

impl<B: AsRef<[u8]>> Mux<B> {
    /// Looks at the front of what the carrier gave. Payload is told as it comes, however large its frame;
    /// other frames have to be there whole, the longest being a hello (64 KiB and a header).
    ///
    /// `consumed` 0 without an event: more bytes are needed. An error is the peer's doing, and the end of
    /// the connection.
    pub fn handle_bytes(&mut self, bytes: &[u8], now: Duration) -> Result<Input, MuxError> {
        if !bytes.is_empty() {
            self.heard = now;
        }
        if let Phase::Resuming { .. } = self.phase {
            if self.strange.left > 0 {
                return Ok(self.pass_over(0, bytes.len()));
            }
        } else if let Some(reading) = self.reading {
            return Ok(self.payload(reading, 0, bytes.len(), now));
        }
        let (header, inside) = match Header::parse(bytes)? {
            Parsed::NeedMore { .. } => return Ok(Input::default()),
            Parsed::Done { consumed, value } => (value, &bytes[consumed..]),
        };
        self.check_allowed(header.kind)?;
        if matches!(self.phase, Phase::Resuming { .. }) && header.kind.is_original() {
            return self.strange(header, inside.len());
        }
        if header.kind == Kind::Data {
            return self.data(header, inside.len(), now);
        }
        if matches!(header.kind, Kind::Close | Kind::Error) {
            // What an original peer ignores behind these is ignored here too, however long it is.
            self.count(HEADER, now);
            if header.payload > 0 {
                self.reading = Some(Reading { key: None, left: header.payload, counted: self.counts });
            }
            let event = self.plain_end(header, now)?;
            return Ok(Input { consumed: HEADER, event });
        }
        let Some(payload) = inside.get(..header.payload as usize) else { return Ok(Input::default()) };
        let consumed = HEADER + payload.len();
        let event = if header.kind.is_link() {
            self.link_frame(header.kind, payload, now)?
        } else {
            let event = self.stream_frame(header, payload, now)?;
            self.count(consumed, now);
            event
        };
        let held = self.log.held();
        if self.log.keeps() && held > 2 * self.config.replay + MOST_UNSENT {
            return Err(MuxError::Unacknowledged(held));
        }
        self.settle();
        Ok(Input { consumed, event })
    }

    fn check_allowed(&self, kind: Kind) -> Result<(), MuxError> {
        let plain = self.config.plain && kind.is_original();
        let allowed = match self.phase {
            Phase::Undecided { .. } | Phase::Plain => plain || kind == Kind::Hello && self.offers,
            Phase::Greeting => plain || kind == Kind::Hello,
            Phase::Resuming { .. } => plain || kind == Kind::Hello,
            Phase::Open => match kind {
                Kind::Hello => false,
                Kind::Data => true,
                Kind::Close | Kind::Error => self.config.plain,
                Kind::Open | Kind::Window | Kind::Fin | Kind::Reset => true,
                Kind::Ping | Kind::Pong => self.common.has(Capabilities::PING),
                Kind::GoAway => self.common.has(Capabilities::GO_AWAY),
                Kind::Ack => self.common.has(Capabilities::RESUME),
            },
            Phase::Asked | Phase::Detached { .. } | Phase::Over => false,
        };
        if allowed {
            return Ok(());
        }
        // To an original peer a kind that it does not know is no message at all.
        Err(if self.phase == Phase::Plain {
            super::FrameError::Kind(kind as u8).into()
        } else {
            MuxError::NotNow(kind)
        })
    }

    /// Bytes of the session have arrived.
    pub(super) fn count(&mut self, bytes: usize, now: Duration) {
        if self.counts {
            self.received += bytes as u64;
            if self.common.has(Capabilities::RESUME) && self.ack_at.is_none() {
                self.ack_at = Some(now + super::ACK_DELAY);
            }
        }
    }

    /// Our hello came late, and the server took us for an original client: what it says to that one is not for a
    /// stream of the session.
    fn strange(&mut self, header: Header, there: usize) -> Result<Input, MuxError> {
        let ids = &mut self.strange.ids;
        if !ids.contains(&header.stream) {
            if ids.len() >= MOST_STRANGE {
                return Err(MuxError::NotNow(header.kind));
            }
            ids.push(header.stream);
        }
        self.strange.left = header.payload;
        Ok(self.pass_over(HEADER, there))
    }

    fn pass_over(&mut self, front: usize, there: usize) -> Input {
        let n = there.min(self.strange.left as usize);
        self.strange.left -= n as u32;
        Input { consumed: front + n, event: None }
    }

    fn data(&mut self, header: Header, there: usize, now: Duration) -> Result<Input, MuxError> {
        let key = match self.table.find(header.stream) {
            Some(key) => {
                let stream = self.table.get_mut(key).expect("it was found");
                if stream.open.is_some() {
                    // It cannot know of that stream yet.
                    return Err(MuxError::OpenId(header.stream));
                }
                if stream.flags.plain {
                    (!stream.flags.remote_ended).then_some(key)
                } else if header.payload == 0 {
                    Some(key)
                } else if stream.flags.remote_ended {
                    return Err(MuxError::AfterEnd(header.stream));
                } else {
                    let left = stream.allowance.checked_sub(header.payload);
                    stream.allowance = left.ok_or(MuxError::Credit(header.stream))?;
                    Some(key)
                }
            }
            None => match self.unknown(header.stream, now)? {
                // The caller hears of the stream, and then of its payload: the frame is read again.
                Some(event) => return Ok(Input { consumed: 0, event: Some(event) }),
                None => None,
            },
        };
        if key.is_none() {
            self.stats.late_frames += 1;
        }
        self.count(HEADER, now);
        let reading = Reading { key, left: header.payload, counted: self.counts };
        if header.payload == 0 {
            return Ok(Input { consumed: HEADER, event: None });
        }
        Ok(self.payload(reading, HEADER, there, now))
    }

    /// A frame of a stream that is not there: a new one of an original server, or a late one.
    fn unknown(&mut self, id: u32, now: Duration) -> Result<Option<Event>, MuxError> {
        if !self.opens_unasked() {
            return self.was(id).map(|()| None);
        }
        self.theirs.add(id);
        self.sweep(now);
        if self.tombstones.contains(&id) {
            return Ok(None);
        }
        if self.table.len() >= self.config.max_streams as usize || self.leaving {
            self.stats.refused += 1;
            self.log.push(Header { stream: id, kind: Kind::Error, payload: 0 }, super::log::Body::None);
            self.bury(id, now);
            return Ok(None);
        }
        let mut stream = Stream::new(id, now);
        stream.flags.plain = true;
        let key = self.table.insert(stream);
        self.stats.accepted += 1;
        Ok(Some(Event::Opened(key, None)))
    }

    /// Whether any frame of an unknown id opens a stream: an original server's does.
    fn opens_unasked(&self) -> bool {
        self.role == Role::Initiator && matches!(self.phase, Phase::Plain | Phase::Greeting)
    }

    /// A stream of that id has existed, as far as ids tell. Nobody else can have sent a frame of it in good faith:
    /// not an original client either, which learns ids from us.
    fn was(&self, id: u32) -> Result<(), MuxError> {
        let ours = (id & 1 == 1) == (self.role == Role::Initiator);
        let ids = if ours { &self.ours } else { &self.theirs };
        if ids.may_have(id) { Ok(()) } else { Err(MuxError::OpenId(id)) }
    }

    /// A piece of a data frame: `front` bytes of header in front of it, `there` bytes of it at hand.
    fn payload(&mut self, reading: Reading, front: usize, there: usize, now: Duration) -> Input {
        let n = there.min(reading.left as usize);
        let left = reading.left - n as u32;
        self.reading = (left > 0).then_some(Reading { left, ..reading });
        if reading.counted {
            self.count(n, now);
        }
        let consumed = front + n;
        let key = reading.key.filter(|_| n > 0);
        let Some((key, stream)) = key.and_then(|key| Some((key, self.table.get_mut(key)?))) else {
            return Input { consumed, event: None };
        };
        if stream.flags.remote_ended {
            return Input { consumed, event: None };
        }
        self.sharing.heard(key, now);
        stream.unread += n as u32;
        self.unread += n;
        self.stats.payload.1 += n as u64;
        if stream.flags.plain {
            stream.credited = now;
        }
        let too_much = stream.flags.plain && stream.unread as usize > self.config.max_unread_plain;
        if too_much && !stream.flags.overfull {
            stream.flags.overfull = true;
            self.overfull += 1;
        }
        self.settle();
        if self.config.overflow == Overflow::Reset {
            let victim = if too_much { Some(key) } else { self.largest().filter(|_| self.holds_too_much()) };
            if let Some(victim) = victim {
                self.overflow(victim, now);
                if victim == key {
                    return Input { consumed, event: self.events.pop_back() };
                }
            }
        }
        Input { consumed, event: Some(Event::Data(key, front..consumed)) }
    }

    fn largest(&self) -> Option<StreamKey> {
        if !self.holds_too_much() {
            return None;
        }
        self.table.iter().max_by_key(|(_, stream)| stream.unread).map(|(key, _)| key)
    }

    fn overflow(&mut self, key: StreamKey, now: Duration) {
        const REASON: &str = "more waits for its end than may";
        self.stats.overflows += 1;
        self.reset(key, Code::OVERFLOW, REASON, now);
        self.events.push_back(Event::Reset(key, Code::OVERFLOW, REASON.to_owned()));
    }

    /// An original peer's close or error.
    fn plain_end(&mut self, header: Header, now: Duration) -> Result<Option<Event>, MuxError> {
        let Some(key) = self.table.find(header.stream) else {
            if self.opens_unasked() {
                // A close that comes first must not be followed by late data that dials.
                self.theirs.add(header.stream);
                self.bury(header.stream, now);
            } else {
                self.was(header.stream)?;
            }
            self.stats.late_frames += 1;
            return Ok(None);
        };
        if self.table.get(key).is_some_and(|stream| stream.open.is_some()) {
            return Err(MuxError::OpenId(header.stream));
        }
        if header.kind == Kind::Error {
            self.stats.resets.1 += 1;
            self.remove(key, now);
            return Ok(Some(Event::Reset(key, Code::CONNECTION_RESET, String::new())));
        }
        self.table.leave(key, List::Bulk);
        self.table.leave(key, List::Control);
        let stream = self.table.get_mut(key).expect("it was found");
        if stream.flags.remote_ended && stream.flags.local_ended && stream.flags.plain {
            return Ok(None);
        }
        stream.flags.remote_ended = true;
        stream.flags.local_ended = true;
        stream.flags.say_end = false;
        stream.flags.ready = false;
        self.remove_if_over(key, now);
        Ok(Some(Event::Closed(key)))
    }

    fn link_frame(&mut self, kind: Kind, payload: &[u8], now: Duration) -> Result<Option<Event>, MuxError> {
        if kind == Kind::Hello {
            return self.hello(Hello::parse(payload)?, now);
        }
        let value: [u8; 8] = payload.try_into().expect("the header's length was checked");
        let number = u64::from_be_bytes(value);
        match kind {
            Kind::Ping => self.pong = Some(value),
            Kind::Pong => {
                if let Some(sent) = self.ping_sent.filter(|sent| sent.as_micros() as u64 == number) {
                    (self.ping_sent, self.answered) = (None, Some(sent));
                    let sample = now.saturating_sub(sent);
                    self.latest = Some(sample);
                    self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
                    let shorter = self.path.is_none_or(|(path, at)| sample <= path || now >= at + PATH_LIFE);
                    if shorter {
                        self.path = Some((sample, now));
                    }
                }
            }
            _ => {
                if !self.log.acknowledge(number) {
                    return Err(MuxError::Count(number));
                }
            }
        }
        Ok(None)
    }

    fn stream_frame(
        &mut self,
        header: Header,
        payload: &[u8],
        now: Duration,
    ) -> Result<Option<Event>, MuxError> {
        let id = header.stream;
        if header.kind == Kind::GoAway {
            let reason = payload.get(4..).unwrap_or_default();
            let (code, reason) = parse_reason(header.kind, reason)?;
            self.peer_leaves = true;
            return Ok(Some(Event::GoAway(code, reason)));
        }
        if header.kind == Kind::Open {
            return self.opened(id, OpenInfo::parse(payload)?, now);
        }
        let key = self.table.find(id);
        let Some((key, stream)) = key.and_then(|key| Some((key, self.table.get_mut(key)?))) else {
            self.was(id)?;
            self.stats.late_frames += 1;
            return Ok(None);
        };
        if stream.open.is_some() {
            return Err(MuxError::OpenId(id));
        }
        match header.kind {
            Kind::Window => {
                let more = payload.try_into().map(u32::from_be_bytes).expect("the length was checked");
                let credit = stream.credit.checked_add(more).filter(|credit| *credit <= MOST_CREDIT);
                stream.credit = credit.ok_or(MuxError::Window(id))?;
                if stream.flags.ready {
                    self.ready(key);
                }
                Ok(None)
            }
            Kind::Fin => {
                if std::mem::replace(&mut stream.flags.remote_ended, true) {
                    return Err(MuxError::AfterEnd(id));
                }
                self.remove_if_over(key, now);
                Ok(Some(Event::Ended(key)))
            }
            _ => {
                let (code, reason) = parse_reason(header.kind, payload)?;
                self.stats.resets.1 += 1;
                self.remove(key, now);
                Ok(Some(Event::Reset(key, code, reason)))
            }
        }
    }

    fn opened(&mut self, id: u32, info: OpenInfo, now: Duration) -> Result<Option<Event>, MuxError> {
        let ours = (id & 1 == 1) == (self.role == Role::Initiator);
        if ours || !self.theirs.may_follow(id) || self.table.find(id).is_some() {
            return Err(MuxError::OpenId(id));
        }
        self.theirs.add(id);
        let refusal = if self.leaving {
            Some((Code::SHUTDOWN, "no new streams"))
        } else if self.table.len() >= self.config.max_streams as usize {
            Some((Code::LIMIT, "too many streams"))
        } else {
            None
        };
        if let Some((code, reason)) = refusal {
            self.stats.refused += 1;
            self.push_reset(id, code, reason);
            return Ok(None);
        }
        let mut stream = Stream::new(id, now);
        stream.credit = self.peer.window;
        (stream.window, stream.allowance) = (self.config.window, self.config.window);
        let key = self.table.insert(stream);
        self.stats.accepted += 1;
        Ok(Some(Event::Opened(key, Some(Box::new(info)))))
    }
}

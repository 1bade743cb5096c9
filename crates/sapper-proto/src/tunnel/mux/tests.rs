//! Two machines, a wire between them and a clock: no sockets, no waiting.

mod chance;
mod flow;
mod plain;
mod resume;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;

use super::*;

const MS: Duration = Duration::from_millis(1);
const START: Duration = Duration::from_secs(100);
const SESSION: [u8; 16] = [0xab; 16];
const TOKEN: Token = Token([0xcd; 32]);

/// What one end's caller has of a stream.
#[derive(Default, Debug)]
struct Side {
    to_send: VecDeque<u8>,
    finish: bool,
    finished: bool,
    got: Vec<u8>,
    /// Told, but not consumed: the caller's end does not take it.
    unread: u32,
    stalled: bool,
    ended: bool,
    closed: bool,
    reset: Option<Code>,
    info: Option<OpenInfo>,
}

/// One end: the machine and its caller.
struct End {
    mux: Mux<Vec<u8>>,
    /// By id, so that streams outlive their keys.
    sides: BTreeMap<u32, Side>,
    keys: BTreeMap<u32, StreamKey>,
    /// Bytes of the carrier that are not consumed yet.
    inbox: Vec<u8>,
    events: Vec<Event>,
    /// Whether it answers what comes with the same.
    echoes: bool,
    /// The most that it reads for one turn.
    read_size: usize,
}

impl End {
    fn new(mux: Mux<Vec<u8>>) -> Self {
        Self {
            mux,
            sides: BTreeMap::new(),
            keys: BTreeMap::new(),
            inbox: Vec::new(),
            events: Vec::new(),
            echoes: false,
            read_size: usize::MAX,
        }
    }

    fn open(&mut self, now: Duration) -> u32 {
        let key = self.mux.open(OpenInfo::default(), now).expect("it may open");
        self.keys.insert(key.id, key);
        self.sides.insert(key.id, Side::default());
        key.id
    }

    fn write(&mut self, id: u32, bytes: &[u8]) {
        self.sides.get_mut(&id).unwrap().to_send.extend(bytes);
        self.mux.ready(self.keys[&id]);
    }

    fn finish(&mut self, id: u32) {
        self.sides.get_mut(&id).unwrap().finish = true;
        self.finish_if_sent(id);
    }

    fn finish_if_sent(&mut self, id: u32) {
        let side = self.sides.get_mut(&id).unwrap();
        if side.finish && side.to_send.is_empty() && !side.finished {
            side.finished = true;
            self.mux.finish(self.keys[&id]);
        }
    }

    fn reset(&mut self, id: u32, now: Duration) {
        self.mux.reset(self.keys[&id], Code::DENIED, "no", now);
    }

    fn side(&self, id: u32) -> &Side {
        &self.sides[&id]
    }

    /// Feeds bytes of the carrier.
    fn receive(&mut self, bytes: &[u8], now: Duration) -> Result<(), MuxError> {
        self.inbox.extend(bytes);
        let mut at = 0;
        while self.mux.want_read() {
            let input = self.mux.handle_bytes(&self.inbox[at..], now)?;
            if let Some(event) = input.event.clone() {
                self.event(event, at, now);
            }
            self.poll_events(now);
            at += input.consumed;
            if input.consumed == 0 && input.event.is_none() {
                break;
            }
        }
        self.inbox.drain(..at);
        Ok(())
    }

    fn poll_events(&mut self, now: Duration) {
        while let Some(event) = self.mux.poll_event() {
            self.event(event, 0, now);
        }
    }

    fn event(&mut self, event: Event, at: usize, now: Duration) {
        match &event {
            Event::Opened(key, info) => {
                let side = Side { info: info.as_deref().cloned(), ..Side::default() };
                assert!(self.sides.insert(key.id, side).is_none(), "an id comes once");
                self.keys.insert(key.id, *key);
            }
            Event::Data(key, range) => {
                let bytes = self.inbox[at + range.start..at + range.end].to_vec();
                let side = self.sides.get_mut(&key.id).expect("it was opened");
                assert!(!side.ended && !side.closed && side.reset.is_none(), "payload behind the end");
                side.got.extend(&bytes);
                side.unread += bytes.len() as u32;
                if !side.stalled {
                    let n = std::mem::take(&mut side.unread);
                    self.mux.consumed(*key, n, now);
                }
                if self.echoes {
                    self.write(key.id, &bytes);
                }
            }
            Event::Ended(key) => {
                self.sides.get_mut(&key.id).unwrap().ended = true;
                if self.echoes {
                    self.finish(key.id);
                }
            }
            Event::Closed(key) => self.sides.get_mut(&key.id).unwrap().closed = true,
            Event::Reset(key, code, _) => self.sides.get_mut(&key.id).unwrap().reset = Some(*code),
            Event::Hello(hello) if self.mux.role == Role::Acceptor && !hello.resume => {
                self.mux.answer(SESSION, TOKEN, b"server".to_vec(), now);
            }
            _ => {}
        }
        if !matches!(event, Event::Data(..)) {
            self.events.push(event);
        }
    }

    /// A stalled end takes what waits.
    fn unstall(&mut self, id: u32, now: Duration) {
        let side = self.sides.get_mut(&id).unwrap();
        side.stalled = false;
        let n = std::mem::take(&mut side.unread);
        self.mux.consumed(self.keys[&id], n, now);
    }

    /// Gives the machine what its turns ask for.
    fn turns(&mut self, now: Duration) {
        while let Some(Turn { key, max }) = self.mux.poll_turn(now) {
            assert!(max > 0);
            let side = self.sides.get_mut(&key.id).expect("it is ours");
            let n = side.to_send.len().min(max as usize).min(self.read_size);
            if n == 0 {
                self.mux.not_ready(key);
                continue;
            }
            let payload: Vec<u8> = side.to_send.drain(..n).collect();
            assert!(self.mux.send(key, payload, now));
            if side.to_send.is_empty() {
                self.mux.not_ready(key);
                self.finish_if_sent(key.id);
            }
        }
    }

    /// What the carrier takes, at most `bytes`.
    fn transmit(&mut self, bytes: usize, now: Duration) -> Vec<u8> {
        self.turns(now);
        let mut slices = Vec::new();
        self.mux.poll_transmit(&mut slices, bytes, now);
        let taken = flat(&slices);
        self.mux.transmitted(taken.len(), now);
        taken
    }

    /// Everything.
    fn transmit_all(&mut self, now: Duration) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let some = self.transmit(usize::MAX, now);
            if some.is_empty() {
                return all;
            }
            all.extend(some);
        }
    }
}

fn flat(slices: &[IoSlice<'_>]) -> Vec<u8> {
    slices.iter().flat_map(|slice| slice.iter().copied()).collect()
}

/// Two ends and a wire with a delay.
struct Pair {
    client: End,
    server: End,
    /// When it arrives, and what.
    to_server: VecDeque<(Duration, Vec<u8>)>,
    to_client: VecDeque<(Duration, Vec<u8>)>,
    delay: Duration,
    /// What is sent before comes then at the earliest.
    silent_until: Duration,
    /// When a client whose carrier is lost has another one.
    back_at: Option<Duration>,
    now: Duration,
}

fn quiet() -> Config {
    // Nothing goes by itself: every byte on the wire is there for a reason of the test's.
    Config {
        ping_every: Duration::from_secs(1_000_000),
        dead_after: Duration::from_secs(1_000_000),
        ..Config::default()
    }
}

impl Pair {
    fn new(client: Config, server: Config) -> Self {
        let now = START;
        Self {
            client: End::new(Mux::initiator(client, Some(b"client".to_vec()), now)),
            server: End::new(Mux::acceptor(server, Some(now + 1000 * MS), 0x1000, now)),
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            delay: Duration::ZERO,
            silent_until: now,
            back_at: None,
            now,
        }
    }

    /// Both have said hello and nothing is on its way.
    fn greeted(client: Config, server: Config) -> Self {
        let mut pair = Self::new(client, server);
        pair.run();
        assert!(pair.client.mux.capabilities().has(Capabilities::STREAMS));
        pair
    }

    /// One round: everybody writes what it can, what has arrived is read.
    fn step(&mut self) -> bool {
        let now = self.now;
        let mut moved = false;
        for (end, wire) in [(&mut self.client, &mut self.to_server), (&mut self.server, &mut self.to_client)]
        {
            end.mux.handle_timeout(now);
            end.poll_events(now);
            let bytes = end.transmit(usize::MAX, now);
            if !bytes.is_empty() {
                wire.push_back((now.max(self.silent_until) + self.delay, bytes));
                moved = true;
            }
        }
        if self.back_at.is_some() {
            // One end may still believe in a carrier that is none any more.
            self.to_server.clear();
            self.to_client.clear();
        }
        for (end, wire) in [(&mut self.server, &mut self.to_server), (&mut self.client, &mut self.to_client)]
        {
            while wire.front().is_some_and(|(at, _)| *at <= now) {
                let (_, bytes) = wire.pop_front().unwrap();
                end.receive(&bytes, now).expect("an honest peer");
                moved = true;
            }
            if !end.inbox.is_empty() && end.mux.want_read() {
                let before = end.inbox.len();
                end.receive(&[], now).expect("an honest peer");
                moved |= end.inbox.len() < before;
            }
        }
        moved
    }

    /// Until nothing moves at this moment; then on to the next arrival.
    fn run(&mut self) {
        for _ in 0..1_000_000 {
            if self.step() {
                continue;
            }
            let next = [&self.to_server, &self.to_client];
            let next = next.into_iter().filter_map(|wire| Some(wire.front()?.0)).min();
            match next {
                Some(at) => self.now = at,
                None => return,
            }
        }
        panic!("it never comes to rest");
    }

    /// Lets time pass, with everything that is due in it.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            self.run();
            let timers = [self.client.mux.poll_timeout(), self.server.mux.poll_timeout()];
            match timers.into_iter().flatten().min().filter(|at| *at < until) {
                Some(at) => self.now = at.max(self.now + Duration::from_nanos(1)),
                None => break,
            }
        }
        self.now = until;
        self.run();
    }

    /// The carrier breaks, with all that is on it, and both hear of it.
    fn cut(&mut self) {
        self.to_server.clear();
        self.to_client.clear();
        for end in [&mut self.client, &mut self.server] {
            end.inbox.clear();
            assert!(end.mux.handle_carrier_lost(self.now));
        }
    }

    /// A new carrier: the client's hello comes to the server's session by a new machine there.
    fn reattach(&mut self) {
        let now = self.now;
        assert!(self.client.mux.reattach(b"again".to_vec(), now));
        let hello = self.client.transmit_all(now);
        let mut stranger: Mux<Vec<u8>> = Mux::acceptor(quiet(), Some(now + 1000 * MS), 2, now);
        let input = stranger.handle_bytes(&hello, now).unwrap();
        assert_eq!(input.consumed, hello.len(), "nothing behind the hello");
        let Some(Event::Hello(hello)) = input.event else { panic!("it asks") };
        assert!(hello.resume);
        assert!(self.server.mux.resume(&hello, b"server".to_vec(), now));
        self.server.poll_events(now);
    }
}

/// Bytes that differ from place to place.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 16) as u8).collect()
}

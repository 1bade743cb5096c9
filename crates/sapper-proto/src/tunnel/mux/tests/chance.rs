//! What chance does to two machines: original peers whose frames come in any order and in any pieces, and a
//! network that falls silent and forgets, with every timer running.

use proptest::prelude::*;

use super::super::super::frame::Header;
use super::*;

type Pick = prop::sample::Index;

/// What the two do. The sides: whether it is the server's end.
#[derive(Clone, Debug)]
enum Deed {
    Open,
    Write(Pick, bool, usize),
    Finish(Pick, bool),
    Reset(Pick, bool),
    Stall(Pick, bool),
    Unstall(Pick, bool),
}

fn deed() -> impl Strategy<Value = Deed> {
    let any_side = || (any::<Pick>(), any::<bool>());
    prop_oneof![
        2 => Just(Deed::Open),
        6 => (any_side(), 0usize..3_000).prop_map(|((at, side), len)| Deed::Write(at, side, len)),
        1 => any_side().prop_map(|(at, side)| Deed::Finish(at, side)),
        1 => any_side().prop_map(|(at, side)| Deed::Reset(at, side)),
        1 => any_side().prop_map(|(at, side)| Deed::Stall(at, side)),
        1 => any_side().prop_map(|(at, side)| Deed::Unstall(at, side)),
    ]
}

/// What was opened, and what was sent on it.
#[derive(Default)]
struct Record {
    ids: Vec<u32>,
    sent: BTreeMap<(u32, bool), Vec<u8>>,
}

impl Record {
    fn sent(&self, id: u32, from_server: bool) -> &[u8] {
        self.sent.get(&(id, from_server)).map_or(&[], Vec::as_slice)
    }

    fn act(&mut self, pair: &mut Pair, deed: &Deed) {
        let now = pair.now;
        let (at, server) = match deed {
            Deed::Open => return self.ids.push(pair.server.open(now)),
            Deed::Write(at, server, _) => (at, *server),
            Deed::Finish(at, server) | Deed::Reset(at, server) => (at, *server),
            Deed::Stall(at, server) | Deed::Unstall(at, server) => (at, *server),
        };
        if self.ids.is_empty() {
            return;
        }
        let id = self.ids[at.index(self.ids.len())];
        let end = if server { &mut pair.server } else { &mut pair.client };
        let Some(side) = end.sides.get_mut(&id) else { return };
        match deed {
            Deed::Write(_, _, len) if !side.finish && side.reset.is_none() => {
                let log = self.sent.entry((id, server)).or_default();
                let bytes = pattern(*len, id + log.len() as u32);
                log.extend(&bytes);
                end.write(id, &bytes);
            }
            Deed::Finish(..) => end.finish(id),
            Deed::Reset(..) => {
                side.reset.get_or_insert(Code::DENIED);
                side.to_send.clear();
                end.reset(id, now);
            }
            Deed::Stall(..) => side.stalled = true,
            Deed::Unstall(..) => end.unstall(id, now),
            _ => {}
        }
    }

    fn unstall_all(&self, pair: &mut Pair) {
        for id in &self.ids {
            for end in [&mut pair.client, &mut pair.server] {
                if end.sides.contains_key(id) {
                    end.unstall(*id, pair.now);
                }
            }
        }
    }
}

/// A carrier that both still have, and whose bytes have left: the rest goes as it can.
fn come_to_rest(pair: &mut Pair, record: &Record) {
    record.unstall_all(pair);
    pair.run();
    // What could not be sent before may have been told since.
    record.unstall_all(pair);
    pair.run();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Our two ends in the words of the original, pieces of any size in any order: nothing that was sent before
    /// an end is lost, and nothing that follows one is told.
    #[test]
    fn original_words_in_any_pieces(
        steps in proptest::collection::vec(
            prop_oneof![
                2 => deed().prop_map(Ok),
                2 => (any::<bool>(), 0usize..2_000, 0u64..3_000).prop_map(Err),
            ],
            1..150,
        ),
        bound in 1usize..4_000,
        quantum in 1u32..2_000,
    ) {
        let config = Config { max_unread_plain: bound, quantum, ..quiet() };
        let mut pair = Pair::new(config.clone(), config.clone());
        pair.client.mux = Mux::initiator(config.clone(), None, START);
        pair.server.mux = Mux::acceptor(config, None, 0x1000, START);
        let mut record = Record::default();
        for step in &steps {
            match step {
                Ok(deed) => record.act(&mut pair, deed),
                Err((to_server, bytes, ms)) => {
                    pair.now += Duration::from_millis(*ms);
                    let now = pair.now;
                    let (from, to) = if *to_server {
                        (&mut pair.client, &mut pair.server)
                    } else {
                        (&mut pair.server, &mut pair.client)
                    };
                    from.mux.handle_timeout(now);
                    from.poll_events(now);
                    let bytes = from.transmit(*bytes, now);
                    prop_assert_eq!(to.receive(&bytes, now), Ok(()));
                }
            }
        }
        come_to_rest(&mut pair, &record);
        // Every close that is held back for what may still come has its time.
        pair.pass(quiet().linger.unwrap() * 3);
        come_to_rest(&mut pair, &record);
        for id in &record.ids {
            let server = pair.server.side(*id);
            let Some(client) = pair.client.sides.get(id) else {
                // Only what was reset, or never said a word, does not come to the other end.
                prop_assert!(server.reset.is_some());
                continue;
            };
            prop_assert!(record.sent(*id, true).starts_with(&client.got));
            prop_assert!(record.sent(*id, false).starts_with(&server.got));
            if client.reset.is_some() || server.reset.is_some() {
                continue;
            }
            // A close ends both directions: whole is what comes from an end that was not closed before.
            if !client.finish {
                prop_assert_eq!(&client.got, record.sent(*id, true), "to the client");
            }
            if !server.finish {
                prop_assert_eq!(&server.got, record.sent(*id, false), "to the server");
            }
            if client.finish || server.finish {
                prop_assert!(client.closed && server.closed);
            }
        }
        for end in [&pair.client, &pair.server] {
            let (gauges, sides) = (end.mux.gauges(), end.sides.values());
            prop_assert_eq!((gauges.unread, gauges.held), (0, 0));
            prop_assert_eq!(gauges.streams, sides.filter(|side| !side.closed && side.reset.is_none()).count());
        }
    }

    /// An original server whose frames come in an order that no server sends: after its end a stream does not
    /// come back, and what is told is what came before the end.
    #[test]
    fn an_original_server_in_any_order(
        frames in proptest::collection::vec((1u32..7, 1u8..4, 0usize..60), 0..60),
        pieces in proptest::collection::vec(1usize..90, 1..40),
        answers: bool,
    ) {
        let mut expected: BTreeMap<u32, (Vec<u8>, bool)> = BTreeMap::new();
        let (mut wire, mut gone) = (Vec::new(), Vec::new());
        for (at, (id, kind, len)) in frames.iter().enumerate() {
            let payload = pattern(*len, at as u32);
            let kind = [Kind::Data, Kind::Close, Kind::Error][usize::from(kind - 1)];
            wire.extend(Header { stream: *id, kind, payload: *len as u32 }.encode());
            wire.extend(&payload);
            if gone.contains(id) {
                continue;
            }
            if kind == Kind::Data {
                expected.entry(*id).or_default().0.extend(payload);
            } else {
                gone.push(*id);
                expected.entry(*id).and_modify(|stream| stream.1 = true);
            }
        }
        let mut client = End::new(Mux::initiator(quiet(), None, START));
        client.echoes = answers;
        let mut now = START;
        let (mut at, mut sizes) = (0, pieces.iter().cycle());
        while at < wire.len() {
            let end = wire.len().min(at + sizes.next().unwrap());
            now += MS;
            prop_assert_eq!(client.receive(&wire[at..end], now), Ok(()));
            client.transmit_all(now);
            at = end;
        }
        let told: BTreeMap<u32, (Vec<u8>, bool)> = client
            .sides
            .iter()
            .map(|(id, side)| (*id, (side.got.clone(), side.closed || side.reset.is_some())))
            .collect();
        prop_assert_eq!(&told, &expected);
        let open = expected.values().filter(|stream| !stream.1).count();
        prop_assert_eq!((client.mux.gauges().streams, client.mux.gauges().unread), (open, 0));
    }

    /// A network with a delay that falls silent, for a moment or for so long that both ends give the carrier up,
    /// or that forgets one end's connection while the other believes in it: with every timer running, no byte
    /// is lost or doubled, and no session is given up within its grace.
    #[test]
    fn a_network_that_falls_silent_and_forgets(
        steps in proptest::collection::vec(
            prop_oneof![
                8 => deed().prop_map(Weather::Deed),
                6 => (1u64..400).prop_map(Weather::Pass),
                1 => (1u64..30_000).prop_map(Weather::Silence),
                1 => any::<bool>().prop_map(Weather::Forget),
            ],
            1..80,
        ),
        delay in 0u64..150,
        window in 1u32..2_000,
    ) {
        let config = Config { window, max_window: 4_000, replay: 3_000, quantum: 500, ..Config::default() };
        let mut pair = Pair::greeted(config.clone(), config);
        pair.delay = Duration::from_millis(delay);
        let mut record = Record::default();
        for step in &steps {
            match step {
                Weather::Deed(deed) => record.act(&mut pair, deed),
                Weather::Pass(ms) => live(&mut pair, Duration::from_millis(*ms)),
                Weather::Silence(ms) => {
                    pair.silent_until = pair.silent_until.max(pair.now + Duration::from_millis(*ms));
                }
                Weather::Forget(both) => lose(&mut pair, *both),
            }
        }
        live(&mut pair, Duration::from_secs(45));
        record.unstall_all(&mut pair);
        // The smallest credit, one byte at a time, costs a round trip a byte.
        for _ in 0..40_000 {
            let left = |end: &End| end.sides.values().any(|side| side.reset.is_none() && !side.to_send.is_empty());
            if !left(&pair.client) && !left(&pair.server) {
                break;
            }
            live(&mut pair, Duration::from_millis(300));
            record.unstall_all(&mut pair);
        }
        live(&mut pair, Duration::from_secs(2));
        for end in [&pair.client, &pair.server] {
            prop_assert!(!end.events.contains(&Event::SessionLost));
        }
        for id in &record.ids {
            let (server, none) = (pair.server.side(*id), Side::default());
            let client = pair.client.sides.get(id).unwrap_or(&none);
            let broken = client.reset.is_some() || server.reset.is_some();
            for (from_server, from, to) in [(true, server, client), (false, client, server)] {
                let sent = record.sent(*id, from_server);
                if broken {
                    prop_assert!(sent.starts_with(&to.got));
                } else {
                    prop_assert_eq!(&to.got, sent);
                    prop_assert_eq!(to.ended, from.finish);
                }
            }
        }
        for end in [&pair.client, &pair.server] {
            prop_assert_eq!((end.mux.gauges().held, end.mux.gauges().unread), (0, 0));
        }
    }
}

#[derive(Clone, Debug)]
enum Weather {
    Deed(Deed),
    Pass(u64),
    Silence(u64),
    /// The carrier is lost; whether the server hears of it too.
    Forget(bool),
}

/// The carrier is lost with all that is on it. Where the server has not heard, its machine still believes in it.
fn lose(pair: &mut Pair, both: bool) {
    pair.to_server.clear();
    pair.to_client.clear();
    pair.client.mux.handle_carrier_lost(pair.now);
    pair.client.inbox.clear();
    pair.server.inbox.clear();
    if both {
        pair.server.mux.handle_carrier_lost(pair.now);
    }
    // A new one takes a moment.
    pair.back_at = Some(pair.now.max(pair.silent_until) + 200 * MS);
}

/// Time passes with everything that is due in it, at its moment: a carrier that says nothing is given up by both,
/// and the client comes back when the network does.
fn live(pair: &mut Pair, time: Duration) {
    let until = pair.now + time;
    loop {
        while pair.step() {}
        let dead = [&mut pair.client, &mut pair.server].map(|end| {
            let before = end.events.len();
            end.events.retain(|event| *event != Event::CarrierDead);
            end.events.len() < before
        });
        if dead != [false; 2] && pair.back_at.is_none() {
            lose(pair, true);
        }
        if pair.back_at.is_some_and(|at| at <= pair.now) {
            pair.back_at = None;
            pair.reattach();
            continue;
        }
        let wires = [&pair.to_server, &pair.to_client].into_iter().filter_map(|wire| Some(wire.front()?.0));
        let timers = [pair.client.mux.poll_timeout(), pair.server.mux.poll_timeout(), pair.back_at];
        match wires.chain(timers.into_iter().flatten()).min().filter(|at| *at < until) {
            Some(at) => pair.now = at.max(pair.now + Duration::from_nanos(1)),
            None => break,
        }
    }
    pair.now = until;
}

//! Carriers that break: at every possible point, twice, at random; no byte lost or doubled.

use proptest::prelude::*;

use super::*;
use crate::tunnel::frame::Header;

/// A conversation with every sort of counted frame: the server opens, both talk, both end.
fn talk(pair: &mut Pair) -> (u32, u32) {
    let first = pair.server.open(pair.now);
    let second = pair.server.open(pair.now);
    pair.server.write(first, &pattern(30, 1));
    pair.server.write(second, &pattern(5, 2));
    pair.server.finish(first);
    pair.client.echoes = true;
    (first, second)
}

fn check(pair: &Pair, first: u32, second: u32, what: &str) {
    for (id, len, seed, ended) in [(first, 30, 1, true), (second, 5, 2, false)] {
        let (at_client, at_server) = (pair.client.side(id), pair.server.side(id));
        assert_eq!(at_client.got, pattern(len, seed), "{what}: to the client");
        assert_eq!(at_server.got, pattern(len, seed), "{what}: and back");
        assert_eq!((at_client.ended, at_server.ended), (ended, ended), "{what}");
    }
    assert_eq!((pair.client.mux.gauges().streams, pair.server.mux.gauges().streams), (1, 1), "{what}");
}

/// How many bytes go in each direction until the carrier breaks.
#[derive(Clone, Copy, Debug)]
struct Cut {
    to_client: usize,
    to_server: usize,
    /// Bytes that leave but do not arrive.
    lost: usize,
}

/// Moves exactly so many bytes, as far as there are any, in pieces of `piece`.
fn run_until(pair: &mut Pair, cut: Cut, piece: usize) {
    let (mut down, mut up) = (cut.to_client, cut.to_server);
    for _ in 0..200 {
        let bytes = pair.server.transmit(down.min(piece), pair.now);
        down -= bytes.len();
        let mut moved = !bytes.is_empty();
        pair.client.receive(&bytes, pair.now).unwrap();
        let bytes = pair.client.transmit(up.min(piece), pair.now);
        up -= bytes.len();
        moved |= !bytes.is_empty();
        pair.server.receive(&bytes, pair.now).unwrap();
        if !moved {
            break;
        }
    }
    pair.server.transmit(cut.lost, pair.now);
    pair.client.transmit(cut.lost, pair.now);
}

fn small() -> Config {
    // Windows that need credit on the way, acknowledgements nearly every time.
    Config { window: 16, max_window: 16, replay: 4096, ..quiet() }
}

/// With windows of 16 bytes, and from there on at every possible point.
#[test]
fn a_cut_at_every_point_of_both_directions() {
    let total = {
        let mut pair = Pair::greeted(small(), small());
        let before = (pair.server.mux.log.sent(), pair.client.mux.log.sent());
        let (first, second) = talk(&mut pair);
        pair.run();
        check(&pair, first, second, "uncut");
        assert_eq!(before, (0, 0));
        (pair.server.mux.log.sent() as usize, pair.client.mux.log.sent() as usize)
    };
    assert!(total.0 > 100 && total.1 > 80, "{total:?}");
    for to_client in 0..=total.0 {
        for to_server in 0..=total.1 {
            let lost = (to_client + to_server) % 23;
            let cut = Cut { to_client, to_server, lost };
            let mut pair = Pair::greeted(small(), small());
            let (first, second) = talk(&mut pair);
            run_until(&mut pair, cut, 7);
            pair.cut();
            pair.reattach();
            pair.run();
            check(&pair, first, second, &format!("{cut:?}"));
            assert_eq!(pair.server.mux.stats().resumes, 1);
        }
    }
}

/// The new carrier breaks as well: in the hello, behind it, anywhere.
#[test]
fn a_cut_at_every_point_after_a_cut() {
    for first_cut in [(0, 0, 9), (20, 0, 30), (45, 33, 11), (70, 50, 3)] {
        for point in 0..250 {
            let mut pair = Pair::greeted(small(), small());
            let (first, second) = talk(&mut pair);
            let (to_client, to_server, lost) = first_cut;
            run_until(&mut pair, Cut { to_client, to_server, lost }, 5);
            pair.cut();
            pair.reattach();
            // The client may not have heard a word of the server's hello.
            run_until(&mut pair, Cut { to_client: point, to_server: point / 2, lost: point % 7 }, 9);
            pair.cut();
            pair.reattach();
            pair.run();
            check(&pair, first, second, &format!("{first_cut:?}, then {point}"));
        }
    }
}

#[test]
fn the_server_takes_a_new_carrier_though_the_old_one_is_not_dead_yet() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let (first, second) = talk(&mut pair);
    pair.step();
    // Only the client has noticed: its address changed.
    assert!(pair.client.mux.handle_carrier_lost(pair.now));
    pair.client.inbox.clear();
    pair.to_client.clear();
    // What still lies on the old one to the server may or may not be read; here it is not.
    pair.to_server.clear();
    pair.server.inbox.clear();
    pair.reattach();
    pair.run();
    check(&pair, first, second, "stale");
    assert!(pair.client.events.contains(&Event::Resumed) && pair.server.events.contains(&Event::Resumed));
}

/// More is to be said once more than may wait for a carrier otherwise: the server's hello is read all the same, on the
/// second new carrier as on the first, and by an end that listens to nothing else.
#[test]
fn the_hello_is_read_whatever_waits() {
    let wide = Config { window: 8 << 20, replay: 16 << 20, max_unread: 1 << 20, ..quiet() };
    let mut pair = Pair::greeted(wide.clone(), wide);
    let id = pair.server.open(pair.now);
    pair.run();
    pair.client.sides.get_mut(&id).unwrap().stalled = true;
    pair.client.write(id, &pattern(4 << 20, 1));
    pair.server.write(id, &pattern(4 << 20, 2));
    pair.client.turns(pair.now);
    for _ in 0..20 {
        // The client's words are on their way, and nothing of them arrives.
        pair.client.transmit(usize::MAX, pair.now);
        pair.client.turns(pair.now);
    }
    pair.run();
    for _ in 0..3 {
        pair.cut();
        pair.reattach();
        let hello = pair.server.transmit_all(pair.now);
        pair.client.receive(&hello, pair.now).expect("an honest peer");
        assert!(pair.client.mux.gauges().unsent > 3 << 20, "{:?}", pair.client.mux.gauges());
    }
    pair.client.unstall(id, pair.now);
    pair.cut();
    pair.reattach();
    pair.run();
    assert_eq!(pair.client.side(id).got, pattern(4 << 20, 2));
    assert_eq!(pair.server.side(id).got, pattern(4 << 20, 1));
    assert_eq!(pair.client.mux.stats().resumes, 4);
}

#[test]
fn who_does_not_know_the_secret_takes_over_nothing() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let id = pair.server.open(pair.now);
    pair.server.write(id, b"private");
    pair.run();
    let good = Hello {
        resume: true,
        capabilities: Capabilities::ALL,
        window: 1,
        max_streams: 1,
        replay: 1,
        session: SESSION,
        token: TOKEN,
        received: 0,
        application: Vec::new(),
    };
    let held = pair.server.mux.log.held();
    assert!(held > 0, "what was not acknowledged can be asked for");
    let server = &mut pair.server.mux;
    for wrong in [
        Hello { token: Token([0; 32]), ..good.clone() },
        Hello { session: [0; 16], ..good.clone() },
        Hello { resume: false, ..good.clone() },
        Hello { received: 1_000, ..good.clone() },
    ] {
        assert!(!server.resume(&wrong, Vec::new(), pair.now));
    }
    assert!(server.resume(&good, Vec::new(), pair.now));
    assert_eq!(server.log.unsent(), 12 + 16);
}

#[test]
fn streams_outlive_their_carrier_for_the_time_of_grace() {
    let config = Config { grace: Duration::from_secs(60), ..quiet() };
    let mut pair = Pair::greeted(config.clone(), config);
    let id = pair.server.open(pair.now);
    pair.server.write(id, b"x");
    pair.run();
    pair.cut();
    assert_eq!(pair.server.mux.poll_timeout(), Some(pair.now + Duration::from_secs(60)));
    // Visitors may come and go meanwhile.
    let waiting = pair.server.open(pair.now);
    pair.server.write(waiting, b"patient");
    let gone = pair.server.open(pair.now);
    pair.server.reset(gone, pair.now);
    assert_eq!(pair.server.transmit_all(pair.now), b"");
    pair.now += Duration::from_secs(59);
    pair.server.mux.handle_timeout(pair.now);
    pair.client.mux.handle_timeout(pair.now);
    pair.reattach();
    pair.run();
    assert_eq!(pair.client.side(waiting).got, b"patient");
    assert!(!pair.client.sides.contains_key(&gone));
    // And beyond it they are lost, at both ends.
    pair.cut();
    pair.now += Duration::from_secs(60);
    for end in [&mut pair.client, &mut pair.server] {
        end.mux.handle_timeout(pair.now);
        end.poll_events(pair.now);
        assert_eq!(end.events.last(), Some(&Event::SessionLost));
        let gauges = end.mux.gauges();
        assert_eq!((gauges.streams, gauges.held, gauges.unread), (0, 0, 0));
        assert!(end.mux.open(OpenInfo::default(), pair.now).is_none());
        assert!(!end.mux.handle_carrier_lost(pair.now));
    }
    assert!(!pair.client.mux.reattach(Vec::new(), pair.now));
}

#[test]
fn a_server_that_was_restarted_begins_a_new_session() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let id = pair.server.open(pair.now);
    pair.server.write(id, b"old");
    pair.run();
    pair.client.mux.handle_carrier_lost(pair.now);
    // Another process, which knows nothing.
    pair.server = End::new(Mux::acceptor(quiet(), Some(pair.now + MS), 0x9000, pair.now));
    assert!(pair.client.mux.reattach(b"again".to_vec(), pair.now));
    let hello = pair.client.transmit_all(pair.now);
    let Ok(Input { event: Some(Event::Hello(asked)), .. }) = pair.server.mux.handle_bytes(&hello, pair.now)
    else {
        panic!("it asks")
    };
    assert!(asked.resume && asked.session == SESSION && asked.application == b"again");
    pair.server.mux.answer([1; 16], Token([2; 32]), Vec::new(), pair.now);
    pair.run();
    let said: Vec<_> = pair.client.events.iter().rev().take(2).collect();
    assert!(matches!(said[..], [Event::Hello(_), Event::SessionLost]), "{said:?}");
    let id = pair.server.open(pair.now);
    pair.server.write(id, b"new");
    pair.run();
    assert_eq!(pair.client.side(id).got, b"new");
    assert_eq!(pair.client.mux.session(), Some(&[1; 16]));
    // The new session can be resumed as the old one could.
    pair.server.write(id, b"er");
    pair.cut();
    let now = pair.now;
    pair.client.mux.reattach(Vec::new(), now);
    let hello = pair.client.transmit_all(now);
    let hello = Hello::parse(&hello[9..]).unwrap();
    assert!(pair.server.mux.resume(&hello, Vec::new(), now));
    pair.run();
    assert_eq!(pair.client.side(id).got, b"newer");
}

/// A new machine at the server, which waits for a hello no longer: a client that says nothing is an original one.
fn impatient(now: Duration) -> End {
    let mut end = End::new(Mux::acceptor(quiet(), Some(now), 0x9000, now));
    end.mux.handle_timeout(now);
    end
}

#[test]
fn what_comes_before_the_server_heard_our_hello_is_not_of_the_session() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let id = pair.server.open(pair.now);
    pair.server.write(id, b"before");
    pair.run();
    pair.server.write(id, b" and after");
    pair.cut();
    let now = pair.now;
    assert!(pair.client.mux.reattach(Vec::new(), now));
    let hello = pair.client.transmit_all(now);
    let mut other = impatient(now);
    let strange = other.open(now);
    other.write(strange, &pattern(100, 1));
    for piece in other.transmit(57, now).chunks(7) {
        pair.client.receive(piece, now).unwrap();
    }
    // The hello comes in the midst of a frame, whose rest comes before the session's.
    let Ok(Input { event: Some(Event::Hello(hello)), .. }) = other.mux.handle_bytes(&hello, now) else {
        panic!("it asks")
    };
    let mut rest = Vec::new();
    other.mux.poll_rest(&mut rest);
    let rest = flat(&rest);
    assert_eq!(rest.len(), 100 + 2 * 9 - 57);
    pair.client.receive(&rest, now).unwrap();
    assert!(pair.server.mux.resume(&hello, Vec::new(), now));
    pair.server.poll_events(now);
    pair.run();
    assert_eq!(pair.client.side(id).got, b"before and after");
    assert!(!pair.client.sides.contains_key(&strange));
}

#[test]
fn streams_that_began_before_a_restarted_server_heard_our_hello_are_ended() {
    let mut pair = Pair::greeted(quiet(), quiet());
    pair.client.mux.handle_carrier_lost(pair.now);
    pair.server = impatient(pair.now);
    assert!(pair.client.mux.reattach(Vec::new(), pair.now));
    let hello = pair.client.transmit_all(pair.now);
    let strange: Vec<_> = (0..3)
        .map(|n| {
            let id = pair.server.open(pair.now);
            pair.server.write(id, &pattern(100, n));
            let said = pair.server.transmit_all(pair.now);
            pair.client.receive(&said, pair.now).unwrap();
            id
        })
        .collect();
    let Ok(Input { event: Some(Event::Hello(_)), .. }) = pair.server.mux.handle_bytes(&hello, pair.now)
    else {
        panic!("it asks")
    };
    pair.server.mux.answer([1; 16], Token([2; 32]), Vec::new(), pair.now);
    pair.server.write(strange[1], b"late");
    pair.run();
    assert!(pair.client.events.contains(&Event::SessionLost));
    for id in strange {
        assert_eq!(pair.server.side(id).reset, Some(Code::CONNECTION_RESET));
        assert!(!pair.client.sides.contains_key(&id));
    }
    let id = pair.server.open(pair.now);
    pair.server.write(id, b"new");
    pair.run();
    assert_eq!(pair.client.side(id).got, b"new");
}

#[test]
fn a_server_that_begins_ever_more_streams_without_a_hello_costs_a_connection() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let id = pair.server.open(pair.now);
    pair.server.write(id, b"before");
    pair.run();
    pair.server.write(id, b" and after");
    pair.cut();
    assert!(pair.client.mux.reattach(Vec::new(), pair.now));
    let open = |stream| Header { stream, kind: Kind::Data, payload: 0 }.encode();
    for stream in 1..=MOST_STRANGE as u32 {
        assert_eq!(pair.client.receive(&open(stream), pair.now), Ok(()));
        assert_eq!(pair.client.receive(&open(stream), pair.now), Ok(()), "one more frame of the same");
    }
    let error = pair.client.receive(&open(MOST_STRANGE as u32 + 1), pair.now).unwrap_err();
    assert_eq!(error, MuxError::NotNow(Kind::Data));
    assert!(pair.client.mux.keeps_session(&error));
    pair.cut();
    pair.reattach();
    pair.run();
    assert_eq!(pair.client.side(id).got, b"before and after");
    assert!(!pair.client.mux.keeps_session(&error), "it is open");
}

#[test]
fn a_server_with_a_wrong_count_is_not_believed() {
    let mut pair = Pair::greeted(quiet(), quiet());
    pair.client.mux.handle_carrier_lost(pair.now);
    pair.client.mux.reattach(Vec::new(), pair.now);
    pair.client.transmit_all(pair.now);
    // A frame of the session before the hello, and then a hello that has counted too much.
    let fin = Header { stream: 0x1000, kind: Kind::Fin, payload: 0 }.encode();
    assert_eq!(pair.client.receive(&fin, pair.now), Err(MuxError::NotNow(Kind::Fin)));
    pair.client.inbox.clear();
    let hello = Hello {
        resume: true,
        capabilities: Capabilities::ALL,
        window: 1,
        max_streams: 1,
        replay: 1,
        session: SESSION,
        token: TOKEN,
        received: 1,
        application: Vec::new(),
    };
    assert_eq!(pair.client.receive(&hello.encode(), pair.now), Err(MuxError::Count(1)));
}

#[test]
fn replay_is_bounded_and_the_sender_waits_for_acknowledgements() {
    let config = Config { replay: 64 * 1024, window: 1 << 20, ..quiet() };
    let mut pair = Pair::greeted(config.clone(), config);
    let id = pair.server.open(pair.now);
    let payload = pattern(1_000_000, 5);
    pair.server.write(id, &payload);
    pair.server.transmit_all(pair.now);
    assert!(pair.server.mux.gauges().held <= 64 * 1024);
    pair.to_client.clear();
    pair.cut();
    pair.reattach();
    assert!(pair.server.mux.stats().replayed > 60_000);
    pair.run();
    assert_eq!(pair.client.side(id).got, payload);
    pair.pass(ACK_DELAY * 2);
    assert_eq!(pair.server.mux.gauges().held, 0, "everything is acknowledged in the end");
}

#[derive(Clone, Debug)]
enum Step {
    Open,
    Write(prop::sample::Index, bool, usize),
    Finish(prop::sample::Index, bool),
    Reset(prop::sample::Index, bool),
    Stall(prop::sample::Index, bool),
    Unstall(prop::sample::Index, bool),
    Move(bool, usize),
    Cut,
    Pass(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let stream = any::<prop::sample::Index>;
    prop_oneof![
        2 => Just(Step::Open),
        6 => (stream(), any::<bool>(), 0usize..3_000).prop_map(|(at, side, len)| Step::Write(at, side, len)),
        1 => (stream(), any::<bool>()).prop_map(|(at, side)| Step::Finish(at, side)),
        1 => (stream(), any::<bool>()).prop_map(|(at, side)| Step::Reset(at, side)),
        1 => (stream(), any::<bool>()).prop_map(|(at, side)| Step::Stall(at, side)),
        1 => (stream(), any::<bool>()).prop_map(|(at, side)| Step::Unstall(at, side)),
        12 => (any::<bool>(), 0usize..2_000).prop_map(|(way, bytes)| Step::Move(way, bytes)),
        2 => Just(Step::Cut),
        1 => any::<u16>().prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the two do and whatever happens to their carriers: what arrives is the beginning of
    /// what was sent, in the end all of it where nobody reset, and nothing is held for ever.
    #[test]
    fn anything_may_happen(steps in proptest::collection::vec(step(), 1..150), window in 1u32..2_000) {
        let grace = Duration::from_secs(1_000_000);
        let config = Config { window, max_window: 4_000, replay: 3_000, quantum: 500, grace, ..quiet() };
        let mut pair = Pair::greeted(config.clone(), config);
        let mut sent: BTreeMap<(u32, bool), Vec<u8>> = BTreeMap::new();
        let mut ids: Vec<u32> = Vec::new();
        for step in steps {
            let now = pair.now;
            match step {
                Step::Open => ids.push(pair.server.open(now)),
                Step::Write(at, from_server, len) if !ids.is_empty() => {
                    let id = ids[at.index(ids.len())];
                    let end = if from_server { &mut pair.server } else { &mut pair.client };
                    if end.sides.get(&id).is_some_and(|side| !side.finish && side.reset.is_none()) {
                        let log = sent.entry((id, from_server)).or_default();
                        let bytes = pattern(len, id + log.len() as u32);
                        log.extend(&bytes);
                        end.write(id, &bytes);
                    }
                }
                Step::Finish(at, server) | Step::Reset(at, server) | Step::Stall(at, server) | Step::Unstall(at, server)
                    if !ids.is_empty() =>
                {
                    let id = ids[at.index(ids.len())];
                    let end = if server { &mut pair.server } else { &mut pair.client };
                    if end.sides.contains_key(&id) {
                        match step {
                            Step::Finish(..) => end.finish(id),
                            Step::Reset(..) => {
                                end.reset(id, now);
                                let side = end.sides.get_mut(&id).unwrap();
                                side.reset = Some(Code::DENIED);
                                side.to_send.clear();
                            }
                            Step::Stall(..) => end.sides.get_mut(&id).unwrap().stalled = true,
                            _ => end.unstall(id, now),
                        }
                    }
                }
                Step::Move(to_server, bytes) => {
                    let (from, to) = if to_server {
                        (&mut pair.client, &mut pair.server)
                    } else {
                        (&mut pair.server, &mut pair.client)
                    };
                    let bytes = from.transmit(bytes, now);
                    prop_assert_eq!(to.receive(&bytes, now), Ok(()));
                }
                Step::Cut => {
                    pair.cut();
                    pair.reattach();
                }
                Step::Pass(ms) => {
                    pair.now += u32::from(ms) * MS;
                    pair.server.mux.handle_timeout(pair.now);
                    pair.client.mux.handle_timeout(pair.now);
                }
                _ => {}
            }
        }
        for id in &ids {
            for end in [&mut pair.client, &mut pair.server] {
                if end.sides.contains_key(id) {
                    end.unstall(*id, pair.now);
                }
            }
        }
        pair.run();
        for id in &ids {
            let (at_client, at_server) = (pair.client.sides.get(id), pair.server.side(*id));
            let broken = at_server.reset.is_some() || at_client.is_some_and(|side| side.reset.is_some());
            for (from_server, side) in [(true, at_client), (false, Some(at_server))] {
                let (none, empty) = (Vec::new(), Vec::new());
                let sent = sent.get(&(*id, from_server)).unwrap_or(&none);
                let got = side.map_or(&empty, |side| &side.got);
                if broken {
                    prop_assert!(sent.starts_with(got));
                } else {
                    prop_assert_eq!(got, sent);
                }
            }
            if !broken {
                prop_assert_eq!(at_client.unwrap().ended, at_server.finish);
                prop_assert_eq!(at_server.ended, at_client.unwrap().finish);
            }
        }
        pair.pass(ACK_DELAY * 2);
        for end in [&pair.client, &pair.server] {
            prop_assert_eq!((end.mux.gauges().held, end.mux.gauges().unread), (0, 0));
            let open = |id: &&u32| {
                let (a, b) = (pair.client.sides.get(*id), pair.server.side(**id));
                let Some(a) = a else { return false };
                a.reset.is_none() && b.reset.is_none() && !(a.finish && b.finish)
            };
            prop_assert_eq!(end.mux.gauges().streams, ids.iter().filter(open).count());
        }
    }
}

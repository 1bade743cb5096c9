//! Credit, fairness, bounds, round trips, go-away; many streams.

use super::table::List;
use super::*;

/// Writes for as long as it is asked: a stream that always has more.
fn endless(end: &mut End, id: u32) {
    end.write(id, &vec![1; 4 << 20]);
}

/// Turns until so many bytes were granted, as (id, bytes).
fn granted(end: &mut End, bytes: usize, now: Duration) -> Vec<(u32, usize)> {
    let (mut all, mut sum) = (Vec::new(), 0);
    while sum < bytes {
        let Some(Turn { key, max }) = end.mux.poll_turn(now) else {
            // The carrier takes what waits.
            let mut slices = Vec::new();
            end.mux.poll_transmit(&mut slices, usize::MAX, now);
            let n = flat(&slices).len();
            assert!(n > 0, "somebody may send");
            end.mux.transmitted(n, now);
            continue;
        };
        let side = end.sides.get_mut(&key.id).unwrap();
        let n = side.to_send.len().min(max as usize);
        if n == 0 {
            end.mux.not_ready(key);
            continue;
        }
        let payload = side.to_send.drain(..n).collect();
        assert!(end.mux.send(key, payload, now));
        all.push((key.id, n));
        sum += n;
    }
    all
}

/// By how much the window of a stream that takes what it gets has grown.
const USUAL: usize = (256 - 16) * 1024;

fn wide() -> Config {
    Config { window: 8 << 20, replay: 64 << 20, ..quiet() }
}

/// A server whose client is one of ours, and one whose client is an original one.
fn both_sorts() -> [End; 2] {
    let ours = Pair::greeted(wide(), wide()).server;
    [ours, End::new(Mux::acceptor(wide(), None, 0x1000, START))]
}

#[test]
fn bulk_streams_share_alike() {
    for server in both_sorts() {
        they_share(server);
    }
}

fn they_share(mut server: End) {
    let ids: Vec<u32> = (0..4).map(|_| server.open(START)).collect();
    for id in &ids {
        endless(&mut server, *id);
    }
    let turns = granted(&mut server, 8 << 20, START);
    assert!(turns.iter().all(|(_, n)| *n <= LONGEST_TURN as usize), "nobody has more than a quantum");
    for id in ids {
        let sum: usize = turns.iter().filter(|turn| turn.0 == id).map(|turn| turn.1).sum();
        assert!(sum.abs_diff(2 << 20) <= 2 * LONGEST_TURN as usize, "{id}: {sum}");
    }
}

#[test]
fn who_was_silent_goes_first_and_bulk_is_not_starved() {
    for server in both_sorts() {
        silent_goes_first(server);
    }
}

fn silent_goes_first(mut server: End) {
    let now = START;
    let bulk = server.open(now);
    endless(&mut server, bulk);
    granted(&mut server, 1 << 20, now);
    let ping = server.open(now);
    server.write(ping, b"?");
    let turns = granted(&mut server, 300_000, now);
    // Behind nothing but the turn that had begun.
    let before: usize = turns.iter().take_while(|turn| turn.0 == bulk).map(|turn| turn.1).sum();
    assert!(before <= 2 * LONGEST_TURN as usize, "{before} bytes go before one byte");
    // Many that were silent, all the time: the bulk stream still has its turns.
    let many: Vec<u32> = (0..200).map(|_| server.open(now)).collect();
    for id in &many {
        server.write(*id, b"?");
    }
    let turns = granted(&mut server, 400_000, now);
    let longest = turns.split(|turn| turn.0 == bulk).map(<[_]>::len).max().unwrap();
    assert!(longest <= FRESH_RUN as usize, "{longest} turns without the bulk stream");
    let served = many.iter().filter(|id| turns.iter().any(|turn| turn.0 == **id)).count();
    assert!(served > 60, "{served}");
}

#[test]
fn little_waits_for_the_carrier_and_less_for_a_slow_one() {
    let mut pair = Pair::greeted(wide(), wide());
    let id = pair.server.open(pair.now);
    endless(&mut pair.server, id);
    pair.server.turns(pair.now);
    let most = pair.server.mux.config.backlog.1 + LONGEST_TURN as usize + 100;
    assert!(pair.server.mux.gauges().unsent <= most);
    // A carrier of 1 MB a second: 10 KB in 10 ms.
    for _ in 0..200 {
        pair.now += 10 * MS;
        assert_eq!(pair.server.transmit(10_000, pair.now).len(), 10_000);
    }
    let least = pair.server.mux.config.backlog.0 + LONGEST_TURN as usize + 100;
    let unsent = pair.server.mux.gauges().unsent;
    assert!(unsent <= least, "{unsent} bytes wait");
}

#[test]
fn a_stalled_end_holds_its_window_and_nobody_up() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let now = pair.now;
    let (stalled, free) = (pair.server.open(now), pair.server.open(now));
    pair.run();
    pair.client.sides.get_mut(&stalled).unwrap().stalled = true;
    for id in [stalled, free] {
        pair.server.write(id, &pattern(3 << 20, id));
    }
    pair.run();
    assert_eq!(pair.client.side(stalled).got.len(), 16 * 1024);
    assert_eq!(pair.client.mux.gauges().unread, 16 * 1024);
    assert_eq!(pair.client.side(free).got, pattern(3 << 20, free));
    pair.client.unstall(stalled, now);
    pair.run();
    assert_eq!(pair.client.side(stalled).got, pattern(3 << 20, stalled));
    assert_eq!(pair.client.mux.gauges().unread, 0);
}

/// 4 MB over a path of 100 ms: with windows that stay it takes 16 round trips, with windows that grow
/// it takes a third of them.
#[test]
fn windows_grow_on_long_paths_and_within_their_budget() {
    let time = |config: Config| {
        let config = Config { capabilities: Capabilities(7), ping_every: Duration::from_secs(1), ..config };
        let mut pair = Pair::new(config.clone(), config);
        pair.delay = 50 * MS;
        pair.run();
        // The first round trip is known.
        let id = pair.server.open(pair.now);
        let begun = pair.now;
        pair.server.write(id, &pattern(4 << 20, 1));
        while pair.client.sides.get(&id).is_none_or(|side| side.got.len() < 4 << 20) {
            pair.run();
            assert!(pair.now - begun < Duration::from_secs(60));
        }
        (pair.now - begun, pair.client.mux.gauges().grown)
    };
    let (still, grown) = time(Config { max_window: 256 * 1024, ..quiet() });
    assert_eq!(grown, USUAL);
    let (fast, grown) = time(quiet());
    assert!(grown > 1 << 20, "{grown}");
    assert!(fast * 2 < still, "{fast:?} against {still:?}");
    let (_, grown) = time(Config { window_budget: 300_000, ..quiet() });
    assert!(grown <= 300_000 && grown > 0, "{grown}");
}

/// What waits on a path makes its round trips longer, and a larger window only lets more wait.
#[test]
fn a_window_follows_the_path_and_not_what_waits_on_it() {
    let grown = |first: Duration| {
        let config = Config { capabilities: Capabilities(7), ping_every: Duration::from_secs(1), ..quiet() };
        let mut pair = Pair::new(config.clone(), config);
        pair.delay = first;
        pair.run();
        pair.delay = 50 * MS;
        pair.pass(Duration::from_secs(20));
        assert!(pair.client.mux.gauges().rtt.is_some_and(|rtt| rtt > 80 * MS));
        let id = pair.server.open(pair.now);
        pair.server.write(id, &pattern(4 << 20, 1));
        for _ in 0..100 {
            pair.pass(100 * MS);
        }
        assert_eq!(pair.client.side(id).got.len(), 4 << 20);
        pair.client.mux.gauges().grown
    };
    // What comes at once grows it once even so.
    let (short, long) = (grown(MS), grown(50 * MS));
    assert!(short * 2 < long, "{short} bytes, and {long} on a long path");
}

#[test]
fn a_reader_that_is_slow_itself_gets_no_larger_window() {
    let config = Config { ping_every: Duration::from_secs(1), ..quiet() };
    let mut pair = Pair::new(config.clone(), config);
    pair.delay = MS;
    pair.run();
    let id = pair.server.open(pair.now);
    pair.run();
    pair.client.sides.get_mut(&id).unwrap().stalled = true;
    pair.server.write(id, &pattern(2 << 20, 1));
    for _ in 0..20 {
        pair.pass(100 * MS);
        pair.client.unstall(id, pair.now);
        pair.client.sides.get_mut(&id).unwrap().stalled = true;
    }
    assert_eq!(pair.client.side(id).got.len(), 2 << 20);
    assert_eq!(pair.client.mux.gauges().grown, USUAL);
    assert!(pair.client.mux.gauges().rtt.is_some());
}

/// An end that has its turns takes a whole window in each of them, half by half: its rate is that of many turns.
#[test]
fn what_is_read_in_bursts_gets_no_larger_window() {
    let config = Config { ping_every: Duration::from_secs(1), ..quiet() };
    let mut pair = Pair::new(config.clone(), config);
    pair.delay = MS / 10;
    pair.run();
    let id = pair.server.open(pair.now);
    pair.run();
    pair.server.write(id, &pattern(8 << 20, 1));
    pair.client.sides.get_mut(&id).unwrap().stalled = true;
    while pair.client.side(id).got.len() < 8 << 20 {
        pair.pass(2 * MS);
        for _ in 0..2 {
            let side = pair.client.sides.get_mut(&id).unwrap();
            let half = side.unread.min(128 * 1024);
            side.unread -= half;
            pair.client.mux.consumed(pair.client.keys[&id], half, pair.now);
            pair.step();
        }
    }
    assert!(pair.client.mux.gauges().rtt.is_some());
    assert_eq!(pair.client.mux.gauges().grown, USUAL);
}

/// On a short path a window lasts for the turns of two processes, which others would wait behind.
#[test]
fn a_window_is_no_larger_than_its_path_needs_while_others_say_something() {
    let config = Config { ping_every: Duration::from_secs(1), ..quiet() };
    let mut pair = Pair::new(config.clone(), config);
    pair.delay = MS / 20;
    pair.run();
    let (bulk, other) = (pair.server.open(pair.now), pair.server.open(pair.now));
    pair.run();
    // Half a gigabyte a second.
    let mut sent = 0;
    let mut go = |pair: &mut Pair, turns: usize, together: bool| {
        for _ in 0..turns {
            pair.server.write(bulk, &[7; 512 * 1024]);
            if together {
                pair.server.write(other, b"x");
            }
            sent += 512 * 1024;
            pair.pass(MS);
        }
        assert_eq!(pair.client.side(bulk).got.len(), sent, "it is held up by nothing");
        pair.client.mux.gauges().grown
    };
    let alone = go(&mut pair, 40, false);
    assert!(alone > USUAL + 200_000, "{alone}");
    assert_eq!(go(&mut pair, 40, true), USUAL);
    pair.pass(300 * MS);
    let again = go(&mut pair, 40, false);
    assert!(again > USUAL + 200_000, "{again}");
}

#[test]
fn round_trips_are_measured_and_silence_is_noticed() {
    let config = Config {
        ping_every: Duration::from_secs(5),
        dead_after: Duration::from_secs(15),
        ..Config::default()
    };
    let mut pair = Pair::new(config.clone(), config);
    pair.delay = 20 * MS;
    pair.pass(Duration::from_secs(30));
    for end in [&pair.client, &pair.server] {
        assert_eq!(end.mux.gauges().rtt, Some(40 * MS));
        assert_eq!(end.mux.slowness(), Some(40 * MS));
        assert!(!end.events.contains(&Event::CarrierDead));
    }
    pair.delay = 400 * MS;
    pair.pass(Duration::from_secs(6));
    for end in [&pair.client, &pair.server] {
        assert!(end.mux.gauges().rtt.is_some_and(|rtt| rtt < 400 * MS));
        assert_eq!(end.mux.slowness(), Some(800 * MS), "it has just become slower");
    }
    let silent = pair.now;
    let mut now = silent;
    while pair.client.mux.poll_event().is_none() {
        now = pair.client.mux.poll_timeout().expect("something is due").max(now + Duration::from_nanos(1));
        pair.client.mux.handle_timeout(now);
        pair.client.transmit_all(now);
        assert!(now <= silent + Duration::from_secs(16));
    }
    assert!(now > silent + Duration::from_secs(9));
}

#[test]
fn nothing_is_due_while_nothing_can_be_said() {
    let config = Config { ping_every: 10 * MS, ..quiet() };
    let mut pair = Pair::greeted(config.clone(), config);
    let id = pair.server.open(pair.now);
    pair.server.write(id, &[1; 100]);
    pair.server.transmit(20, pair.now);
    // The carrier stands in the middle of a frame: a ping that is due has to wait, without spinning.
    let due = pair.server.mux.poll_timeout();
    assert!(due.is_none_or(|at| at > pair.now + Duration::from_secs(100)), "{due:?}");
    pair.server.transmit_all(pair.now);
    assert_eq!(pair.server.mux.poll_timeout(), Some(pair.now + 10 * MS));
}

#[test]
fn after_a_go_away_nothing_opens_and_what_is_open_goes_on() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let now = pair.now;
    let id = pair.server.open(now);
    pair.client.mux.go_away(Code::SHUTDOWN, "restarting");
    // One crosses it.
    let crossing = pair.server.open(now);
    pair.server.write(crossing, b"?");
    pair.run();
    assert_eq!(pair.server.side(crossing).reset, Some(Code::SHUTDOWN));
    assert!(pair.server.events.contains(&Event::GoAway(Code::SHUTDOWN, "restarting".into())));
    assert!(pair.server.mux.open(OpenInfo::default(), now).is_none());
    assert!(pair.client.mux.open(OpenInfo::default(), now).is_none());
    // The one that came before was refused as well: it was not opened at the time.
    assert_eq!(pair.server.side(id).reset, Some(Code::SHUTDOWN));
    let mut pair = Pair::greeted(quiet(), quiet());
    let id = pair.server.open(now);
    pair.run();
    pair.client.mux.go_away(Code::SHUTDOWN, "");
    pair.client.echoes = true;
    pair.server.write(id, b"more");
    pair.run();
    assert!(!pair.server.mux.is_idle());
    pair.server.finish(id);
    pair.run();
    assert_eq!(pair.server.side(id).got, b"more");
    assert!(pair.server.mux.is_idle() && pair.client.mux.is_idle());
}

#[test]
fn the_peers_limit_of_streams_is_kept() {
    let mut pair = Pair::greeted(Config { max_streams: 2, ..quiet() }, quiet());
    let now = pair.now;
    let first = pair.server.open(now);
    pair.server.open(now);
    assert!(pair.server.mux.open(OpenInfo::default(), now).is_none());
    pair.server.reset(first, now);
    pair.server.open(now);
    pair.run();
    assert_eq!((pair.client.mux.gauges().streams, pair.client.mux.stats().refused), (2, 0));
}

#[test]
fn an_initiator_opens_streams_too() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let now = pair.now;
    let info = OpenInfo { service: 3, server_name: Some("a.example".into()), ..OpenInfo::default() };
    let key = pair.client.mux.open(info.clone(), now).unwrap();
    pair.client.keys.insert(key.id, key);
    pair.client.sides.insert(key.id, Side::default());
    pair.server.echoes = true;
    pair.client.write(key.id, b"over there");
    pair.client.finish(key.id);
    pair.run();
    assert_eq!(pair.server.side(key.id).info.as_ref(), Some(&info));
    assert_eq!(pair.client.side(key.id).got, b"over there");
    assert!(pair.client.side(key.id).ended && key.id % 2 == 1);
}

#[test]
fn too_much_in_all_pauses_the_carrier_or_resets_who_holds_most() {
    for overflow in [Overflow::Pause, Overflow::Reset] {
        let config = Config { overflow, max_unread: 300_000, window: 256 * 1024, ..quiet() };
        let mut pair = Pair::greeted(config, quiet());
        let now = pair.now;
        let ids: Vec<u32> = (0..3).map(|_| pair.server.open(now)).collect();
        pair.run();
        for (at, id) in ids.iter().enumerate() {
            pair.client.sides.get_mut(id).unwrap().stalled = true;
            pair.server.write(*id, &pattern(60_000 + 60_000 * at, *id));
        }
        pair.run();
        if overflow == Overflow::Pause {
            assert!(!pair.client.mux.want_read());
            let held = pair.client.mux.gauges().unread;
            assert!((300_000..700_000).contains(&held), "{held}");
            for id in &ids {
                pair.client.unstall(*id, now);
            }
            pair.run();
            for (at, id) in ids.iter().enumerate() {
                assert_eq!(pair.client.side(*id).got, pattern(60_000 + 60_000 * at, *id));
            }
        } else {
            assert_eq!(pair.client.side(ids[2]).reset, Some(Code::OVERFLOW));
            assert_eq!(pair.server.side(ids[2]).reset, Some(Code::OVERFLOW));
            assert_eq!(pair.client.mux.gauges().unread, 60_000 + 120_000);
        }
    }
}

/// As many streams as there may be, whose ends take nothing, or did until their windows had grown: what they hold is
/// bounded by their credit, and nobody else waits.
#[test]
fn ends_that_take_nothing_stop_nobody() {
    const STREAMS: u32 = 200;
    let config = Config {
        window: 1024,
        usual_window: 16 * 1024,
        window_budget: 256 * 1024,
        max_unread: 256 * 1024 + STREAMS as usize * 1024,
        max_streams: STREAMS,
        ..quiet()
    };
    for first_taken in [0, 60_000] {
        let mut pair = Pair::greeted(config.clone(), config.clone());
        let now = pair.now;
        let ids: Vec<u32> = (0..STREAMS - 1).map(|_| pair.server.open(now)).collect();
        pair.run();
        for id in &ids {
            pair.server.write(*id, &pattern(first_taken, *id));
            pair.run();
        }
        for id in &ids {
            pair.client.sides.get_mut(id).unwrap().stalled = true;
            pair.server.write(*id, &pattern(100_000, *id));
        }
        pair.run();
        let gauges = pair.client.mux.gauges();
        assert!(gauges.unread > 100_000 && gauges.unread <= config.max_unread, "{gauges:?}");
        assert!(gauges.grown <= config.window_budget, "{gauges:?}");
        assert!(pair.client.mux.want_read());
        let innocent = pair.server.open(now);
        pair.server.write(innocent, &pattern(100_000, innocent));
        pair.run();
        assert_eq!(pair.client.side(innocent).got, pattern(100_000, innocent));
        for id in &ids {
            pair.client.unstall(*id, now);
        }
        pair.run();
        for id in &ids {
            assert_eq!(pair.client.side(*id).got.len(), first_taken + 100_000);
        }
    }
}

/// A carrier that is not read is not dead, for either end, and afterwards silence counts anew.
#[test]
fn who_is_not_listened_to_is_not_silent() {
    let times = Config {
        ping_every: Duration::from_secs(5),
        dead_after: Duration::from_secs(15),
        window: 256 * 1024,
        max_unread: 100_000,
        ..Config::default()
    };
    let mut pair = Pair::greeted(times.clone(), times);
    let id = pair.server.open(pair.now);
    pair.run();
    pair.client.sides.get_mut(&id).unwrap().stalled = true;
    pair.server.write(id, &pattern(250_000, id));
    pair.run();
    assert!(!pair.client.mux.want_read());
    let dead = |end: &End| end.events.contains(&Event::CarrierDead);
    pair.pass(Duration::from_secs(60));
    assert!(!dead(&pair.client) && !dead(&pair.server));
    pair.client.unstall(id, pair.now);
    pair.pass(Duration::from_secs(60));
    assert_eq!(pair.client.side(id).got, pattern(250_000, id));
    assert!(!dead(&pair.client) && !dead(&pair.server));
    // From now on nothing arrives.
    pair.back_at = Some(pair.now);
    pair.pass(Duration::from_secs(30));
    assert!(dead(&pair.client) && dead(&pair.server));
}

#[test]
fn a_budget_over_all_connections_leaves_each_a_little() {
    let budget = Arc::new(Budget::new(1 << 20));
    let mut pairs: Vec<Pair> = (0..2).map(|_| Pair::greeted(wide(), wide())).collect();
    for pair in &mut pairs {
        pair.client.mux.share(Arc::clone(&budget));
        let id = pair.server.open(pair.now);
        pair.run();
        pair.client.sides.get_mut(&id).unwrap().stalled = true;
        pair.server.write(id, &pattern(3 << 20, id));
        pair.run();
    }
    let held: Vec<usize> = pairs.iter().map(|pair| pair.client.mux.gauges().unread).collect();
    assert!(held.iter().all(|held| (BUDGET_FLOOR..3 << 20).contains(held)), "{held:?}");
    assert_eq!(budget.used(), held.iter().sum::<usize>());
    assert!(budget.is_exhausted());
    let id = *pairs[0].client.sides.keys().next().unwrap();
    let pair = &mut pairs[0];
    pair.client.unstall(id, pair.now);
    pair.run();
    assert_eq!(pair.client.side(id).got, pattern(3 << 20, id), "it goes on with what it may have");
    drop(pairs);
    assert_eq!(budget.used(), 0);
}

#[test]
fn ten_thousand_streams() {
    const STREAMS: usize = 10_000;
    let mut pair = Pair::greeted(quiet(), quiet());
    pair.client.echoes = true;
    let ids: Vec<u32> = (0..STREAMS).map(|_| pair.server.open(pair.now)).collect();
    for id in &ids {
        pair.server.write(*id, &id.to_be_bytes());
    }
    pair.run();
    assert!(ids.iter().all(|id| pair.server.side(*id).got == id.to_be_bytes()));
    assert_eq!(pair.client.mux.gauges().streams, STREAMS);
    // Idle ones stand in no list: a poll does not pass them.
    for end in [&pair.client, &pair.server] {
        for list in [List::Fresh, List::Bulk, List::Control] {
            assert_eq!(end.mux.table.first(list), None);
        }
    }
    // In the middle of them a connection breaks.
    for id in &ids {
        pair.server.write(*id, b"more");
        pair.server.finish(*id);
    }
    pair.step();
    pair.cut();
    pair.reattach();
    pair.run();
    assert!(ids.iter().all(|id| pair.server.side(*id).got.ends_with(b"more")));
    pair.pass(ACK_DELAY * 2);
    for end in [&pair.client, &pair.server] {
        assert_eq!((end.mux.gauges().streams, end.mux.gauges().held), (0, 0));
    }
}

#[test]
fn keys_of_streams_that_are_gone_do_nothing() {
    let mut pair = Pair::greeted(quiet(), quiet());
    let now = pair.now;
    let id = pair.server.open(now);
    let key = pair.server.keys[&id];
    pair.run();
    pair.server.reset(id, now);
    let again = pair.server.open(now);
    assert_eq!(pair.server.keys[&again].slot, key.slot, "the slot is used again");
    pair.run();
    let mux = &mut pair.server.mux;
    mux.ready(key);
    mux.finish(key);
    mux.consumed(key, 5, now);
    mux.reset(key, Code::NONE, "", now);
    mux.not_ready(key);
    assert!(!mux.send(key, vec![1], now));
    assert_eq!((mux.unread(key), mux.is_plain(key), mux.poll_turn(now)), (None, None, None));
    assert_eq!(mux.gauges().streams, 1);
    // And payload goes only to whose turn it is, in the measure of it.
    let key = pair.server.keys[&again];
    assert!(!pair.server.mux.send(key, vec![1], now));
    pair.server.write(again, &[1; 100]);
    let turn = pair.server.mux.poll_turn(now).unwrap();
    assert!(!pair.server.mux.send(key, vec![1; turn.max as usize + 1], now));
    assert!(pair.server.mux.send(key, vec![1; 10], now));
}

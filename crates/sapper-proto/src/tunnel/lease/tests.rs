//! What the table of leases promises.

use proptest::prelude::*;

use super::*;

const ANN: Lessee = Lessee { token: [1; 32], client: [9; 32], credentials: [7; 32] };
const BOB: Lessee = Lessee { token: [2; 32], client: [8; 32], credentials: [6; 32] };
/// Ann's for another service.
const ANN_TOO: Lessee = Lessee { token: [3; 32], ..ANN };
const DAY: u64 = 86_400;

fn leases() -> Leases {
    Leases::new(40_000, 40_004, 2, Duration::from_secs(DAY))
}

#[test]
fn a_token_has_its_port_again() {
    let mut leases = leases();
    let port = leases.take(ANN, 0, Wanted::Any, 0, 3).unwrap();
    assert_eq!(port, 40_003, "where chance pointed");
    assert_eq!(leases.take(ANN, 0, Wanted::Any, 1, 0), Ok(port), "a stale connection is taken over");
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 1, 3), Ok(40_004));
    leases.release(port, 5);
    assert_eq!(leases.take(BOB, 1, Wanted::Exactly(port), 6, 0), Err(LeaseError::Taken(port)));
    assert_eq!(leases.take(ANN, 0, Wanted::Rather(40_000), 7, 0), Ok(port), "its own before a wish");
    assert_eq!((leases.owner(port), leases.owner(1)), (Some(ANN.token), None));
}

#[test]
fn wishes_and_limits() {
    let mut leases = leases();
    assert_eq!(leases.take(ANN, 0, Wanted::Exactly(39_999), 0, 0), Err(LeaseError::OutOfRange(39_999)));
    assert_eq!(leases.take(ANN, 0, Wanted::Exactly(40_002), 0, 0), Ok(40_002));
    assert_eq!(leases.take(BOB, 0, Wanted::Rather(40_002), 0, 2), Ok(40_003));
    assert_eq!(leases.take(ANN, 1, Wanted::Any, 0, 0), Ok(40_000));
    assert_eq!(leases.take(ANN, 2, Wanted::Any, 0, 0), Err(LeaseError::TooMany(2)));
    assert_eq!(leases.take(ANN, 1, Wanted::Exactly(40_001), 0, 0), Ok(40_001), "instead of the old one");
    assert_eq!((leases.len(), leases.owner(40_000)), (3, None));
    leases.lost(40_001);
    assert_eq!(leases.take(ANN, 1, Wanted::Any, 0, 1), Ok(40_001));
}

#[test]
fn other_ports_are_for_those_who_come() {
    let mut leases = Leases::new(1, 2, 9, Duration::from_secs(DAY));
    assert_eq!(leases.take(ANN, 0, Wanted::Exactly(1), 0, 0), Ok(1));
    leases.reload(7, 7, Duration::from_secs(DAY));
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 0, 0), Ok(7));
    assert_eq!(leases.owner(1), Some(ANN.token), "who has one keeps it");
    assert_eq!(leases.take(BOB, 1, Wanted::Any, 0, 0), Err(LeaseError::Exhausted));
}

#[test]
fn ports_that_are_asked_for_are_those_that_the_server_allows() {
    let mut leases = leases();
    leases.allow(vec![(443, 443), (8000, 8009), (40_004, 40_004)]);
    assert_eq!(leases.take(ANN, 0, Wanted::Exactly(40_000), 0, 0), Err(LeaseError::OutOfRange(40_000)));
    assert_eq!(leases.take(ANN, 0, Wanted::Exactly(443), 0, 0), Ok(443));
    assert_eq!(leases.take(BOB, 0, Wanted::Exactly(443), 0, 0), Err(LeaseError::Taken(443)));
    assert_eq!(leases.take(BOB, 0, Wanted::Within(1, 7_999), 0, 0), Err(LeaseError::Exhausted));
    assert_eq!(leases.take(BOB, 0, Wanted::Within(444, 7_999), 0, 0), Err(LeaseError::OutOfRange(444)));
    let port = leases.take(BOB, 0, Wanted::Within(8_005, 9_000), 0, 7).unwrap();
    assert!((8_005..=8_009).contains(&port), "{port}");
    assert_eq!(leases.take(BOB, 0, Wanted::Within(8_000, 9_000), 1, 0), Ok(port), "it has one that will do");
    assert_eq!(leases.take(ANN, 0, Wanted::Any, 1, 0), Ok(443), "it had asked for it");
    // After a restart with other ranges.
    let mut restarted = self::leases();
    restarted.from_json(&leases.to_json()).unwrap();
    assert_eq!(restarted.take(ANN, 0, Wanted::Any, 2, 0), Ok(40_000), "443 is nobody's now");
    assert_eq!(restarted.owner(443), None);
}

#[test]
fn ports_that_a_server_which_ends_may_use_are_kept_for_their_owners_meanwhile() {
    let mut leases = Leases::new(1, 2, 9, Duration::from_secs(DAY));
    for service in [0, 1] {
        let port = leases.take(ANN, service, Wanted::Any, 0, 0).unwrap();
        leases.release(port, u64::from(service));
    }
    leases.hand_over(100);
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 99, 0), Err(LeaseError::Exhausted));
    assert_eq!(leases.take(BOB, 0, Wanted::Within(1, 2), 99, 0), Err(LeaseError::Exhausted));
    assert_eq!(leases.take(ANN, 1, Wanted::Any, 99, 0), Ok(2), "it is its own");
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 100, 0), Ok(1));
}

#[test]
fn ports_of_those_who_are_expected_are_kept_for_them_until_they_had_time_to_come() {
    let mut before = Leases::new(1, 2, 9, Duration::from_secs(DAY));
    assert_eq!(before.take(ANN, 0, Wanted::Any, 0, 0), Ok(1));
    assert_eq!(before.take(ANN_TOO, 0, Wanted::Any, 0, 0), Ok(2));
    let mut leases = Leases::new(1, 2, 9, Duration::from_secs(DAY));
    leases.from_json(&before.to_json()).unwrap();
    leases.expect(135);
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 100, 0), Err(LeaseError::Exhausted));
    assert_eq!(leases.take(BOB, 0, Wanted::Within(1, 2), 134, 0), Err(LeaseError::Exhausted));
    assert_eq!((leases.kept_for(ANN.credentials), leases.kept_for(BOB.credentials)), (Some(1), None));
    assert_eq!(leases.take(ANN_TOO, 0, Wanted::Any, 134, 0), Ok(2), "it is its own");
    assert!(!leases.is_shared(134), "there is no other server that uses them");
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 135, 0), Ok(1), "it did not come");
    assert_eq!(leases.take(BOB, 1, Wanted::Any, 135, 0), Err(LeaseError::Exhausted), "that one did");
}

#[test]
fn a_port_that_was_taken_in_vain_is_whose_it_was() {
    let mut leases = Leases::new(1, 1, 9, Duration::from_secs(DAY));
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 0, 0), Ok(1));
    leases.undo(1);
    assert!(leases.is_empty(), "it was nobody's");
    assert_eq!(leases.take(ANN, 0, Wanted::Any, 0, 0), Ok(1));
    leases.release(1, 5);
    let kept = leases.to_json();
    for connection in [6, 7] {
        assert_eq!(leases.take(BOB, 0, Wanted::Any, connection, 0), Ok(1));
    }
    leases.undo(1);
    assert_eq!(leases.to_json(), kept);
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 8, 0), Ok(1));
    leases.reload(2, 2, Duration::from_secs(DAY));
    assert_eq!(leases.take(ANN, 0, Wanted::Any, 9, 0), Ok(2));
    leases.undo(1);
    assert_eq!((leases.len(), leases.port(ANN.token, 0)), (1, Some(2)), "it has another one now");
}

#[test]
fn ports_of_those_who_stay_away_go_to_others_when_there_is_no_other() {
    let mut leases = Leases::new(1, 2, 9, Duration::from_secs(DAY));
    assert_eq!(leases.take(ANN, 0, Wanted::Any, 0, 0), Ok(1));
    assert_eq!(leases.take(ANN, 1, Wanted::Any, 0, 0), Ok(2));
    leases.release(1, 50);
    leases.release(2, 40);
    assert_eq!(leases.take(BOB, 0, Wanted::Exactly(2), 60, 0), Err(LeaseError::Taken(2)), "it is kept");
    assert_eq!(leases.take(BOB, 0, Wanted::Any, 60, 0), Ok(2), "the one that is silent longest");
    assert_eq!(leases.take(ANN, 0, Wanted::Any, 60, 0), Ok(1));
    assert_eq!(leases.take(BOB, 1, Wanted::Any, 60, 0), Err(LeaseError::Exhausted), "both are in use");
    leases.release(2, 70);
    assert_eq!(leases.take(ANN, 1, Wanted::Exactly(2), DAY + 69, 0), Err(LeaseError::Taken(2)));
    assert_eq!(leases.take(ANN, 1, Wanted::Exactly(2), DAY + 70, 0), Ok(2), "it was kept long enough");
}

#[test]
fn a_client_has_its_port_for_another_service() {
    let mut leases = leases();
    assert_eq!(leases.take(ANN, 0, Wanted::Exactly(40_000), 0, 0), Ok(40_000));
    let taken = Err(LeaseError::Taken(40_000));
    assert_eq!(leases.take(ANN_TOO, 0, Wanted::Exactly(40_000), 0, 0), taken, "it is in use");
    leases.release(40_000, 1);
    assert_eq!(leases.take(BOB, 0, Wanted::Exactly(40_000), 2, 0), taken);
    let mut restarted = self::leases();
    restarted.from_json(&leases.to_json()).unwrap();
    for mut leases in [leases, restarted] {
        assert_eq!(leases.take(ANN_TOO, 0, Wanted::Exactly(40_000), 2, 0), Ok(40_000));
        assert_eq!(leases.owner(40_000), Some(ANN_TOO.token));
    }
}

#[test]
fn leases_survive_a_restart() {
    let mut leases = leases();
    leases.take(ANN, 7, Wanted::Any, 11, 1).unwrap();
    let text = leases.to_json();
    let (token, client, credentials) = ("01".repeat(32), "09".repeat(32), "07".repeat(32));
    assert_eq!(
        text,
        format!(
            r#"{{"leases":[{{"client":"{client}","credentials":"{credentials}","port":40001,"seen":11,"service":7,"token":"{token}","used":true}}],"version":1}}"#
        )
    );
    let earlier = text.replace(&format!(r#""client":"{client}","credentials":"{credentials}","#), "");
    let mut read = self::leases();
    read.from_json(&earlier).unwrap();
    assert_eq!(read.take(ANN, 7, Wanted::Any, 12, 0), Ok(40_001), "as earlier versions wrote it");
    let mut restarted = self::leases();
    restarted.from_json(&text).unwrap();
    assert_eq!(restarted.take(ANN, 7, Wanted::Any, 12, 0), Ok(40_001));
    for (from, to, what) in [
        ("40001", "0", "leases[0].port"),
        ("40001", "65536", "leases[0].port"),
        ("\"seen\":11", "\"seen\":-1", "leases[0].seen"),
        ("0101", "01+1", "leases[0].token"),
        ("0909", "0", "leases[0].client"),
        ("0707", "0", "leases[0].credentials"),
        ("\"version\":1", "\"version\":3", "version"),
        ("\"version\":1", "\"version\":2", "key"),
        ("\"leases\"", "\"x\"", "leases"),
        ("{", "[", "expected"),
    ] {
        let mut empty = self::leases();
        let error = empty.from_json(&text.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(what) && empty.is_empty(), "{error}");
    }
}

#[test]
fn a_name_has_what_was_another_name_s() {
    let mut leases = Leases::new(1, 9, 9, Duration::from_secs(DAY));
    assert_eq!(leases.take(BOB, 0, Wanted::Exactly(1), 0, 0), Ok(1));
    assert_eq!(leases.take(BOB, 1, Wanted::Exactly(2), 0, 0), Ok(2));
    leases.inherit(BOB, ANN, 0);
    assert_eq!(leases.owner(1), Some(BOB.token), "it is in use");
    leases.release(1, 0);
    leases.release(2, 0);
    leases.inherit(BOB, ANN, 0);
    assert_eq!(leases.take(BOB, 0, Wanted::Exactly(1), 1, 0), Err(LeaseError::Taken(1)));
    assert_eq!(leases.take(ANN, 0, Wanted::Any, 1, 0), Ok(1));
    assert_eq!(leases.take(ANN_TOO, 0, Wanted::Exactly(2), 1, 0), Ok(2), "of the same client");
    assert_eq!(leases.take(BOB, 0, Wanted::Exactly(3), 1, 0), Ok(3));
    leases.release(3, 1);
    leases.inherit(BOB, ANN, 0);
    assert_eq!((leases.owner(3), leases.port(ANN.token, 0)), (Some(BOB.token), Some(1)), "it has one");
}

#[test]
fn who_is_here_was_seen_when_the_table_is_handed_over() {
    let mut leases = leases();
    let port = leases.take(ANN, 0, Wanted::Any, 0, 0).unwrap();
    assert!(!leases.to_json().contains("until"));
    leases.touch(DAY);
    leases.hand_over(DAY + 5);
    let mut next = self::leases();
    next.from_json(&leases.to_json()).unwrap();
    assert_eq!((next.is_shared(DAY + 4), next.is_shared(DAY + 5)), (true, false));
    let taken = next.take(BOB, 0, Wanted::Exactly(port), DAY + 1, 0);
    assert_eq!(taken, Err(LeaseError::Taken(port)));
    let error = next.from_json(&leases.to_json().replace("\"until\":", "\"until\":-")).unwrap_err();
    assert!(error.contains("until"), "{error}");
}

#[test]
fn a_file_without_a_key_is_taken_over() {
    let mut leases = leases();
    leases.take(ANN, 0, Wanted::Any, 11, 1).unwrap();
    let mut later = self::leases();
    later.from_json(&leases.to_json()).unwrap();
    assert_eq!(later.key(), None);
    let again = |token: TokenHash| token.map(|byte| byte ^ 0x55);
    later.set_key([7; 32], again);
    let text = later.to_json();
    assert!(text.contains("\"version\":2") && !text.contains(&"01".repeat(32)), "{text}");
    let mut restarted = self::leases();
    restarted.from_json(&text).unwrap();
    assert_eq!((restarted.key(), restarted.to_json()), (Some([7; 32]), text));
    let [token, client, credentials] = [ANN.token, ANN.client, ANN.credentials].map(again);
    let ann = Lessee { token, client, credentials };
    assert_eq!(restarted.take(ann, 0, Wanted::Any, 12, 0), Ok(40_001));
}

/// One of several clients with one token.
fn one(process: u8, machine: u8) -> Holder {
    let hash = |number: u8| (number > 0).then_some([number; 32]);
    Holder { instance: hash(process), origin: hash(machine) }
}

#[test]
fn a_place_is_that_of_the_client_that_had_it_also_behind_a_restart() {
    let mut leases = Leases::new(1, 9, 9, Duration::from_secs(DAY));
    leases.set_key([7; 32], |token| token);
    // Two of three look the same but for their processes.
    let clients = [one(11, 21), one(12, 22), one(13, 22)];
    for (service, client) in (0..).zip(clients) {
        let port = leases.take(ANN, service, Wanted::Any, 0, 0).unwrap();
        leases.held(port, client);
    }
    leases.take(ANN, 3, Wanted::Any, 0, 0).unwrap(); // an original one's
    let mut next = Leases::new(1, 9, 9, Duration::from_secs(DAY));
    next.from_json(&leases.to_json()).unwrap();
    for leases in [&leases, &next] {
        let own = clients.map(|client| leases.own(ANN.token, client));
        assert_eq!(own, [vec![0], vec![1, 2], vec![2, 1]], "the process before its like");
        assert_eq!(leases.own(ANN.token, one(99, 21)), [0], "started again");
        assert_eq!(leases.own(BOB.token, clients[0]), [0; 0]);
        assert_eq!(leases.own(ANN.token, one(99, 98)), [0; 0]);
        assert_eq!(leases.own(ANN.token, Holder::default()), [0; 0], "an original one has none");
    }
    next.set_key([8; 32], |token| token.map(|byte| byte ^ 0x55));
    let again = one(11 ^ 0x55, 21 ^ 0x55);
    assert_eq!(next.own(ANN.token.map(|byte| byte ^ 0x55), again), [0]);
}

#[test]
fn what_was_in_use_is_kept_for_its_owners_while_they_are_expected() {
    let mut leases = Leases::new(1, 9, 9, Duration::from_secs(DAY));
    let clients = [one(11, 21), one(12, 22), one(13, 0), one(14, 24), Holder::default()];
    for (service, client) in (0..).zip(clients) {
        let port = leases.take(ANN, service, Wanted::Any, 0, 0).unwrap();
        leases.held(port, client);
    }
    leases.release(leases.port(ANN.token, 3).unwrap(), 1);
    assert_eq!(leases.kept(ANN.token, 0), [0; 0], "nobody is expected");
    // Each of these is killed before anybody is back.
    for _ in 0..3 {
        let mut next = Leases::new(1, 9, 9, Duration::from_secs(DAY));
        next.from_json(&leases.to_json()).unwrap();
        next.expect(100);
        next.touch(99);
        assert_eq!(
            next.kept(ANN.token, 99),
            [0, 1],
            "3 was gone before, the others say nothing of themselves"
        );
        assert_eq!((next.kept(ANN.token, 100), next.kept(BOB.token, 99)), (vec![], vec![]));
        leases = next;
    }
    let port = leases.take(ANN, 0, Wanted::Any, 99, 0).unwrap();
    assert_eq!(leases.own(ANN.token, clients[0]), [0], "who has it now has not said who it is");
    leases.release(port, 99);
    assert_eq!(leases.kept(ANN.token, 99), [0, 1], "it was another one");
    leases.take(ANN, 0, Wanted::Any, 99, 0).unwrap();
    leases.held(port, one(31, 41));
    assert_eq!((leases.kept(ANN.token, 99), leases.own(ANN.token, clients[0])), (vec![1], vec![]));
    leases.touch(100);
    leases.expect(200);
    assert_eq!(leases.kept(ANN.token, 150), [0; 0], "it did not come");
}

#[test]
fn a_client_has_one_place_of_its_own() {
    let mut leases = Leases::new(1, 9, 9, Duration::from_secs(DAY));
    for service in [0, 1] {
        let port = leases.take(ANN, service, Wanted::Any, 0, 0).unwrap();
        leases.held(port, one(11, 21));
        leases.release(port, 0);
    }
    assert_eq!(leases.own(ANN.token, one(11, 21)), [1], "what it had last");
    let port = leases.take(ANN, 1, Wanted::Any, 0, 0).unwrap();
    leases.held(port, one(12, 21));
    assert_eq!(leases.own(ANN.token, one(11, 21)), [1], "its like, which was started again");
}

#[test]
fn a_row_says_whose_it_is_or_nothing() {
    let mut leases = leases();
    let port = leases.take(ANN, 0, Wanted::Any, 0, 0).unwrap();
    leases.held(port, one(0x11, 0x21));
    let text = leases.to_json();
    for (from, to, what) in [
        ("1111", "1", "leases[0].instance"),
        ("2121", "x", "leases[0].origin"),
        ("\"used\":true", "\"used\":1", "leases[0].used"),
    ] {
        let mut empty = self::leases();
        let error = empty.from_json(&text.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(what) && empty.is_empty(), "{error}");
    }
    leases.release(port, 0);
    assert!(!leases.to_json().contains("used"));
}

proptest! {
    /// No port is two tokens' at a time, and none is outside of the range.
    #[test]
    fn nobody_shares(steps in proptest::collection::vec((0u8..4, 0u16..3, 0u16..8, any::<u64>(), any::<bool>()), 0..80)) {
        let mut leases = Leases::new(10, 14, 2, Duration::from_secs(50));
        let mut used: BTreeMap<u16, (u8, u16)> = BTreeMap::new();
        for (now, (who, service, wish, entropy, leave)) in steps.into_iter().enumerate() {
            let now = now as u64 * 10;
            let wanted = [Wanted::Any, Wanted::Exactly(wish + 9), Wanted::Rather(wish + 9), Wanted::Within(wish + 9, wish + 11)];
            let wanted = wanted[usize::from(wish) % 4];
            if leave {
                if let Some(port) = used.iter().find(|(_, user)| **user == (who, service)).map(|(port, _)| *port) {
                    leases.release(port, now);
                    used.remove(&port);
                }
            } else if let Ok(port) = leases.take(Lessee { token: [who; 32], client: [who; 32], credentials: [who; 32] }, service, wanted, now, entropy) {
                prop_assert!((10..=14).contains(&port));
                used.retain(|_, user| *user != (who, service));
                prop_assert_eq!(used.insert(port, (who, service)), None);
            }
        }
    }
}

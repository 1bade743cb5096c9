//! Which public port belongs to whom: a token has the same one after each reconnect, and after a restart.
//!
//! The table knows nothing of sockets. It says which port to try, remembers what was got, and gives
//! ports of tokens that have not been seen for long to others when there is no other left: a port that is kept for
//! somebody who may come back is worth less than one for somebody who is here.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

/// What a client would like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Any port of the range.
    Any,
    /// This one, or none.
    Exactly(u16),
    /// This one, else any.
    Rather(u16),
    /// One of these, first and last.
    Within(u16, u16),
}

/// Why there is no port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// It is somebody else's.
    #[error("port {0} belongs to another token")]
    Taken(u16),
    /// It is not one that this server gives.
    #[error("port {0} is not one that this server gives to those who ask for it")]
    OutOfRange(u16),
    /// All are in use.
    #[error("no port is free")]
    Exhausted,
    /// The token has as many as it may.
    #[error("the token has {0} ports, which is as many as it may have")]
    TooMany(usize),
}

/// A token, as a hash that tells nothing: the table lies on a disk.
pub type TokenHash = [u8; 32];

/// Who wants a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lessee {
    /// Its token for the service.
    pub token: TokenHash,
    /// Its token for whatever it exposes: it may have a port that is not in use for another service.
    pub client: TokenHash,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Lease {
    token: TokenHash,
    /// The client's token; files of earlier versions do not have it.
    client: Option<TokenHash>,
    /// Which of the token's services.
    service: u16,
    /// When it was last in use, in seconds since 1970: it outlives this process's clock.
    seen: u64,
    in_use: bool,
}

/// The table.
///
/// Order of calls: [`take`](Self::take), then bind the port. Where the system has given it away, call
/// [`lost`](Self::lost) and take again. [`release`](Self::release) when the tunnel ends: the lease stays.
/// [`to_json`](Self::to_json) after changes, [`from_json`](Self::from_json) at the start.
#[derive(Clone, Debug)]
pub struct Leases {
    first: u16,
    last: u16,
    most_per_token: usize,
    keep: Duration,
    /// Ports that may be asked for besides.
    asked: Vec<(u16, u16)>,
    by_port: BTreeMap<u16, Lease>,
    /// By which its tokens are made.
    key: Option<TokenHash>,
    /// Until when one that had the table before may still use its ports, in seconds since 1970.
    until: u64,
}

impl Leases {
    /// Gives ports of `first..=last`, at most so many to one token. A lease that was not in use for
    /// `keep` may be given to others.
    pub fn new(first: u16, last: u16, most_per_token: usize, keep: Duration) -> Self {
        let (first, last) = (first.max(1), last.max(first).max(1));
        let asked = vec![(first, last)];
        Self { first, last, most_per_token, keep, asked, by_port: BTreeMap::new(), key: None, until: 0 }
    }

    /// Those who ask for ports may have these, first and last each, instead of any of `first..=last`. Who
    /// does not ask gets none of them.
    pub fn allow(&mut self, ranges: Vec<(u16, u16)>) {
        self.asked = ranges;
    }

    fn may_be_asked_for(&self, port: u16) -> bool {
        self.asked.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }

    /// Whether a port that somebody has is one that it could still have: ranges change at a restart.
    fn is_given(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port) || self.may_be_asked_for(port)
    }

    /// The port of a token's service. A lease that is in use by the same token is taken over: its old
    /// connection is stale. `now` is in seconds since 1970, `entropy` any number drawn by the caller.
    pub fn take(
        &mut self,
        lessee: Lessee,
        service: u16,
        wanted: Wanted,
        now: u64,
        entropy: u64,
    ) -> Result<u16, LeaseError> {
        let Lessee { token, client } = lessee;
        let mine = self.port(token, service);
        let will_do = |port: u16| match wanted {
            Wanted::Exactly(exactly) => exactly == port && self.may_be_asked_for(port),
            Wanted::Within(first, last) => (first..=last).contains(&port) && self.may_be_asked_for(port),
            Wanted::Any | Wanted::Rather(_) => self.is_given(port),
        };
        if let Some(port) = mine.filter(|port| will_do(*port)) {
            self.hold(port, lessee, service, now);
            return Ok(port);
        }
        let count = self.by_port.values().filter(|lease| lease.token == token).count();
        // The service's own old port is given up where another is wanted.
        if count - usize::from(mine.is_some()) >= self.most_per_token {
            return Err(LeaseError::TooMany(count));
        }
        let port = match wanted {
            Wanted::Exactly(port) => {
                if !self.may_be_asked_for(port) {
                    return Err(LeaseError::OutOfRange(port));
                }
                if !self.is_free(port, client, now) {
                    return Err(LeaseError::Taken(port));
                }
                port
            }
            Wanted::Within(first, last) => {
                if !(first..=last).any(|port| self.may_be_asked_for(port)) {
                    return Err(LeaseError::OutOfRange(first));
                }
                let allowed = |port| self.may_be_asked_for(port);
                self.any((first, last), allowed, now, entropy).ok_or(LeaseError::Exhausted)?
            }
            Wanted::Rather(port) if self.may_be_asked_for(port) && self.is_free(port, client, now) => port,
            Wanted::Rather(_) | Wanted::Any => {
                self.any((self.first, self.last), |_| true, now, entropy).ok_or(LeaseError::Exhausted)?
            }
        };
        if let Some(old) = mine {
            self.by_port.remove(&old);
        }
        self.hold(port, lessee, service, now);
        Ok(port)
    }

    fn hold(&mut self, port: u16, Lessee { token, client }: Lessee, service: u16, now: u64) {
        self.by_port.insert(port, Lease { token, client: Some(client), service, seen: now, in_use: true });
    }

    /// Nobody's, or the same client's for something that it does not expose now, or of somebody who has not been
    /// here for long.
    fn is_free(&self, port: u16, client: TokenHash, now: u64) -> bool {
        self.by_port
            .get(&port)
            .is_none_or(|lease| !lease.in_use && lease.client == Some(client) || self.has_lapsed(lease, now))
    }

    fn has_lapsed(&self, lease: &Lease, now: u64) -> bool {
        !lease.in_use && now.saturating_sub(lease.seen) >= self.keep.as_secs()
    }

    /// From a place drawn by chance: ports that nobody ever had first, then the one that has been
    /// silent longest. Were those that are kept for somebody never given, whoever comes with ever new tokens could
    /// keep all others out for as long as they are kept. While another server may still use its ports, who is silent
    /// here may be busy there.
    fn any(
        &self,
        (first, last): (u16, u16),
        allowed: impl Fn(u16) -> bool,
        now: u64,
        entropy: u64,
    ) -> Option<u16> {
        let ports = u64::from(last - first) + 1;
        let at = |step: u64| first + ((entropy % ports + step) % ports) as u16;
        let mut never = (0..ports).map(at).filter(|port| !self.by_port.contains_key(port) && allowed(*port));
        let silent = || {
            let range = self.by_port.range(first..=last);
            let silent =
                |lease: &Lease| if self.is_shared(now) { self.has_lapsed(lease, now) } else { !lease.in_use };
            let unused = range.filter(|(port, lease)| silent(lease) && allowed(**port));
            unused.min_by_key(|(_, lease)| lease.seen).map(|(port, _)| *port)
        };
        never.next().or_else(silent)
    }

    /// Other ports, and another time, for those who come from here on; who has one keeps it.
    pub fn reload(&mut self, first: u16, last: u16, keep: Duration) {
        (self.first, self.last) = (first.max(1), last.max(first).max(1));
        self.keep = keep;
    }

    /// The tunnel of that port ended. The lease stays its token's.
    pub fn release(&mut self, port: u16, now: u64) {
        if let Some(lease) = self.by_port.get_mut(&port) {
            (lease.in_use, lease.seen) = (false, now);
        }
    }

    /// The system does not give the port: the lease ends.
    pub fn lost(&mut self, port: u16) {
        self.by_port.remove(&port);
    }

    /// What was another name's is this one's: the port of that service, where it has none itself, and that for
    /// something else. Not where it is in use.
    pub fn inherit(&mut self, from: Lessee, to: Lessee, service: u16) {
        let mut has_one = self.port(to.token, service).is_some();
        for lease in self.by_port.values_mut().filter(|lease| !lease.in_use) {
            if !has_one && lease.token == from.token && lease.service == service {
                (lease.token, lease.client, has_one) = (to.token, Some(to.client), true);
            } else if lease.client == Some(from.client) {
                lease.client = Some(to.client);
            }
        }
    }

    /// Who has a port is here now: what is written says so.
    pub fn touch(&mut self, now: u64) {
        self.by_port.values_mut().filter(|lease| lease.in_use).for_each(|lease| lease.seen = now);
    }

    /// Another one has the table from here on, and this one uses ports of it until then.
    pub fn hand_over(&mut self, until: u64) {
        self.until = self.until.max(until);
    }

    /// Whether one that had the table before may still use its ports.
    pub fn is_shared(&self, now: u64) -> bool {
        now < self.until
    }

    /// Which port a token's service has.
    pub fn port(&self, token: TokenHash, service: u16) -> Option<u16> {
        let mine = self.by_port.iter().find(|(_, lease)| lease.token == token && lease.service == service);
        mine.map(|(port, _)| *port)
    }

    /// Whose a port is.
    pub fn owner(&self, port: u16) -> Option<TokenHash> {
        Some(self.by_port.get(&port)?.token)
    }

    /// How many there are, used or not.
    pub fn len(&self) -> usize {
        self.by_port.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_port.is_empty()
    }

    /// The key by which those who call make tokens: two files tell nothing of each other then. A file has it.
    pub fn key(&self) -> Option<TokenHash> {
        self.key
    }

    /// Has that key from here on. What was made without one is made again by `again`.
    pub fn set_key(&mut self, key: TokenHash, again: impl Fn(TokenHash) -> TokenHash) {
        self.key = Some(key);
        for lease in self.by_port.values_mut() {
            (lease.token, lease.client) = (again(lease.token), lease.client.map(&again));
        }
    }

    /// As a file has it.
    pub fn to_json(&self) -> String {
        let hex = |token: TokenHash| token.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let leases: Vec<Value> = self
            .by_port
            .iter()
            .map(|(port, lease)| {
                let (token, client) = (hex(lease.token), lease.client.map(hex));
                json!({"port": port, "token": token, "client": client, "service": lease.service, "seen": lease.seen})
            })
            .collect();
        let mut table = match self.key {
            Some(key) => json!({"version": 2, "key": hex(key), "leases": leases}),
            None => json!({"version": 1, "leases": leases}),
        };
        if self.until > 0 {
            table["until"] = self.until.into();
        }
        table.to_string()
    }

    /// Adds what a file has. Nothing of it is in use. The text in an error says what is wrong with it; the
    /// table is as before then.
    pub fn from_json(&mut self, text: &str) -> Result<(), String> {
        let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let key = match value["version"].as_u64() {
            Some(1) => None,
            Some(2) => Some(value["key"].as_str().and_then(token).ok_or("key: is not valid")?),
            _ => return Err("version: is neither 1 nor 2".to_owned()),
        };
        let until = match &value["until"] {
            Value::Null => 0,
            said => said.as_u64().ok_or("until: is not valid")?,
        };
        let leases = value["leases"].as_array().ok_or("leases: is no list")?;
        let mut read = self.by_port.clone();
        for (at, lease) in leases.iter().enumerate() {
            let wrong = |field: &str| format!("leases[{at}].{field}: is not valid");
            let small = |field: &str| lease[field].as_u64().and_then(|number| u16::try_from(number).ok());
            let port = small("port").filter(|port| *port > 0).ok_or_else(|| wrong("port"))?;
            let service = small("service").ok_or_else(|| wrong("service"))?;
            let seen = lease["seen"].as_u64().ok_or_else(|| wrong("seen"))?;
            let token = lease["token"].as_str().and_then(token).ok_or_else(|| wrong("token"))?;
            let client = match &lease["client"] {
                Value::Null => None,
                said => Some(said.as_str().and_then(self::token).ok_or_else(|| wrong("client"))?),
            };
            read.insert(port, Lease { token, client, service, seen, in_use: false });
        }
        (self.by_port, self.key, self.until) = (read, key, until);
        Ok(())
    }
}

fn token(text: &str) -> Option<TokenHash> {
    let mut token = [0; 32];
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in token.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(token)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ANN: Lessee = Lessee { token: [1; 32], client: [9; 32] };
    const BOB: Lessee = Lessee { token: [2; 32], client: [8; 32] };
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
        assert_eq!(
            leases.take(BOB, 0, Wanted::Within(8_000, 9_000), 1, 0),
            Ok(port),
            "it has one that will do"
        );
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
        let (token, client) = ("01".repeat(32), "09".repeat(32));
        assert_eq!(
            text,
            format!(
                r#"{{"leases":[{{"client":"{client}","port":40001,"seen":11,"service":7,"token":"{token}"}}],"version":1}}"#
            )
        );
        let earlier = text.replace(&format!(r#""client":"{client}","#), "");
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
        let ann = Lessee { token: again(ANN.token), client: again(ANN.client) };
        assert_eq!(restarted.take(ann, 0, Wanted::Any, 12, 0), Ok(40_001));
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
                } else if let Ok(port) = leases.take(Lessee { token: [who; 32], client: [who; 32] }, service, wanted, now, entropy) {
                    prop_assert!((10..=14).contains(&port));
                    used.retain(|_, user| *user != (who, service));
                    prop_assert_eq!(used.insert(port, (who, service)), None);
                }
            }
        }
    }
}

//! Which public port belongs to whom: a token has the same one after each reconnect, and after a restart.
//!
//! The table knows nothing of sockets. It says which port to try, remembers what was got, and gives
//! ports of tokens that have not been seen for long to others when there is no other left: a port that is kept for
//! somebody who may come back is worth less than one for somebody who is here.
//!
//! Clients may share a token. Each has one of the token's numbered places, and the table remembers which client had
//! it last: its process, and its origin (its machine and its services), which outlives the process. A client that comes
//! back has its own place again, whichever order they come in. Who has no place of its own has the first one that
//! nobody uses, as if it had been its own: most likely it is a client that changed. But while those who had places when
//! the server before ended are [expected](Leases::expect), a place that was in use then is its
//! [owner's](Leases::kept). What earlier versions wrote, and original clients, have no origin: such a place is of
//! whoever comes first.

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
    /// What it says of itself, before anybody knows which of its leases it comes for.
    pub credentials: TokenHash,
}

/// Which of the clients with one token it is, as far as it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// This process of it.
    pub instance: Option<TokenHash>,
    /// Its machine and its services: the same when it is started again.
    pub origin: Option<TokenHash>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Lease {
    token: TokenHash,
    /// The client's token, and that of its credentials; files of earlier versions do not have them.
    client: Option<TokenHash>,
    credentials: Option<TokenHash>,
    /// Which of the token's services.
    service: u16,
    /// When it was last in use, in seconds since 1970: it outlives this process's clock.
    seen: u64,
    in_use: bool,
    /// Who had it last.
    holder: Holder,
    /// Whether it was in use when the server before was heard of last, and its holder has not come since.
    due: bool,
    /// The silent one that had the port, as long as it may turn out that this one took it in vain.
    before: Option<Box<Lease>>,
}

/// The table.
///
/// Order of calls: [`take`](Self::take), then bind the port. Where the system has given it away, call
/// [`lost`](Self::lost) and take again; where another port is wanted, [`undo`](Self::undo).
/// [`held`](Self::held) when it is known which client has it. [`release`](Self::release) when the tunnel ends: the lease
/// stays.
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
    /// Until when those who have leases are expected: this one has just begun, and they may be on their way.
    expected: u64,
}

impl Leases {
    /// Gives ports of `first..=last`, at most so many to one token. A lease that was not in use for
    /// `keep` may be given to others.
    pub fn new(first: u16, last: u16, most_per_token: usize, keep: Duration) -> Self {
        let (first, last) = (first.max(1), last.max(first).max(1));
        let asked = vec![(first, last)];
        Self {
            first,
            last,
            most_per_token,
            keep,
            asked,
            by_port: BTreeMap::new(),
            key: None,
            until: 0,
            expected: 0,
        }
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
        let Lessee { token, client, .. } = lessee;
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

    fn hold(&mut self, port: u16, Lessee { token, client, credentials }: Lessee, service: u16, now: u64) {
        let (client, credentials) = (Some(client), Some(credentials));
        let (before, holder, due) = match self.by_port.remove(&port) {
            // Whose it was stays known until it is known who came.
            Some(same) if (same.token, same.service) == (token, service) => {
                (same.before, same.holder, same.due)
            }
            other => {
                let before = other.map(|other| Box::new(Lease { before: None, ..other }));
                (before, Holder::default(), false)
            }
        };
        let lease =
            Lease { token, client, credentials, service, seen: now, in_use: true, holder, due, before };
        self.by_port.insert(port, lease);
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
    /// keep all others out for as long as they are kept. While another server may still use its ports, or those who
    /// have them are expected, who is silent here is busy there or on its way.
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
            let waits = self.waits(now);
            let silent = |lease: &Lease| if waits { self.has_lapsed(lease, now) } else { !lease.in_use };
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
            (lease.in_use, lease.seen, lease.before) = (false, now, None);
        }
    }

    /// That client has the port. Another place that it had is anybody's of its token.
    pub fn held(&mut self, port: u16, holder: Holder) {
        let Some(lease) = self.by_port.get_mut(&port) else { return };
        (lease.holder, lease.due) = (holder, false);
        let token = lease.token;
        for (other, lease) in &mut self.by_port {
            let same = lease.token == token && lease.holder.instance == holder.instance;
            if same && holder.instance.is_some() && *other != port && !lease.in_use {
                (lease.holder, lease.due) = (Holder::default(), false);
            }
        }
    }

    /// Which services of a token that client had: what this process of it had, then what one of the same origin had.
    pub fn own(&self, token: TokenHash, holder: Holder) -> Vec<u16> {
        let is = |one: Option<TokenHash>, other| one.is_some() && one == other;
        let rank = |lease: &Lease| match lease.holder {
            Holder { instance, .. } if is(instance, holder.instance) => Some(0),
            Holder { origin, .. } if is(origin, holder.origin) => Some(1),
            _ => None,
        };
        let mine = self.by_port.values().filter(|lease| lease.token == token);
        let mut found: Vec<_> = mine.filter_map(|lease| Some((rank(lease)?, lease.service))).collect();
        found.sort_unstable();
        found.into_iter().map(|(_, service)| service).collect()
    }

    /// Which services of a token are kept for the clients that had them when the server before ended: they are expected.
    pub fn kept(&self, token: TokenHash, now: u64) -> Vec<u16> {
        if !self.waits(now) {
            return Vec::new();
        }
        let kept = |lease: &&Lease| lease.token == token && lease.due && lease.holder.origin.is_some();
        self.by_port.values().filter(kept).map(|lease| lease.service).collect()
    }

    /// The system does not give the port: the lease ends.
    pub fn lost(&mut self, port: u16) {
        self.by_port.remove(&port);
    }

    /// The port was taken in vain: it is whose it was before, who has got no other one meanwhile.
    pub fn undo(&mut self, port: u16) {
        if let Some(before) = self.by_port.remove(&port).and_then(|lease| lease.before)
            && self.port(before.token, before.service).is_none()
        {
            self.by_port.insert(port, *before);
        }
    }

    /// What was another name's is this one's: the port of that service, where it has none itself, and that for
    /// something else. Not where it is in use.
    pub fn inherit(&mut self, from: Lessee, to: Lessee, service: u16) {
        let mut has_one = self.port(to.token, service).is_some();
        for lease in self.by_port.values_mut().filter(|lease| !lease.in_use) {
            if !has_one && lease.token == from.token && lease.service == service {
                has_one = true;
                lease.token = to.token;
            } else if lease.client != Some(from.client) {
                continue;
            }
            (lease.client, lease.credentials) = (Some(to.client), Some(to.credentials));
        }
    }

    /// Who has a port is here now: what is written says so. Who did not come in time is not expected any more.
    pub fn touch(&mut self, now: u64) {
        let waits = self.waits(now);
        for lease in self.by_port.values_mut() {
            lease.seen = if lease.in_use { now } else { lease.seen };
            lease.due &= waits;
        }
    }

    /// Another one has the table from here on, and this one uses ports of it until then.
    pub fn hand_over(&mut self, until: u64) {
        self.until = self.until.max(until);
    }

    /// Whether one that had the table before may still use its ports.
    pub fn is_shared(&self, now: u64) -> bool {
        now < self.until
    }

    /// Those who have leases may come until then: nobody else gets their ports for want of another one.
    pub fn expect(&mut self, until: u64) {
        self.expected = until;
    }

    /// Whether those who have leases may be busy at another server, or on their way.
    fn waits(&self, now: u64) -> bool {
        self.is_shared(now) || now < self.expected
    }

    /// A port of whoever says these credentials, for whatever it exposes, which is not in use.
    pub fn kept_for(&self, credentials: TokenHash) -> Option<u16> {
        let is_it = |lease: &Lease| !lease.in_use && lease.credentials == Some(credentials);
        let one = self.by_port.iter().find(|(_, lease)| is_it(lease));
        one.map(|(port, _)| *port)
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
            lease.token = again(lease.token);
            (lease.client, lease.credentials) = (lease.client.map(&again), lease.credentials.map(&again));
            let Holder { instance, origin } = lease.holder;
            lease.holder = Holder { instance: instance.map(&again), origin: origin.map(&again) };
        }
    }

    /// As a file has it.
    pub fn to_json(&self) -> String {
        let hex = |token: TokenHash| token.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let leases: Vec<Value> = self
            .by_port
            .iter()
            .map(|(port, lease)| {
                let Lease { service, seen, .. } = lease;
                let (token, client) = (hex(lease.token), lease.client.map(hex));
                let credentials = lease.credentials.map(hex);
                let mut row = json!({
                    "port": port, "token": token, "client": client, "credentials": credentials,
                    "service": service, "seen": seen,
                });
                // Earlier versions pass over these.
                for (key, hash) in [("instance", lease.holder.instance), ("origin", lease.holder.origin)] {
                    if let Some(hash) = hash {
                        row[key] = hex(hash).into();
                    }
                }
                if lease.in_use || lease.due {
                    row["used"] = true.into();
                }
                row
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
            let may_be_there = |field: &str| match &lease[field] {
                Value::Null => Ok(None),
                said => said.as_str().and_then(self::token).map(Some).ok_or_else(|| wrong(field)),
            };
            let (client, credentials) = (may_be_there("client")?, may_be_there("credentials")?);
            let holder = Holder { instance: may_be_there("instance")?, origin: may_be_there("origin")? };
            let due = match &lease["used"] {
                Value::Null => false,
                said => said.as_bool().ok_or_else(|| wrong("used"))?,
            };
            let (in_use, before) = (false, None);
            let lease = Lease { token, client, credentials, service, seen, in_use, holder, due, before };
            read.insert(port, lease);
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
mod tests;

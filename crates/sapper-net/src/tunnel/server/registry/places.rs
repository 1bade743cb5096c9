//! Which of a token's numbered places a client has.
//!
//! Clients may share their credentials, and each is to have its own port again, whoever comes first. A client is bound
//! to a place at admission, for an original one hears its port in the acknowledgement and says nothing after it; only
//! the hello of one of our own kind tells which client it is: its process (`instance`), which is the same until it ends,
//! and its origin, which is the same when it is started again ([`Origin`](crate::tunnel::service::Origin)). So:
//!
//! 1. The table remembers with each lease which client had it last. What earlier versions wrote, and what an original
//!    client has, is nobody's in particular.
//! 2. At admission a client has the first place that nobody uses, claims, or is expected to come back for. While those
//!    who were there when the server before ended are expected, that is a new place for most; they do not stand in each
//!    other's way. Where there is no other port, it has one of those that are kept.
//! 3. The hello decides. Whose own place that one is keeps it. Whose own place is another one claims that, gives back
//!    what it has, and only then waits: two that have each other's do not wait for each other. Who holds the claimed one
//!    says soon which client it is, and gives it back by the same rule, or says nothing and is an original client: that one
//!    keeps what its acknowledgement said, and who waited has another place. Nobody waits for longer than [`LONGEST`].
//! 4. Who has no place of its own keeps what it has, unless its owner claims it: a client that is started again with
//!    other services, or on another machine, has its token's port again so.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sapper_proto::tunnel::lease::{Holder, LeaseError, Lessee, TokenHash, Wanted};
use tokio::time::{Instant, timeout_at};

use super::super::{admission, lock};
use super::{Client, Place, Registry, keyed, seconds};
use crate::tunnel::entropy;

/// How long a client waits for its own place while another one, which has not said which it is, holds it: longer than
/// that one has for its hello.
const LONGEST: Duration = Duration::from_secs(3);

/// What a client whose hello was heard has to do about the place that it was given before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Exchange {
    /// It is its own, or as good as another one.
    Keep,
    /// Its own is that one, which is claimed for it from here on.
    Claimed(u16),
    /// Its owner claims it.
    Another,
}

/// A place that is kept for its owner until this is dropped.
pub(in super::super) struct Claim<'a> {
    registry: &'a Mutex<Registry>,
    place: (TokenHash, u16),
}

impl<'a> Claim<'a> {
    /// What [`Registry::exchange`] claimed.
    pub(in super::super) fn of(registry: &'a Mutex<Registry>, owner: TokenHash, service: u16) -> Self {
        Self { registry, place: (owner, service) }
    }

    /// When nobody has it any more: `false` where somebody keeps it.
    pub(in super::super) async fn is_free(&self) -> bool {
        let until = Instant::now() + LONGEST;
        let moved = Arc::clone(&lock(self.registry).moved);
        loop {
            let mut notified = pin!(moved.notified());
            notified.as_mut().enable();
            {
                let registry = lock(self.registry);
                if !registry.used.contains(&self.place) {
                    return true;
                }
                if registry.is_settled(self.place) {
                    return false;
                }
            }
            if timeout_at(until, notified).await.is_err() {
                return false;
            }
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let claims = &mut lock(self.registry).claims;
        if let Some(at) = claims.iter().position(|claim| *claim == self.place) {
            claims.swap_remove(at);
        }
    }
}

impl Registry {
    /// A port for a service of a client: of its place of that number, or of the place that it has by the rules above.
    pub(in super::super) fn take(
        &mut self,
        lessee: Lessee,
        service: Option<u16>,
        wanted: Wanted,
        client: &Client,
    ) -> Result<Place, LeaseError> {
        let numbers = match service {
            Some(service) => vec![service],
            None => self.unused(lessee.token, client),
        };
        let mut why = LeaseError::Exhausted;
        for service in numbers {
            match self.take_number(lessee, service, wanted) {
                // Another one may have a port already.
                Err(error @ (LeaseError::Exhausted | LeaseError::TooMany(_))) => why = error,
                taken => return taken,
            }
        }
        Err(why)
    }

    fn take_number(&mut self, lessee: Lessee, service: u16, wanted: Wanted) -> Result<Place, LeaseError> {
        let owner = lessee.token;
        let lessee = self.keyed(lessee);
        let before = self.leases.port(lessee.token, service);
        let port = self.leases.take(lessee, service, wanted, seconds(), entropy())?;
        let fresh = before != Some(port);
        self.changes += 1;
        self.used.push((owner, service));
        Ok(Place { owner, service, port, fresh })
    }

    /// Places of a token that nobody uses, the best first: the client's own, one that nobody is expected for, any.
    fn unused(&self, owner: TokenHash, client: &Client) -> Vec<u16> {
        let of = |places: &[(TokenHash, u16)]| -> BTreeSet<u16> {
            places.iter().filter(|(token, _)| *token == owner).map(|(_, service)| *service).collect()
        };
        let token = keyed(&self.key, owner);
        let taken = &of(&self.used) | &of(&self.claims);
        let kept: BTreeSet<u16> = self.leases.kept(token, seconds()).into_iter().collect();
        let free = |service: &u16| !taken.contains(service);
        let own = self.leases.own(token, self.holder(client)).into_iter().find(free);
        let nobodys = (0..=u16::MAX).find(|service| free(service) && !kept.contains(service));
        let any = (0..=u16::MAX).find(free);
        let mut numbers: Vec<u16> = own.into_iter().chain(nobodys).chain(any).collect();
        numbers.dedup();
        numbers
    }

    /// What a client that has said which it is does about the place that it was given for the service without a name.
    pub(in super::super) fn exchange(
        &mut self,
        owner: TokenHash,
        client: &Client,
        had: Option<Place>,
    ) -> Exchange {
        let is_had = |service| had.is_some_and(|had| (had.owner, had.service) == (owner, service));
        for service in self.leases.own(keyed(&self.key, owner), self.holder(client)) {
            let place = (owner, service);
            if self.claims.contains(&place) {
                // Its twin's: machines that are copies of another say the same.
                continue;
            }
            if is_had(service) {
                return Exchange::Keep;
            }
            if !self.is_settled(place) {
                self.claims.push(place);
                return Exchange::Claimed(service);
            }
        }
        match had {
            Some(had) if self.claims.contains(&(had.owner, had.service)) => Exchange::Another,
            _ => Exchange::Keep,
        }
    }

    /// Whether that place is a tunnel's, whose client is known.
    fn is_settled(&self, place: (TokenHash, u16)) -> bool {
        let is_it = |one: &Place| (one.owner, one.service) == place;
        self.used.contains(&place) && self.tunnels.values().any(|entry| entry.places.iter().any(is_it))
    }

    /// As the table knows a client.
    pub(super) fn holder(&self, client: &Client) -> Holder {
        let hash = |what: &[u8], text: &str| {
            (!text.is_empty()).then(|| keyed(&self.key, admission::hash(what, text.as_bytes())))
        };
        Holder { instance: hash(b"instance:", &client.instance), origin: hash(b"origin:", &client.origin) }
    }
}

#[cfg(test)]
mod tests;

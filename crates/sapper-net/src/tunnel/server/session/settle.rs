//! What a client exposes, and which public port each of its services gets: all of them, or none.

use std::time::Duration;

use sapper_proto::tunnel::lease::{LeaseError, Lessee, TokenHash, Wanted};
use sapper_proto::tunnel::words::{Asked, ClientWords};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::admission::{another_client, hash, undecided};
use super::super::registry::{self, Claim, Client, Exchange, Order, Place, Stale};
use super::super::{lock, no_port};
use super::{Counts, No, PROBE, SLOWEST, Tunnel};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::mailbox::Subject;
use crate::tunnel::public::PublicPort;

/// How long a stale tunnel may take to give its port back.
const STALE: Duration = Duration::from_secs(5);
impl Tunnel<'_> {
    /// What the client exposes, and a port for each: that of its own stale tunnel, that of its lease, the one
    /// that it asks for, or the one it has. All of them, or none.
    pub(super) async fn settle(
        &mut self,
        words: &[u8],
        several: bool,
        had: Option<PublicPort>,
    ) -> Result<(ClientWords, Vec<PublicPort>), No> {
        let said = ClientWords::parse(words).map_err(|error| {
            Error::new(ErrorKind::RemoteProtocol, error.to_string())
                .with_phase(Phase::Handshake)
                .with_reason("services")
        })?;
        let words = if several { said } else { ClientWords { services: vec![Asked::default()], ..said } };
        self.client = Client { instance: words.instance.clone(), origin: words.origin.clone() };
        if lock(&self.shared.registry).is_replaced(&self.client) {
            let error = Error::new(ErrorKind::PolicyDenied, "another client has this lease now");
            return Err(error.with_reason("replaced").into());
        }
        let lease = words.lease.as_ref().map(|lease| self.lease(lease));
        let most = self.shared.options().max_services as usize;
        if words.services.len() > most {
            let text = format!("{} services are more than {most}", words.services.len());
            return Err(Error::new(ErrorKind::PolicyDenied, text).with_reason("too_many_services").into());
        }
        let had = match words.services.iter().position(|asked| *asked == Asked::default()) {
            Some(at) if lease.is_none() => {
                let exchanged = self.exchange(had).await;
                exchanged.map_err(|error| No { error, service: u16::try_from(at).ok() })?
            }
            _ => {
                self.give_back_first(had);
                None
            }
        };
        // Before anybody gives way to it.
        self.may_expose(&words).await?;
        let base = lease.unwrap_or(self.owner);
        let owners: Vec<_> = words.services.iter().map(|asked| owner(base, &asked.name)).collect();
        let leased = if lease.is_some() { &owners[..] } else { &[] };
        // Whose lease it is gives way, there or not.
        let silent = if lease.is_some() { Vec::new() } else { self.silent().await };
        let mut old = Vec::new();
        loop {
            // It may be gone already; then so is its channel.
            let stale =
                lock(&self.shared.registry).stale(self.info.id, self.owner, &self.client, leased, &silent);
            let Some(Stale { id, orders, places, replaced }) = stale else { break };
            let (done, gone) = oneshot::channel();
            let _ = orders.send(Order::Replace(done, replaced)).await;
            let _ = timeout(STALE, gone).await;
            lock(&self.shared.registry).remove(id);
            old.extend(places);
        }
        if let Some(lease) = words.lease.as_ref().filter(|_| !self.shared.options().shared_leases) {
            let (before, mut registry) = (everybodys(lease), lock(&self.shared.registry));
            for (asked, to) in words.services.iter().zip(&owners) {
                let from = Lessee { token: owner(before, &asked.name), ..self.lessee(before) };
                registry.inherit(from, Lessee { token: *to, ..self.lessee(base) }, 0);
            }
        }
        self.count().await?;
        let usual = words.services == [Asked::default()] && lease.is_none() && old.is_empty();
        if usual {
            let port = had.ok_or_else(|| no_port(&LeaseError::Exhausted))?;
            return Ok((words, vec![port]));
        }
        // What it was given first is that of a service without wishes, or free again.
        let keep = lease.is_none() && old.is_empty() && words.services.contains(&Asked::default());
        let mut kept = None;
        match had {
            Some(port) if keep => kept = self.places.pop().map(|place| (port, place)),
            had => self.give_back_first(had),
        }
        let mut ports = Vec::with_capacity(words.services.len());
        for ((asked, owner), at) in words.services.iter().zip(owners).zip(0..) {
            // The number among those of the same owner: as it was.
            let number = match lease {
                Some(_) => Some(0),
                None => old.iter().find(|place| place.owner == owner).map(|place| place.service),
            };
            let exposed = match kept.take_if(|_| *asked == Asked::default()) {
                Some(kept) => Ok(kept),
                None => self.expose(asked, Lessee { token: owner, ..self.lessee(base) }, number).await,
            };
            match exposed {
                Ok((port, place)) => {
                    ports.push(port);
                    self.places.push(place);
                }
                Err(error) => {
                    self.places.extend(kept.map(|(_, place)| place));
                    return Err(No { error, service: Some(at) });
                }
            }
        }
        self.shared.leases_changed();
        Ok((words, ports))
    }

    /// The place that it was given first, or its own one, now that it is known which client it is.
    async fn exchange(&mut self, had: Option<PublicPort>) -> Result<Option<PublicPort>> {
        let shared = self.shared;
        let place = self.places.first().copied();
        let exchange = lock(&shared.registry).exchange(self.owner, &self.client, place);
        let claim = match exchange {
            Exchange::Keep => return Ok(had),
            Exchange::Claimed(number) => Some((Claim::of(&shared.registry, self.owner, number), number)),
            Exchange::Another => None,
        };
        // Before it waits: its owner may be the one that has ours.
        self.give_back_first(had);
        let number = match &claim {
            Some((claim, number)) if claim.is_free().await => Some(*number),
            _ => None,
        };
        let (lessee, gate) = (self.lessee(self.owner), &shared.gate);
        let bound =
            registry::bind(&shared.registry, (lessee, number, &self.client), Wanted::Any, None, gate).await;
        drop(claim);
        let (port, place) = bound?;
        self.places.push(place);
        Ok(Some(port))
    }

    /// It does not need what it was given before it said what it is.
    fn give_back_first(&mut self, had: Option<PublicPort>) {
        drop(had);
        if let Some(place) = self.places.pop() {
            lock(&self.shared.registry).give_back(place);
        }
    }

    /// Whose ports a lease's are. A name is the credentials' own, so that nobody else has it, unless the server
    /// lets all share them.
    fn lease(&self, name: &str) -> TokenHash {
        if self.shared.options().shared_leases {
            return everybodys(name);
        }
        let own: Vec<u8> = self.owner.iter().copied().chain(name.bytes()).collect();
        hash(b"own lease:", &own)
    }

    /// It, where its ports are those of `base`.
    fn lessee(&self, base: TokenHash) -> Lessee {
        Lessee { token: base, client: base, credentials: self.owner }
    }

    /// Tunnels of what looks like the same client whose connection gives no answer.
    async fn silent(&self) -> Vec<u64> {
        let suspects = lock(&self.shared.registry).suspects(self.info.id, self.owner, &self.client);
        let mut asked = Vec::with_capacity(suspects.len());
        for (id, orders) in suspects {
            let (answer, answered) = oneshot::channel();
            // One that is behind with its orders is there.
            if orders.try_send(Order::Probe(answer)).is_ok() {
                asked.push((id, answered));
            }
        }
        let mut silent = Vec::new();
        let until = Instant::now() + 2 * (PROBE + SLOWEST);
        for (id, answered) in asked {
            if let Ok(Ok(false)) = timeout_at(until, answered).await {
                silent.push(id);
            }
        }
        silent
    }

    /// Counts it as a client, where it does not count as one.
    async fn count(&mut self) -> Result<()> {
        if let Counts::Handshake { .. } = self.counts {
            self.counts = Counts::Client { _permit: another_client(self.shared).await? };
        }
        Ok(())
    }

    /// The program's answer about what the client wants.
    async fn may_expose(&self, words: &ClientWords) -> Result<()> {
        let Some(deadline) = self.shared.gate.current().ask_services else { return Ok(()) };
        let (mailbox, key) = self.shared.teller.mailbox();
        let one = |asked: &Asked| (asked.name.clone(), asked.ports, asked.host.map(|host| host.to_string()));
        let subject = Subject::TunnelServices {
            id: self.info.id,
            credentials: self.info.credentials.clone(),
            client: self.info.client.clone(),
            lease: words.lease.clone(),
            services: words.services.iter().map(one).collect(),
        };
        let answer = tokio::select! {
            biased;
            // The next one may be asked.
            () = self.shared.stopped() => None,
            answer = mailbox.ask(key, subject, deadline) => answer,
        };
        let text = "the service filter does not let the client expose this";
        match answer {
            Some(true) => Ok(()),
            Some(false) => Err(Error::new(ErrorKind::PolicyDenied, text).with_reason("service_rejected")),
            None => Err(undecided()),
        }
    }

    /// A port for one service.
    async fn expose(
        &self,
        asked: &Asked,
        lessee: Lessee,
        number: Option<u16>,
    ) -> Result<(PublicPort, Place)> {
        let options = self.shared.options();
        if let Some(host) = asked.host
            && !options.asked_hosts.contains(&host.to_canonical())
        {
            let text =
                format!("public ports do not listen at {host}: asked_hosts of the server does not name it");
            return Err(Error::new(ErrorKind::PolicyDenied, text).with_reason("host_not_allowed"));
        }
        let wanted = match asked.ports {
            None => Wanted::Any,
            Some((first, last)) if first == last => Wanted::Exactly(first),
            Some((first, last)) => Wanted::Within(first, last),
        };
        let whose = (lessee, number, &self.client);
        registry::bind(&self.shared.registry, whose, wanted, asked.host, &self.shared.gate).await
    }
}

/// Whose ports a lease's are where its name is everybody's, as it was in earlier versions.
fn everybodys(name: &str) -> TokenHash {
    hash(b"lease:", name.as_bytes())
}

/// Whose port a service's is: the client's own, where it has no name.
fn owner(base: TokenHash, name: &str) -> TokenHash {
    if name.is_empty() {
        return base;
    }
    let named: Vec<u8> = base.iter().copied().chain(name.bytes()).collect();
    hash(b"service:", &named)
}

//! What a server knows of all its tunnels: whose port is whose ([`places`] says how clients with one token have their
//! own), which session waits for its client.

mod places;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use sapper_proto::tunnel::frame::Hello;
use sapper_proto::tunnel::lease::{Leases, Lessee, TokenHash, Wanted};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout};

pub(super) use self::places::{Claim, Exchange};
use super::lease_file::{LeaseFile, Table};
use super::session::Connection;
use super::{ServerOptions, TunnelSnapshot, lock, no_port};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime;
use crate::stream::BoxStream;
use crate::tunnel::limit::{Clients, Meter};
use crate::tunnel::live::Live;
use crate::tunnel::notice::TunnelInfo;
use crate::tunnel::public::{Gate, PublicPort};
use crate::tunnel::{VisitorStats, random};

/// Ports that are tried where the system has given away those that the table names.
const TRIES: u32 = 32;
/// Processes that others took the lease from, as far as they are remembered: one that sleeps wakes up, and would take
/// it back, for ever.
const MOST_REPLACED: usize = 1_024;
/// Tunnels that are asked whether their clients are there, when one comes that looks the same.
const MOST_SUSPECTS: usize = 64;
/// A client whose connection broke is back within this, where it can be: nobody takes its place meanwhile.
const AT_ONCE: Duration = Duration::from_secs(5);
/// A server that has no more clients to take uses ports of its leases for so long at most, as far as the next one is
/// told.
const LONGEST_DRAIN: Duration = Duration::from_secs(3_600);
/// Seconds that clients have to come to the next server when the drain is over.
const COMES_AGAIN: u64 = 5;
/// Seconds that clients have to come to a server that has just begun: their longest pause, where they say no other,
/// and a handshake.
const EXPECTED: u64 = 35;
/// What the last write may take: a server that stops does not wait longer.
const SLOWEST_DISK: Duration = Duration::from_secs(5);
/// Services of one token: more clients with the same credentials get no port.
const MOST_PER_TOKEN: usize = 4_096;

/// What a tunnel's task is asked by others.
pub(super) enum Order {
    /// The session's client is back, on another carrier.
    Takeover(Box<Takeover>),
    /// The same client has another tunnel now: end, then drop this. `true`: the lease is another process's now, and the
    /// one that had it is to hear that it comes back in vain.
    Replace(oneshot::Sender<()>, bool),
    /// Whether its client is there: answered soon.
    Probe(oneshot::Sender<bool>),
    /// Its client would not be let in any more: end where it waits for it.
    Refused,
    /// Another client needs its place: end where nobody uses it, and drop this.
    GiveWay(oneshot::Sender<()>),
}

/// A carrier whose client asked to go on with a session.
pub(super) struct Takeover {
    pub(super) carrier: BoxStream,
    pub(super) rest: Vec<u8>,
    pub(super) hello: Hello,
    /// How long it took to say that.
    pub(super) took: Duration,
    pub(super) connection: Connection,
}

/// A port's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) owner: TokenHash,
    pub(super) service: u16,
    pub(super) port: u16,
    /// Whether it had no lease before.
    fresh: bool,
}

/// Which client it is, as far as it says.
#[derive(Clone, Default)]
pub(super) struct Client {
    /// This process of it.
    pub(super) instance: String,
    /// Its machine and its services.
    pub(super) origin: String,
}

/// A tunnel that gives way.
pub(super) struct Stale {
    pub(super) id: u64,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) places: Vec<Place>,
    /// Whether another process has its lease from here on.
    pub(super) replaced: bool,
}

impl Client {
    /// Its origin without the number that tells living processes apart.
    fn without_copy(&self) -> Option<&str> {
        Some(self.origin.rsplit_once('-')?.0)
    }
}

struct Entry {
    info: Arc<TunnelInfo>,
    live: Arc<Live>,
    orders: mpsc::Sender<Order>,
    /// Its credentials.
    owner: TokenHash,
    places: Vec<Place>,
    session: Option<[u8; 16]>,
    client: Client,
    /// Since when it waits for its client.
    waits: Option<Instant>,
}

/// The tunnels.
pub(super) struct Registry {
    leases: Leases,
    /// Makes the table's tokens: it lies on a disk.
    key: hmac::Key,
    pub(super) file: Option<Arc<LeaseFile>>,
    /// Changes of the leases so far: the file has one of these states.
    changes: u64,
    tunnels: BTreeMap<u64, Entry>,
    /// Places that are in use, by tunnels or by those that become one.
    used: Vec<(TokenHash, u16)>,
    /// Places whose owners wait for those who hold them.
    claims: Vec<(TokenHash, u16)>,
    /// Told when a place is free, or it is known whose it is.
    moved: Arc<Notify>,
    /// What may pass for each credentials.
    limits: Clients,
    replaced: VecDeque<String>,
    next: u64,
}

impl Registry {
    pub(super) fn new(options: &ServerOptions) -> Result<Self> {
        let (first, last) = options.public_ports;
        let mut leases = Leases::new(first, last, MOST_PER_TOKEN, options.lease_time);
        leases.allow(asked_ports(options));
        let key: TokenHash = random()?;
        leases.set_key(key, |token| token);
        Ok(Self {
            leases,
            key: hmac::Key::new(hmac::HMAC_SHA256, &key),
            file: None,
            changes: 0,
            tunnels: BTreeMap::new(),
            used: Vec::new(),
            claims: Vec::new(),
            moved: Arc::default(),
            limits: Clients::new(&options.client_limits),
            replaced: VecDeque::new(),
            next: 0,
        })
    }

    /// Leases are what this file has, which is ours from here on.
    fn adopt(&mut self, file: Arc<LeaseFile>, text: Option<&str>) -> Result<()> {
        if let Some(text) = text {
            let wrong = |why| Error::config("lease_file", format!("{}: {why}", file.path().display()));
            self.leases.from_json(text).map_err(wrong)?;
        }
        // The one before may have been killed: who has leases comes here, each after a pause of its own.
        self.leases.expect(seconds() + EXPECTED);
        let fresh: TokenHash = random()?;
        let key = self.leases.key().unwrap_or(fresh);
        self.key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        if self.leases.key().is_none() {
            self.leases.set_key(key, |token| keyed(&self.key, token));
        }
        self.file = Some(file);
        self.changes += 1;
        Ok(())
    }

    /// What is to be written, where the file does not have it.
    fn unwritten(&mut self) -> Option<Table> {
        if self.file.as_ref()?.written() == self.changes {
            return None;
        }
        self.leases.touch(seconds());
        Some(Table { text: self.leases.to_json(), state: self.changes })
    }

    /// The file, which nothing more is written to from here on, and what is left to write. Who has tunnels uses their
    /// ports for as long as the drain is, and comes to the next server then.
    fn give_file_back(&mut self, drain: Duration) -> Option<(Arc<LeaseFile>, Option<Table>)> {
        if !self.tunnels.is_empty() {
            let drain = (drain.min(LONGEST_DRAIN) + Duration::from_millis(999)).as_secs();
            self.leases.hand_over(seconds() + drain + COMES_AGAIN);
            self.changes += 1;
        }
        let table = self.unwritten();
        Some((self.file.take()?, table))
    }

    /// Other ports for those who come, and other limits for whoever asks for them again.
    pub(super) fn reload(&mut self, options: &ServerOptions) {
        let (first, last) = options.public_ports;
        self.leases.reload(first, last, options.lease_time);
        self.leases.allow(asked_ports(options));
        self.limits.reload(&options.client_limits);
    }

    /// What may pass for whoever has these credentials, all of its tunnels together.
    pub(super) fn limits(&mut self, owner: TokenHash) -> Option<Arc<Meter>> {
        self.limits.of(owner, Instant::now())
    }

    pub(super) fn next_id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A name is its credentials' own here. What it had where it was everybody's, by an earlier version or an option, is
    /// of whoever comes first: nobody else could ever claim it.
    pub(super) fn inherit(&mut self, from: Lessee, to: Lessee, service: u16) {
        let (from, to) = (self.keyed(from), self.keyed(to));
        self.leases.inherit(from, to, service);
        self.changes += 1;
    }

    fn keyed(&self, Lessee { token, client, credentials }: Lessee) -> Lessee {
        let [token, client, credentials] = [token, client, credentials].map(|one| keyed(&self.key, one));
        Lessee { token, client, credentials }
    }

    /// The tunnel of that place ended; the port stays its owner's.
    pub(super) fn release(&mut self, place: Place) {
        self.leave(place);
        self.leases.release(place.port, seconds());
    }

    /// The place was taken in vain: as before.
    pub(super) fn give_back(&mut self, place: Place) {
        if place.fresh {
            self.leave(place);
            self.leases.undo(place.port);
        } else {
            self.release(place);
        }
    }

    /// Whether that port is in use since a server that had the leases before has not ended yet.
    fn is_ending(&self, place: Place) -> bool {
        !place.fresh && self.leases.is_shared(seconds())
    }

    /// The system does not give that port: nobody's.
    fn forget(&mut self, place: Place) {
        self.leave(place);
        self.leases.lost(place.port);
    }

    fn leave(&mut self, place: Place) {
        self.changes += 1;
        self.used.retain(|used| *used != (place.owner, place.service));
        self.moved.notify_waiters();
    }

    pub(super) fn enter(
        &mut self,
        info: Arc<TunnelInfo>,
        live: Arc<Live>,
        orders: mpsc::Sender<Order>,
        owner: TokenHash,
    ) {
        let entry = Entry {
            info,
            live,
            orders,
            owner,
            places: Vec::new(),
            session: None,
            client: Client::default(),
            waits: None,
        };
        self.tunnels.insert(entry.info.id, entry);
    }

    /// Where a tunnel is; of one of our own kind its session, and which client it is. The places are that client's.
    pub(super) fn name(
        &mut self,
        info: &Arc<TunnelInfo>,
        places: &[Place],
        session: Option<[u8; 16]>,
        client: &Client,
    ) {
        if let Some(entry) = self.tunnels.get_mut(&info.id) {
            (entry.info, entry.session) = (Arc::clone(info), session);
            places.clone_into(&mut entry.places);
            entry.client.clone_from(client);
        }
        let holder = self.holder(client);
        places.iter().for_each(|place| self.leases.held(place.port, holder));
        self.changes += 1;
        self.moved.notify_waiters();
    }

    /// Its client is gone, and may come back.
    pub(super) fn detached(&mut self, id: u64) {
        if let Some(entry) = self.tunnels.get_mut(&id) {
            entry.waits = Some(Instant::now());
        }
    }

    /// Its client is back, from wherever it is now.
    pub(super) fn attached(&mut self, info: &Arc<TunnelInfo>) {
        if let Some(entry) = self.tunnels.get_mut(&info.id) {
            (entry.info, entry.waits) = (Arc::clone(info), None);
        }
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.tunnels.remove(&id);
    }

    /// Whose session it is.
    pub(super) fn session(&self, session: &[u8; 16]) -> Option<mpsc::Sender<Order>> {
        let entry = self.tunnels.values().find(|entry| entry.session.as_ref() == Some(session));
        entry.map(|entry| entry.orders.clone())
    }

    /// The tunnel of the same client process, or of the same lease, whoever of them has it; or one that waits for
    /// a client which is started again: the session that it had died with its process.
    pub(super) fn stale(
        &mut self,
        id: u64,
        owner: TokenHash,
        client: &Client,
        leased: &[TokenHash],
        silent: &[u64],
    ) -> Option<Stale> {
        let is = |one: &str, other: &str| !one.is_empty() && one == other;
        let same = |entry: &&Entry| {
            let process = is(&client.instance, &entry.client.instance);
            let started_again =
                entry.waits.is_some() && entry.owner == owner && is(&client.origin, &entry.client.origin);
            let lease = || entry.places.iter().any(|place| leased.contains(&place.owner));
            let silent = || silent.contains(&entry.info.id);
            entry.info.id != id && (process || started_again || silent() || lease())
        };
        let entry = self.tunnels.values().find(same)?;
        let was = &entry.client.instance;
        let lease = entry.places.iter().any(|place| leased.contains(&place.owner));
        let replaced = lease && !is(&client.instance, was);
        if replaced && !was.is_empty() {
            self.replaced.truncate(MOST_REPLACED - 1);
            self.replaced.push_front(was.clone());
        }
        let (orders, places) = (entry.orders.clone(), entry.places.clone());
        Some(Stale { id: entry.info.id, orders, places, replaced })
    }

    /// Tunnels that may be what is left of the same client, which the network or its machine took down without a word:
    /// each is to be asked whether its client is there. Machines that are copies of another look the same.
    pub(super) fn suspects(
        &self,
        id: u64,
        owner: TokenHash,
        client: &Client,
    ) -> Vec<(u64, mpsc::Sender<Order>)> {
        let origin = client.without_copy();
        let may_be = |entry: &&Entry| {
            let same = entry.owner == owner && origin.is_some() && entry.client.without_copy() == origin;
            same && entry.waits.is_none() && entry.info.id != id && entry.client.instance != client.instance
        };
        let suspects = self.tunnels.values().filter(may_be).take(MOST_SUSPECTS);
        suspects.map(|entry| (entry.info.id, entry.orders.clone())).collect()
    }

    /// Whether another process has what this one had.
    pub(super) fn is_replaced(&self, client: &Client) -> bool {
        self.replaced.contains(&client.instance)
    }

    /// A session of ours with the same credentials: its client may be the one that comes back.
    pub(super) fn port_of(&self, owner: TokenHash) -> Option<u16> {
        let waits = |entry: &&Entry| entry.owner == owner && entry.session.is_some();
        self.tunnels.values().find(waits).map(|entry| entry.info.port)
    }

    /// A port that is kept for the same credentials: its client may be the one that comes for it, by a name that it
    /// has not said yet.
    pub(super) fn kept_for(&self, owner: TokenHash) -> Option<u16> {
        self.leases.kept_for(keyed(&self.key, owner))
    }

    /// Whether a session of these credentials waits for its client.
    pub(super) fn waits_for(&self, owner: TokenHash) -> bool {
        self.tunnels.values().any(|entry| entry.owner == owner && entry.waits.is_some())
    }

    /// All sessions of these credentials that wait for their client.
    pub(super) fn waiting(&self, owner: TokenHash) -> Vec<mpsc::Sender<Order>> {
        let waits = self.tunnels.values().filter(|entry| entry.owner == owner && entry.waits.is_some());
        waits.map(|entry| entry.orders.clone()).collect()
    }

    /// The session that has waited longest for its client, of those whose client does not come at once, that have no
    /// visitors, and were not `asked` yet.
    pub(super) fn waits_idly(&self, asked: &[u64]) -> Option<(u64, mpsc::Sender<Order>)> {
        let idle = |entry: &&Entry| {
            let late = entry.waits.is_some_and(|since| since.elapsed() >= AT_ONCE);
            late && entry.live.stats().streams == 0 && !asked.contains(&entry.info.id)
        };
        let oldest = self.tunnels.values().filter(idle).min_by_key(|entry| entry.waits)?;
        Some((oldest.info.id, oldest.orders.clone()))
    }

    pub(super) fn tunnels(&self) -> Vec<TunnelSnapshot> {
        let one = |entry: &Entry| TunnelSnapshot {
            info: Arc::clone(&entry.info),
            connected: entry.waits.is_none(),
            stats: entry.live.stats(),
            services: entry.live.services(),
        };
        self.tunnels.values().map(one).collect()
    }

    /// Visitors of one tunnel, or of all: the tunnel's number with each, at most so many.
    pub(super) fn visitors(&self, id: Option<u64>, most: usize) -> Vec<(u64, VisitorStats)> {
        let mut all = Vec::new();
        for (number, entry) in self.tunnels.iter().filter(|(number, _)| id.is_none_or(|id| id == **number)) {
            all.extend(entry.live.visitors(most - all.len()).into_iter().map(|one| (*number, one)));
        }
        all
    }
}

/// Leases are those of this file, which is ours from here on, and kept in it.
pub(super) async fn keep_in(registry: &Mutex<Registry>, path: PathBuf) -> Result<()> {
    let (file, text) = LeaseFile::open(path).await?;
    lock(registry).adopt(file, text.as_deref())?;
    // Found out now: later there is nobody who could still choose another file.
    save(registry).await.map_err(|error| Error::config("lease_file", error.message()))
}

/// Writes the leases where they changed: whole, or not at all, and as they are when it is their turn.
pub(super) async fn save(registry: &Mutex<Registry>) -> Result<()> {
    let Some(file) = lock(registry).file.clone() else { return Ok(()) };
    let turn = file.turn().await;
    let table = lock(registry).unwritten();
    match table {
        Some(table) => turn.write(table).await,
        None => Ok(()),
    }
}

/// What is left to write, and the file is anybody's. Where the disk takes longer than [`SLOWEST_DISK`] the server ends
/// without it, and the file is free when it is written.
pub(super) async fn close(registry: &Mutex<Registry>, drain: Duration) -> Result<()> {
    let Some((file, table)) = lock(registry).give_file_back(drain) else { return Ok(()) };
    let too_slow = file.too_slow();
    let (done, written) = oneshot::channel();
    runtime::spawn("tunnel leases", async move {
        // Also where nothing is left: the write before has the file until it is done.
        let turn = file.turn().await;
        let saved = match table {
            Some(table) => turn.write(table).await,
            None => {
                drop(turn);
                Ok(())
            }
        };
        let _ = done.send(saved);
    })?;
    match timeout(SLOWEST_DISK, written).await {
        Ok(Ok(saved)) => saved,
        _ => Err(too_slow),
    }
}

/// Binds a port for a service. Ports that the system has given to others are not in the table any more.
pub(super) async fn bind(
    registry: &Mutex<Registry>,
    (lessee, service, client): (Lessee, Option<u16>, &Client),
    wanted: Wanted,
    host: Option<IpAddr>,
    gate: &Arc<Gate>,
) -> Result<(PublicPort, Place)> {
    let mut last = None;
    let tries = if matches!(wanted, Wanted::Exactly(_)) { 1 } else { TRIES };
    for _ in 0..tries {
        let place = lock(registry).take(lessee, service, wanted, client).map_err(|error| no_port(&error))?;
        match PublicPort::bind(place.port, host, gate).await {
            Ok(port) => return Ok((port, place)),
            Err(error) => {
                let mut registry = lock(registry);
                if error.reason() == Some("in_use") && registry.is_ending(place) {
                    registry.release(place);
                    let text = format!("the server before, which ends, still uses port {}", place.port);
                    return Err(Error::new(ErrorKind::ResourceLimit, text).with_reason("in_use"));
                }
                registry.forget(place);
                if error.reason() != Some("in_use") {
                    return Err(error);
                }
                // Its client hears that too, whose machine it is not.
                let text = format!("another program of the server's machine has public port {}", place.port);
                last = Some(Error::new(error.kind(), text).with_reason("in_use"));
            }
        }
    }
    Err(last.expect("it was tried"))
}

/// Ports that a client may ask for.
fn asked_ports(options: &ServerOptions) -> Vec<(u16, u16)> {
    options.asked_ports.clone().unwrap_or_else(|| vec![options.public_ports])
}

fn keyed(key: &hmac::Key, token: TokenHash) -> TokenHash {
    let mut made = [0; 32];
    made.copy_from_slice(hmac::sign(key, &token).as_ref());
    made
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

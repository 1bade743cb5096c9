//! The tunnel's server: takes clients, asks who they are, gives each a public port.
//!
//! In here: options, the handle, the main port. [`session`] is one client from its connection to its end,
//! [`admission`] how it is let in, [`handshakes`] what bounds those who are not yet, [`registry`] what all of them
//! share: ports, leases, sessions that wait for their client.

mod admission;
mod lease_file;
mod registry;
mod session;
#[cfg(test)]
mod testing;

use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sapper_proto::tunnel::ip_list::VisitorRule;
use sapper_proto::tunnel::lease::LeaseError;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::Instant;

use self::registry::Registry;
use super::limit::{Limits, Visitors};
use super::notice::{Notice, Teller, TunnelInfo};
use super::public::{Frequency, Gate, PublicOptions};
use super::served::ServiceStats;
use super::stopping::Stopping;
use super::{Common, MOST_UNSENT, TunnelStats, VisitorStats};
use crate::bridge::{ControlMailbox, Event, Reply, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::handshakes::Handshakes;
use crate::proxy::Rate;
use crate::runtime;
use crate::stream::address::Address;
use crate::stream::fd::SocketOptions;
use crate::stream::listen::{ListenAddress, ListenOptions, Listener};
use crate::tls::{Role, SharedTlsConfig};

/// As the original: a client that is gone without a word is found out.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How long a name in the address may be looked up.
const LOOK_UP: Duration = Duration::from_secs(10);
/// Changes of leases are written together, after this.
const SAVE_AFTER: Duration = Duration::from_millis(50);

/// Leases that could not be written are tried again, after this.
const SAVE_AGAIN: Duration = Duration::from_secs(2);

/// What stands for the main port in the name of a file of leases.
const PORT: &str = "{port}";

/// A server's options.
#[derive(Clone)]
pub struct ServerOptions {
    /// Where the main port listens; `None` is every address.
    pub host: Option<String>,
    /// The main port; 0 takes a free one.
    pub port: u16,
    /// Where public ports listen; `None` is every address.
    pub visitor_host: Option<String>,
    /// First and last public port.
    pub public_ports: (u16, u16),
    /// Public ports that a client may ask for, first and last each; `None` is those of `public_ports`.
    pub asked_ports: Option<Vec<(u16, u16)>>,
    /// Where a client may ask its public ports to listen, besides `visitor_host`.
    pub asked_hosts: Vec<IpAddr>,
    /// Services of one client.
    pub max_services: u32,
    /// TLS at the main port.
    pub tls: Option<SharedTlsConfig>,
    /// TLS at public ports.
    pub visitor_tls: Option<SharedTlsConfig>,
    /// Whether somebody is asked about each client, and how long an answer may take; none means no.
    pub filter: Option<Duration>,
    /// Who may visit, by address.
    pub visitors: VisitorRule,
    /// Whether somebody is asked about each visitor, and how long an answer may take; none means no.
    pub visitor_filter: Option<Duration>,
    /// The same about what each client of our own kind wants to expose.
    pub service_filter: Option<Duration>,
    /// How often one address may visit, whichever tunnel.
    pub visitor_rate: Option<Rate>,
    /// Clients at a time, those included whose session waits for them. Of these one that has no visitors gives way to a
    /// newcomer after a while; where none does, the newcomer is refused.
    pub max_clients: u32,
    /// Connections to the main port whose client is not let in yet, at a time; beyond, one gives way.
    pub max_handshakes: u32,
    /// Visitors of one client at a time.
    pub max_visitors: u32,
    /// Visitors of all clients at a time; more are sent away.
    pub max_streams: u32,
    /// What may pass for one address: bytes in all of one visit, no visits a second ([`Self::visitor_rate`]).
    pub visitor_limits: Limits,
    /// What may pass for one client: all tunnels of the same credentials together.
    pub client_limits: Limits,
    /// What may pass to one service.
    pub service_limits: Limits,
    /// Where leases of ports are kept. `{port}` in it is the main port.
    pub lease_file: Option<PathBuf>,
    /// Whether the name of a lease is everybody's, whatever the credentials are.
    pub shared_leases: bool,
    /// How long a port belongs to a client that is not there.
    pub lease_time: Duration,
    /// What both ends have.
    pub common: Common,
}

impl ServerOptions {
    fn check(&self) -> Result<()> {
        for (config, field) in [(&self.tls, "tls"), (&self.visitor_tls, "visitor_tls")] {
            if let Some(config) = config {
                config.check(&Role::Server).map_err(|error| error.with_field(field))?;
            }
        }
        for (number, field) in [
            (self.max_clients, "max_clients"),
            (self.max_handshakes, "max_handshakes"),
            (self.max_visitors, "max_visitors"),
            (self.max_streams, "max_streams"),
            (self.max_services, "max_services"),
        ] {
            if number == 0 {
                return Err(Error::config(field, "must be at least 1"));
            }
        }
        self.visitor_limits.check("visitor_limits")?;
        self.client_limits.check("client_limits")?;
        self.service_limits.check("service_limits")?;
        for (index, (first, last)) in self.asked_ports.iter().flatten().enumerate() {
            if *first == 0 || first > last {
                let text = format!("{first} to {last} is no range of ports");
                return Err(Error::config(format!("asked_ports.{index}"), text));
            }
        }
        if let Some(rate) = &self.visitor_rate {
            rate.check().map_err(|error| error.with_field("visitor_rate"))?;
        }
        let (first, last) = self.public_ports;
        if first == 0 || first > last {
            return Err(Error::config("public_ports", format!("{first} to {last} is no range of ports")));
        }
        Ok(())
    }

    /// What visitors meet. Who came too often `before` is remembered where the rate is the same.
    fn public(&self, before: Option<&PublicOptions>) -> PublicOptions {
        let places = before.map(|before| Arc::clone(&before.places));
        let visitors = before.and_then(|before| before.visitors.as_ref());
        let before = before.and_then(|before| before.frequency.as_ref());
        PublicOptions {
            host: self.visitor_host.clone(),
            max_visitors: self.max_visitors,
            tls: self.visitor_tls.clone(),
            handshake: self.common.handshake_timeout,
            rule: self.visitors.clone(),
            ask: self.visitor_filter,
            ask_services: self.service_filter,
            visitors: Visitors::kept(visitors, &self.visitor_limits),
            places: places.unwrap_or_else(|| Arc::new(Semaphore::new(self.max_streams as usize))),
            frequency: self.visitor_rate.map(|rate| Frequency::kept(before, rate)),
        }
    }

    /// What only a new server can have otherwise.
    fn same_place(&self, other: &Self) -> Result<()> {
        let fields = [
            ("host", self.host == other.host),
            ("port", self.port == other.port),
            ("max_clients", self.max_clients == other.max_clients),
            ("max_handshakes", self.max_handshakes == other.max_handshakes),
            ("max_streams", self.max_streams == other.max_streams),
            ("lease_file", self.lease_file == other.lease_file),
        ];
        match fields.iter().find(|(_, same)| !same) {
            Some((field, _)) => Err(Error::config(*field, "cannot be changed while the server runs")),
            None => Ok(()),
        }
    }
}

/// One tunnel as of now.
#[derive(Debug)]
pub struct TunnelSnapshot {
    /// Which.
    pub info: Arc<TunnelInfo>,
    /// Whether its client is there.
    pub connected: bool,
    /// What it does.
    pub stats: TunnelStats,
    /// What each of its services does.
    pub services: Vec<ServiceStats>,
}

/// The handle. Dropped, the server stops.
pub struct Server {
    shared: Arc<Shared>,
}

/// What the tasks of a server share.
struct Shared {
    options: Mutex<Arc<ServerOptions>>,
    gate: Arc<Gate>,
    teller: Arc<Teller>,
    /// Places of clients that are let in: each tunnel has one.
    clients: Arc<Semaphore>,
    handshakes: Arc<Handshakes>,
    registry: Mutex<Registry>,
    changed: Notify,
    /// Tunnels look for other limits.
    reloads: watch::Sender<()>,
    stopping: Stopping,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    replies: Vec<Reply>,
    over: bool,
}

impl Server {
    /// Starts it. The addresses of the main port, or why there is none, are the answer to `key`; events follow
    /// under the same key, [`Event::Closed`] last.
    pub fn start(
        options: ServerOptions,
        mailbox: Arc<ControlMailbox>,
        key: u64,
        watched: u8,
    ) -> Result<Self> {
        options.check()?;
        let registry = Registry::new(&options)?;
        let teller = Arc::new(Teller::new(mailbox, key));
        teller.watch(watched);
        let shared = Arc::new(Shared {
            gate: Gate::new(options.public(None)),
            clients: Arc::new(Semaphore::new(options.max_clients as usize)),
            handshakes: Handshakes::new(options.max_handshakes),
            options: Mutex::new(Arc::new(options)),
            teller,
            registry: Mutex::new(registry),
            changed: Notify::new(),
            reloads: watch::Sender::new(()),
            stopping: Stopping::default(),
            waiting: Mutex::default(),
        });
        runtime::spawn("tunnel server", run(Arc::clone(&shared)))?;
        Ok(Self { shared })
    }

    /// Other options from here on, for clients and visitors that come, and other limits for those that are there;
    /// else these keep what they began with, and their streams. Where it listens and where leases are kept stays.
    pub fn reload(&self, options: ServerOptions) -> Result<()> {
        options.check()?;
        let mut current = lock(&self.shared.options);
        current.same_place(&options)?;
        self.shared.gate.replace(options.public(Some(&self.shared.gate.current())));
        lock(&self.shared.registry).reload(&options);
        *current = Arc::new(options);
        drop(current);
        self.shared.reloads.send_replace(());
        Ok(())
    }

    /// Which of the frequent events are wanted.
    pub fn watch(&self, wanted: u8) {
        self.shared.teller.watch(wanted);
    }

    /// Takes no more clients and visitors; open streams have `drain` to end. Again, it can only be sooner.
    pub fn stop(&self, drain: Duration) {
        self.shared.stopping.ask(drain);
    }

    /// Answers when everything is closed.
    pub fn wait_closed(&self, reply: Reply) {
        let mut waiting = lock(&self.shared.waiting);
        if waiting.over {
            reply.send(Ok(Value::Unit));
        } else {
            waiting.replies.push(reply);
        }
    }

    /// Every tunnel, with what it does now.
    pub fn tunnels(&self) -> Vec<TunnelSnapshot> {
        lock(&self.shared.registry).tunnels()
    }

    /// Visitors of one tunnel, or of all: the tunnel's number with each, at most so many.
    pub fn visitors(&self, tunnel: Option<u64>, most: usize) -> Vec<(u64, VisitorStats)> {
        lock(&self.shared.registry).visitors(tunnel, most)
    }

    /// Connections whose client is not let in yet: how many there are, and how many gave way to others since the
    /// server began.
    pub fn handshakes(&self) -> (usize, u64) {
        self.shared.handshakes.counts()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// As they are now.
    fn options(&self) -> Arc<ServerOptions> {
        Arc::clone(&lock(&self.options))
    }

    fn tell(&self, notice: Notice) {
        self.teller.tell(notice);
    }

    /// Leases changed: they are written soon.
    fn leases_changed(&self) {
        self.changed.notify_one();
    }

    async fn stopped(&self) {
        self.stopping.asked().await;
    }
}

async fn run(shared: Arc<Shared>) {
    // Each client's task holds a sender: when the last one is gone, so is the last client.
    let (alive, mut all_gone) = mpsc::channel::<()>(1);
    let mut error = serve(&shared, alive).await.err();
    let _ = all_gone.recv().await;
    give_leases_back(&shared).await;
    if shared.stopping.is_asked() {
        error = None;
    }
    if let Some(error) = &error {
        shared.tell(Notice { name: "main-server-error", error: Some(error.clone()), ..Notice::default() });
    }
    shared.tell(Notice { name: "main-server-end", ..Notice::default() });
    let replies = {
        let mut waiting = lock(&shared.waiting);
        waiting.over = true;
        std::mem::take(&mut waiting.replies)
    };
    let (mailbox, key) = shared.teller.mailbox();
    mailbox.last(key, Event::Closed(error), []);
    replies.into_iter().for_each(|reply| reply.send(Ok(Value::Unit)));
}

async fn serve(shared: &Arc<Shared>, alive: mpsc::Sender<()>) -> Result<()> {
    let options = shared.options();
    let address = ListenAddress::Tcp { host: options.host.clone(), port: options.port };
    let listen = ListenOptions {
        max_connections: most_connections(&options),
        dual_stack: true,
        socket: SocketOptions {
            keepalive: Some(KEEPALIVE),
            most_unsent: MOST_UNSENT,
            ..SocketOptions::default()
        },
        ..ListenOptions::default()
    };
    let mut listener = tokio::select! {
        biased;
        () = shared.stopped() => return Ok(()),
        bound = Listener::bind(&address, &listen, Instant::now() + LOOK_UP) => bound.map_err(|error| match error.kind() {
            ErrorKind::Config => error.with_field("host"),
            // A look-up: the others are about the port.
            ErrorKind::Connect => Error::config("host", error.message()),
            _ => error,
        })?,
    };
    let addresses = listener.local_addresses();
    let port = addresses.iter().find_map(|address| match address {
        Address::Inet(address) => Some(address.port()),
        _ => None,
    });
    if let Some(file) = &options.lease_file {
        // Here, for each port has its own.
        let name = file.to_string_lossy();
        let file = match port.filter(|_| name.contains(PORT)) {
            Some(port) => PathBuf::from(name.replace(PORT, &port.to_string())),
            None => file.clone(),
        };
        tokio::select! {
            biased;
            () = shared.stopped() => return Ok(()),
            kept = registry::keep_in(&shared.registry, file) => kept?,
        }
    }
    let (mailbox, key) = shared.teller.mailbox();
    mailbox.done(key, Ok(Value::Addresses(addresses)));
    shared.tell(Notice {
        name: "main-server-start",
        port,
        secure: options.tls.is_some(),
        ..Notice::default()
    });
    let accepted = accept(shared, &mut listener, alive).await;
    // Before the port is free: who binds it next has the leases. Those who are still here change none.
    give_leases_back(shared).await;
    accepted
}

async fn accept(shared: &Arc<Shared>, listener: &mut Listener, alive: mpsc::Sender<()>) -> Result<()> {
    let mut saving = pin!(save_changes(shared, true));
    let mut failed = None;
    loop {
        tokio::select! {
            biased;
            () = shared.stopped() => return Ok(()),
            saved = &mut saving => {
                let error = saved.err();
                saving.set(save_changes(shared, error.is_none()));
                // A disk that stays full is told once.
                let (before, now) = (failed, error.as_ref().map(|error| error.message().to_owned()));
                if let Some(error) = error.filter(|_| before != now) {
                    shared.tell(Notice { name: "error", error: Some(error), ..Notice::default() });
                }
                failed = now;
            }
            accepted = listener.accept_socket() => {
                let accepted = accepted?;
                let place = shared.handshakes.enter(accepted.peer.network());
                let client = session::run(Arc::clone(shared), accepted, place, alive.clone());
                runtime::spawn("tunnel", client)?;
            }
        }
    }
}

/// Nobody who is let in waits for this. A client that comes back has another connection for a moment, and the
/// rest are handshakes.
fn most_connections(options: &ServerOptions) -> u32 {
    let most = u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX);
    options.max_clients.saturating_mul(2).saturating_add(options.max_handshakes).min(most)
}

/// Writes the leases once, when it is time to: the last time it worked or not.
async fn save_changes(shared: &Shared, worked: bool) -> Result<()> {
    if worked {
        shared.changed.notified().await;
        tokio::time::sleep(SAVE_AFTER).await;
    } else {
        let _ = tokio::time::timeout(SAVE_AGAIN, shared.changed.notified()).await;
        tokio::time::sleep(SAVE_AFTER).await;
    }
    registry::save(&shared.registry).await
}

/// From here on another server may have the file.
async fn give_leases_back(shared: &Shared) {
    if let Err(failed) = registry::close(&shared.registry, shared.stopping.left()).await {
        shared.tell(Notice { name: "error", error: Some(failed), ..Notice::default() });
    }
}

/// Why there is no port, in the words of a refusal.
fn no_port(error: &LeaseError) -> Error {
    let reason = match error {
        LeaseError::OutOfRange(_) => "port_not_allowed",
        LeaseError::Taken(_) => "port_taken",
        LeaseError::Exhausted => "no_port",
        LeaseError::TooMany(_) => "too_many_services",
    };
    let kind = match error {
        LeaseError::OutOfRange(_) => ErrorKind::PolicyDenied,
        _ => ErrorKind::ResourceLimit,
    };
    Error::new(kind, error.to_string()).with_reason(reason)
}

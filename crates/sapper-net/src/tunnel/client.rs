//! The tunnel's client: connects, shakes hands, works, and connects again.
//!
//! What is not here: the way to the server ([`hello`]), what there is for all sessions ([`stock`]), the drain ([`leaving`]),
//! what a link does while it works ([`link`](super::link)).

mod hello;
mod leaving;
mod stock;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sapper_proto::proxy_protocol::Version;
use sapper_proto::tunnel::backoff::Backoff;
use sapper_proto::tunnel::frame::Hello;
use sapper_proto::tunnel::mux::{Config, Mux};
use sapper_proto::tunnel::w3p::{ClientHandshake, Refusal, Retry};
use sapper_proto::tunnel::words::{
    ClientWords, LONGEST_LEASE, LONGEST_NAME, MOST_SERVICES, ServerWords, is_lease, is_name,
};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

use self::hello::{Granted, Refused, about, connect, refused};
use self::leaving::{Away, leave};
use self::stock::{Mine, Stock};
use super::limit::Limits;
use super::link::{End, Exit, Link};
use super::live::Live;
use super::notice::{Notice, ServiceInfo, Teller};
use super::rest::Rests;
use super::served::{Served, ServiceStats};
use super::service::{Exposed, ORIGIN, Target};
use super::stopping::Stopping;
use super::{Common, TunnelStats, VisitorStats, entropy, random};
use crate::bridge::{ControlMailbox, Event, Reply, Value};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::runtime;
use crate::tls::{Role, SharedTlsConfig};

/// As the original: a peer that is gone without a word is found out.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Bytes of what tells this process from others.
const INSTANCE: usize = 16;
/// Behind a tunnel that stood for so long the pauses begin anew. An attempt that only took long is a failure.
const WORKED: Duration = Duration::from_secs(1);

/// A client's options.
#[derive(Clone)]
pub struct ClientOptions {
    /// The server.
    pub host: String,
    /// Its main port.
    pub port: u16,
    /// What is exposed, at least one. Original servers take no more.
    pub services: Vec<Exposed>,
    /// What it says of itself, a JSON object.
    pub credentials: String,
    /// TLS to the server, and the name to check.
    pub tls: Option<(SharedTlsConfig, Option<String>)>,
    /// Whose public port it wants, whatever its credentials are.
    pub lease: Option<String>,
    /// First and longest pause before it connects again; `None`: it does not.
    pub reconnect: Option<(Duration, Duration)>,
    /// How long the service may take to answer.
    pub dial_timeout: Duration,
    /// The service hears who visits, in a header of this version.
    pub send_proxy: Option<Version>,
    /// Visitors at a time; a server of ours sends more away.
    pub max_streams: u32,
    /// What may pass to all services together.
    pub limits: Limits,
    /// What both ends have.
    pub common: Common,
}

impl ClientOptions {
    fn check(&self) -> Result<()> {
        ClientHandshake::new(&self.credentials, Duration::MAX)
            .map_err(|error| Error::config("authentication_credentials", error.to_string()))?;
        if let Some((config, name)) = &self.tls {
            config.check(&Role::Client { server_name: name.clone() })?;
        }
        if self.services.is_empty() || self.services.len() > MOST_SERVICES {
            return Err(Error::config("services", format!("must be 1 to {MOST_SERVICES}")));
        }
        // What a server would pass over, or refuse for a list that is none.
        if self.lease.as_ref().is_some_and(|lease| !is_lease(lease)) {
            return Err(Error::config("lease", format!("must be 1 to {LONGEST_LEASE} bytes long")));
        }
        let mut names = self.services.iter().map(|exposed| &*exposed.asked.name);
        if let Some(name) = names.find(|name| !is_name(name)) {
            let text = format!("{name:?} is longer than {LONGEST_NAME} bytes, or not printable");
            return Err(Error::config("services", text));
        }
        self.fits_hello()?;
        self.limits.check("limits")?;
        self.services.iter().try_for_each(|exposed| exposed.limits.check("services"))?;
        if self.max_streams == 0 {
            return Err(Error::config("max_streams", "must be at least 1"));
        }
        Ok(())
    }

    /// What does not would be cut off, and not be understood.
    fn fits_hello(&self) -> Result<()> {
        let words = ClientWords {
            instance: "0".repeat(2 * INSTANCE),
            origin: "0".repeat(ORIGIN),
            lease: self.lease.clone(),
            services: self.services.iter().map(|exposed| exposed.asked.clone()).collect(),
        };
        let (length, most) = (words.encode().len(), Hello::LONGEST_APPLICATION);
        if length > most {
            let text = format!(
                "what the server is told of them has {length} bytes, maximum is {most}: expose fewer, or call them by shorter names"
            );
            return Err(Error::config("services", text).with_reason("out_of_range"));
        }
        Ok(())
    }

    fn target(&self, exposed: &Exposed) -> Target {
        Target { service: exposed.service.clone(), timeout: self.dial_timeout, proxy: self.send_proxy }
    }
}

/// The handle. Dropped, the client ends.
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: Mutex<Arc<ClientOptions>>,
    stock: Mutex<Stock>,
    /// Others are there: a pause is over.
    reloaded: Notify,
    /// The same for the tunnel at work: it looks for other limits.
    reloads: watch::Sender<()>,
    stopping: Stopping,
    waiting: Mutex<Waiting>,
    teller: Arc<Teller>,
    live: Arc<Live>,
    exposed: Mutex<Exposure>,
}

/// The services with their public ports, while they have them.
#[derive(Clone, Default)]
struct Exposure {
    services: Vec<ServiceInfo>,
    /// Whether visitors speak TLS to the server there, as it said when the session began.
    tls: bool,
}

impl Shared {
    fn exposed(&self) -> MutexGuard<'_, Exposure> {
        lock(&self.exposed)
    }
}

#[derive(Default)]
struct Waiting {
    replies: Vec<Reply>,
    over: bool,
}

impl Client {
    /// Starts it. What happens is told under `key`; [`Event::Closed`] last.
    pub fn start(
        options: ClientOptions,
        mailbox: Arc<ControlMailbox>,
        key: u64,
        watched: u8,
    ) -> Result<Self> {
        // Refused before anything is done.
        options.check()?;
        let teller = Arc::new(Teller::new(mailbox, key));
        teller.watch(watched);
        let shared = Arc::new(Shared {
            stock: Mutex::new(Stock::default().renewed(&options)),
            options: Mutex::new(Arc::new(options)),
            reloaded: Notify::new(),
            reloads: watch::Sender::new(()),
            stopping: Stopping::default(),
            waiting: Mutex::default(),
            teller,
            live: Arc::default(),
            exposed: Mutex::default(),
        });
        runtime::spawn("tunnel client", run(Arc::clone(&shared)))?;
        Ok(Self { shared })
    }

    /// Other limits at once; another address of a service from the next visitor on; another server, other
    /// credentials and all else from the next connection to the server on, other services from the next session on.
    /// Streams that are there stay.
    pub fn reload(&self, options: ClientOptions) -> Result<()> {
        options.check()?;
        // Both at once: one says what the other has.
        let mut current = lock(&self.shared.options);
        let mut stock = lock(&self.shared.stock);
        *stock = std::mem::take(&mut *stock).renewed(&options);
        *current = Arc::new(options);
        drop((stock, current));
        self.shared.reloaded.notify_one();
        self.shared.reloads.send_replace(());
        Ok(())
    }

    /// Which of the frequent events are wanted.
    pub fn watch(&self, wanted: u8) {
        self.shared.teller.watch(wanted);
    }

    /// Ends it; open streams have `drain` to end. Again, it can only be sooner.
    pub fn stop(&self, drain: Duration) {
        self.shared.stopping.ask(drain);
    }

    /// Answers when it has ended.
    pub fn wait_closed(&self, reply: Reply) {
        let mut waiting = lock(&self.shared.waiting);
        if waiting.over {
            reply.send(Ok(Value::Unit));
        } else {
            waiting.replies.push(reply);
        }
    }

    /// What it does, and its services with their public ports while they have them.
    pub fn stats(&self) -> (Vec<ServiceStats>, TunnelStats) {
        let services = self.shared.live.services();
        let exposed = self.shared.exposed();
        let named = |info: &ServiceInfo| {
            let stats = services.iter().find(|stats| stats.info.name == info.name).cloned();
            ServiceStats { info: info.clone(), ..stats.unwrap_or_default() }
        };
        (exposed.services.iter().map(named).collect(), self.shared.live.stats())
    }

    /// Its visitors, those who came first, at most so many.
    pub fn visitors(&self, most: usize) -> Vec<VisitorStats> {
        self.shared.live.visitors(most)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn run(shared: Arc<Shared>) {
    let mut rests = Rests::default();
    let mut error = work(&shared, &mut rests).await.err();
    if shared.stopping.is_asked() {
        error = None;
    }
    *shared.exposed() = Exposure::default();
    tokio::select! {
        biased;
        () = rests.delivered() => {}
        () = shared.stopping.asked() => shared.stopping.drain(rests.delivered()).await,
    }
    drop(rests);
    if error.is_some() {
        shared.teller.tell(Notice { name: "error", error: error.clone(), ..Notice::default() });
    }
    shared.teller.tell(Notice { name: "tunnel-client-end", ..Notice::default() });
    let replies = {
        let mut waiting = lock(&shared.waiting);
        waiting.over = true;
        std::mem::take(&mut waiting.replies)
    };
    let (mailbox, key) = shared.teller.mailbox();
    mailbox.last(key, Event::Closed(error), []);
    replies.into_iter().for_each(|reply| reply.send(Ok(Value::Unit)));
}

async fn work(shared: &Shared, rests: &mut Rests) -> Result<()> {
    let instance: [u8; INSTANCE] = random()?;
    let instance: String = instance.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut backoff = Backoff::new(Duration::ZERO, Duration::ZERO);
    let mut pauses = None;
    // The way to the server that has worked: it speaks what we do there.
    let mut stood = None;
    let mut link: Option<Link> = None;
    let mut reloads = shared.reloads.subscribe();
    loop {
        let (options, mine) = {
            let options = lock(&shared.options);
            let mine = lock(&shared.stock).mine(&instance, &options);
            (Arc::clone(&options), mine)
        };
        let options = &*options;
        let way = (options.host.clone(), options.port, options.tls.is_some());
        let granted = tokio::select! {
            biased;
            () = shared.stopping.asked() => {
                if let Some(link) = &mut link {
                    leave(link, Away(true), &mine, shared, rests).await;
                }
                return Ok(());
            }
            granted = connect(options, shared, stood.as_ref() == Some(&way)) => granted,
            () = keep_alive(&mut link, rests) => unreachable!("it never returns"),
        };
        if granted.is_ok() {
            stood = Some(way);
        }
        let (mut ended, mut retry) = match granted {
            Ok(granted) => match attach(&mut link, granted, &mine, options, shared, rests) {
                Ok(created) => {
                    let working = link.as_mut().expect("it was attached");
                    let heard = (&mut reloads, &mut *rests);
                    let ended = tunnel(working, created, (options, &mine), shared, heard).await;
                    match ended.left {
                        Left::Session => {}
                        Left::Rest => rests.add(link.take()),
                        Left::Nothing => link = None,
                    }
                    if shared.stopping.is_asked() {
                        return Ok(());
                    }
                    if ended.worked {
                        backoff.reset();
                    }
                    (ended.error, ended.retry)
                }
                Err(error) => (Some(error), Retry::Usual),
            },
            Err(Refused { error, retry }) => {
                shared.teller.tell(Notice {
                    name: "tunnel-error",
                    error: Some(error.clone()),
                    ..Notice::default()
                });
                (Some(error), retry)
            }
        };
        if link.is_none() {
            *shared.exposed() = Exposure::default();
        }
        let reconnect = lock(&shared.options).reconnect;
        match reconnect {
            None => retry = Retry::Never,
            Some((first, longest)) if pauses != reconnect => backoff = Backoff::new(first, longest),
            Some(_) => {}
        }
        pauses = reconnect;
        let pause = match retry {
            Retry::Never => return ended.take().map_or(Ok(()), Err),
            Retry::Usual => backoff.next(entropy()),
            Retry::After(least) => backoff.next_after(least, entropy()),
        };
        let seconds = Some(pause.as_secs_f64());
        shared.teller.tell(Notice { name: "tunnel-reconnect-queued", seconds, ..Notice::default() });
        tokio::select! {
            biased;
            () = shared.stopping.asked() => {
                if let Some(link) = &mut link {
                    leave(link, Away(true), &mine, shared, rests).await;
                }
                return Ok(());
            }
            () = sleep(pause) => {}
            () = shared.reloaded.notified() => {}
            () = keep_alive(&mut link, rests) => unreachable!("it never returns"),
        }
    }
}

/// Streams go on while there is no carrier: what was received is delivered, and their grace ends.
async fn keep_alive(link: &mut Option<Link>, rests: &mut Rests) {
    while let Some(working) = link {
        let exit = tokio::select! {
            biased;
            () = rests.delivered_and_on() => unreachable!("it never returns"),
            exit = working.run() => exit,
        };
        match exit {
            Exit::Broken(_) => *link = None,
            Exit::Expired | Exit::Idle => rests.add(link.take()),
            Exit::Hello(_) | Exit::Resumed | Exit::CarrierLost(..) => {}
        }
    }
    rests.delivered_and_on().await
}

/// Puts the carrier under the session that waits for it, or under a new one. The moment, where that makes the tunnel;
/// a server of ours has still to say so.
fn attach(
    link: &mut Option<Link>,
    granted: Granted,
    mine: &Mine,
    options: &ClientOptions,
    shared: &Shared,
    rests: &mut Rests,
) -> Result<Option<Instant>> {
    let Granted { carrier, rest, port, capabilities } = granted;
    if capabilities.is_some()
        && let Some(waiting) = link
    {
        let now = waiting.now();
        if waiting.mux().reattach(mine.words.clone(), now) {
            waiting.set_carrier(carrier, &rest);
            return Ok(None);
        }
    }
    // What was before is over.
    rests.add(link.take());
    let began = Instant::now();
    let application = capabilities.map(|_| mine.words.clone());
    let config = Config { max_streams: options.max_streams, ..options.common.mux() };
    let mut mux = Mux::initiator(config, application, Duration::ZERO);
    mux.share(Arc::clone(super::budget()));
    let end = End::Client(Arc::clone(&mine.dialers));
    let made = link.insert(Link::new(mux, carrier, &rest, end, Arc::clone(&shared.teller), began));
    made.set_live(Arc::clone(&shared.live));
    made.set_quota(mine.quota.clone());
    let infos = named(&options.services, &[], &[]).into_iter();
    made.set_services(infos.zip(&mine.meters).map(|(info, meter)| Served::new(info, meter.clone())));
    if capabilities.is_none() {
        acknowledged(shared, named(&options.services, &[port], &[]), false);
    }
    Ok(capabilities.is_none().then_some(began))
}

/// The services by their names, with the ports that are known, and where those are.
fn named(services: &[Exposed], ports: &[u16], hosts: &[Option<String>]) -> Vec<ServiceInfo> {
    let ports = ports.iter().copied().chain(std::iter::repeat(0));
    let name = |(at, (exposed, port)): (usize, (&Exposed, u16))| ServiceInfo {
        name: exposed.asked.name.clone(),
        port,
        host: hosts.get(at).cloned().unwrap_or_else(|| {
            // A server that does not tell has it where it was asked to.
            let asked = exposed.asked.host.filter(|host| !host.is_unspecified());
            asked.map(|host| host.to_canonical().to_string())
        }),
    };
    services.iter().zip(ports).enumerate().map(name).collect()
}

fn acknowledged(shared: &Shared, services: Vec<ServiceInfo>, tls: bool) {
    *shared.exposed() = Exposure { services: services.clone(), tls };
    let port = services.first().map(|service| service.port);
    let name = "authentication-acknowledged";
    shared.teller.tell(Notice { name, port, services, secure: tls, ..Notice::default() });
}

/// How a tunnel ended.
struct Ended {
    error: Option<Error>,
    left: Left,
    retry: Retry,
    /// Whether there was a tunnel, for long enough.
    worked: bool,
}

/// What is left of a tunnel without a carrier.
enum Left {
    /// The streams wait for another one.
    Session,
    /// What has only to be delivered is.
    Rest,
    /// The streams are cut: nobody may take what came for the whole.
    Nothing,
}

/// Works until the carrier is gone, or the server refuses.
async fn tunnel(
    link: &mut Link,
    mut created: Option<Instant>,
    (options, mine): (&ClientOptions, &Mine),
    shared: &Shared,
    (reloads, rests): (&mut watch::Receiver<()>, &mut Rests),
) -> Ended {
    let disconnected = |created: Option<Instant>, error: Option<Error>, left, retry| {
        if error.is_some() {
            shared.teller.tell(Notice { name: "tunnel-error", error: error.clone(), ..Notice::default() });
        }
        let notice = Notice { name: "tunnel-disconnected", error: error.clone(), ..Notice::default() };
        shared.teller.tell(notice);
        Ended { error, left, retry, worked: created.is_some_and(|at| at.elapsed() >= WORKED) }
    };
    loop {
        let exit = tokio::select! {
            biased;
            () = shared.stopping.asked() => {
                leave(link, Away(false), mine, shared, rests).await;
                return disconnected(created, None, Left::Nothing, Retry::Usual);
            }
            () = rests.delivered_and_on() => unreachable!("it never returns"),
            Ok(()) = reloads.changed() => {
                lock(&shared.stock).renew_limits(link);
                continue;
            }
            exit = link.run() => exit,
        };
        match exit {
            Exit::Hello(hello) => match ServerWords::parse(&hello.application, options.services.len()) {
                Some(ServerWords::Granted { ports, tls, hosts }) => {
                    created = Some(Instant::now());
                    acknowledged(shared, named(&options.services, &ports, &hosts), tls);
                }
                Some(ServerWords::Refused { refusal, service }) => {
                    let Refused { error, retry } = refused(about(refusal, service, &options.services));
                    return disconnected(created, Some(error), Left::Rest, retry);
                }
                None => {
                    let text = "the server's hello does not say a public port for each service";
                    let error = Error::new(ErrorKind::RemoteProtocol, text).with_phase(Phase::Handshake);
                    return disconnected(created, Some(error), Left::Nothing, Retry::Usual);
                }
            },
            Exit::Resumed => {
                created = Some(Instant::now());
                let Exposure { services, tls } = shared.exposed().clone();
                acknowledged(shared, services, tls);
            }
            Exit::CarrierLost(..) | Exit::Idle if link.is_replaced() => {
                let error = refused(Refusal {
                    code: "replaced".to_owned(),
                    message: "another client has this lease now".to_owned(),
                    retry: Retry::Never,
                });
                return disconnected(created, Some(error.error), Left::Nothing, error.retry);
            }
            Exit::CarrierLost(error, waits) => {
                let waits = waits && lock(&shared.options).reconnect.is_some();
                let left = if waits { Left::Session } else { Left::Rest };
                return disconnected(created, error, left, Retry::Usual);
            }
            Exit::Broken(error) => return disconnected(created, Some(error), Left::Nothing, Retry::Usual),
            Exit::Expired | Exit::Idle => return disconnected(created, None, Left::Rest, Retry::Usual),
        }
    }
}

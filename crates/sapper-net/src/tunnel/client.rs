//! The tunnel's client: connects, shakes hands, works, and connects again.
//!
//! What is not here: what a link does while it works ([`link`](super::link)).

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sapper_proto::proxy_protocol::Version;
use sapper_proto::tunnel::backoff::Backoff;
use sapper_proto::tunnel::frame::{Capabilities, Code};
use sapper_proto::tunnel::mux::Mux;
use sapper_proto::tunnel::w3p::{Acknowledgement, ClientHandshake, Refusal, Retry};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::greeting::{self, ClientWords, final_port};
use super::link::{End, Exit, Link};
use super::live::Live;
use super::notice::{Notice, Teller};
use super::public::shake;
use super::service::{Dialer, Service, Target};
use super::{Common, MOST_UNSENT, TunnelStats, VisitorStats, entropy, random};
use crate::bridge::{ControlMailbox, Event, Reply, Value};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::runtime;
use crate::stream::connect::{ConnectOptions, connect_tcp};
use crate::stream::fd::SocketOptions;
use crate::stream::{BoxStream, ops};
use crate::tls::{Role, SharedTlsConfig};

/// As the original: a peer that is gone without a word is found out.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// A session that worked for so long begins its pauses anew.
const WORKED: Duration = Duration::from_secs(1);

/// A client's options.
#[derive(Clone)]
pub struct ClientOptions {
    /// The server.
    pub host: String,
    /// Its main port.
    pub port: u16,
    /// What is exposed.
    pub service: Service,
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
        Ok(())
    }

    fn target(&self) -> Target {
        let Self { service, dial_timeout, send_proxy, .. } = self;
        Target { service: service.clone(), timeout: *dial_timeout, proxy: *send_proxy }
    }
}

/// The handle. Dropped, the client ends.
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: Mutex<Arc<ClientOptions>>,
    dialer: Arc<Dialer>,
    /// Others are there: a pause is over.
    reloaded: Notify,
    stopping: watch::Sender<Option<Duration>>,
    waiting: Mutex<Waiting>,
    teller: Arc<Teller>,
    live: Arc<Live>,
    port: AtomicU16,
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
            dialer: Dialer::new(options.target()),
            options: Mutex::new(Arc::new(options)),
            reloaded: Notify::new(),
            stopping: watch::Sender::new(None),
            waiting: Mutex::default(),
            teller,
            live: Arc::default(),
            port: AtomicU16::new(0),
        });
        runtime::spawn("tunnel client", run(Arc::clone(&shared)))?;
        Ok(Self { shared })
    }

    /// Another service from the next visitor on; another server, other credentials and all else from the next
    /// connection to the server on. Streams that are there stay.
    pub fn reload(&self, options: ClientOptions) -> Result<()> {
        options.check()?;
        self.shared.dialer.replace(options.target());
        *lock(&self.shared.options) = Arc::new(options);
        self.shared.reloaded.notify_one();
        Ok(())
    }

    /// Which of the frequent events are wanted.
    pub fn watch(&self, wanted: u8) {
        self.shared.teller.watch(wanted);
    }

    /// Ends it; open streams have `drain` to end.
    pub fn stop(&self, drain: Duration) {
        self.shared.stopping.send_modify(|stopping| {
            *stopping = Some(stopping.map_or(drain, |before| before.min(drain)));
        });
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

    /// What it does, and its public port while it has one.
    pub fn stats(&self) -> (Option<u16>, TunnelStats) {
        let port = self.shared.port.load(Ordering::Relaxed);
        ((port != 0).then_some(port), self.shared.live.stats())
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

/// What a server granted.
struct Granted {
    carrier: BoxStream,
    rest: Vec<u8>,
    port: u16,
    capabilities: Option<Capabilities>,
}

/// Why there is no tunnel, and whether another try may help.
struct Refused {
    error: Error,
    retry: Retry,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        // What a certificate or an option says will be so the next time; but servers are mended and restarted.
        let retry = if error.kind() == ErrorKind::Config { Retry::Never } else { Retry::Usual };
        Self { error, retry }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn run(shared: Arc<Shared>) {
    let mut stopping = shared.stopping.subscribe();
    let mut error = work(&shared, &mut stopping).await.err();
    if stopping.borrow().is_some() {
        error = None;
    }
    shared.port.store(0, Ordering::Relaxed);
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

async fn stopped(stopping: &mut watch::Receiver<Option<Duration>>) {
    // Its sender is in the shared state, which outlives this.
    let _ = stopping.wait_for(Option::is_some).await;
}

async fn work(shared: &Shared, stopping: &mut watch::Receiver<Option<Duration>>) -> Result<()> {
    let instance: [u8; 16] = random()?;
    let instance: String = instance.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut backoff = Backoff::new(Duration::ZERO, Duration::ZERO);
    let mut pauses = None;
    let mut link: Option<Link> = None;
    loop {
        let options = Arc::clone(&lock(&shared.options));
        let options = &*options;
        if pauses != options.reconnect {
            let (first, longest) = options.reconnect.unwrap_or_default();
            backoff = Backoff::new(first, longest);
            pauses = options.reconnect;
        }
        let words = ClientWords { instance: instance.clone(), lease: options.lease.clone() }.encode();
        let began = Instant::now();
        let granted = tokio::select! {
            biased;
            () = stopped(stopping) => return Ok(()),
            granted = connect(options, shared) => granted,
            () = keep_alive(&mut link) => unreachable!("it never returns"),
        };
        let (mut ended, mut retry) = match granted {
            Ok(granted) => match attach(&mut link, granted, &words, options, shared) {
                Ok(()) => {
                    let working = link.as_mut().expect("it was attached");
                    let ended = tunnel(working, shared, stopping).await;
                    if !ended.1 {
                        link = None;
                    }
                    if stopping.borrow().is_some() {
                        return Ok(());
                    }
                    (ended.0, Retry::Usual)
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
            shared.port.store(0, Ordering::Relaxed);
        }
        if began.elapsed() >= WORKED {
            backoff.reset();
        }
        if lock(&shared.options).reconnect.is_none() {
            retry = Retry::Never;
        }
        let pause = match retry {
            Retry::Never => return ended.take().map_or(Ok(()), Err),
            Retry::Usual => backoff.next(entropy()),
            Retry::After(least) => backoff.next_after(least, entropy()),
        };
        let seconds = Some(pause.as_secs_f64());
        shared.teller.tell(Notice { name: "tunnel-reconnect-queued", seconds, ..Notice::default() });
        tokio::select! {
            biased;
            () = stopped(stopping) => return Ok(()),
            () = sleep(pause) => {}
            () = shared.reloaded.notified() => {}
            () = keep_alive(&mut link) => unreachable!("it never returns"),
        }
    }
}

/// Streams go on while there is no carrier: what was received is delivered, and their grace ends.
async fn keep_alive(link: &mut Option<Link>) {
    while let Some(working) = link {
        let exit = working.run().await;
        if let Exit::Expired | Exit::Broken(_) | Exit::Idle = exit {
            *link = None;
        }
    }
    std::future::pending().await
}

/// A carrier with a finished handshake.
async fn connect(options: &ClientOptions, shared: &Shared) -> std::result::Result<Granted, Refused> {
    let limit = options.common.handshake_timeout;
    let socket = SocketOptions { keepalive: Some(KEEPALIVE), most_unsent: Some(MOST_UNSENT) };
    let how = ConnectOptions { socket, ..ConnectOptions::default() };
    let stream = connect_tcp(&options.host, options.port, &how, Instant::now() + limit).await?;
    let mut carrier: BoxStream = Box::new(stream);
    if let Some((config, name)) = &options.tls {
        let role = Role::Client { server_name: name.clone() };
        let shaken = shake(carrier, Arc::clone(config), role, Vec::new(), limit).await;
        carrier = shaken.map_err(greeting::perhaps_plain)?;
    }
    let tell = |name| shared.teller.tell(Notice { name, ..Notice::default() });
    tell("tunnel-connection-established");
    let handshake = ClientHandshake::new(&options.credentials, limit)
        .map_err(|error| Error::config("authentication_credentials", error.to_string()))?;
    let talk = async {
        ops::write_all(carrier.as_mut(), handshake.message()).await?;
        ops::flush(carrier.as_mut()).await?;
        tell("authentication-credentials-sent");
        greeting::acknowledgement(&mut carrier, &handshake, || tell("tunnel-protocol-confirmed")).await
    };
    let (answer, rest) = timeout(limit, talk).await.unwrap_or_else(|_| {
        let text = format!("the server did not answer within {:.0} s", limit.as_secs_f64());
        Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake))
    })?;
    match answer {
        Acknowledgement::Refused(refusal) => Err(refused(refusal)),
        Acknowledgement::Accepted { port, offer } => {
            let capabilities = offer.and_then(|offer| offer.common(Capabilities::ALL));
            Ok(Granted { carrier, rest, port, capabilities })
        }
    }
}

fn refused(Refusal { code, message, retry }: Refusal) -> Refused {
    let kind = if code == "rejected" { ErrorKind::CredentialsRejected } else { ErrorKind::Connect };
    let text = if message.is_empty() { code } else { message };
    let error = Error::new(kind, text).with_phase(Phase::Handshake).with_reason("refused");
    Refused { error, retry }
}

/// Puts the carrier under the session that waits for it, or under a new one.
fn attach(
    link: &mut Option<Link>,
    granted: Granted,
    words: &[u8],
    options: &ClientOptions,
    shared: &Shared,
) -> Result<()> {
    let Granted { carrier, rest, port, capabilities } = granted;
    if capabilities.is_some()
        && let Some(waiting) = link
    {
        let now = waiting.now();
        if waiting.mux().reattach(words.to_vec(), now) {
            waiting.set_carrier(carrier, &rest);
            return Ok(());
        }
    }
    // What was before is over: streams are cut when it is dropped.
    *link = None;
    let began = Instant::now();
    let application = capabilities.map(|_| words.to_vec());
    let mut mux = Mux::initiator(options.common.mux(), application, Duration::ZERO);
    mux.share(Arc::clone(super::budget()));
    let end = End::Client(Arc::clone(&shared.dialer));
    *link = Some(Link::new(mux, carrier, &rest, end, Arc::clone(&shared.teller), began));
    if capabilities.is_none() {
        acknowledged(shared, port);
    }
    Ok(())
}

fn acknowledged(shared: &Shared, port: u16) {
    shared.port.store(port, Ordering::Relaxed);
    shared.teller.tell(Notice { name: "authentication-acknowledged", port: Some(port), ..Notice::default() });
}

/// Works until the carrier is gone; what was wrong, and whether the streams wait for another one.
async fn tunnel(
    link: &mut Link,
    shared: &Shared,
    stopping: &mut watch::Receiver<Option<Duration>>,
) -> (Option<Error>, bool) {
    link.set_live(Arc::clone(&shared.live));
    let disconnected = |error: &Option<Error>| {
        if let Some(error) = error {
            shared.teller.tell(Notice {
                name: "tunnel-error",
                error: Some(error.clone()),
                ..Notice::default()
            });
        }
        let notice = Notice { name: "tunnel-disconnected", error: error.clone(), ..Notice::default() };
        shared.teller.tell(notice);
    };
    loop {
        let exit = tokio::select! {
            biased;
            () = stopped(stopping) => {
                let drain = stopping.borrow().unwrap_or_default();
                link.leave(Code::SHUTDOWN, "the client stops");
                let _ = timeout(drain, drained(link)).await;
                disconnected(&None);
                return (None, false);
            }
            exit = link.run() => exit,
        };
        match exit {
            Exit::Hello(hello) => {
                let port = final_port(&hello.application);
                acknowledged(shared, port.unwrap_or_default());
            }
            Exit::Resumed => acknowledged(shared, shared.port.load(Ordering::Relaxed)),
            Exit::CarrierLost(error, waits) => {
                disconnected(&error);
                return (error, waits && lock(&shared.options).reconnect.is_some());
            }
            Exit::Broken(error) => {
                let error = Some(error);
                disconnected(&error);
                return (error, false);
            }
            Exit::Expired | Exit::Idle => {
                disconnected(&None);
                return (None, false);
            }
        }
    }
}

/// Works until nothing is open any more, or the carrier is gone.
pub(super) async fn drained(link: &mut Link) {
    loop {
        match link.run().await {
            Exit::Hello(_) | Exit::Resumed => {}
            _ => return,
        }
    }
}

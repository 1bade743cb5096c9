//! The handle: what any thread may ask of a proxy, and what it shares with its tasks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::limits::Buckets;
use super::metrics::{ConnectionSnapshot, Metrics, ProxyEvent, ProxyState, ProxyStats};
use super::{Listen, ProxyOptions, Service, ServiceOptions, accept};
use crate::bridge::{Event, Reply, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::handshakes::{Handshake, Handshakes, Progress};
use crate::runtime;
use crate::stream::address::Address;
use crate::stream::listen::{ListenOptions, Listener, ListenerStats};

/// A proxy. Every method returns at once; what takes time answers through a [`Reply`].
pub struct Proxy {
    shared: Arc<Shared>,
    launch: Mutex<Option<Launch>>,
}

/// What the accepting task is made from.
pub(super) struct Launch {
    pub(super) listen: Vec<Listen>,
    pub(super) options: ListenOptions,
}

/// What the handle, the accepting task and the connections share.
pub(super) struct Shared {
    service: RwLock<Arc<Service>>,
    pub(super) metrics: Metrics,
    pub(super) buckets: Mutex<Buckets>,
    pub(super) handshakes: Mutex<Arc<Handshakes>>,
    /// Connections whose handshake is not done: they give way where `max_connections` are open.
    pub(super) unserved: Arc<Handshakes>,
    events: Reply,
    life: Mutex<Life>,
    /// Ports of TCP that it listens at.
    ports: OnceLock<Vec<u16>>,
    /// Wakes the accepting task: a drain, or its new deadline.
    pub(super) stop_wanted: Notify,
    /// Wakes it when a connection's task is over.
    pub(super) one_less: Notify,
    /// Everything that is still open ends now.
    pub(super) cut: Moment,
    /// Handshakes that are not done end now.
    pub(super) no_more_handshakes: Moment,
}

/// What comes once, and what many wait for.
#[derive(Default)]
pub(super) struct Moment {
    is_here: AtomicBool,
    wanted: Notify,
}

impl Moment {
    pub(super) fn comes(&self) {
        self.is_here.store(true, Ordering::SeqCst);
        self.wanted.notify_waiters();
    }

    pub(super) fn is_here(&self) -> bool {
        self.is_here.load(Ordering::SeqCst)
    }

    /// Ready when it is here.
    pub(super) async fn come(&self) {
        loop {
            let mut notified = std::pin::pin!(self.wanted.notified());
            notified.as_mut().enable();
            if self.is_here() {
                return;
            }
            notified.await;
        }
    }
}

#[derive(Default)]
struct Life {
    state: ProxyState,
    stop_at: Option<Instant>,
    waiting: Vec<Reply>,
    listener: Option<Arc<ListenerStats>>,
}

impl Proxy {
    /// Checks the options. Events go to `events`.
    pub fn new(options: ProxyOptions, events: Reply) -> Result<Self> {
        runtime::ensure_running()?;
        let ProxyOptions { listen, listen_options, service } = options;
        if listen.is_empty() {
            return Err(Error::config("listen", "a proxy needs an address to listen at"));
        }
        let service = Service::check(service)?;
        let handshakes = Handshakes::new(service.max_handshakes);
        let shared = Shared {
            service: RwLock::new(Arc::new(service)),
            metrics: Metrics::default(),
            buckets: Mutex::default(),
            handshakes: Mutex::new(handshakes),
            unserved: Handshakes::among_connections(),
            events,
            life: Mutex::default(),
            ports: OnceLock::new(),
            stop_wanted: Notify::new(),
            one_less: Notify::new(),
            cut: Moment::default(),
            no_more_handshakes: Moment::default(),
        };
        let launch = Launch { listen, options: listen_options };
        Ok(Self { shared: Arc::new(shared), launch: Mutex::new(Some(launch)) })
    }

    /// Listens and accepts from now on. Answers [`Value::Addresses`]: where.
    pub fn start(&self, reply: Reply) {
        let launch = self.launch.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(launch) = launch else {
            let closed = self.shared.state() == ProxyState::Closed || self.shared.stop_at().is_some();
            return reply.send(Err(if closed {
                Error::new(ErrorKind::Closed, "the proxy is closed")
            } else {
                Error::new(ErrorKind::ApiMisuse, "the proxy was started already")
            }));
        };
        if let Err(error) = runtime::ensure_running() {
            return reply.send(Err(error));
        }
        let task = accept::run(launch, Arc::clone(&self.shared), reply);
        if let Err(error) = runtime::spawn("proxy", task) {
            tracing::error!(%error, "a proxy's task cannot be made");
        }
    }

    /// Serves new connections by other options; those that are open keep theirs.
    pub fn reload(&self, service: ServiceOptions) -> Result<()> {
        let service = Arc::new(Service::check(service)?);
        let mut current = self.shared.service.write().unwrap_or_else(PoisonError::into_inner);
        if current.max_handshakes != service.max_handshakes {
            // Handshakes that are under way give their places back to the old one.
            let places = Handshakes::new(service.max_handshakes);
            *self.shared.handshakes.lock().unwrap_or_else(PoisonError::into_inner) = places;
        }
        *current = service;
        Ok(())
    }

    /// Accepts no more and waits for the open connections to end, at most for `drain`; what is open then is
    /// cut. Repeated calls may only shorten it. Never fails.
    pub fn stop(&self, drain: Duration) {
        self.shared.request_stop(drain);
        // One that never started has no task to end.
        if self.launch.lock().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            self.shared.close(None);
        }
    }

    /// Answers [`Value::Unit`] when everything is closed and given back.
    pub fn wait_closed(&self, reply: Reply) {
        let mut life = self.shared.life();
        if life.state == ProxyState::Closed {
            drop(life);
            reply.send(Ok(Value::Unit));
        } else {
            life.waiting.push(reply);
        }
    }

    /// Where its life is.
    pub fn state(&self) -> ProxyState {
        self.shared.state()
    }

    /// Counters now.
    pub fn stats(&self) -> ProxyStats {
        let mut stats = self.shared.metrics.stats();
        let life = self.shared.life();
        stats.state = life.state;
        if let Some(listener) = &life.listener {
            stats.limit_pauses = listener.limit_pauses.get();
            stats.exhausted_pauses = listener.exhausted_pauses.get();
        }
        stats.rate_addresses =
            self.shared.buckets.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        stats
    }

    /// The open connections, oldest first.
    pub fn connections(&self) -> Vec<ConnectionSnapshot> {
        self.shared.metrics.connections()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl Shared {
    /// What a new connection is served by.
    pub(super) fn service(&self) -> Arc<Service> {
        Arc::clone(&self.service.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A place among the handshakes for a client from there.
    pub(super) fn shakes_hands(&self, source: &Address) -> Handshake {
        let handshakes = Arc::clone(&self.handshakes.lock().unwrap_or_else(PoisonError::into_inner));
        let place = handshakes.enter(source.network());
        place.reached(Progress::Speaks);
        place
    }

    pub(super) fn tell(&self, event: ProxyEvent) {
        self.events.mailbox.event(self.events.key, Event::Proxy(Box::new(event)));
    }

    fn state(&self) -> ProxyState {
        self.life().state
    }

    pub(super) fn set_state(&self, state: ProxyState) {
        self.life().state = state;
    }

    pub(super) fn set_listener(&self, listener: &Listener) {
        let port = |address| match address {
            Address::Inet(address) => Some(address.port()),
            _ => None,
        };
        // Set once: a proxy starts once.
        let _ = self.ports.set(listener.local_addresses().into_iter().filter_map(port).collect());
        self.life().listener = Some(Arc::clone(listener.stats()));
    }

    pub(super) fn ports(&self) -> &[u16] {
        self.ports.get().map_or(&[], Vec::as_slice)
    }

    fn request_stop(&self, drain: Duration) {
        let at = Instant::now() + drain;
        let mut life = self.life();
        if life.stop_at.is_none_or(|earlier| at < earlier) {
            life.stop_at = Some(at);
        }
        drop(life);
        self.stop_wanted.notify_one();
    }

    /// When the drain that was asked for is over.
    pub(super) fn stop_at(&self) -> Option<Instant> {
        self.life().stop_at
    }

    /// The end: everybody is told, the waiting ones last.
    pub(super) fn close(&self, error: Option<Error>) {
        let waiting = {
            let mut life = self.life();
            if life.state == ProxyState::Closed {
                return;
            }
            life.state = ProxyState::Closed;
            std::mem::take(&mut life.waiting)
        };
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|reply| Arc::ptr_eq(&reply.mailbox, &self.events.mailbox));
        let here = here.into_iter().map(|reply| (reply.key, Ok(Value::Unit)));
        self.events.mailbox.last(self.events.key, Event::Closed(error), here);
        for reply in elsewhere {
            reply.send(Ok(Value::Unit));
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

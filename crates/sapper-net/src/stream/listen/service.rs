//! A listener at work: a task that accepts and hands over, with a bound on what is under way.
//!
//! What was accepted is somebody else's from then on (a bridge's). How many are between their acceptance
//! and the moment at which that somebody drops their [`Pending`] is bounded: at the bound
//! accepting waits, and the kernel keeps the rest. So a flood of connections that never get on costs a
//! known amount.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::{AcceptedSocket, ListenAddress, ListenOptions, Listener, ListenerStats};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::runtime;
use crate::stream::address::Address;

/// How long a name in the address may be looked up.
const LOOK_UP: Duration = Duration::from_secs(30);

/// Where a service listens.
pub enum ServiceAddress {
    /// At an address that is bound when the service starts.
    Bind(ListenAddress),
    /// At sockets that listen already; the name is the option to blame.
    Adopt(Vec<std::os::fd::OwnedFd>, &'static str),
}

/// A new connection, not looked at yet.
pub struct Arrival {
    /// The connection.
    pub socket: AcceptedSocket,
    _pending: OwnedSemaphorePermit,
}

/// What a service says to its owner, on the service's thread.
pub trait ServiceEvents: Send + 'static {
    /// It listens at these addresses.
    fn listening(&mut self, addresses: Vec<Address>);
    /// Somebody connected.
    fn arrived(&mut self, arrival: Arrival);
    /// All places for connections are taken, and somebody waits: one whose handshake is not done may give way.
    fn full(&mut self);
    /// It accepts no more: it was closed (`None`), could not begin, or broke. Said once, last.
    fn closed(&mut self, error: Option<Error>);
}

/// The handle. Dropping it closes the service; what was accepted goes on.
pub struct Service {
    shared: Arc<Shared>,
}

struct Shared {
    closing: Notify,
    closed: AtomicBool,
    stats: Mutex<Option<Arc<ListenerStats>>>,
    pending: Arc<Semaphore>,
    max_pending: u32,
    /// A place is held for whoever comes next.
    waits: AtomicBool,
}

/// Counters of one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceStats {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections that broke before they were accepted.
    pub aborted: u64,
    /// Times that accepting waited because the limit of open connections was reached.
    pub limit_pauses: u64,
    /// Times that accepting waited because the system was out of descriptors or memory.
    pub exhausted_pauses: u64,
    /// Connections accepted and not admitted yet.
    pub pending: u64,
}

impl Arrival {
    /// The socket, and the place among the pending ones, which goes when it is dropped.
    pub fn into_parts(self) -> (AcceptedSocket, Pending) {
        (self.socket, Pending { _place: self._pending })
    }
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arrival({} -> {})", self.socket.peer, self.socket.local)
    }
}

/// A place among the connections that are not admitted yet.
pub struct Pending {
    _place: OwnedSemaphorePermit,
}

impl Service {
    /// Starts listening; how that went is the first thing that `events` hears.
    pub fn start(
        address: ServiceAddress,
        options: ListenOptions,
        max_pending: u32,
        events: impl ServiceEvents,
    ) -> Result<Self> {
        if max_pending == 0 || max_pending as usize > Semaphore::MAX_PERMITS {
            return Err(Error::config("max_handshakes", format!("must be at least 1, not {max_pending}")));
        }
        let shared = Arc::new(Shared {
            closing: Notify::new(),
            closed: false.into(),
            stats: Mutex::default(),
            pending: Arc::new(Semaphore::new(max_pending as usize)),
            max_pending,
            waits: AtomicBool::new(false),
        });
        runtime::spawn("listener", run(address, options, Arc::clone(&shared), events))?;
        Ok(Self { shared })
    }

    /// Accepts no more. What waits in the kernel's queue is refused by it.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.closing.notify_one();
    }

    /// Counters now.
    pub fn stats(&self) -> ServiceStats {
        let stats = self.shared.stats.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let taken = self.shared.max_pending as usize - self.shared.pending.available_permits();
        let pending = taken.saturating_sub(self.shared.waits.load(Ordering::Relaxed).into());
        let Some(stats) = stats.as_ref() else { return ServiceStats::default() };
        ServiceStats {
            accepted: stats.accepted.get(),
            aborted: stats.aborted.get(),
            limit_pauses: stats.limit_pauses.get(),
            exhausted_pauses: stats.exhausted_pauses.get(),
            pending: pending as u64,
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    async fn closing(&self) {
        while !self.closed.load(Ordering::Acquire) {
            self.closing.notified().await;
        }
    }
}

async fn run(
    address: ServiceAddress,
    options: ListenOptions,
    shared: Arc<Shared>,
    mut events: impl ServiceEvents,
) {
    let outcome = tokio::select! {
        biased;
        () = shared.closing() => Ok(()),
        outcome = serve(address, &options, &shared, &mut events) => outcome,
    };
    // The sockets are closed by now: whoever is told may bind the address again.
    events.closed(outcome.err());
}

async fn serve(
    address: ServiceAddress,
    options: &ListenOptions,
    shared: &Shared,
    events: &mut impl ServiceEvents,
) -> Result<()> {
    let deadline = Instant::now() + LOOK_UP;
    let mut listener = match address {
        ServiceAddress::Bind(address) => {
            timeout_at(deadline, Listener::bind(&address, options, deadline)).await.unwrap_or_else(|_| {
                let message = format!("the address was not found within {:.0} s", LOOK_UP.as_secs_f64());
                Err(Error::new(ErrorKind::ConnectDeadline, message).with_phase(Phase::Connect))
            })?
        }
        ServiceAddress::Adopt(fds, field) => Listener::adopt(fds, field, options)?,
    };
    *shared.stats.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
        Some(Arc::clone(listener.stats()));
    events.listening(listener.local_addresses());
    let asked = Arc::new(AtomicBool::new(false));
    let ask = Arc::clone(&asked);
    listener.when_full(move || {
        ask.store(true, Ordering::Relaxed);
        true
    });
    loop {
        let place = Arc::clone(&shared.pending).acquire_owned().await.expect("the semaphore is never closed");
        shared.waits.store(true, Ordering::Relaxed);
        let socket = accept(&mut listener, &asked, || events.full()).await?;
        shared.waits.store(false, Ordering::Relaxed);
        events.arrived(Arrival { socket, _pending: place });
    }
}

/// The next connection; `full` hears while it waits for a place and `asked` says so.
async fn accept(
    listener: &mut Listener,
    asked: &AtomicBool,
    mut full: impl FnMut(),
) -> Result<AcceptedSocket> {
    let mut accepting = pin!(listener.accept_socket());
    poll_fn(|cx| {
        let polled = accepting.as_mut().poll(cx);
        // Where a place became free in the same moment, nobody has to give way any more: told behind the newcomer, it
        // would be the newcomer.
        if asked.swap(false, Ordering::Relaxed) && polled.is_pending() {
            full();
        }
        polled
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn nobody_gives_way_for_a_place_that_is_free() {
        let options = ListenOptions { max_connections: 1, ..ListenOptions::default() };
        let address = ListenAddress::Tcp { host: Some("127.0.0.1".to_owned()), port: 0 };
        let mut listener =
            Listener::bind(&address, &options, Instant::now() + Duration::from_secs(9)).await.unwrap();
        let Address::Inet(local) = listener.local_addresses()[0].clone() else {
            panic!("it is bound to one")
        };
        let _clients = [(); 2].map(|()| TcpStream::connect(local).unwrap());
        let asked = Arc::new(AtomicBool::new(false));
        let mut told = 0;
        let first = accept(&mut listener, &asked, || told += 1).await.unwrap();
        let (ask, leaves) = (Arc::clone(&asked), Mutex::new(Some(first)));
        listener.when_full(move || {
            ask.store(true, Ordering::Relaxed);
            // In this very moment.
            drop(leaves.lock().unwrap().take());
            true
        });
        let second = accept(&mut listener, &asked, || told += 1).await.unwrap();
        assert_eq!((told, asked.load(Ordering::Relaxed)), (0, false));
        // It stays: whoever comes next has somebody give way.
        let _third = TcpStream::connect(local).unwrap();
        let mut told = 0;
        let waiting =
            tokio::time::timeout(Duration::from_millis(20), accept(&mut listener, &asked, || told += 1));
        assert!(waiting.await.is_err());
        assert!(told > 0);
        drop(second);
    }
}

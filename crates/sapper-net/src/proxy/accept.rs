//! The accepting task: listens, hands connections to the I/O threads, and is the last to go.

use std::future::Future;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use super::control::{Launch, Shared};
use super::metrics::ProxyState;
use super::{Listen, connection};
use crate::bridge::{Reply, Value};
use crate::error::Result;
use crate::runtime;
use crate::stream::listen::{ListenOptions, Listener};
use crate::sys::descriptors_left;

/// Looking up the name of an address to listen at.
const LISTEN_DEADLINE: Duration = Duration::from_secs(10);

/// How long one who has to give way may take to leave.
const LEAVE: Duration = Duration::from_millis(50);

/// How long handshakes under way may take in a drain: a client that means it needs less, and a stranger who leaves
/// his unfinished holds nobody up.
const LAST_HANDSHAKES: Duration = Duration::from_secs(1);

/// Runs a proxy to its end. Not an `async fn`, which would keep its arguments twice.
#[expect(clippy::manual_async_fn, reason = "its arguments are kept once")]
pub(super) fn run(launch: Launch, shared: Arc<Shared>, reply: Reply) -> impl Future<Output = ()> + Send {
    async move {
        let mut listener = match listen(launch).await {
            Ok(listener) => listener,
            Err(error) => {
                reply.send(Err(error));
                return shared.close(None);
            }
        };
        let unserved = Arc::clone(&shared.unserved);
        listener.when_full(move || unserved.make_room());
        shared.set_listener(&listener);
        shared.set_state(ProxyState::Running);
        reply.send(Ok(Value::Addresses(listener.local_addresses())));
        let open = Open(Arc::new(AtomicUsize::new(0)));
        let outcome = accept(&mut listener, &shared, &open).await;
        listener.close();
        if shared.stop_at().is_some() {
            shared.set_state(ProxyState::Draining);
            drain(&shared, &open).await;
        }
        shared.cut.comes();
        while !open.is_none() {
            shared.one_less.notified().await;
        }
        shared.close(outcome.err());
    }
}

async fn listen(launch: Launch) -> Result<Listener> {
    let Launch { listen, options } = launch;
    let deadline = Instant::now() + LISTEN_DEADLINE;
    let mut all = Vec::with_capacity(listen.len());
    for one in listen {
        all.push(open(one, &options, deadline).await.map_err(|error| error.with_field("listen"))?);
    }
    let first = all.remove(0);
    Ok(Listener::united(first, all))
}

async fn open(listen: Listen, options: &ListenOptions, deadline: Instant) -> Result<Listener> {
    match listen {
        Listen::Address(address) => Listener::bind(&address, options, deadline).await,
        Listen::Socket(fd) => Listener::adopt(vec![fd], "listen", options),
    }
}

/// Until a stop is asked for, or the listener breaks.
async fn accept(listener: &mut Listener, shared: &Arc<Shared>, open: &Open) -> Result<()> {
    loop {
        let socket = tokio::select! {
            biased;
            () = stopped(shared) => return Ok(()),
            accepted = listener.accept_socket() => accepted?,
        };
        let few = shared.unserved.make_room_within(descriptors_left(socket.as_fd()));
        let guard = open.enter(Arc::clone(shared));
        let task = connection::run(socket, guard);
        runtime::spawn_near("proxy connection", task)?;
        if few {
            // Not faster than others go.
            let _ = timeout(LEAVE, shared.one_less.notified()).await;
        }
    }
}

async fn stopped(shared: &Shared) {
    while shared.stop_at().is_none() {
        shared.stop_wanted.notified().await;
    }
}

/// Until every connection has ended by itself, or the time is over.
async fn drain(shared: &Shared, open: &Open) {
    let last_handshakes = Instant::now() + LAST_HANDSHAKES;
    while !open.is_none() {
        let Some(until) = shared.stop_at() else { return };
        tokio::select! {
            biased;
            () = sleep_until(until.into()) => return,
            () = sleep_until(last_handshakes), if !shared.no_more_handshakes.is_here() => {
                shared.no_more_handshakes.comes();
            }
            () = shared.one_less.notified() => {}
            // A shorter time may have been asked for.
            () = shared.stop_wanted.notified() => {}
        }
    }
}

/// How many connections have a task.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn enter(&self, shared: Arc<Shared>) -> Guard {
        self.0.fetch_add(1, Ordering::SeqCst);
        Guard { open: Arc::clone(&self.0), shared }
    }

    fn is_none(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

/// A connection's task; dropped when it is over, whatever ended it.
pub(super) struct Guard {
    open: Arc<AtomicUsize>,
    pub(super) shared: Arc<Shared>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
        self.shared.one_less.notify_one();
    }
}

//! The handle: what any thread may ask of a bridge.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sapper_proto::cdtunnel;
use tokio::sync::mpsc;

use super::open::{Form, Prepared};
use super::state::{BridgeState, Shared, StatsSnapshot};
use super::{BridgeOptions, CdTunnelRole, Handshakes, SwapOptions, task};
use crate::endpoint::EndpointSpec;
use crate::error::{Direction, Error, ErrorKind, Result};
use crate::mailbox::Mailbox;
use crate::port::tap::TapOptions;
use crate::proxy::ProxyEvent;
use crate::runtime;
use crate::stream::address::Address;
use crate::stream::listen::service::Arrival;

/// Commands that wait at most: each is a call that somebody made and none takes long, so more than
/// this means a caller in a loop, who is told `Busy`.
const COMMANDS: usize = 64;

/// The mailbox of the control plane.
pub type ControlMailbox = Mailbox<Value, Event>;

/// What a finished operation, or a listener, gives.
#[derive(Debug)]
pub enum Value {
    /// Nothing but its success.
    Unit,
    /// The agreed parameters of each TLS end.
    Handshakes(Box<Handshakes>),
    /// The parameters of a device tunnel.
    CdTunnel(Box<cdtunnel::Response>),
    /// Keying material, or bytes read too far.
    Bytes(Vec<u8>),
    /// Where a listener listens.
    Addresses(Vec<Address>),
    /// Somebody connected to a listener.
    Arrival(Box<Arrival>),
}

/// What happened to a bridge, or to what it is made from.
#[derive(Debug)]
pub enum Event {
    /// Payload flows.
    Started,
    /// It ended by itself or was stopped; `None` is an orderly end. Posted once, last.
    Closed(Option<Error>),
    /// Files of a TLS configuration were read again; an error says why what was there stays in use.
    Reloaded(Option<Error>),
    /// What was subscribed to is gone. Posted once, last.
    Released,
    /// A proxy's connection is over.
    Proxy(Box<ProxyEvent>),
    /// Something happened to a tunnel.
    Tunnel(Box<crate::tunnel::notice::Notice>),
    /// Lines for the program's log wait: [`crate::log::take`].
    Log,
}

/// Where the answer of an operation goes.
pub struct Reply {
    pub(crate) mailbox: Arc<ControlMailbox>,
    pub(crate) key: u64,
}

impl Reply {
    /// To `mailbox`, with `key`.
    pub fn new(mailbox: Arc<ControlMailbox>, key: u64) -> Self {
        Self { mailbox, key }
    }

    pub(crate) fn send(self, result: Result<Value>) {
        self.mailbox.done(self.key, result);
    }
}

pub(super) enum Command {
    Handshake(Reply),
    CdTunnel(CdTunnelRole, Reply),
    Start,
    /// Boxed: a bridge has room for the largest of these as long as it lives.
    SwapSink(Box<(EndpointSpec, SwapOptions)>, Reply),
    SetTap(Option<TapOptions>, Reply),
    UpdateKeys(Reply),
    Confirmed(Reply),
    Export {
        label: String,
        context: Option<Vec<u8>>,
        len: usize,
        reply: Reply,
    },
    UnusedData(Reply),
    /// Only wakes the task: what is asked for is in the shared state.
    Look,
}

/// A bridge. Every method returns at once; what takes time answers through a [`Reply`].
pub struct Bridge {
    /// Boxed: a channel keeps room for 32 messages, and an idle bridge carries it.
    commands: mpsc::Sender<Box<Command>>,
    shared: Arc<Shared>,
    /// What the task is made from, until the first call makes it: one wake-up instead of two.
    launch: Mutex<Option<Launch>>,
    form: Form,
    transport_is_port: bool,
}

struct Launch {
    prepared: Prepared,
    inbox: mpsc::Receiver<Box<Command>>,
    events: Reply,
}

impl Bridge {
    /// Checks the options. The task begins with the first call of [`handshake`](Self::handshake),
    /// [`start`](Self::start) or [`stop`](Self::stop). Events of its life go to `events`.
    pub fn new(options: BridgeOptions, events: Reply) -> Result<Self> {
        runtime::ensure_running()?;
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let transport_is_port = options.transport.endpoint.is_port();
        let prepared = Prepared::check(options)?;
        let form = prepared.form;
        let launch = Mutex::new(Some(Launch { prepared, inbox, events }));
        Ok(Self { commands, shared: Arc::default(), launch, form, transport_is_port })
    }

    /// Makes the task, where there is none yet. A failure answers what waits for it.
    fn launch(&self) {
        let Some(launch) = self.launch.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() else {
            return;
        };
        if let Err(error) = runtime::ensure_running() {
            return launch.refuse(&error);
        }
        let task = task::run(launch.prepared, Arc::clone(&self.shared), launch.inbox, launch.events);
        if let Err(error) = runtime::spawn("bridge", task) {
            tracing::error!(%error, "a bridge's task cannot be made");
        }
    }

    /// Asks for [`Event::Started`], which is posted only to who asked before it happened.
    pub fn watch(&self) {
        self.shared.watch();
    }

    /// Connects and shakes hands on both ends. Answers [`Value::Handshakes`]; asked again, it answers
    /// the same.
    pub fn handshake(&self, reply: Reply) {
        self.send_or_refuse(Command::Handshake(reply));
    }

    /// Says before the first call that the handshake's time runs already since `ago`. Said later, it
    /// changes nothing.
    pub fn handshake_began(&self, ago: Duration) {
        if let Some(launch) = &mut *self.launch.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            launch.prepared.deadlines.spent = ago;
        }
    }

    /// The hello of a device tunnel over the finished handshake, before [`start`](Self::start).
    /// Answers [`Value::CdTunnel`].
    pub fn cdtunnel_handshake(&self, role: CdTunnelRole, reply: Reply) {
        self.send_or_refuse(Command::CdTunnel(role, reply));
    }

    /// Lets payload flow (after the handshake, which it does itself where nobody did). A failure is
    /// the error of [`Event::Closed`]. Started twice is `ApiMisuse`.
    pub fn start(&self) -> Result<()> {
        self.shared.note_start()?;
        match self.send(Command::Start) {
            Err(_) if self.shared.failed_at_rest() => Ok(()),
            sent => sent,
        }
    }

    /// Stops reading for one direction until [`resume`](Self::resume); what was read is delivered.
    pub fn pause(&self, direction: Direction) -> Result<()> {
        self.set_paused(direction, true)
    }

    /// Ends a [`pause`](Self::pause).
    pub fn resume(&self, direction: Direction) -> Result<()> {
        self.set_paused(direction, false)
    }

    /// Finds what is wrong with a sink for [`swap_sink`](Self::swap_sink) without waiting.
    pub fn check_sink(&self, sink: &EndpointSpec, swap: &SwapOptions) -> Result<()> {
        self.form.check_replacement(sink, self.transport_is_port, swap)
    }

    /// Opens another sink and goes on with it; no byte that was read is lost. The old one is closed.
    /// A failure to open leaves the old one in use. Answers [`Value::Unit`].
    pub fn swap_sink(&self, sink: EndpointSpec, swap: SwapOptions, reply: Reply) {
        self.send_or_refuse(Command::SwapSink(Box::new((sink, swap)), reply));
    }

    /// Starts, replaces or ends (`None`) the tap. Answers [`Value::Unit`].
    pub fn set_tap(&self, tap: Option<TapOptions>, reply: Reply) {
        self.send_or_refuse(Command::SetTap(tap, reply));
    }

    /// New keys for the sending direction of the transport (TLS 1.3). Answers [`Value::Unit`].
    pub fn update_keys(&self, reply: Reply) {
        self.send_or_refuse(Command::UpdateKeys(reply));
    }

    /// Waits until the peer of the transport's TLS has finished its part of the handshake, which a client that
    /// sent early data may not have. Answers [`Value::Unit`].
    pub fn confirmed(&self, reply: Reply) {
        self.send_or_refuse(Command::Confirmed(reply));
    }

    /// Keying material of the transport's TLS (RFC 5705). Answers [`Value::Bytes`].
    pub fn export_keying_material(&self, label: String, context: Option<Vec<u8>>, len: usize, reply: Reply) {
        self.send_or_refuse(Command::Export { label, context, len, reply });
    }

    /// Bytes after the peer's close_notify, once the bridge is closed. Answers [`Value::Bytes`].
    pub fn unused_data(&self, reply: Reply) {
        if let Ok(bytes) = self.shared.take_unused() {
            return reply.send(Ok(Value::Bytes(bytes)));
        }
        match self.commands.try_send(Box::new(Command::UnusedData(reply))) {
            Ok(()) => self.launch(),
            Err(error) => {
                let refused = refusal(&error);
                // It may have ended meanwhile: what there is was kept before it heard no more.
                match (*error.into_inner(), self.shared.take_unused()) {
                    (Command::UnusedData(reply), Ok(bytes)) => reply.send(Ok(Value::Bytes(bytes))),
                    (command, _) => command.refuse(&refused),
                }
            }
        }
    }

    /// Ends the bridge: with no `drain` at once, else after what waits on both ends was delivered, at
    /// the latest when `drain` is over. Repeated calls may only shorten it. Never fails.
    pub fn stop(&self, drain: Duration) {
        self.shared.request_stop(drain);
        // A full queue is no obstacle: the request above is seen at the next turn.
        let _ = self.commands.try_send(Box::new(Command::Look));
        self.launch();
    }

    /// Ends the bridge at once and without a goodbye: the peer sees that it was cut off (a reset, where
    /// the carrier has one). Never fails.
    pub fn abort(&self) {
        self.shared.request_abort();
        let _ = self.commands.try_send(Box::new(Command::Look));
        self.launch();
    }

    /// Answers [`Value::Unit`] when everything is closed and every resource given back: at once where
    /// that is the case. An error that ended the bridge was told by [`Event::Closed`] and is not
    /// repeated here.
    pub fn wait_closed(&self, reply: Reply) {
        self.shared.when_closed(reply);
    }

    /// Where its life is.
    pub fn state(&self) -> BridgeState {
        self.shared.state()
    }

    /// Our and the peer's network address on the transport, where it has them; known once it is open.
    pub fn addresses(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        self.shared.addresses()
    }

    /// Counters now.
    pub fn stats(&self) -> StatsSnapshot {
        self.shared.snapshot()
    }

    /// A flag and no command: however often it changes, nothing waits in the queue.
    fn set_paused(&self, direction: Direction, paused: bool) -> Result<()> {
        if self.commands.is_closed() {
            return Err(closed());
        }
        self.shared.set_paused(direction, paused, || {
            // A full queue is no obstacle: the task looks after what is in it.
            let _ = self.commands.try_send(Box::new(Command::Look));
        });
        Ok(())
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.try_send(Box::new(command)).map_err(|error| refusal(&error))?;
        self.launch();
        Ok(())
    }

    fn send_or_refuse(&self, command: Command) {
        match self.commands.try_send(Box::new(command)) {
            Ok(()) => self.launch(),
            Err(error) => {
                let refused = refusal(&error);
                error.into_inner().refuse(&refused);
            }
        }
    }
}

impl Command {
    /// Answers who waits for it.
    pub(super) fn refuse(self, error: &Error) {
        match self {
            Self::Handshake(reply)
            | Self::CdTunnel(_, reply)
            | Self::SwapSink(_, reply)
            | Self::SetTap(_, reply)
            | Self::UpdateKeys(reply)
            | Self::Confirmed(reply)
            | Self::Export { reply, .. }
            | Self::UnusedData(reply) => reply.send(Err(error.clone())),
            Self::Start | Self::Look => {}
        }
    }
}

impl Launch {
    fn refuse(mut self, error: &Error) {
        self.inbox.close();
        while let Ok(command) = self.inbox.try_recv() {
            command.refuse(error);
        }
        self.events.mailbox.last(self.events.key, Event::Closed(Some(error.clone())), []);
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        match self.launch.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
            // One that was never used has no task to end; its listener is told all the same.
            Some(Launch { prepared, events, .. }) => {
                drop(prepared);
                self.shared.set_state(BridgeState::Closed);
                events.mailbox.last(events.key, Event::Closed(None), []);
            }
            None => self.stop(Duration::ZERO),
        }
    }
}

fn refusal<T>(error: &mpsc::error::TrySendError<T>) -> Error {
    match error {
        mpsc::error::TrySendError::Full(_) => {
            Error::new(ErrorKind::Busy, "too many calls to this bridge are under way")
        }
        mpsc::error::TrySendError::Closed(_) => closed(),
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the bridge is closed")
}

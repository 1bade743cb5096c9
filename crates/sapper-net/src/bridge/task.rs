//! A bridge's task: its life from the first command to the last event.
//!
//! New -> Handshaking -> Ready -> Running -> (Draining) -> Closed. A stop is heard in every state,
//! also while a peer stalls. An error is delivered once: to the handshake's caller where there is
//! one, else with the last event.

#[cfg(test)]
mod tests;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::unconstrained;
use tokio::time::timeout;

use super::control::{Command, Event, Reply, Value};
use super::open::{self, OpenEnds, OpenSide, Prepared};
use super::resting::Resting;
use super::running::{Running, Swap, end_of_drain, linger};
use super::state::{BridgeState, Shared};
use super::unused::unused;
use super::{BridgeDirection, CdTunnelRole, Handshakes, facts, goodbye};
use crate::endpoint::Opened;
use crate::error::{Direction, Error, ErrorKind, Phase, Result, seconds};
use crate::port::PacketKind;
use crate::port::tap::{Tap, TapFile, TapStats};
use crate::pump::{Ends, FlowOptions, FlowStats, Pump, PumpMode};
use crate::runtime;
use crate::tls::stream::{StreamDirection, TlsStream};

/// Runs a bridge to its end and tells everybody. Not an `async fn`, which would keep its arguments
/// beside what is made of them for as long as the bridge lives.
pub(super) fn run(
    prepared: Prepared,
    shared: Arc<Shared>,
    inbox: mpsc::Receiver<Box<Command>>,
    events: Reply,
) -> impl Future<Output = ()> + Send {
    let mut task = Task::new(prepared, shared, inbox, events);
    async move {
        let outcome = match task.live().await {
            Ok(()) | Err(End::Stopped | End::Told) => None,
            Err(End::Failed(error) | End::Late(error)) => Some(error),
        };
        if let Some(tap) = task.latest_tap()
            && timeout(TAP_AT_END, tap.over()).await.is_err()
        {
            tracing::warn!(
                "the disk takes nothing: the tap's file is complete some time after the bridge's end"
            );
        }
        task.close(outcome);
    }
}

/// The end of a bridge waits so long for the tap's file to be complete.
const TAP_AT_END: Duration = Duration::from_secs(1);
/// Who ends a tap waits so long.
const TAP_ENDS: Duration = Duration::from_secs(10);

/// Why a life ended before its time.
pub(super) enum End {
    /// Somebody stopped it.
    Stopped,
    /// Somebody stopped it with a drain, whose time was too short for all that waited.
    Late(Error),
    /// By an error that its caller has heard.
    Told,
    /// By an error that nobody has heard yet.
    Failed(Error),
}

/// What a running bridge does next.
enum Turn {
    /// It ends.
    Over(Result<(), End>),
    /// It goes on on another I/O thread.
    Move(usize),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

struct Task {
    prepared: Prepared,
    shared: Arc<Shared>,
    inbox: mpsc::Receiver<Box<Command>>,
    events: Reply,
    handshakes: Option<Handshakes>,
    handshake_replies: Vec<Reply>,
    start: bool,
    /// What will be written to once payload flows.
    tap: Option<Box<TapFile>>,
    carries_packets: bool,
    unused: Vec<u8>,
}

impl Task {
    fn new(
        mut prepared: Prepared,
        shared: Arc<Shared>,
        inbox: mpsc::Receiver<Box<Command>>,
        events: Reply,
    ) -> Self {
        Self {
            tap: prepared.tap.take(),
            carries_packets: prepared.carries_packets,
            prepared,
            shared,
            inbox,
            events,
            handshakes: None,
            handshake_replies: Vec::new(),
            start: false,
            unused: Vec::new(),
        }
    }

    async fn live(&mut self) -> Result<(), End> {
        self.wait_for_first_call().await?;
        let mut ends = self.handshake().await?;
        self.wait_for_start(&mut ends).await?;
        let pump = self.join(ends).await?;
        self.shared.set_state(BridgeState::Running);
        runtime::settled();
        if self.shared.is_watched() {
            self.events.mailbox.event(self.events.key, Event::Started);
        }
        self.pump(pump).await
    }

    /// New: a handshake or a start begins the work.
    async fn wait_for_first_call(&mut self) -> Result<(), End> {
        while self.handshake_replies.is_empty() && !self.start {
            let shared = Arc::clone(&self.shared);
            let command = tokio::select! {
                biased;
                request = shared.stopped() => {
                    if request.drain && shared.start_called() {
                        // The start is on its way: what waits is delivered first.
                        self.start = true;
                        continue;
                    }
                    return Err(End::Stopped);
                }
                command = self.inbox.recv() => command.ok_or(End::Stopped)?,
            };
            self.command_before_start(*command, None);
        }
        Ok(())
    }

    /// Handshaking: both ends, while commands are heard.
    async fn handshake(&mut self) -> Result<OpenEnds, End> {
        self.shared.set_state(BridgeState::Handshaking);
        let mut prepared = std::mem::replace(&mut self.prepared, Prepared::empty());
        // Boxed: a handshake's state is large and short-lived, an idle bridge does not carry it.
        let events = Reply::new(Arc::clone(&self.events.mailbox), self.events.key);
        let opening = Box::pin(async {
            let ends = prepared.open(&events).await;
            (prepared, ends)
        });
        let (prepared, ends) = self.during(opening).await?;
        self.prepared = prepared;
        match ends {
            Ok(ends) => {
                facts::opened(&self.shared, &ends);
                let handshakes = Handshakes {
                    transport: ends.transport.info.clone(),
                    sink: ends.sink.as_ref().and_then(|sink| sink.info.clone()),
                };
                // Before the answers: whoever has one finds the bridge ready.
                self.shared.set_state(BridgeState::Ready);
                for reply in self.handshake_replies.drain(..) {
                    reply.send(Ok(Value::Handshakes(Box::new(handshakes.clone()))));
                }
                self.handshakes = Some(handshakes);
                Ok(ends)
            }
            Err(error) => Err(self.tell_handshake_callers(error)),
        }
    }

    fn tell_handshake_callers(&mut self, error: Error) -> End {
        if self.handshake_replies.is_empty() {
            return End::Failed(error);
        }
        for reply in self.handshake_replies.drain(..) {
            reply.send(Err(error.clone()));
        }
        End::Told
    }

    /// Ready: hellos and questions about the connection, until the start.
    async fn wait_for_start(&mut self, ends: &mut OpenEnds) -> Result<(), End> {
        let mut resting = Resting::new(&self.prepared.deadlines);
        while !self.start {
            let shared = Arc::clone(&self.shared);
            let command = tokio::select! {
                biased;
                request = shared.stopped() => {
                    if request.drain && shared.start_called() {
                        // The start is on its way: what waits is delivered first.
                        self.start = true;
                        continue;
                    }
                    goodbye::before_payload(&mut ends.transport, self.shared.is_aborted()).await;
                    return Err(End::Stopped);
                }
                command = self.inbox.recv() => command.ok_or(End::Stopped)?,
                over = resting.over(ends) => {
                    if let (Err(error), Some(OpenSide { opened: Opened::Stream(sink), .. })) =
                        (&over, &mut ends.sink)
                    {
                        // What never began must not look like an end.
                        sink.fail(error);
                    }
                    if over.is_err() {
                        self.shared.fail_at_rest();
                    }
                    goodbye::before_payload(&mut ends.transport, self.shared.is_aborted()).await;
                    return over.map_err(End::Failed).and(Err(End::Stopped));
                }
            };
            match *command {
                Command::CdTunnel(role, reply) => {
                    if let Err(end) = self.cdtunnel(&mut ends.transport, role, reply).await {
                        goodbye::before_payload(&mut ends.transport, self.shared.is_aborted()).await;
                        return Err(end);
                    }
                    resting.interrupted();
                }
                other => self.command_before_start(other, Some(&mut ends.transport)),
            }
        }
        Ok(())
    }

    async fn cdtunnel(&mut self, side: &mut OpenSide, role: CdTunnelRole, reply: Reply) -> Result<(), End> {
        let deadline = self.prepared.deadlines.handshake;
        let hello = Box::pin(timeout(deadline, super::hello::cdtunnel(side, role)));
        let outcome = self.during(hello).await;
        match outcome {
            Ok(Ok(Ok(parameters))) => reply.send(Ok(Value::CdTunnel(Box::new(parameters)))),
            Ok(Ok(Err(error))) => {
                reply.send(Err(error.in_handshake()));
                return Err(End::Told);
            }
            Ok(Err(_late)) => {
                let text = format!("the peer sent no CDTunnel reply within {}", seconds(deadline));
                reply.send(Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake)));
                return Err(End::Told);
            }
            Err(end) => {
                reply.send(Err(stopped()));
                return Err(end);
            }
        }
        Ok(())
    }

    /// A command that comes before payload flows.
    fn command_before_start(&mut self, command: Command, transport: Option<&mut OpenSide>) {
        match command {
            Command::Handshake(reply) => match &self.handshakes {
                Some(handshakes) => reply.send(Ok(Value::Handshakes(Box::new(handshakes.clone())))),
                None => self.handshake_replies.push(reply),
            },
            Command::Start => self.start = true,
            Command::Look => {}
            Command::UpdateKeys(reply) => match transport.and_then(tls_of) {
                Some(tls) => reply.send(tls.update_keys().map(|()| Value::Unit)),
                None => reply.send(Err(self.not_now())),
            },
            Command::Confirmed(reply) => match transport.and_then(tls_of) {
                Some(tls) => confirmed(tls, reply),
                None => reply.send(Err(self.not_now())),
            },
            Command::Export { label, context, len, reply } => match transport.and_then(tls_of) {
                Some(tls) => reply.send(export(tls, &label, context.as_deref(), len)),
                None => reply.send(Err(self.not_now())),
            },
            Command::SetTap(tap, reply) => {
                let opened = match tap {
                    Some(_) if !self.carries_packets => Err(no_packets()),
                    Some(tap) => tap.open().map(|file| Some(Box::new(file))),
                    None => Ok(None),
                };
                reply.send(opened.map(|file| {
                    self.tap = file;
                    Value::Unit
                }));
            }
            Command::CdTunnel(_, reply) => reply.send(Err(self.not_now())),
            Command::SwapSink(_, reply) => reply.send(Err(Error::new(
                ErrorKind::NotStarted,
                "the sink is swapped while payload flows: call start() first",
            ))),
            Command::UnusedData(reply) => reply.send(Err(not_closed())),
        }
    }

    /// Why nothing can be asked of the session at this moment.
    fn not_now(&self) -> Error {
        if self.handshakes.is_some() {
            return Error::new(ErrorKind::Busy, "the bridge is busy with an earlier call: await that first");
        }
        Error::new(ErrorKind::NotStarted, "there is no TLS session yet: await handshake() first")
    }

    /// Waits for `work` while commands and a stop are heard. Where payload is to flow behind it, it is given
    /// the time of a drain.
    async fn during<F: Future + Unpin>(&mut self, mut work: F) -> Result<F::Output, End> {
        let shared = Arc::clone(&self.shared);
        let mut stop = pin!(shared.stopped_before_payload());
        loop {
            tokio::select! {
                biased;
                // First, so that what needs no waiting is done and can end orderly.
                output = &mut work => return Ok(output),
                request = &mut stop => {
                    for reply in self.handshake_replies.drain(..) {
                        reply.send(Err(stopped()));
                    }
                    return Err(if request.drain { End::Late(nothing_delivered()) } else { End::Stopped });
                }
                command = self.inbox.recv() => {
                    self.command_before_start(*command.ok_or(End::Stopped)?, None);
                }
            }
        }
    }

    /// Puts framing over both ends and makes the pump. A listener as sink is waited for here.
    async fn join(&mut self, ends: OpenEnds) -> Result<Pump, End> {
        let mut prepared = std::mem::replace(&mut self.prepared, Prepared::empty());
        let direction = prepared.form.direction;
        let (mut transport, sink) = (ends.transport, ends.sink);
        let mut met = sink.is_some();
        let work = Box::pin(async {
            let greeted = async {
                let sink = match sink {
                    Some(sink) => sink,
                    None => prepared.open_sink().await?,
                };
                met = true;
                open::greet(&mut transport, sink, prepared.form, &prepared.deadlines).await
            }
            .await;
            (prepared, greeted)
        });
        let greeted = match self.during(work).await {
            Ok((prepared, greeted)) => {
                self.prepared = prepared;
                greeted.map_err(End::Failed)
            }
            // Nobody came to the sink: there is nobody who misses anything.
            Err(End::Late(_)) if !met => Err(End::Stopped),
            Err(end) => Err(end),
        };
        let greeted = match greeted {
            Ok(greeted) => greeted,
            Err(end) => {
                goodbye::before_payload(&mut transport, self.shared.is_aborted()).await;
                return Err(end);
            }
        };
        // Now: hellos are spoken both ways, whichever way payload flows.
        if let Some(tls) = tls_of(&mut transport) {
            tls.set_direction(match direction {
                BridgeDirection::Duplex => StreamDirection::Duplex,
                BridgeDirection::EncryptOnly => StreamDirection::EncryptOnly,
                BridgeDirection::DecryptOnly => StreamDirection::DecryptOnly,
            });
        }
        let (mut ends, to_network, to_sink) = open::join(transport, greeted, self.prepared.form)?;
        facts::joined(&self.shared, &mut ends);
        let (encapsulate_stats, decapsulate_stats) = self.flow_stats();
        let mut encapsulate = FlowOptions::new(encapsulate_stats);
        let mut decapsulate = FlowOptions::new(decapsulate_stats);
        encapsulate.initial = to_network;
        decapsulate.initial = to_sink;
        match direction {
            BridgeDirection::Duplex => {}
            BridgeDirection::EncryptOnly => {
                // A stream runs, for its end and for TLS's alerts, tickets and key updates, and delivers
                // nothing. A packet port has neither.
                decapsulate.enabled = match &mut ends {
                    Ends::Streams(..) => true,
                    Ends::Ports(network, _) => network.stream_mut().is_some(),
                };
                decapsulate.refuses = true;
                decapsulate.forward_eof = false;
                decapsulate.keeps_alive = false;
            }
            BridgeDirection::DecryptOnly => {
                encapsulate.enabled = false;
                encapsulate.keeps_alive = false;
            }
        }
        let mut pump = Pump::new(ends, encapsulate, decapsulate);
        self.pause(&mut pump);
        if let Some(file) = self.tap.take()
            && let Err(error) = self.tap_pump(&mut pump, *file)
        {
            goodbye::of_pump(&mut pump, self.shared.is_aborted()).await;
            return Err(End::Failed(error));
        }
        Ok(pump)
    }

    /// Running and draining.
    async fn pump(&mut self, mut pump: Pump) -> Result<(), End> {
        let mut running = Running::new(self.prepared.deadlines.idle);
        let outcome = loop {
            // A pump takes turns by itself; a budget that runs out would look like a silent endpoint.
            let turn = unconstrained(poll_fn(|cx| {
                let polled = self.poll_pump(cx, &mut pump, &mut running);
                match running.clock.take_move() {
                    Some(thread) if polled.is_pending() => Poll::Ready(Turn::Move(thread)),
                    _ => polled.map(Turn::Over),
                }
            }));
            match turn.await {
                Turn::Over(outcome) => break outcome,
                Turn::Move(thread) => runtime::move_to(thread).await,
            }
            if let Err(error) = pump.moved() {
                break Err(End::Failed(error));
            }
            running.clock.moved();
        };
        drop(running.swap.take()); // nobody else takes over any more
        if let Ends::Streams(network, _) = pump.ends()
            && let Some(tls) = network.tls_mut()
        {
            self.unused = tls.unused_data();
        }
        // Whoever hears one direction only leaves what comes in the other unread: TLS's tickets, a sink's words.
        let one_way = self.prepared.form.direction != BridgeDirection::Duplex;
        if outcome.is_ok() && (one_way || self.shared.stop_request().is_some()) {
            linger(&mut pump, &self.shared).await;
        }
        if let (Err(End::Failed(error)), Ends::Streams(network, sink)) = (&outcome, pump.ends()) {
            sink.fail(error);
            goodbye::of_broken(network.as_mut(), error);
        }
        goodbye::of_pump(&mut pump, self.shared.is_aborted()).await;
        outcome
    }

    fn poll_pump(
        &mut self,
        cx: &mut Context<'_>,
        pump: &mut Pump,
        running: &mut Running,
    ) -> Poll<Result<(), End>> {
        let mut asked = false;
        while let Poll::Ready(command) = self.inbox.poll_recv(cx) {
            match command {
                Some(command) => self.command_while_running(*command, pump, running),
                None => return Poll::Ready(Err(End::Stopped)),
            }
            asked = true;
        }
        if asked {
            self.pause(pump);
        }
        let mode = match self.shared.stop_request() {
            None => PumpMode::Run,
            Some(request) => {
                let Some(mode) = running.poll_drain(cx, request, pump) else {
                    return Poll::Ready(match request.drain {
                        true => end_of_drain(cx, pump),
                        false => Err(End::Stopped),
                    });
                };
                self.shared.set_state(BridgeState::Draining);
                mode
            }
        };
        running.poll_swap(cx, pump);
        if let Poll::Ready(outcome) = pump.poll(cx, mode) {
            return Poll::Ready(outcome.map_err(End::Failed));
        }
        running.poll_clock(cx, pump).map_err(End::Failed)
    }

    fn command_while_running(&mut self, command: Command, pump: &mut Pump, running: &mut Running) {
        match command {
            Command::Handshake(reply) => {
                let handshakes = self.handshakes.clone().unwrap_or_default();
                reply.send(Ok(Value::Handshakes(Box::new(handshakes))));
            }
            Command::CdTunnel(_, reply) => reply.send(Err(Error::new(
                ErrorKind::ApiMisuse,
                "the CDTunnel hello comes before start(): payload flows already",
            ))),
            Command::Start | Command::Look => {}
            Command::SwapSink(sink, reply) => {
                if running.swap.is_some() {
                    reply.send(Err(Error::new(ErrorKind::Busy, "another sink is being opened")));
                    return;
                }
                let (spec, swap) = *sink;
                let form = self.prepared.form.with(&swap);
                let mut deadlines = self.prepared.deadlines.clone();
                deadlines.accept = swap.accept.or(deadlines.accept);
                let opening = open::open_replacement(spec, form, self.carries_packets, deadlines);
                running.swap = Some(Swap::new(opening, reply));
            }
            Command::SetTap(tap, reply) => {
                let set = match tap {
                    Some(_) if !self.carries_packets => Err(no_packets()),
                    Some(options) => options.open().and_then(|file| self.tap_pump(pump, file)),
                    None => match (pump.set_tap(None), self.latest_tap()) {
                        (Ok(()), Some(tap)) => return tell_its_end(tap, reply),
                        (set, _) => set,
                    },
                };
                reply.send(set.map(|()| Value::Unit));
            }
            Command::UpdateKeys(reply) => match pump_tls(pump) {
                Some(tls) => reply.send(tls.update_keys().map(|()| Value::Unit)),
                None => reply.send(Err(no_tls())),
            },
            Command::Confirmed(reply) => match pump_tls(pump) {
                Some(tls) => confirmed(tls, reply),
                None => reply.send(Err(no_tls())),
            },
            Command::Export { label, context, len, reply } => match pump_tls(pump) {
                Some(tls) => reply.send(export(tls, &label, context.as_deref(), len)),
                None => reply.send(Err(no_tls())),
            },
            Command::UnusedData(reply) => reply.send(Err(not_closed())),
        }
    }

    /// Pauses what is to be paused now, and nothing else.
    fn pause(&self, pump: &mut Pump) {
        let pauses = self.shared.look_at_pauses();
        pump.set_paused(Direction::Encapsulate, pauses.encapsulate);
        pump.set_paused(Direction::Decapsulate, pauses.decapsulate);
    }

    fn tap_pump(&self, pump: &mut Pump, file: TapFile) -> Result<()> {
        let tap = start_tap(pump, file, self.latest_tap().as_deref())?;
        self.shared.update_stats(|stats, _| stats.tap = Some(Arc::clone(tap.stats())));
        pump.set_tap(Some(tap))
    }

    /// The tap that is there, or that was there last.
    fn latest_tap(&self) -> Option<Arc<TapStats>> {
        let mut latest = None;
        self.shared.update_stats(|stats, _| latest.clone_from(&stats.tap));
        latest
    }

    fn flow_stats(&self) -> (Arc<FlowStats>, Arc<FlowStats>) {
        let mut both = None;
        self.shared.update_stats(|stats, _| {
            both = Some((Arc::clone(&stats.encapsulate), Arc::clone(&stats.decapsulate)));
        });
        both.expect("update_stats calls its closure")
    }

    /// Everything is given back; then everybody is told, the waiting ones last.
    fn close(mut self, error: Option<Error>) {
        // First: whoever is not heard any more finds it.
        self.shared.keep_unused(std::mem::take(&mut self.unused));
        self.inbox.close();
        let closed = Error::new(ErrorKind::Closed, "the bridge is closed");
        while let Ok(command) = self.inbox.try_recv() {
            match *command {
                Command::UnusedData(reply) => {
                    reply.send(self.shared.take_unused().map(Value::Bytes));
                }
                command => command.refuse(&closed),
            }
        }
        let Self { prepared, tap, shared, events, .. } = self;
        drop((prepared, tap));
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            shared.close().into_iter().partition(|reply| Arc::ptr_eq(&reply.mailbox, &events.mailbox));
        let here = here.into_iter().map(|reply| (reply.key, Ok(Value::Unit)));
        events.mailbox.last(events.key, Event::Closed(error), here);
        for reply in elsewhere {
            reply.send(Ok(Value::Unit));
        }
    }
}

pub(super) fn tls_of(side: &mut OpenSide) -> Option<&mut TlsStream> {
    match &mut side.opened {
        Opened::Stream(stream) => stream.tls_mut(),
        Opened::Port(_) => None,
    }
}

fn pump_tls(pump: &mut Pump) -> Option<&mut TlsStream> {
    match pump.ends() {
        Ends::Streams(network, _) => network.tls_mut(),
        Ends::Ports(network, _) => network.stream_mut().and_then(|stream| stream.tls_mut()),
    }
}

fn confirmed(tls: &mut TlsStream, reply: Reply) {
    tls.when_confirmed(Box::new(move |outcome| reply.send(outcome.map(|()| Value::Unit))));
}

fn export(tls: &mut TlsStream, label: &str, context: Option<&[u8]>, len: usize) -> Result<Value> {
    let mut out = vec![0; len];
    tls.export_keying_material(label, context, &mut out)?;
    Ok(Value::Bytes(out))
}

fn start_tap(pump: &mut Pump, file: TapFile, before: Option<&TapStats>) -> Result<Tap> {
    let Ends::Ports(network, sink) = pump.ends() else { return Err(no_packets()) };
    // A socket at the other end of a TAP carries its frames and does not know it.
    let kind = match network.abilities().kind {
        PacketKind::Ethernet => PacketKind::Ethernet,
        _ => sink.abilities().kind,
    };
    Tap::start(file, kind, before)
}

/// Answers when the tap's file is complete. That it is not is told once.
fn tell_its_end(tap: Arc<TapStats>, reply: Reply) {
    let ends = async move {
        let complete = match timeout(TAP_ENDS, tap.over()).await {
            Ok(()) => tap.tell_failure(),
            Err(_) => {
                let text = format!("the tap's file is not complete: the disk took nothing for {TAP_ENDS:?}");
                Err(Error::new(ErrorKind::Device, text).with_field("tap"))
            }
        };
        reply.send(complete.map(|()| Value::Unit));
    };
    // Only a forked process is refused, and that has no I/O thread to be here on.
    let _ = runtime::spawn_near("the end of a tap", ends);
}

fn no_packets() -> Error {
    unused("tap", "a tap writes packets: this bridge has no framing and carries bytes")
}
fn nothing_delivered() -> Error {
    let text = "the time of the drain was over before payload could flow: what waits is lost";
    Error::new(ErrorKind::CloseDeadline, text).with_phase(Phase::Close)
}
fn stopped() -> Error {
    Error::new(ErrorKind::Closed, "the bridge was stopped")
}
fn not_closed() -> Error {
    Error::new(
        ErrorKind::ApiMisuse,
        "unused data is known when the bridge is closed: await wait_closed() first",
    )
}
fn no_tls() -> Error {
    Error::new(ErrorKind::ApiMisuse, "this bridge's transport has no TLS")
}

//! Both directions between the state machine and sockets: turns, deliveries, ends.

use std::io::IoSlice;
use std::task::{Context, Poll};

use sapper_proto::tunnel::frame::{Code, OpenInfo};
use sapper_proto::tunnel::mux::{StreamKey, Turn};

use super::jobs::{Done, goodbye};
use super::{End, Link};
use crate::error::Error;
use crate::stream::{BoxStream, RecordMarks};
use crate::tunnel::canonical;
use crate::tunnel::notice::{DATA, Notice, VISITORS};
use crate::tunnel::payload::{self, Payload};

/// The most that one write takes. Several quanta share it.
const WRITE: usize = 512 * 1024;
/// Visitors that are taken before others have their turn.
const ACCEPTS: u32 = 64;
/// A queue that held more gives its memory back when it is empty.
const KEEP_PENDING: usize = 4 * 1024;

pub(super) const CONNECTED: [&str; 2] = ["visitor-connected", "service-connected"];
pub(super) const DISCONNECTED: [&str; 2] = ["visitor-disconnected", "service-disconnected"];
pub(super) const FAILED: [&str; 2] = ["visitor-error", "service-error"];
/// From our socket, and to it.
const DATA_FROM: [&str; 2] = ["data-from-visitor", "data-from-service"];
const DATA_TO: [&str; 2] = ["data-to-visitor", "data-to-service"];

impl Link {
    /// Reads for the streams whose turn it is and writes what is queued, as long as the carrier takes it.
    pub(super) fn send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        loop {
            self.turns();
            let now = self.now();
            let Some(carrier) = &mut self.carrier else { return moved };
            let mut slices = Vec::with_capacity(16);
            self.mux.poll_transmit(&mut slices, WRITE, now);
            if slices.is_empty() {
                break;
            }
            let written = if self.records {
                // A record for each header would cost more than this copy.
                self.staging.clear();
                slices.iter().for_each(|slice| self.staging.extend_from_slice(slice));
                carrier.poll_write(cx, &[IoSlice::new(&self.staging)])
            } else {
                carrier.poll_write(cx, &slices)
            };
            drop(slices);
            match written {
                Poll::Pending => break,
                Poll::Ready(Ok(n)) => {
                    self.mux.transmitted(n, now);
                    moved = true;
                }
                Poll::Ready(Err(error)) => {
                    self.lose_carrier(Some(error));
                    return true;
                }
            }
        }
        if self.records {
            if self.mux.gauges().unsent == 0 {
                self.staging = Vec::new();
            }
            if let Some(carrier) = &mut self.carrier
                && let Poll::Ready(Err(error)) = carrier.poll_flush(cx)
            {
                self.lose_carrier(Some(error));
                return true;
            }
        }
        moved
    }

    fn turns(&mut self) {
        let now = self.now();
        while let Some(Turn { key, max }) = self.mux.poll_turn(now) {
            let Some(slot) = self.slots.get_mut(key) else {
                self.mux.not_ready(key);
                continue;
            };
            let Some(stream) = slot.stream.as_mut().filter(|_| !slot.local_ended) else {
                self.mux.not_ready(key);
                continue;
            };
            let mut block = payload::take(max as usize);
            let most = block.len().min(max as usize);
            let mut context = Context::from_waker(&slot.read_waker);
            match stream.poll_read(&mut context, &mut block[..most], &mut RecordMarks::ignored()) {
                Poll::Pending => {
                    payload::give(block);
                    self.mux.not_ready(key);
                }
                Poll::Ready(Ok(0)) => {
                    payload::give(block);
                    slot.local_ended = true;
                    let both = slot.peer_ended;
                    self.mux.finish(key);
                    if both {
                        self.slots.closing.push(key);
                    }
                }
                Poll::Ready(Ok(n)) => {
                    self.teller.copy(&mut slot.copied.0, &block[..n]);
                    let taken = self.mux.send(key, Payload::new(block, n), now);
                    debug_assert!(taken, "a turn is a promise");
                    self.note_data(key, n as u64, 0);
                }
                Poll::Ready(Err(error)) => {
                    payload::give(block);
                    self.fail(key, Code::CONNECTION_RESET, error);
                }
            }
        }
    }

    /// Writes what waits for a stream's socket and then `data`; what is not taken waits.
    pub(super) fn deliver(&mut self, key: StreamKey, data: &[u8]) {
        let Some(slot) = self.slots.get_mut(key) else {
            // Nobody is there any more: it counts as delivered.
            let (now, n) = (self.now(), data.len() as u32);
            self.mux.consumed(key, n, now);
            return;
        };
        let Some(stream) = slot.stream.as_mut() else {
            slot.pending.extend(data);
            if slot.over {
                self.retire_if_forgotten(key);
            }
            return;
        };
        let mut context = Context::from_waker(&slot.write_waker);
        let (mut delivered, mut rest, mut failure) = (0, data, None);
        while !slot.pending.is_empty() || !rest.is_empty() {
            let (front, back) = slot.pending.as_slices();
            let slices = [IoSlice::new(front), IoSlice::new(back), IoSlice::new(rest)];
            let from = slices.iter().take_while(|slice| slice.is_empty()).count();
            match stream.poll_write(&mut context, &slices[from..]) {
                Poll::Ready(Ok(n)) => {
                    let mut written = n;
                    for slice in &slices {
                        let part = written.min(slice.len());
                        self.teller.copy(&mut slot.copied.1, &slice[..part]);
                        written -= part;
                    }
                    delivered += n;
                    let waited = n.min(slot.pending.len());
                    slot.pending.drain(..waited);
                    rest = &rest[n - waited..];
                }
                Poll::Pending => break,
                Poll::Ready(Err(error)) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        if failure.is_none() {
            slot.pending.extend(rest);
            if slot.pending.is_empty() && slot.pending.capacity() > KEEP_PENDING {
                slot.pending = std::collections::VecDeque::new();
            }
            if let Poll::Ready(Err(error)) = stream.poll_flush(&mut context) {
                failure = Some(error);
            }
        }
        if failure.is_none() && slot.pending.is_empty() && slot.peer_ended && !slot.eof_sent {
            match stream.poll_send_eof(&mut context) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => slot.eof_sent = true,
                Poll::Ready(Err(error)) => failure = Some(error),
            }
        }
        let (both, over) = (slot.local_ended && slot.peer_ended, slot.over);
        let now = self.now();
        if let Some(error) = failure {
            return self.fail(key, Code::CONNECTION_RESET, error);
        }
        if delivered > 0 {
            self.note_data(key, 0, delivered as u64);
            self.mux.consumed(key, delivered as u32, now);
        }
        if over {
            self.retire_if_forgotten(key);
        } else if both {
            self.slots.closing.push(key);
        }
    }

    /// Sockets of streams that the state machine has forgotten say goodbye.
    pub(super) fn retire_closing(&mut self) {
        for key in std::mem::take(&mut self.slots.closing) {
            self.retire_if_forgotten(key);
        }
    }

    fn retire_if_forgotten(&mut self, key: StreamKey) {
        let waits = self.slots.get(key).is_some_and(|slot| !slot.pending.is_empty());
        if waits {
            return;
        }
        if self.mux.unread(key).is_some() {
            if self.slots.get(key).is_some_and(|slot| !slot.over) {
                // Its last word waits for the carrier.
                self.slots.closing.push(key);
            }
            return;
        }
        self.tell_untold(key);
        self.tell_if_wanted(DISCONNECTED, key);
        let Some(slot) = self.slots.remove(key) else { return };
        match slot.stream {
            // The peer has said its end and heard ours: nothing can get lost.
            Some(_) if slot.local_ended && slot.eof_sent => {}
            Some(stream) => self.start(Box::pin(goodbye(stream))),
            None => {}
        }
    }

    /// Our end of a stream broke.
    pub(super) fn fail(&mut self, key: StreamKey, code: Code, error: Error) {
        let (now, reason) = (self.now(), error.message().to_owned());
        self.mux.reset(key, code, &reason, now);
        self.cut(key, Some(error));
    }

    /// A stream is over at once: so is its socket.
    pub(super) fn cut(&mut self, key: StreamKey, error: Option<Error>) {
        self.tell_untold(key);
        if let Some(error) = error
            && self.teller.wants(VISITORS)
        {
            self.tell_stream(FAILED, key, Notice { error: Some(error), ..Notice::default() });
        }
        self.tell_if_wanted(DISCONNECTED, key);
        if let Some(mut slot) = self.slots.remove(key)
            && let Some(stream) = &mut slot.stream
        {
            stream.reset(0);
        }
    }

    /// The peer opened a stream: its service is dialled.
    pub(super) fn opened(&mut self, key: StreamKey, info: Option<&OpenInfo>) {
        let now = self.now();
        let End::Client(dialer) = &self.end else {
            return self.mux.reset(key, Code::DENIED, "this end takes no streams", now);
        };
        let visitor = info.and_then(|info| info.visitor);
        let dial = std::sync::Arc::clone(dialer).dial(visitor);
        self.slots.insert(key, None, visitor, &self.awake, &self.live);
        self.start(Box::pin(async move { Done::Dialled(key, dial.await) }));
    }

    /// Begins a job.
    pub(super) fn start(&mut self, work: super::BoxFuture<Done>) {
        let job = self.jobs.add(work, &self.awake);
        self.work(job);
    }

    /// Goes on with a job.
    pub(super) fn work(&mut self, job: u32) {
        match self.jobs.poll(job) {
            None | Some(Done::Gone) => {}
            Some(Done::Dialled(key, Ok(stream))) => {
                let Some(slot) = self.slots.get_mut(key) else { return };
                slot.stream = Some(stream);
                self.tell_if_wanted(CONNECTED, key);
                self.mux.ready(key);
                self.deliver(key, &[]);
            }
            Some(Done::Dialled(key, Err(error))) => {
                use crate::error::ErrorKind;
                let code = match error.kind() {
                    ErrorKind::Connect => Code::REFUSED,
                    ErrorKind::ConnectDeadline => Code::DEADLINE,
                    _ => Code::UNREACHABLE,
                };
                if self.slots.get(key).is_some() {
                    self.fail(key, code, error);
                }
            }
            Some(Done::Visitor(Ok(stream))) => self.admit(stream),
            Some(Done::Visitor(Err(error))) => self.tell_stranger(error),
        }
    }

    /// Takes visitors that wait at the public port.
    pub(super) fn accept_visitors(&mut self) {
        for _ in 0..ACCEPTS {
            let End::Server(Some(port)) = &mut self.end else {
                self.may_accept = false;
                return;
            };
            match port.poll_accept(&mut Context::from_waker(&self.accept_waker)) {
                Poll::Pending => {
                    self.may_accept = false;
                    return;
                }
                Poll::Ready(Ok(visitor)) => match visitor.greeting(&self.teller, self.info.as_ref()) {
                    Ok(stream) => self.admit(stream),
                    Err(greeting) => {
                        self.start(Box::pin(async move { Done::Visitor(greeting.await) }));
                    }
                },
                Poll::Ready(Err(error)) => {
                    // A port that breaks does not mend by itself.
                    self.exit = Some(super::Exit::Broken(error));
                    return;
                }
            }
        }
        // The others after what those have to say.
        self.accept_waker.wake_by_ref();
    }

    fn admit(&mut self, mut stream: BoxStream) {
        let visitor = stream.peer_address().zip(stream.local_address());
        let visitor = visitor.map(|(from, to)| (canonical(from), canonical(to)));
        let now = self.now();
        let Some(key) = self.mux.open(OpenInfo { visitor, ..OpenInfo::default() }, now) else {
            // Too many, or nobody takes new ones: it hears so at once.
            stream.reset(0);
            return;
        };
        self.slots.insert(key, Some(stream), visitor, &self.awake, &self.live);
        self.tell_if_wanted(CONNECTED, key);
        self.mux.ready(key);
    }

    /// A visitor who never got a stream.
    fn tell_stranger(&mut self, error: Error) {
        if self.teller.wants(VISITORS) {
            self.teller.tell(Notice {
                name: FAILED[0],
                tunnel: self.info.clone(),
                error: Some(error),
                ..Notice::default()
            });
        }
    }

    fn tell_if_wanted(&self, names: [&'static str; 2], key: StreamKey) {
        if self.teller.wants(VISITORS) {
            // A service that never answered was never connected.
            let was_there = self.slots.get(key).is_some_and(|slot| slot.stream.is_some());
            if was_there {
                self.tell_stream(names, key, Notice::default());
            }
        }
    }

    /// Tells how many bytes moved since the last time.
    pub(super) fn tell_data(&mut self) {
        for key in std::mem::take(&mut self.slots.untold) {
            self.tell_untold(key);
        }
    }

    fn tell_untold(&mut self, key: StreamKey) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        let (from, to) = std::mem::take(&mut slot.untold);
        let copied = std::mem::take(&mut slot.copied);
        if self.teller.wants(DATA) {
            if from > 0 {
                self.tell_stream(
                    DATA_FROM,
                    key,
                    Notice { bytes: from, payload: copied.0, ..Notice::default() },
                );
            }
            if to > 0 {
                self.tell_stream(DATA_TO, key, Notice { bytes: to, payload: copied.1, ..Notice::default() });
            }
        }
    }
}

//! The task of a switch.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use sapper_proto::packet::Packet;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep};

use super::member::Port;
use super::ready::{PortWaker, ReadySet};
use super::{Forwarder, MOST_PORTS, Member, MemberStats, PortId, REQUESTS, Request, SwitchHandle, Verdict};
use crate::error::{Error, ErrorKind, Result};
use crate::port::{BoxPort, give_batch, take_batch};
use crate::stats::DropReason;

/// Rounds through all ports that have something before other tasks of the thread get their turn.
const ROUNDS: usize = 8;

/// Packets of one port's turn. Several turns fit a port's queue, so that the first source of a round
/// does not fill it alone.
const TURN: usize = 64;

/// A port in which nothing moved for so long gives its memory back.
const IDLE: Duration = Duration::from_secs(1);

/// Several ports and what decides between them.
pub struct Switch<F> {
    forwarder: F,
    places: Vec<Place>,
    /// Places that are free, the last one first.
    free: Vec<usize>,
    ready: Arc<ReadySet>,
    /// Where the next round begins follows from this. With a fixed order the same source would always
    /// be the first to find room in a queue.
    order: u32,
    requests: mpsc::Receiver<Request>,
    verdicts: Vec<Verdict>,
    /// Ports whose queues were filled in this round.
    dirty: Vec<usize>,
    idle_check: Option<Pin<Box<Sleep>>>,
}

#[derive(Default)]
struct Place {
    generation: u32,
    port: Option<Port>,
}

impl<F: Forwarder> Switch<F> {
    /// A switch without ports, and what adds them. It does nothing until [`run`](Self::run).
    pub fn new(forwarder: F) -> (Self, SwitchHandle) {
        let (ask, requests) = mpsc::channel(REQUESTS);
        let switch = Self {
            forwarder,
            places: Vec::new(),
            free: Vec::new(),
            ready: ReadySet::new(),
            order: 1,
            requests,
            verdicts: Vec::new(),
            dirty: Vec::new(),
            idle_check: None,
        };
        (switch, SwitchHandle(ask))
    }

    /// Moves packets until the last handle is gone; gives the forwarder back.
    pub async fn run(mut self) -> F {
        poll_fn(|cx| self.poll(cx)).await;
        for index in 0..self.places.len() {
            self.take(index, Ok(true));
        }
        self.forwarder
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.ready.set_task(cx.waker());
        loop {
            match self.requests.poll_recv(cx) {
                Poll::Ready(Some(request)) => self.answer(request),
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        for _ in 0..ROUNDS {
            if self.ready.is_empty() {
                break;
            }
            self.round();
        }
        self.check_idle(cx);
        if !self.ready.is_empty() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Gives each port that has something one turn.
    fn round(&mut self) {
        // Any sequence will do that has no pattern in step with the ports.
        self.order = self.order.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        let first = (self.order >> 16) as usize % self.places.len().max(1);
        for (from, to) in [(first, MOST_PORTS), (0, first)] {
            let mut at = from;
            while let Some(index) = self.ready.take_within(at, to) {
                at = index + 1;
                self.turn(index);
                self.send_dirty();
            }
        }
    }

    fn answer(&mut self, request: Request) {
        match request {
            Request::Add(port, answer) => {
                let added = self.add(port);
                // Whoever asked may have given up: then the port goes again.
                if let Err(Ok(member)) = answer.send(added) {
                    self.take(member.id.index as usize, Ok(true));
                }
            }
            Request::Remove(id, answer) => {
                let index = id.index as usize;
                let there = self.place(id).is_some();
                let _ = answer.send(if there { self.take(index, Ok(true)) } else { None });
            }
        }
    }

    fn add(&mut self, port: BoxPort) -> Result<Member> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.places.len() < MOST_PORTS => {
                self.places.push(Place::default());
                self.places.len() - 1
            }
            None => {
                let message = format!("a switch has {MOST_PORTS} ports at most");
                return Err(Error::new(ErrorKind::ResourceLimit, message));
            }
        };
        let place = &mut self.places[index];
        let id = PortId { index: index as u32, generation: place.generation };
        let waker = Waker::from(Arc::new(PortWaker { set: Arc::clone(&self.ready), index }));
        let port = Port::new(id, port, waker);
        let stats = Arc::clone(&port.stats);
        place.port = Some(port);
        self.ready.set(index);
        self.forwarder.added(id);
        Ok(Member { id, stats })
    }

    /// Takes a port out, whatever the reason.
    fn take(&mut self, index: usize, how: Result<bool>) -> Option<BoxPort> {
        let place = self.places.get_mut(index)?;
        let port = place.port.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(index);
        self.forwarder.removed(port.id, how);
        Some(port.into_port())
    }

    fn place(&mut self, id: PortId) -> Option<&mut Port> {
        self.places.get_mut(id.index as usize)?.port.as_mut().filter(|port| port.id == id)
    }

    /// One port's turn: what waits for it, then some packets from it.
    fn turn(&mut self, index: usize) {
        let Some(port) = self.places.get_mut(index).and_then(|place| place.port.as_mut()) else { return };
        port.send();
        if let Some(error) = port.failed.take() {
            self.take(index, Err(error));
            return;
        }
        match port.receive() {
            None => {}
            Some(Ok(true)) => {
                // There may be more: it comes after the others' turns.
                self.ready.set(index);
                self.forward(index);
            }
            Some(Ok(false)) => drop(self.take(index, Ok(false))),
            Some(Err(error)) => drop(self.take(index, Err(error))),
        }
    }

    /// Takes some packets of a port where the forwarder says.
    fn forward(&mut self, index: usize) {
        let Some(source) = self.places[index].port.as_mut() else { return };
        let Some(mut batch) = source.incoming.take() else { return };
        let (from, stats) = (source.id, Arc::clone(&source.stats));
        let mut verdicts = std::mem::take(&mut self.verdicts);
        verdicts.clear();
        verdicts.extend(batch.iter().take(TURN).map(|packet| self.forwarder.route(from, packet)));
        // A whole batch for one port that has room changes hands without a copy.
        if let Some(&Verdict::To(to)) = verdicts.first()
            && verdicts.iter().all(|&verdict| verdict == Verdict::To(to))
            && self.place(to).is_some_and(|port| port.takes_all(&batch))
            && batch.iter().skip(TURN).all(|packet| self.forwarder.route(from, packet) == Verdict::To(to))
            && let Some(port) = self.place(to)
        {
            stats.forwarded.add(batch.len() as u64);
            port.put_all(&mut batch);
            self.dirty.push(to.index as usize);
        }
        let turn = batch.len().min(TURN);
        for (packet, &verdict) in batch.iter().zip(&verdicts).take(turn) {
            self.forward_one(index, from, packet, verdict, &stats);
        }
        self.verdicts = verdicts;
        batch.advance(turn);
        match self.places[index].port.as_mut() {
            Some(source) if !batch.is_empty() => source.incoming = Some(batch),
            _ => give_batch(batch),
        }
    }

    fn forward_one(
        &mut self,
        index: usize,
        from: PortId,
        packet: Packet<'_>,
        verdict: Verdict,
        stats: &MemberStats,
    ) {
        match verdict {
            Verdict::To(to) => match self.place(to) {
                Some(port) => {
                    let was_dirty = port.dirty;
                    stats.forwarded.add(u64::from(port.put(packet)));
                    if !was_dirty {
                        self.dirty.push(to.index as usize);
                    }
                }
                None => stats.drops_in.add(DropReason::NoRoute, 1),
            },
            Verdict::ToOthers => {
                for (other, place) in self.places.iter_mut().enumerate() {
                    let Some(port) = place.port.as_mut().filter(|_| other != index) else { continue };
                    if !port.dirty {
                        self.dirty.push(other);
                    }
                    stats.forwarded.add(u64::from(port.put(packet)));
                }
            }
            Verdict::Local => self.local(from, packet),
            Verdict::Drop(reason) => stats.drops_in.add(reason, 1),
        }
    }

    fn local(&mut self, from: PortId, packet: Packet<'_>) {
        let mut answer = take_batch();
        self.forwarder.local(from, packet, &mut answer);
        if !answer.is_empty()
            && let Some(port) = self.place(from)
        {
            for packet in answer.iter() {
                port.put(packet);
            }
            self.dirty.push(from.index as usize);
        }
        give_batch(answer);
    }

    fn send_dirty(&mut self) {
        while let Some(index) = self.dirty.pop() {
            let Some(port) = self.places[index].port.as_mut() else { continue };
            if port.dirty {
                port.send();
            }
            if let Some(error) = port.failed.take() {
                self.take(index, Err(error));
            }
        }
    }

    /// Lets ports in which nothing moved give their memory back. No timer runs while all are silent.
    fn check_idle(&mut self, cx: &mut Context<'_>) {
        let ports = || self.places.iter().filter_map(|place| place.port.as_ref());
        if self.idle_check.is_none() && ports().any(|port| port.active) {
            self.idle_check = Some(Box::pin(sleep(IDLE)));
        }
        while let Some(check) = &mut self.idle_check
            && check.as_mut().poll(cx).is_ready()
        {
            let mut any = false;
            for port in self.places.iter_mut().filter_map(|place| place.port.as_mut()) {
                if std::mem::take(&mut port.active) {
                    any = true;
                } else {
                    port.port.release_idle();
                }
            }
            if any {
                check.as_mut().reset(Instant::now() + IDLE);
            } else {
                self.idle_check = None;
            }
        }
    }
}

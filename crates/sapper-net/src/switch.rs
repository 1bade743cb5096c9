//! More than two packet ports behind one interface: a [`Forwarder`] says where each packet goes, the
//! [`Switch`] takes it there.
//!
//! One task owns all ports. Each has a turn of one batch, and a queue of one batch in front of its way
//! out: what a slow port does not take is dropped and counted, so that no port holds another up.
//! Packets are cut and completed for ports that take no large ones. What is not here: any knowledge
//! of addresses; that is the forwarder's.

mod engine;
mod member;
mod ready;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use sapper_proto::packet::{Packet, PacketBatch};
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, ErrorKind, Result};
use crate::port::BoxPort;
use crate::stats::{Counter, DropReason, Drops};

pub use engine::Switch;

/// Most ports of one switch: what a round looks through is a bit for each.
pub const MOST_PORTS: usize = 4096;

/// Requests that may wait for the switch's turn. Whoever asks waits for the answer anyway.
const REQUESTS: usize = 16;

/// A port of a switch. A number is used again, an id is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId {
    index: u32,
    generation: u32,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves through this port.
    To(PortId),
    /// It leaves through every port but its own (a frame whose receiver is not known).
    ToOthers,
    /// It is for the forwarder itself: [`Forwarder::local`] gets it.
    Local,
    /// It goes nowhere, and is counted.
    Drop(DropReason),
}

/// Decides where packets go. It belongs to the switch's task and is never waited for.
pub trait Forwarder: Send {
    /// Where this packet of `from` goes. A super-packet's addresses are those of all its segments.
    fn route(&mut self, from: PortId, packet: Packet<'_>) -> Verdict;

    /// Takes a packet that it said was [`Verdict::Local`]. What it appends to `answer` leaves through
    /// `from`.
    fn local(&mut self, from: PortId, packet: Packet<'_>, answer: &mut PacketBatch) {
        let _ = (from, packet, answer);
    }

    /// A port is there from now on.
    fn added(&mut self, port: PortId) {
        let _ = port;
    }

    /// A port is gone: it was removed (`Ok(true)`), has ended (`Ok(false)`), or failed.
    fn removed(&mut self, port: PortId, how: Result<bool>) {
        let _ = (port, how);
    }
}

/// What a switch did with one port's packets, beside what the port counts itself.
#[derive(Debug, Default)]
pub struct MemberStats {
    /// Packets from the port that were given to another one's queue.
    pub forwarded: Counter,
    /// Packets to the port that found no room in its queue, or that it could not take.
    pub drops_out: Drops,
    /// Packets from the port that go nowhere.
    pub drops_in: Drops,
}

/// A port that was added.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name for the forwarder.
    pub id: PortId,
    /// Its counters.
    pub stats: Arc<MemberStats>,
}

/// Asks a running switch for changes. The switch ends when all of these are gone.
#[derive(Clone)]
pub struct SwitchHandle(mpsc::Sender<Request>);

enum Request {
    Add(BoxPort, oneshot::Sender<Result<Member>>),
    Remove(PortId, oneshot::Sender<Option<BoxPort>>),
}

impl SwitchHandle {
    /// Adds a port, which must have been opened on the thread that runs the switch.
    pub async fn add(&self, port: BoxPort) -> Result<Member> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Request::Add(port, answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Takes a port out and gives it back; `None` where it is gone already. Packets that wait for it
    /// are dropped.
    pub async fn remove(&self, port: PortId) -> Result<Option<BoxPort>> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Request::Remove(port, answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Closed, "this switch has ended")
}

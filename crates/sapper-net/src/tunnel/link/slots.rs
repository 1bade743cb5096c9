//! The sockets of a link's streams, by the state machine's slots.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Waker;

use sapper_proto::tunnel::mux::StreamKey;
use tokio::sync::OwnedSemaphorePermit;

use super::first_words::FirstWords;
use crate::stream::BoxStream;
use crate::tunnel::limit::Throttle;
use crate::tunnel::live::{Listed, Live};
use crate::tunnel::notice::Copied;
use crate::tunnel::served::Served;
use crate::tunnel::wake::{Awake, Token};

/// A stream's end in this process.
pub(super) struct Slot {
    pub(super) key: StreamKey,
    /// Counted from 1 in each tunnel.
    pub(super) number: u64,
    /// Which of the tunnel's services.
    pub(super) service: Arc<Served>,
    /// `None` while it is being dialled.
    pub(super) stream: Option<BoxStream>,
    /// What the socket has not taken. Bounded by the stream's credit, or by the bound of plain streams.
    pub(super) pending: VecDeque<u8>,
    /// The peer sends no more: our socket's end follows what is pending.
    pub(super) peer_ended: bool,
    pub(super) eof_sent: bool,
    /// Our socket sends no more.
    pub(super) local_ended: bool,
    /// Both directions are over; what is pending is still to be delivered.
    pub(super) over: bool,
    pub(super) visitor: Option<(SocketAddr, SocketAddr)>,
    /// Its place among those that can be asked for.
    pub(super) listed: Listed,
    /// Bytes that were not told yet: from our socket, to it.
    pub(super) untold: (u64, u64),
    /// The first of them, where somebody wants to see them.
    pub(super) copied: (Option<Copied>, Option<Copied>),
    /// What the visitor and the service say first.
    pub(super) first: FirstWords,
    /// What it may do; nothing where there are no limits.
    pub(super) throttle: Option<Box<Throttle>>,
    /// Its place among the visitors of all tunnels.
    pub(super) place: Option<OwnedSemaphorePermit>,
    pub(super) read_waker: Waker,
    pub(super) write_waker: Waker,
}

/// All of them.
#[derive(Default)]
pub(super) struct Slots {
    by_slot: Vec<Option<Box<Slot>>>,
    count: usize,
    numbers: u64,
    /// Streams whose two directions have ended: they go when the state machine forgets them.
    pub(super) closing: Vec<StreamKey>,
    /// Streams that ended in order while their service is still dialled, with what it has still to get; as many as there
    /// are dials.
    pub(super) undialled: BTreeMap<StreamKey, VecDeque<u8>>,
    /// Streams with bytes that were not told.
    pub(super) untold: Vec<StreamKey>,
}

impl Slots {
    pub(super) fn insert(
        &mut self,
        key: StreamKey,
        (service, throttle): (Arc<Served>, Option<Box<Throttle>>),
        stream: Option<BoxStream>,
        visitor: Option<(SocketAddr, SocketAddr)>,
        awake: &Arc<Awake>,
        live: &Arc<Live>,
    ) -> &mut Slot {
        let at = key.slot as usize;
        if self.by_slot.len() <= at {
            self.by_slot.resize_with(at + 1, || None);
        }
        self.numbers += 1;
        service.came();
        let listed = live.list(self.numbers, visitor.map(|(from, _)| from), Arc::clone(&service));
        let slot = Slot {
            key,
            number: self.numbers,
            service,
            stream,
            pending: VecDeque::new(),
            peer_ended: false,
            eof_sent: false,
            local_ended: false,
            over: false,
            visitor,
            listed,
            untold: (0, 0),
            copied: (None, None),
            first: FirstWords::default(),
            throttle,
            place: None,
            read_waker: awake.waker(Token::Read(key.slot)),
            write_waker: awake.waker(Token::Write(key.slot)),
        };
        debug_assert!(self.by_slot[at].is_none(), "somebody has that place");
        self.count += 1;
        self.by_slot[at].insert(Box::new(slot))
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Whose a slot is now. A waker may speak for one that is gone: then its successor is looked at in vain.
    pub(super) fn key(&self, slot: u32) -> Option<StreamKey> {
        Some(self.by_slot.get(slot as usize)?.as_ref()?.key)
    }

    pub(super) fn keys(&self) -> Vec<StreamKey> {
        self.by_slot.iter().flatten().map(|slot| slot.key).collect()
    }

    pub(super) fn get(&self, key: StreamKey) -> Option<&Slot> {
        self.by_slot.get(key.slot as usize)?.as_deref().filter(|slot| slot.key == key)
    }

    pub(super) fn get_mut(&mut self, key: StreamKey) -> Option<&mut Slot> {
        self.by_slot.get_mut(key.slot as usize)?.as_deref_mut().filter(|slot| slot.key == key)
    }

    pub(super) fn remove(&mut self, key: StreamKey) -> Option<Box<Slot>> {
        let place = self.by_slot.get_mut(key.slot as usize)?;
        if place.as_ref()?.key != key {
            return None;
        }
        self.count -= 1;
        place.take()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Whoever sees that it has left may come in its place.
        (self.throttle, self.place) = (None, None);
        self.service.left();
    }
}

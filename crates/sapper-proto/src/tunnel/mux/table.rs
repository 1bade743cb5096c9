//! The streams of one carrier, and the lists in which they stand.
//!
//! A stream is a slot of a vector; the slot is found by the stream's id through an ordered map, whose
//! look-ups nobody can make slow by choosing ids. The lists (whose turn it is, who has a frame to send
//! that is no payload) go through the slots, so that a stream leaves them at once when it ends, and a
//! poll costs what is active, not what is open.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::frame::OpenInfo;

/// Names one stream. Of a stream that has ended it names nothing: calls with it do nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamKey {
    /// Its place; small numbers, used again by later streams.
    pub slot: u32,
    /// Its id on the wire.
    pub id: u32,
}

/// What a stream is and owes. A few hundred streams' worth of it fit into a page.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: u32,
    /// How much we may send.
    pub(super) credit: u32,
    /// What is left of its turn.
    pub(super) deficit: u32,
    /// What the peer may have on its way or in our hands.
    pub(super) window: u32,
    /// Bytes that were delivered to the caller, and not consumed by it.
    pub(super) unread: u32,
    /// Bytes that were consumed, and for which the peer has no new credit yet.
    pub(super) owed: u32,
    /// Bytes that the peer may still send.
    pub(super) allowance: u32,
    pub(super) flags: Flags,
    /// From when on its rate is counted; of a plain stream, when payload came last.
    pub(super) credited: Duration,
    /// Bytes of credit since then.
    pub(super) counted: u64,
    /// What is to be said when it opens; gone when it was said.
    pub(super) open: Option<Box<OpenInfo>>,
    turn: Links,
    control: Links,
}

/// What is true of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags {
    /// It was opened with plain frames: no credit, no half-close.
    pub(super) plain: bool,
    /// The caller has something to send.
    pub(super) ready: bool,
    /// We send no more.
    pub(super) local_ended: bool,
    /// The peer sends no more.
    pub(super) remote_ended: bool,
    /// The end of our direction is to be said.
    pub(super) say_end: bool,
    /// Credit is to be given.
    pub(super) say_window: bool,
    /// It holds more than a plain stream may.
    pub(super) overfull: bool,
    /// It has just begun to send.
    pub(super) fresh: bool,
    /// Its close has been held back already.
    pub(super) lingered: bool,
}

/// The neighbours in one list; `list` 0 is none.
#[derive(Clone, Copy, Debug, Default)]
struct Links {
    list: u8,
    previous: u32,
    next: u32,
}

const NOBODY: u32 = u32::MAX;

/// Which list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    /// Streams with payload that were silent before.
    Fresh,
    /// Streams with payload.
    Bulk,
    /// Streams that have another frame to send.
    Control,
}

impl List {
    fn number(self) -> u8 {
        self as u8 + 1
    }
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    first: u32,
    last: u32,
}

impl Default for Ends {
    fn default() -> Self {
        Self { first: NOBODY, last: NOBODY }
    }
}

/// All streams.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Option<Stream>>,
    free: Vec<u32>,
    by_id: BTreeMap<u32, u32>,
    lists: [Ends; 3],
}

impl Stream {
    pub(super) fn new(id: u32, now: Duration) -> Self {
        Self {
            id,
            credit: 0,
            deficit: 0,
            window: 0,
            unread: 0,
            owed: 0,
            allowance: 0,
            flags: Flags { fresh: true, ..Flags::default() },
            credited: now,
            counted: 0,
            open: None,
            turn: Links::default(),
            control: Links::default(),
        }
    }

    fn links(&mut self, list: List) -> &mut Links {
        if list == List::Control { &mut self.control } else { &mut self.turn }
    }
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn find(&self, id: u32) -> Option<StreamKey> {
        Some(StreamKey { slot: *self.by_id.get(&id)?, id })
    }

    pub(super) fn get(&self, key: StreamKey) -> Option<&Stream> {
        self.slots.get(key.slot as usize)?.as_ref().filter(|stream| stream.id == key.id)
    }

    pub(super) fn get_mut(&mut self, key: StreamKey) -> Option<&mut Stream> {
        self.slots.get_mut(key.slot as usize)?.as_mut().filter(|stream| stream.id == key.id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (StreamKey, &Stream)> {
        self.slots.iter().enumerate().filter_map(|(slot, stream)| {
            let stream = stream.as_ref()?;
            Some((StreamKey { slot: slot as u32, id: stream.id }, stream))
        })
    }

    /// The id must not be in use.
    pub(super) fn insert(&mut self, stream: Stream) -> StreamKey {
        let id = stream.id;
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                (self.slots.len() - 1) as u32
            }
        };
        self.slots[slot as usize] = Some(stream);
        self.by_id.insert(id, slot);
        StreamKey { slot, id }
    }

    pub(super) fn remove(&mut self, key: StreamKey) -> Option<Stream> {
        self.get(key)?;
        self.leave(key, List::Bulk);
        self.leave(key, List::Control);
        self.by_id.remove(&key.id);
        self.free.push(key.slot);
        self.slots[key.slot as usize].take()
    }

    /// To the end of a list; a stream that stands in it, or in another list of turns, stays there.
    pub(super) fn join(&mut self, key: StreamKey, list: List) {
        let last = self.lists[list as usize].last;
        let Some(stream) = self.get_mut(key) else { return };
        let links = stream.links(list);
        if links.list != 0 {
            return;
        }
        *links = Links { list: list.number(), previous: last, next: NOBODY };
        match self.slots.get_mut(last as usize).and_then(Option::as_mut) {
            Some(before) => before.links(list).next = key.slot,
            None => self.lists[list as usize].first = key.slot,
        }
        self.lists[list as usize].last = key.slot;
    }

    /// Out of a list; for the two lists of turns either of them says the same.
    pub(super) fn leave(&mut self, key: StreamKey, list: List) {
        let Some(stream) = self.get_mut(key) else { return };
        let Links { list: number, previous, next } = std::mem::take(stream.links(list));
        if number == 0 {
            return;
        }
        match self.slots.get_mut(previous as usize).and_then(Option::as_mut) {
            Some(before) => before.links(list).next = next,
            None => self.lists[usize::from(number) - 1].first = next,
        }
        match self.slots.get_mut(next as usize).and_then(Option::as_mut) {
            Some(behind) => behind.links(list).previous = previous,
            None => self.lists[usize::from(number) - 1].last = previous,
        }
    }

    pub(super) fn first(&self, list: List) -> Option<StreamKey> {
        let slot = self.lists[list as usize].first;
        let stream = self.slots.get(slot as usize)?.as_ref()?;
        Some(StreamKey { slot, id: stream.id })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The lists do what queues do that are searched from end to end.
        #[test]
        fn lists_are_queues(steps in proptest::collection::vec((0u8..5, 0u32..12), 0..200)) {
            let mut table = Table::default();
            let mut turns: [VecDeque<u32>; 2] = Default::default();
            let mut control: VecDeque<u32> = VecDeque::new();
            for (what, id) in steps {
                let id = id + 1;
                let Some(key) = table.find(id) else {
                    table.insert(Stream::new(id, Duration::ZERO));
                    continue;
                };
                match what {
                    0 | 1 => {
                        let list = if what == 0 { List::Fresh } else { List::Bulk };
                        table.join(key, list);
                        if !turns.iter().any(|turn| turn.contains(&id)) {
                            turns[usize::from(what)].push_back(id);
                        }
                    }
                    2 => {
                        table.join(key, List::Control);
                        if !control.contains(&id) {
                            control.push_back(id);
                        }
                    }
                    3 => {
                        table.leave(key, List::Fresh);
                        turns.iter_mut().for_each(|turn| turn.retain(|other| *other != id));
                    }
                    _ => {
                        table.remove(key);
                        prop_assert!(table.get(key).is_none() && table.remove(key).is_none());
                        turns.iter_mut().for_each(|turn| turn.retain(|other| *other != id));
                        control.retain(|other| *other != id);
                    }
                }
                let first = |list| table.first(list).map(|key| key.id);
                prop_assert_eq!(first(List::Fresh), turns[0].front().copied());
                prop_assert_eq!(first(List::Bulk), turns[1].front().copied());
                prop_assert_eq!(first(List::Control), control.front().copied());
            }
            for (list, expected) in [(List::Fresh, &turns[0]), (List::Bulk, &turns[1]), (List::Control, &control)] {
                let mut seen = Vec::new();
                while let Some(key) = table.first(list) {
                    table.leave(key, list);
                    seen.push(key.id);
                }
                prop_assert!(seen.iter().eq(expected), "{:?}", list);
            }
        }
    }

    #[test]
    fn a_stream_is_small() {
        assert!(size_of::<Option<Stream>>() <= 112, "{}", size_of::<Option<Stream>>());
    }
}

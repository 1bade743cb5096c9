//! Connections of a server whose clients are not let in yet: how many there may be, and who gives way.
//!
//! Clients that are let in have places of their own, so strangers who say nothing hold none of them up. What is
//! bounded here is memory, and the work of handshakes. Where the places are taken, a newcomer does not wait, for who
//! fills them would have it wait: the address that has most of them loses one, the one that said least, of those
//! the oldest.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Phase};

/// How far a client's handshake is. A stranger can be slow in each, but has to know more for the next. A TLS handshake
/// is one step of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Progress {
    /// It said nothing that begins a handshake.
    Silent,
    /// It speaks.
    Speaks,
    /// Its credentials are there, and somebody is asked about them.
    Asked,
}

/// The table of a server.
#[derive(Debug)]
pub(crate) struct Handshakes {
    most: usize,
    /// Whether all connections are bounded together, served ones too.
    among_connections: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    number: u64,
    gave_way: u64,
    /// By age.
    under_way: HashMap<u64, Entry>,
    /// By network; who said least first, of those the oldest.
    crowds: HashMap<u64, BTreeSet<(Progress, u64)>>,
    /// Each network by how many it has, and by its first: a flood is not searched for who gives way.
    order: BTreeSet<(Reverse<usize>, (Progress, u64), u64)>,
}

#[derive(Debug)]
struct Entry {
    network: u64,
    progress: Progress,
    leave: Arc<Notify>,
}

/// A place; dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Handshake {
    all: Arc<Handshakes>,
    number: u64,
    leave: Arc<Notify>,
}

impl Handshakes {
    pub(crate) fn new(most: u32) -> Arc<Self> {
        Arc::new(Self { most: most as usize, among_connections: false, state: Mutex::default() })
    }

    /// A table of all connections that are not served yet, where the server bounds connections as a whole: nobody
    /// gives way but by [`make_room`](Self::make_room).
    pub(crate) fn among_connections() -> Arc<Self> {
        Arc::new(Self { most: usize::MAX, among_connections: true, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection from that network ([`Address::network`]). Where all are taken, another one gives way.
    ///
    /// [`Address::network`]: crate::stream::Address::network
    pub(crate) fn enter(self: &Arc<Self>, network: u64) -> Handshake {
        let mut state = self.state();
        if state.under_way.len() >= self.most {
            state.make_room();
        }
        state.number += 1;
        let (number, leave) = (state.number, Arc::new(Notify::new()));
        state.add(number, Entry { network, progress: Progress::Silent, leave: Arc::clone(&leave) });
        Handshake { all: Arc::clone(self), number, leave }
    }

    /// Has one of them give way; whether there was one.
    pub(crate) fn make_room(&self) -> bool {
        self.state().make_room()
    }

    /// The same where `left` descriptors would not do for all that are not served yet: each takes another one for its
    /// service, and those who never get as far take the last ones from those who do.
    pub(crate) fn make_room_within(&self, left: usize) -> bool {
        let mut state = self.state();
        state.under_way.len() >= left && state.make_room()
    }

    /// How many are under way, and how many gave way since the server began.
    pub(crate) fn counts(&self) -> (usize, u64) {
        let state = self.state();
        (state.under_way.len(), state.gave_way)
    }
}

impl State {
    fn make_room(&mut self) -> bool {
        let Some(&(_, (_, number), _)) = self.order.first() else { return false };
        if let Some(entry) = self.remove(number) {
            self.gave_way += 1;
            entry.leave.notify_one();
        }
        true
    }

    fn add(&mut self, number: u64, entry: Entry) {
        self.change(entry.network, |crowd| crowd.insert((entry.progress, number)));
        self.under_way.insert(number, entry);
    }

    fn remove(&mut self, number: u64) -> Option<Entry> {
        let entry = self.under_way.remove(&number)?;
        self.change(entry.network, |crowd| crowd.remove(&(entry.progress, number)));
        Some(entry)
    }

    fn change(&mut self, network: u64, act: impl FnOnce(&mut BTreeSet<(Progress, u64)>) -> bool) {
        let place = |crowd: &BTreeSet<(Progress, u64)>| {
            crowd.first().map(|first| (Reverse(crowd.len()), *first, network))
        };
        let crowd = self.crowds.entry(network).or_default();
        if let Some(before) = place(crowd) {
            self.order.remove(&before);
        }
        act(crowd);
        match place(crowd) {
            Some(after) => self.order.insert(after),
            None => self.crowds.remove(&network).is_some(),
        };
    }
}

impl Handshake {
    /// It is further now.
    pub(crate) fn reached(&self, progress: Progress) {
        let mut state = self.all.state();
        if let Some(entry) = state.remove(self.number) {
            state.add(self.number, Entry { progress, ..entry });
        }
    }

    /// Waits until it has to give way; why.
    pub(crate) async fn gives_way(&self) -> Error {
        self.leave.notified().await;
        let full = |what| {
            let text = format!("gave way to another client: {what}");
            Error::new(ErrorKind::ResourceLimit, text).with_phase(Phase::Handshake)
        };
        if self.all.among_connections {
            full("max_connections, or all that the process has descriptors for, are open")
                .with_reason("too_many_connections")
        } else {
            full("too many handshakes are under way").with_reason("too_many_handshakes")
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.all.state().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;
    use crate::stream::address::network;

    fn come(all: &Arc<Handshakes>, from: &str) -> Handshake {
        all.enter(network(from.parse().unwrap()))
    }

    fn gone(one: &Handshake) -> bool {
        pin!(one.gives_way()).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn the_oldest_that_said_least_gives_way() {
        let all = Handshakes::new(3);
        let there = [come(&all, "192.0.2.1"), come(&all, "192.0.2.1"), come(&all, "192.0.2.1")];
        there[0].reached(Progress::Asked);
        there[1].reached(Progress::Speaks);
        assert!(!there.iter().any(gone));
        let newcomer = come(&all, "192.0.2.1");
        assert_eq!(there.each_ref().map(gone), [false, false, true]);
        newcomer.reached(Progress::Speaks);
        let last = come(&all, "192.0.2.1");
        assert_eq!((gone(&there[0]), gone(&there[1]), gone(&newcomer)), (false, true, false));
        assert_eq!(all.counts(), (3, 2));
        drop((there, newcomer, last));
        assert_eq!(all.counts(), (0, 2));
    }

    #[test]
    fn who_has_most_of_them_loses_one() {
        let all = Handshakes::new(4);
        let honest = come(&all, "192.0.2.1");
        let one = [come(&all, "2001:db8::1"), come(&all, "2001:db8::2"), come(&all, "2001:db8::3")];
        one.iter().for_each(|one| one.reached(Progress::Asked));
        let other = come(&all, "192.0.2.2");
        assert_eq!((gone(&honest), one.each_ref().map(gone)), (false, [true, false, false]));
        // A place that was given up is free.
        drop(one);
        let more = [come(&all, "192.0.2.3"), come(&all, "192.0.2.4")];
        assert!(!gone(&honest) && !gone(&other) && !more.iter().any(gone));
    }

    #[test]
    fn a_table_without_a_bound_makes_room_when_it_is_asked_to() {
        let all = Handshakes::among_connections();
        assert!(!all.make_room(), "all are served");
        let there = [come(&all, "192.0.2.1"), come(&all, "192.0.2.1"), come(&all, "192.0.2.2")];
        there[0].reached(Progress::Speaks);
        assert!(!there.iter().any(gone));
        assert!(all.make_room());
        assert_eq!(there.each_ref().map(gone), [false, true, false]);
        assert!(all.make_room());
        assert_eq!(there.each_ref().map(gone), [false, false, true], "both have one: who said less");
        drop(there);
        assert!(!all.make_room());
        let state = all.state();
        assert!(state.under_way.is_empty() && state.crowds.is_empty() && state.order.is_empty());
    }

    #[test]
    fn each_has_a_descriptor_left_for_its_service() {
        let all = Handshakes::among_connections();
        let there = [come(&all, "192.0.2.1"), come(&all, "192.0.2.1")];
        assert!(!all.make_room_within(3));
        assert!(!there.iter().any(gone));
        assert!(all.make_room_within(2));
        assert_eq!(there.each_ref().map(gone), [true, false]);
        assert!(!all.make_room_within(2), "one is left, and two descriptors");
        assert!(all.make_room_within(0));
        assert_eq!(there.each_ref().map(gone), [false, true]);
        assert!(!all.make_room_within(0), "all are served");
    }

    #[test]
    fn there_are_never_more_than_that() {
        let all = Handshakes::new(16);
        let there: Vec<_> = (0..1_000u32).map(|n| all.enter(network(n.to_be_bytes().into()))).collect();
        assert_eq!(all.counts(), (16, 984));
        assert!(there[..984].iter().all(gone), "each by itself: the oldest");
        assert!(!there[984..].iter().any(gone));
    }
}

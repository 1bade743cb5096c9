//! How the data plane speaks to whoever decides: completions, events and policy questions, in one
//! bounded queue per listener.
//!
//! A [`Mailbox`] belongs to one event loop (or one thread) of the control plane. Its descriptor is
//! readable while messages wait, so a loop watches it like a socket and no I/O thread ever takes
//! the interpreter's lock. Everything that waits for an answer carries a key that the listener chose.
//!
//! What is bounded: an operation posts exactly one completion and a question is posted only while
//! somebody waits for it, so their number is that of the calls under way; events have
//! [`EVENT_CAPACITY`] places, and what does not fit is counted and told as [`Body::EventsLost`].

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Result};
use crate::runtime;
use crate::sys;
use crate::tls::options::Secret;

/// Events that wait at most. A listener that is this far behind has stopped listening.
pub const EVENT_CAPACITY: usize = 1024;

/// A message with the key of whom it is for.
#[derive(Debug)]
pub struct Message<V, E> {
    /// Chosen by the listener when it asked or subscribed.
    pub key: u64,
    /// What it says.
    pub body: Body<V, E>,
}

/// What a message says. `V` is the value of a finished operation, `E` an event.
#[derive(Debug)]
pub enum Body<V, E> {
    /// An operation ended.
    Done(Result<V>),
    /// Something happened.
    Event(E),
    /// This many events did not fit; posted in their place.
    EventsLost(u64),
    /// A decision is wanted.
    Question(Question),
}

/// A question. Dropping it is giving no answer, which is no yes.
#[derive(Debug)]
pub struct Question {
    /// What it is about.
    pub subject: Subject,
    asker: Asker,
}

/// Who waits for the answer.
#[derive(Debug)]
enum Asker {
    Task(oneshot::Sender<bool>),
    Thread(mpsc::SyncSender<Option<Secret>>),
}

impl Question {
    /// Answers a question for yes or no; to any other this is a no. `false` comes back where nobody waits
    /// any more (the deadline is over).
    pub fn answer(self, yes: bool) -> bool {
        match self.asker {
            Asker::Task(asker) => asker.send(yes).is_ok(),
            Asker::Thread(asker) => asker.send(None).is_ok(),
        }
    }

    /// Answers a question for a key; to any other this is a no.
    pub fn answer_key(self, key: Option<Secret>) -> bool {
        match self.asker {
            Asker::Task(asker) => asker.send(false).is_ok(),
            Asker::Thread(asker) => asker.send(key).is_ok(),
        }
    }
}

/// A service that a tunnel's client wants to expose: its name, first and last public port that will do, the
/// address at which that is to listen.
pub type AskedService = (String, Option<(u16, u16)>, Option<String>);

/// What a policy decides on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Whether a peer may go on after the native verification, before any application data.
    Peer {
        /// Its chain in DER, its own certificate first.
        certificates: Vec<Vec<u8>>,
        /// Its pre-shared key identity.
        psk_identity: Option<String>,
        /// Where it connects from, where that is known.
        address: Option<String>,
    },
    /// The key of a client with this pre-shared key identity.
    Psk {
        /// What the client calls its key.
        identity: Vec<u8>,
    },
    /// Whether a client may have a tunnel.
    TunnelClient {
        /// Its number among the server's.
        id: u64,
        /// What it says of itself, a JSON object.
        credentials: String,
        /// Where it connects from.
        address: String,
    },
    /// Whether a client may expose what it names, where it asks for it.
    TunnelServices {
        /// Its number among the server's.
        id: u64,
        /// What it says of itself, a JSON object.
        credentials: String,
        /// Where it connects from.
        client: String,
        /// The name whose ports it wants, where it says one.
        lease: Option<String>,
        /// Each of them.
        services: Vec<AskedService>,
    },
    /// Whether somebody may visit a tunnel.
    TunnelVisitor {
        /// The tunnel's number among the server's.
        id: u64,
        /// What the tunnel's client says of itself, a JSON object.
        credentials: String,
        /// Where the tunnel's client connects from.
        client: String,
        /// The name whose ports it wants, where it says one.
        lease: Option<String>,
        /// The tunnel's public port.
        port: u16,
        /// Whether the client is one of our own kind.
        negotiated: bool,
        /// All of its services.
        services: Vec<ExposedService>,
        /// Where the visitor connects from.
        visitor: String,
    },
}

/// What an exposed service is called, its public port, and the host of that where it is not the usual one.
pub type ExposedService = (String, u16, Option<String>);

/// The listener's end and everybody's way to post.
#[derive(Debug)]
pub struct Mailbox<V, E> {
    state: Mutex<State<V, E>>,
    bell: Arc<Bell>,
}

/// What the listener's loop watches.
#[derive(Debug)]
struct Bell {
    signal: sys::Signal,
    /// Messages wait that no drain has taken; changed under the mailbox's lock.
    rung: AtomicBool,
}

impl Bell {
    fn set(&self) {
        if self.rung.load(Ordering::Relaxed) {
            self.signal.set();
        }
    }
}

impl runtime::AfterTurn for Bell {
    fn run(&self) {
        self.set();
    }
}

#[derive(Debug)]
struct State<V, E> {
    messages: VecDeque<Message<V, E>>,
    events: usize,
    /// Key and count of events that were lost since the last drain.
    lost: Vec<(u64, u64)>,
    closed: bool,
}

impl<V, E> Mailbox<V, E> {
    /// A mailbox with a descriptor of its own.
    pub fn new() -> Result<Arc<Self>> {
        let signal = sys::Signal::new().map_err(|source| {
            Error::io(ErrorKind::ResourceLimit, "make the descriptor of a mailbox", &source)
        })?;
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                messages: VecDeque::new(),
                events: 0,
                lost: Vec::new(),
                closed: false,
            }),
            bell: Arc::new(Bell { signal, rung: AtomicBool::new(false) }),
        }))
    }

    /// Readable while messages wait.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.signal.as_fd()
    }

    /// Takes all messages, oldest first; events that were lost come last.
    pub fn drain(&self) -> Vec<Message<V, E>> {
        let mut state = self.lock();
        self.bell.rung.store(false, Ordering::Relaxed);
        // Always: who tells does so with the lock free, perhaps of what an earlier drain has taken.
        self.bell.signal.clear();
        state.events = 0;
        let mut messages: Vec<_> = state.messages.drain(..).collect();
        messages.extend(state.lost.drain(..).map(|(key, n)| Message { key, body: Body::EventsLost(n) }));
        messages
    }

    /// Blocks until a message waits, at most `timeout`; whether one does. A signal's arrival ends the
    /// wait early (then `false`).
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.bell.signal.wait(timeout)
    }

    /// Takes no more messages, and ends every wait; those that wait are dropped, and questions among
    /// them mean no.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.messages.clear();
        state.lost.clear();
        self.bell.rung.store(true, Ordering::Relaxed);
        drop(state);
        self.bell.set();
    }

    /// Posts the end of an operation.
    pub fn done(&self, key: u64, result: Result<V>) {
        self.post(self.lock(), Message { key, body: Body::Done(result) });
    }

    /// Posts an object's last event together with the ends of operations that waited for it: one
    /// wake-up. A last event is never lost.
    pub fn last(&self, key: u64, event: E, done: impl IntoIterator<Item = (u64, Result<V>)>) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        state.messages.push_back(Message { key, body: Body::Event(event) });
        let done = done.into_iter().map(|(key, result)| Message { key, body: Body::Done(result) });
        state.messages.extend(done);
        self.wake(state);
    }

    /// Posts an event, or counts it as lost.
    pub fn event(&self, key: u64, event: E) {
        let mut state = self.lock();
        if state.events >= EVENT_CAPACITY {
            match state.lost.iter_mut().find(|(k, _)| *k == key) {
                Some((_, n)) => *n += 1,
                None => state.lost.push((key, 1)),
            }
            return;
        }
        state.events += 1;
        self.post(state, Message { key, body: Body::Event(event) });
    }

    /// Asks and waits. `None` is no answer: none within `deadline`, one that failed, or a listener that is gone.
    pub async fn ask(&self, key: u64, subject: Subject, deadline: Duration) -> Option<bool> {
        let (answer, answered) = oneshot::channel();
        self.post(
            self.lock(),
            Message { key, body: Body::Question(Question { subject, asker: Asker::Task(answer) }) },
        );
        tokio::time::timeout(deadline, answered).await.ok()?.ok()
    }

    /// Asks for a client's pre-shared key and blocks; no answer within `deadline` means that there is
    /// none, and so does a listener that is gone.
    pub fn ask_for_key(&self, key: u64, identity: &[u8], deadline: Duration) -> Option<Secret> {
        let (asker, answered) = mpsc::sync_channel(1);
        let subject = Subject::Psk { identity: identity.to_vec() };
        let question = Question { subject, asker: Asker::Thread(asker) };
        self.post(self.lock(), Message { key, body: Body::Question(question) });
        self.bell.set(); // this thread has no further turn before the answer
        answered.recv_timeout(deadline).ok().flatten()
    }

    fn post(&self, mut state: MutexGuard<'_, State<V, E>>, message: Message<V, E>) {
        if state.closed {
            return;
        }
        state.messages.push_back(message);
        self.wake(state);
    }

    /// Tells the listener, who comes for the lock at once: it is free by then.
    fn wake(&self, state: MutexGuard<'_, State<V, E>>) {
        let first = !self.bell.rung.swap(true, Ordering::Relaxed);
        drop(state);
        if first {
            runtime::after_turn(&self.bell);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<V, E>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// For callers that keep the descriptor beyond the mailbox.
impl<V, E> Mailbox<V, E> {
    /// A duplicate of the descriptor.
    pub fn duplicate_fd(&self) -> Result<OwnedFd> {
        self.as_fd()
            .try_clone_to_owned()
            .map_err(|source| Error::io(ErrorKind::ResourceLimit, "duplicate a mailbox descriptor", &source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Box = Mailbox<u32, u32>;

    #[test]
    fn completions_and_events_come_in_order_and_clear_the_signal() {
        let mailbox = Box::new().unwrap();
        assert!(!mailbox.wait(Some(Duration::ZERO)));
        mailbox.done(1, Ok(7));
        mailbox.event(2, 9);
        assert!(mailbox.wait(None));
        let keys: Vec<_> = mailbox.drain().iter().map(|m| m.key).collect();
        assert_eq!(keys, [1, 2]);
        assert!(!mailbox.wait(Some(Duration::ZERO)));
    }

    /// Runs `turn` on an I/O thread, and gives what it gives once that turn is over and its end was heard of.
    fn in_a_turn<T: Send + 'static>(mailbox: &Arc<Box>, turn: fn(&Box) -> T) -> T {
        let tells = Arc::clone(mailbox);
        let (answer, answered) = mpsc::channel();
        runtime::spawn("test", async move {
            let given = turn(&tells);
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
            answer.send(given).unwrap();
        })
        .unwrap();
        answered.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn what_an_io_thread_tells_in_one_turn_is_told_once_and_behind_it() {
        let mailbox = Box::new().unwrap();
        let told_within = in_a_turn(&mailbox, |tells| {
            tells.done(1, Ok(7));
            tells.event(2, 9);
            tells.wait(Some(Duration::ZERO))
        });
        assert!(!told_within);
        assert!(mailbox.wait(Some(Duration::ZERO)));
        assert_eq!(mailbox.drain().len(), 2);
        assert!(!mailbox.wait(Some(Duration::ZERO)));
    }

    #[test]
    fn what_is_taken_before_the_end_of_its_turn_wakes_nobody() {
        let mailbox = Box::new().unwrap();
        let taken = in_a_turn(&mailbox, |tells| {
            tells.done(1, Ok(7));
            tells.drain().len()
        });
        assert_eq!(taken, 1);
        assert!(!mailbox.wait(Some(Duration::ZERO)));
    }

    #[test]
    fn who_is_told_of_what_is_taken_already_is_woken_once() {
        let mailbox = Box::new().unwrap();
        mailbox.done(1, Ok(7));
        assert_eq!(mailbox.drain().len(), 1);
        // As an I/O thread does that was held up in between.
        mailbox.bell.signal.set();
        assert!(mailbox.wait(Some(Duration::ZERO)));
        assert!(mailbox.drain().is_empty());
        assert!(!mailbox.wait(Some(Duration::ZERO)), "a loop would turn for ever");
    }

    #[test]
    fn an_io_thread_that_waits_for_a_key_tells_at_once() {
        let mailbox = Box::new().unwrap();
        let asks = Arc::clone(&mailbox);
        let answers = std::thread::spawn(move || {
            assert!(mailbox.wait(Some(Duration::from_secs(10))));
            let Some(Body::Question(question)) = mailbox.drain().pop().map(|message| message.body) else {
                panic!("not a question")
            };
            assert!(question.answer_key(Some(Secret::new(*b"secret"))));
        });
        let key = in_a_turn(&asks, |asks| asks.ask_for_key(1, b"x", Duration::from_secs(5)));
        assert_eq!(key, Some(Secret::new(*b"secret")));
        answers.join().unwrap();
    }

    #[test]
    fn events_are_bounded_and_the_loss_is_told() {
        let mailbox = Box::new().unwrap();
        for n in 0..EVENT_CAPACITY as u32 + 3 {
            mailbox.event(5, n);
        }
        mailbox.done(6, Ok(0));
        let messages = mailbox.drain();
        assert_eq!(messages.len(), EVENT_CAPACITY + 2);
        assert!(matches!(messages.last().unwrap().body, Body::EventsLost(3)));
        mailbox.event(5, 0);
        assert_eq!(mailbox.drain().len(), 1);
    }

    fn peer() -> Subject {
        Subject::Peer { certificates: Vec::new(), psk_identity: None, address: None }
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_that_does_not_answer_says_neither_yes_nor_no() {
        let mailbox = Box::new().unwrap();
        assert_eq!(mailbox.ask(1, peer(), Duration::from_secs(5)).await, None);
        mailbox.close();
        assert_eq!(mailbox.ask(1, peer(), Duration::from_secs(5)).await, None);
    }

    #[test]
    fn a_key_is_asked_for_and_waited_for() {
        let mailbox = Box::new().unwrap();
        let soon = Duration::from_millis(1);
        assert_eq!(mailbox.ask_for_key(1, b"x", soon), None, "nobody answers");
        drop(mailbox.drain());
        let answering = Arc::clone(&mailbox);
        let answered = std::thread::spawn(move || {
            for key in [Some(Secret::new(*b"secret")), None] {
                assert!(answering.wait(Some(Duration::from_secs(10))));
                let Some(Body::Question(question)) = answering.drain().pop().map(|m| m.body) else {
                    panic!("not a question")
                };
                assert_eq!(question.subject, Subject::Psk { identity: b"x".to_vec() });
                assert!(question.answer_key(key));
            }
        });
        let late = Duration::from_secs(10);
        assert_eq!(mailbox.ask_for_key(1, b"x", late), Some(Secret::new(*b"secret")));
        assert_eq!(mailbox.ask_for_key(1, b"x", late), None);
        answered.join().unwrap();
        mailbox.close();
        assert_eq!(mailbox.ask_for_key(1, b"x", late), None, "a closed mailbox answers at once");
    }

    #[tokio::test]
    async fn a_policy_that_says_yes_is_heard() {
        let mailbox = Box::new().unwrap();
        let (allowed, ()) = tokio::join!(mailbox.ask(1, peer(), Duration::from_secs(5)), async {
            for message in mailbox.drain() {
                let Body::Question(question) = message.body else { panic!("not a question") };
                assert!(question.answer(true));
            }
        });
        assert_eq!(allowed, Some(true));
    }
}

//! Warnings of the data plane on their way into the program's own log.
//!
//! Whoever warns does it with `tracing`; [`install`] has this process hear it. A record waits here in a bounded
//! queue, and every mailbox that [hears](hear) is told once that there is something to [`take`]: the first that
//! does takes all, so a loop that is busy or gone holds up no other. Where none hears, records wait for the next
//! who looks. Nobody who warns waits for a reader, and the interpreter is not known here.
//!
//! Warnings and errors only: what happens to one connection is an event, and what happens to one packet a
//! counter. What a peer sends is never in a record but as the text of an error.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use sapper_proto::shown;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Level, Metadata, Subscriber};

use crate::bridge::{ControlMailbox, Event};
use crate::sys;

#[cfg(test)]
mod tests;

/// Records that wait at most: a reader that is this far behind reads none, and each is a line for people.
pub const CAPACITY: usize = 256;

/// So many records of one place in the code within [`PERIOD`]; further ones are counted. A condition of the
/// system (no descriptor is left) is the same for everybody who meets it, as often as it is met.
const BURST: u32 = 3;
const PERIOD: Duration = Duration::from_secs(10);

/// Letters of one value: an error's text may hold what a file or a peer said.
const LONGEST: usize = 300;

static LOG: Log = Log::new();

/// One line for the program's log.
#[derive(Clone, Debug)]
pub struct Record {
    /// Whether it is an error, rather than a warning.
    pub is_error: bool,
    /// Who says it, as the Python package names its parts: `sapper.stream.listen`.
    pub logger: String,
    /// What happened.
    pub message: String,
    /// What it happened to: names and values.
    pub fields: Vec<(&'static str, String)>,
    /// More of the same place that were left out since its last record.
    pub left_out: u64,
    /// The source file and its line.
    pub place: (&'static str, u32),
    /// The thread that said it.
    pub thread: String,
    /// When.
    pub time: SystemTime,
}

/// What waited.
#[derive(Debug, Default)]
pub struct Taken {
    /// Oldest first.
    pub records: Vec<Record>,
    /// Newer ones that did not fit.
    pub lost: u64,
}

/// Has this process hear what the data plane warns of, unless the program has a subscriber of its own.
pub fn install() {
    // Already installed: by us, or by a Rust program that hears for itself.
    let _ = tracing::subscriber::set_global_default(Bridge(&LOG));
}

/// Tells this mailbox, with [`Event::Log`] and this key, whenever something waits. It ends with the mailbox.
pub fn hear(mailbox: &Arc<ControlMailbox>, key: u64) {
    LOG.hear(mailbox, key);
}

/// Takes all that waits; with `last` also the counts of what was left out, which begin anew.
pub fn take(last: bool) -> Taken {
    LOG.take(last)
}

struct Log {
    state: Mutex<State>,
    /// The process that the state belongs to.
    forks: AtomicU32,
}

struct State {
    waiting: VecDeque<Record>,
    lost: u64,
    hearers: Vec<Hearer>,
    sources: Vec<Source>,
}

struct Hearer {
    mailbox: Weak<ControlMailbox>,
    key: u64,
    /// It was told and has not looked yet.
    told: bool,
}

/// One place in the code that has said something.
struct Source {
    callsite: Identifier,
    since: Instant,
    said: u32,
    left_out: u64,
    /// What is said for what was left out, where nothing else comes.
    last: Record,
}

impl State {
    const fn new() -> Self {
        Self { waiting: VecDeque::new(), lost: 0, hearers: Vec::new(), sources: Vec::new() }
    }

    fn put(&mut self, record: Record) {
        if self.waiting.len() < CAPACITY {
            self.waiting.push_back(record);
        } else {
            self.lost += 1;
        }
    }

    /// Whom to tell that something waits: outside the lock, for a mailbox may end with this.
    fn whom_to_tell(&mut self) -> Vec<(Arc<ControlMailbox>, u64)> {
        self.hearers.retain(|one| one.mailbox.strong_count() > 0);
        let quiet = self.hearers.iter_mut().filter(|one| !one.told);
        quiet
            .filter_map(|one| {
                one.told = true;
                one.mailbox.upgrade().map(|mailbox| (mailbox, one.key))
            })
            .collect()
    }
}

impl Log {
    const fn new() -> Self {
        Self { state: Mutex::new(State::new()), forks: AtomicU32::new(0) }
    }

    /// `None` where a thread held the lock when this process was forked off: nobody gives it back here.
    fn lock(&self) -> Option<MutexGuard<'_, State>> {
        let forks = sys::forks();
        if self.forks.load(Ordering::Acquire) == forks {
            return Some(self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        }
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        // What waited is the parent's to tell.
        *state = State::new();
        self.forks.store(forks, Ordering::Release);
        Some(state)
    }

    fn say(&self, callsite: Identifier, mut record: Record, now: Instant) {
        let Some(mut state) = self.lock() else { return };
        match state.sources.iter_mut().find(|one| one.callsite == callsite) {
            Some(source) => {
                if now.saturating_duration_since(source.since) >= PERIOD {
                    (source.since, source.said) = (now, 0);
                }
                if source.said == BURST {
                    source.left_out += 1;
                    return;
                }
                source.said += 1;
                record.left_out = std::mem::take(&mut source.left_out);
                source.last.clone_from(&record);
            }
            // As many as there are places in the code.
            None => {
                let last = record.clone();
                state.sources.push(Source { callsite, since: now, said: 1, left_out: 0, last });
            }
        }
        state.put(record);
        let hearers = state.whom_to_tell();
        drop(state);
        tell(hearers);
    }

    fn hear(&self, mailbox: &Arc<ControlMailbox>, key: u64) {
        let Some(mut state) = self.lock() else { return };
        state.hearers.push(Hearer { mailbox: Arc::downgrade(mailbox), key, told: false });
        state.hearers.retain(|one| one.mailbox.strong_count() > 0);
        let hearers = if state.waiting.is_empty() { Vec::new() } else { state.whom_to_tell() };
        drop(state);
        tell(hearers);
    }

    fn take(&self, last: bool) -> Taken {
        let Some(mut state) = self.lock() else { return Taken::default() };
        let mut records: Vec<_> = state.waiting.drain(..).collect();
        if last {
            let left_out = state.sources.drain(..).filter(|source| source.left_out > 0);
            records.extend(left_out.map(|source| {
                // It stands for one of them.
                Record { left_out: source.left_out - 1, time: SystemTime::now(), ..source.last }
            }));
        }
        state.hearers.iter_mut().for_each(|one| one.told = false);
        Taken { records, lost: std::mem::take(&mut state.lost) }
    }
}

fn tell(hearers: Vec<(Arc<ControlMailbox>, u64)>) {
    for (mailbox, key) in hearers {
        mailbox.event(key, Event::Log);
    }
}

/// What `tracing` tells.
struct Bridge(&'static Log);

impl Subscriber for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN && metadata.target().starts_with("sapper_")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &tracing::Event<'_>) {
        let metadata = event.metadata();
        let mut said = Said::default();
        event.record(&mut said);
        let record = Record {
            is_error: *metadata.level() == Level::ERROR,
            logger: logger(metadata.target()),
            message: said.message,
            fields: said.fields,
            left_out: 0,
            place: (metadata.file().unwrap_or_default(), metadata.line().unwrap_or_default()),
            thread: thread::current().name().unwrap_or_default().to_owned(),
            time: SystemTime::now(),
        };
        self.0.say(metadata.callsite(), record, Instant::now());
    }

    // Spans are not used in the data plane.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// `sapper_net::stream::listen` is `sapper.stream.listen`.
fn logger(target: &str) -> String {
    let path = target.split_once("::").map_or("", |(_, path)| path);
    let mut name = "sapper".to_owned();
    path.split("::").filter(|part| !part.is_empty()).for_each(|part| {
        let _ = write!(name, ".{part}");
    });
    name
}

#[derive(Default)]
struct Said {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Visit for Said {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = line(&format!("{value:?}"));
        if field.name() == "message" {
            self.message = text;
        } else {
            self.fields.push((field.name(), text));
        }
    }
}

/// One line of it, and nothing in it that moves a cursor.
fn line(text: &str) -> String {
    let mut out = String::new();
    for letter in text.chars().take(LONGEST) {
        if shown::misleads(letter) {
            out.extend(letter.escape_default());
        } else {
            out.push(letter);
        }
    }
    if text.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}

//! Records on their way, each test with a log of its own.

use super::*;
use crate::mailbox::Body;

fn log() -> &'static Log {
    Box::leak(Box::new(Log::new()))
}

fn with(log: &'static Log, work: impl FnOnce()) {
    tracing::subscriber::with_default(Bridge(log), work);
}

fn warn_of(number: usize) {
    tracing::warn!(number, "the same place");
}

/// How often a mailbox was told.
fn told(mailbox: &ControlMailbox, key: u64) -> usize {
    let messages = mailbox.drain();
    messages.iter().filter(|one| one.key == key && matches!(one.body, Body::Event(Event::Log))).count()
}

#[test]
fn a_warning_becomes_a_record_in_the_words_of_the_package() {
    let log = log();
    with(log, || {
        let error = std::io::Error::from_raw_os_error(libc::EMFILE);
        tracing::warn!(listener = "127.0.0.1:1\n\u{1b}[2J", %error, pause = ?Duration::from_millis(10), "no room");
        tracing::error!("worse");
        tracing::info!("nobody wants to know");
        tracing::warn!(target: "somebody::else", "not ours");
    });
    let taken = log.take(false);
    assert_eq!(taken.lost, 0);
    let [one, two] = &taken.records[..] else { panic!("{taken:?}") };
    assert_eq!((one.is_error, one.message.as_str()), (false, "no room"));
    assert_eq!(one.logger, "sapper.log.tests");
    assert_eq!(one.fields[0], ("listener", "127.0.0.1:1\\n\\u{1b}[2J".to_owned()));
    assert!(one.fields[1].1.contains("Too many open files"), "{one:?}");
    assert_eq!(one.fields[2], ("pause", "10ms".to_owned()));
    assert!(one.place.0.ends_with("tests.rs") && one.place.1 > 0, "{one:?}");
    assert_eq!((two.is_error, two.message.as_str()), (true, "worse"));
    assert!(log.take(false).records.is_empty(), "they are taken once");
}

#[test]
fn a_long_value_is_cut() {
    assert_eq!(line(&"x".repeat(LONGEST)), "x".repeat(LONGEST));
    assert_eq!(line(&"é".repeat(5_000)).chars().count(), LONGEST + 1);
}

#[test]
fn one_place_that_repeats_itself_is_bounded_and_the_rest_is_counted() {
    let log = log();
    with(log, || (0..100).for_each(warn_of));
    let records = log.take(false).records;
    assert_eq!(records.len(), BURST as usize);
    assert!(records.iter().all(|one| one.left_out == 0));
    // Time is an argument: a period later the same place is heard again, and says what it left out.
    let record = records[0].clone();
    let state = log.lock().unwrap();
    let (callsite, later) = (state.sources[0].callsite.clone(), state.sources[0].since + PERIOD);
    drop(state);
    for _ in 0..BURST + 5 {
        log.say(callsite.clone(), record.clone(), later);
    }
    let again = log.take(true).records;
    assert_eq!(again.len(), BURST as usize + 1);
    assert_eq!(again[0].left_out, 97);
    assert_eq!(again[1].left_out, 0);
    // The last to look hears of those behind too, one of which is this record itself.
    assert_eq!(again.last().unwrap().left_out, 4);
    assert!(log.take(true).records.is_empty());
}

#[test]
fn every_mailbox_is_told_once_and_the_first_takes_all() {
    let log = log();
    let [one, two, gone] = [(); 3].map(|()| ControlMailbox::new().unwrap());
    log.hear(&one, 7);
    log.hear(&two, 8);
    log.hear(&gone, 9);
    drop(gone);
    with(log, || (0..2).for_each(warn_of));
    assert_eq!((told(&one, 7), told(&two, 8)), (1, 1));
    assert_eq!(log.lock().unwrap().hearers.len(), 2, "a mailbox that is gone is forgotten");
    assert_eq!(log.take(false).records.len(), 2);
    assert!(log.take(false).records.is_empty(), "the other comes too late");
    with(log, || warn_of(3));
    assert_eq!((told(&one, 7), told(&two, 8)), (1, 1), "who has looked is told again");
}

#[test]
fn what_nobody_hears_waits_for_the_next() {
    let log = log();
    with(log, || warn_of(1));
    let mailbox = ControlMailbox::new().unwrap();
    log.hear(&mailbox, 1);
    assert_eq!(told(&mailbox, 1), 1);
    log.take(false);
    let other = ControlMailbox::new().unwrap();
    log.hear(&other, 1);
    assert_eq!(told(&other, 1), 0, "nothing waits any more");
}

#[test]
fn the_queue_is_bounded_and_the_loss_is_told() {
    let log = log();
    with(log, || warn_of(0));
    let record = log.take(false).records.remove(0);
    let mut state = log.lock().unwrap();
    for _ in 0..CAPACITY + 5 {
        state.put(record.clone());
    }
    drop(state);
    let taken = log.take(false);
    assert_eq!((taken.records.len(), taken.lost), (CAPACITY, 5));
    assert_eq!(log.take(false).lost, 0);
}

#[test]
fn a_lock_that_was_held_at_the_fork_holds_nobody_up_in_the_child() {
    let log = log();
    with(log, || warn_of(0));
    let held = log.lock().unwrap();
    log.forks.store(sys::forks() + 1, Ordering::Release); // as the child finds it
    with(log, || warn_of(1));
    assert!(log.take(true).records.is_empty());
    drop(held);
    with(log, || warn_of(2));
    let records = log.take(true).records;
    assert_eq!(records.len(), 1, "what the parent had is the parent's to tell");
    assert_eq!(records[0].fields, [("number", "2".to_owned())]);
}

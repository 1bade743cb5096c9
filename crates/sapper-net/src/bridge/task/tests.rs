//! Steps of a bridge's life whose order a test from outside cannot choose.

use std::future::{pending, ready};
use std::time::Duration;

use super::*;
use crate::mailbox::Mailbox;

#[tokio::test]
async fn a_stop_does_not_undo_a_step_that_need_not_wait() {
    // Joining the ends takes no time as a rule. Were it dropped because a stop came just before, the
    // connection would go with it, and the peer would miss the close_notify.
    let shared = Arc::new(Shared::default());
    let (_commands, inbox) = mpsc::channel(1);
    let events = Reply::new(Mailbox::new().unwrap(), 0);
    let mut task = Task::new(Prepared::empty(), Arc::clone(&shared), inbox, events);
    shared.request_stop(Duration::ZERO);
    assert!(matches!(task.during(ready(7)).await, Ok(7)));
    assert!(matches!(task.during(pending::<()>()).await, Err(End::Stopped)));
}

#[tokio::test]
async fn a_stop_may_be_shortened_while_payload_is_still_to_come() {
    let shared = Arc::new(Shared::default());
    shared.note_start().unwrap();
    shared.request_stop(Duration::from_secs(3_600));
    let mut ends = std::pin::pin!(shared.stopped_before_payload());
    assert!(timeout(Duration::from_millis(10), &mut ends).await.is_err());
    shared.request_stop(Duration::ZERO);
    assert!(!ends.await.drain, "this one delivers nothing");
}

#[test]
fn an_idle_bridge_is_small() {
    let (_commands, inbox) = mpsc::channel(1);
    let events = Reply::new(Mailbox::new().unwrap(), 0);
    let task = run(Prepared::empty(), Arc::new(Shared::default()), inbox, events);
    // Its states share their room; what only a hello or a handshake needs is boxed.
    assert!(size_of_val(&task) <= 2304, "{} bytes", size_of_val(&task));
}

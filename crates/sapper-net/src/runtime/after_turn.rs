//! What an I/O thread puts off until everybody who is ready had a turn.
//!
//! Whoever is told something across threads is woken up for it, which costs more than most of what is told. So
//! all that one round of an I/O thread has to tell a listener wakes it once: it is told after the sockets were
//! asked once more who is ready.

use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};

/// Something to do after a turn.
pub(crate) trait AfterTurn: Send + Sync {
    /// Does it.
    fn run(&self);
}

/// What waits on this thread.
struct Waiting {
    /// Each is here once between two of its runs, or now and then once more.
    jobs: Vec<Arc<dyn AfterTurn>>,
    /// Of the task that does them; `None` on every other thread.
    waker: Option<Waker>,
}

thread_local! {
    static WAITING: RefCell<Waiting> = const { RefCell::new(Waiting { jobs: Vec::new(), waker: None }) };
}

/// Has `job` run after this turn of the I/O thread; at once, where this is none.
pub(crate) fn after_turn<J: AfterTurn + 'static>(job: &Arc<J>) {
    let waits = WAITING.with_borrow_mut(|waiting| {
        let Some(waker) = &waiting.waker else { return false };
        if waiting.jobs.is_empty() {
            waker.wake_by_ref();
        }
        waiting.jobs.push(Arc::clone(job) as Arc<dyn AfterTurn>);
        true
    });
    if !waits {
        job.run();
    }
}

/// The task of each I/O thread that does what waits.
pub(super) async fn run() {
    let mut jobs: Vec<Arc<dyn AfterTurn>> = Vec::new();
    loop {
        poll_fn(|cx| {
            WAITING.with_borrow_mut(|waiting| {
                waiting.waker = Some(cx.waker().clone());
                if waiting.jobs.is_empty() { Poll::Pending } else { Poll::Ready(()) }
            })
        })
        .await;
        // Asks the sockets who is ready, and those have their turn first.
        tokio::task::yield_now().await;
        WAITING.with_borrow_mut(|waiting| std::mem::swap(&mut waiting.jobs, &mut jobs));
        for job in jobs.drain(..) {
            job.run();
        }
    }
}

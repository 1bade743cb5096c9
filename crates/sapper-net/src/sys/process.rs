//! Which process this is, without asking the system each time, and on which machine.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

static FORKS: AtomicU32 = AtomicU32::new(0);
static WATCHING: Once = Once::new();

/// How many forks lie between this process and the one that first asked: an object that remembers the
/// number knows whether it is still in the process that made it. (Every handle is asked that at every
/// call; `getpid` is a system call.)
pub fn forks() -> u32 {
    WATCHING.call_once(|| {
        // SAFETY: the handler only changes atomics and closes descriptors, which a fork's child may do, and lives as
        // long as this library.
        let outcome = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
        assert_eq!(outcome, 0, "there is no memory to watch for forks");
    });
    FORKS.load(Ordering::Relaxed)
}

/// What is the same on this machine (or in this container) from one process to the next. Not to be shown to
/// others but as a hash: the system's identifier is confidential.
pub fn machine() -> Vec<u8> {
    let mut name = [0u8; 256];
    // SAFETY: the buffer outlives the call and its length is given; a name that is cut stays the same.
    unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
    // Containers of one image may share the identifier, and machines that were never named a name.
    let identifier = std::fs::read("/etc/machine-id").unwrap_or_default();
    [&name[..], &identifier].concat()
}

extern "C" fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    super::children::close_in_child();
}

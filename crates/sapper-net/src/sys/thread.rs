//! What an I/O thread asks of the system's scheduler.

/// Asks for short turns on the core. A thread that carries bulk uses its turns up, and what one byte of somebody
/// else then waits for is the turns of all others on the core: with the system's own, 3 ms each. Where that cannot
/// be had, turns are as long as they are.
///
/// Linux takes it for threads of the usual policy from 6.12 on, without a privilege; before, it changes nothing.
#[cfg(target_os = "linux")]
pub(crate) fn take_short_turns() {
    /// Many batches of packets long: a change of threads, a few microseconds, is little of it.
    const TURN_NS: u64 = 300_000;
    // SAFETY: all-zero bytes are a valid `sched_attr`.
    let mut wanted: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the structure outlives both calls, which read and write as much of it as its size says, and 0 is this
    // thread. What it has (its niceness, its policy) stays.
    unsafe {
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut wanted, size, 0) != 0 {
            return;
        }
        if wanted.sched_policy == libc::SCHED_OTHER as u32 {
            wanted.size = size;
            wanted.sched_runtime = TURN_NS;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const wanted, 0);
        }
    }
}

/// Lets whoever waits for this core go first. A thread that always has more to do is otherwise interrupted at the
/// clock's next tick only, milliseconds later; where nobody waits it is a system call and no more.
pub(crate) fn offer_core() {
    std::thread::yield_now();
}

/// There is no such wish here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn take_short_turns() {}

//! When a generator's packets are due.
//!
//! The event loop's own timers count milliseconds: 75 packets at once at a modest rate. Where the
//! system has a timer descriptor the packets leave in groups of a tenth of that.

use std::task::{Context, Poll, ready};

use super::now_nanos;
use crate::error::{Error, Result};

/// Shortest time between two groups of packets.
const SHORTEST_PAUSE: u64 = 100_000;

/// A fixed rate from a moment on. A generator that was held up makes up for it: its packets carry the
/// time when they were due, so that the delay is measured and not hidden.
pub(super) struct Pace {
    begun: u64,
    rate: u64,
    timer: imp::Timer,
}

impl Pace {
    pub(super) fn new(rate: u32) -> Result<Self> {
        if rate == 0 {
            return Err(Error::config("rate", "must be above zero"));
        }
        Ok(Self { begun: now_nanos(), rate: u64::from(rate), timer: imp::Timer::new()? })
    }

    /// When packet `number` is due.
    pub(super) fn due_at(&self, number: u64) -> u64 {
        self.begun + (u128::from(number) * 1_000_000_000 / u128::from(self.rate)) as u64
    }

    /// How many packets from `number` on are due now, at least one.
    pub(super) fn poll_due(&mut self, cx: &mut Context<'_>, number: u64) -> Poll<Result<u64>> {
        loop {
            let now = now_nanos();
            let elapsed = u128::from(now - self.begun);
            // Packet 0 is due at once.
            let due = (elapsed * u128::from(self.rate) / 1_000_000_000) as u64 + 1;
            if due > number {
                return Poll::Ready(Ok(due - number));
            }
            let at = self.due_at(number).max(now + SHORTEST_PAUSE);
            ready!(self.timer.poll_until(cx, at, now))?;
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod imp {
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use tokio::io::unix::AsyncFd;

    use super::*;
    use crate::error::ErrorKind;
    use crate::port::sys::watch;

    pub(super) struct Timer {
        fd: AsyncFd<OwnedFd>,
        armed: bool,
    }

    impl Timer {
        pub(super) fn new() -> Result<Self> {
            // SAFETY: it touches no memory.
            let fd = unsafe {
                libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC)
            };
            if fd < 0 {
                return Err(failed(&io::Error::last_os_error()));
            }
            // SAFETY: the kernel just made this descriptor for us, so nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            Ok(Self { fd: watch(fd, "a timer")?, armed: false })
        }

        /// Ready once the clock has passed `at`.
        pub(super) fn poll_until(&mut self, cx: &mut Context<'_>, at: u64, _now: u64) -> Poll<Result<()>> {
            if !self.armed {
                let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                let value = libc::timespec {
                    tv_sec: (at / 1_000_000_000) as libc::time_t,
                    tv_nsec: (at % 1_000_000_000) as libc::c_long,
                };
                let setting = libc::itimerspec { it_interval: zero, it_value: value };
                // SAFETY: it reads the setting; the old one is not asked for.
                let set = unsafe {
                    libc::timerfd_settime(
                        self.fd.as_raw_fd(),
                        libc::TFD_TIMER_ABSTIME,
                        &raw const setting,
                        std::ptr::null_mut(),
                    )
                };
                if set < 0 {
                    return Poll::Ready(Err(failed(&io::Error::last_os_error())));
                }
                self.armed = true;
            }
            loop {
                let mut guard = ready!(self.fd.poll_read_ready(cx)).map_err(|source| failed(&source))?;
                let mut fired = [0; 8];
                // SAFETY: the pointer and the length are those of the array.
                let n = unsafe { libc::read(self.fd.as_raw_fd(), fired.as_mut_ptr().cast(), fired.len()) };
                guard.clear_ready();
                if n > 0 {
                    self.armed = false;
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    fn failed(source: &io::Error) -> Error {
        Error::io(ErrorKind::ResourceLimit, "use a timer", source)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod imp {
    use std::future::Future;
    use std::pin::Pin;
    use std::time::Duration;

    use tokio::time::{Sleep, sleep};

    use super::*;

    pub(super) struct Timer(Option<Pin<Box<Sleep>>>);

    impl Timer {
        pub(super) fn new() -> Result<Self> {
            Ok(Self(None))
        }

        pub(super) fn poll_until(&mut self, cx: &mut Context<'_>, at: u64, now: u64) -> Poll<Result<()>> {
            let pause = Duration::from_nanos(at.saturating_sub(now));
            let sleep = self.0.get_or_insert_with(|| Box::pin(sleep(pause)));
            ready!(sleep.as_mut().poll(cx));
            self.0 = None;
            Poll::Ready(Ok(()))
        }
    }
}

//! Non-blocking use of a caller's open file, without a trace afterwards.
//!
//! `O_NONBLOCK` belongs to the open file, not to the descriptor: a duplicate shares it with the
//! caller (and a terminal with every program on it). Sockets do not need it (`MSG_DONTWAIT`). The
//! rest is opened a second time where the system can ([`reopen`]), and only what is left gets the
//! flag, which goes away with the last user ([`NonBlocking`]).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, OnceLock};

use super::{identity, open_flags};

/// Opens what is behind `fd` again, as an open file of our own that does not block.
///
/// Only for pipes, FIFOs and terminals: what opening does twice to another device, or to the master
/// of a pseudo-terminal, is that device's own business (a new queue, a new terminal). Fails where
/// /proc is missing or the file's mode does not let us.
pub fn reopen(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mode = open_flags(fd)? & libc::O_ACCMODE;
    let path = format!("/proc/self/fd/{}\0", fd.as_raw_fd());
    // SAFETY: `path` ends with a NUL and lives through the call.
    let again = unsafe {
        libc::open(path.as_ptr().cast(), mode | libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
    };
    if again < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us, so nobody else owns it.
    let again = unsafe { OwnedFd::from_raw_fd(again) };
    if identity(again.as_fd())? != identity(fd)? {
        return Err(io::Error::other("/proc/self/fd led to another file"));
    }
    Ok(again)
}

/// A descriptor whose open file is non-blocking as long as this lives, and as before afterwards.
///
/// Two of these on one object (a terminal as standard input and output) may share the open file: the
/// flag stays until the last one goes.
#[derive(Debug)]
pub struct NonBlocking {
    fd: Option<OwnedFd>,
    key: Key,
    /// The flag was not set before us.
    owed: bool,
}

/// Object and access mode: the two ends of a pipe are never the same open file.
type Key = (u64, u64, i32);

#[derive(Default)]
struct Users {
    count: usize,
    /// Descriptors whose owners are gone, but whose open file may still be in use here.
    owed: Vec<OwnedFd>,
}

fn table() -> MutexGuard<'static, HashMap<Key, Users>> {
    static TABLE: OnceLock<Mutex<HashMap<Key, Users>>> = OnceLock::new();
    TABLE.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl NonBlocking {
    /// Sets the flag, or notes that it was set.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let (device, inode) = identity(fd.as_fd())?;
        let mut table = table();
        let flags = open_flags(fd.as_fd())?;
        let owed = flags & libc::O_NONBLOCK == 0;
        if owed {
            set_flags(fd.as_fd(), flags | libc::O_NONBLOCK)?;
        }
        let key = (device, inode, flags & libc::O_ACCMODE);
        table.entry(key).or_default().count += 1;
        Ok(Self { fd: Some(fd), key, owed })
    }
}

impl Drop for NonBlocking {
    fn drop(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        let mut table = table();
        let Some(users) = table.get_mut(&self.key) else { return };
        users.count -= 1;
        if self.owed {
            users.owed.push(fd);
        }
        if users.count == 0
            && let Some(users) = table.remove(&self.key)
        {
            for fd in users.owed {
                // It can only fail for a descriptor that is not open, and we own this one.
                let _ = clear(fd.as_fd());
            }
        }
    }
}

impl AsRawFd for NonBlocking {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for NonBlocking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("only drop takes it").as_fd()
    }
}

/// Makes an open file block that was opened with the flag so that opening does not wait.
pub(super) fn clear(fd: BorrowedFd<'_>) -> io::Result<()> {
    open_flags(fd).and_then(|flags| set_flags(fd, flags & !libc::O_NONBLOCK))
}

fn set_flags(fd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    // SAFETY: F_SETFL touches no memory.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

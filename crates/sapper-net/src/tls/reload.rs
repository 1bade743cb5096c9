//! [`Watch`]: reads a configuration's files again when they change.
//!
//! Files are looked at twice a second by a thread of its own: their owner may replace a link in the middle
//! of a path, or a whole folder, and that cannot be subscribed to. A change counts when nothing has moved
//! for one more look, so that a certificate and its key are not read between the two writes. Where the system has
//! no room to open one they are tried again, and nobody is told of a bad reload: what is there may be good.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::config::TlsConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(500);

/// A thread that reloads a configuration. It ends when this is dropped.
pub struct Watch(Arc<Shared>);

struct Shared {
    closed: Mutex<bool>,
    wake: Condvar,
}

impl Watch {
    /// Watches the files of `config`. `tell` hears of every reload, on the watch's thread: `Ok` of one that
    /// took place, an error (the old files' content is still in use) of one that did not.
    pub fn start(config: Arc<TlsConfig>, tell: impl Fn(Result<()>) + Send + 'static) -> Result<Self> {
        let files = config.files();
        if files.is_empty() {
            return Err(Error::config(
                "credentials",
                "there is no file to watch: certificates and keys were given as bytes",
            ));
        }
        let shared = Arc::new(Shared { closed: Mutex::new(false), wake: Condvar::new() });
        let its = Arc::clone(&shared);
        runtime::spawn_thread("sapper-watch", move || its.run(&config, &files, &tell))
            .map_err(|source| Error::io(ErrorKind::ResourceLimit, "start the watch's thread", &source))?;
        Ok(Self(shared))
    }
}

impl Drop for Watch {
    /// Nothing is told any more when this returns. The thread ends by itself: it may be in the middle of a
    /// read that hangs.
    fn drop(&mut self) {
        *self.0.lock() = true;
        self.0.wake.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.closed.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn run(&self, config: &TlsConfig, files: &[PathBuf], tell: &impl Fn(Result<()>)) {
        let mut seen: Vec<Option<Stamp>> = files.iter().map(Stamp::of).collect();
        // What changed between their reading and now is found by reading them once more.
        let mut changed = true;
        let mut warned = false;
        while self.wait() {
            let now: Vec<_> = files.iter().map(Stamp::of).collect();
            if now != seen {
                seen = now;
                changed = true;
            } else if std::mem::take(&mut changed) {
                let result = config.reload();
                if let Err(error) = &result
                    && is_exhausted(error)
                {
                    // That says nothing about the files: they are read at the next look.
                    changed = true;
                    if !std::mem::replace(&mut warned, true) {
                        tracing::warn!(%error, "TLS files cannot be read now and are tried again");
                    }
                    continue;
                }
                warned = false;
                let closed = self.lock();
                if *closed {
                    return;
                }
                match result {
                    Ok(true) => tell(Ok(())),
                    Ok(false) => {}
                    Err(error) => tell(Err(error)),
                }
            }
        }
    }

    /// Until the next look; `false` when the watch is over.
    fn wait(&self) -> bool {
        let waited = self.wake.wait_timeout_while(self.lock(), INTERVAL, |closed| !*closed);
        !*waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0
    }
}

/// The system has no room to open a file.
fn is_exhausted(error: &Error) -> bool {
    matches!(error.errno(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// What changes when a file does, whoever writes it and however.
#[derive(PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: impl AsRef<std::path::Path>) -> Option<Self> {
        std::fs::metadata(file).ok().map(|file: Metadata| Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }
}

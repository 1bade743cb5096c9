//! The file of leases: one server's at a time, and whole, or as it was before.
//!
//! A disk may be slow, and nobody is to wait for it but who starts the server or stops it: what is read and written is so
//! on a thread of its own. One write at a time; who wants to write waits for its turn first and says then what there is, so
//! that everything that changed meanwhile is one write, and no older one comes behind a newer one.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::spawn_thread;
use crate::sys::NotForChildren;

/// The file, which is nobody else's as long as there is this.
pub(super) struct LeaseFile {
    path: PathBuf,
    /// Which state of the table it has, by the registry's count.
    written: AtomicU64,
    turn: Arc<Semaphore>,
    #[cfg(test)]
    pub(super) disk: std::sync::Mutex<Option<tests::Disk>>,
    _lock: (NotForChildren, File),
}

/// What is to be written.
pub(super) struct Table {
    pub(super) text: String,
    /// Which state it is.
    pub(super) state: u64,
}

/// Its holder alone writes.
pub(super) struct Turn {
    file: Arc<LeaseFile>,
    _permit: OwnedSemaphorePermit,
}

impl LeaseFile {
    /// Takes it, and reads what is in it, where there is one.
    pub(super) async fn open(path: PathBuf) -> Result<(Arc<Self>, Option<String>)> {
        apart(move || {
            let path = resolved(path);
            let lock = own(&path)?;
            let text = read(&path)?;
            let file = Self {
                path,
                written: AtomicU64::new(0),
                turn: Arc::new(Semaphore::new(1)),
                #[cfg(test)]
                disk: std::sync::Mutex::default(),
                _lock: (NotForChildren::new(lock.as_fd()), lock),
            };
            Ok((Arc::new(file), text))
        })
        .await
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Which state of the table it has.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// When nobody else writes.
    pub(super) async fn turn(self: Arc<Self>) -> Turn {
        let permit = Arc::clone(&self.turn).acquire_owned().await.expect("it is never closed");
        Turn { file: self, _permit: permit }
    }

    fn failed(&self, source: &std::io::Error) -> Error {
        Error::io(ErrorKind::Device, format_args!("write the leases to {}", self.path.display()), source)
            .with_field("lease_file")
    }

    /// Why the last write is not waited for.
    pub(super) fn too_slow(&self) -> Error {
        self.failed(&std::io::ErrorKind::TimedOut.into())
    }

    /// Another one in its place: whole, or not at all.
    fn replace(&self, table: &Table) -> std::io::Result<()> {
        let beside = beside(&self.path, ".new");
        // What a process that died left there may be readable for others.
        match std::fs::remove_file(&beside) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(source),
            _ => {}
        }
        let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        out.write_all(table.text.as_bytes())?;
        #[cfg(test)]
        self.wait_for_disk();
        out.sync_data()?;
        std::fs::rename(&beside, &self.path)?;
        self.written.store(table.state, Ordering::Release);
        Ok(())
    }
}

impl Turn {
    /// Writes it. What has begun is done also where nobody waits for it any more.
    pub(super) async fn write(self, table: Table) -> Result<()> {
        apart(move || {
            // The turn, and perhaps the file, are free before anybody hears of it.
            let Self { _permit, file } = self;
            file.replace(&table).map_err(|source| file.failed(&source))
        })
        .await
    }
}

/// Does what may wait for a disk on a thread of its own: others live on the I/O thread.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (done, answer) = oneshot::channel();
    spawn_thread("sapper-leases", move || drop(done.send(work())))
        .map_err(|source| Error::io(ErrorKind::ResourceLimit, "start a thread for the leases", &source))?;
    answer.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Device, "the leases' thread failed")))
}

/// Only one server has a file: a second one would write over its leases. The lock is beside it, for the file is
/// another one after each change.
fn own(file: &Path) -> Result<File> {
    let path = beside(file, ".lock");
    let failed = |source: std::io::Error| {
        Error::config("lease_file", format!("cannot lock {}: {source}", path.display()))
    };
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let lock = lock.map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => {
            let text = format!("{} is another server's, which runs: each needs its own", file.display());
            Err(Error::config("lease_file", text).with_reason("in_use"))
        }
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// The file that a symbolic link stands for, whether it is there yet or not: the lock of a link would be another one, and
/// the link itself be replaced by the first write.
fn resolved(path: PathBuf) -> PathBuf {
    /// More of them are a circle, which whoever opens it is told.
    const MOST_LINKS: usize = 40;
    let mut at = path.clone();
    for _ in 0..MOST_LINKS {
        match (std::fs::read_link(&at), at.parent()) {
            (Ok(target), Some(folder)) => at = folder.join(target),
            _ => return at,
        }
    }
    path
}

/// A file of the same name with more behind it.
fn beside(file: &Path, more: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(more);
    name.into()
}

fn read(file: &Path) -> Result<Option<String>> {
    // Opening a pipe waits for whoever writes into it, perhaps for ever.
    if std::fs::metadata(file).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return Err(Error::config("lease_file", format!("{} is no regular file", file.display())));
    }
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => {
            let what = format!("cannot read {}: {source}", file.display());
            Err(Error::config("lease_file", what))
        }
    }
}

#[cfg(test)]
mod tests;

//! The file of leases: one server's at a time, and whole, or as it was before.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sapper_proto::tunnel::lease::Leases;

use crate::error::{Error, ErrorKind, Result};

/// Only one server has a file: a second one would write over its leases. The lock is beside it, for the file is
/// another one after each change.
pub(super) fn own(file: &Path) -> Result<File> {
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

/// A file of the same name with more behind it.
fn beside(file: &Path, more: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(more);
    name.into()
}

pub(super) fn read(file: &Path, leases: &mut Leases) -> Result<()> {
    // Opening a pipe waits for whoever writes into it, perhaps for ever.
    if std::fs::metadata(file).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return Err(Error::config("lease_file", format!("{} is no regular file", file.display())));
    }
    match std::fs::read_to_string(file) {
        Ok(text) => leases
            .from_json(&text)
            .map_err(|why| Error::config("lease_file", format!("{}: {why}", file.display()))),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => {
            let what = format!("cannot read {}: {source}", file.display());
            Err(Error::config("lease_file", what))
        }
    }
}

/// Another one in its place: whole, or not at all.
pub(super) fn write(file: &Path, text: &str) -> Result<()> {
    let failed = |source: std::io::Error| {
        Error::io(ErrorKind::Device, format_args!("write the leases to {}", file.display()), &source)
            .with_field("lease_file")
    };
    let beside = beside(file, ".new");
    // What a process that died left there may be readable for others.
    match std::fs::remove_file(&beside) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(failed(source)),
        _ => {}
    }
    let only_ours = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside);
    let mut out = only_ours.map_err(failed)?;
    out.write_all(text.as_bytes()).and_then(|()| out.sync_data()).map_err(failed)?;
    std::fs::rename(&beside, file).map_err(failed)
}

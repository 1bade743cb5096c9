//! Where session secrets go that a user wants to see: a key log's lines, and a capture.
//!
//! What is not here: the secrets that the record layer needs ([`super::scene`]).

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::capture::Capture;
use super::options::{KeyLog, TlsOptions};
use crate::error::{Error, Result};

/// Where key log lines go.
pub(crate) struct KeyLogSink {
    lines: Option<Lines>,
    pub(crate) capture: Option<Arc<Capture>>,
}

enum Lines {
    File(Mutex<File>, PathBuf),
    Callback(Arc<dyn Fn(&str) + Send + Sync>),
}

impl fmt::Debug for KeyLogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyLogSink")
    }
}

impl KeyLogSink {
    /// Opens what the options name; `None` where they name nothing.
    pub(crate) fn open(options: &TlsOptions) -> Result<Option<Self>> {
        let lines = match &options.key_log {
            KeyLog::None => None,
            KeyLog::Callback(callback) => Some(Lines::Callback(Arc::clone(callback))),
            KeyLog::File(path) => OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                // A FIFO that nobody reads is an error, not a wait; to a file it means nothing.
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .map(|file| Some(Lines::File(Mutex::new(file), path.clone())))
                .map_err(|e| Error::config("key_log_file", format!("{}: {e}", path.display())))?,
        };
        let capture = options.capture.as_ref().map(Capture::of).transpose()?;
        Ok((lines.is_some() || capture.is_some()).then_some(Self { lines, capture }))
    }

    /// Writes one line, given without its newline.
    pub(crate) fn write(&self, line: &str) {
        match &self.lines {
            None => {}
            Some(Lines::Callback(callback)) => callback(line),
            Some(Lines::File(file, path)) => {
                // One write per line, so that several processes may share a file.
                let text = format!("{line}\n");
                let mut file = file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if let Err(error) = file.write_all(text.as_bytes()) {
                    tracing::warn!(path = %path.display(), %error, "the key log cannot be written");
                }
            }
        }
        if let Some(capture) = &self.capture {
            capture.secret(line);
        }
    }
}

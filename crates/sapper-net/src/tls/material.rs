//! [`Material`]: the bytes of a certificate, a key or a list, and the file that they came from.
//!
//! What is not here: what the bytes mean ([`super::credentials`], [`super::revocation`]), and when files
//! are read again ([`super::reload`]).

use std::fmt;
use std::path::{Path, PathBuf};

use super::options::Secret;
use crate::error::{Error, Result};

/// Larger files are no certificates: whoever names a disk image is told so, not served slowly.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// Bytes with the file they came from, where there is one. A reload reads the file again.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Material {
    // Secret whatever it is: keys are among them, and none is worth showing.
    bytes: Secret,
    file: Option<PathBuf>,
}

impl Material {
    /// Bytes that were read from `file` a moment ago.
    pub fn of_file(bytes: impl Into<Vec<u8>>, file: impl Into<PathBuf>) -> Self {
        Self { bytes: Secret::new(bytes), file: Some(file.into()) }
    }

    /// Reads a file; an error names `field`.
    pub fn read(file: impl Into<PathBuf>, field: &'static str) -> Result<Self> {
        let file = file.into();
        let fail = |what: &str| Error::config(field, format!("cannot read {}: {what}", file.display()));
        let known = std::fs::metadata(&file).map_err(|e| fail(&e.to_string()))?;
        if !known.is_file() {
            // A pipe would have us wait, a device would never end.
            return Err(fail("it is no regular file"));
        }
        if known.len() > MAX_FILE {
            return Err(fail("it is larger than any certificate, key or list"));
        }
        let bytes = std::fs::read(&file).map_err(|e| fail(&e.to_string()))?;
        Ok(Self { bytes: Secret::new(bytes), file: Some(file) })
    }

    /// The same, read again where it came from a file.
    pub(crate) fn again(&self, field: &'static str) -> Result<Self> {
        match &self.file {
            Some(file) => Self::read(file, field),
            None => Ok(self.clone()),
        }
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        self.bytes.expose()
    }

    /// What is wrong with the bytes, with the file that they came from: whoever hears of it at a reload did not
    /// name one now.
    pub(crate) fn blame(&self, error: Error) -> Error {
        match (&self.file, error.field()) {
            (Some(file), Some(field)) => {
                Error::config(field, format!("{}: {}", file.display(), error.message()))
            }
            _ => error,
        }
    }

    /// Where they came from.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }
}

impl From<Vec<u8>> for Material {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes: Secret::new(bytes), file: None }
    }
}

impl From<Secret> for Material {
    fn from(bytes: Secret) -> Self {
        Self { bytes, file: None }
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes.expose().len())?;
        self.file.as_ref().map_or(Ok(()), |file| write!(f, " of {}", file.display()))
    }
}

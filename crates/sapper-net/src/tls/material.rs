//! [`Material`]: the bytes of a certificate, a key or a list, and the file that they came from.
//!
//! What is not here: what the bytes mean ([`super::credentials`], [`super::revocation`]), and when files
//! are read again ([`super::reload`]).

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

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
    pub fn read(file: impl Into<PathBuf>, field: impl Into<Cow<'static, str>>) -> Result<Self> {
        let (file, field) = (file.into(), field.into());
        let fail =
            |what: &str| Error::config(field.clone(), format!("cannot read {}: {what}", file.display()));
        let denied = |source: io::Error| {
            let error = fail(&source.to_string());
            source.raw_os_error().map_or(error.clone(), |errno| error.with_errno(errno))
        };
        let known = std::fs::metadata(&file).map_err(denied)?;
        if !known.is_file() {
            // A pipe would have us wait, a device would never end.
            return Err(fail("it is no regular file"));
        }
        if known.len() > MAX_FILE {
            return Err(fail("it is larger than any certificate, key or list"));
        }
        let bytes = std::fs::read(&file).map_err(denied)?;
        Ok(Self { bytes: Secret::new(bytes), file: Some(file) })
    }

    /// The same, read again where it came from a file.
    pub(crate) fn again(&self, field: impl Into<Cow<'static, str>>) -> Result<Self> {
        match &self.file {
            Some(file) => Self::read(file, field),
            None => Ok(self.clone()),
        }
    }

    /// A pre-shared key's file, read again: hexadecimal digits, otherwise the key itself.
    pub(crate) fn key_again(&self, field: &str) -> Result<Self> {
        let Some(file) = &self.file else { return Ok(self.clone()) };
        let read = Self::read(file, field.to_owned())?;
        let text = read.expose();
        if !text.iter().all(|byte| byte.is_ascii_hexdigit() || byte.is_ascii_whitespace()) {
            return Ok(read);
        }
        let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|digit| digit as u8);
        let digits = Zeroizing::new(text.iter().filter_map(digit).collect::<Vec<_>>());
        if digits.len() % 2 != 0 {
            let text = format!("{} hexadecimal digits are no whole number of bytes", digits.len());
            return Err(read.blame(Error::config(field.to_owned(), text)));
        }
        let key: Vec<u8> = digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        Ok(Self { bytes: Secret::new(key), file: read.file })
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
                Error::config(field.to_owned(), format!("{}: {}", file.display(), error.message()))
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

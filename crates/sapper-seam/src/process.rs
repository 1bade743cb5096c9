//! What belongs to the process that made it: handles know it, so that a fork is refused in words.
//!
//! A fork copies memory, not threads: a handle in the child would wait for I/O threads that do not
//! exist, or take a lock that was held at the moment of the fork. So the child may neither use nor
//! drop what it inherited.

use std::mem::ManuallyDrop;

use pyo3::prelude::*;
use sapper_net::{Error, ErrorKind, sys};

use crate::errors;

/// A value that only the process that made it uses and drops.
pub struct Local<T> {
    value: ManuallyDrop<T>,
    forks: u32,
}

impl<T> Local<T> {
    /// Made here, for here.
    pub fn new(value: T) -> Self {
        Self { value: ManuallyDrop::new(value), forks: sys::forks() }
    }

    /// The value, or the error that says what to do in place of a fork.
    pub fn get(&self, py: Python<'_>) -> PyResult<&T> {
        if self.forks == sys::forks() {
            return Ok(&self.value);
        }
        let error = Error::new(
            ErrorKind::ApiMisuse,
            "this object belongs to the parent process: its I/O threads do not exist after a fork. Start \
             processes with the \"spawn\" or \"forkserver\" method, or use sapper only after the fork",
        )
        .with_reason("forked");
        Err(errors::to_py(py, &error))
    }
}

impl<T> Drop for Local<T> {
    fn drop(&mut self) {
        if self.forks == sys::forks() {
            // SAFETY: dropped once, here, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.value) }
        }
    }
}

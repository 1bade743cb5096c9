//! Warnings of the data plane, for Python's `logging`: each native module has its own copy of who warns.

use std::time::UNIX_EPOCH;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sapper_net::log;

/// Takes all lines that wait, and how many newer ones were lost. Each: whether it is an error, logger, message,
/// fields, how many like it were left out, source file and line, thread, seconds since 1970.
#[pyfunction]
#[pyo3(signature = (last))]
pub fn take_log<'py>(py: Python<'py>, last: bool) -> PyResult<(Vec<Bound<'py, PyAny>>, u64)> {
    let taken = log::take(last);
    let records = taken.records.into_iter().map(|one| {
        let fields = PyDict::new(py);
        for (name, text) in one.fields {
            fields.set_item(name, text)?;
        }
        let time = one.time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let (file, line) = one.place;
        (one.is_error, one.logger, one.message, fields, one.left_out, file, line, one.thread, time)
            .into_pyobject(py)
            .map(Bound::into_any)
    });
    Ok((records.collect::<PyResult<_>>()?, taken.lost))
}

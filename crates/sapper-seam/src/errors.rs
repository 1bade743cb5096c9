//! Errors cross the seam here, once: [`ErrorKind`] gives the Python class, the rest its context.
//!
//! The classes are defined in `sapper.errors`; the table is built from them at the first error, and a
//! test walks every kind. Nothing else in this crate makes an exception of Sapper's.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};
use sapper_net::{Error, ErrorKind};

/// What the table holds: a class per kind, in the order of [`ErrorKind::ALL`], and the context's class.
struct Table {
    classes: Vec<Py<PyType>>,
    context: Py<PyType>,
}

static TABLE: PyOnceLock<Table> = PyOnceLock::new();

fn table(py: Python<'_>) -> PyResult<&Table> {
    TABLE.get_or_try_init(py, || {
        let module = py.import("sapper.errors")?;
        let class_of = module.getattr("error_class")?;
        let classes = ErrorKind::ALL
            .iter()
            .map(|kind| Ok(class_of.call1((kind.as_str(),))?.cast_into::<PyType>()?.unbind()))
            .collect::<PyResult<_>>()?;
        let context = module.getattr("ErrorContext")?.cast_into::<PyType>()?.unbind();
        Ok(Table { classes, context })
    })
}

/// The exception of an error, as an object that is not raised yet.
pub fn to_object<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    let table = table(py)?;
    let context = PyDict::new(py);
    context.set_item("field", error.field())?;
    context.set_item("phase", error.phase().map(|phase| phase.as_str()))?;
    context.set_item("direction", error.direction().map(|direction| direction.as_str()))?;
    context.set_item("alert", error.alert())?;
    context.set_item("alert_received", error.alert_received())?;
    context.set_item("errno", error.errno())?;
    context.set_item("reason", error.reason())?;
    let context = table.context.bind(py).call((), Some(&context))?;
    let position = ErrorKind::ALL.iter().position(|kind| *kind == error.kind());
    let class = &table.classes[position.expect("ALL holds every kind")];
    class.bind(py).call1((error.message(), context))
}

/// The exception of an error.
pub fn to_py(py: Python<'_>, error: &Error) -> PyErr {
    match to_object(py, error) {
        Ok(exception) => PyErr::from_value(exception),
        Err(broken) => broken,
    }
}

/// `?` for results of the data plane.
pub trait OrRaise<T> {
    /// Turns the error into its exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for sapper_net::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| to_py(py, &error))
    }
}

/// Every kind of error with whether it may be tried again: tests compare it with `sapper.errors`.
#[pyfunction]
pub fn error_kinds() -> Vec<(&'static str, bool)> {
    ErrorKind::ALL.iter().map(|kind| (kind.as_str(), kind.is_retryable())).collect()
}

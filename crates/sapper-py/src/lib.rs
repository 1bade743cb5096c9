//! The binding: it converts.

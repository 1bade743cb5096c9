//! Plain values: words and seconds.

use std::time::Duration;

use sapper_net::{Error, Result};

/// Longest time that an option may state: a century, which fits every clock.
const LONGEST: f64 = 100.0 * 365.0 * 86_400.0;

/// Reads seconds; an error names the field.
pub fn seconds(field: &'static str) -> impl Fn(f64) -> Result<Duration> {
    move |seconds| {
        if seconds.is_nan() || seconds < 0.0 {
            return Err(Error::config(field, format!("must be seconds from 0, not {seconds}")));
        }
        Ok(Duration::from_secs_f64(seconds.min(LONGEST)))
    }
}

/// The value of a word; an error names the field and the words.
pub fn word<T: Clone>(field: &'static str, text: &str, words: &[(&str, T)]) -> Result<T> {
    words.iter().find(|(known, _)| *known == text).map(|(_, value)| value.clone()).ok_or_else(|| {
        let known: Vec<_> = words.iter().map(|(known, _)| *known).collect();
        Error::config(field, format!("{text:?} is none of {}", known.join(", ")))
    })
}

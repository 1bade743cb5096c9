//! When a server's session ends for good, however often it is resumed.
//!
//! Each resumption gives the client a new ticket, and none of them shows a certificate again. So what a server seals
//! into its tickets, or remembers in their place, begins with an end: that of the client's certificates, or a day
//! after the handshake that began it all (RFC 8446, section 4.6.1, recommends both). A session that has ended is not
//! resumed: the client shows what it has now.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use x509_parser::prelude::{FromDer, X509Certificate};

use super::scene::on_stage;

/// The longest time from a whole handshake to the last resumption of its session.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// Length of the end before a session, in seconds since 1970.
const STAMP: usize = 8;

/// Notes what a client shows in a whole handshake: its session ends with the first of these certificates.
pub(super) fn note_chain(chain: &[&[u8]]) {
    for der in chain {
        // What cannot be read has not been let in by it.
        if let Ok((_, certificate)) = X509Certificate::from_der(der) {
            note(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0));
        }
    }
}

/// A session as it is sealed or remembered.
pub(super) fn stamped(session: &[u8]) -> Vec<u8> {
    let longest = now() + LONGEST.as_secs();
    let end = on_stage(|scene| scene.session_end).flatten().unwrap_or(longest).min(longest);
    [&end.to_be_bytes(), session].concat()
}

/// The session, unless it has ended. What comes of it ends with it.
pub(super) fn unstamped(stamped: &[u8]) -> Option<Vec<u8>> {
    let (end, session) = stamped.split_first_chunk::<STAMP>()?;
    let end = u64::from_be_bytes(*end);
    (now() < end).then(|| {
        note(end);
        session.to_vec()
    })
}

fn note(end: u64) {
    on_stage(|scene| scene.session_end = Some(scene.session_end.map_or(end, |before| before.min(end))));
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::scene::{Scene, with_scene};

    fn on_a_stage<R>(act: impl FnOnce() -> R) -> R {
        with_scene(&mut Some(Box::<Scene>::default()), act)
    }

    fn end_of(stamped: &[u8]) -> u64 {
        u64::from_be_bytes(*stamped.first_chunk().unwrap())
    }

    #[test]
    fn what_comes_of_a_session_ends_with_it() {
        let first = on_a_stage(|| stamped(b"session"));
        let end = end_of(&first);
        assert!((now() + LONGEST.as_secs()).abs_diff(end) <= 1);
        let next = on_a_stage(|| {
            assert_eq!(unstamped(&first).as_deref(), Some(&b"session"[..]));
            stamped(b"its next ticket")
        });
        assert_eq!(end_of(&next), end);
    }

    #[test]
    fn the_first_end_counts_and_none_is_later_than_a_day() {
        let soon = now() + 60;
        let stamp = |ends: &[u64]| {
            on_a_stage(|| {
                ends.iter().for_each(|end| note(*end));
                stamped(b"")
            })
        };
        assert_eq!(end_of(&stamp(&[soon + 5, soon, soon + 9])), soon);
        assert!((now() + LONGEST.as_secs()).abs_diff(end_of(&stamp(&[u64::MAX]))) <= 1);
    }

    #[test]
    fn a_session_that_has_ended_is_none() {
        assert_eq!(unstamped(&[&(now() - 1).to_be_bytes()[..], b"session"].concat()), None);
        assert_eq!(unstamped(&[0; STAMP - 1]), None);
    }
}

//! A visitor that speaks TLS to a service that does not: seen by what both say first.

use sapper_proto::tunnel::mux::StreamKey;
use sapper_proto::tunnel::w3p::{Speech, recognise};

use super::Link;
use super::output::FAILED;
use crate::error::{Error, ErrorKind, Phase};
use crate::tunnel::notice::{Notice, VISITORS};

/// What the visitor of a stream begins with, and what its service does.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FirstWords([First; 2]);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum First {
    #[default]
    Nothing,
    Tls,
    Other,
}

impl FirstWords {
    /// The visitor, or the service, says that. Whether it is known since now that the visitor speaks TLS to a service
    /// that does not.
    pub(super) fn hears(&mut self, service: bool, bytes: &[u8]) -> bool {
        if !self.says_nothing(service) {
            return false;
        }
        self.0[usize::from(service)] = match recognise(bytes) {
            None => First::Nothing,
            Some(Speech::Tls) => First::Tls,
            Some(_) => First::Other,
        };
        self.0 == [First::Tls, First::Other]
    }

    /// The service says nothing more: whether the visitor spoke TLS, and it did not answer.
    pub(super) fn hears_no_more(&mut self) -> bool {
        let unheard = self.0 == [First::Tls, First::Nothing];
        if unheard {
            self.0[1] = First::Other;
        }
        unheard
    }

    /// Whether the visitor, or the service, has said nothing yet.
    pub(super) fn says_nothing(&self, service: bool) -> bool {
        self.0[usize::from(service)] == First::Nothing
    }
}

impl Link {
    /// The visitor speaks TLS, and the service does not; or it does not say. The bytes pass as ever: who is to be told
    /// is whoever runs this end.
    pub(super) fn tell_mismatch(&self, key: StreamKey, said: bool) {
        let service = if said { "answers without it" } else { "ends without a word: perhaps without it" };
        let text = format!(
            "the visitor speaks TLS, the service {service}; visit the port without TLS, or turn TLS on at public ports"
        );
        let error = Error::new(ErrorKind::IncompatiblePeer, text)
            .with_phase(Phase::Transfer)
            .with_reason("tls_at_plain_port");
        if self.teller.wants(VISITORS) {
            self.tell_stream(FAILED, key, Notice { error: Some(error), ..Notice::default() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &[u8] = &[22, 3, 1, 0, 200];

    #[test]
    fn tls_to_a_service_without_it_is_known_once() {
        let mut words = FirstWords::default();
        assert!(!words.hears(false, HELLO) && words.hears(true, b"HTTP/1.1 400 Bad Request"));
        assert!(!words.hears(true, b"more") && !words.hears_no_more());
        let mut greeted = FirstWords::default();
        assert!(!greeted.hears(true, b"220 ready") && greeted.hears(false, HELLO));
        let mut silent = FirstWords::default();
        assert!(!silent.hears(false, HELLO) && silent.hears_no_more() && !silent.hears_no_more());
    }

    #[test]
    fn others_are_left_alone() {
        let greeted = (&b"EHLO x"[..], &b"220 ready"[..]);
        for (visitor, service) in [(HELLO, &[22, 3, 3][..]), (HELLO, &[21, 3, 3][..]), greeted] {
            let mut words = FirstWords::default();
            assert!(!words.hears(false, visitor) && !words.hears(true, service) && !words.hears_no_more());
        }
        assert!(!FirstWords::default().hears_no_more());
    }
}

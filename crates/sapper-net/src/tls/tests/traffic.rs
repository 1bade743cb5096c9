//! What a peer may and may not send after the handshake, record by record: the peer is a pair of
//! keys here, so that it can say anything.

use zeroize::Zeroizing;

use super::*;
use crate::buffer::Buffer;
use crate::error::ErrorKind;
use crate::tls::Opened;
use crate::tls::failure::alert;
use crate::tls::key_schedule::{Exporter, Hash};
use crate::tls::record::{ALERT, APPLICATION_DATA, Aead, CHANGE_CIPHER_SPEC, DirectionKeys, HANDSHAKE};
use crate::tls::traffic::{Traffic, TrafficParts, TrafficSecrets};

const SECRET: [u8; 32] = [5; 32];

/// Our traffic and the keys of a peer that seals for it.
struct Lab {
    version: TlsVersion,
    ours: Traffic,
    peer: DirectionKeys,
    incoming: Buffer,
    outgoing: Buffer,
    tickets: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl Lab {
    fn new(version: TlsVersion, is_client: bool) -> Self {
        let keys = || match version {
            TlsVersion::V1_3 => DirectionKeys::from_secret(Aead::Aes128Gcm, Hash::Sha256, &SECRET).unwrap(),
            TlsVersion::V1_2 => DirectionKeys::new(version, Aead::Aes128Gcm, &[5; 16], [5; 12], 1).unwrap(),
        };
        let secret = || Zeroizing::new(SECRET.to_vec());
        let tickets: std::sync::Arc<std::sync::atomic::AtomicUsize> = Default::default();
        let seen = std::sync::Arc::clone(&tickets);
        let ours = Traffic::new(TrafficParts {
            version,
            is_client,
            aead: Aead::Aes128Gcm,
            hash: Hash::Sha256,
            seal: keys(),
            open: keys(),
            secrets: (version == TlsVersion::V1_3).then(|| TrafficSecrets { seal: secret(), open: secret() }),
            exporter: Exporter::Tls13 { secret: secret() },
            tickets: Some(Box::new(move |body| {
                seen.fetch_add(body.len(), std::sync::atomic::Ordering::Relaxed);
                Ok(())
            })),
            max_plain: 16_384,
        });
        Self { version, ours, peer: keys(), incoming: Buffer::new(), outgoing: Buffer::new(), tickets }
    }

    fn send(&mut self, content_type: u8, content: &[u8]) -> &mut Self {
        self.peer.seal(content_type, content, &mut self.incoming).unwrap();
        self
    }

    fn open(&mut self) -> Result<Opened> {
        let mut plain = vec![0; 64 * 1024];
        self.ours.open(&mut self.incoming, &mut plain, &mut RecordMarks::ignored(), &mut self.outgoing)
    }

    /// The error that comes, and that its alert was sent.
    fn refused(&mut self) -> (ErrorKind, u8) {
        let error = self.open().unwrap_err();
        let description = error.alert().unwrap();
        assert!(!error.alert_received());
        assert!(!self.outgoing.is_empty(), "the alert goes out");
        if self.version == TlsVersion::V1_3 {
            let mut reader = DirectionKeys::from_secret(Aead::Aes128Gcm, Hash::Sha256, &SECRET).unwrap();
            let mut plain = [0; 64];
            let size = reader.find(self.outgoing.data()).unwrap().unwrap();
            assert_eq!(reader.open(&self.outgoing.data()[..size], &mut plain).unwrap(), (ALERT, 2));
            assert_eq!(plain[..2], [2, description]);
        }
        // Nothing goes on after it.
        assert!(self.open().is_err());
        assert_eq!(self.ours.seal(b"x", &mut self.outgoing).unwrap_err().kind(), ErrorKind::ApiMisuse);
        (error.kind(), description)
    }
}

fn tls13(is_client: bool) -> Lab {
    Lab::new(TlsVersion::V1_3, is_client)
}

fn tls12(is_client: bool) -> Lab {
    Lab::new(TlsVersion::V1_2, is_client)
}

const UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
const UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];

#[test]
fn tickets_reach_the_client_whole_split_and_joined() {
    let ticket = [&[4, 0, 0, 30][..], &[1; 30]].concat();
    let mut lab = tls13(true);
    lab.send(HANDSHAKE, &ticket).send(HANDSHAKE, &[&ticket[..], &ticket].concat());
    lab.send(HANDSHAKE, &ticket[..2]).send(HANDSHAKE, &ticket[2..20]).send(HANDSHAKE, &ticket[20..]);
    lab.send(APPLICATION_DATA, b"data");
    assert_eq!(lab.open().unwrap().produced, 4);
    assert_eq!(lab.tickets.load(std::sync::atomic::Ordering::Relaxed), 4 * 30);
    assert!(lab.outgoing.is_empty());
}

#[test]
fn a_key_update_is_answered_when_it_asks() {
    let mut lab = tls13(false);
    lab.send(HANDSHAKE, &UPDATE);
    lab.open().unwrap();
    assert!(lab.outgoing.is_empty());
    let next = crate::tls::key_schedule::next_traffic_secret(Hash::Sha256, &SECRET).unwrap();
    lab.peer = DirectionKeys::from_secret(Aead::Aes128Gcm, Hash::Sha256, &next).unwrap();
    lab.send(APPLICATION_DATA, b"new keys").send(HANDSHAKE, &UPDATE_REQUESTED);
    assert_eq!(lab.open().unwrap().produced, 8);
    assert_eq!(lab.outgoing.len(), 5 + 5 + 1 + 16);
}

#[test]
fn messages_out_of_place_are_refused() {
    let unexpected = (ErrorKind::RemoteProtocol, alert::UNEXPECTED_MESSAGE);
    // A server gets no tickets; nobody gets a hello, a certificate request, a Finished.
    assert_eq!(tls13(false).send(HANDSHAKE, &[4, 0, 0, 1, 0]).refused(), unexpected);
    for kind in [0, 1, 2, 8, 11, 13, 20, 99] {
        assert_eq!(tls13(true).send(HANDSHAKE, &[kind, 0, 0, 1, 0]).refused(), unexpected, "{kind}");
    }
    for kind in [1, 2, 4, 11, 20, 24] {
        assert_eq!(tls12(true).send(HANDSHAKE, &[kind, 0, 0, 1, 0]).refused(), unexpected, "{kind}");
    }
    assert_eq!(tls12(false).send(HANDSHAKE, &[0, 0, 0, 0]).refused(), unexpected);
    // Other content types inside a sealed record.
    for kind in [0, CHANGE_CIPHER_SPEC, 24, 99] {
        if kind != 0 {
            assert_eq!(tls13(true).send(kind, &[1]).refused(), unexpected, "{kind}");
        }
    }
    // A key update that shares its record with what comes after it, or a fragment before it.
    assert_eq!(tls13(true).send(HANDSHAKE, &[&UPDATE[..], &[4]].concat()).refused(), unexpected);
    // Something between the fragments of a message.
    let mut lab = tls13(true);
    lab.send(HANDSHAKE, &[4, 0, 0, 30, 1]).send(APPLICATION_DATA, b"x");
    assert_eq!(lab.refused(), unexpected);
    let mut lab = tls13(true);
    lab.send(HANDSHAKE, &[4, 0, 0, 30, 1]).send(ALERT, &[1, 0]);
    assert_eq!(lab.refused(), unexpected);
    assert_eq!(tls13(true).send(HANDSHAKE, &[]).refused(), unexpected);
}

#[test]
fn malformed_messages_are_refused() {
    let refused = |content_type, content: &[u8]| tls13(true).send(content_type, content).refused().1;
    assert_eq!(refused(HANDSHAKE, &[24, 0, 0, 1, 2]), alert::ILLEGAL_PARAMETER);
    assert_eq!(refused(HANDSHAKE, &[24, 0, 0, 2, 0, 0]), alert::DECODE_ERROR);
    assert_eq!(refused(HANDSHAKE, &[24, 0, 0, 0]), alert::DECODE_ERROR);
    assert_eq!(refused(HANDSHAKE, &[4, 255, 255, 255]), alert::DECODE_ERROR);
    assert_eq!(refused(ALERT, &[2]), alert::DECODE_ERROR);
    assert_eq!(refused(ALERT, &[2, 40, 0]), alert::DECODE_ERROR);
}

#[test]
fn alerts_end_the_connection_or_warn() {
    let mut lab = tls13(true);
    lab.send(APPLICATION_DATA, b"last").send(ALERT, &[2, alert::INTERNAL_ERROR]);
    assert_eq!(lab.open().unwrap().produced, 4);
    let error = lab.open().unwrap_err();
    assert_eq!((error.kind(), error.alert()), (ErrorKind::Tls, Some(alert::INTERNAL_ERROR)));
    assert!(error.alert_received());
    assert!(lab.outgoing.is_empty(), "an alert is not answered by one");

    // In TLS 1.3 the level says nothing; user_canceled announces the end and is none.
    let mut lab = tls13(true);
    lab.send(ALERT, &[1, alert::USER_CANCELED]).send(ALERT, &[1, alert::CLOSE_NOTIFY]);
    assert_eq!(lab.open().unwrap().state, OpenState::Closed);
    let error = tls13(true).send(ALERT, &[1, alert::HANDSHAKE_FAILURE]).open().unwrap_err();
    assert!(error.alert_received());

    let mut lab = tls12(true);
    lab.send(ALERT, &[1, alert::NO_RENEGOTIATION]).send(APPLICATION_DATA, b"on");
    assert_eq!(lab.open().unwrap().produced, 2);
    assert!(tls12(true).send(ALERT, &[2, alert::NO_RENEGOTIATION]).open().is_err());
}

#[test]
fn floods_without_data_end() {
    for (name, content_type, content) in [
        ("empty records", APPLICATION_DATA, &b""[..]),
        ("tickets", HANDSHAKE, &[4, 0, 0, 1, 0][..]),
        ("warnings", ALERT, &[1, alert::USER_CANCELED][..]),
    ] {
        let mut lab = tls13(true);
        for _ in 0..32 {
            lab.send(content_type, content);
        }
        // Data in between makes it no flood.
        lab.send(APPLICATION_DATA, b"x");
        for _ in 0..32 {
            lab.send(content_type, content);
        }
        assert_eq!(lab.open().unwrap().produced, 1, "{name}");
        lab.send(content_type, content);
        assert_eq!(lab.refused(), (ErrorKind::RemoteProtocol, alert::UNEXPECTED_MESSAGE), "{name}");
    }
    let mut lab = tls12(false);
    for _ in 0..33 {
        lab.send(HANDSHAKE, &[1, 0, 0, 0]);
    }
    assert_eq!(lab.refused().1, alert::UNEXPECTED_MESSAGE);
}

#[test]
fn a_large_message_is_joined_and_a_larger_one_refused_at_its_start() {
    let mut lab = tls13(true);
    lab.send(HANDSHAKE, &[4, 1, 0, 0]);
    for _ in 0..4 {
        lab.send(HANDSHAKE, &[0; 16_384]);
    }
    lab.open().unwrap();
    assert_eq!(lab.tickets.load(std::sync::atomic::Ordering::Relaxed), 65_536);
    assert_eq!(tls13(true).send(HANDSHAKE, &[4, 2, 0, 0]).refused().1, alert::DECODE_ERROR);
}

#[test]
fn records_reordered_dropped_or_cut_do_not_verify() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let record = |n: usize| {
            let mut lab = Lab::new(version, true);
            for index in 0..=n {
                lab.incoming.consume(lab.incoming.len());
                lab.send(APPLICATION_DATA, &[index as u8; 100]);
            }
            lab.incoming.data().to_vec()
        };
        // The second before the first, and the third after the first.
        for wrong in [vec![record(1), record(0)], vec![record(0), record(2)]] {
            let mut lab = Lab::new(version, true);
            for bytes in wrong {
                lab.incoming.extend(&bytes);
            }
            let first = lab.open();
            let error = if first.is_ok() { lab.open() } else { first }.unwrap_err();
            assert_eq!((error.kind(), error.alert()), (ErrorKind::Tls, Some(alert::BAD_RECORD_MAC)));
            assert_eq!(error.reason(), Some("bad_record_mac"));
        }
        // A part of a record is no error: more may come.
        let whole = record(0);
        for n in 0..whole.len() {
            let mut lab = Lab::new(version, true);
            lab.incoming.extend(&whole[..n]);
            assert_eq!(lab.open().unwrap().state, OpenState::NeedMore);
            lab.incoming.extend(&whole[n..]);
            assert_eq!(lab.open().unwrap().produced, 100);
        }
    }
}

#[test]
fn a_room_too_small_is_full_and_nothing_is_lost() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let mut lab = Lab::new(version, true);
        lab.send(APPLICATION_DATA, &[1; 100]).send(APPLICATION_DATA, &[2; 100]);
        let mut open = |room: usize| {
            let mut plain = vec![0; room];
            let marks = &mut RecordMarks::ignored();
            lab.ours.open(&mut lab.incoming, &mut plain, marks, &mut lab.outgoing).unwrap()
        };
        let full = Opened { produced: 0, records: 0, state: OpenState::Full };
        assert_eq!(open(0), full);
        assert_eq!(open(99), full);
        assert_eq!(open(150), Opened { produced: 100, records: 1, state: OpenState::Full });
        assert_eq!(open(101), Opened { produced: 100, records: 1, state: OpenState::NeedMore });
    }
}

proptest::proptest! {
    /// Whatever a peer seals, and whatever arrives unsealed: an answer or an error, never a panic.
    #[test]
    fn anything_goes_in_without_a_panic(
        is_client: bool,
        tls13: bool,
        records: Vec<(u8, Vec<u8>)>,
        tail: Vec<u8>,
        flips: Vec<(proptest::sample::Index, u8)>,
    ) {
        let mut lab = Lab::new(if tls13 { TlsVersion::V1_3 } else { TlsVersion::V1_2 }, is_client);
        for (content_type, content) in &records {
            // Likely types more often than others.
            lab.send(20 + content_type % 6, content);
        }
        lab.incoming.extend(&tail);
        for (index, mask) in flips.iter().take(3) {
            if !lab.incoming.is_empty() {
                let at = index.index(lab.incoming.len());
                lab.incoming.data_mut()[at] ^= mask;
            }
        }
        for _ in 0..10 {
            let before = lab.incoming.len();
            if lab.open().is_err() || lab.incoming.len() == before {
                break;
            }
        }
    }
}

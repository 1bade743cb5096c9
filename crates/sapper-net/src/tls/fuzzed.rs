//! What the fuzz targets of this crate's parsers do with an input. The parsers are not public, so
//! their oracles live here; `fuzz/targets/tls_*.rs` only call them. Compiled for the fuzzer and for
//! the tests, which run them on inputs of a generator, so that they cannot rot.

pub mod given;

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::time::Duration;

use zeroize::Zeroizing;

use super::bench::{BENCH_SERVER_NAME, EngineEnd, EnginePair};
use super::config::TlsConfig;
use super::dev_cert::dev_certificates;
use super::key_schedule::{Exporter, Hash, next_traffic_secret};
use super::options::{
    Credentials, OwnCertificate, PskHash, PskIdentity, Roots, Secret, TlsOptions, TlsVersion,
};
use super::record::{ALERT, APPLICATION_DATA, Aead, DirectionKeys, HANDSHAKE, HEADER, grant};
use super::traffic::{Traffic, TrafficParts, TrafficSecrets};
use super::{HandshakeProgress, OpenState, Role, greeting};
use crate::buffer::Buffer;
use crate::error::{Error, ErrorKind};
use crate::stream::RecordMarks;

const SECRET: [u8; 32] = [5; 32];
/// What a caller offers for cleartext where nothing is to be left over.
const ROOM: usize = 64 * 1024;

/// Bytes that say what to do, taken from the front.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

/// What comes from a peer may blame the peer, and nobody else.
fn blames_the_peer(error: &Error) {
    assert!(
        matches!(
            error.kind(),
            ErrorKind::RemoteProtocol
                | ErrorKind::IncompatiblePeer
                | ErrorKind::Tls
                | ErrorKind::Certificate
                | ErrorKind::CredentialsRejected
                | ErrorKind::UnknownPeer
        ),
        "{:?}: {error}",
        error.kind()
    );
    assert!(error.message().len() < 2_000);
}

/// A peer that has the keys, and a connection that must not believe it.
struct Scene {
    version: TlsVersion,
    aead: Aead,
    ours: Traffic,
    peer: DirectionKeys,
    peer_secret: Zeroizing<Vec<u8>>,
    incoming: Buffer,
    outgoing: Buffer,
    /// Application data that was sealed for us and has not come out yet.
    expected: VecDeque<u8>,
    /// Nothing but good records was sent so far.
    honest: bool,
}

impl Scene {
    fn new(choice: u8) -> Self {
        let version = if choice & 1 == 0 { TlsVersion::V1_2 } else { TlsVersion::V1_3 };
        let aead = [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::ChaCha20Poly1305][usize::from(choice >> 2) % 3];
        let keys = || {
            let made = match version {
                TlsVersion::V1_3 => DirectionKeys::from_secret(aead, Hash::Sha256, &SECRET),
                TlsVersion::V1_2 => DirectionKeys::new(version, aead, &[5; 32][..aead.key_len()], [5; 12], 1),
            };
            made.expect("keys of the right length")
        };
        let secret = || Zeroizing::new(SECRET.to_vec());
        let ours = Traffic::new(TrafficParts {
            version,
            is_client: choice & 2 == 0,
            aead,
            hash: Hash::Sha256,
            seal: keys(),
            open: keys(),
            secrets: (version == TlsVersion::V1_3).then(|| TrafficSecrets { seal: secret(), open: secret() }),
            exporter: Exporter::Tls13 { secret: secret() },
            tickets: Some(Box::new(|_| Ok(()))),
            max_plain: super::MAX_RECORD,
        });
        Self {
            version,
            aead,
            ours,
            peer: keys(),
            peer_secret: secret(),
            incoming: Buffer::new(),
            outgoing: Buffer::new(),
            expected: VecDeque::new(),
            honest: true,
        }
    }

    fn sealed(&mut self, content_type: u8, content: &[u8]) -> Vec<u8> {
        let mut record = Buffer::new();
        self.peer.seal(content_type, content, &mut record).expect("a peer can seal");
        record.data().to_vec()
    }

    /// Offers so much room; whether the connection goes on.
    fn open(&mut self, room: usize) -> bool {
        let mut plain = vec![0; room];
        let mut marks = RecordMarks::wanted();
        let before = self.incoming.len();
        match self.ours.open(&mut self.incoming, &mut plain, &mut marks, &mut self.outgoing) {
            Ok(opened) => {
                assert!(opened.produced <= room && opened.records == marks.ends().len());
                assert!(opened.produced == 0 || self.incoming.len() < before);
                for &byte in &plain[..opened.produced] {
                    assert_eq!(self.expected.pop_front(), Some(byte), "nobody sealed this");
                }
                opened.state != OpenState::Closed
            }
            Err(error) => {
                blames_the_peer(&error);
                assert!(!self.honest, "an honest peer is believed: {error}");
                // It stays so, and nothing goes out behind the alert.
                let again = self.ours.open(&mut self.incoming, &mut plain, &mut marks, &mut self.outgoing);
                assert!(again.is_err() && self.ours.seal(b"x", &mut self.outgoing).is_err());
                false
            }
        }
    }
}

/// Records after the handshake: good ones, changed ones and strange ones, in any order.
///
/// Input: a byte for version, suite and role, then steps of a kind, a length and so many bytes.
pub fn records(input: &[u8]) {
    let mut script = Script(input);
    let Some(choice) = script.byte() else { return };
    let mut scene = Scene::new(choice);
    while let (Some(kind), Some(len)) = (script.byte(), script.byte()) {
        let content = script.bytes(usize::from(len));
        match kind % 8 {
            // Application data, the usual case.
            0 | 1 => {
                let record = scene.sealed(APPLICATION_DATA, content);
                scene.incoming.extend(&record);
                scene.expected.extend(content);
                // A peer that sends nothing but empty records is cut off.
                scene.honest &= !content.is_empty();
            }
            // Any content under any type that a record can have.
            2 => {
                scene.honest = false;
                let (&content_type, content) = content.split_first().unwrap_or((&HANDSHAKE, &[]));
                let record = scene.sealed(content_type, content);
                scene.incoming.extend(&record);
                // In TLS 1.3 zeros behind the type are padding, a type of zero among them.
                let inner = [content, &[content_type]].concat();
                let end = match scene.version {
                    TlsVersion::V1_3 => inner.iter().rposition(|&byte| byte != 0),
                    TlsVersion::V1_2 => Some(content.len()),
                };
                if let Some(end) = end.filter(|&end| inner[end] == APPLICATION_DATA) {
                    scene.expected.extend(&inner[..end]);
                }
            }
            // One bit of a good record is wrong: nothing comes out from there on.
            3 => {
                scene.honest = false;
                let mut record = scene.sealed(APPLICATION_DATA, content);
                let at = usize::from(kind >> 3) * record.len() / 32;
                record[at] ^= 1 << (len & 7);
                scene.incoming.extend(&record);
            }
            // Bytes that nobody sealed.
            4 => {
                scene.honest &= content.is_empty();
                scene.incoming.extend(content);
            }
            // A key update, and the peer goes on with its new keys.
            5 if scene.version == TlsVersion::V1_3 => {
                let record = scene.sealed(HANDSHAKE, &[24, 0, 0, 1, len & 1]);
                scene.incoming.extend(&record);
                scene.peer_secret =
                    next_traffic_secret(Hash::Sha256, &scene.peer_secret).expect("a secret follows");
                scene.peer = DirectionKeys::from_secret(scene.aead, Hash::Sha256, &scene.peer_secret)
                    .expect("keys follow");
                // Too many of them without data are refused too.
                scene.honest = false;
            }
            6 => {
                scene.honest = false;
                let record = scene.sealed(ALERT, &[len & 3, kind >> 3]);
                scene.incoming.extend(&record);
            }
            // Our own side goes on meanwhile, and reads with little room.
            _ => {
                let _ = scene.ours.seal(content, &mut scene.outgoing);
                if len & 1 == 1 {
                    let _ = scene.ours.update_keys(&mut scene.outgoing);
                }
                scene.outgoing.consume(scene.outgoing.len());
                if !scene.open(usize::from(len) * 4) {
                    return;
                }
            }
        }
    }
    // What waits is opened in one call or two: an error comes behind the data that came before it.
    if scene.open(ROOM) && scene.open(ROOM) && scene.honest {
        assert!(scene.expected.is_empty(), "an honest peer's data arrives");
    }
}

fn configurations() -> &'static [(TlsConfig, TlsConfig)] {
    static MADE: OnceLock<Vec<(TlsConfig, TlsConfig)>> = OnceLock::new();
    MADE.get_or_init(|| {
        let made = dev_certificates(&[BENCH_SERVER_NAME], Duration::from_secs(86_400)).expect("certificates");
        let server =
            Credentials::Certificate(OwnCertificate::pair(made.server.chain.into_bytes(), made.server.key));
        let identity = PskIdentity { identity: b"x".to_vec(), key: Secret::new([7; 32]).into() };
        let psk = Credentials::Psk { identities: vec![identity], hash: PskHash::Sha256 };
        let roots = Roots::Own(made.authority.into_bytes().into());
        let mut configurations = Vec::new();
        for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
            let only = |credentials: &Credentials, roots: &Roots| {
                TlsConfig::new(&TlsOptions {
                    credentials: credentials.clone(),
                    roots: roots.clone(),
                    min_version: version,
                    max_version: version,
                    ..TlsOptions::default()
                })
                .expect("good options")
            };
            configurations.push((only(&Credentials::None, &roots), only(&server, &Roots::Default)));
            configurations.push((only(&psk, &Roots::Default), only(&psk, &Roots::Default)));
        }
        configurations
    })
}

fn end(config: &TlsConfig, role: &Role) -> EngineEnd {
    EngineEnd::new(config.engine(role).expect("an engine"))
}

/// What a peer says before and in the handshake: any bytes, or the words of a real one, changed.
///
/// Input: a byte for engine, version, role and way. Then the bytes, or changes: how far from the last
/// one, and what to turn.
pub fn handshake(input: &[u8]) {
    let Some((&choice, rest)) = input.split_first() else { return };
    let (client, server) = &configurations()[usize::from(choice & 3)];
    let role = Role::Client { server_name: Some(BENCH_SERVER_NAME.to_owned()) };
    if choice & 4 == 0 {
        strangers_words(
            if choice & 8 == 0 { end(server, &Role::Server) } else { end(client, &role) },
            rest,
            choice & 8 != 0,
        );
        return;
    }
    // Both are real; what they say is changed on its way.
    let mut pair = EnginePair { client: end(client, &role), server: end(server, &Role::Server) };
    let (mut script, mut skip) = (Script(rest), 0);
    for _ in 0..8 {
        for is_client in [true, false] {
            let one = if is_client { &mut pair.client } else { &mut pair.server };
            if one.info.is_none()
                && let Err(error) = one.step()
            {
                blames_the_peer(&error);
                return;
            }
            let words = one.outgoing.data_mut();
            while let (true, Some(gap), Some(turn)) = (skip < words.len(), script.byte(), script.byte()) {
                skip += usize::from(gap);
                if let Some(byte) = words.get_mut(skip) {
                    *byte ^= turn;
                }
            }
            skip = skip.saturating_sub(words.len());
            pair.deliver();
        }
    }
}

/// Bytes of somebody who is not our peer, in pieces.
fn strangers_words(mut ours: EngineEnd, words: &[u8], we_are_client: bool) {
    let piece = words.first().map_or(1, |&byte| usize::from(byte) + 1);
    // What was recognised early is what the whole shows.
    let whole = greeting::check(words, we_are_client);
    for len in 0..words.len().min(8) {
        match greeting::check(&words[..len], we_are_client) {
            Ok(enough) => assert!(!enough || whole.is_ok()),
            Err(_) => assert!(whole.is_err()),
        }
    }
    let granted = grant(words);
    assert!(granted <= words.len() && (granted == 0 || granted == words.len() || granted > HEADER - 1));
    if we_are_client && let Err(error) = ours.step() {
        panic!("a client can always begin: {error}");
    }
    for chunk in words.chunks(piece) {
        ours.incoming.extend(chunk);
        match ours.engine.handshake(&mut ours.incoming, &mut ours.outgoing) {
            Ok(HandshakeProgress::NeedMore) => {}
            Ok(HandshakeProgress::Done(info)) => panic!("a stranger shook hands: {info:?}"),
            Err(error) => {
                blames_the_peer(&error);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_records(input in vec(any::<u8>(), 0..400)) {
            records(&input);
        }

        #[test]
        fn honest_records(choice: u8, content in vec(vec(any::<u8>(), 1..40), 0..20)) {
            let mut input = vec![choice];
            for content in content {
                input.extend([0, content.len() as u8]);
                input.extend(content);
            }
            records(&input);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_words_in_a_handshake(input in vec(any::<u8>(), 0..200)) {
            handshake(&input);
        }
    }

    #[test]
    fn records_of_every_kind() {
        // Data, a key update, data under the new keys, a changed record; then nothing more comes.
        for choice in 0..24 {
            records(&[choice, 0, 2, 7, 7, 5, 0, 0, 2, 8, 8, 7, 40, 3 | 31 << 3, 2, 9, 9, 0, 1, 1]);
            records(&[choice, 0, 2, 7, 7, 6, 0, 7, 1, 4, 3, 23, 3, 3]);
            records(&[choice, 2, 3, 1, 1, 2, 6, HANDSHAKE, 0, 0, 0, 1]);
        }
    }
}

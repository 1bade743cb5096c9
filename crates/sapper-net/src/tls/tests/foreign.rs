//! Our engines against rustls' own buffered connections and against OpenSSL itself: every suite of
//! our record layer, exporters, key updates, ends.

use std::io::{Read, Write};
use std::sync::Arc;

use foreign_types::ForeignTypeRef;
use openssl::ssl::{
    ErrorCode, ShutdownResult, Ssl, SslContext, SslContextBuilder, SslMethod, SslStream, SslVerifyMode,
    SslVersion,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConnection, Connection, RootCertStore, ServerConnection};

use super::*;
use crate::error::ErrorKind;
use crate::tls::failure::alert;
use crate::tls::record::REKEY_EVERY;
use crate::tls::suites::{Auth, SUITES, Suite};

unsafe extern "C" {
    fn SSL_set_tlsext_max_fragment_length(ssl: *mut openssl_sys::SSL, mode: u8) -> std::ffi::c_int;
    fn SSL_renegotiate(ssl: *mut openssl_sys::SSL) -> std::ffi::c_int;
    fn SSL_key_update(ssl: *mut openssl_sys::SSL, request: std::ffi::c_int) -> std::ffi::c_int;
}

const KEY: [u8; 32] = [7; 32];

/// The far end: a library as anybody would use it.
pub(super) trait Foreign {
    /// Takes ciphertext, opens what it can, answers; the answer and the plaintext come back.
    fn feed(&mut self, bytes: &[u8]) -> (Vec<u8>, Vec<u8>);
    fn handshaking(&self) -> bool;
    fn write(&mut self, plain: &[u8]) -> Vec<u8>;
    /// New keys for its direction, and a request for ours where it can ask.
    fn update_keys(&mut self) -> Vec<u8>;
    fn export(&self, label: &str, context: Option<&[u8]>) -> [u8; 48];
    fn close(&mut self) -> Vec<u8>;
    fn saw_close(&mut self) -> bool;
}

struct RustlsEnd(Connection);

impl RustlsEnd {
    fn sent(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.0.wants_write() {
            self.0.write_tls(&mut out).unwrap();
        }
        out
    }
}

impl Foreign for RustlsEnd {
    fn feed(&mut self, mut bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let mut plain = Vec::new();
        while !bytes.is_empty() {
            self.0.read_tls(&mut bytes).unwrap();
            let state = self.0.process_new_packets().unwrap();
            let start = plain.len();
            plain.resize(start + state.plaintext_bytes_to_read(), 0);
            self.0.reader().read_exact(&mut plain[start..]).unwrap();
        }
        (self.sent(), plain)
    }

    fn handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    fn write(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        // Its buffer is bounded; what it holds must go before more fits.
        for part in plain.chunks(32 * 1024) {
            self.0.writer().write_all(part).unwrap();
            out.extend(self.sent());
        }
        out
    }

    fn update_keys(&mut self) -> Vec<u8> {
        self.0.refresh_traffic_keys().unwrap();
        self.sent()
    }

    fn export(&self, label: &str, context: Option<&[u8]>) -> [u8; 48] {
        self.0.export_keying_material([0; 48], label.as_bytes(), context).unwrap()
    }

    fn close(&mut self) -> Vec<u8> {
        self.0.send_close_notify();
        self.sent()
    }

    fn saw_close(&mut self) -> bool {
        self.0.process_new_packets().unwrap().peer_has_closed()
    }
}

#[derive(Default)]
struct Memory {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Read for Memory {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.incoming.is_empty() {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        let n = self.incoming.len().min(buf.len());
        buf[..n].copy_from_slice(&self.incoming[..n]);
        self.incoming.drain(..n);
        Ok(n)
    }
}

impl Write for Memory {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.outgoing.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct OpensslEnd {
    stream: SslStream<Memory>,
    done: bool,
    closed: bool,
}

impl OpensslEnd {
    fn sent(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.stream.get_mut().outgoing)
    }
}

impl Foreign for OpensslEnd {
    fn feed(&mut self, bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
        self.stream.get_mut().incoming.extend_from_slice(bytes);
        if !self.done {
            match self.stream.do_handshake() {
                Ok(()) => self.done = true,
                Err(e) => assert_eq!(e.code(), ErrorCode::WANT_READ, "{e}"),
            }
        }
        let mut plain = Vec::new();
        let mut part = vec![0; 16_384];
        while self.done && !self.closed {
            match self.stream.ssl_read(&mut part) {
                Ok(n) => plain.extend_from_slice(&part[..n]),
                Err(e) if e.code() == ErrorCode::WANT_READ => break,
                Err(e) if e.code() == ErrorCode::ZERO_RETURN => self.closed = true,
                Err(e) => panic!("{e}"),
            }
        }
        (self.sent(), plain)
    }

    fn handshaking(&self) -> bool {
        !self.done
    }

    fn write(&mut self, plain: &[u8]) -> Vec<u8> {
        self.stream.write_all(plain).unwrap();
        self.sent()
    }

    fn update_keys(&mut self) -> Vec<u8> {
        // SAFETY: the connection is alive; 1 asks the peer for new keys too.
        assert_eq!(unsafe { SSL_key_update(self.stream.ssl().as_ptr(), 1) }, 1);
        self.stream.do_handshake().unwrap();
        self.sent()
    }

    fn export(&self, label: &str, context: Option<&[u8]>) -> [u8; 48] {
        let mut out = [0; 48];
        self.stream.ssl().export_keying_material(&mut out, label, context).unwrap();
        out
    }

    fn close(&mut self) -> Vec<u8> {
        assert_eq!(self.stream.shutdown().unwrap(), ShutdownResult::Sent);
        self.sent()
    }

    fn saw_close(&mut self) -> bool {
        self.closed
    }
}

fn chain(identity: &DevIdentity) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_slice_iter(identity.chain.as_bytes()).collect::<Result<_, _>>().unwrap();
    (chain, PrivateKeyDer::from_pem_slice(identity.key.expose()).unwrap())
}

fn rustls_client() -> Box<dyn Foreign> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(certificates().authority.as_bytes()).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from(NAME).unwrap();
    Box::new(RustlsEnd(Connection::Client(ClientConnection::new(Arc::new(config), name).unwrap())))
}

fn rustls_server() -> Box<dyn Foreign> {
    let (chain, key) = chain(&certificates().server);
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
    Box::new(RustlsEnd(Connection::Server(ServerConnection::new(Arc::new(config)).unwrap())))
}

fn openssl_context(set: impl FnOnce(&mut SslContextBuilder)) -> SslContext {
    let mut builder = SslContext::builder(SslMethod::tls()).unwrap();
    set(&mut builder);
    builder.build()
}

fn openssl_end(context: &SslContext, is_client: bool) -> Box<dyn Foreign> {
    let mut ssl = Ssl::new(context).unwrap();
    if is_client {
        ssl.set_connect_state();
    } else {
        ssl.set_accept_state();
    }
    let stream = SslStream::new(ssl, Memory::default()).unwrap();
    Box::new(OpensslEnd { stream, done: false, closed: false })
}

pub(super) fn openssl_psk(is_client: bool) -> Box<dyn Foreign> {
    openssl_end(&openssl_psk_context(is_client), is_client)
}

fn openssl_psk_context(is_client: bool) -> SslContext {
    openssl_context(|builder| {
        builder.set_cipher_list("PSK:ECDHE-PSK:@SECLEVEL=0").unwrap();
        if is_client {
            builder.set_psk_client_callback(|_, _, identity, key| {
                identity[..2].copy_from_slice(b"x\0");
                key[..32].copy_from_slice(&KEY);
                Ok(32)
            });
        } else {
            builder.set_psk_server_callback(|_, identity, key| {
                assert_eq!(identity, Some(&b"x"[..]));
                key[..32].copy_from_slice(&KEY);
                Ok(32)
            });
        }
    })
}

fn openssl_certificate(is_client: bool) -> Box<dyn Foreign> {
    let context = openssl_context(|builder| {
        builder.set_verify(SslVerifyMode::NONE);
        if !is_client {
            let own = &certificates().server;
            let chain = openssl::x509::X509::stack_from_pem(own.chain.as_bytes()).unwrap();
            builder.set_certificate(&chain[0]).unwrap();
            let key = openssl::pkey::PKey::private_key_from_pem(own.key.expose()).unwrap();
            builder.set_private_key(&key).unwrap();
        }
    });
    openssl_end(&context, is_client)
}

/// Our end and a foreign one after their handshake. Bytes of application data do not come yet.
pub(super) struct Mixed {
    pub(super) ours: EngineEnd,
    theirs: Box<dyn Foreign>,
    sent: usize,
}

impl Mixed {
    pub(super) fn connect(options: &TlsOptions, ours_is_client: bool, theirs: Box<dyn Foreign>) -> Self {
        let role = if ours_is_client { role() } else { Role::Server };
        let ours = EngineEnd::new(TlsConfig::new(options).unwrap().engine(&role).unwrap());
        let mut mixed = Self { ours, theirs, sent: 0 };
        if !ours_is_client {
            let (hello, _) = mixed.theirs.feed(&[]);
            mixed.ours.incoming.extend(&hello);
        }
        while mixed.ours.info.is_none() || mixed.theirs.handshaking() {
            if mixed.ours.info.is_none() {
                mixed.ours.step().unwrap();
            }
            let sent = mixed.take_ours();
            let (answer, plain) = mixed.theirs.feed(&sent);
            assert!(plain.is_empty());
            mixed.ours.incoming.extend(&answer);
        }
        mixed
    }

    fn take_ours(&mut self) -> Vec<u8> {
        let sent = self.ours.outgoing.data().to_vec();
        self.ours.outgoing.consume(sent.len());
        self.sent += sent.len();
        sent
    }

    /// What they have to say without being told anything.
    fn theirs_sent(&mut self) -> (Vec<u8>, Vec<u8>) {
        self.theirs.feed(&[])
    }

    /// Delivers what both have sent until nobody has anything more to say; the plaintexts of both.
    pub(super) fn settle(&mut self, their_bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut to_us, mut to_them) = (Vec::new(), Vec::new());
        self.ours.incoming.extend(their_bytes);
        loop {
            let (plain, _, _) = open_all(&mut self.ours).unwrap();
            to_us.extend(plain);
            let sent = self.take_ours();
            if sent.is_empty() {
                return (to_us, to_them);
            }
            let (answer, plain) = self.theirs.feed(&sent);
            to_them.extend(plain);
            self.ours.incoming.extend(&answer);
        }
    }

    pub(super) fn exchange(&mut self, data: &[u8]) {
        self.ours.engine.seal(data, &mut self.ours.outgoing).unwrap();
        let bytes = self.theirs.write(data);
        let (to_us, to_them) = self.settle(&bytes);
        assert!(to_us == data && to_them == data, "{} {}", to_us.len(), to_them.len());
    }
}

type Make = fn() -> Box<dyn Foreign>;

/// Each far end with options for ours: the role of ours is the first word.
fn far_ends(suite: &Suite) -> Vec<(&'static str, bool, Make, TlsOptions)> {
    let with = |options: TlsOptions| TlsOptions {
        cipher_suites: vec![suite.iana.to_owned()],
        danger_legacy_suites: suite.legacy,
        ..options
    };
    let mut ends: Vec<(&'static str, bool, Make, TlsOptions)> = Vec::new();
    let certificates = match suite.auth {
        Auth::Any => true,
        Auth::Certificate => suite.iana.contains("ECDSA"),
        Auth::Psk => false,
    };
    if certificates && !suite.legacy {
        ends.push(("rustls server", true, rustls_server, with(client_options())));
        ends.push(("rustls client", false, rustls_client, with(server_options())));
    }
    if certificates {
        ends.push(("OpenSSL server", true, || openssl_certificate(false), with(client_options())));
        ends.push(("OpenSSL client", false, || openssl_certificate(true), with(server_options())));
    }
    if suite.auth == Auth::Psk || (suite.auth == Auth::Any && !suite.is_sha384()) {
        ends.push(("OpenSSL PSK server", true, || openssl_psk(false), with(psk_options(b"x", &KEY))));
        ends.push(("OpenSSL PSK client", false, || openssl_psk(true), with(psk_options(b"x", &KEY))));
    }
    ends
}

/// Runs `test` with every suite against every far end.
fn everywhere(mut test: impl FnMut(&str, &Suite, Mixed)) {
    let mut count = 0;
    for suite in SUITES {
        for (far, ours_is_client, make, options) in far_ends(suite) {
            let mixed = Mixed::connect(&options, ours_is_client, make());
            assert_eq!(mixed.ours.info.as_ref().unwrap().cipher_suite, suite.iana);
            test(&format!("{} with {far}", suite.iana), suite, mixed);
            count += 1;
        }
    }
    assert!(count >= 40, "only {count} combinations ran");
}

#[test]
fn data_of_every_size_passes_in_every_suite() {
    everywhere(|_, _, mut mixed| {
        for len in [1, 2, 17, 1280, 16_383, 16_384, 16_385, 100_000] {
            mixed.exchange(&vec![len as u8; len]);
        }
        for _ in 0..300 {
            mixed.exchange(b"a small one");
        }
    });
}

#[test]
fn exporters_agree() {
    everywhere(|what, _, mut mixed| {
        for context in [None, Some(&b""[..]), Some(&b"a context"[..])] {
            let mut ours = [0; 48];
            mixed.ours.engine.export_keying_material("EXPORTER-sapper", context, &mut ours).unwrap();
            assert_eq!(ours, mixed.theirs.export("EXPORTER-sapper", context), "{what} {context:?}");
        }
    });
}

#[test]
fn close_notify_is_seen_by_both() {
    everywhere(|what, _, mut mixed| {
        let bytes = mixed.theirs.close();
        mixed.ours.incoming.extend(&bytes);
        assert_eq!(open_all(&mut mixed.ours).unwrap().2, OpenState::Closed, "{what}");
        mixed.ours.engine.close_notify(&mut mixed.ours.outgoing).unwrap();
        mixed.ours.engine.close_notify(&mut mixed.ours.outgoing).unwrap();
        let sent = mixed.take_ours();
        mixed.theirs.feed(&sent);
        assert!(mixed.theirs.saw_close(), "{what}");
        assert!(mixed.ours.engine.seal(b"x", &mut mixed.ours.outgoing).is_err(), "{what}");
    });
}

#[test]
fn the_same_wrong_is_the_same_error_whoever_opens_the_records() {
    everywhere(|what, _, mut mixed| {
        let mut bytes = mixed.theirs.write(b"to be changed");
        *bytes.last_mut().unwrap() ^= 1;
        mixed.ours.incoming.extend(&bytes);
        let error = open_all(&mut mixed.ours).unwrap_err();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Tls, Some("bad_record_mac")), "{what}");
        assert_eq!(error.alert(), Some(alert::BAD_RECORD_MAC), "{what}");
    });
    everywhere(|what, _, mut mixed| {
        mixed.ours.incoming.extend(b"GET / HTTP/1.1\r\n\r\n");
        let error = open_all(&mut mixed.ours).unwrap_err();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::RemoteProtocol, None), "{what}: {error}");
        assert!(error.message().contains("no TLS record"), "{what}: {error}");
    });
}

#[test]
fn keys_are_updated_by_each_and_by_both_at_once() {
    everywhere(|what, suite, mut mixed| {
        if suite.version == TlsVersion::V1_2 {
            assert!(mixed.ours.engine.update_keys(&mut mixed.ours.outgoing).is_err(), "{what}");
            return;
        }
        for round in 0..20 {
            mixed.ours.engine.update_keys(&mut mixed.ours.outgoing).unwrap();
            mixed.exchange(&[round; 5000]);
            let mut bytes = mixed.theirs.update_keys();
            bytes.extend(mixed.theirs.write(b"with new keys"));
            assert_eq!(mixed.settle(&bytes).0, b"with new keys", "{what}");
            mixed.exchange(b"and back");
            // Both at once, each before it knows of the other's.
            mixed.ours.engine.update_keys(&mut mixed.ours.outgoing).unwrap();
            mixed.ours.engine.seal(b"ours", &mut mixed.ours.outgoing).unwrap();
            let mut bytes = mixed.theirs.update_keys();
            bytes.extend(mixed.theirs.write(b"theirs"));
            let (to_us, to_them) = mixed.settle(&bytes);
            assert_eq!((&to_us[..], &to_them[..]), (&b"theirs"[..], &b"ours"[..]), "{what}");
        }
    });
}

#[test]
fn keys_are_updated_by_themselves_and_the_peers_too() {
    REKEY_EVERY.set(50);
    everywhere(|what, suite, mut mixed| {
        if suite.version == TlsVersion::V1_2 || suite.iana.contains("CHACHA20") {
            return;
        }
        let before = mixed.sent;
        for round in 0..500_u32 {
            mixed.ours.engine.seal(&round.to_be_bytes(), &mut mixed.ours.outgoing).unwrap();
            let bytes = mixed.theirs.write(&round.to_be_bytes());
            let (to_us, to_them) = mixed.settle(&bytes);
            assert_eq!(
                (to_us, to_them),
                (round.to_be_bytes().to_vec(), round.to_be_bytes().to_vec()),
                "{what}"
            );
        }
        // Updates are records of their own beside the 500; each asks for one of the peer's.
        let record = 5 + 1 + 16;
        let updates = (mixed.sent - before - 500 * (record + 4)) / (record + 5);
        assert!((9..=22).contains(&updates), "{what}: {updates} updates");
    });
}

#[test]
fn a_certificate_does_not_stand_in_for_the_pre_shared_key() {
    let client = TlsConfig::new(&psk_options(b"x", &KEY)).unwrap();
    let mut ours = EngineEnd::new(client.engine(&role()).unwrap());
    let mut theirs = openssl_certificate(false);
    ours.step().unwrap();
    let (answer, _) = theirs.feed(ours.outgoing.data());
    ours.incoming.extend(&answer);
    let error = ours.step().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Certificate, "{error}");
    assert!(error.message().contains("does not use the pre-shared key"), "{error}");
    assert!(ours.info.is_none());
}

#[test]
fn a_client_that_wants_small_records_gets_them() {
    let options = only(TlsVersion::V1_2, psk_options(b"x", &KEY));
    let context = openssl_psk_context(true);
    let mut ssl = Ssl::new(&context).unwrap();
    ssl.set_connect_state();
    // SAFETY: the connection is alive; 1 asks for 512 bytes.
    assert_eq!(unsafe { SSL_set_tlsext_max_fragment_length(ssl.as_ptr(), 1) }, 1);
    let stream = SslStream::new(ssl, Memory::default()).unwrap();
    let theirs = OpensslEnd { stream, done: false, closed: false };
    let mut mixed = Mixed::connect(&options, false, Box::new(theirs));
    mixed.ours.engine.seal(&[1; 1025], &mut mixed.ours.outgoing).unwrap();
    assert_eq!(mixed.ours.outgoing.len(), 1025 + 3 * (5 + 8 + 16));
    assert_eq!(mixed.settle(&[]).1, [1; 1025]);
    mixed.exchange(&[2; 5000]);
}

#[test]
fn a_renegotiation_is_refused_and_data_goes_on() {
    for ours_is_client in [true, false] {
        let context = openssl_context(|builder| {
            builder.set_verify(SslVerifyMode::NONE);
            builder.set_max_proto_version(Some(SslVersion::TLS1_2)).unwrap();
            let own = &certificates().server;
            let chain = openssl::x509::X509::stack_from_pem(own.chain.as_bytes()).unwrap();
            builder.set_certificate(&chain[0]).unwrap();
            builder
                .set_private_key(&openssl::pkey::PKey::private_key_from_pem(own.key.expose()).unwrap())
                .unwrap();
        });
        let mut ssl = Ssl::new(&context).unwrap();
        if ours_is_client {
            ssl.set_accept_state();
        } else {
            ssl.set_connect_state();
        }
        let raw = ssl.as_ptr();
        let stream = SslStream::new(ssl, Memory::default()).unwrap();
        let theirs = OpensslEnd { stream, done: false, closed: false };
        let options = if ours_is_client { client_options() } else { server_options() };
        let mut mixed = Mixed::connect(&options, ours_is_client, Box::new(theirs));
        mixed.exchange(b"before");
        // SAFETY: the connection lives in `mixed`.
        assert_eq!(unsafe { SSL_renegotiate(raw) }, 1);
        // SAFETY: as above. It sends its HelloRequest or ClientHello, and waits.
        unsafe { openssl_sys::SSL_do_handshake(raw) };
        let (asked, _) = mixed.theirs_sent();
        assert!(!asked.is_empty());
        mixed.ours.incoming.extend(&asked);
        assert_eq!(open_all(&mut mixed.ours).unwrap().2, OpenState::NeedMore);
        // A warning alert: 2 bytes in a GCM record.
        assert_eq!(mixed.take_ours().len(), 5 + 8 + 2 + 16);
        mixed.ours.engine.seal(b"still here", &mut mixed.ours.outgoing).unwrap();
    }
}

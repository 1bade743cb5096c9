//! What the openssl crate leaves out: a BIO over our own buffers, pre-shared keys of TLS 1.3, and a
//! few functions that have no declaration there. All `unsafe` around OpenSSL's objects is here and in
//! the engine's calls.

use std::ffi::{c_char, c_int, c_long, c_uchar, c_void};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use foreign_types::ForeignTypeRef;
use openssl::asn1::{Asn1GeneralizedTimeRef, Asn1Time, Asn1TimeRef};
use openssl::hash::{MessageDigest, hash};
use openssl::nid::Nid;
use openssl::ssl::{Ssl, SslContextBuilder, SslRef, SslSessionRef};
use openssl::x509::X509Ref;
use openssl_sys as ffi;
use zeroize::Zeroizing;

use super::credentials::PskCredentials;
use super::failure::{CertificateReason, Rejection};
use super::options::PskHash;
use super::record::grant;
use super::scene::on_stage;
use super::verify::PeerCertificates;
use crate::buffer::Buffer;
use crate::error::{Error, ErrorKind, Result};

type UseSession = unsafe extern "C" fn(
    *mut ffi::SSL,
    *const ffi::EVP_MD,
    *mut *const c_uchar,
    *mut usize,
    *mut *mut ffi::SSL_SESSION,
) -> c_int;
type FindSession =
    unsafe extern "C" fn(*mut ffi::SSL, *const c_uchar, usize, *mut *mut ffi::SSL_SESSION) -> c_int;
type VerifyChain = unsafe extern "C" fn(*mut ffi::X509_STORE_CTX, *mut c_void) -> c_int;
type Info = unsafe extern "C" fn(*const ffi::SSL, c_int, c_int);

unsafe extern "C" {
    fn SSL_CTX_set_psk_use_session_callback(ctx: *mut ffi::SSL_CTX, callback: UseSession);
    fn SSL_CTX_set_psk_find_session_callback(ctx: *mut ffi::SSL_CTX, callback: FindSession);
    fn SSL_CTX_set_cert_verify_callback(ctx: *mut ffi::SSL_CTX, callback: VerifyChain, arg: *mut c_void);
    fn SSL_CTX_set_info_callback(ctx: *mut ffi::SSL_CTX, callback: Info);
    fn SSL_SESSION_new() -> *mut ffi::SSL_SESSION;
    fn SSL_SESSION_set1_master_key(s: *mut ffi::SSL_SESSION, key: *const c_uchar, len: usize) -> c_int;
    fn SSL_SESSION_set_cipher(s: *mut ffi::SSL_SESSION, cipher: *const ffi::SSL_CIPHER) -> c_int;
    fn SSL_SESSION_set_protocol_version(s: *mut ffi::SSL_SESSION, version: c_int) -> c_int;
    fn SSL_SESSION_get_max_fragment_length(s: *const ffi::SSL_SESSION) -> u8;
    fn SSL_CIPHER_find(ssl: *mut ffi::SSL, id: *const c_uchar) -> *const ffi::SSL_CIPHER;
    fn SSL_free_buffers(ssl: *mut ffi::SSL) -> c_int;
    fn X509_get_signature_info(
        x: *mut ffi::X509,
        digest: *mut c_int,
        key: *mut c_int,
        bits: *mut c_int,
        flags: *mut u32,
    ) -> c_int;
    fn X509_STORE_CTX_get0_untrusted(ctx: *const ffi::X509_STORE_CTX) -> *mut ffi::stack_st_X509;
}

/// Keys of a client that are looked up at most in one handshake.
const MAX_LOOKUPS: u8 = 4;

/// Bits of the info call-back's second argument (`SSL_CB_*`).
const CB_READ: c_int = 0x04;
const CB_ALERT: c_int = 0x4000;

/// Puts the call-backs of TLS 1.3's pre-shared keys on a context.
pub(crate) fn set_psk_sessions(builder: &mut SslContextBuilder, server: bool) {
    // SAFETY: the context is alive, and the call-backs have the signatures that OpenSSL documents.
    unsafe {
        if server {
            SSL_CTX_set_psk_find_session_callback(builder.as_ptr(), find_session);
        } else {
            SSL_CTX_set_psk_use_session_callback(builder.as_ptr(), use_session);
        }
    }
}

/// Has the scene's verifier decide about the peer's chain.
pub(crate) fn set_verifier(builder: &mut SslContextBuilder) {
    // SAFETY: as above; the argument is not used.
    unsafe { SSL_CTX_set_cert_verify_callback(builder.as_ptr(), verify_chain, ptr::null_mut()) }
}

/// Notes fatal alerts in the scene.
pub(crate) fn set_alert_notes(builder: &mut SslContextBuilder) {
    // SAFETY: as above.
    unsafe { SSL_CTX_set_info_callback(builder.as_ptr(), note_alert) }
}

/// The maximum that a client asked for (RFC 6066), as its code.
pub(crate) fn max_fragment_code(session: &SslSessionRef) -> u8 {
    // SAFETY: the session is alive.
    unsafe { SSL_SESSION_get_max_fragment_length(session.as_ptr()) }
}

/// Frees the record buffers of an idle connection.
pub(crate) fn free_buffers(ssl: &SslRef) {
    // SAFETY: the object is alive. It refuses by itself where a buffer is in use.
    unsafe { SSL_free_buffers(ssl.as_ptr()) };
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: &Asn1GeneralizedTimeRef) -> Option<i64> {
    // SAFETY: a generalized time is one of the two forms of an ASN1_TIME, and it is alive.
    let time = unsafe { Asn1TimeRef::from_ptr(time.as_ptr().cast()) };
    let since = Asn1Time::from_unix(0).ok()?.diff(time).ok()?;
    Some(i64::from(since.days) * 86_400 + i64::from(since.secs))
}

/// The hash of a server's certificate for the channel binding `tls-server-end-point` (RFC 5929, section
/// 4.1): by the hash of its own signature, SHA-256 in place of MD5 and SHA-1. A signature without one
/// (Ed25519) has none.
pub(crate) fn end_point_hash(certificate: &X509Ref) -> Option<Vec<u8>> {
    let mut digest = 0;
    // SAFETY: the certificate is alive; places that are not wanted may be null.
    let known = unsafe {
        X509_get_signature_info(
            certificate.as_ptr(),
            &mut digest,
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
        )
    };
    let digest = match Nid::from_raw(digest) {
        _ if known != 1 => return None,
        Nid::MD5 | Nid::SHA1 => MessageDigest::sha256(),
        nid => MessageDigest::from_nid(nid)?,
    };
    let der = certificate.to_der().ok()?;
    hash(digest, &der).ok().map(|hash| hash.to_vec())
}

/// Runs a call-back's body; a panic must not unwind into C.
fn shielded<R>(otherwise: R, body: impl FnOnce() -> R) -> R {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(otherwise)
}

unsafe extern "C" fn note_alert(_ssl: *const ffi::SSL, what: c_int, value: c_int) {
    let (level, description) = (value >> 8, value as u8);
    if what & CB_ALERT != 0 && level == 2 {
        shielded((), || {
            on_stage(|scene| {
                if what & CB_READ != 0 {
                    scene.alert_received = Some(description);
                } else {
                    scene.alert_sent = Some(description);
                }
            });
        });
    }
}

/// A session that stands for an external key: its cipher says which hash the key belongs to.
fn psk_session(ssl: *mut ffi::SSL, key: &[u8], hash: PskHash) -> *mut ffi::SSL_SESSION {
    let cipher_id: [u8; 2] = match hash {
        PskHash::Sha256 => [0x13, 0x01],
        PskHash::Sha384 => [0x13, 0x02],
    };
    // SAFETY: OpenSSL calls us with a live `ssl`; the session is ours until it is returned, and freed
    // where it cannot be completed.
    unsafe {
        let cipher = SSL_CIPHER_find(ssl, cipher_id.as_ptr());
        let session = SSL_SESSION_new();
        if session.is_null() {
            return session;
        }
        let complete = !cipher.is_null()
            && SSL_SESSION_set1_master_key(session, key.as_ptr(), key.len()) == 1
            && SSL_SESSION_set_cipher(session, cipher) == 1
            && SSL_SESSION_set_protocol_version(session, ffi::TLS1_3_VERSION) == 1;
        if !complete {
            ffi::SSL_SESSION_free(session);
            return ptr::null_mut();
        }
        session
    }
}

/// Client, TLS 1.3. `md` is set on the second call, after a retry or with a chosen suite.
unsafe extern "C" fn use_session(
    ssl: *mut ffi::SSL,
    md: *const ffi::EVP_MD,
    id: *mut *const c_uchar,
    id_len: *mut usize,
    session: *mut *mut ffi::SSL_SESSION,
) -> c_int {
    // SAFETY: OpenSSL passes places for its results.
    unsafe {
        *id = ptr::null();
        *id_len = 0;
        *session = ptr::null_mut();
    }
    shielded(0, || {
        let Some(Some(psk)) = on_stage(|scene| scene.psk.clone()) else { return 1 };
        let Some(ours) = psk.identities.first() else { return 1 };
        let nid = match psk.hash {
            PskHash::Sha256 => ffi::NID_sha256,
            PskHash::Sha384 => ffi::NID_sha384,
        };
        // SAFETY: a digest that OpenSSL passes is alive.
        let other_hash = !md.is_null() && unsafe { ffi::EVP_MD_type(md) } != nid;
        if ours.identity.is_empty() || other_hash {
            return 1;
        }
        let made = psk_session(ssl, ours.key.expose(), psk.hash);
        if made.is_null() {
            return 0;
        }
        // SAFETY: the identity belongs to the scene's credentials, which outlive this handshake call;
        // OpenSSL copies it before it returns.
        unsafe {
            *id = ours.identity.as_ptr();
            *id_len = ours.identity.len();
            *session = made;
        }
        1
    })
}

/// Server, TLS 1.3. Without a session the handshake goes on to the next identity, and fails after
/// the last.
unsafe extern "C" fn find_session(
    ssl: *mut ffi::SSL,
    id: *const c_uchar,
    id_len: usize,
    session: *mut *mut ffi::SSL_SESSION,
) -> c_int {
    // SAFETY: OpenSSL passes a place for its result.
    unsafe { *session = ptr::null_mut() };
    shielded(0, || {
        // SAFETY: OpenSSL passes `id_len` bytes.
        let identity = if id_len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(id, id_len) } };
        let Some(Some(psk)) = on_stage(|scene| scene.psk.clone()) else { return 1 };
        let Some(known) = find_identity(&psk, identity) else { return 1 };
        let made = psk_session(ssl, &known, psk.hash);
        if made.is_null() {
            return 0;
        }
        // SAFETY: as above; OpenSSL takes the session over.
        unsafe { *session = made };
        1
    })
}

/// A server's look-up, noted in the scene. TLS 1.2 and 1.3 share it.
pub(crate) fn find_identity(psk: &PskCredentials, identity: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    // After a retry the client names the same one again, and a client may name any number.
    let before = on_stage(|scene| match &scene.looked_up {
        Some((asked, found)) if asked == identity => Err(found.clone()),
        _ => {
            scene.lookups += 1;
            Ok(scene.lookups <= MAX_LOOKUPS)
        }
    });
    let found = match before {
        Some(Err(found)) => found,
        // It may block and call back: it must not find the stage borrowed.
        Some(Ok(true)) => psk.find(identity),
        _ => None,
    };
    on_stage(|scene| {
        scene.looked_up = Some((identity.to_vec(), found.clone()));
        if found.is_some() {
            scene.psk_identity = Some(identity.to_vec());
            scene.unknown_identity = false;
        } else {
            scene.unknown_identity = scene.psk_identity.is_none();
        }
    });
    found
}

unsafe extern "C" fn verify_chain(context: *mut ffi::X509_STORE_CTX, _arg: *mut c_void) -> c_int {
    shielded(0, || {
        // SAFETY: the context is alive during the call, and so is the peer's chain in it.
        let rejection = unsafe { verify_scene(context) }.err();
        let Some(rejection) = rejection else { return 1 };
        // SAFETY: as above.
        unsafe { ffi::X509_STORE_CTX_set_error(context, verify_code(rejection.reason)) };
        on_stage(|scene| scene.rejection = Some(rejection));
        0
    })
}

/// # Safety
/// `context` is alive and has the peer's chain.
unsafe fn verify_scene(context: *mut ffi::X509_STORE_CTX) -> Result<(), Rejection> {
    let mut chain = Vec::new();
    // SAFETY: by this function's contract; the stack's elements are certificates.
    unsafe {
        let stack = X509_STORE_CTX_get0_untrusted(context).cast::<ffi::OPENSSL_STACK>();
        for index in 0..ffi::OPENSSL_sk_num(stack) {
            let certificate = ffi::OPENSSL_sk_value(stack, index).cast::<ffi::X509>();
            chain.push(der_of(certificate)?);
        }
    }
    if chain.is_empty() {
        return Err(Rejection::new(CertificateReason::Missing, "the peer showed no certificate"));
    }
    let refs: Vec<&[u8]> = chain.iter().map(Vec::as_slice).collect();
    // The verifier is the user's: it must not find the stage borrowed.
    let Some((Some(verifier), name, peer_is_client)) =
        on_stage(|scene| (scene.verifier.clone(), scene.server_name.clone(), scene.peer_is_client))
    else {
        return Err(Rejection::new(
            CertificateReason::Rejected,
            "the server shows a certificate and does not use the pre-shared key",
        ));
    };
    verifier.verify(&PeerCertificates {
        chain: &refs,
        peer_is_client,
        server_name: name.as_deref().filter(|_| !peer_is_client),
        ocsp: &[],
    })
}

/// # Safety
/// `certificate` is alive.
unsafe fn der_of(certificate: *mut ffi::X509) -> Result<Vec<u8>, Rejection> {
    let malformed = || Rejection::new(CertificateReason::Malformed, "the peer's certificate cannot be read");
    // SAFETY: by this function's contract; with a null output i2d only measures.
    let len = unsafe { ffi::i2d_X509(certificate, ptr::null_mut()) };
    let len = usize::try_from(len).map_err(|_| malformed())?;
    let mut der = vec![0; len];
    let mut out = der.as_mut_ptr();
    // SAFETY: `out` has the room that was measured.
    let written = unsafe { ffi::i2d_X509(certificate, &mut out) };
    if usize::try_from(written) == Ok(len) { Ok(der) } else { Err(malformed()) }
}

/// OpenSSL chooses the alert by this code.
fn verify_code(reason: CertificateReason) -> c_int {
    match reason {
        // The alert certificate_expired stands for both.
        CertificateReason::Expired | CertificateReason::NotYetValid => ffi::X509_V_ERR_CERT_HAS_EXPIRED,
        CertificateReason::WrongName => ffi::X509_V_ERR_HOSTNAME_MISMATCH,
        CertificateReason::UnknownIssuer | CertificateReason::SelfSigned => {
            ffi::X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY
        }
        CertificateReason::Revoked => ffi::X509_V_ERR_CERT_REVOKED,
        CertificateReason::RevocationUnknown => ffi::X509_V_ERR_UNABLE_TO_GET_CRL,
        CertificateReason::BadSignature => ffi::X509_V_ERR_CERT_SIGNATURE_FAILURE,
        CertificateReason::UnsuitablePurpose => ffi::X509_V_ERR_INVALID_PURPOSE,
        CertificateReason::Malformed
        | CertificateReason::Missing
        | CertificateReason::PinMismatch
        | CertificateReason::UnsupportedAlgorithm
        | CertificateReason::BadStaple
        | CertificateReason::NotAllowed
        | CertificateReason::Rejected => ffi::X509_V_ERR_CERT_REJECTED,
    }
}

/// Our end of the BIO: the buffers that one call into OpenSSL reads from and writes to.
///
/// Drop it after its `Ssl`.
pub(crate) struct Wire(NonNull<WireState>);

struct WireState {
    /// Both are set during a call into OpenSSL and null at all other times.
    incoming: *mut Buffer,
    outgoing: *mut Buffer,
    /// What is left of the record that OpenSSL is reading.
    granted: usize,
}

// SAFETY: the state is owned; its pointers are null except during a call, which does not change
// threads.
unsafe impl Send for Wire {}

impl Drop for Wire {
    fn drop(&mut self) {
        // SAFETY: it came from a box in `attach` and is freed only here; the BIO that points to it is
        // gone with its `Ssl`.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

impl Wire {
    /// Connects a new one to `ssl`.
    pub(crate) fn attach(ssl: &mut Ssl) -> Result<Self> {
        let state = Box::new(WireState { incoming: ptr::null_mut(), outgoing: ptr::null_mut(), granted: 0 });
        let wire = Self(NonNull::from(Box::leak(state)));
        // SAFETY: the method is alive for ever; `ssl` takes the BIO over, and the state outlives it.
        unsafe {
            let bio = ffi::BIO_new(method()?);
            if bio.is_null() {
                return Err(Error::new(ErrorKind::ResourceLimit, "OpenSSL has no memory for a BIO"));
            }
            ffi::BIO_set_data(bio, wire.0.as_ptr().cast());
            ffi::BIO_set_init(bio, 1);
            ffi::SSL_set_bio(ssl.as_ptr(), bio, bio);
        }
        Ok(wire)
    }

    /// Runs one call into OpenSSL with these buffers behind the BIO.
    #[inline]
    pub(crate) fn with<R>(
        &mut self,
        incoming: Option<&mut Buffer>,
        outgoing: &mut Buffer,
        call: impl FnOnce() -> R,
    ) -> R {
        self.set(incoming.map_or(ptr::null_mut(), ptr::from_mut), outgoing);
        let result = call();
        self.set(ptr::null_mut(), ptr::null_mut());
        result
    }

    #[inline]
    fn set(&mut self, incoming: *mut Buffer, outgoing: *mut Buffer) {
        // SAFETY: the state is ours, and no call into OpenSSL is under way.
        unsafe {
            (*self.0.as_ptr()).incoming = incoming;
            (*self.0.as_ptr()).outgoing = outgoing;
        }
    }
}

fn method() -> Result<*const ffi::BIO_METHOD> {
    static METHOD: OnceLock<usize> = OnceLock::new();
    let address = *METHOD.get_or_init(|| {
        // SAFETY: a new method, filled before anybody else sees it, never freed.
        unsafe {
            let method = ffi::BIO_meth_new(ffi::BIO_TYPE_NONE, c"sapper buffers".as_ptr());
            if method.is_null() {
                return 0;
            }
            ffi::BIO_meth_set_read__fixed_rust(method, Some(bio_read));
            ffi::BIO_meth_set_write__fixed_rust(method, Some(bio_write));
            ffi::BIO_meth_set_ctrl__fixed_rust(method, Some(bio_ctrl));
            method as usize
        }
    });
    match address {
        0 => Err(Error::new(ErrorKind::ResourceLimit, "OpenSSL has no memory for a BIO")),
        address => Ok(address as *const ffi::BIO_METHOD),
    }
}

/// Gives whole records only, so that OpenSSL never holds the start of one: what is unread stays ours.
unsafe extern "C" fn bio_read(bio: *mut ffi::BIO, out: *mut c_char, len: c_int) -> c_int {
    // SAFETY: the data pointer was set in `attach`; the wire outlives the BIO, and its buffers are
    // valid during a call into OpenSSL, which is when OpenSSL reads.
    unsafe {
        ffi::BIO_clear_retry_flags(bio);
        let wire = &mut *ffi::BIO_get_data(bio).cast::<WireState>();
        let Some(incoming) = wire.incoming.as_mut() else {
            ffi::BIO_set_retry_read(bio);
            return -1;
        };
        if wire.granted == 0 {
            wire.granted = grant(incoming.data());
        }
        let n = wire.granted.min(usize::try_from(len).unwrap_or(0));
        if n == 0 {
            ffi::BIO_set_retry_read(bio);
            return -1;
        }
        ptr::copy_nonoverlapping(incoming.data().as_ptr(), out.cast::<u8>(), n);
        incoming.consume(n);
        wire.granted -= n;
        n as c_int
    }
}

unsafe extern "C" fn bio_write(bio: *mut ffi::BIO, data: *const c_char, len: c_int) -> c_int {
    // SAFETY: as in `bio_read`.
    unsafe {
        ffi::BIO_clear_retry_flags(bio);
        let wire = &mut *ffi::BIO_get_data(bio).cast::<WireState>();
        let (Some(outgoing), Ok(n)) = (wire.outgoing.as_mut(), usize::try_from(len)) else { return -1 };
        outgoing.extend(std::slice::from_raw_parts(data.cast::<u8>(), n));
        len
    }
}

unsafe extern "C" fn bio_ctrl(_bio: *mut ffi::BIO, command: c_int, _n: c_long, _p: *mut c_void) -> c_long {
    c_long::from(command == ffi::BIO_CTRL_FLUSH)
}

//! One direction of the record layer: a key, a sequence number, and records sealed and opened
//! without a copy or an allocation.
//!
//! What is not here: which records are allowed when, and what they mean ([`super::traffic`]).

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use super::failure::{self, alert, peer_misbehaved};
use super::key_schedule::{Hash, traffic_keys};
use super::options::TlsVersion;
use crate::buffer::Buffer;
use crate::error::{Direction, Error, ErrorKind, Result};
use crate::tls::MAX_RECORD;

/// Content types.
pub(crate) const CHANGE_CIPHER_SPEC: u8 = 20;
pub(crate) const ALERT: u8 = 21;
pub(crate) const HANDSHAKE: u8 = 22;
pub(crate) const APPLICATION_DATA: u8 = 23;

/// Type, version, length.
pub(crate) const HEADER: usize = 5;
const TAG: usize = 16;
const EXPLICIT_NONCE: usize = 8;

/// Largest payload of a record behind the header, as a receiver must allow it.
const MAX_CIPHERTEXT_12: usize = MAX_RECORD + 2048;
const MAX_CIPHERTEXT_13: usize = MAX_RECORD + 256;

/// What a record adds to its plaintext at most, in any version and suite.
pub(crate) const MAX_OVERHEAD: usize = HEADER + EXPLICIT_NONCE + TAG + 1;

/// Records under one TLS 1.2 key. The protocol cannot change keys without a new connection, and
/// a bridge runs for days; so this is not the 2^24 of RFC 8446's advice for full-size records but
/// the point where even packet-size ones leave a distinguisher a chance near 2^-20. At 300,000
/// records a second it is thirty years away.
const TLS12_RECORDS: u64 = 1 << 48;

/// Records under one AES-GCM key before TLS 1.3 changes it: RFC 8446, section 5.5 sets 2^24.5.
const REKEY_GCM: u64 = 1 << 23;

#[cfg(not(test))]
fn rekey_gcm() -> u64 {
    REKEY_GCM
}

#[cfg(test)]
thread_local! {
    /// Tests do not seal eight million records to see one key update.
    pub(crate) static REKEY_EVERY: std::cell::Cell<u64> = const { std::cell::Cell::new(REKEY_GCM) };
}

#[cfg(test)]
fn rekey_gcm() -> u64 {
    REKEY_EVERY.get()
}

/// The algorithms that the record layer speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aead {
    Aes128Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
}

impl Aead {
    fn algorithm(self) -> &'static aead::Algorithm {
        match self {
            Self::Aes128Gcm => &aead::AES_128_GCM,
            Self::Aes256Gcm => &aead::AES_256_GCM,
            Self::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }

    /// Length of its key.
    pub(crate) fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm | Self::ChaCha20Poly1305 => 32,
        }
    }

    /// Length of the IV that TLS 1.2 derives for it.
    pub(crate) fn tls12_iv_len(self) -> usize {
        match self {
            Self::Aes128Gcm | Self::Aes256Gcm => 4,
            Self::ChaCha20Poly1305 => 12,
        }
    }
}

/// How records of a version and suite look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Tls13,
    /// Each record carries 8 bytes of its nonce (RFC 5288).
    Tls12Gcm,
    /// RFC 7905.
    Tls12ChaCha,
}

/// Keys of one direction.
pub(crate) struct DirectionKeys {
    key: LessSafeKey,
    iv: [u8; 12],
    seq: u64,
    form: Form,
    rekey_at: u64,
}

impl DirectionKeys {
    /// Keys with their next sequence number. In TLS 1.2 with GCM the first 4 bytes of `iv` are the
    /// derived salt and the rest is where the explicit nonces of what is sealed start from.
    pub(crate) fn new(version: TlsVersion, aead: Aead, key: &[u8], iv: [u8; 12], seq: u64) -> Result<Self> {
        let unbound = UnboundKey::new(aead.algorithm(), key)
            .map_err(|_| Error::new(ErrorKind::LocalProtocol, "a record key has the wrong length"))?;
        let form = match (version, aead) {
            (TlsVersion::V1_3, _) => Form::Tls13,
            (TlsVersion::V1_2, Aead::ChaCha20Poly1305) => Form::Tls12ChaCha,
            (TlsVersion::V1_2, _) => Form::Tls12Gcm,
        };
        let rekey_at = match (form, aead) {
            (Form::Tls13, Aead::Aes128Gcm | Aead::Aes256Gcm) => rekey_gcm(),
            (Form::Tls13, Aead::ChaCha20Poly1305) => TLS12_RECORDS,
            _ => u64::MAX,
        };
        Ok(Self { key: LessSafeKey::new(unbound), iv, seq, form, rekey_at })
    }

    /// TLS 1.3 keys of a traffic secret.
    pub(crate) fn from_secret(aead: Aead, hash: Hash, secret: &[u8]) -> Result<Self> {
        let mut key = Zeroizing::new([0; 32]);
        let key = &mut key[..aead.key_len()];
        let mut iv = [0; 12];
        traffic_keys(hash, secret, key, &mut iv)?;
        Self::new(TlsVersion::V1_3, aead, key, iv, 0)
    }

    /// The same keys, of which so many records were used elsewhere.
    pub(crate) fn continued_at(self, seq: u64) -> Self {
        Self { seq, ..self }
    }

    /// Whether the keys should be changed before the next record.
    #[inline]
    pub(crate) fn wants_rekey(&self) -> bool {
        self.seq >= self.rekey_at
    }

    /// Whether nothing was sealed or opened with them.
    pub(crate) fn is_unused(&self) -> bool {
        self.seq == 0
    }

    #[cfg(test)]
    pub(crate) fn seq(&self) -> u64 {
        self.seq
    }

    #[inline]
    fn nonce(&self) -> [u8; 12] {
        let mut nonce = self.iv;
        for (byte, seq) in nonce[4..].iter_mut().zip(self.seq.to_be_bytes()) {
            *byte ^= seq;
        }
        nonce
    }

    #[inline]
    fn aad_12(&self, content_type: u8, len: usize) -> [u8; 13] {
        let mut aad = [0; 13];
        aad[..8].copy_from_slice(&self.seq.to_be_bytes());
        aad[8] = content_type;
        aad[9..11].copy_from_slice(&[3, 3]);
        aad[11..].copy_from_slice(&(len as u16).to_be_bytes());
        aad
    }

    /// Appends one record. `plain` is at most [`MAX_RECORD`] bytes.
    #[inline]
    pub(crate) fn seal(&mut self, content_type: u8, plain: &[u8], out: &mut Buffer) -> Result<()> {
        debug_assert!(plain.len() <= MAX_RECORD);
        let n = plain.len();
        if self.seq >= TLS12_RECORDS && self.form != Form::Tls13 {
            return Err(Error::new(
                ErrorKind::ResourceLimit,
                "this TLS 1.2 connection has used up its keys; connect again, or use TLS 1.3",
            )
            .with_direction(Direction::Encapsulate));
        }
        let nonce = self.nonce();
        let space = out.reserve(n + MAX_OVERHEAD);
        let total = match self.form {
            Form::Tls13 => {
                let len = n + 1 + TAG;
                let header = [APPLICATION_DATA, 3, 3, (len >> 8) as u8, len as u8];
                let (head, body) = space[..HEADER + len].split_at_mut(HEADER);
                head.copy_from_slice(&header);
                let (cipher, rest) = body.split_at_mut(n);
                self.encrypt(nonce, &header, plain, cipher, &[content_type], rest)?;
                HEADER + len
            }
            Form::Tls12Gcm => {
                let len = EXPLICIT_NONCE + n + TAG;
                let (head, body) = space[..HEADER + len].split_at_mut(HEADER + EXPLICIT_NONCE);
                head[..HEADER].copy_from_slice(&[content_type, 3, 3, (len >> 8) as u8, len as u8]);
                head[HEADER..].copy_from_slice(&nonce[4..]);
                let (cipher, rest) = body.split_at_mut(n);
                self.encrypt(nonce, &self.aad_12(content_type, n), plain, cipher, &[], rest)?;
                HEADER + len
            }
            Form::Tls12ChaCha => {
                let len = n + TAG;
                let (head, body) = space[..HEADER + len].split_at_mut(HEADER);
                head.copy_from_slice(&[content_type, 3, 3, (len >> 8) as u8, len as u8]);
                let (cipher, rest) = body.split_at_mut(n);
                self.encrypt(nonce, &self.aad_12(content_type, n), plain, cipher, &[], rest)?;
                HEADER + len
            }
        };
        out.commit(total);
        self.seq += 1;
        Ok(())
    }

    #[inline]
    fn encrypt(
        &self,
        nonce: [u8; 12],
        aad: &[u8],
        plain: &[u8],
        cipher: &mut [u8],
        extra: &[u8],
        extra_and_tag: &mut [u8],
    ) -> Result<()> {
        self.key
            .seal_out_of_place_scatter(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(aad),
                plain,
                cipher,
                extra,
                extra_and_tag,
            )
            .map_err(|_| Error::new(ErrorKind::LocalProtocol, "a record could not be sealed"))
    }

    /// The whole record at the front of `data`; `None` where more bytes are needed. A header that
    /// cannot be right is an error at once.
    #[inline]
    pub(crate) fn find(&self, data: &[u8]) -> Result<Option<usize>> {
        let Some(&[content_type, major, minor, high, low]) = data.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let len = usize::from(high) << 8 | usize::from(low);
        let (kinds, max, version) = match self.form {
            // The version of TLS 1.3's records says nothing (RFC 8446, section 5.1).
            Form::Tls13 => (APPLICATION_DATA..=APPLICATION_DATA, MAX_CIPHERTEXT_13, major == 3),
            _ => (ALERT..=APPLICATION_DATA, MAX_CIPHERTEXT_12, (major, minor) == (3, 3)),
        };
        if !version || !(CHANGE_CIPHER_SPEC..=APPLICATION_DATA + 1).contains(&content_type) {
            return Err(peer_misbehaved(
                alert::UNEXPECTED_MESSAGE,
                format!(
                    "what follows is no TLS record (it begins with {content_type:02x} {major:02x} {minor:02x})"
                ),
            ));
        }
        if !kinds.contains(&content_type) {
            return Err(peer_misbehaved(
                alert::UNEXPECTED_MESSAGE,
                format!("a record of type {content_type} is not allowed after the handshake"),
            ));
        }
        if len > max {
            return Err(peer_misbehaved(
                alert::RECORD_OVERFLOW,
                format!("a record of {len} bytes is larger than any can be"),
            ));
        }
        Ok((data.len() >= HEADER + len).then_some(HEADER + len))
    }

    /// How much room [`open`](Self::open) needs for the record: its content and what is cut off
    /// behind it.
    #[inline]
    pub(crate) fn room(&self, record: &[u8]) -> usize {
        let overhead = match self.form {
            Form::Tls12Gcm => HEADER + EXPLICIT_NONCE + TAG,
            _ => HEADER + TAG,
        };
        record.len().saturating_sub(overhead)
    }

    /// Opens a whole record (as [`find`](Self::find) measured it) into the front of `plain`;
    /// returns its content type and length.
    #[inline]
    pub(crate) fn open(&mut self, record: &[u8], plain: &mut [u8]) -> Result<(u8, usize)> {
        let (header, body) = record.split_at(HEADER);
        let content_type = header[0];
        let n = self.room(record);
        let (nonce, body) = match self.form {
            Form::Tls12Gcm => {
                let Some((explicit, body)) = body.split_first_chunk::<EXPLICIT_NONCE>() else {
                    return Err(bad_record());
                };
                let mut nonce = self.iv;
                nonce[4..].copy_from_slice(explicit);
                (nonce, body)
            }
            _ => (self.nonce(), body),
        };
        if body.len() < TAG {
            return Err(bad_record());
        }
        let aad_12;
        let aad = match self.form {
            Form::Tls13 => header,
            _ => {
                aad_12 = self.aad_12(content_type, n);
                &aad_12
            }
        };
        let (cipher, tag) = body.split_at(n);
        let plain = &mut plain[..n];
        self.key
            .open_separate_gather(Nonce::assume_unique_for_key(nonce), Aad::from(aad), cipher, tag, plain)
            .map_err(|_| bad_record())?;
        self.seq += 1;
        if self.form == Form::Tls13 {
            return inner_content(plain);
        }
        if n > MAX_RECORD {
            return Err(peer_misbehaved(alert::RECORD_OVERFLOW, "a record holds more than 16,384 bytes"));
        }
        Ok((content_type, n))
    }
}

/// How many bytes of a handshake's input a library may have: the first record, once it is whole, so
/// that no library ever holds the start of one that is ours. Of what cannot be a record it gets
/// everything, so that it says so now and not after 64 KB.
pub(crate) fn grant(data: &[u8]) -> usize {
    let Some(&[kind, major, _, high, low]) = data.first_chunk::<HEADER>() else { return 0 };
    let len = usize::from(high) << 8 | usize::from(low);
    if !(CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(&kind) || major != 3 || len > MAX_CIPHERTEXT_12 {
        return data.len();
    }
    if data.len() >= HEADER + len { HEADER + len } else { 0 }
}

/// Type and length of what TLS 1.3 hides in a record: padding is cut off.
#[inline]
fn inner_content(plain: &[u8]) -> Result<(u8, usize)> {
    if plain.len() > MAX_RECORD + 1 {
        return Err(peer_misbehaved(alert::RECORD_OVERFLOW, "a record holds more than 16,384 bytes"));
    }
    match plain.iter().rposition(|&byte| byte != 0) {
        Some(end) => Ok((plain[end], end)),
        None => Err(peer_misbehaved(alert::UNEXPECTED_MESSAGE, "a record holds nothing but padding")),
    }
}

fn bad_record() -> Error {
    failure::bad_record(", or sealed with another key")
}

#[cfg(test)]
mod tests {
    use super::*;

    const AEADS: [Aead; 3] = [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::ChaCha20Poly1305];

    fn pair(version: TlsVersion, aead: Aead) -> (DirectionKeys, DirectionKeys) {
        let key = vec![7; aead.key_len()];
        let make = || DirectionKeys::new(version, aead, &key, [9; 12], 3).unwrap();
        (make(), make())
    }

    fn every(mut test: impl FnMut(DirectionKeys, DirectionKeys)) {
        for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
            for aead in AEADS {
                let (sealer, opener) = pair(version, aead);
                test(sealer, opener);
            }
        }
    }

    #[test]
    fn what_is_sealed_opens_again_in_order() {
        every(|mut sealer, mut opener| {
            for len in [0, 1, 15, 16, 17, 1280, MAX_RECORD] {
                let plain = vec![len as u8; len];
                let mut out = Buffer::new();
                sealer.seal(APPLICATION_DATA, &plain, &mut out).unwrap();
                sealer.seal(ALERT, &[1, 0], &mut out).unwrap();
                for expected in [(APPLICATION_DATA, &plain[..]), (ALERT, &[1, 0][..])] {
                    let size = opener.find(out.data()).unwrap().unwrap();
                    let mut room = vec![0; opener.room(&out.data()[..size])];
                    let (kind, n) = opener.open(&out.data()[..size], &mut room).unwrap();
                    assert_eq!((kind, &room[..n]), expected);
                    out.consume(size);
                }
                assert!(out.is_empty());
            }
        });
    }

    #[test]
    fn a_changed_bit_anywhere_is_found() {
        every(|mut sealer, mut opener| {
            let mut out = Buffer::new();
            sealer.seal(APPLICATION_DATA, b"a packet", &mut out).unwrap();
            let seq = opener.seq();
            for index in 0..out.len() {
                let mut record = out.data().to_vec();
                record[index] ^= 1;
                let Ok(Some(size)) = opener.find(&record) else { continue };
                let mut room = vec![0; opener.room(&record[..size])];
                // The version bytes of a TLS 1.3 record are authenticated too.
                assert!(opener.open(&record[..size], &mut room).is_err(), "byte {index}");
                assert_eq!(opener.seq(), seq, "a refused record does not count");
            }
        });
    }

    #[test]
    fn a_repeated_record_is_refused() {
        every(|mut sealer, mut opener| {
            let mut out = Buffer::new();
            sealer.seal(APPLICATION_DATA, b"once", &mut out).unwrap();
            let mut room = [0; 64];
            opener.open(out.data(), &mut room).unwrap();
            let error = opener.open(out.data(), &mut room).unwrap_err();
            assert_eq!(error.alert(), Some(alert::BAD_RECORD_MAC));
        });
    }

    #[test]
    fn impossible_headers_are_errors_before_the_record_is_complete() {
        every(|_, opener| {
            assert!(opener.find(&[23, 3, 3, 0]).unwrap().is_none());
            assert!(opener.find(&[23, 3, 3, 0, 40]).unwrap().is_none());
            for (header, expected) in [
                ([20, 3, 3, 0, 1], alert::UNEXPECTED_MESSAGE),
                ([0x48, 0x54, 0x54, 0x50, 0x2f], alert::UNEXPECTED_MESSAGE),
                ([23, 2, 0, 0, 40], alert::UNEXPECTED_MESSAGE),
                ([23, 3, 3, 0xff, 0xff], alert::RECORD_OVERFLOW),
            ] {
                assert_eq!(opener.find(&header).unwrap_err().alert(), Some(expected), "{header:?}");
            }
        });
    }

    #[test]
    fn records_too_short_for_a_tag_are_refused() {
        every(|_, mut opener| {
            for len in 0..TAG + EXPLICIT_NONCE {
                let mut record = vec![23, 3, 3, 0, len as u8];
                record.resize(HEADER + len, 0);
                let size = opener.find(&record).unwrap().unwrap();
                let mut room = [0; 64];
                assert!(opener.open(&record[..size], &mut room).is_err(), "{len} bytes");
            }
        });
    }

    #[test]
    fn padding_is_cut_off_and_nothing_but_padding_is_refused() {
        assert_eq!(inner_content(&[1, 2, 0, APPLICATION_DATA, 0, 0]).unwrap(), (APPLICATION_DATA, 3));
        assert_eq!(inner_content(&[ALERT]).unwrap(), (ALERT, 0));
        assert!(inner_content(&[0; 40]).is_err());
        assert!(inner_content(&[]).is_err());
        assert!(inner_content(&vec![1; MAX_RECORD + 2]).is_err());
    }

    #[test]
    fn records_are_granted_whole_and_garbage_at_once() {
        let record = [22, 3, 1, 0, 3, 1, 2, 3];
        for n in 0..record.len() {
            assert_eq!(grant(&record[..n]), 0, "{n} bytes");
        }
        assert_eq!(grant(&record), 8);
        assert_eq!(grant(&[&record[..], &[22]].concat()), 8);
        assert_eq!(grant(b"HTTP/1.1"), 8);
        assert_eq!(grant(&[22, 3, 1, 0xff, 0xff, 0]), 6);
    }

    #[test]
    fn tls12_keys_end_before_the_sequence_wraps() {
        let (mut sealer, _) = pair(TlsVersion::V1_2, Aead::Aes128Gcm);
        sealer.seq = TLS12_RECORDS;
        let error = sealer.seal(APPLICATION_DATA, b"x", &mut Buffer::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceLimit);
    }
}

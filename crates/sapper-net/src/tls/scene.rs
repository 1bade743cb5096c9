//! What the libraries' call-backs see and leave behind during one synchronous handshake call.
//!
//! rustls and OpenSSL know verifiers, key logs and key look-ups per configuration, not per
//! connection. An engine therefore puts its [`Scene`] on the stage (a thread-local) while it calls
//! into the library, and takes it back when the call returns. Both libraries call back on the same
//! thread, before they return.

use std::cell::RefCell;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::credentials::PskCredentials;
use super::failure::Rejection;
use super::verify::PeerVerifier;

/// An identity, and the key that was found for it.
pub(crate) type LookedUp = (Vec<u8>, Option<Zeroizing<Vec<u8>>>);

/// State of one connection's handshake that call-backs share with its engine.
#[derive(Default)]
pub(crate) struct Scene {
    /// Who decides about the peer's certificate, and whether that is a client's.
    pub(crate) verifier: Option<Arc<dyn PeerVerifier>>,
    pub(crate) peer_is_client: bool,
    /// Our pre-shared keys.
    pub(crate) psk: Option<Arc<PskCredentials>>,
    /// Secrets of this session, for the record layer and the exporter.
    pub(crate) secrets: SessionSecrets,
    /// Clients: the name they asked for. Servers: the name that the client asked for.
    pub(crate) server_name: Option<String>,
    /// Servers: the channel binding `tls-server-end-point` of the certificate that was shown.
    pub(crate) end_point: Option<Arc<[u8]>>,
    /// Servers: when the session ends, in seconds since 1970; `None` where nothing says.
    pub(crate) session_end: Option<u64>,
    /// Why the verifier refused the peer.
    pub(crate) rejection: Option<Rejection>,
    /// Identity of the pre-shared key that was looked up.
    pub(crate) psk_identity: Option<Vec<u8>>,
    /// The last look-up and what it found, and how many there were.
    pub(crate) looked_up: Option<LookedUp>,
    pub(crate) lookups: u8,
    /// A client named an identity that we do not have.
    pub(crate) unknown_identity: bool,
    /// A client asked for a server by what is no host's name.
    pub(crate) no_host_name: bool,
    /// A client accepts no signature of our certificate's kind.
    pub(crate) no_common_signature: bool,
    /// Fatal alerts that went out and came in (OpenSSL says so; rustls in its errors).
    pub(crate) alert_sent: Option<u8>,
    pub(crate) alert_received: Option<u8>,
}

/// Secrets that the key log reported.
#[derive(Default)]
pub(crate) struct SessionSecrets {
    /// TLS 1.2.
    pub(crate) master: Option<Zeroizing<Vec<u8>>>,
    /// TLS 1.3, the first application traffic secrets.
    pub(crate) client_traffic: Option<Zeroizing<Vec<u8>>>,
    pub(crate) server_traffic: Option<Zeroizing<Vec<u8>>>,
    /// TLS 1.3.
    pub(crate) exporter: Option<Zeroizing<Vec<u8>>>,
    /// Known from the first report on.
    pub(crate) client_random: Option<[u8; 32]>,
}

impl SessionSecrets {
    /// Keeps a secret under its NSS label; others are of no use after the handshake.
    pub(crate) fn keep(&mut self, label: &str, client_random: &[u8], secret: &[u8]) {
        let slot = match label {
            "CLIENT_RANDOM" => &mut self.master,
            "CLIENT_TRAFFIC_SECRET_0" => &mut self.client_traffic,
            "SERVER_TRAFFIC_SECRET_0" => &mut self.server_traffic,
            "EXPORTER_SECRET" => &mut self.exporter,
            _ => return,
        };
        *slot = Some(Zeroizing::new(secret.to_vec()));
        self.client_random = client_random.try_into().ok();
    }

    /// Whether [`keep`](Self::keep) would keep it.
    pub(crate) fn wants(label: &str) -> bool {
        matches!(
            label,
            "CLIENT_RANDOM" | "CLIENT_TRAFFIC_SECRET_0" | "SERVER_TRAFFIC_SECRET_0" | "EXPORTER_SECRET"
        )
    }
}

thread_local! {
    static STAGE: RefCell<Option<Box<Scene>>> = const { RefCell::new(None) };
}

/// Runs `call` with `scene` on the stage; afterwards it is back in its place.
pub(crate) fn with_scene<R>(scene: &mut Option<Box<Scene>>, call: impl FnOnce() -> R) -> R {
    struct Restore<'a> {
        scene: &'a mut Option<Box<Scene>>,
        before: Option<Box<Scene>>,
    }
    impl Drop for Restore<'_> {
        fn drop(&mut self) {
            *self.scene = STAGE.replace(self.before.take());
        }
    }
    let before = STAGE.replace(scene.take());
    let _restore = Restore { scene, before };
    call()
}

/// What a call-back does with the scene; nothing where none is on the stage.
pub(crate) fn on_stage<R>(act: impl FnOnce(&mut Scene) -> R) -> Option<R> {
    STAGE.with_borrow_mut(|stage| stage.as_deref_mut().map(act))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scene_comes_back_with_what_was_left_in_it() {
        let mut scene = Some(Box::<Scene>::default());
        with_scene(&mut scene, || {
            on_stage(|scene| scene.secrets.keep("EXPORTER_SECRET", &[1; 32], b"s"));
        });
        let scene = scene.unwrap();
        assert_eq!(scene.secrets.exporter.as_deref().map(Vec::as_slice), Some(&b"s"[..]));
        assert_eq!(scene.secrets.client_random, Some([1; 32]));
        assert!(on_stage(|_| ()).is_none());
    }

    #[test]
    fn a_panic_in_a_call_leaves_the_stage_empty() {
        let mut scene = Some(Box::<Scene>::default());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            with_scene(&mut scene, || panic!("in the library"));
        }));
        assert!(result.is_err());
        assert!(on_stage(|_| ()).is_none());
    }
}

//! The last word to the network's peer, of a bridge that was ready: close_notify, also of a direction that
//! never ran, or the alert of an error. It is what can be said without waiting, and is said once. An abort
//! says nothing: what was cut off must not look like an orderly end.

use std::future::poll_fn;
use std::task::Poll;

use super::open::OpenSide;
use crate::endpoint::Opened;
use crate::error::{Error, ErrorKind};
use crate::pump::{Ends, Pump};
use crate::stream::Stream;

/// The alert (RFC 8446, section 6.2).
const INTERNAL_ERROR: u8 = 80;

/// Before payload flowed.
pub(super) async fn before_payload(transport: &mut OpenSide, is_aborted: bool) {
    let Opened::Stream(stream) = &mut transport.opened else { return };
    if is_aborted {
        stream.reset(0);
        return;
    }
    poll_fn(|cx| {
        let _ = stream.poll_send_eof(cx);
        Poll::Ready(())
    })
    .await;
}

/// Before the end of a pump that failed: where a connection broke, and it was not the peer's, what was to be
/// sent may be cut off. TLS can say so.
pub(super) fn of_broken(network: &mut dyn Stream, error: &Error) {
    if let (ErrorKind::ConnectionLost, Some(tls)) = (error.kind(), network.tls_mut())
        && !tls.has_failed()
    {
        tls.fatal_alert(INTERNAL_ERROR);
    }
}

/// At the end of a pump.
pub(super) async fn of_pump(pump: &mut Pump, is_aborted: bool) {
    if is_aborted {
        match pump.ends() {
            Ends::Streams(network, _) => network.reset(0),
            Ends::Ports(network, _) => {
                if let Some(stream) = network.stream_mut() {
                    stream.reset(0);
                }
            }
        }
        return;
    }
    poll_fn(|cx| {
        let _ = match pump.ends() {
            Ends::Streams(network, _) => network.poll_send_eof(cx),
            Ends::Ports(network, _) => network.poll_send_eof(cx),
        };
        Poll::Ready(())
    })
    .await;
}

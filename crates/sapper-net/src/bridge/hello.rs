//! The CDTunnel hello over a finished handshake, in either role.

use std::future::poll_fn;
use std::io::IoSlice;

use sapper_proto::cdtunnel::{self, Parameters};

use super::CdTunnelRole;
use super::open::OpenSide;
use crate::endpoint::Opened;
use crate::error::{Error, ErrorKind, Result};
use crate::stream::{RecordMarks, Stream};

/// Speaks the hello; payload that came behind it stays in `side.initial`. The caller sets the deadline.
pub(super) async fn cdtunnel(side: &mut OpenSide, role: CdTunnelRole) -> Result<Parameters> {
    let Opened::Stream(stream) = &mut side.opened else {
        return Err(Error::config("socket", "CDTunnel is spoken over a stream"));
    };
    let stream = stream.as_mut();
    let received = &mut side.initial;
    match role {
        CdTunnelRole::Client { mtu } => {
            write_all(stream, &cdtunnel::encode_request(mtu)).await?;
            read_hello(stream, received, cdtunnel::parse_response).await
        }
        CdTunnelRole::Server(parameters) => {
            let asked = read_hello(stream, received, cdtunnel::parse_request).await?;
            let mut granted = parameters;
            granted.mtu = granted.mtu.min(asked);
            write_all(stream, &cdtunnel::encode_response(&granted)).await?;
            Ok(granted)
        }
    }
}

/// Reads until `parse` has a whole message; what lies behind it stays in `received`.
async fn read_hello<T>(
    stream: &mut dyn Stream,
    received: &mut Vec<u8>,
    parse: impl Fn(&[u8]) -> Result<Option<(T, usize)>, cdtunnel::CdTunnelError>,
) -> Result<T> {
    let mut marks = RecordMarks::ignored();
    // A whole record must fit, or a TLS stream could not open it.
    let mut chunk = vec![0; 2 * crate::tls::MAX_RECORD];
    loop {
        let parsed = parse(received)
            .map_err(|error| Error::new(ErrorKind::RemoteProtocol, format!("CDTunnel hello: {error}")))?;
        if let Some((message, len)) = parsed {
            received.drain(..len);
            return Ok(message);
        }
        let n = poll_fn(|cx| stream.poll_read(cx, &mut chunk, &mut marks)).await?;
        if n == 0 {
            return Err(Error::new(ErrorKind::ConnectionLost, "the peer closed in the middle of the CDTunnel hello")
                .with_reason("truncated"));
        }
        received.extend_from_slice(&chunk[..n]);
    }
}

async fn write_all(stream: &mut dyn Stream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let n = poll_fn(|cx| stream.poll_write(cx, &[IoSlice::new(bytes)])).await?;
        bytes = &bytes[n..];
    }
    poll_fn(|cx| stream.poll_flush(cx)).await
}

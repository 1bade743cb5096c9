//! The CDTunnel hello over a finished handshake, in either role.

use std::future::poll_fn;
use std::io::IoSlice;

use sapper_proto::cdtunnel::{CdTunnelError, Parsed, Request, Response};

use super::CdTunnelRole;
use super::open::OpenSide;
use crate::endpoint::Opened;
use crate::error::{Error, ErrorKind, Result};
use crate::stream::{RecordMarks, Stream};
use crate::tls::MAX_RECORD;

/// Speaks the hello; payload that came behind it stays in `side.initial`. The caller sets the deadline.
pub(super) async fn cdtunnel(side: &mut OpenSide, role: CdTunnelRole) -> Result<Response> {
    let Opened::Stream(stream) = &mut side.opened else {
        return Err(Error::config("socket", "CDTunnel is spoken over a stream"));
    };
    let stream = stream.as_mut();
    let received = &mut side.initial;
    match role {
        CdTunnelRole::Client { mtu } => {
            write_all(stream, &Request { mtu }.encode()).await?;
            read_hello(stream, received, Response::parse).await
        }
        CdTunnelRole::Server(ours) => {
            let asked = read_hello(stream, received, Request::parse).await?;
            let granted = ours.granted_to(&asked).map_err(refused)?;
            write_all(stream, &granted.encode()).await?;
            Ok(granted)
        }
    }
}

/// Reads until `parse` has a whole message; what lies behind it stays in `received`.
async fn read_hello<T>(
    stream: &mut dyn Stream,
    received: &mut Vec<u8>,
    parse: impl Fn(&[u8]) -> Result<Parsed<T>, CdTunnelError>,
) -> Result<T> {
    let mut marks = RecordMarks::ignored();
    // A whole record fits, so that a TLS stream need not open it twice.
    let mut chunk = vec![0; MAX_RECORD];
    loop {
        let parsed = parse(received).map_err(refused)?;
        if let Parsed::Done { consumed, value } = parsed {
            received.drain(..consumed);
            return Ok(value);
        }
        let n = poll_fn(|cx| stream.poll_read(cx, &mut chunk, &mut marks)).await?;
        if n == 0 {
            let text = "the peer closed in the middle of the CDTunnel hello";
            return Err(Error::new(ErrorKind::ConnectionLost, text).with_reason("truncated"));
        }
        received.extend_from_slice(&chunk[..n]);
    }
}

fn refused(error: CdTunnelError) -> Error {
    Error::new(ErrorKind::RemoteProtocol, format!("CDTunnel hello: {error}"))
}

async fn write_all(stream: &mut dyn Stream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let n = poll_fn(|cx| stream.poll_write(cx, &[IoSlice::new(bytes)])).await?;
        bytes = &bytes[n..];
    }
    poll_fn(|cx| stream.poll_flush(cx)).await
}

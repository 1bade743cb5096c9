//! The hello that superframes begin with, over any stream. What stands in it: `sapper_proto`.

use std::future::poll_fn;
use std::io::IoSlice;
use std::task::{Poll, ready};
use std::time::Duration;

use sapper_proto::framing::superframe::{Agreement, HELLO_LEN, Hello};

use crate::error::{Direction, Error, ErrorKind, Phase, Result};
use crate::stream::{BoxStream, RecordMarks};

/// Exchanges the superframe hello: both ends send at once, neither waits for the other to begin.
///
/// `received` are bytes that were already read from the stream; what is left of them afterwards is the
/// port's.
pub async fn superframe_hello(
    stream: &mut BoxStream,
    ours: Hello,
    received: &mut Vec<u8>,
    deadline: Duration,
) -> Result<Agreement> {
    let late = |_| {
        Error::new(
            ErrorKind::HandshakeDeadline,
            format!("the peer sent no superframe hello within {deadline:?}"),
        )
        .with_phase(Phase::Handshake)
    };
    let foreign = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::IncompatiblePeer, format!("superframe hello: {error}"))
            .with_phase(Phase::Handshake)
            .with_direction(Direction::Decapsulate)
    };
    let wire = ours.encode();
    let (mut sent, mut flushed) = (0, false);
    // Not a byte beyond the hello is read: what follows belongs to the port.
    let mut answer = [0; HELLO_LEN];
    let mut got = received.len().min(HELLO_LEN);
    answer[..got].copy_from_slice(&received[..got]);
    received.drain(..got);
    let mut theirs = Hello::parse(&answer[..got]).map_err(|error| foreign(&error))?;
    let exchange = poll_fn(|cx| {
        while !flushed {
            let step = if sent < wire.len() {
                stream.poll_write(cx, &[IoSlice::new(&wire[sent..])])?.map(|n| sent += n)
            } else {
                stream.poll_flush(cx)?.map(|()| flushed = true)
            };
            if step.is_pending() {
                break;
            }
        }
        while theirs.is_none() {
            let n = ready!(stream.poll_read(cx, &mut answer[got..], &mut RecordMarks::ignored()))?;
            if n == 0 {
                return Poll::Ready(Err(foreign(&"the stream ended before it").with_reason("truncated")));
            }
            got += n;
            theirs = Hello::parse(&answer[..got]).map_err(|error| foreign(&error))?;
        }
        match &theirs {
            Some(theirs) if flushed => Poll::Ready(ours.agree(theirs).map_err(|error| foreign(&error))),
            _ => Poll::Pending,
        }
    });
    match tokio::time::timeout(deadline, exchange).await.map_err(late)? {
        Ok(agreement) => Ok(agreement),
        Err(error) => Err(error.in_handshake()),
    }
}

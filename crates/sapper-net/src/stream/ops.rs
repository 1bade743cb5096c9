//! Streams from `async` code: what handshakes, hellos and tests need. The pump polls instead.

use std::future::poll_fn;
use std::io::IoSlice;
use std::task::{Poll, ready};

use super::{RecordMarks, Stream};
use crate::error::Result;

/// Reads once; 0 is the end.
pub async fn read(stream: &mut dyn Stream, buf: &mut [u8]) -> Result<usize> {
    poll_fn(|cx| stream.poll_read(cx, buf, &mut RecordMarks::ignored())).await
}

/// Reads until `buf` is full or the stream ends; returns how much of `buf` is filled.
pub async fn read_full(stream: &mut dyn Stream, buf: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match read(stream, &mut buf[filled..]).await? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Waits until a read is worth a buffer.
pub async fn readable(stream: &mut dyn Stream) -> Result<()> {
    poll_fn(|cx| stream.poll_readable(cx)).await
}

/// Writes all of `bytes`; flushing is another step.
pub async fn write_all(stream: &mut dyn Stream, mut bytes: &[u8]) -> Result<()> {
    poll_fn(|cx| {
        while !bytes.is_empty() {
            let n = ready!(stream.poll_write(cx, &[IoSlice::new(bytes)]))?;
            bytes = &bytes[n..];
        }
        Poll::Ready(Ok(()))
    })
    .await
}

/// Waits until all that was written is handed to the system.
pub async fn flush(stream: &mut dyn Stream) -> Result<()> {
    poll_fn(|cx| stream.poll_flush(cx)).await
}

/// Flushes, then says that no more bytes come.
pub async fn send_eof(stream: &mut dyn Stream) -> Result<()> {
    poll_fn(|cx| stream.poll_send_eof(cx)).await
}

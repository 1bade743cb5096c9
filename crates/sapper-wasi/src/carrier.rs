//! Between two kinds of streams: what a guest gave to TLS as a [`Stream`] of ours, and a TLS connection
//! of ours as what wasmtime serves to the guest.
//!
//! No pump is here. The guest's reads and writes are the calls; a task of its own only sends what a
//! write left behind.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};

use sapper_net::stats::EndpointStats;
use sapper_net::stream::{RecordMarks, Stream};
use sapper_net::tls::stream::TlsStream;
use sapper_net::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinHandle;
use wasmtime_wasi_tls::TlsTransport;

/// The ciphertext's way: two streams of the guest.
pub(crate) struct Carrier {
    transport: Box<dyn TlsTransport>,
    stats: Arc<EndpointStats>,
    /// We read no more, or nothing more goes out.
    stopped: bool,
    cut: bool,
}

impl Carrier {
    pub(crate) fn new(transport: Box<dyn TlsTransport>) -> Self {
        Self { transport, stats: Arc::default(), stopped: false, cut: false }
    }

    fn transport(&mut self) -> Pin<&mut dyn TlsTransport> {
        Pin::new(&mut *self.transport)
    }
}

fn lost(what: &str, error: &io::Error) -> Error {
    Error::io(ErrorKind::ConnectionLost, what, error)
}

impl Stream for Carrier {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        _marks: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        if self.stopped {
            return Poll::Ready(Ok(0));
        }
        let mut buf = ReadBuf::new(buf);
        match ready!(self.transport().poll_read(cx, &mut buf)) {
            Ok(()) => {
                let n = buf.filled().len();
                self.stats.receive_calls.add(1);
                self.stats.bytes_received.add(n as u64);
                Poll::Ready(Ok(n))
            }
            Err(error) => Poll::Ready(Err(lost("the guest's stream cannot be read", &error))),
        }
    }

    fn poll_readable(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        // Such streams cannot be asked; a read that finds nothing gives its buffer back.
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        if self.cut {
            return Poll::Ready(Err(Error::new(ErrorKind::ConnectionLost, "the sending direction was cut")));
        }
        let Some(slice) = slices.iter().find(|slice| !slice.is_empty()) else {
            return Poll::Ready(Ok(0));
        };
        match ready!(self.transport().poll_write(cx, slice)) {
            Ok(0) => {
                let error = Error::new(ErrorKind::ConnectionLost, "the guest's stream takes no more");
                Poll::Ready(Err(error))
            }
            Ok(n) => {
                self.stats.send_calls.add(1);
                self.stats.bytes_sent.add(n as u64);
                Poll::Ready(Ok(n))
            }
            Err(error) => Poll::Ready(Err(lost("the guest's stream cannot be written", &error))),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.transport().poll_flush(cx).map_err(|error| lost("the guest's stream cannot be flushed", &error))
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.transport().poll_shutdown(cx).map_err(|error| lost("the guest's stream cannot be ended", &error))
    }

    fn reset(&mut self, _code: u64) {
        self.cut = true;
    }

    fn stop(&mut self, _code: u64) {
        self.stopped = true;
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        "streams of a wasm guest".into()
    }
}

/// Who may wait for a connection at a time.
#[derive(Clone, Copy)]
enum Side {
    Reader,
    Writer,
    Sender,
}

/// Wakes everybody: one stream knows one waker, but three tasks of the host call it.
#[derive(Default)]
struct Waiting(Mutex<[Option<Waker>; 3]>);

impl Waiting {
    fn wakers(&self) -> MutexGuard<'_, [Option<Waker>; 3]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, side: Side, waker: &Waker) {
        let place = &mut self.wakers()[side as usize];
        match place {
            Some(known) => known.clone_from(waker),
            None => *place = Some(waker.clone()),
        }
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let woken = std::mem::take(&mut *self.wakers());
        woken.into_iter().flatten().for_each(Waker::wake);
    }
}

struct Shared {
    stream: Mutex<TlsStream>,
    waiting: Arc<Waiting>,
}

impl Shared {
    fn with<T>(
        &self,
        side: Side,
        cx: &Context<'_>,
        call: impl FnOnce(&mut TlsStream, &mut Context<'_>) -> Poll<Result<T>>,
    ) -> Poll<io::Result<T>> {
        // Noted first: what wakes us during the call may be for this side.
        self.waiting.note(side, cx.waker());
        let waker = Waker::from(Arc::clone(&self.waiting));
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        call(&mut stream, &mut Context::from_waker(&waker)).map_err(|error| failed(&error).into())
    }
}

/// The text that a guest sees of an error.
pub(crate) fn failed(error: &Error) -> wasmtime_wasi_tls::Error {
    wasmtime_wasi_tls::Error::msg(error)
}

/// A TLS connection for wasmtime: cleartext in and out.
pub(crate) struct Cleartext {
    shared: Arc<Shared>,
    sender: JoinHandle<()>,
    /// The sender has something to do.
    more: Arc<tokio::sync::Notify>,
}

impl Cleartext {
    /// Within a tokio runtime.
    pub(crate) fn new(stream: TlsStream) -> Self {
        let shared = Arc::new(Shared { stream: Mutex::new(stream), waiting: Arc::default() });
        let more = Arc::new(tokio::sync::Notify::new());
        let sender = tokio::spawn(send_the_rest(Arc::clone(&shared), Arc::clone(&more)));
        Self { shared, sender, more }
    }
}

/// A guest that has written need not call again; what its stream did not take at once is sent here.
async fn send_the_rest(shared: Arc<Shared>, more: Arc<tokio::sync::Notify>) {
    loop {
        more.notified().await;
        let sent = poll_fn(|cx| shared.with(Side::Sender, cx, |stream, cx| stream.poll_flush(cx))).await;
        if sent.is_err() {
            return; // the stream remembers it and tells whoever writes
        }
    }
}

impl Drop for Cleartext {
    fn drop(&mut self) {
        self.sender.abort();
    }
}

impl wasmtime_wasi_tls::TlsStream for Cleartext {}

impl AsyncRead for Cleartext {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let space = buf.initialize_unfilled();
        if space.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let n = ready!(self.shared.with(Side::Reader, cx, |stream, cx| {
            stream.poll_read(cx, space, &mut RecordMarks::ignored())
        }))?;
        buf.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Cleartext {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let (taken, waits) = ready!(self.shared.with(Side::Writer, cx, |stream, cx| {
            stream.poll_write(cx, &[IoSlice::new(bytes)]).map_ok(|n| (n, stream.unconfirmed() > 0))
        }))?;
        if waits {
            self.more.notify_one();
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(Side::Writer, cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(Side::Writer, cx, |stream, cx| stream.poll_send_eof(cx))
    }
}

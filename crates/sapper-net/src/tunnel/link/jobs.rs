//! What a link waits for besides its streams: dials, TLS handshakes of visitors, goodbyes of sockets.
//!
//! Their number is bounded: dials by the streams, handshakes by the public port's limit, goodbyes by both
//! and by their own deadline.

use std::collections::VecDeque;
use std::task::{Context, Poll};
use std::time::Duration;

use sapper_proto::tunnel::mux::StreamKey;
use tokio::time::timeout;

use super::{BoxFuture, Connected};
use crate::stream::{BoxStream, RecordMarks, ops};
use crate::tunnel::wake::{Awake, Token};
use std::sync::Arc;
use std::task::Waker;

/// How long a socket whose streams are over is listened to, so that its peer gets what it was sent: a socket
/// that is closed with bytes unread throws away what is on its way.
const GOODBYE: Duration = Duration::from_secs(5);
/// How long it may take what was left for it when its tunnel ended.
const DELIVERY: Duration = Duration::from_secs(60);

/// What a job was for.
pub(super) enum Done {
    /// The service of a stream answered.
    Dialled(StreamKey, Connected),
    /// A visitor to that service was let in, with its TLS handshake, or was not.
    Visitor(u16, Connected),
    /// A socket said goodbye.
    Gone,
}

struct Job {
    work: BoxFuture<Done>,
    waker: Waker,
}

/// The jobs.
#[derive(Default)]
pub(super) struct Jobs {
    places: Vec<Option<Job>>,
    free: Vec<u32>,
    count: usize,
}

impl Jobs {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Adds one; it is polled when its token wakes, which it does now.
    pub(super) fn add(&mut self, work: BoxFuture<Done>, awake: &Arc<Awake>) -> u32 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() as u32 - 1
        });
        self.places[at as usize] = Some(Job { work, waker: awake.waker(Token::Job(at)) });
        self.count += 1;
        at
    }

    /// Goes on with one; what it gave, where it is done.
    pub(super) fn poll(&mut self, at: u32) -> Option<Done> {
        let place = self.places.get_mut(at as usize)?;
        let job = place.as_mut()?;
        let Poll::Ready(done) = job.work.as_mut().poll(&mut Context::from_waker(&job.waker)) else {
            return None;
        };
        *place = None;
        self.free.push(at);
        self.count -= 1;
        Some(done)
    }
}

/// Says what is left and the end, and listens until the peer has said its own.
pub(super) async fn goodbye(mut stream: BoxStream, mut rest: VecDeque<u8>) -> Done {
    let said = timeout(DELIVERY, ops::write_all(stream.as_mut(), rest.make_contiguous())).await;
    if !matches!(said, Ok(Ok(()))) {
        return Done::Gone;
    }
    drop(rest);
    let talk = async {
        if ops::send_eof(stream.as_mut()).await.is_err() {
            return;
        }
        let mut scrap = [0; 1024];
        loop {
            let read =
                std::future::poll_fn(|cx| stream.poll_read(cx, &mut scrap, &mut RecordMarks::ignored()));
            match read.await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    // After that it is closed as it is.
    let _ = timeout(GOODBYE, talk).await;
    Done::Gone
}

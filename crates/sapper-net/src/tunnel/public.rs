//! The public port of a tunnel: where visitors come in.

use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::link::{BoxFuture, Connected};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::BoxStream;
use crate::stream::listen::{AcceptedSocket, ListenAddress, ListenOptions, Listener};
use crate::tls::config::TlsConfig;
use crate::tls::stream::TlsStream;
use crate::tls::{Role, SharedTlsConfig};

/// How long a name in the address may be looked up.
const LOOK_UP: Duration = Duration::from_secs(10);

/// A listening port and who waits at it.
pub(super) struct PublicPort {
    accepting: BoxFuture<(Listener, Result<AcceptedSocket>)>,
    tls: Option<SharedTlsConfig>,
    handshake: Duration,
}

/// Somebody who connected.
pub(super) struct Visitor {
    socket: AcceptedSocket,
    tls: Option<SharedTlsConfig>,
    handshake: Duration,
}

/// How public ports are made.
#[derive(Clone)]
pub(super) struct PublicOptions {
    pub(super) host: Option<String>,
    pub(super) max_visitors: u32,
    pub(super) tls: Option<SharedTlsConfig>,
    pub(super) handshake: Duration,
}

impl PublicPort {
    /// Binds it on this thread's event loop.
    pub(super) async fn bind(port: u16, options: &PublicOptions) -> Result<Self> {
        let address = ListenAddress::Tcp { host: options.host.clone(), port };
        let listen = ListenOptions { max_connections: options.max_visitors, ..ListenOptions::default() };
        let listener = Listener::bind(&address, &listen, Instant::now() + LOOK_UP).await?;
        let tls = options.tls.clone();
        Ok(Self { accepting: Box::pin(accept(listener)), tls, handshake: options.handshake })
    }

    pub(super) fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Result<Visitor>> {
        let (listener, accepted) = ready!(self.accepting.as_mut().poll(cx));
        self.accepting = Box::pin(accept(listener));
        let (tls, handshake) = (self.tls.clone(), self.handshake);
        Poll::Ready(accepted.map(|socket| Visitor { socket, tls, handshake }))
    }
}

async fn accept(mut listener: Listener) -> (Listener, Result<AcceptedSocket>) {
    let accepted = listener.accept_socket().await;
    (listener, accepted)
}

impl Visitor {
    /// The stream, or the handshake that it takes first.
    pub(super) fn greeting(self) -> std::result::Result<BoxStream, BoxFuture<Connected>> {
        let stream: Result<BoxStream> = self.socket.open().map(|stream| Box::new(stream) as BoxStream);
        match (stream, self.tls) {
            (Ok(stream), None) => Ok(stream),
            (Ok(stream), Some(tls)) => {
                Err(Box::pin(shake(stream, tls, Role::Server, Vec::new(), self.handshake)))
            }
            (Err(error), _) => Err(Box::pin(std::future::ready(Err(error)))),
        }
    }
}

/// A TLS handshake with its deadline. `initial` was read already.
pub(super) async fn shake(
    stream: BoxStream,
    tls: Arc<TlsConfig>,
    role: Role,
    initial: Vec<u8>,
    deadline: Duration,
) -> Connected {
    match timeout(deadline, TlsStream::handshake(stream, &tls, &role, &initial)).await {
        Ok(Ok((stream, _))) => Ok(Box::new(stream)),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let message = format!("the TLS handshake took more than {:.0} s", deadline.as_secs_f64());
            Err(Error::new(ErrorKind::HandshakeDeadline, message).with_phase(Phase::Handshake))
        }
    }
}

//! The local service that a client exposes, and how it is reached.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::link::Connected;
use crate::error::ErrorKind;
use crate::stream::BoxStream;
use crate::stream::address::UnixAddress;
use crate::stream::connect::{ConnectOptions, connect_tcp, connect_unix};

/// Where a service listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// At a port of this machine, on 127.0.0.1 or ::1, whichever listens.
    Local(u16),
    /// At a host.
    Tcp(String, u16),
    /// At a path.
    Unix(PathBuf),
}

/// This machine, in the order in which it is tried.
const LOCAL: [&str; 2] = ["127.0.0.1", "::1"];

/// Dials the service.
pub(super) struct Dialer {
    service: Service,
    timeout: Duration,
    /// Which of this machine's addresses answered last.
    answers: AtomicUsize,
}

impl Dialer {
    pub(super) fn new(service: Service, timeout: Duration) -> Arc<Self> {
        Arc::new(Self { service, timeout, answers: AtomicUsize::new(0) })
    }

    /// One connection.
    pub(super) async fn dial(self: Arc<Self>) -> Connected {
        let deadline = Instant::now() + self.timeout;
        let options = ConnectOptions::default();
        let stream = match &self.service {
            Service::Unix(path) => connect_unix(&UnixAddress::Path(path.clone()), deadline).await?,
            Service::Tcp(host, port) => connect_tcp(host, *port, &options, deadline).await?,
            Service::Local(port) => {
                let first = self.answers.load(Ordering::Relaxed);
                let other = 1 - first;
                match connect_tcp(LOCAL[first], *port, &options, deadline).await {
                    Ok(stream) => stream,
                    Err(error) if error.kind() == ErrorKind::ConnectDeadline => return Err(error),
                    Err(error) => match connect_tcp(LOCAL[other], *port, &options, deadline).await {
                        Ok(stream) => {
                            self.answers.store(other, Ordering::Relaxed);
                            stream
                        }
                        // The other address is an attempt: what the first said is the answer.
                        Err(_) => return Err(error),
                    },
                }
            }
        };
        let stream: BoxStream = Box::new(stream);
        Ok(stream)
    }
}

//! The local service that a client exposes, and how it is reached.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sapper_proto::proxy_protocol::{Addresses, Details, Header, Version};
use sapper_proto::tunnel::words::Asked;
use tokio::time::{Instant, timeout_at};

use super::limit::Limits;
use super::link::Connected;
use crate::error::{Error, ErrorKind, Phase};
use crate::stream::address::UnixAddress;
use crate::stream::connect::{ConnectOptions, connect_tcp, connect_unix};
use crate::stream::{BoxStream, ops};
use crate::sys::{self, Claim};

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

/// A service that a client exposes, and the public port that it would like for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exposed {
    /// Where it is.
    pub service: Service,
    /// Its name, and what is asked of the server.
    pub asked: Asked,
    /// What may pass to it.
    pub limits: Limits,
}

/// What is the same when a client is started again, and different for every client that lives: a hash of the machine
/// and of where its services are, which tells neither, and which of the living ones with the same it is.
pub(super) struct Origin {
    services: Vec<(Asked, Service)>,
    word: String,
    _claim: Option<Claim>,
}

/// Clients with the same services on one machine, beyond which the next has no origin.
const COPIES: u32 = 64;
/// The longest word of an origin: a hash in hexadecimal digits, and the number of a copy.
pub(super) const ORIGIN: usize = 64 + "-63".len();

impl Origin {
    pub(super) fn of(exposed: &[Exposed]) -> Self {
        let services = Self::services(exposed);
        let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        hash.update(b"sapper tunnel origin");
        hash.update(&sys::machine());
        for (asked, service) in &services {
            hash.update(format!("{:?} {service:?}", asked.name).as_bytes());
        }
        let hash: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let claimed = (0..COPIES).find_map(|copy| {
            let word = format!("{hash}-{copy}");
            Claim::of(&format!("sapper-tunnel-{word}")).map(|claim| (word, claim))
        });
        let (word, claim) = claimed.unzip();
        Self { services, word: word.unwrap_or_default(), _claim: claim }
    }

    fn services(exposed: &[Exposed]) -> Vec<(Asked, Service)> {
        exposed.iter().map(|one| (one.asked.clone(), one.service.clone())).collect()
    }

    /// Whether it is that of a client with these services.
    pub(super) fn is_of(&self, exposed: &[Exposed]) -> bool {
        self.services == Self::services(exposed)
    }

    /// As the server hears it; empty where there is none.
    pub(super) fn word(&self) -> &str {
        &self.word
    }
}

/// This machine, in the order in which it is tried.
const LOCAL: [&str; 2] = ["127.0.0.1", "::1"];

/// What is dialled, and how.
pub(super) struct Target {
    pub(super) service: Service,
    pub(super) timeout: Duration,
    /// The service hears who visits, in a header of this version.
    pub(super) proxy: Option<Version>,
}

/// Dials the service.
pub(super) struct Dialer {
    /// Exchanged while it works: a connection goes to what is current when its visitor comes.
    target: Mutex<Arc<Target>>,
    /// Which of this machine's addresses answered last.
    answers: AtomicUsize,
}

impl Dialer {
    pub(super) fn new(target: Target) -> Arc<Self> {
        Arc::new(Self { target: Mutex::new(Arc::new(target)), answers: AtomicUsize::new(0) })
    }

    pub(super) fn replace(&self, target: Target) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(target);
    }

    /// One connection, for a visitor from the first of the two addresses to the second, where that is known.
    pub(super) async fn dial(self: Arc<Self>, visitor: Option<(SocketAddr, SocketAddr)>) -> Connected {
        let target = Arc::clone(&self.target.lock().unwrap_or_else(PoisonError::into_inner));
        let deadline = Instant::now() + target.timeout;
        let options = ConnectOptions { socket: super::STREAM, ..ConnectOptions::default() };
        let stream = match &target.service {
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
        let mut stream: BoxStream = Box::new(stream);
        if let Some(version) = target.proxy {
            let header = header(version, visitor);
            let told = timeout_at(deadline, ops::write_all(stream.as_mut(), &header)).await;
            told.unwrap_or_else(|_| {
                let text = "the service did not take the PROXY header in time";
                Err(Error::new(ErrorKind::ConnectDeadline, text).with_phase(Phase::Connect))
            })?;
        }
        Ok(stream)
    }
}

/// Who visits. An original server does not tell: then the header says that it is not known.
fn header(version: Version, visitor: Option<(SocketAddr, SocketAddr)>) -> Vec<u8> {
    let header = match visitor {
        Some((from, to)) => Header::tcp(version, from, to),
        None => Header { version, addresses: Addresses::Unknown, details: Details::default() },
    };
    header.encode().expect("a header without details is short")
}

//! Names to addresses, without holding an event loop up.
//!
//! The system's resolver cannot be interrupted: each look-up has a thread of its own, which outlives a
//! deadline, so their number is bounded.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::runtime;

/// Look-ups at a time in this process. A resolver that hangs holds its threads until its own time
/// limit; further look-ups wait for their turn, under their own deadline.
const MAX_LOOKUPS: usize = 32;

/// Longest name that the DNS knows, with a dot at its end.
const MAX_HOST: usize = 254;

static LOOKUPS: std::sync::LazyLock<Arc<Semaphore>> =
    std::sync::LazyLock::new(|| Arc::new(Semaphore::new(MAX_LOOKUPS)));

/// The addresses of `host` (a name, or an address in text), in the system's order of preference.
pub async fn resolve(host: &str, port: u16, deadline: Instant) -> Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    check_host(host)?;
    let owned = host.to_owned();
    let lookup = in_thread(move || (owned.as_str(), port).to_socket_addrs().map(Vec::from_iter));
    let found = match timeout_at(deadline, lookup).await {
        Ok(found) => found?,
        Err(_) => {
            let message = format!("look up {host}: no answer before the deadline");
            return Err(Error::new(ErrorKind::ConnectDeadline, message).with_phase(Phase::Connect));
        }
    };
    match found {
        Ok(addresses) if addresses.is_empty() => {
            let message = format!("look up {host}: it has no address");
            Err(Error::new(ErrorKind::Connect, message).with_phase(Phase::Connect).with_reason("name"))
        }
        Ok(addresses) => Ok(addresses),
        // The resolver's errors have no errno.
        Err(source) => Err(Error::io(ErrorKind::Connect, format_args!("look up {host}"), &source)
            .with_phase(Phase::Connect)
            .with_reason("name")),
    }
}

/// Refuses what can be no host name, without looking it up. Whoever knows the option to blame adds it.
pub(crate) fn check_host(host: &str) -> Result<()> {
    if host.is_empty()
        || host.len() > MAX_HOST
        || host.contains(|c: char| c.is_control() || c.is_whitespace())
    {
        return Err(Error::new(ErrorKind::Config, format!("{host:?} is no host name")).with_reason("host"));
    }
    Ok(())
}

async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<io::Result<T>> {
    let turn = Arc::clone(&LOOKUPS).acquire_owned().await.expect("the semaphore is never closed");
    let (answer, answered) = oneshot::channel();
    runtime::spawn_thread("sapper-lookup", move || {
        let result = work();
        // Back before the answer is read: whoever waited may go on.
        drop(turn);
        let _ = answer.send(result);
    })
    .map_err(|source| Error::io(ErrorKind::ResourceLimit, "start a thread to look a name up", &source))?;
    Ok(answered.await.unwrap_or_else(|_| Err(io::Error::other("the look-up ended without an answer"))))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[tokio::test]
    async fn addresses_need_no_look_up_and_names_have_one() {
        for (host, address) in [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7")] {
            assert_eq!(resolve(host, 7, soon()).await.unwrap(), [address.parse().unwrap()]);
        }
        let found = resolve("localhost", 7, soon()).await.unwrap();
        assert!(
            !found.is_empty() && found.iter().all(|a| a.ip().is_loopback() && a.port() == 7),
            "{found:?}"
        );
        for host in ["", "a\0b", "a b", "a\n", &"x".repeat(255)] {
            assert_eq!(resolve(host, 7, soon()).await.unwrap_err().kind(), ErrorKind::Config, "{host:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_resolver_that_hangs_ends_at_the_deadline_and_the_threads_are_bounded() {
        let all = Arc::clone(&LOOKUPS).acquire_many_owned(MAX_LOOKUPS as u32).await.unwrap();
        let error = resolve("localhost", 7, Instant::now() + Duration::from_secs(3)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectDeadline);
        drop(all);
    }
}

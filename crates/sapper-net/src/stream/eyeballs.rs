//! Happy eyeballs (RFC 8305): several addresses, one connection, one deadline.
//!
//! Families take turns, an attempt starts every 250 ms or as soon as the one before it failed, the
//! first that connects wins and the others are dropped. It knows nothing of sockets.

use std::fmt;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::error::{Error, ErrorKind, Phase};

/// Time that an attempt has before the next one joins it (RFC 8305, section 5).
pub const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Addresses of one name that are tried at most: each may hold a socket until the deadline.
pub const MAX_ATTEMPTS: usize = 16;

/// What became of the addresses when none connected.
#[derive(Debug)]
pub struct Failures {
    /// Each address that was tried, in order; `None` has not answered.
    pub tried: Vec<(SocketAddr, Option<Error>)>,
    /// Addresses that were not tried.
    pub untried: usize,
    /// Whether it was the deadline that ended it.
    pub late: bool,
}

/// The order to try addresses in: the resolver's within a family, families in turn, the first one's
/// first. At most [`MAX_ATTEMPTS`] are left.
pub fn interleave(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let Some(first) = addresses.first() else { return Vec::new() };
    let (mut preferred, mut other) = (Vec::new(), Vec::new());
    for &address in addresses {
        let family = if address.is_ipv6() == first.is_ipv6() { &mut preferred } else { &mut other };
        if !family.contains(&address) {
            family.push(address);
        }
    }
    let mut order = Vec::with_capacity(preferred.len() + other.len());
    let (mut preferred, mut other) = (preferred.into_iter(), other.into_iter());
    loop {
        let before = order.len();
        order.extend(preferred.next());
        order.extend(other.next());
        if order.len() == before {
            order.truncate(MAX_ATTEMPTS);
            return order;
        }
    }
}

/// Races `connect` over `addresses`, which are in the order of [`interleave`].
pub async fn race<T, F>(
    addresses: &[SocketAddr],
    deadline: Instant,
    mut connect: impl FnMut(SocketAddr) -> F,
) -> Result<T, Failures>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut tried: Vec<(SocketAddr, Option<Error>)> = Vec::with_capacity(addresses.len());
    let mut running: Vec<(usize, Pin<Box<F>>)> = Vec::new();
    let mut next_start = Instant::now();
    loop {
        let more = tried.len() < addresses.len();
        if more && (running.is_empty() || Instant::now() >= next_start) {
            let address = addresses[tried.len()];
            running.push((tried.len(), Box::pin(connect(address))));
            tried.push((address, None));
            next_start = Instant::now() + ATTEMPT_DELAY;
        }
        if running.is_empty() {
            return Err(Failures { tried, untried: 0, late: false });
        }
        let more = tried.len() < addresses.len();
        let wake_at = if more { next_start.min(deadline) } else { deadline };
        tokio::select! {
            biased;
            (index, result) = poll_fn(|cx| {
                for place in 0..running.len() {
                    let (index, attempt) = &mut running[place];
                    let index = *index;
                    if let Poll::Ready(result) = attempt.as_mut().poll(cx) {
                        drop(running.swap_remove(place));
                        return Poll::Ready((index, result));
                    }
                }
                Poll::Pending
            }) => match result {
                Ok(connected) => return Ok(connected),
                Err(why) => {
                    tried[index].1 = Some(why);
                    // The next address need not wait for its turn.
                    next_start = Instant::now();
                }
            },
            () = sleep_until(wake_at) => {
                if Instant::now() >= deadline {
                    let untried = addresses.len() - tried.len();
                    return Err(Failures { tried, untried, late: true });
                }
            }
        }
    }
}

impl Failures {
    /// One error that names every address once.
    pub fn into_error(self, target: &str) -> Error {
        let said = self.to_string();
        let why = match &self.tried[..] {
            [(address, _)] if self.untried == 0 && target.ends_with(&address.to_string()) => {
                said.strip_prefix(&format!("{address}: ")).unwrap_or(&said)
            }
            _ => &said,
        };
        let mut failed = self.tried.iter().filter_map(|(_, why)| why.as_ref());
        let first = failed.next();
        let kind = match first {
            _ if self.late => ErrorKind::ConnectDeadline,
            Some(first) if failed.all(|other| other.kind() == first.kind()) => first.kind(),
            _ => ErrorKind::Connect,
        };
        let mut error = Error::new(kind, format!("connect to {target}: {why}")).with_phase(Phase::Connect);
        if let (false, Some(errno)) = (self.late, first.and_then(Error::errno)) {
            error = error.with_errno(errno);
        }
        error
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (address, why)) in self.tried.iter().enumerate() {
            let separator = if place == 0 { "" } else { "; " };
            match why {
                // An attempt names its address.
                Some(why) => write!(f, "{separator}{}", why.message())?,
                None => write!(f, "{separator}{address}: no answer before the deadline")?,
            }
        }
        if self.untried > 0 {
            write!(f, "; {} more not tried", self.untried)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn refused(address: SocketAddr) -> Error {
        Error::new(ErrorKind::Connect, format!("{address}: refused")).with_errno(libc::ECONNREFUSED)
    }

    const V6: &str = "[2001:db8::1]:1";
    const V4: &str = "192.0.2.1:1";

    #[test]
    fn families_take_turns_and_the_first_keeps_its_preference() {
        let order =
            interleave(&addresses(&["[::1]:1", "[::2]:1", "[::3]:1", "[::1]:1", "1.1.1.1:1", "2.2.2.2:1"]));
        assert_eq!(order, addresses(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "[::3]:1"]));
        let order = interleave(&addresses(&["1.1.1.1:1", "[::1]:1"]));
        assert_eq!(order, addresses(&["1.1.1.1:1", "[::1]:1"]));
        let many: Vec<SocketAddr> = (1..=100).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        assert_eq!(interleave(&many).len(), MAX_ATTEMPTS);
    }

    /// Counts attempts that are alive, so that a loser that stays is seen.
    struct Alive(Rc<RefCell<usize>>);
    impl Alive {
        fn new(count: &Rc<RefCell<usize>>) -> Self {
            *count.borrow_mut() += 1;
            Self(Rc::clone(count))
        }
    }
    impl Drop for Alive {
        fn drop(&mut self) {
            *self.0.borrow_mut() -= 1;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_first_address_costs_one_delay_and_is_dropped() {
        let start = Instant::now();
        let alive = Rc::new(RefCell::new(0));
        let won = race(&addresses(&[V6, V4]), start + Duration::from_secs(10), |address| {
            let alive = Alive::new(&alive);
            async move {
                let _alive = alive;
                if address.is_ipv6() {
                    std::future::pending::<()>().await;
                }
                Ok(address)
            }
        })
        .await
        .unwrap();
        assert_eq!(won, V4.parse().unwrap());
        assert_eq!(start.elapsed(), ATTEMPT_DELAY);
        assert_eq!(*alive.borrow(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_first_address_still_wins_against_a_slower_second() {
        let start = Instant::now();
        let won = race(&addresses(&[V6, V4]), start + Duration::from_secs(10), |address| async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            Ok(address)
        })
        .await
        .unwrap();
        assert_eq!((won, start.elapsed()), (V6.parse().unwrap(), Duration::from_millis(300)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_starts_the_next_at_once() {
        let start = Instant::now();
        let won = race(&addresses(&[V6, V4]), start + Duration::from_secs(10), |address| async move {
            if address.is_ipv6() { Err(refused(address)) } else { Ok(address) }
        })
        .await
        .unwrap();
        assert_eq!((won, start.elapsed()), (V4.parse().unwrap(), Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_fail_the_error_names_each() {
        let deadline = Instant::now() + Duration::from_secs(10);
        let failures =
            race::<(), _>(&addresses(&[V6, V4]), deadline, |one| async move { Err(refused(one)) }).await;
        let error = failures.unwrap_err().into_error("tcp example.com:1");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Connect, Some(libc::ECONNREFUSED)));
        let both = format!("connect to tcp example.com:1: {V6}: refused; {V4}: refused");
        assert_eq!(error.message(), both);
        for (only, target) in [(V4, "tcp 192.0.2.1:1"), (V6, "tcp [2001:db8::1]:1")] {
            let failures =
                race::<(), _>(&addresses(&[only]), deadline, |one| async move { Err(refused(one)) }).await;
            let error = failures.unwrap_err().into_error(target);
            assert_eq!(error.message(), format!("connect to {target}: refused"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_holds_for_all_attempts_together() {
        let start = Instant::now();
        let deadline = start + Duration::from_millis(600);
        let four = addresses(&[V6, V4, "[2001:db8::2]:1", "192.0.2.2:1"]);
        let failures = race::<(), _>(&four, deadline, |_| std::future::pending()).await.unwrap_err();
        assert_eq!(start.elapsed(), Duration::from_millis(600));
        assert_eq!((failures.tried.len(), failures.untried, failures.late), (3, 1, true));
        let error = failures.into_error("example.com:1");
        assert_eq!(error.kind(), ErrorKind::ConnectDeadline);
        assert!(error.message().contains("no answer") && error.message().contains("1 more"), "{error}");
    }
}

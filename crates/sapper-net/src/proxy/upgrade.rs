//! What upgrades say behind TLS, until both ends have nothing but payload.
//!
//! Not here: what is said before TLS (`connection`, `reach`), and the words ([`crate::upgrade`]).

use std::time::Duration;

use super::connection::FirstBytes;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::{Stream, memory};
use crate::upgrade::Upgrading;

/// Between two upgrades of one connection: the client's side says a greeting to the other, which takes it.
const BETWEEN: usize = 4096;

/// The service said nothing.
pub(super) fn late(time: Duration) -> Error {
    let text =
        format!("the service did not begin within {:.1} s behind its upgrade to TLS", time.as_secs_f64());
    Error::new(ErrorKind::ConnectDeadline, text).with_phase(Phase::Connect)
}

/// Speaks for the client and the service (in this order) as far as either was upgraded. `read` came from
/// the client already. The caller sets the deadline.
pub(super) async fn speak(
    client: &mut dyn Stream,
    upstream: &mut dyn Stream,
    upgrading: (Option<Box<Upgrading>>, Option<Box<Upgrading>>),
    read: Vec<u8>,
) -> Result<FirstBytes> {
    Ok(match upgrading {
        (None, None) => FirstBytes { to_upstream: read, to_client: Vec::new() },
        (Some(mut of_client), None) => {
            of_client.until_payload(client, upstream).await?;
            let (to_upstream, to_client) = of_client.into_payload();
            FirstBytes { to_upstream, to_client }
        }
        (None, Some(mut of_upstream)) => {
            of_upstream.received_inside(read);
            of_upstream.until_payload(upstream, client).await?;
            let (to_client, to_upstream) = of_upstream.into_payload();
            FirstBytes { to_upstream, to_client }
        }
        // Each is the other's inside. What they tell each other is greetings, which are used up.
        (Some(mut of_client), Some(mut of_upstream)) => {
            let (mut near, mut far) = memory::pair(BETWEEN);
            tokio::try_join!(
                of_client.until_payload(client, &mut near),
                of_upstream.until_payload(upstream, &mut far),
            )?;
            FirstBytes { to_upstream: of_client.into_payload().0, to_client: of_upstream.into_payload().0 }
        }
    })
}

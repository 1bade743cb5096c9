//! The end of a client that was told to end: what is open goes on until it ends by itself or the drain is over. Where the
//! connection to the server was broken when that began, it goes on over another one. Not where it breaks later: a server
//! keeps no session for a client that has said goodbye.

use std::sync::Arc;

use sapper_proto::tunnel::backoff::Backoff;
use sapper_proto::tunnel::frame::Code;
use sapper_proto::tunnel::w3p::Retry;
use tokio::time::sleep;

use super::hello::{Granted, Refused, connect};
use super::stock::Mine;
use super::{Shared, acknowledged, lock};
use crate::error::Error;
use crate::tunnel::link::{Exit, Link};
use crate::tunnel::notice::Notice;
use crate::tunnel::rest::Rests;
use crate::tunnel::{entropy, greeting};

/// Where a link has no carrier.
pub(super) struct Away(pub(super) bool);

/// Takes no more visitors, and returns when nothing is open any more.
pub(super) async fn leave(link: &mut Link, away: Away, mine: &Mine, shared: &Shared, rests: &mut Rests) {
    let both = async {
        tokio::join!(drained(link, away, mine, shared), rests.delivered());
    };
    shared.stopping.drain(both).await;
    let carrier = link.take_carrier();
    *rests = Rests::default();
    link.cut_all();
    if let Some(mut carrier) = carrier {
        // Closed with something of the server's unread it would throw away what is on its way.
        greeting::last_word(&mut carrier, &[]).await;
    }
}

async fn drained(link: &mut Link, Away(mut away): Away, mine: &Mine, shared: &Shared) {
    if away && link.is_empty() && link.mux().is_idle() {
        return; // nobody is left for whom it would come back
    }
    link.leave(Code::SHUTDOWN, "the client stops");
    let mut pauses = None;
    let mut said = !away;
    loop {
        let exit = tokio::select! {
            biased;
            exit = link.run() => exit,
            granted = again(&mut pauses, shared), if away => {
                away = false;
                if !granted.is_some_and(|granted| goes_on(link, granted, mine)) {
                    link.part();
                }
                continue;
            }
        };
        match exit {
            Exit::CarrierLost(error, true) if !said && lock(&shared.options).reconnect.is_some() => {
                away = true;
                lost(shared, error);
            }
            Exit::CarrierLost(..) | Exit::Expired => {
                away = false;
                link.part();
            }
            Exit::Resumed => {
                let exposed = shared.exposed().clone();
                acknowledged(shared, exposed.services, exposed.tls);
                said = true;
            }
            // A new session, where the server does not know the one before any more.
            Exit::Hello(_) => link.leave(Code::SHUTDOWN, "the client stops"),
            Exit::Broken(_) | Exit::Idle => return,
        }
    }
}

fn lost(shared: &Shared, error: Option<Error>) {
    if error.is_some() {
        shared.teller.tell(Notice { name: "tunnel-error", error: error.clone(), ..Notice::default() });
    }
    shared.teller.tell(Notice { name: "tunnel-disconnected", error, ..Notice::default() });
}

/// Another connection to the server; none where no further try may help.
async fn again(pauses: &mut Option<Backoff>, shared: &Shared) -> Option<Granted> {
    let mut retry = pauses.as_ref().map(|_| Retry::Usual);
    loop {
        let options = Arc::clone(&lock(&shared.options));
        let (first, longest) = options.reconnect?;
        let backoff = pauses.get_or_insert_with(|| Backoff::new(first, longest));
        // The first time at once: most cuts are over by then, and the drain goes on.
        if let Some(retry) = retry {
            let pause = match retry {
                Retry::Never => return None,
                Retry::Usual => backoff.next(entropy()),
                Retry::After(least) => backoff.next_after(least, entropy()),
            };
            let seconds = Some(pause.as_secs_f64());
            shared.teller.tell(Notice { name: "tunnel-reconnect-queued", seconds, ..Notice::default() });
            sleep(pause).await;
        }
        match connect(&options, shared, true).await {
            Ok(granted) => return Some(granted),
            Err(Refused { error, retry: next }) => {
                shared.teller.tell(Notice { name: "tunnel-error", error: Some(error), ..Notice::default() });
                retry = Some(next);
            }
        }
    }
}

/// Whether the session waits for this connection.
fn goes_on(link: &mut Link, granted: Granted, mine: &Mine) -> bool {
    let Granted { carrier, rest, capabilities, .. } = granted;
    let now = link.now();
    let waits = capabilities.is_some() && link.mux().reattach(mine.words.clone(), now);
    if waits {
        link.set_carrier(carrier, &rest);
    }
    waits
}

//! Clients with one token, in any order.

use tokio::task::{JoinSet, yield_now};

use super::*;
use crate::tunnel::notice::TunnelInfo;
use crate::tunnel::random;
use crate::tunnel::server::testing::{FIRST, options};

const OWNER: TokenHash = [1; 32];
const ALL: Lessee = Lessee { token: OWNER, client: OWNER, credentials: OWNER };

/// A server with the leases of the one before, which was killed.
fn server(ports: u16, before: Option<&Mutex<Registry>>) -> Arc<Mutex<Registry>> {
    let mut registry = Registry::new(&options(ports)).unwrap();
    if let Some(before) = before {
        let before = lock(before);
        registry.leases.from_json(&before.leases.to_json()).unwrap();
        registry.leases.expect(seconds() + 35);
        registry.key = before.key.clone();
    }
    Arc::new(Mutex::new(registry))
}

fn client(process: usize, machine: usize) -> Client {
    Client { instance: format!("process {process}"), origin: format!("machine {machine}-0") }
}

/// As many turns as chance says.
async fn a_while() {
    for _ in 0..random::<1>().unwrap()[0] % 8 {
        yield_now().await;
    }
}

fn settled(registry: &Mutex<Registry>, place: Place, client: &Client) -> u16 {
    let mut registry = lock(registry);
    let info = Arc::new(TunnelInfo { id: registry.next_id(), ..TunnelInfo::default() });
    let (orders, _) = tokio::sync::mpsc::channel(1);
    registry.enter(Arc::clone(&info), Arc::default(), orders, OWNER);
    registry.name(&info, &[place], None, client);
    place.port
}

/// From admission to its tunnel: its port.
async fn comes(registry: Arc<Mutex<Registry>>, client: Client) -> u16 {
    a_while().await;
    let place = lock(&registry).take(ALL, None, Wanted::Any, &Client::default()).unwrap();
    a_while().await;
    let exchange = lock(&registry).exchange(OWNER, &client, Some(place));
    if exchange == Exchange::Keep {
        return settled(&registry, place, &client);
    }
    lock(&registry).give_back(place);
    let claim = match exchange {
        Exchange::Claimed(number) => Some((Claim::of(&registry, OWNER, number), number)),
        _ => None,
    };
    let number = match &claim {
        Some((claim, number)) if claim.is_free().await => Some(*number),
        _ => None,
    };
    let place = lock(&registry).take(ALL, number, Wanted::Any, &client).unwrap();
    drop(claim);
    a_while().await;
    settled(&registry, place, &client)
}

async fn all_come(registry: &Arc<Mutex<Registry>>, clients: &[Client]) -> Vec<u16> {
    let mut coming = JoinSet::new();
    for (at, client) in clients.iter().cloned().enumerate() {
        let registry = Arc::clone(registry);
        coming.spawn(async move { (at, comes(registry, client).await) });
    }
    let mut ports = vec![0; clients.len()];
    for (at, port) in coming.join_all().await {
        ports[at] = port;
    }
    assert!(lock(registry).claims.is_empty());
    ports
}

/// With ports for all, and with no more than there are clients.
#[tokio::test(start_paused = true)]
async fn behind_each_restart_everybody_has_its_own_port_in_whatever_order_they_come() {
    for ports in [5, 6, 40] {
        // Two of them look the same, but for their processes.
        let clients = [client(0, 0), client(1, 1), client(2, 2), client(3, 3), client(4, 3)];
        let mut registry = server(ports, None);
        let had = all_come(&registry, &clients).await;
        for round in 0..50 {
            registry = server(ports, Some(&registry));
            assert_eq!(all_come(&registry, &clients).await, had, "{ports} ports, round {round}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_started_again_has_its_port_and_a_newcomer_another() {
    let clients = [client(0, 0), client(1, 1)];
    let first = server(9, None);
    let had = all_come(&first, &clients).await;
    let second = server(9, Some(&first));
    let newcomer = comes(Arc::clone(&second), client(9, 9)).await;
    assert!(!had.contains(&newcomer), "those who had them are expected");
    assert_eq!(comes(Arc::clone(&second), client(8, 1)).await, had[1]);
    assert_eq!(comes(Arc::clone(&second), clients[0].clone()).await, had[0]);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_changed_has_the_port_of_its_token() {
    let registry = server(9, None);
    let port = comes(Arc::clone(&registry), client(0, 0)).await;
    let place = lock(&registry).tunnels.pop_first().unwrap().1.places[0];
    lock(&registry).release(place);
    // It ended before the server did: nobody is expected.
    let registry = server(9, Some(&registry));
    assert_eq!(comes(Arc::clone(&registry), client(1, 1)).await, port);
    // Where there is no other one it has that of a client that is expected.
    let only = server(1, None);
    assert_eq!(comes(Arc::clone(&only), client(0, 0)).await, FIRST);
    let only = server(1, Some(&only));
    assert_eq!(comes(Arc::clone(&only), client(1, 1)).await, FIRST);
}

#[tokio::test(start_paused = true)]
async fn an_original_client_keeps_what_it_was_told() {
    let registry = server(1, None);
    let mine = client(0, 0);
    let had = comes(Arc::clone(&registry), mine.clone()).await;
    for says_later in [true, false] {
        let registry = server(1, Some(&registry));
        let original = lock(&registry).take(ALL, None, Wanted::Any, &Client::default()).unwrap();
        assert_eq!(original.port, had, "there is no other");
        let Exchange::Claimed(0) = lock(&registry).exchange(OWNER, &mine, None) else {
            panic!("not its own")
        };
        let claim = Claim::of(&registry, OWNER, 0);
        let later = async {
            a_while().await;
            if says_later {
                settled(&registry, original, &Client::default());
            }
        };
        let began = Instant::now();
        let (free, ()) = tokio::join!(claim.is_free(), later);
        assert_eq!((free, began.elapsed() >= LONGEST), (false, !says_later));
        let another = lock(&registry).take(ALL, None, Wanted::Any, &mine);
        assert_eq!(another, Err(LeaseError::Exhausted));
    }
}

//! One client of a server: its connection, its public ports, its tunnel, its end. What is before it is let in:
//! [`admission`](super::admission); what it gets: [`settle`].

mod settle;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use sapper_proto::tunnel::frame::{Capabilities, Code, Hello, Token};
use sapper_proto::tunnel::lease::TokenHash;
use sapper_proto::tunnel::mux::Mux;
use sapper_proto::tunnel::w3p::{Acknowledgement, Offer, Refusal, Retry};
use sapper_proto::tunnel::words::{ClientWords, ServerWords};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::admission::{self, Admitted, Turned, admit, full};
use super::registry::{Client, Order, Place, Takeover};
use super::{Shared, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::handshakes::Handshake;
use crate::stream::listen::AcceptedSocket;
use crate::stream::{BoxStream, ops};
use crate::sys;
use crate::tunnel::greeting;
use crate::tunnel::limit::{Limits, Meter, Quota, Scope};
use crate::tunnel::link::{End, Exit, Link};
use crate::tunnel::live::Live;
use crate::tunnel::notice::{Notice, ServiceInfo, TunnelInfo};
use crate::tunnel::public::{PublicPort, ip};
use crate::tunnel::random;
use crate::tunnel::rest::drained;
use crate::tunnel::served::Served;

/// How long a server that made an offer waits for a hello, before the client counts as an original one: on top of
/// two round trips.
const HELLO: Duration = Duration::from_millis(300);
/// The same where a session of the same credentials waits for its client: this is most likely that one, and the way
/// that broke may be a slow one, through others.
const COMES_BACK: Duration = Duration::from_secs(2);
/// How long a refusal may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Orders that wait at most: each is somebody's who waits for its effect.
const ORDERS: usize = 8;
/// How long a client has to answer when another one comes that looks the same, and how often that is looked at. Its
/// round trip is on top, and may have grown since it was measured.
const PROBE: Duration = Duration::from_secs(2);
const PROBE_STEP: Duration = Duration::from_millis(10);
/// The longest round trip that it has on top of that, twice: the newcomer waits for it.
const SLOWEST: Duration = Duration::from_secs(2);
/// What it takes to tell a client that is there that another has its place; one that is not hears nothing anyway.
const STEP_ASIDE: Duration = Duration::from_millis(50);

/// From the connection to the end.
pub(super) async fn run(
    shared: Arc<Shared>,
    socket: AcceptedSocket,
    handshake: Handshake,
    alive: mpsc::Sender<()>,
) {
    let client = socket.peer.to_string();
    let mut info = TunnelInfo { id: lock(&shared.registry).next_id(), client, ..TunnelInfo::default() };
    let came_in = ip(&socket.local);
    let stream: BoxStream = match socket.open() {
        Ok(stream) => Box::new(stream),
        Err(error) => {
            return shared.tell(Notice { name: "client-error", error: Some(error), ..Notice::default() });
        }
    };
    // Before TLS, behind which there is no descriptor.
    let round_trip = stream.as_fd().map_or(Duration::ZERO, sys::round_trip);
    let mut connection = Connection::made(&shared, &info, alive.clone());
    let mut word = None;
    let admitted = tokio::select! {
        biased;
        () = shared.stopped() => None,
        error = handshake.gives_way() => {
            tell(&shared, "client-error", &info, Some(error));
            None
        }
        admitted = admit(&shared, stream, &mut info, &handshake) => match admitted {
            Ok(admitted) => Some(admitted),
            Err(Turned { error, word: last }) => {
                word = last;
                tell(&shared, "client-error", &info, Some(error));
                None
            }
        },
    };
    connection.is_of(&info);
    if let Some((mut carrier, bytes)) = word {
        tokio::select! {
            biased;
            () = greeting::last_word(&mut carrier, &bytes) => {}
            () = shared.stopped() => {}
            _ = handshake.gives_way() => {}
        }
    }
    if let Some(admitted) = admitted {
        tunnel(&shared, admitted, handshake, info, connection, (round_trip, came_in)).await;
    } else {
        drop(connection);
    }
    // A tunnel is told of behind its connection.
    drop(alive);
}

pub(super) fn tell(shared: &Shared, name: &'static str, info: &TunnelInfo, error: Option<Error>) {
    let tunnel = Some(Arc::new(info.clone()));
    let secure = shared.options().visitor_tls.is_some();
    shared.tell(Notice { name, tunnel, error, secure, ..Notice::default() });
}

/// A connection to the main port. It is told of once when it is made and once when it ends, whatever becomes of it:
/// it is nobody's client, makes a tunnel, or goes on with one.
pub(super) struct Connection {
    shared: Arc<Shared>,
    info: TunnelInfo,
    /// The tunnel that it carries.
    session: Option<u64>,
    /// The server does not end before that is told.
    _alive: mpsc::Sender<()>,
}

impl Connection {
    fn made(shared: &Arc<Shared>, info: &TunnelInfo, alive: mpsc::Sender<()>) -> Self {
        tell(shared, "client-connected", info, None);
        Self { shared: Arc::clone(shared), info: info.clone(), session: None, _alive: alive }
    }

    /// What is known of its client now. Its own number and address stay.
    fn is_of(&mut self, info: &TunnelInfo) {
        let TunnelInfo { id, client, .. } = std::mem::take(&mut self.info);
        self.info = TunnelInfo { id, client, ..info.clone() };
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let tunnel = Some(Arc::new(std::mem::take(&mut self.info)));
        let session = self.session;
        self.shared.tell(Notice { name: "client-disconnected", tunnel, session, ..Notice::default() });
    }
}

/// A client with its ports.
struct Tunnel<'a> {
    shared: &'a Shared,
    info: Arc<TunnelInfo>,
    live: Arc<Live>,
    owner: TokenHash,
    counts: Counts,
    /// Of each of its services.
    places: Vec<Place>,
    /// Where visitors of each come in, where it is not where the client did; empty where that is nowhere so.
    hosts: Vec<Option<String>>,
    /// Where that is, of our addresses.
    came_in: Option<IpAddr>,
    /// What `tunnel-created` said of it; others know it since.
    told: Option<Arc<TunnelInfo>>,
    /// Its client's, while it is there.
    connection: Option<Connection>,
    client: Client,
    orders: mpsc::Sender<Order>,
    /// What may pass to each of its services.
    limits: Limits,
}

/// What a connection counts as. Where there are as many clients as there may be, one that is perhaps the same as one
/// of them stays a handshake until that is known.
enum Counts {
    Client { _permit: OwnedSemaphorePermit },
    Handshake { _place: Handshake },
}

/// Why a client's services are not exposed, none of them.
struct No {
    error: Error,
    service: Option<u16>,
}

impl From<Error> for No {
    fn from(error: Error) -> Self {
        Self { error, service: None }
    }
}

async fn tunnel(
    shared: &Shared,
    admitted: Admitted,
    place: Handshake,
    info: TunnelInfo,
    connection: Connection,
    (round_trip, came_in): (Duration, Option<IpAddr>),
) {
    let Admitted { mut carrier, owner, public, permit } = admitted;
    let counts = match permit {
        Some(permit) => {
            drop(place);
            Counts::Client { _permit: permit }
        }
        None => Counts::Handshake { _place: place },
    };
    let (orders, mut inbox) = mpsc::channel(ORDERS);
    let (mut public, places) =
        public.map_or_else(Default::default, |(public, place)| (Some(public), vec![place]));
    let answer = Acknowledgement::Accepted { port: info.port, offer: Some(Offer::OURS) };
    let began = Instant::now();
    let mut tunnel = Tunnel {
        shared,
        info: Arc::new(info),
        live: Arc::default(),
        owner,
        counts,
        places,
        hosts: Vec::new(),
        came_in,
        told: None,
        connection: Some(connection),
        client: Client::default(),
        orders,
        limits: Limits::default(),
    };
    let talk = async {
        ops::write_all(carrier.as_mut(), &answer.encode()).await?;
        ops::flush(carrier.as_mut()).await
    };
    let sent = timeout(shared.options().common.handshake_timeout, talk).await;
    if !matches!(sent, Ok(Ok(()))) {
        return tunnel.end(None, None);
    }
    let patience = 2 * round_trip
        + match public {
            // An original client could not be served anyway.
            None => shared.options().common.handshake_timeout,
            Some(_) if lock(&shared.registry).waits_for(owner) => COMES_BACK,
            Some(_) => HELLO,
        };
    let id = random::<4>().map_or(2, u32::from_ne_bytes) >> 1;
    let mut mux =
        Mux::acceptor(shared.options().common.mux(), Some(began.elapsed() + patience), id, Duration::ZERO);
    mux.share(Arc::clone(crate::tunnel::budget()));
    let mut link = Link::new(mux, carrier, &[], End::Server(Vec::new()), Arc::clone(&shared.teller), began);
    link.set_live(Arc::clone(&tunnel.live));
    // Before they are looked at.
    let mut reloads = shared.reloads.subscribe();
    link.set_quota(tunnel.quota());
    // Until it is known what the client is, nobody is let in: its tunnel may be another's.
    let mut undecided = true;
    let mut probes: Vec<(Duration, oneshot::Sender<bool>)> = Vec::new();
    loop {
        let exit = tokio::select! {
            biased;
            () = shared.stopped() => {
                if tunnel.connection.is_none() {
                    // Its client cannot come back: what there is for visitors goes out, and nothing is waited for.
                    return tunnel.part(link, inbox, None).await;
                }
                link.leave(Code::SHUTDOWN, "the server stops");
                shared.stopping.drain(drained(&mut link)).await;
                let carrier = link.take_carrier();
                drop(link);
                if let Some(mut carrier) = carrier {
                    // Closed with something of the client's unread it would throw away what is on its way.
                    greeting::last_word(&mut carrier, &[]).await;
                }
                return tunnel.end(None, None);
            }
            Some(order) = inbox.recv() => match order {
                Order::Replace(done, replaced) => {
                    if replaced {
                        link.leave(Code::REPLACED, "another client has its place");
                        let _ = timeout(STEP_ASIDE, drained(&mut link)).await;
                    }
                    tunnel.end(Some(link), None);
                    return drop(done);
                }
                Order::Probe(answer) => {
                    let now = link.now();
                    match tunnel.connection.is_some() && link.mux().ping(now) {
                        true => probes.push((now, answer)),
                        // An original one would have been another anyway.
                        false => drop(answer.send(true)),
                    }
                    continue;
                }
                Order::Takeover(takeover) => {
                    tunnel.take_over(&mut link, *takeover);
                    continue;
                }
                Order::Refused => {
                    if tunnel.connection.is_some() {
                        continue;
                    }
                    let text = "its session waited for its client, which the connection filter refuses now";
                    return tunnel.part(link, inbox, Some(Error::new(ErrorKind::PolicyDenied, text))).await;
                }
                Order::GiveWay(done) => {
                    if tunnel.connection.is_some() || !link.is_empty() {
                        continue;
                    }
                    let text = "its session waited for its client, without visitors, and gave way to another client";
                    let error = Error::new(ErrorKind::ResourceLimit, text).with_reason("too_many_clients");
                    tunnel.end(Some(link), Some(error));
                    return drop(done);
                }
            },
            () = tokio::time::sleep(PROBE_STEP), if !probes.is_empty() => {
                let now = link.now();
                let round_trip = link.mux().slowness().unwrap_or_default().min(SLOWEST);
                let patience = PROBE + 2 * round_trip;
                for (asked, answer) in std::mem::take(&mut probes) {
                    if link.mux().answered(asked) {
                        let _ = answer.send(true);
                    } else if now >= asked + patience {
                        // Much may stand in front of its answer. What comes at first was on its way already.
                        let _ = answer.send(link.mux().heard() > asked + patience / 2);
                    } else {
                        probes.push((asked, answer));
                    }
                }
                continue;
            }
            () = tokio::time::sleep_until(began + patience), if undecided => {
                undecided = false;
                let Some(port) = public.take() else {
                    // It has no port either way: nobody gives way to it.
                    let error = match tunnel.counts {
                        Counts::Handshake { .. } => full(),
                        Counts::Client { .. } => Error::new(ErrorKind::ResourceLimit, "no port is free"),
                    };
                    return tunnel.end(Some(link), Some(error));
                };
                tunnel.create(&mut link, vec![port], &ClientWords::default());
                continue;
            }
            Ok(()) = reloads.changed() => {
                tunnel.renew_limits(&mut link);
                continue;
            }
            exit = link.run() => exit,
        };
        match exit {
            Exit::Hello(hello) => {
                let took = began.elapsed();
                let other = hello.resume.then(|| lock(&shared.registry).session(&hello.session)).flatten();
                if let Some(orders) = other {
                    return tunnel.hand_over(link, *hello, took, orders).await;
                }
                undecided = false;
                let had = public.take().or_else(|| link.take_public().pop());
                let several = hello.capabilities.has(Capabilities::SERVICES);
                let settled = tokio::select! {
                    biased;
                    // The next one decides.
                    () = shared.stopped() => Err(admission::undecided().into()),
                    settled = tunnel.settle(&hello.application, several, had) => settled,
                };
                let (words, ports) = match settled {
                    Ok(settled) => settled,
                    Err(no) => return tunnel.refuse(link, no).await,
                };
                tunnel.located(&ports, &words);
                if let Err(error) = tunnel.answer(&mut link) {
                    return tunnel.end(Some(link), Some(error));
                }
                link.mux().took(took);
                tunnel.create(&mut link, ports, &words);
            }
            Exit::Resumed => {}
            Exit::CarrierLost(error, true) => tunnel.detached(error),
            Exit::CarrierLost(error, false) => return tunnel.part(link, inbox, error).await,
            Exit::Broken(error) => return tunnel.end(Some(link), Some(error)),
            Exit::Expired | Exit::Idle => return tunnel.part(link, inbox, None).await,
        }
    }
}

impl Tunnel<'_> {
    /// Its ports are decided: visitors may come.
    fn create(&mut self, link: &mut Link, ports: Vec<PublicPort>, words: &ClientWords) {
        self.located(&ports, words);
        let places = self.places.iter().enumerate();
        let services = words.services.iter().zip(places).map(|(asked, (at, place))| ServiceInfo {
            name: asked.name.clone(),
            port: place.port,
            host: self.hosts.get(at).cloned().flatten(),
        });
        let services: Vec<_> = services.collect();
        let (services_now, lease) = (services.clone(), words.lease.clone());
        let info = TunnelInfo { services: services_now, lease, ..TunnelInfo::clone(&self.info) };
        self.info = Arc::new(info);
        link.set_info(Arc::clone(&self.info));
        let options = self.shared.options();
        self.limits.clone_from(&options.service_limits);
        let limits = &self.limits;
        link.set_services(
            services.into_iter().map(|info| Served::new(info, Meter::new(Scope::Service, limits))),
        );
        link.set_public(ports, options.max_visitors);
        let session = link.mux().session().copied();
        let before = self.told.replace(Arc::clone(&self.info));
        {
            let mut registry = lock(&self.shared.registry);
            if before.is_none() {
                let (info, live) = (Arc::clone(&self.info), Arc::clone(&self.live));
                registry.enter(info, live, self.orders.clone(), self.owner);
            }
            registry.name(&self.info, &self.places, session, &self.client);
        }
        if let Some(before) = before {
            // Its hello came late: what was told of an original client is no more.
            tell(self.shared, "tunnel-destroyed", &before, None);
        } else if let Some(connection) = &mut self.connection {
            connection.session = Some(self.info.id);
        }
        tell(self.shared, "tunnel-created", &self.info, None);
    }

    /// What may pass for its client, and for each of its visitors.
    fn quota(&self) -> Quota {
        let current = self.shared.gate.current();
        Quota {
            meters: lock(&self.shared.registry).limits(self.owner).into_iter().collect(),
            visitors: current.visitors.clone(),
            places: Some(Arc::clone(&current.places)),
        }
    }

    /// They are others perhaps.
    fn renew_limits(&mut self, link: &mut Link) {
        let options = self.shared.options();
        let same = self.limits == options.service_limits;
        self.limits.clone_from(&options.service_limits);
        link.renew_limits(self.quota(), |service| match same {
            true => service.meter(),
            false => Meter::new(Scope::Service, &self.limits),
        });
    }

    /// Its ports are at these hosts.
    fn located(&mut self, ports: &[PublicPort], words: &ClientWords) {
        self.hosts = ports.iter().map(|port| port.elsewhere(self.came_in)).collect();
        // Who asked for one hears it in any case.
        if self.hosts.iter().all(Option::is_none) && words.services.iter().all(|asked| asked.host.is_none()) {
            self.hosts.clear();
        }
    }

    /// Our hello, with the final ports.
    fn answer(&mut self, link: &mut Link) -> Result<()> {
        let (session, token) = (random()?, Token(random()?));
        let (now, said) = (link.now(), self.words());
        link.mux().answer(session, token, said, now);
        let port = self.places.first().map_or(self.info.port, |place| place.port);
        let negotiated = link.mux().capabilities() != Capabilities(0);
        self.info = Arc::new(TunnelInfo { port, negotiated, ..TunnelInfo::clone(&self.info) });
        Ok(())
    }

    /// What our hello says.
    fn words(&self) -> Vec<u8> {
        let ports = self.places.iter().map(|place| place.port).collect();
        let tls = self.shared.options().visitor_tls.is_some();
        ServerWords::Granted { ports, tls, hosts: self.hosts.clone() }.encode()
    }

    /// Our hello says no.
    async fn refuse(mut self, mut link: Link, no: No) {
        let No { error, service } = no;
        let code = error.reason().unwrap_or("no_port").to_owned();
        let retry = match &*code {
            "no_port" | "port_taken" | "in_use" | "too_many_clients" | "undecided" => Retry::Usual,
            // The same would be asked for again.
            _ => Retry::Never,
        };
        let refusal = Refusal { code, message: error.message().to_owned(), retry };
        if let (Ok(session), Ok(token)) = (random(), random()) {
            let (words, now) = (ServerWords::Refused { refusal, service }.encode(), link.now());
            link.mux().answer(session, Token(token), words, now);
            link.leave(Code::DENIED, "");
            let _ = timeout(LAST_WORDS, drained(&mut link)).await;
        }
        if let Some(mut carrier) = link.take_carrier() {
            greeting::last_word(&mut carrier, &[]).await;
        }
        self.give_back();
        self.end(None, Some(error));
    }

    fn give_back(&mut self) {
        let mut registry = lock(&self.shared.registry);
        self.places.drain(..).for_each(|place| registry.give_back(place));
    }

    /// The carrier belongs to a session of another tunnel.
    async fn hand_over(mut self, mut link: Link, hello: Hello, took: Duration, orders: mpsc::Sender<Order>) {
        drop(link.take_public());
        self.give_back();
        lock(&self.shared.registry).remove(self.info.id);
        let carrier = tokio::select! {
            biased;
            // Whose session it is ends as well.
            () = self.shared.stopped() => None,
            carrier = link.give_carrier() => carrier,
        };
        link.cut_all();
        drop(link);
        if carrier.is_none() {
            self.disconnected();
        }
        if self.told.is_some() {
            // It was taken for an original client: its hello came late.
            tell(self.shared, "tunnel-destroyed", &self.info, None);
        }
        if let Some(((carrier, rest), connection)) = carrier.zip(self.connection.take()) {
            // Where that tunnel ended meanwhile, the carrier goes with the order and the client comes again.
            let takeover = Takeover { carrier, rest, hello, took, connection };
            let _ = orders.send(Order::Takeover(Box::new(takeover))).await;
        }
    }

    /// The client is back.
    fn take_over(&mut self, link: &mut Link, takeover: Takeover) {
        let Takeover { mut carrier, rest, hello, took, mut connection } = takeover;
        let (now, said) = (link.now(), self.words());
        if let Err(error) = carrier.moved() {
            return tell(self.shared, "tunnel-error", &self.info, Some(error));
        }
        if link.mux().resume(&hello, said, now) {
            link.set_carrier(carrier, &rest);
            link.mux().took(took);
            // The one before may not be known to be gone.
            self.disconnected();
            connection.session = Some(self.info.id);
            let client = connection.info.client.clone();
            self.info = Arc::new(TunnelInfo { client, ..TunnelInfo::clone(&self.info) });
            link.set_info(Arc::clone(&self.info));
            lock(&self.shared.registry).attached(&self.info);
            self.shared.tell(Notice {
                name: "client-resumed",
                tunnel: Some(Arc::clone(&self.info)),
                connection: Some(connection.info.id),
                ..Notice::default()
            });
            self.connection = Some(connection);
        }
    }

    /// The carrier is gone; the streams wait.
    fn detached(&mut self, error: Option<Error>) {
        lock(&self.shared.registry).detached(self.info.id);
        if error.is_some() {
            tell(self.shared, "tunnel-error", &self.info, error);
        }
        self.disconnected();
    }

    /// Its client's connection has ended, where there is one: that is told.
    fn disconnected(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            connection.is_of(&self.info);
        }
    }

    /// The client is gone. Visitors who have only to take what it sent are not, until the server is stopped.
    /// Until then it counts as a client: what it left is in memory.
    async fn part(mut self, mut link: Link, inbox: mpsc::Receiver<Order>, error: Option<Error>) {
        let shared = self.shared;
        link.part();
        self.over(error);
        // Who asked meanwhile has its answer: the ports are free, and a carrier finds no session.
        drop(inbox);
        let mut delivered = std::pin::pin!(drained(&mut link));
        tokio::select! {
            biased;
            () = &mut delivered => return,
            () = shared.stopped() => {}
        }
        shared.stopping.drain(delivered).await;
    }

    fn end(mut self, link: Option<Link>, error: Option<Error>) {
        // Its sockets first: whoever is told may bind the port.
        drop(link);
        self.over(error);
    }

    /// Its ports are free, and it is told.
    fn over(&mut self, error: Option<Error>) {
        {
            let mut registry = lock(&self.shared.registry);
            registry.remove(self.info.id);
            self.places.iter().for_each(|place| registry.release(*place));
        }
        self.shared.leases_changed();
        if error.is_some() {
            tell(self.shared, "tunnel-error", &self.info, error);
        }
        self.disconnected();
        if self.told.is_some() {
            tell(self.shared, "tunnel-destroyed", &self.info, None);
        }
    }
}

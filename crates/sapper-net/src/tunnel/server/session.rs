//! One client of a server: handshake, the filter's answer, its public port, its tunnel, its end.

use std::sync::Arc;
use std::time::Duration;

use sapper_proto::tunnel::frame::{Capabilities, Code, Hello, Token};
use sapper_proto::tunnel::lease::TokenHash;
use sapper_proto::tunnel::mux::Mux;
use sapper_proto::tunnel::w3p::{
    Acknowledgement, Credentials, Offer, Refusal, Retry, ServerHandshake, Speech, recognise,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::registry::{self, Order, Place, Takeover};
use super::{Shared, lock};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::mailbox::Subject;
use crate::stream::address::Address;
use crate::stream::listen::AcceptedSocket;
use crate::stream::{BoxStream, ops};
use crate::tls::Role;
use crate::tunnel::client::drained;
use crate::tunnel::greeting::{self, ClientWords, server_words};
use crate::tunnel::link::{End, Exit, Link};
use crate::tunnel::live::Live;
use crate::tunnel::notice::{Notice, TunnelInfo};
use crate::tunnel::public::{PublicPort, shake};
use crate::tunnel::{canonical, random};

/// How long a server that made an offer waits for a hello, before the client counts as an original one.
const HELLO: Duration = Duration::from_millis(300);
/// How long a stale tunnel may take to give its port back.
const STALE: Duration = Duration::from_secs(5);
/// Orders that wait at most: each is somebody's who waits for its effect.
const ORDERS: usize = 8;

/// From the connection to the end.
pub(super) async fn run(shared: Arc<Shared>, socket: AcceptedSocket, alive: mpsc::Sender<()>) {
    let mut info = TunnelInfo {
        id: lock(&shared.registry).next_id(),
        client: match &socket.peer {
            Address::Inet(peer) => canonical(*peer).to_string(),
            other => other.to_string(),
        },
        ..TunnelInfo::default()
    };
    let stream: BoxStream = match socket.open() {
        Ok(stream) => Box::new(stream),
        Err(error) => {
            shared.tell(Notice { name: "client-error", error: Some(error), ..Notice::default() });
            return drop(alive);
        }
    };
    tell(&shared, "client-connected", &info, None);
    let admitted = tokio::select! {
        biased;
        () = shared.stopped() => None,
        admitted = admit(&shared, stream, &mut info) => match admitted {
            Ok(admitted) => Some(admitted),
            Err(error) => {
                tell(&shared, "client-error", &info, Some(error));
                None
            }
        },
    };
    if let Some(admitted) = admitted {
        tunnel(&shared, admitted, info).await;
    } else {
        tell(&shared, "client-disconnected", &info, None);
    }
    drop(alive);
}

fn tell(shared: &Shared, name: &'static str, info: &TunnelInfo, error: Option<Error>) {
    let tunnel = Some(Arc::new(TunnelInfo {
        id: info.id,
        client: info.client.clone(),
        credentials: info.credentials.clone(),
        port: info.port,
        negotiated: info.negotiated,
    }));
    let secure = shared.options().visitor_tls.is_some();
    shared.tell(Notice { name, tunnel, error, secure, ..Notice::default() });
}

/// A client that has its answer.
struct Admitted {
    carrier: BoxStream,
    /// `None` where every port is taken, one of them by a session of the same credentials: the client may be
    /// the one that it waits for.
    public: Option<(PublicPort, Place)>,
}

async fn admit(shared: &Shared, stream: BoxStream, info: &mut TunnelInfo) -> Result<Admitted> {
    let deadline = shared.options().common.handshake_timeout;
    let (mut carrier, credentials) =
        timeout(deadline, introduce(shared, stream, info)).await.unwrap_or_else(|_| {
            let text = format!("the client's handshake took more than {:.0} s", deadline.as_secs_f64());
            Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake))
        })?;
    info.credentials.clone_from(&credentials.text);
    if let Err(error) = allowed(shared, &mut carrier, info).await {
        if error.kind() == ErrorKind::PolicyDenied {
            tell(shared, "client-authentication-failed", info, None);
            refuse(&mut carrier, "rejected", error.message(), Retry::Never).await;
        }
        return Err(error);
    }
    let owner = hash(b"credentials:", credentials.text.as_bytes());
    let public = match registry::bind(&shared.registry, owner, None, &shared.gate).await {
        Ok(bound) => Some(bound),
        Err(error) => {
            let port = lock(&shared.registry).port_of(owner);
            let Some(port) = port else { return Err(unavailable(&mut carrier, error).await) };
            info.port = port;
            None
        }
    };
    shared.leases_changed();
    if let Some((_, place)) = &public {
        info.port = place.port;
    }
    Ok(Admitted { carrier, public })
}

async fn unavailable(carrier: &mut BoxStream, error: Error) -> Error {
    refuse(carrier, "no_port", error.message(), Retry::Usual).await;
    error
}

async fn refuse(carrier: &mut BoxStream, code: &str, message: &str, retry: Retry) {
    let refusal = Refusal { code: code.to_owned(), message: message.to_owned(), retry };
    greeting::last_word(carrier, &Acknowledgement::Refused(refusal).encode()).await;
}

/// TLS where it is spoken, and the credentials.
async fn introduce(
    shared: &Shared,
    mut carrier: BoxStream,
    info: &TunnelInfo,
) -> Result<(BoxStream, Credentials)> {
    let deadline = shared.options().common.handshake_timeout;
    let mut bytes = Vec::new();
    if let Some(tls) = shared.options().tls.clone() {
        while recognise(&bytes).is_none() {
            if greeting::more(&mut carrier, &mut bytes).await? == 0 {
                return Err(greeting::ended("before it said anything"));
            }
        }
        if recognise(&bytes) == Some(Speech::W3p) {
            refuse(&mut carrier, "tls_required", "this port speaks TLS", Retry::Never).await;
            return Err(Error::new(
                ErrorKind::IncompatiblePeer,
                "the client speaks W3PTUNL without TLS, this port speaks TLS",
            )
            .with_phase(Phase::Handshake)
            .with_reason("plain_at_tls_port"));
        }
        let initial = std::mem::take(&mut bytes);
        carrier = shake(carrier, tls, Role::Server, initial, deadline).await?;
    }
    let mut handshake = ServerHandshake::new(deadline);
    let confirmed = || tell(shared, "client-protocol-confirmed", info, None);
    let credentials = greeting::credentials(&mut carrier, &mut bytes, &mut handshake, confirmed).await?;
    Ok((carrier, credentials))
}

/// The filter's answer. A client that leaves, or says more, while it is being decided about is out.
async fn allowed(shared: &Shared, carrier: &mut BoxStream, info: &TunnelInfo) -> Result<()> {
    let Some(deadline) = shared.options().filter else { return Ok(()) };
    let (mailbox, key) = shared.teller.mailbox();
    let subject = Subject::TunnelClient {
        id: info.id,
        credentials: info.credentials.clone(),
        address: info.client.clone(),
    };
    let mut early = Vec::new();
    let yes = tokio::select! {
        biased;
        more = greeting::more(carrier, &mut early) => {
            return Err(match more? {
                0 => greeting::ended("while its credentials were looked at"),
                _ => Error::new(
                    ErrorKind::RemoteProtocol,
                    "the client sent more before its handshake was answered",
                )
                .with_phase(Phase::Handshake),
            });
        }
        yes = mailbox.ask(key, subject, deadline) => yes,
    };
    if yes {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::PolicyDenied, "Client rejected by connection filter")
            .with_phase(Phase::Handshake))
    }
}

/// A client with its port.
struct Tunnel<'a> {
    shared: &'a Shared,
    info: Arc<TunnelInfo>,
    live: Arc<Live>,
    place: Option<Place>,
    /// Told, and known to others.
    created: bool,
    attached: bool,
    /// Which client process.
    instance: String,
    orders: mpsc::Sender<Order>,
}

async fn tunnel(shared: &Shared, admitted: Admitted, info: TunnelInfo) {
    let Admitted { mut carrier, public } = admitted;
    let (orders, mut inbox) = mpsc::channel(ORDERS);
    let (public, place) = public.map_or((None, None), |(public, place)| (Some(public), Some(place)));
    let answer = Acknowledgement::Accepted { port: info.port, offer: Some(Offer::OURS) };
    let began = Instant::now();
    let mut tunnel = Tunnel {
        shared,
        info: Arc::new(info),
        live: Arc::default(),
        place,
        created: false,
        attached: true,
        instance: String::new(),
        orders,
    };
    let talk = async {
        ops::write_all(carrier.as_mut(), &answer.encode()).await?;
        ops::flush(carrier.as_mut()).await
    };
    let sent = timeout(shared.options().common.handshake_timeout, talk).await;
    if !matches!(sent, Ok(Ok(()))) {
        return tunnel.end(None, None);
    }
    let id = random::<4>().map_or(2, u32::from_ne_bytes) >> 1;
    let mut mux =
        Mux::acceptor(shared.options().common.mux(), Some(began.elapsed() + HELLO), id, Duration::ZERO);
    mux.share(Arc::clone(crate::tunnel::budget()));
    let mut link = Link::new(mux, carrier, &[], End::Server(None), Arc::clone(&shared.teller), began);
    link.set_live(Arc::clone(&tunnel.live));
    // Until it is known what the client is, nobody is let in: its tunnel may be another's.
    let (mut public, mut undecided) = (public, true);
    loop {
        let exit = tokio::select! {
            biased;
            () = shared.stopped() => {
                let drain = shared.stopping.borrow().unwrap_or_default();
                link.leave(Code::SHUTDOWN, "the server stops");
                let _ = timeout(drain, drained(&mut link)).await;
                return tunnel.end(Some(link), None);
            }
            Some(order) = inbox.recv() => match order {
                Order::Replace(done) => {
                    tunnel.end(Some(link), None);
                    return drop(done);
                }
                Order::Takeover(takeover) => {
                    tunnel.take_over(&mut link, *takeover);
                    continue;
                }
            },
            () = tokio::time::sleep_until(began + HELLO), if undecided => {
                undecided = false;
                let Some(port) = public.take() else {
                    let error = Error::new(ErrorKind::ResourceLimit, "no port is free");
                    return tunnel.end(Some(link), Some(error));
                };
                tunnel.create(&mut link, Some(port));
                continue;
            }
            exit = link.run() => exit,
        };
        match exit {
            Exit::Hello(hello) => {
                let other = hello.resume.then(|| lock(&shared.registry).session(&hello.session)).flatten();
                if let Some(orders) = other {
                    return tunnel.hand_over(link, *hello, orders).await;
                }
                undecided = false;
                let words = ClientWords::parse(&hello.application);
                let port = match tunnel.settle(&words, public.take()).await {
                    Ok(port) => port,
                    Err(error) => return tunnel.end(Some(link), Some(error)),
                };
                if let Err(error) = tunnel.answer(&mut link, &words) {
                    return tunnel.end(Some(link), Some(error));
                }
                tunnel.create(&mut link, port);
            }
            Exit::Resumed => {}
            Exit::CarrierLost(error, true) => tunnel.detached(error),
            Exit::CarrierLost(error, false) => return tunnel.end(Some(link), error),
            Exit::Broken(error) => return tunnel.end(Some(link), Some(error)),
            Exit::Expired | Exit::Idle => return tunnel.end(Some(link), None),
        }
    }
}

impl Tunnel<'_> {
    /// Its port is decided: visitors may come.
    fn create(&mut self, link: &mut Link, port: Option<PublicPort>) {
        link.set_info(Arc::clone(&self.info));
        if let Some(port) = port {
            link.set_public(Some(port));
        }
        if !std::mem::replace(&mut self.created, true)
            && let Some(place) = self.place
        {
            let (info, live) = (Arc::clone(&self.info), Arc::clone(&self.live));
            lock(&self.shared.registry).enter(info, live, self.orders.clone(), place);
            tell(self.shared, "tunnel-created", &self.info, None);
        }
        let session = link.mux().session().copied();
        if let Some(place) = self.place {
            lock(&self.shared.registry).name(&self.info, place, session, &self.instance);
        }
    }

    /// Which port it is: that of its own stale tunnel, that of its lease, or the one it has.
    async fn settle(
        &mut self,
        words: &ClientWords,
        public: Option<PublicPort>,
    ) -> Result<Option<PublicPort>> {
        self.instance.clone_from(&words.instance);
        let lease = words.lease.as_ref().map(|lease| hash(b"lease:", lease.as_bytes()));
        let stale = lock(&self.shared.registry).stale(self.info.id, &words.instance, lease);
        let mut wanted = lease.map(|owner| (owner, 0));
        if let Some((orders, place)) = stale {
            let (done, gone) = oneshot::channel();
            // It may be gone already; then so is its channel.
            let _ = orders.send(Order::Replace(done)).await;
            let _ = timeout(STALE, gone).await;
            wanted = wanted.or(Some((place.owner, place.service)));
        }
        let Some((owner, service)) = wanted else {
            return match public {
                Some(public) => Ok(Some(public)),
                None if self.created => Ok(None),
                None => Err(Error::new(ErrorKind::ResourceLimit, "no port is free")),
            };
        };
        // Its visitors' port is another: the one that it was given first is free again.
        drop(public);
        if let Some(place) = self.place.take() {
            lock(&self.shared.registry).forget(place);
        }
        let (public, place) =
            registry::bind(&self.shared.registry, owner, Some(service), &self.shared.gate).await?;
        self.shared.leases_changed();
        self.place = Some(place);
        Ok(Some(public))
    }

    /// Our hello, with the final port.
    fn answer(&mut self, link: &mut Link, words: &ClientWords) -> Result<()> {
        self.instance.clone_from(&words.instance);
        let (session, token) = (random()?, Token(random()?));
        let port = self.place.map_or(self.info.port, |place| place.port);
        let now = link.now();
        link.mux().answer(session, token, server_words(port), now);
        let TunnelInfo { id, client, credentials, .. } = &*self.info;
        self.info = Arc::new(TunnelInfo {
            id: *id,
            client: client.clone(),
            credentials: credentials.clone(),
            port,
            negotiated: link.mux().capabilities() != Capabilities(0),
        });
        Ok(())
    }

    /// The carrier belongs to a session of another tunnel.
    async fn hand_over(mut self, link: Link, hello: Hello, orders: mpsc::Sender<Order>) {
        if let Some(place) = self.place.take() {
            let mut registry = lock(&self.shared.registry);
            registry.forget(place);
            registry.remove(self.info.id);
        }
        if let Some((carrier, rest)) = link.into_carrier() {
            // Where that tunnel ended meanwhile, the carrier goes with the order and the client comes again.
            let _ = orders.send(Order::Takeover(Box::new(Takeover { carrier, rest, hello }))).await;
        }
    }

    /// The client is back.
    fn take_over(&mut self, link: &mut Link, takeover: Takeover) {
        let Takeover { mut carrier, rest, hello } = takeover;
        let port = self.info.port;
        let now = link.now();
        if let Err(error) = carrier.moved() {
            return tell(self.shared, "tunnel-error", &self.info, Some(error));
        }
        if link.mux().resume(&hello, server_words(port), now) {
            link.set_carrier(carrier, &rest);
            self.attached = true;
            lock(&self.shared.registry).attached(self.info.id, true);
        }
    }

    /// The carrier is gone; the streams wait.
    fn detached(&mut self, error: Option<Error>) {
        self.attached = false;
        lock(&self.shared.registry).attached(self.info.id, false);
        if error.is_some() {
            tell(self.shared, "tunnel-error", &self.info, error);
        }
        tell(self.shared, "client-disconnected", &self.info, None);
    }

    fn end(self, link: Option<Link>, error: Option<Error>) {
        // Its sockets first: whoever is told may bind the port.
        drop(link);
        {
            let mut registry = lock(&self.shared.registry);
            registry.remove(self.info.id);
            if let Some(place) = self.place {
                registry.release(place);
            }
        }
        self.shared.leases_changed();
        if error.is_some() {
            tell(self.shared, "tunnel-error", &self.info, error);
        }
        if self.attached {
            tell(self.shared, "client-disconnected", &self.info, None);
        }
        if self.created {
            tell(self.shared, "tunnel-destroyed", &self.info, None);
        }
    }
}

fn hash(what: &[u8], text: &[u8]) -> TokenHash {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    context.update(what);
    context.update(text);
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

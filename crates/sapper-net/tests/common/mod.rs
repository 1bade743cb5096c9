//! Two bridges face to face, and what a test asks of them.

#![allow(dead_code, unreachable_pub)] // each test binary uses its part

mod becomes;

use std::cell::{OnceCell, RefCell};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) use becomes::assert_becomes;
use sapper_net::bridge::{
    Bridge, BridgeDirection, BridgeOptions, CdTunnelRole, ControlMailbox, Deadlines, Event, Handshakes,
    PacketOptions, Reply, SideOptions, SideTls, SwapOptions, Value,
};
use sapper_net::endpoint::EndpointSpec;
use sapper_net::error::{Error, Result};
use sapper_net::mailbox::{Body, Mailbox};
use sapper_net::tls::Role;
use sapper_net::tls::config::TlsConfig;
use sapper_net::tls::dev_cert::dev_certificates;
use sapper_net::tls::options::{Credentials, OwnCertificate, PskIdentity, Roots, Secret, TlsOptions};
use sapper_proto::cdtunnel;
use sapper_proto::framing::Framing;

/// Longer than anything here takes; a test that meets it hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Key of a bridge's own events.
const EVENTS: u64 = 0;

/// Configurations of both roles.
pub struct Configs {
    pub client: Arc<TlsConfig>,
    pub server: Arc<TlsConfig>,
    pub name: Option<String>,
}

pub fn psk() -> Configs {
    let options = TlsOptions {
        credentials: Credentials::Psk {
            identities: vec![PskIdentity { identity: b"x".to_vec(), key: Secret::new([7; 32]).into() }],
            hash: Default::default(),
        },
        ..TlsOptions::default()
    };
    let config = Arc::new(TlsConfig::new(&options).unwrap());
    Configs { client: Arc::clone(&config), server: config, name: None }
}

pub fn certificates() -> Configs {
    let dev = dev_certificates(&["localhost"], Duration::from_secs(3600)).unwrap();
    let server = TlsOptions {
        credentials: Credentials::Certificate(OwnCertificate::pair(
            dev.server.chain.clone().into_bytes(),
            dev.server.key.clone(),
        )),
        ..TlsOptions::default()
    };
    let client =
        TlsOptions { roots: Roots::Own(dev.authority.clone().into_bytes().into()), ..TlsOptions::default() };
    Configs {
        client: Arc::new(TlsConfig::new(&client).unwrap()),
        server: Arc::new(TlsConfig::new(&server).unwrap()),
        name: Some("localhost".into()),
    }
}

pub fn all_credentials() -> [Configs; 2] {
    [psk(), certificates()]
}

/// A bridge with its mailbox and the cleartext's far end. The bridge is made at its first use, so
/// that a test can change its plan; from then on nobody but the bridge holds its descriptors.
pub struct End {
    plan: RefCell<Option<Plan>>,
    bridge: OnceCell<Bridge>,
    mailbox: Arc<ControlMailbox>,
    answers: RefCell<Vec<(u64, Result<Value>)>>,
    closed: RefCell<Option<Option<Error>>>,
    outside: Option<OwnedFd>,
}

struct Plan {
    tls: SideTls,
    transport: OwnedFd,
    sink: OwnedFd,
    framing: Option<Framing>,
    direction: BridgeDirection,
    deadlines: Deadlines,
}

impl End {
    pub fn client(configs: &Configs, transport: OwnedFd, sink: OwnedFd, framing: Option<Framing>) -> Self {
        let role = Role::Client { server_name: configs.name.clone() };
        Self::new(
            SideTls { config: Arc::clone(&configs.client), role, early: None },
            transport,
            sink,
            framing,
            None,
        )
    }

    fn new(
        tls: SideTls,
        transport: OwnedFd,
        sink: OwnedFd,
        framing: Option<Framing>,
        outside: Option<OwnedFd>,
    ) -> Self {
        let direction = BridgeDirection::Duplex;
        let deadlines = Deadlines::default();
        Self {
            plan: RefCell::new(Some(Plan { tls, transport, sink, framing, direction, deadlines })),
            bridge: OnceCell::new(),
            mailbox: Mailbox::new().unwrap(),
            answers: RefCell::default(),
            closed: RefCell::default(),
            outside,
        }
    }

    pub fn bridge(&self) -> &Bridge {
        self.bridge.get_or_init(|| {
            let plan = self.plan.take().unwrap();
            let side = |fd: OwnedFd, field| SideOptions {
                endpoint: EndpointSpec::from_fd(fd, field).unwrap(),
                tls: None,
                initial_data: Vec::new(),
                field,
            };
            let options = BridgeOptions {
                transport: SideOptions { tls: Some(plan.tls), ..side(plan.transport, "socket") },
                sink: side(plan.sink, "sink"),
                direction: plan.direction,
                framing: plan.framing,
                sink_framing: None,
                packets: plan.framing.map_or_else(PacketOptions::default, |_| PacketOptions {
                    max_packet: 16_000,
                    ..PacketOptions::default()
                }),
                deadlines: plan.deadlines,
                peer_policy: None,
                upgrade: None,
                tap: None,
            };
            Bridge::new(options, self.reply(EVENTS)).unwrap()
        })
    }

    fn changed(self, change: impl FnOnce(&mut Plan)) -> Self {
        change(self.plan.borrow_mut().as_mut().expect("the bridge is not made yet"));
        self
    }

    pub fn with_framing(self, framing: Framing) -> Self {
        self.changed(|plan| plan.framing = Some(framing))
    }

    pub fn with_direction(self, direction: BridgeDirection) -> Self {
        self.changed(|plan| plan.direction = direction)
    }

    pub fn with_deadlines(self, change: impl FnOnce(&mut Deadlines)) -> Self {
        self.changed(|plan| change(&mut plan.deadlines))
    }

    pub fn reply(&self, key: u64) -> Reply {
        Reply::new(Arc::clone(&self.mailbox), key)
    }

    pub fn ask_handshake(&self, key: u64) {
        self.bridge().handshake(self.reply(key));
    }

    pub fn ask_cdtunnel(&self, key: u64, role: CdTunnelRole) {
        self.bridge().cdtunnel_handshake(role, self.reply(key));
    }

    pub fn cdtunnel_answer(&self, key: u64) -> cdtunnel::Response {
        match self.answer(key) {
            Ok(Value::CdTunnel(parameters)) => *parameters,
            other => panic!("{other:?}"),
        }
    }

    pub fn swap_sink(&self, fd: OwnedFd) -> Result<()> {
        let sink = EndpointSpec::from_fd(fd, "sink").unwrap();
        self.bridge().swap_sink(sink, SwapOptions::default(), self.reply(90));
        self.answer(90).map(drop)
    }

    pub fn update_keys(&self) -> Result<()> {
        self.bridge().update_keys(self.reply(91));
        self.answer(91).map(drop)
    }

    pub fn handshake_both(&self, other: &End) -> (Handshakes, Handshakes) {
        self.ask_handshake(1);
        other.ask_handshake(1);
        match (self.answer(1), other.answer(1)) {
            (Ok(Value::Handshakes(a)), Ok(Value::Handshakes(b))) => (*a, *b),
            other => panic!("{other:?}"),
        }
    }

    pub fn start_both(&self, other: &End) {
        self.handshake_both(other);
        self.bridge().start().unwrap();
        other.bridge().start().unwrap();
    }

    pub fn answer(&self, key: u64) -> Result<Value> {
        self.wait_until(|| {
            let mut answers = self.answers.borrow_mut();
            let index = answers.iter().position(|(k, _)| *k == key)?;
            Some(answers.remove(index).1)
        })
    }

    /// The error of the last event.
    pub fn wait_closed(&self) -> Option<Error> {
        self.wait_until(|| self.closed.borrow().clone())
    }

    fn wait_until<T>(&self, found: impl Fn() -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            for message in self.mailbox.drain() {
                match message.body {
                    Body::Done(result) => self.answers.borrow_mut().push((message.key, result)),
                    Body::Event(Event::Closed(error)) => *self.closed.borrow_mut() = Some(error),
                    Body::Event(Event::Started) => {}
                    other => panic!("{other:?}"),
                }
            }
            if let Some(value) = found() {
                return value;
            }
            let left = until.checked_duration_since(Instant::now()).expect("nothing came in time");
            self.mailbox.wait(Some(left));
        }
    }

    pub fn cleartext(&self) -> UnixStream {
        let stream = UnixStream::from(self.outside.as_ref().unwrap().try_clone().unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn packets(&self) -> UnixDatagram {
        let socket = UnixDatagram::from(self.outside.as_ref().unwrap().try_clone().unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }
}

/// Two bridges over a socket pair, bytes at both far ends.
pub fn raw_pair(configs: &Configs) -> (End, End) {
    pair(configs, None, || {
        let (inside, outside) = UnixStream::pair().unwrap();
        (inside.into(), outside.into())
    })
}

/// Two bridges over a socket pair, packets at both far ends.
pub fn packet_pair(configs: &Configs, framing: Framing) -> (End, End) {
    pair(configs, Some(framing), || {
        let (inside, outside) = UnixDatagram::pair().unwrap();
        (inside.into(), outside.into())
    })
}

fn pair(configs: &Configs, framing: Option<Framing>, sink: impl Fn() -> (OwnedFd, OwnedFd)) -> (End, End) {
    let (a, b) = UnixStream::pair().unwrap();
    let (a_inside, a_outside) = sink();
    let (b_inside, b_outside) = sink();
    let client = SideTls {
        config: Arc::clone(&configs.client),
        role: Role::Client { server_name: configs.name.clone() },
        early: None,
    };
    let server = SideTls { config: Arc::clone(&configs.server), role: Role::Server, early: None };
    (
        End::new(client, a.into(), a_inside, framing, Some(a_outside)),
        End::new(server, b.into(), b_inside, framing, Some(b_outside)),
    )
}

/// Bytes that show when they are lost, doubled or out of order.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).flat_map(|n| n.to_be_bytes()).take(len).collect()
}

/// A UDP packet over IPv6 of `len` bytes in all.
pub fn ipv6_packet(len: usize, fill: u8) -> Vec<u8> {
    let mut packet = vec![fill; len];
    packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 17, 64]);
    packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    packet
}

pub fn device_parameters(mtu: u16) -> cdtunnel::Response {
    cdtunnel::Response {
        client_address: "fd58:8c92:8961::2".parse().unwrap(),
        prefix_len: 64,
        mtu,
        server_address: "fd58:8c92:8961::1".parse().unwrap(),
        rsd_port: 56_307,
    }
}

/// Descriptors, threads and tasks of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaks {
    fds: usize,
    threads: usize,
    tasks: usize,
}

impl Leaks {
    pub fn now() -> Self {
        let count = |path| std::fs::read_dir(path).unwrap().count();
        Self {
            fds: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            tasks: sapper_net::runtime::live_tasks(),
        }
    }

    /// The counts when no bridge is left: a task's last drop comes after its last message.
    pub fn at_rest() -> Self {
        assert_becomes(0, sapper_net::runtime::live_tasks);
        Self::now()
    }

    /// Waits until there is no more of anything than there was. Less there may be: who was counted at rest may
    /// have been a moment from letting go of what its last message came through.
    #[track_caller]
    pub fn assert_no_more(self) {
        assert_becomes(self, || {
            let now = Self::now();
            Self {
                fds: now.fds.max(self.fds),
                threads: now.threads.max(self.threads),
                tasks: now.tasks.max(self.tasks),
            }
        });
    }
}

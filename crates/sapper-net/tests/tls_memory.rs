//! Memory of TLS engines: no allocation per record, and little of it in an idle connection. A binary
//! of its own without the test harness, because it counts what the whole process allocates.

#[path = "common/counting.rs"]
mod counting;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use counting::ALLOCATIONS;
use sapper_net::buffer::Buffer;
use sapper_net::stream::RecordMarks;
use sapper_net::tls::config::TlsConfig;
use sapper_net::tls::dev_cert::dev_certificates;
use sapper_net::tls::options::{
    ClientAuth, Credentials, OwnCertificate, PskHash, PskIdentity, Roots, Secret, TlsOptions, TlsVersion,
};
use sapper_net::tls::{BoxEngine, HandshakeProgress, Role};

/// Connections held at once, so that the share of what they have in common is small.
const PAIRS: usize = 200;

struct Kind {
    name: String,
    client: TlsConfig,
    server: TlsConfig,
    /// Heap of an idle end beyond the peer's certificates.
    idle_limit: u64,
}

fn kinds() -> Vec<Kind> {
    let made = dev_certificates(&["localhost"], Duration::from_secs(3600)).unwrap();
    let certificate = |chain: &str, key: &Secret| {
        Credentials::Certificate(OwnCertificate::pair(chain.as_bytes().to_vec(), key.clone()))
    };
    let roots = || Roots::Own(made.authority.clone().into_bytes().into());
    let mut kinds = Vec::new();
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let only = |options: TlsOptions| TlsOptions { min_version: version, max_version: version, ..options };
        let mut add = |name: &str, client: TlsOptions, server: TlsOptions, idle_limit| {
            kinds.push(Kind {
                name: format!("{name}, {}", version.as_str()),
                client: TlsConfig::new(&only(client)).unwrap(),
                server: TlsConfig::new(&only(server)).unwrap(),
                idle_limit,
            });
        };
        add(
            "certificates",
            TlsOptions { roots: roots(), ..TlsOptions::default() },
            TlsOptions {
                credentials: certificate(&made.server.chain, &made.server.key),
                ..TlsOptions::default()
            },
            4096,
        );
        add(
            "mutual TLS",
            TlsOptions {
                roots: roots(),
                credentials: certificate(&made.client.chain, &made.client.key),
                ..TlsOptions::default()
            },
            TlsOptions {
                roots: roots(),
                client_auth: ClientAuth::Required,
                credentials: certificate(&made.server.chain, &made.server.key),
                ..TlsOptions::default()
            },
            4096,
        );
        let psk = || TlsOptions {
            credentials: Credentials::Psk {
                identities: vec![PskIdentity { identity: b"x".to_vec(), key: Secret::new([7; 32]).into() }],
                hash: PskHash::Sha256,
            },
            ..TlsOptions::default()
        };
        add("pre-shared key", psk(), psk(), 4096);
        if version == TlsVersion::V1_2 {
            let cbc = || TlsOptions {
                cipher_suites: vec!["PSK-AES256-CBC-SHA384".to_owned()],
                danger_legacy_suites: true,
                ..psk()
            };
            add("pre-shared key with CBC, OpenSSL's records", cbc(), cbc(), 26 * 1024);
        }
    }
    kinds
}

struct End {
    engine: BoxEngine,
    incoming: Buffer,
    outgoing: Buffer,
}

impl End {
    fn new(engine: BoxEngine) -> Self {
        Self { engine, incoming: Buffer::new(), outgoing: Buffer::new() }
    }

    fn step(&mut self) -> bool {
        let progress = self.engine.handshake(&mut self.incoming, &mut self.outgoing).unwrap();
        matches!(progress, HandshakeProgress::Done(_))
    }

    fn send_to(&mut self, other: &mut Self) {
        other.incoming.extend(self.outgoing.data());
        self.outgoing.consume(self.outgoing.len());
    }

    fn open(&mut self, plain: &mut [u8], marks: &mut RecordMarks) -> usize {
        marks.clear();
        self.engine.open(&mut self.incoming, plain, marks, &mut self.outgoing).unwrap().records
    }

    fn release(&mut self) {
        self.incoming.release();
        self.outgoing.release();
        self.engine.release_idle();
    }
}

fn connect(kind: &Kind) -> (End, End) {
    let role = Role::Client { server_name: Some("localhost".to_owned()) };
    let mut client = End::new(kind.client.engine(&role).unwrap());
    let mut server = End::new(kind.server.engine(&Role::Server).unwrap());
    let (mut client_done, mut server_done) = (false, false);
    while !(client_done && server_done) {
        client_done = client_done || client.step();
        client.send_to(&mut server);
        server_done = server_done || server.step();
        server.send_to(&mut client);
    }
    // Tickets.
    let mut plain = vec![0; 32 * 1024];
    client.open(&mut plain, &mut RecordMarks::ignored());
    (client, server)
}

/// Records of packet size both ways, after one round that may fill pools.
fn allocations_per_record(kind: &Kind) {
    const RECORDS: usize = 64;
    let (mut client, mut server) = connect(kind);
    let packet = vec![1; 1280];
    let mut plain = vec![0; 256 * 1024];
    let mut marks = RecordMarks::wanted();
    for _ in 0..2 * RECORDS {
        marks.push(0);
    }
    let mut one_way = |from: &mut End, to: &mut End| {
        for _ in 0..RECORDS {
            from.engine.seal(&packet, &mut from.outgoing).unwrap();
        }
        from.send_to(to);
        assert_eq!(to.open(&mut plain, &mut marks), RECORDS);
        from.release();
        to.release();
    };
    let mut rounds = |count: usize| {
        for _ in 0..count {
            one_way(&mut client, &mut server);
            one_way(&mut server, &mut client);
        }
    };
    rounds(2);
    let before = ALLOCATIONS.load(Relaxed);
    rounds(20);
    let made = ALLOCATIONS.load(Relaxed) - before;
    report(&format!("{}: {made} allocations in {} records", kind.name, 2 * 20 * RECORDS));
    assert_eq!(made, 0, "{}", kind.name);
}

fn heap() -> u64 {
    // SAFETY: it only reads the allocator's counters.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}

fn idle_heap(kind: &Kind) {
    // What the configurations and the libraries make at their first use is not a connection's.
    let (mut warm_client, mut warm_server) = connect(kind);
    warm_client.release();
    warm_server.release();
    let measure = |keep_client: bool| {
        let mut kept = Vec::with_capacity(PAIRS);
        let before = heap();
        for _ in 0..PAIRS {
            let (mut client, mut server) = connect(kind);
            client.release();
            server.release();
            kept.push(if keep_client { client.engine } else { server.engine });
        }
        heap().saturating_sub(before) / PAIRS as u64
    };
    for (end, keep_client) in [("client", true), ("server", false)] {
        let each = measure(keep_client);
        report(&format!("{}: an idle {end} holds {each} bytes of heap", kind.name));
        assert!(each <= kind.idle_limit, "{}: {each} bytes", kind.name);
    }
}

fn report(line: &str) {
    use std::io::Write as _;
    // Shown with the test's other output; a closed pipe does not matter.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn main() {
    for kind in kinds() {
        allocations_per_record(&kind);
        if cfg!(target_env = "gnu") {
            idle_heap(&kind);
        } else {
            report("idle heap: skipped, this C library does not say what it has given");
        }
    }
}

//! Upgrades in place: what a protocol says in clear before its TLS begins, in either role.
//!
//! A [`Negotiation`] is fed what arrives and says what to send and what it waits for; it does no I/O.
//! The order of its life: [`step`](Negotiation::step) until it wants [`Wants::Tls`], the TLS handshake
//! (by the caller), `step` again until [`Wants::Done`]. What is left in [`Wires`] then is payload.
//!
//! There are two wires: the network, and inside, where the program or the service is. For it a
//! connection looks afterwards as if it had been under TLS from its first byte: a client's program
//! gets a greeting (ours: nothing that came in clear reaches it, but where a protocol needs it, see
//! [`mysql`]), a service's own greeting is kept from a client that has had one.
//!
//! **Bytes that came in clear and would be taken for protected ones end the connection**, on either
//! side (CVE-2011-0411, CVE-2021-23222): nothing may lie behind the last word in clear.
//!
//! A protocol is a [`Machine`], a page of code, and a line in [`Upgrade`]. Not here: TLS, deadlines.

mod imap;
mod lines;
pub mod mysql;
pub mod postgres;
mod smtp;
#[cfg(test)]
mod tests;

/// How much may wait for more on one wire: the largest message before TLS is MySQL's log-in with its
/// attributes, which servers bound at 64 KiB.
pub const LONGEST: usize = 72 * 1024;

/// A protocol with an upgrade, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Upgrade {
    /// PostgreSQL's request for TLS. A server takes clients that begin with TLS at once too.
    Postgres,
    /// PostgreSQL with TLS at once (version 17), which its ALPN makes safe.
    PostgresDirect,
    /// MySQL and MariaDB. Its log-in goes through both wires.
    Mysql,
    /// SMTP's STARTTLS (RFC 3207).
    Smtp,
    /// IMAP's STARTTLS (RFC 9051).
    Imap,
}

impl Upgrade {
    /// All of them, with their names.
    pub const NAMES: [(&str, Upgrade); 5] = [
        ("postgres", Self::Postgres),
        ("postgres-direct", Self::PostgresDirect),
        ("mysql", Self::Mysql),
        ("smtp", Self::Smtp),
        ("imap", Self::Imap),
    ];

    /// By its name in options.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(one, _)| *one == name).map(|(_, upgrade)| *upgrade)
    }

    /// Its name in options.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, one)| *one == self).map_or("", |(name, _)| name)
    }

    /// The application protocol (ALPN) that goes with it.
    pub fn alpn(self) -> Option<&'static str> {
        match self {
            Self::Postgres | Self::PostgresDirect => Some(postgres::ALPN),
            Self::Mysql | Self::Smtp | Self::Imap => None,
        }
    }

    /// Whether a client waits for the server's first word.
    pub fn server_speaks_first(self) -> bool {
        matches!(self, Self::Mysql | Self::Smtp | Self::Imap)
    }

    /// Whether both are upgrades of the same protocol.
    pub fn is_protocol_of(self, other: Self) -> bool {
        self == other || (self.alpn().is_some() && self.alpn() == other.alpn())
    }

    /// Whether both wires must be open before TLS.
    pub fn is_two_sided(self) -> bool {
        self == Self::Mysql
    }
}

/// Which end of the TLS handshake follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We begin it.
    Client,
    /// We answer it.
    Server,
}

/// Bytes on their way, both ways on both wires. The caller appends to what is received, and sends and
/// empties the rest after each step, also after one that failed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wires {
    /// Received from the peer: in clear before TLS, what TLS opened behind it.
    pub from_network: Vec<u8>,
    /// Received from inside.
    pub from_inner: Vec<u8>,
    /// For the peer.
    pub to_network: Vec<u8>,
    /// For inside.
    pub to_inner: Vec<u8>,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// More from the peer.
    Network,
    /// More from inside.
    Inner,
    /// More from wherever it comes.
    Either,
    /// The TLS handshake. What is in `from_network` belongs to it: it is empty, unless the peer may begin
    /// with TLS without our answer, and has.
    Tls,
    /// Nothing more: payload.
    Done,
}

/// Why an upgrade ends in failure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeError {
    /// Something in clear lies where only TLS may begin.
    #[error("{0} bytes in clear lie behind the last word before TLS: somebody may have put them there")]
    Early(usize),
    /// The peer does not speak this protocol.
    #[error("the peer does not speak {0}")]
    Malformed(&'static str),
    /// The peer speaks it, and has or wants no TLS.
    #[error("{0}")]
    Refused(String),
    /// More than any honest peer says.
    #[error("the peer says more before TLS than anybody needs")]
    TooMuch,
    /// The peer said goodbye before TLS.
    #[error("the peer said goodbye before TLS")]
    Left,
    /// The peer, which must, did not agree on the protocol's ALPN.
    #[error("TLS from the first byte on needs the application protocol \"{0}\", which was not agreed on")]
    Alpn(&'static str),
    /// What is inside does not speak the protocol, or refuses.
    #[error("{0}")]
    Inside(String),
}

/// One role of one protocol.
pub(crate) trait Machine: Send + Sync {
    /// Goes as far as it can with what was received; what it used it removes.
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError>;
}

/// An upgrade under way.
pub struct Negotiation {
    machine: Box<dyn Machine>,
    upgrade: Upgrade,
    is_encrypted: bool,
    is_direct: bool,
}

impl Negotiation {
    /// One that has not begun.
    pub fn new(upgrade: Upgrade, role: Role) -> Self {
        let machine: Box<dyn Machine> = match (upgrade, role) {
            (Upgrade::Postgres | Upgrade::PostgresDirect, Role::Client) => {
                Box::new(postgres::Client::new(upgrade == Upgrade::PostgresDirect))
            }
            (Upgrade::Postgres | Upgrade::PostgresDirect, Role::Server) => {
                Box::new(postgres::Server::new(upgrade == Upgrade::PostgresDirect))
            }
            (Upgrade::Mysql, Role::Client) => Box::<mysql::Client>::default(),
            (Upgrade::Mysql, Role::Server) => Box::<mysql::Server>::default(),
            (Upgrade::Smtp, Role::Client) => Box::<smtp::Client>::default(),
            (Upgrade::Smtp, Role::Server) => Box::<smtp::Server>::default(),
            (Upgrade::Imap, Role::Client) => Box::<imap::Client>::default(),
            (Upgrade::Imap, Role::Server) => Box::<imap::Server>::default(),
        };
        Self { machine, upgrade, is_encrypted: false, is_direct: false }
    }

    /// Which upgrade it is.
    pub fn upgrade(&self) -> Upgrade {
        self.upgrade
    }

    /// Goes on with what was received since. To be called first with nothing: who speaks first is the
    /// protocol's matter.
    pub fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        let direct = !self.is_encrypted
            && self.upgrade.alpn().is_some()
            && wires.from_network.first() == Some(&postgres::TLS_HANDSHAKE);
        let wants = self.machine.step(wires)?;
        match wants {
            Wants::Tls => {
                self.is_direct = direct || self.upgrade == Upgrade::PostgresDirect;
                // MySQL's request has no answer: a client goes on with TLS at once.
                let is_tls = self.is_direct
                    || (self.upgrade == Upgrade::Mysql
                        && wires.from_network.first() == Some(&postgres::TLS_HANDSHAKE));
                if !is_tls && !wires.from_network.is_empty() {
                    // The answer is not sent either: nobody may think that TLS has begun.
                    wires.to_network.clear();
                    return Err(UpgradeError::Early(wires.from_network.len()));
                }
                self.is_encrypted = true;
            }
            Wants::Done => {}
            Wants::Network | Wants::Inner | Wants::Either => {
                if wires.from_network.len() > LONGEST || wires.from_inner.len() > LONGEST {
                    return Err(UpgradeError::TooMuch);
                }
            }
        }
        Ok(wants)
    }

    /// Looks at the application protocol that the TLS handshake agreed on. TLS from the first byte on
    /// relies on it: without, a peer of another protocol could be made to answer.
    pub fn check_alpn(&self, agreed: Option<&[u8]>) -> Result<(), UpgradeError> {
        match self.upgrade.alpn() {
            Some(alpn) if self.is_direct && agreed != Some(alpn.as_bytes()) => Err(UpgradeError::Alpn(alpn)),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for Negotiation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Negotiation").field("upgrade", &self.upgrade).finish_non_exhaustive()
    }
}

//! One error type for the data plane. [`ErrorKind`] is closed: it gives the Python class, the HTTP
//! status, the exit code of the command line and the reason in events.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::time::Duration;

/// Result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! error_kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $retryable:literal;)*) => {
        /// What went wrong, one word for all layers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorKind { $($(#[$doc])* $name,)* }

        impl ErrorKind {
            /// Every kind, for tests that walk them.
            pub const ALL: &'static [ErrorKind] = &[$(ErrorKind::$name,)*];

            /// The word that crosses the seam (`error.kind` in Python).
            pub fn as_str(self) -> &'static str {
                match self { $(ErrorKind::$name => $text,)* }
            }

            /// Whether the same call may succeed later with nothing changed on this side.
            pub fn is_retryable(self) -> bool {
                match self { $(ErrorKind::$name => $retryable,)* }
            }
        }
    };
}

error_kinds! {
    /// An option is wrong; nothing was done yet.
    Config = "config", false;
    /// A call that the object's state does not allow.
    ApiMisuse = "api_misuse", false;
    /// The object was closed before the call.
    Closed = "closed", false;
    /// The same operation is already under way.
    Busy = "busy", true;
    /// The object must be started first.
    NotStarted = "not_started", false;
    /// A local address cannot be bound.
    Bind = "bind", true;
    /// A device or descriptor cannot be used.
    Device = "device", false;
    /// The process lacks a right.
    PermissionRequired = "permission_required", false;
    /// The table of descriptors, memory or a configured limit is exhausted.
    ResourceLimit = "resource_limit", true;
    /// A connection was refused or could not be made.
    Connect = "connect", true;
    /// An established connection broke.
    ConnectionLost = "connection_lost", true;
    /// No route, or no way to the peer.
    Unreachable = "unreachable", true;
    /// Connecting took too long.
    ConnectDeadline = "connect_deadline", true;
    /// The handshake took too long.
    HandshakeDeadline = "handshake_deadline", true;
    /// Nothing was received for too long.
    IdleDeadline = "idle_deadline", true;
    /// An orderly close took too long.
    CloseDeadline = "close_deadline", false;
    /// A remote call took too long.
    RpcDeadline = "rpc_deadline", true;
    /// We broke the protocol (a defect).
    LocalProtocol = "local_protocol", false;
    /// The peer broke the protocol.
    RemoteProtocol = "remote_protocol", false;
    /// The peer speaks something else.
    IncompatiblePeer = "incompatible_peer", false;
    /// A TLS failure.
    Tls = "tls", false;
    /// The peer's certificate is not acceptable.
    Certificate = "certificate", false;
    /// The peer refused our credentials, or we refused its.
    CredentialsRejected = "credentials_rejected", false;
    /// The peer's identity is not known.
    UnknownPeer = "unknown_peer", false;
    /// An access list says no.
    AclDenied = "acl_denied", false;
    /// A policy call-back says no, or gave no answer in time.
    PolicyDenied = "policy_denied", false;
    /// The peer's method failed.
    RemoteCall = "remote_call", false;
    /// The peer has no such method.
    MethodNotFound = "method_not_found", false;
    /// No such record.
    NotFound = "not_found", false;
    /// The record exists or was changed meanwhile.
    Conflict = "conflict", false;
    /// The store's schema is older than this program.
    MigrationRequired = "migration_required", false;
}

/// Where in an endpoint's life an error happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Opening or connecting an endpoint.
    Connect,
    /// TLS, or a hello that follows it.
    Handshake,
    /// Moving payload.
    Transfer,
    /// Draining and closing.
    Close,
}

impl Phase {
    /// The word that crosses the seam.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Handshake => "handshake",
            Self::Transfer => "transfer",
            Self::Close => "close",
        }
    }
}

/// Which way payload moves, seen from the network side of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the network (what TLS encrypts).
    Encapsulate,
    /// From the network (what TLS decrypts).
    Decapsulate,
}

impl Direction {
    /// The word that crosses the seam.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Encapsulate => "encapsulate",
            Self::Decapsulate => "decapsulate",
        }
    }
}

/// A time for people: tenths of a second, and what is shorter as it is.
pub(crate) fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 0.1 { format!("{seconds} s") } else { format!("{seconds:.1} s") }
}

/// An error with what a program needs to act on it and a person to understand it.
#[derive(Clone, Debug)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    field: Option<Cow<'static, str>>,
    phase: Option<Phase>,
    direction: Option<Direction>,
    alert: Option<u8>,
    alert_received: bool,
    errno: Option<i32>,
    reason: Option<&'static str>,
    stream_code: Option<u64>,
}

impl Error {
    /// An error of `kind`; the message is for people and says what to do where that is known.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            field: None,
            phase: None,
            direction: None,
            alert: None,
            alert_received: false,
            errno: None,
            reason: None,
            stream_code: None,
        }))
    }

    /// A wrong option: `field` is its name in the public API.
    pub fn config(field: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        let mut error = Self::new(ErrorKind::Config, message);
        error.0.field = Some(field.into());
        error
    }

    /// From a system call; the kind follows from the errno, `otherwise` where it says nothing.
    pub fn io(otherwise: ErrorKind, what: impl fmt::Display, source: &io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => ErrorKind::PermissionRequired,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => ErrorKind::ResourceLimit,
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => ErrorKind::Unreachable,
            Some(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED | libc::ETIMEDOUT)
                if otherwise != ErrorKind::Connect =>
            {
                ErrorKind::ConnectionLost
            }
            _ => otherwise,
        };
        let mut error = Self::new(kind, format!("{what}: {source}"));
        error.0.errno = source.raw_os_error();
        error
    }

    /// Names the option that is to blame.
    pub fn with_field(mut self, field: &'static str) -> Self {
        self.0.field.get_or_insert(Cow::Borrowed(field));
        self
    }

    /// The same error with another option to blame: what one layer calls one name another calls another.
    pub(crate) fn in_field(mut self, field: &'static str) -> Self {
        self.0.field = Some(Cow::Borrowed(field));
        self
    }

    /// The same error of an option of a table: `chain` of `credentials` is `credentials.chain`.
    pub(crate) fn of_table(mut self, table: impl fmt::Display) -> Self {
        let field = self.0.field.take().map(|field| Cow::Owned(format!("{table}.{field}")));
        self.0.field = field;
        self
    }

    /// Adds to the message what only an outer layer knows.
    pub(crate) fn because(mut self, why: &str) -> Self {
        self.0.message = format!("{}: {why}", self.0.message);
        self
    }

    /// Says in which phase it happened; the innermost word stays.
    pub fn with_phase(mut self, phase: Phase) -> Self {
        self.0.phase.get_or_insert(phase);
        self
    }

    /// Says that it happened in a handshake. The stream below has only seen bytes and calls it a transfer.
    pub(crate) fn in_handshake(mut self) -> Self {
        if matches!(self.0.phase, None | Some(Phase::Transfer)) {
            self.0.phase = Some(Phase::Handshake);
        }
        self
    }

    /// Says which direction broke; the innermost word stays.
    pub fn with_direction(mut self, direction: Direction) -> Self {
        self.0.direction.get_or_insert(direction);
        self
    }

    /// The same seen from the sink: what it reads is on its way to the network.
    pub fn turned(mut self) -> Self {
        self.0.direction = self.0.direction.map(|direction| match direction {
            Direction::Encapsulate => Direction::Decapsulate,
            Direction::Decapsulate => Direction::Encapsulate,
        });
        self
    }

    /// The TLS alert that was sent.
    pub fn with_alert(mut self, alert: u8) -> Self {
        self.0.alert = Some(alert);
        self
    }

    /// The TLS alert that the peer sent.
    pub fn with_alert_received(mut self, alert: u8) -> Self {
        self.0.alert = Some(alert);
        self.0.alert_received = true;
        self
    }

    /// A closed word for the reason within the kind (`"expired"`, `"wrong_name"`, …).
    pub fn with_reason(mut self, reason: &'static str) -> Self {
        self.0.reason = Some(reason);
        self
    }

    /// The system's error number, where no [`io::Error`] carries it.
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.0.errno = Some(errno);
        self
    }

    /// The code that the peer gave when it reset its direction or stopped ours.
    pub fn with_stream_code(mut self, code: u64) -> Self {
        self.0.stream_code = Some(code);
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
    /// The message without the context's words.
    pub fn message(&self) -> &str {
        &self.0.message
    }
    /// The option to blame.
    pub fn field(&self) -> Option<&str> {
        self.0.field.as_deref()
    }
    /// The phase, where there is one.
    pub fn phase(&self) -> Option<Phase> {
        self.0.phase
    }
    /// The direction, where there is one.
    pub fn direction(&self) -> Option<Direction> {
        self.0.direction
    }
    /// The TLS alert's number (RFC 8446, section 6).
    pub fn alert(&self) -> Option<u8> {
        self.0.alert
    }
    /// Whether the alert came from the peer; otherwise it was sent to it.
    pub fn alert_received(&self) -> bool {
        self.0.alert_received
    }
    /// The system's error number.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }
    /// The reason's word.
    pub fn reason(&self) -> Option<&'static str> {
        self.0.reason
    }
    /// The peer's code of a reset or stop, where the transport carries one.
    pub fn stream_code(&self) -> Option<u64> {
        self.0.stream_code
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(field) = &self.0.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {}

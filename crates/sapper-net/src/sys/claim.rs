//! A name that one living process of a machine has at a time.

/// The name is somebody else's again when this is dropped, or its process dies however it does.
#[derive(Debug)]
pub struct Claim {
    #[cfg(target_os = "linux")]
    _socket: std::os::unix::net::UnixDatagram,
}

impl Claim {
    /// `None` where the name is another's, or where there are no such names: Linux has them, in each network
    /// namespace by itself.
    #[cfg(target_os = "linux")]
    pub fn of(name: &str) -> Option<Self> {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::net::{SocketAddr, UnixDatagram};
        // Its address is a name without a file, which ends with the socket.
        let address = SocketAddr::from_abstract_name(name).ok()?;
        let socket = UnixDatagram::bind_addr(&address).ok()?;
        // Nobody has anything to say to it.
        socket.shutdown(std::net::Shutdown::Both).ok()?;
        Some(Self { _socket: socket })
    }

    /// There are no such names here.
    #[cfg(not(target_os = "linux"))]
    pub fn of(_name: &str) -> Option<Self> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_holders_at_a_time() {
        let name = format!("sapper-test-{}", std::process::id());
        let claim = Claim::of(&name).expect("nobody else has it");
        assert!(Claim::of(&name).is_none());
        drop(claim);
        assert!(Claim::of(&name).is_some());
    }
}

//! What a TUN or TAP descriptor is and can do, asked from the system.
//!
//! Linux answers all of it. Elsewhere an adopted descriptor is taken at its owner's word: there is no
//! virtio-net header and no offload, and the MTU is what the caller named.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use sapper_proto::packet::Offloads;

/// What the system says of a TUN or TAP descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::port) struct Attributes {
    /// The interface's name.
    pub(in crate::port) name: String,
    /// Ethernet frames instead of IP packets.
    pub(in crate::port) tap: bool,
    /// Length of the virtio-net header in front of each packet; 0 without one.
    pub(in crate::port) vnet_header: usize,
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod imp {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    use socket2::{Domain, Socket, Type};

    use super::*;
    use crate::fd::{self, FdKind};

    pub(in crate::port) fn attributes(fd: BorrowedFd<'_>) -> Option<Attributes> {
        let Ok(FdKind::Tun(tun)) = fd::classify(fd, "fd") else { return None };
        let mut vnet_header = 0;
        if tun.flags & libc::IFF_VNET_HDR != 0 {
            let mut size: libc::c_int = 0;
            // SAFETY: TUNGETVNETHDRSZ writes one int.
            if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut size) } == 0 {
                vnet_header = usize::try_from(size).unwrap_or_default();
            }
        }
        Some(Attributes { name: tun.name, tap: tun.flags & libc::IFF_TAP != 0, vnet_header })
    }

    pub(in crate::port) fn set_offloads(fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
        let mut bits = 0;
        for (on, flag) in [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ] {
            if on {
                bits |= flag;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its argument as a number.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // Packets carry the header in this machine's order unless told otherwise.
        if cfg!(target_endian = "big") {
            let little: libc::c_int = 1;
            // SAFETY: TUNSETVNETLE reads one int.
            if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETLE, &raw const little) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    pub(in crate::port) fn control_socket() -> Option<OwnedFd> {
        Socket::new(Domain::IPV4, Type::DGRAM, None)
            .or_else(|_| Socket::new(Domain::IPV6, Type::DGRAM, None))
            .map(OwnedFd::from)
            .ok()
    }

    pub(in crate::port) fn mtu(control: &OwnedFd, name: &str) -> io::Result<usize> {
        // SAFETY: all-zero bytes are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        // SAFETY: SIOCGIFMTU reads the name, which ends with a zero, and writes within the `ifreq`.
        if unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCGIFMTU as libc::Ioctl, &raw mut request) } < 0
        {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: SIOCGIFMTU fills this member of the union.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        usize::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    pub(in crate::port) fn in_other_namespace(fd: BorrowedFd<'_>) -> bool {
        use std::os::fd::FromRawFd;
        // SAFETY: TUNGETDEVNETNS takes no argument and returns a new descriptor.
        let namespace = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETDEVNETNS) };
        if namespace < 0 {
            return false;
        }
        // SAFETY: the kernel just made this descriptor for us, so nobody else owns it.
        let theirs = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(namespace) });
        match (theirs.metadata(), std::fs::metadata("/proc/thread-self/ns/net")) {
            (Ok(theirs), Ok(ours)) => (theirs.dev(), theirs.ino()) != (ours.dev(), ours.ino()),
            _ => false,
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod imp {
    use super::*;

    pub(in crate::port) fn attributes(_fd: BorrowedFd<'_>) -> Option<Attributes> {
        None
    }

    pub(in crate::port) fn set_offloads(_fd: BorrowedFd<'_>, _offloads: Offloads) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in crate::port) fn control_socket() -> Option<OwnedFd> {
        None
    }

    pub(in crate::port) fn mtu(_control: &OwnedFd, _name: &str) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in crate::port) fn in_other_namespace(_fd: BorrowedFd<'_>) -> bool {
        false
    }
}

/// What the descriptor is; `None` where it is no TUN or TAP, or the system does not say.
pub(in crate::port) use imp::attributes;

/// Says what the interface may hand over instead of segmenting and summing itself.
pub(in crate::port) use imp::set_offloads;

/// A socket to ask about interfaces with.
pub(in crate::port) use imp::control_socket;

/// The interface's MTU now.
pub(in crate::port) use imp::mtu;

/// Whether the interface lies in another network namespace than this thread: then its name means
/// nothing here, or something else.
pub(in crate::port) use imp::in_other_namespace;

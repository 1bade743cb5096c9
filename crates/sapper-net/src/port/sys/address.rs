//! Addresses for an interface, by one netlink request each.
//!
//! Not by the older ioctls: those know one IPv4 address, fail for an IPv6 address that is there
//! already, and let the kernel look for duplicates of it first, during which nobody can bind to it.

use std::io::{self, Read, Write};
use std::net::IpAddr;

use socket2::{Domain, Protocol, Socket, Type};

/// `NLMSG_HDRLEN`: length, type, flags, sequence, port.
const HEADER: usize = 16;

/// Adds an address, or does nothing where the interface has it.
pub(in crate::port) fn add_address(interface: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
    let name = std::ffi::CString::new(interface).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the name ends with a zero and lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let domain = Domain::from(libc::AF_NETLINK);
    let mut socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    socket.write_all(&request(index, address, prefix))?;
    // The kernel has answered when the send returns.
    let mut answer = [0; 1024];
    let n = socket.read(&mut answer)?;
    match result(&answer[..n]) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn request(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    let (family, octets, flags) = match address {
        IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec(), 0),
        IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec(), libc::IFA_F_NODAD as u8),
    };
    let flags_of_request = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let mut message = vec![0; HEADER];
    message[4..6].copy_from_slice(&libc::RTM_NEWADDR.to_ne_bytes());
    message[6..8].copy_from_slice(&(flags_of_request as u16).to_ne_bytes());
    // ifaddrmsg: family, prefix length, flags, scope, interface.
    message.extend_from_slice(&[family as u8, prefix, flags, 0]);
    message.extend_from_slice(&index.to_ne_bytes());
    for attribute in [libc::IFA_LOCAL, libc::IFA_ADDRESS] {
        let len = (4 + octets.len()) as u16;
        message.extend_from_slice(&len.to_ne_bytes());
        message.extend_from_slice(&attribute.to_ne_bytes());
        message.extend_from_slice(&octets);
    }
    let len = message.len() as u32;
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message
}

/// The error number, negative, of an acknowledgement; 0 is success.
fn result(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    let error = i32::from_ne_bytes(*answer.get(HEADER..)?.first_chunk()?);
    (i32::from(kind) == libc::NLMSG_ERROR).then_some(error)
}

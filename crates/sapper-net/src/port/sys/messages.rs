//! Many datagrams in one system call: `recvmmsg` and `sendmmsg`; one call each where they are missing.
//!
//! The arrays of headers belong to the thread, so that neither a batch nor an idle port costs memory.
//! All calls are non-blocking by `MSG_DONTWAIT`: the descriptor's own flags belong to its owner.

use std::io;
use std::os::fd::BorrowedFd;

use sapper_proto::packet::{HEADROOM, PacketBatch, PacketMeta, Spare};

/// Messages in one call at most. The kernel's cost per message is flat from about 32 on.
const MAX_MESSAGES: usize = 128;

/// What one receiving call brought.
#[derive(Clone, Copy, Default)]
pub(in crate::port) struct Received {
    /// Packets appended to the batch.
    pub(in crate::port) packets: u64,
    /// Their bytes.
    pub(in crate::port) bytes: u64,
    /// Messages larger than a slot: their rest is lost, so they are not in the batch.
    pub(in crate::port) too_large: u64,
    /// Whether the last message was empty (on sequenced packets this may be the peer's end).
    pub(in crate::port) last_is_empty: bool,
    /// Whether there were fewer messages than asked for: the call saw the end of the queue.
    pub(in crate::port) drained: bool,
}

impl Received {
    fn take(&mut self, spare: &mut Spare<'_>, offset: usize, len: usize, truncated: bool) {
        self.last_is_empty = len == 0;
        if truncated {
            self.too_large += 1;
        } else if len > 0 {
            spare.commit(offset, len, HEADROOM, PacketMeta::default());
            self.packets += 1;
            self.bytes += len as u64;
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod imp {
    use std::cell::RefCell;
    use std::os::fd::AsRawFd;
    use std::ptr;

    use super::*;

    struct Arrays {
        headers: Vec<libc::mmsghdr>,
        slices: Vec<libc::iovec>,
    }

    thread_local! {
        static ARRAYS: RefCell<Arrays> = RefCell::new(Arrays::new());
    }

    impl Arrays {
        fn new() -> Self {
            let mut slices = vec![libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MAX_MESSAGES];
            let headers = slices
                .iter_mut()
                .map(|slice| {
                    // SAFETY: a message header of zeros is valid: no name, no slices, no control data.
                    let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                    // `slices` never grows or shrinks, so its elements stay where they are.
                    header.msg_hdr.msg_iov = slice;
                    header.msg_hdr.msg_iovlen = 1;
                    header
                })
                .collect();
            Self { headers, slices }
        }
    }

    pub(in crate::port) fn receive_many(
        fd: BorrowedFd<'_>,
        batch: &mut PacketBatch,
        slot: usize,
    ) -> io::Result<Received> {
        let stride = HEADROOM + slot;
        let mut spare = batch.spare();
        let asked = spare.packets_left().min(MAX_MESSAGES).min(spare.bytes().len() / stride);
        ARRAYS.with_borrow_mut(|arrays| {
            for (slice, room) in arrays.slices.iter_mut().zip(spare.bytes().chunks_exact_mut(stride)) {
                slice.iov_base = room[HEADROOM..].as_mut_ptr().cast();
                slice.iov_len = slot;
            }
            // SAFETY: the first `asked` headers point to slices that were just pointed at parts of the
            // arena, which `spare` borrows until after the call.
            let got = unsafe {
                libc::recvmmsg(
                    fd.as_raw_fd(),
                    arrays.headers.as_mut_ptr(),
                    asked as libc::c_uint,
                    libc::MSG_DONTWAIT,
                    ptr::null_mut(),
                )
            };
            let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
            let mut received = Received { drained: got < asked, ..Received::default() };
            for (index, header) in arrays.headers[..got].iter().enumerate() {
                let truncated = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
                received.take(&mut spare, index * stride + HEADROOM, header.msg_len as usize, truncated);
            }
            Ok(received)
        })
    }

    pub(in crate::port) fn send_many<'a>(
        fd: BorrowedFd<'_>,
        packets: impl Iterator<Item = &'a [u8]>,
    ) -> io::Result<usize> {
        ARRAYS.with_borrow_mut(|arrays| {
            let mut count = 0;
            for (slice, packet) in arrays.slices.iter_mut().zip(packets) {
                slice.iov_base = packet.as_ptr().cast_mut().cast();
                slice.iov_len = packet.len();
                count += 1;
            }
            // SAFETY: the first `count` headers point to slices of `packets`, which are only read and
            // outlive the call.
            let sent = unsafe {
                libc::sendmmsg(
                    fd.as_raw_fd(),
                    arrays.headers.as_mut_ptr(),
                    count,
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            };
            usize::try_from(sent).map_err(|_| io::Error::last_os_error())
        })
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod imp {
    use std::os::fd::AsRawFd;

    use super::*;

    pub(in crate::port) fn receive_many(
        fd: BorrowedFd<'_>,
        batch: &mut PacketBatch,
        slot: usize,
    ) -> io::Result<Received> {
        let stride = HEADROOM + slot;
        let mut spare = batch.spare();
        let asked = spare.packets_left().min(MAX_MESSAGES).min(spare.bytes().len() / stride);
        let mut received = Received::default();
        for index in 0..asked {
            let offset = index * stride + HEADROOM;
            let room = &mut spare.bytes()[offset..offset + slot];
            let mut slice = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: slot };
            // SAFETY: a message header of zeros is valid: no name, no slices, no control data.
            let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
            header.msg_iov = &mut slice;
            header.msg_iovlen = 1;
            // SAFETY: the header points to one slice of the arena, which `spare` borrows.
            let len = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, libc::MSG_DONTWAIT) };
            match usize::try_from(len) {
                Ok(len) => {
                    received.take(&mut spare, offset, len, header.msg_flags & libc::MSG_TRUNC != 0);
                }
                Err(_) if index == 0 => return Err(io::Error::last_os_error()),
                Err(_) => {
                    received.drained = true;
                    break;
                }
            }
        }
        Ok(received)
    }

    pub(in crate::port) fn send_many<'a>(
        fd: BorrowedFd<'_>,
        packets: impl Iterator<Item = &'a [u8]>,
    ) -> io::Result<usize> {
        let mut sent = 0;
        for packet in packets.take(MAX_MESSAGES) {
            // SAFETY: the pointer and the length are those of a slice.
            let len = unsafe {
                libc::send(fd.as_raw_fd(), packet.as_ptr().cast(), packet.len(), libc::MSG_DONTWAIT)
            };
            if len < 0 {
                if sent == 0 {
                    return Err(io::Error::last_os_error());
                }
                break;
            }
            sent += 1;
        }
        Ok(sent)
    }
}

/// Appends to `batch` what is there, each message in a slot of `slot` bytes behind [`HEADROOM`] free
/// ones: as many as the batch has room for, at most [`MAX_MESSAGES`].
pub(in crate::port) use imp::receive_many;

/// Sends packets until the kernel takes no more, at most [`MAX_MESSAGES`]; returns how many. An error
/// belongs to the first one.
pub(in crate::port) use imp::send_many;

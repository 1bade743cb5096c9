//! The task that reads a UDP socket and gives each datagram to its user.

use std::cell::RefCell;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use quinn_udp::{RecvMeta, UdpSockRef};
use sapper_proto::packet::{Ecn, Gso, PacketMeta};
use tokio::io::unix::AsyncFd;

use super::super::take_batch;
use super::{QUEUE_BATCHES, Queue, Shared, User, Users, canonical, lock};
use crate::error::{Error, ErrorKind, Phase};
use crate::stats::DropReason;

/// Messages of one call. Each may be a train of 64 KB.
const MESSAGES: usize = 16;

/// The longest train: what a UDP length can say.
const LONGEST: usize = 65_535;

thread_local! {
    /// Where messages arrive. It belongs to the thread, so that an idle socket holds none; memory of
    /// the system is behind it only as far as messages ever reached.
    static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What comes with a train beside its bytes.
#[derive(Clone, Copy)]
struct Train {
    peer: SocketAddr,
    local: Option<IpAddr>,
    ecn: Ecn,
    /// Bytes of each datagram but the last.
    stride: usize,
}

/// Reads until it is aborted, or the socket fails.
pub(super) async fn read(shared: Arc<Shared>, io: AsyncFd<OwnedFd>) {
    loop {
        let failed = match io.readable().await {
            Err(source) => Some(source),
            Ok(mut guard) => match read_once(&shared) {
                Err(source) if source.kind() == io::ErrorKind::WouldBlock => {
                    guard.clear_ready();
                    continue;
                }
                Err(source) if is_final(&source) => Some(source),
                // Also news of an earlier datagram, or a signal.
                _ => None,
            },
        };
        if let Some(source) = failed {
            let error =
                Error::io(ErrorKind::Device, "receive datagrams", &source).with_phase(Phase::Transfer);
            return lock(&shared.users).fail(&error);
        }
        // The users on this thread must have their turn before their queues are filled again.
        tokio::task::yield_now().await;
    }
}

fn is_final(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK | libc::EINVAL | libc::EFAULT))
}

fn read_once(shared: &Shared) -> io::Result<()> {
    ROOM.with_borrow_mut(|room| {
        if room.is_empty() {
            *room = vec![0; MESSAGES * LONGEST];
        }
        let mut metas = [RecvMeta::default(); MESSAGES];
        let mut chunks = room.chunks_exact_mut(LONGEST);
        let mut slices: [IoSliceMut<'_>; MESSAGES] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        shared.stats.receive_calls.add(1);
        let got = shared.state.recv(UdpSockRef::from(&shared.socket), &mut slices, &mut metas)?;
        let users = lock(&shared.users);
        for (slice, meta) in slices.iter().zip(&metas).take(got) {
            let data = slice.get(..meta.len).unwrap_or_default();
            let train = Train {
                peer: canonical(meta.addr),
                local: meta.dst_ip,
                ecn: meta.ecn.map_or(Ecn::NotEct, |ecn| Ecn::from_bits(ecn as u8)),
                stride: meta.stride.max(1),
            };
            shared.stats.packets_received.add(data.len().div_ceil(train.stride).max(1) as u64);
            shared.stats.bytes_received.add(data.len() as u64);
            let unwanted = users.distribute(data, train);
            shared.stats.receive_drops.add(DropReason::NoRoute, unwanted);
        }
        Ok(())
    })
}

impl Users {
    /// Gives a train to its user, or its parts to theirs; returns how many datagrams nobody wanted.
    fn distribute(&self, data: &[u8], train: Train) -> u64 {
        if self.classifiers.is_empty() {
            return self.by_peer(train).map_or(datagrams(data, train), |user| user.take(data, train));
        }
        let mut unwanted = 0;
        // Each run of datagrams that have the same user stays together.
        let mut from = 0;
        let mut owner: Option<&Arc<User>> = None;
        for (index, datagram) in data.chunks(train.stride).enumerate() {
            let class = self.classifiers.iter().find(|(recognises, _)| recognises(datagram));
            let user = class.map(|(_, user)| user).or_else(|| self.by_peer(train));
            let at = index * train.stride;
            if at > 0 && owner.map(Arc::as_ptr) != user.map(Arc::as_ptr) {
                unwanted += give(owner, &data[from..at], train);
                from = at;
            }
            owner = user;
        }
        unwanted + give(owner, &data[from..], train)
    }

    fn by_peer(&self, train: Train) -> Option<&Arc<User>> {
        self.peers.get(&train.peer).or(self.rest.as_ref())
    }

    /// Tells every user that nothing more will come.
    fn fail(&mut self, error: &Error) {
        self.failed = Some(error.clone());
        let classes = self.classifiers.iter().map(|(_, user)| user);
        for user in classes.chain(self.peers.values()).chain(&self.rest) {
            let mut queue = lock(&user.queue);
            queue.failed = Some(error.clone());
            let waker = queue.waker.take();
            drop(queue);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

fn datagrams(data: &[u8], train: Train) -> u64 {
    data.len().div_ceil(train.stride) as u64
}

fn give(user: Option<&Arc<User>>, data: &[u8], train: Train) -> u64 {
    match user {
        Some(user) => user.take(data, train),
        None => datagrams(data, train),
    }
}

impl User {
    /// Puts a train into the queue, or drops it where that is full. Nothing of it is unwanted.
    fn take(&self, data: &[u8], train: Train) -> u64 {
        if data.is_empty() {
            return 0;
        }
        let mut queue = lock(&self.queue);
        let waker = if queue.push(data, train) {
            queue.waker.take()
        } else {
            self.stats.receive_drops.add(DropReason::QueueFull, datagrams(data, train));
            None
        };
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
        0
    }
}

impl Queue {
    fn push(&mut self, data: &[u8], train: Train) -> bool {
        self.local = train.local;
        let mut meta = PacketMeta { ecn: train.ecn, peer: Some(train.peer), ..PacketMeta::default() };
        if data.len() > train.stride {
            meta.gso = Gso::Datagrams;
            meta.gso_size = train.stride as u16;
        }
        if self.batches.back_mut().is_some_and(|batch| batch.push(data, meta)) {
            return true;
        }
        if self.batches.len() == QUEUE_BATCHES {
            return false;
        }
        let mut batch = take_batch();
        let fits = batch.push(data, meta);
        self.batches.push_back(batch);
        fits
    }
}

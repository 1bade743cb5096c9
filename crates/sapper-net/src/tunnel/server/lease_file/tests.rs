//! A disk that takes its time.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use sapper_proto::tunnel::lease::{Lessee, TokenHash, Wanted};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::super::registry::{self, Client, Registry};
use super::super::testing::options;
use super::*;

const OWNER: TokenHash = [1; 32];
const ALL: Lessee = Lessee { token: OWNER, client: OWNER, credentials: OWNER };

/// Says that a write has come to the disk, which waits for a word then; it is there for good when nobody is left to
/// give it.
pub(in super::super) struct Disk {
    began: UnboundedSender<()>,
    goes_on: Receiver<()>,
}

impl LeaseFile {
    pub(super) fn wait_for_disk(&self) {
        if let Some(disk) = &*self.disk.lock().unwrap() {
            let _ = disk.began.send(());
            let _ = disk.goes_on.recv();
        }
    }
}

struct Slow {
    _folder: tempfile::TempDir,
    path: PathBuf,
    registry: Arc<Mutex<Registry>>,
    began: UnboundedReceiver<()>,
    goes_on: Sender<()>,
}

impl Slow {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("leases");
        let registry = Arc::new(Mutex::new(Registry::new(&options(9)).unwrap()));
        registry::keep_in(&registry, path.clone()).await.unwrap();
        let (says, began) = unbounded_channel();
        let (goes_on, waits) = channel();
        let file = registry.lock().unwrap().file.clone().unwrap();
        *file.disk.lock().unwrap() = Some(Disk { began: says, goes_on: waits });
        Self { _folder: folder, path, registry, began, goes_on }
    }

    /// One more client, for which nobody waits.
    fn comes(&self) {
        let mut registry = self.registry.try_lock().expect("nobody holds it while the disk is slow");
        registry.take(ALL, None, Wanted::Any, &Client::default()).unwrap();
    }

    fn saves(&self) -> tokio::task::JoinHandle<Result<()>> {
        let registry = Arc::clone(&self.registry);
        tokio::spawn(async move { registry::save(&registry).await })
    }

    fn written(&self) -> usize {
        std::fs::read_to_string(&self.path).unwrap().matches("\"port\"").count()
    }
}

#[tokio::test]
async fn a_slow_disk_holds_nobody_up_and_what_changes_meanwhile_is_one_write() {
    let mut slow = Slow::new().await;
    slow.comes();
    let first = slow.saves();
    slow.began.recv().await.unwrap();
    let mut later = Vec::new();
    for _ in 0..3 {
        slow.comes();
        later.push(slow.saves());
        tokio::task::yield_now().await;
    }
    assert_eq!((slow.written(), later.iter().any(|one| one.is_finished())), (0, false));
    slow.goes_on.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(slow.written(), 1);
    slow.began.recv().await.unwrap();
    slow.goes_on.send(()).unwrap();
    for one in later {
        one.await.unwrap().unwrap();
    }
    assert_eq!(slow.written(), 4);
    assert!(slow.began.try_recv().is_err(), "there was nothing more to write");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_waits_for_its_disk_but_not_for_ever() {
    let mut slow = Slow::new().await;
    slow.comes();
    let first = slow.saves();
    slow.began.recv().await.unwrap();
    slow.comes();
    let error = registry::close(&slow.registry, Duration::ZERO).await.unwrap_err();
    assert_eq!(error.field(), Some("lease_file"));
    assert!(error.message().contains("write the leases"), "{error}");
    // It has the file until it has written what it had: another server would write over it.
    let Err(taken) = LeaseFile::open(slow.path.clone()).await else { panic!("it is free") };
    assert_eq!(taken.reason(), Some("in_use"));
    drop(slow.goes_on);
    first.await.unwrap().unwrap();
    slow.began.recv().await.unwrap();
    tokio::time::resume();
    while LeaseFile::open(slow.path.clone()).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(std::fs::read_to_string(&slow.path).unwrap().matches("\"port\"").count(), 2);
}

#[tokio::test]
async fn who_stopped_waiting_for_a_write_leaves_it_to_the_next() {
    let mut slow = Slow::new().await;
    slow.comes();
    let first = slow.saves();
    slow.began.recv().await.unwrap();
    first.abort();
    slow.comes();
    let second = slow.saves();
    tokio::task::yield_now().await;
    assert_eq!((slow.written(), second.is_finished()), (0, false), "one write at a time");
    for _ in 0..2 {
        slow.goes_on.send(()).unwrap();
    }
    second.await.unwrap().unwrap();
    assert_eq!(slow.written(), 2);
    registry::close(&slow.registry, Duration::ZERO).await.unwrap();
    LeaseFile::open(slow.path.clone()).await.unwrap();
}

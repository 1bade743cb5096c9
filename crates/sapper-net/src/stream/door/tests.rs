//! The door against the half behind it, and against another door.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::stream::ops::{read, send_eof, write_all};

#[derive(Clone, Default)]
struct News(Arc<AtomicUsize>);

impl News {
    fn notify(&self) -> impl Fn() + Send + Sync + 'static {
        let count = Arc::clone(&self.0);
        move || {
            count.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

#[tokio::test]
async fn bytes_in_memory_cost_no_wake_up_and_absent_ones_cost_one() {
    let news = News::default();
    let (door, mut far) = Door::new(1000, news.notify());
    write_all(&mut far, b"at once").await.unwrap();
    let mut buf = [0; 100];
    assert_eq!(door.available(), 7);
    assert_eq!(door.read(&mut buf).unwrap(), Read::Bytes(7));
    assert_eq!(news.take(), 0);
    assert_eq!(door.read(&mut buf).unwrap(), Read::Nothing);
    assert_eq!(door.read(&mut buf).unwrap(), Read::Nothing);
    for _ in 0..3 {
        write_all(&mut far, b"later").await.unwrap();
    }
    assert_eq!(news.take(), 1, "one word for a batch");
    assert_eq!(door.read(&mut buf).unwrap(), Read::Bytes(15));
}

#[tokio::test]
async fn a_full_door_says_so_and_when_there_is_room() {
    let news = News::default();
    let (door, mut far) = Door::new(10, news.notify());
    assert_eq!(door.write(b"eleven byte").unwrap(), 10);
    assert_eq!(door.write(b"x").unwrap(), 0);
    read(&mut far, &mut [0; 4]).await.unwrap();
    assert_eq!(news.take(), 0, "not for a little room");
    read(&mut far, &mut [0; 1]).await.unwrap();
    assert_eq!(news.take(), 1);
    assert_eq!(door.write(b"123456").unwrap(), 5);
}

#[tokio::test]
async fn both_directions_end_by_themselves() {
    let (door, mut far) = Door::new(100, || {});
    door.write(b"q").unwrap();
    door.write_eof().unwrap();
    door.write_eof().unwrap();
    let mut buf = [0; 10];
    assert_eq!(read(&mut far, &mut buf).await.unwrap(), 1);
    assert_eq!(read(&mut far, &mut buf).await.unwrap(), 0);
    assert_eq!(door.write(b"more").unwrap_err().kind(), ErrorKind::Closed);
    write_all(&mut far, b"answer").await.unwrap();
    send_eof(&mut far).await.unwrap();
    assert_eq!(door.read(&mut buf).unwrap(), Read::Bytes(6));
    assert_eq!(door.read(&mut buf).unwrap(), Read::End);
    assert_eq!(door.read(&mut buf).unwrap(), Read::End);
}

#[tokio::test]
async fn what_failed_is_told_behind_the_bytes_that_wait() {
    let news = News::default();
    let (door, mut far) = Door::new(100, news.notify());
    let mut buf = [0; 10];
    assert_eq!(door.read(&mut buf).unwrap(), Read::Nothing);
    write_all(&mut far, b"before").await.unwrap();
    far.fail(&Error::new(ErrorKind::ConnectionLost, "cut off"));
    drop(far);
    assert_eq!(news.take(), 1);
    assert_eq!(door.read(&mut buf).unwrap(), Read::Bytes(6));
    for _ in 0..2 {
        assert_eq!(door.read(&mut buf).unwrap_err().message(), "cut off");
    }
    assert_eq!(door.write(b"x").unwrap_err().message(), "cut off");
}

#[tokio::test]
async fn an_abandoned_direction_takes_everything_and_says_so() {
    let (door, mut far) = Door::new(4, || {});
    assert!(far.is_wanted());
    door.abandon_reading();
    assert!(!far.is_wanted());
    write_all(&mut far, &[1; 1000]).await.unwrap();
    assert_eq!(door.read(&mut [0; 4]).unwrap(), Read::End);
    door.write(b"on").unwrap();
    assert_eq!(read(&mut far, &mut [0; 4]).await.unwrap(), 2, "the other direction goes on");
}

#[tokio::test]
async fn a_reset_is_an_error_and_no_end() {
    let (door, mut far) = Door::new(100, || {});
    door.write(b"lost").unwrap();
    door.reset();
    let error = read(&mut far, &mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
    write_all(&mut far, b"nobody").await.unwrap();
}

#[tokio::test]
async fn who_stops_reading_is_missed() {
    let (door, mut far) = Door::new(100, || {});
    door.stop_reading();
    let error = write_all(&mut far, b"nobody").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
}

#[tokio::test]
async fn a_door_is_taken_once_and_a_dropped_one_is_an_end() {
    let (one, other) = Door::pair(100, || {}, || {});
    one.write(b"hello").unwrap();
    let mut half = other.take().unwrap();
    assert_eq!(read(half.as_mut(), &mut [0; 10]).await.unwrap(), 5);
    assert_eq!(other.take().err().expect("taken").reason(), Some("taken"));
    assert_eq!(other.read(&mut [0; 1]).unwrap_err().reason(), Some("taken"));
    drop(one);
    assert_eq!(read(half.as_mut(), &mut [0; 10]).await.unwrap(), 0);
}

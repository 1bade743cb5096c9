use super::*;

fn quota(limits: &Limits) -> Quota {
    Quota { meters: Meter::new(Scope::Client, limits).into_iter().collect(), ..Quota::default() }
}

#[tokio::test(start_paused = true)]
async fn a_rate_lets_a_burst_pass_and_then_as_much_as_it_says() {
    let limits = Limits { bytes_per_second: Some(64_000), ..Limits::default() };
    let quota = quota(&limits);
    let mut throttle = quota.admit(None, None).unwrap().unwrap();
    let (start, mut passed) = (Instant::now(), 0);
    while passed < 80_000 {
        match throttle.ask(FROM, 10_000, Instant::now()) {
            May::Pass(n) => {
                assert!(n <= 1_000, "a 64th of a second at once");
                throttle.used(FROM, n);
                passed += n;
            }
            May::At(at) => {
                assert_eq!(throttle.ask(FROM, 1, Instant::now()), May::Waits);
                tokio::time::sleep_until(at).await;
                throttle.is_due(FROM);
            }
            other => panic!("{other:?}"),
        }
    }
    // A quarter of a second's worth went at once.
    let took = start.elapsed().as_secs_f64();
    assert!((0.99..1.1).contains(&took), "{took}");
    assert!(matches!(throttle.ask(TO, 1, Instant::now()), May::Pass(1)), "the other direction is free");
}

#[tokio::test(start_paused = true)]
async fn streams_take_turns_and_give_back_what_they_do_not_use() {
    let limits = Limits { bytes_per_second: Some(64_000), ..Limits::default() };
    let quota = quota(&limits);
    let mut streams = [quota.admit(None, None).unwrap().unwrap(), quota.admit(None, None).unwrap().unwrap()];
    let idle = quota.admit(None, None).unwrap().unwrap();
    for _ in 0..1_000 {
        let May::Pass(n) = streams[0].ask(FROM, u32::MAX, Instant::now()) else { panic!() };
        assert_eq!(n, 1_000);
        streams[0].used(FROM, 1);
        streams[0].unused(FROM);
    }
    let mut passed = [0, 0];
    let mut waits = std::collections::BTreeSet::from([(Instant::now(), 0), (Instant::now(), 1)]);
    while let Some((at, who)) = waits.pop_first() {
        tokio::time::sleep_until(at).await;
        streams[who].is_due(FROM);
        loop {
            match streams[who].ask(FROM, u32::MAX, Instant::now()) {
                May::Pass(n) => {
                    streams[who].used(FROM, n);
                    passed[who] += n;
                }
                May::At(at) if passed[0] + passed[1] < 200_000 => {
                    waits.insert((at, who));
                    break;
                }
                _ => break,
            }
        }
    }
    let least = passed[0].min(passed[1]);
    assert!(least > 80_000, "{passed:?}");
    drop(idle);
}

#[tokio::test(start_paused = true)]
async fn bytes_and_visits_in_all_end() {
    let limits =
        Limits { total_bytes: Some(10), total_visits: Some(3), visitors: Some(1), ..Limits::default() };
    let quota = quota(&limits);
    let mut throttle = quota.admit(None, None).unwrap().unwrap();
    let error = quota.admit(None, None).unwrap_err();
    assert_eq!(
        (error.reason(), error.message()),
        (Some("client_limit"), "the client has no place for another visitor")
    );
    assert_eq!(throttle.ask(FROM, 6, Instant::now()), May::Pass(6));
    throttle.used(FROM, 6);
    assert_eq!(throttle.ask(TO, 6, Instant::now()), May::Pass(4));
    drop(throttle);
    let mut throttle = quota.admit(None, None).unwrap().unwrap();
    assert_eq!(throttle.ask(TO, 6, Instant::now()), May::Pass(4));
    throttle.used(TO, 4);
    assert_eq!(throttle.ask(FROM, 1, Instant::now()), May::Never(Scope::Client));
    drop(throttle);
    assert_eq!(quota.admit(None, None).unwrap_err().message(), "the client has no bytes left");
}

#[tokio::test(start_paused = true)]
async fn visits_have_a_rate_and_who_is_sent_away_costs_nothing() {
    let visits = Some(Rate { per_second: 0.5, burst: 2 });
    let quota = quota(&Limits { visits, total_visits: Some(3), ..Limits::default() });
    let come = || quota.admit(None, None).map(|_| ()).map_err(|error| error.message().to_owned());
    assert_eq!([come(), come()], [Ok(()), Ok(())]);
    assert_eq!(come().unwrap_err(), "the client has no visit left at this moment");
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(come(), Ok(()));
    tokio::time::advance(Duration::from_secs(9)).await;
    assert_eq!(come().unwrap_err(), "the client has no visit left");
}

#[tokio::test(start_paused = true)]
async fn who_is_sent_away_by_one_costs_the_others_nothing() {
    let closed = quota(&Limits { visitors: Some(0), ..Limits::default() });
    let service = Meter::new(Scope::Service, &Limits { total_visits: Some(1), ..Limits::default() });
    for _ in 0..3 {
        let error = closed.admit(service.as_ref(), None).unwrap_err();
        assert_eq!(error.reason(), Some("client_limit"));
    }
    let open = Quota::default();
    assert!(open.admit(service.as_ref(), None).is_ok());
    assert_eq!(open.admit(service.as_ref(), None).unwrap_err().reason(), Some("service_limit"));
}

#[tokio::test(start_paused = true)]
async fn who_has_the_same_credentials_has_one_account() {
    let limits = Limits { total_visits: Some(2), ..Limits::default() };
    let mut clients = Clients { most: 2, ..Clients::new(&limits) };
    let mut quota = |owner: u8| {
        let meters = clients.of([owner; 32], Instant::now()).into_iter().collect();
        Quota { meters, ..Quota::default() }
    };
    let (one, other) = (quota(1), quota(1));
    assert!(one.admit(None, None).is_ok() && other.admit(None, None).is_ok());
    assert_eq!(one.admit(None, None).unwrap_err().message(), "the client has no visit left");
    drop((one, other));
    assert!(quota(1).admit(None, None).is_err(), "what is used up stays so");
    // The table is full of those that are as new, and of one that is not: the latter is remembered.
    for owner in 2..9 {
        quota(owner);
    }
    assert!(quota(1).admit(None, None).is_err());
    let there = quota(2);
    assert!(there.admit(None, None).is_ok() && there.admit(None, None).is_ok());
    quota(3);
    assert!(quota(2).admit(None, None).is_err(), "who is there is never forgotten");
    assert!(quota(1).admit(None, None).is_ok(), "who is not has made room");
    clients.reload(&limits.clone());
    assert_eq!(clients.meters.len(), 2);
    clients.reload(&Limits::default());
    assert!(clients.of([2; 32], Instant::now()).is_none(), "nothing is limited");
}

#[tokio::test(start_paused = true)]
async fn an_address_has_one_account_and_the_table_does_not_grow() {
    let limits = Limits { visitors: Some(1), total_bytes: Some(5), ..Limits::default() };
    let quota = Quota { visitors: Visitors::new(&limits), ..Quota::default() };
    let come = |text: &str| quota.admit(None, Some(text.parse().unwrap()));
    let mut first = come("192.0.2.1").unwrap().unwrap();
    assert_eq!(come("::ffff:192.0.2.1").unwrap_err().reason(), Some("visitor_limit"));
    let second = come("192.0.2.2").unwrap().unwrap();
    first.ask(FROM, 5, Instant::now());
    first.used(FROM, 5);
    assert_eq!(first.ask(FROM, 5, Instant::now()), May::Never(Scope::Visitor));
    drop((first, second));
    let mut again = come("192.0.2.1").unwrap().unwrap();
    assert_eq!(again.ask(FROM, 9, Instant::now()), May::Pass(5), "bytes in all are of one visit");
    for n in 0..50_000_u32 {
        quota.admit(None, Some(IpAddr::from(n.to_be_bytes()))).unwrap();
    }
    let visitors = quota.visitors.as_ref().unwrap();
    assert!(visitors.meters.lock().unwrap().len() <= MOST_ADDRESSES);
    assert!(come("192.0.2.1").is_err(), "who is there is remembered");
}

#[tokio::test(start_paused = true)]
async fn who_is_there_goes_by_other_limits_from_then_on() {
    let address = || Some("192.0.2.1".parse().unwrap());
    let free = Quota::default();
    assert!(free.readmit(None, None, address(), true).is_none(), "nothing is limited");
    let rate = quota(&Limits { bytes_per_second: Some(64_000), visitors: Some(1), ..Limits::default() });
    let mut throttle = rate.readmit(None, None, address(), true).unwrap();
    assert_eq!(throttle.ask(FROM, u32::MAX, Instant::now()), May::Pass(1_000), "a stream that had none");
    assert_eq!(rate.admit(None, None).unwrap_err().reason(), Some("client_limit"), "it has its place");
    throttle.used(FROM, 1);

    let visits = Limits { total_bytes: Some(9), ..Limits::default() };
    let both = Quota { visitors: Visitors::new(&visits), ..rate.clone() };
    let mut throttle = both.readmit(Some(throttle), None, address(), false).unwrap();
    assert_eq!(throttle.ask(FROM, 5, Instant::now()), May::Pass(5));
    throttle.used(FROM, 5);
    let slow = quota(&Limits { bytes_per_second: Some(1), ..Limits::default() });
    let slow = Quota { visitors: both.visitors.clone(), ..slow };
    let mut throttle = slow.readmit(Some(throttle), None, address(), true).unwrap();
    assert!(rate.admit(None, None).is_ok(), "it has left the account before");
    assert_eq!(throttle.ask(FROM, 9, Instant::now()), May::Pass(4), "its visit goes on, and has a burst");
    throttle.used(FROM, 4);
    assert_eq!(throttle.ask(FROM, 1, Instant::now()), May::Never(Scope::Visitor));

    let fresh = Quota { visitors: Visitors::new(&visits), ..slow.clone() };
    let mut throttle = fresh.readmit(Some(throttle), None, address(), false).unwrap();
    let May::Pass(9) = throttle.ask(TO, 9, Instant::now()) else { panic!("other limits begin anew") };
    throttle.used(TO, 9);
    assert!(free.readmit(Some(throttle), None, address(), false).is_none(), "nothing is limited any more");
    assert_eq!(rate.meters[0].state().visitors, 0);
}

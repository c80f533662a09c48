//! Durable values: one suite for all engines, and what an engine over the
//! network does when it is away.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use mb_server::{
    budget::Budget,
    config::{OneOrMore, store},
    store::{MAX_BATCH_BYTES, MAX_VALUE, Namespace, Store, StoreError, digest},
};

use serde_json::json;

use crate::{
    BINARY,
    support::{
        PATIENCE, Setup, TestServer,
        pki::Pki,
        redis::{self, Redis, free_port},
    },
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn remote(urls: &[String]) -> Arc<Store> {
    remote_within(urls, None)
}

fn remote_within(urls: &[String], memory: Option<Arc<Budget>>) -> Arc<Store> {
    let settings = store::Store {
        url: OneOrMore::More(urls.to_vec()),
        ..store::Store::default()
    };
    Store::remote(settings.remote().unwrap().unwrap(), memory).unwrap()
}

/// What an entry counts beside its names, its key and its value.
const OVERHEAD: u64 = 32;

type Case = (&'static str, fn(&Arc<Store>));

/// What every engine does alike. Each case has services of its own.
const SUITE: &[Case] = &[
    ("places", each_value_has_its_place),
    ("numbers", numbers_are_decimal_text),
    ("swaps", swaps_are_held_against_what_was_seen),
    ("bounds", bounds),
    ("quota", the_quota_is_exact),
    ("batches", batches_are_done_whole_or_not_at_all),
    ("pages", pages_cover_everything_once_in_order),
    ("prefixes", keys_are_listed_by_their_beginning),
    ("ends", values_end),
    ("backup", a_backup_is_taken_and_restored),
    ("threads", many_threads_write_and_nothing_is_lost),
];

fn holds_the_suite(engine: &str, store: &Arc<Store>) {
    for (name, case) in SUITE {
        println!("{engine}: {name}");
        case(store);
    }
    assert_eq!(store.health().problem(), None);
}

#[test]
fn a_file_holds_the_suite() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store.redb"), 1 << 20).unwrap();
    holds_the_suite("redb", &store);
}

#[test]
fn redis_holds_the_suite() {
    let Some(redis) = Redis::start(&[]) else {
        return;
    };
    holds_the_suite("redis", &remote(&[redis.url() + "/3"]));
}

#[test]
fn a_cluster_holds_the_suite() {
    let Some(nodes) = redis::cluster() else {
        return;
    };
    let urls: Vec<_> = nodes.iter().map(Redis::url).collect();
    holds_the_suite("cluster", &remote(&urls));
    let used: Vec<_> = nodes.iter().map(|node| node.ask(&["DBSIZE"])).collect();
    assert!(
        !used.contains(&":0".into()),
        "the services are spread: {used:?}"
    );
    // One of them leads to the others.
    let store = remote(&urls[..1]);
    for service in ["a", "b", "c", "d", "e"] {
        let ns = store.namespace(service, 1000);
        assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(1), "{service}");
    }
}

fn each_value_has_its_place(store: &Arc<Store>) {
    let (one, other) = (store.namespace("one", 1000), store.namespace("other", 1000));
    let value: Vec<u8> = (0..=255).collect();
    one.set("b", "k".into(), value.clone(), soon()).unwrap();
    other.set("b", "k".into(), b"2".to_vec(), soon()).unwrap();
    one.set("", "k".into(), vec![], soon()).unwrap();
    one.set("b.", "k".into(), b"4".to_vec(), soon()).unwrap();
    assert_eq!(one.get("b", "k", soon()), Ok(Some(value.clone())));
    assert_eq!(one.digest("b", "k", soon()), Ok(Some(digest(&value))));
    assert_eq!(other.get("b", "k", soon()), Ok(Some(b"2".to_vec())));
    assert_eq!(one.get("", "k", soon()), Ok(Some(vec![])));
    assert_eq!(one.get("", "x", soon()), Ok(None));
    assert_eq!(one.digest("", "x", soon()), Ok(None));
    assert_eq!(one.list("b", "", None, soon()).unwrap().keys, ["k"]);
    one.delete("b", "k".into(), soon()).unwrap();
    one.delete("b", "k".into(), soon()).unwrap();
    assert_eq!(one.get("b", "k", soon()), Ok(None));
    let exists = |ns: &Namespace, bucket| ns.exists(bucket, "k", soon());
    assert_eq!(
        (exists(&one, "b"), exists(&one, ""), exists(&other, "b")),
        (Ok(false), Ok(true), Ok(true))
    );
}

fn numbers_are_decimal_text(store: &Arc<Store>) {
    let ns = store.namespace("numbers", 100_000);
    let add = |key: &str, delta| ns.increment("", key.into(), delta, soon());
    assert_eq!(add("n", 5), Ok(5));
    assert_eq!(add("n", -7), Ok(-2));
    assert_eq!(ns.get("", "n", soon()), Ok(Some(b"-2".to_vec())));
    assert_eq!(add("zero", 0), Ok(0));
    assert_eq!(ns.exists("", "zero", soon()), Ok(true));
    let (most, least) = (i64::MAX.to_string(), i64::MIN.to_string());
    let zeros = "0".repeat(10_000);
    let cases: [(&str, i64, Option<i64>); 21] = [
        (&most, 0, Some(i64::MAX)),
        (&most, -1, Some(i64::MAX - 1)),
        (&most, 1, None),
        (&least, 1, Some(i64::MIN + 1)),
        (&least, -1, None),
        // Beyond what a double holds.
        ("9007199254740993", 2, Some(9_007_199_254_740_995)),
        ("9007199254740992", 1, Some(9_007_199_254_740_993)),
        ("-9007199254740992", -1, Some(-9_007_199_254_740_993)),
        ("+07", 1, Some(8)),
        ("-007", 1, Some(-6)),
        ("-0", 3, Some(3)),
        (&zeros, 1, Some(1)),
        ("9223372036854775808", 0, None),
        ("-9223372036854775809", 0, None),
        ("", 1, None),
        ("+", 1, None),
        ("-", 1, None),
        (" 5", 1, None),
        ("5\n", 1, None),
        ("1e3", 1, None),
        ("text", 1, None),
    ];
    for (text, delta, sum) in cases {
        ns.set("", "t".into(), text.into(), soon()).unwrap();
        assert_eq!(
            add("t", delta),
            sum.ok_or(StoreError::NotANumber),
            "{text:?}"
        );
        let now = sum.map_or(text.into(), |sum| sum.to_string());
        assert_eq!(ns.get("", "t", soon()), Ok(Some(now.into())), "{text:?}");
    }
    assert_eq!(add("most", i64::MAX), Ok(i64::MAX));
    assert_eq!(add("most", 1), Err(StoreError::NotANumber));
}

fn swaps_are_held_against_what_was_seen(store: &Arc<Store>) {
    let ns = store.namespace("swaps", 100_000);
    let swap = |expected: Option<&[u8]>, value: &[u8]| {
        ns.swap("", "k".into(), expected.map(digest), value.to_vec(), soon())
    };
    assert_eq!(swap(Some(b""), b"no"), Ok(false));
    assert_eq!(swap(None, b""), Ok(true));
    assert_eq!(swap(None, b"no"), Ok(false));
    assert_eq!(swap(Some(b""), b"\r\n\0"), Ok(true));
    assert_eq!(swap(Some(b""), b"no"), Ok(false));
    assert_eq!(swap(Some(b"\r\n\0"), b"last"), Ok(true));
    assert_eq!(ns.get("", "k", soon()), Ok(Some(b"last".to_vec())));
}

fn bounds(store: &Arc<Store>) {
    let ns = store.namespace("bounds", 1 << 30);
    let key = |size: usize| "k".repeat(size);
    assert_eq!(ns.get("", "", soon()), Err(StoreError::Key { size: 0 }));
    assert_eq!(
        ns.set("", key(1025), vec![], soon()),
        Err(StoreError::Key { size: 1025 })
    );
    assert_eq!(ns.set("", key(1024), vec![], soon()), Ok(()));
    assert_eq!(ns.get("a b", "k", soon()), Err(StoreError::Bucket));
    assert_eq!(ns.get_many("a b", &[], soon()), Err(StoreError::Bucket));
    let long = key(1025);
    for (prefix, from) in [(&*long, None), ("", Some(&*long))] {
        let page = ns.list("", prefix, from, soon());
        assert_eq!(page, Err(StoreError::Key { size: 1025 }));
    }
    let value = MAX_VALUE + 1;
    assert_eq!(
        ns.set("", key(1), vec![0; value], soon()),
        Err(StoreError::Value { size: value })
    );
    let many = ns.delete_many("", vec![key(1); 1001], soon());
    assert!(matches!(many, Err(StoreError::Batch { .. })));
    let late = ns.set("", key(1), vec![], Instant::now());
    assert!(
        matches!(late, Err(StoreError::Busy | StoreError::Away(_))),
        "{late:?}"
    );
    assert_eq!(ns.exists("", &key(1), soon()), Ok(false));
}

fn the_quota_is_exact(store: &Arc<Store>) {
    // What an entry with a key of one byte counts beside its value.
    let each = 5 + 1 + OVERHEAD;
    let limit = 2 * each + 1 + 98;
    let ns = store.namespace("quota", limit);
    ns.set("", "a".into(), vec![0; 59], soon()).unwrap();
    ns.set("b", "c".into(), vec![0; 39], soon()).unwrap();
    let over = |more: u64| {
        Err(StoreError::Quota {
            wanted: limit + more,
            limit,
        })
    };
    assert_eq!(ns.set("", "d".into(), vec![], soon()), over(each));
    assert_eq!(ns.set("", "a".into(), vec![0; 60], soon()), over(1));
    assert_eq!(
        ns.increment("", "n".into(), 10, soon()),
        over(each + 2).map(|()| 0)
    );
    assert_eq!(ns.exists("", "n", soon()), Ok(false));
    let swapped = ns.swap("", "a".into(), Some(digest(&[0; 59])), vec![0; 60], soon());
    assert_eq!(swapped, over(1).map(|()| true));
    assert_eq!(ns.get("", "a", soon()), Ok(Some(vec![0; 59])));
    let both = vec![("a".into(), vec![0; 1]), ("d".into(), vec![0; 20])];
    assert_eq!(ns.set_many("", both, soon()), Ok(()), "counted together");
    assert_eq!(ns.set("", "e".into(), vec![], soon()), over(each));
    ns.delete("b", "c".into(), soon()).unwrap();
    // Twice the same key is once; the last one counts.
    let twice = vec![("d".into(), vec![0; 5000]), ("d".into(), vec![0; 97])];
    assert_eq!(ns.set_many("", twice, soon()), Ok(()));
    assert_eq!(ns.set("", "d".into(), vec![1; 99], soon()), over(1));
    let small = store.namespace("quota", 10);
    assert_eq!(
        small.set("", "d".into(), vec![1; 90], soon()),
        Ok(()),
        "less"
    );
    assert!(small.set("", "d".into(), vec![1; 91], soon()).is_err());
    assert_eq!(small.delete("", "d".into(), soon()), Ok(()));
    ns.set("", "n".into(), b"99".to_vec(), soon()).unwrap();
    let exact = store.namespace("quota", each + 1 + each + 2);
    assert!(
        matches!(
            exact.increment("", "n".into(), 1, soon()),
            Err(StoreError::Quota { .. })
        ),
        "it gets a digit more"
    );
    assert_eq!(exact.increment("", "n".into(), -1, soon()), Ok(98));
}

fn batches_are_done_whole_or_not_at_all(store: &Arc<Store>) {
    let ns = store.namespace("batches", 1 << 30);
    let large = vec![7; MAX_VALUE - 8];
    let pairs: Vec<_> = (0..4).map(|i| (format!("{i}"), large.clone())).collect();
    assert_eq!(ns.set_many("b", pairs.clone(), soon()), Ok(()));
    let keys: Vec<_> = ["3", "x", "0"].map(String::from).to_vec();
    assert_eq!(
        ns.get_many("b", &keys, soon()),
        Ok(vec![Some(large.clone()), None, Some(large.clone())])
    );
    ns.set("b", "4".into(), vec![0; 33], soon()).unwrap();
    let all: Vec<_> = (0..5).map(|i| format!("{i}")).collect();
    assert_eq!(
        ns.get_many("b", &all, soon()),
        Err(StoreError::Batch {
            size: MAX_BATCH_BYTES + 1,
            limit: MAX_BATCH_BYTES,
            unit: "bytes"
        })
    );
    assert_eq!(ns.get_many("b", &[], soon()), Ok(vec![]));
    let tight = store.namespace("batches", MAX_BATCH_BYTES as u64 + 1000);
    let more = vec![("5".into(), vec![1]), ("6".into(), vec![0; 1000])];
    assert!(matches!(
        tight.set_many("b", more, soon()),
        Err(StoreError::Quota { .. })
    ));
    assert_eq!(ns.exists("b", "5", soon()), Ok(false), "none of them");
    ns.delete_many("b", all, soon()).unwrap();
    assert_eq!(ns.list("b", "", None, soon()).unwrap().keys, [""; 0]);
}

fn pages_cover_everything_once_in_order(store: &Arc<Store>) {
    let ns = store.namespace("pages", 1 << 20);
    let mut keys: Vec<String> = (0..2500).map(|i| format!("{i:05}")).collect();
    keys.extend(["\0", "é", "\u{10ffff}", "zz\0", "zz", "\u{ffff}"].map(String::from));
    keys.sort();
    for bucket in ["b", "a", "b-"] {
        for chunk in keys.chunks(1000) {
            let pairs = chunk.iter().map(|key| (key.clone(), vec![1]));
            ns.set_many(bucket, pairs.collect(), soon()).unwrap();
        }
    }
    let (mut found, mut from) = (Vec::new(), None);
    loop {
        let page = ns.list("b", "", from.as_deref(), soon()).unwrap();
        assert!(page.next.is_none() || page.keys.len() == 1000);
        found.extend(page.keys);
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(found, keys);
    let after = ns.list("b", "", Some("02499a"), soon()).unwrap();
    assert_eq!(after.keys, ["zz", "zz\0", "é", "\u{ffff}", "\u{10ffff}"]);
    assert_eq!(ns.list("c", "", None, soon()).unwrap().keys, [""; 0]);
}

fn many_threads_write_and_nothing_is_lost(store: &Arc<Store>) {
    let ns = store.namespace("threads", 10_000);
    thread::scope(|scope| {
        for thread in 0..8 {
            let ns = ns.durable();
            scope.spawn(move || {
                for round in 0..50 {
                    ns.increment("", "n".into(), 1, soon()).unwrap();
                    // Wrong ones among them spoil nothing.
                    let wrong = ns.set("", format!("{thread}-{round}"), vec![0; 20_000], soon());
                    assert!(matches!(wrong, Err(StoreError::Quota { .. })));
                }
            });
        }
    });
    assert_eq!(ns.get("", "n", soon()), Ok(Some(b"400".to_vec())));
}

/// What fails says so before the deadline, not after it.
fn in_time<T>(time: Duration, ask: impl FnOnce(Instant) -> T) -> T {
    let deadline = Instant::now() + time;
    let answer = ask(deadline);
    assert!(Instant::now() < deadline, "after the deadline");
    answer
}

#[test]
fn an_engine_that_is_away_fails_calls_in_time_and_recovers() {
    let Some(mut redis) = Redis::start(&[]) else {
        return;
    };
    let store = remote(&[redis.url()]);
    let ns = store.namespace("away", 1 << 20);
    ns.increment("", "n".into(), 1, soon()).unwrap();
    redis.signal("STOP");
    let time = Duration::from_millis(500);
    let stopped = in_time(time, |deadline| ns.increment("", "n".into(), 1, deadline));
    assert!(
        matches!(stopped, Err(StoreError::Unconfirmed(_))),
        "{stopped:?}"
    );
    let problem = store.health().problem().unwrap();
    assert!(problem.contains("may have been done"), "{problem}");
    assert!(in_time(time, |deadline| ns.get("", "n", deadline)).is_err());
    redis.signal("CONT");
    let now = ns.increment("", "n".into(), 1, soon()).unwrap();
    assert!(
        now == 3 || now == 2,
        "the one in between was done or not, once: {now}"
    );
    assert_eq!(store.health().problem(), None);
    redis.kill();
    let gone = in_time(Duration::from_secs(30), |deadline| {
        ns.increment("", "n".into(), 1, deadline)
    });
    assert!(matches!(gone, Err(StoreError::Away(_))), "{gone:?}");
    redis.start_again();
    assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(now + 1));
    // Idle connections of the one before are noticed before they are used.
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| ns.increment("", "m".into(), 1, soon()).unwrap());
        }
    });
    redis.kill();
    redis.start_again();
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| ns.increment("", "m".into(), 1, soon()).unwrap());
        }
    });
    assert_eq!(ns.get("", "m", soon()), Ok(Some(b"32".to_vec())));
    assert_eq!(
        ns.get("", "n", soon()),
        Ok(Some((now + 1).to_string().into()))
    );
}

/// Stands in for an engine: does with each command what it was made for, and
/// counts the scripts.
struct StandIn {
    url: String,
    scripts: Arc<AtomicUsize>,
}

impl StandIn {
    fn new(answer: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("redis://{}", listener.local_addr().unwrap());
        let scripts = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&scripts);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, scripts) = (stream.unwrap(), Arc::clone(&count));
                thread::spawn(move || {
                    let mut buf = [0; 4096];
                    while let Ok(count @ 1..) = stream.read(&mut buf) {
                        let text = String::from_utf8_lossy(&buf[..count]);
                        if text.contains("MYID") {
                            let _ = stream.write_all(b"$2\r\nid\r\n");
                            continue;
                        }
                        scripts.fetch_add(1, SeqCst);
                        if answer.is_empty() || stream.write_all(answer).is_err() {
                            return;
                        }
                        while answer.starts_with(b"$9") && stream.write_all(&[7; 65536]).is_ok() {}
                    }
                });
            }
        });
        Self { url, scripts }
    }
}

#[test]
fn what_may_have_arrived_is_never_sent_again() {
    for nodes in [1, 3] {
        let all: Vec<_> = (0..nodes).map(|_| StandIn::new(b"")).collect();
        let urls: Vec<_> = all.iter().map(|node| node.url.clone()).collect();
        let ns = remote(&urls).namespace("once", 1000);
        let cut_off = ns.increment("", "n".into(), 1, soon());
        assert!(
            matches!(cut_off, Err(StoreError::Unconfirmed(_))),
            "{cut_off:?}"
        );
        let scripts: usize = all.iter().map(|node| node.scripts.load(SeqCst)).sum();
        assert_eq!(scripts, 1);
    }
}

/// An engine, or a proxy before it, may repeat a command that it does not know.
#[test]
fn the_password_reaches_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    std::fs::write(&file, "s3cret").unwrap();
    let engine =
        StandIn::new(b"-ERR unknown command 'AUTH', with args beginning with: 's3cret'\r\n");
    let settings = store::Store {
        url: OneOrMore::One(engine.url.clone()),
        password_file: file,
        ..store::Store::default()
    };
    let store = Store::remote(settings.remote().unwrap().unwrap(), None).unwrap();
    let refused = store.namespace("s", 1000).get("", "k", soon());
    let Err(StoreError::Away(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("refuses the login: ERR"), "{why}");
    assert!(!why.contains("s3cret"), "{why}");
}

/// Without the right to look for other nodes, a backup might miss them.
#[test]
fn a_backup_without_the_rights_for_it_is_refused() {
    let Some(redis) = Redis::start(&[]) else {
        return;
    };
    let store = remote(&[redis.url()]);
    let ns = store.namespace("s", 1000);
    ns.set("", "k".into(), vec![], soon()).unwrap();
    let export = || store.export(&mut Vec::new(), &mut |_| {});
    assert_eq!(export().unwrap().entries, 1);
    redis.ask(&["ACL", "SETUSER", "default", "-cluster"]);
    let refused = export().unwrap_err().to_string();
    assert!(refused.contains("NOPERM"), "{refused}");
}

#[test]
fn a_store_of_several_nodes_is_a_cluster() {
    let (Some(one), Some(other)) = (Redis::start(&[]), Redis::start(&[])) else {
        return;
    };
    let ns = remote(&[one.url(), other.url()]).namespace("split", 1000);
    let refused = ns.increment("", "n".into(), 1, soon());
    let Err(StoreError::Away(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("not of a cluster"), "{why}");
}

#[test]
fn an_answer_is_bounded_and_taken_from_memory() {
    let memory = Budget::new(16 << 20);
    let endless = StandIn::new(b"$999999999\r\n");
    let ns = remote_within(&[endless.url], Some(Arc::clone(&memory))).namespace("large", 1000);
    let large = ns.get("", "k", soon());
    let Err(StoreError::Unconfirmed(why)) = large else {
        panic!("{large:?}");
    };
    assert!(why.contains("exceeds"), "{why}");
    assert_eq!(memory.used(), 0);
    // What others take is waited for until the deadline.
    let Some(redis) = Redis::start(&[]) else {
        return;
    };
    let ns = remote_within(&[redis.url()], Some(Arc::clone(&memory))).namespace("large", 1 << 30);
    ns.set("", "k".into(), vec![1; MAX_VALUE], soon()).unwrap();
    assert!(memory.try_take(16 << 20));
    let time = Duration::from_millis(300);
    let short = in_time(time, |deadline| ns.get("", "k", deadline));
    assert!(short.is_err(), "no memory");
    memory.release(16 << 20);
    assert_eq!(ns.get("", "k", soon()), Ok(Some(vec![1; MAX_VALUE])));
    assert_eq!(memory.used(), 0);
    // What others have put there.
    let foreign = "x".repeat(3 * MAX_VALUE);
    redis.ask(&["HSET", "mb:{large}:values", "\0k", &foreign]);
    assert_eq!(
        ns.get("", "k", soon()),
        Err(StoreError::Value {
            size: 3 * MAX_VALUE
        })
    );
}

/// The guide for operators, which says what the engine must let the user do.
const GUIDE: &str = include_str!("../../../admin/DEPLOYING.md");

#[test]
fn tls_and_a_user_with_few_rights_are_enough() {
    let pki = Pki::new();
    pki.issue("engine", &["localhost"], (2020, 2040), 1);
    let path = |name: &str| pki.path(name).display().to_string();
    let user = GUIDE.lines().find(|line| line.starts_with("user mb on"));
    let user = user.unwrap().replace("PASSWORD", "s3cret");
    std::fs::write(path("users.acl"), format!("user default off\n{user}\n")).unwrap();
    let tls = [
        "--port",
        "0",
        "--tls-port",
        "{port}",
        "--tls-auth-clients",
        "no",
        "--tls-cert-file",
        &path("engine.crt"),
        "--tls-key-file",
        &path("engine.key"),
        "--tls-ca-cert-file",
        &path("ca.crt"),
        "--aclfile",
        &path("users.acl"),
    ];
    let Some(redis) = Redis::start(&tls) else {
        return;
    };
    let connect = |host: &str, user: &str, password: &str| {
        let file = path("password");
        std::fs::write(&file, format!("{password}\n")).unwrap();
        let settings = store::Store {
            url: OneOrMore::One(format!("rediss://{user}@{host}:{}", redis.port)),
            password_file: file.into(),
            ca: pki.path("ca.crt"),
        };
        let store = Store::remote(settings.remote().unwrap().unwrap(), None).unwrap();
        store
            .namespace("secure", 1000)
            .increment("", "n".into(), 1, soon())
            .map(|_| store)
    };
    let refused = |host, user, password, part: &str| match connect(host, user, password) {
        Err(StoreError::Away(why)) => {
            assert!(why.contains(part) && !why.contains("s3cret"), "{why}");
        }
        other => panic!("{part}: {:?}", other.map(drop)),
    };
    refused("localhost", "mb", "wrong", "refuses the login: WRONGPASS");
    refused("localhost", "other", "s3cret", "refuses the login");
    refused("127.0.0.1", "mb", "s3cret", "TLS failed");
    holds_the_suite(
        "redis with TLS",
        &connect("localhost", "mb", "s3cret").unwrap(),
    );
}

#[test]
fn sentinels_name_the_primary() {
    let (Some(mut first), Some(second)) = (Redis::start(&[]), Redis::start(&[])) else {
        return;
    };
    second.ask(&["REPLICAOF", "127.0.0.1", &first.port.to_string()]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sentinel.conf");
    let settings = format!(
        "sentinel monitor mine 127.0.0.1 {} 1\nsentinel down-after-milliseconds mine 300\nsentinel failover-timeout mine 2000\n",
        first.port
    );
    std::fs::write(&file, settings).unwrap();
    let port = free_port();
    let started = std::process::Command::new("redis-server")
        .arg(&file)
        .args([
            "--sentinel",
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--dir",
        ])
        .arg(dir.path())
        .stdout(std::process::Stdio::null())
        .spawn();
    struct Ended(std::process::Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let _sentinel = Ended(started.unwrap());
    until("the Sentinel knows the replica", || {
        redis::ask(port, &["SENTINEL", "MASTER", "mine"]).is_ok()
            && redis::ask(port, &["SENTINEL", "REPLICAS", "mine"]).is_ok_and(|line| line == "*1")
            && second
                .ask(&["INFO", "replication"])
                .contains("master_link_status:up")
    });
    let store = remote(&[format!("redis+sentinel://127.0.0.1:{port}/mine")]);
    let ns = store.namespace("watched", 1000);
    assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(1));
    // So that it is not lost with the primary.
    until("it is copied", || {
        second.ask(&["HGET", "mb:{watched}:values", "\0n"]) == "1"
    });
    first.kill();
    until("another is the primary", || {
        in_time(Duration::from_secs(5), |deadline| {
            ns.increment("", "n".into(), 1, deadline)
        })
        .is_ok()
    });
    assert_eq!(second.ask(&["HGET", "mb:{watched}:values", "\0n"]), "2");
    assert_eq!(store.health().problem(), None);
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "still not: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn servers_share_a_store_and_say_when_it_is_away() {
    let Some(mut redis) = Redis::start(&[]) else {
        return;
    };
    let start = || {
        Setup::new(BINARY)
            .with_as("services", "granted/counter.wasm", "counter.wasm")
            .set("[services.counter.grants]\nkeyvalue = true")
            .set(&format!("[store]\nurl = {:?}", redis.url()))
            .start()
    };
    let (one, other) = (start(), start());
    let add = |server: &TestServer| {
        let mut client = server.connect();
        client.request_within("counter.add", "id", 2000, r#"{"name":"x"}"#);
        client.message()
    };
    assert_eq!(add(&one).json(), json!({"value": 1}));
    assert_eq!(add(&other).json(), json!({"value": 2}));
    let is = |status: &'static str| {
        move |server: &TestServer| server.json("/readyz")["status"] == status
    };
    assert!(is("ready")(&one));
    redis.signal("STOP");
    let failed = add(&one);
    assert_eq!(failed.code(), "STORE_FAILED", "{failed:?}");
    // The other one looks by itself.
    for server in [&one, &other] {
        server.until("degraded", is("degraded"));
        let row = server.json("/readyz")["store"].clone();
        assert_eq!(row["status"], "failing", "{row}");
        assert!(
            row["error"].as_str().unwrap().contains("no answer in time"),
            "{row}"
        );
        assert_eq!(server.metric("mb_store_failing"), 1);
    }
    assert_eq!(
        one.connect().ask("echo.say", "1").text(),
        "1",
        "others are served"
    );
    redis.signal("CONT");
    one.until("ready", is("ready"));
    other.until("ready", is("ready"));
    let before = add(&other).json()["value"].as_u64().unwrap();
    redis.kill();
    assert_eq!(add(&one).code(), "STORE_FAILED");
    redis.start_again();
    one.until("ready", is("ready"));
    other.until("ready", is("ready"));
    assert_eq!(
        add(&other).json()["value"],
        before + 1,
        "nothing acknowledged is lost"
    );
    assert_eq!(one.metric("mb_store_failing"), 0);
}

fn keys_are_listed_by_their_beginning(store: &Arc<Store>) {
    let ns = store.namespace("prefixes", 1 << 20);
    let keys = [
        "a",
        "b",
        "b/",
        "b/1",
        "b/2",
        "b/é",
        "b/\u{10ffff}x",
        "b0",
        "c",
    ];
    let pairs = keys.iter().map(|key| ((*key).into(), vec![1]));
    ns.set_many("", pairs.collect(), soon()).unwrap();
    let list = |prefix: &str, from| ns.list("", prefix, from, soon()).unwrap().keys;
    assert_eq!(
        list("b/", None),
        ["b/", "b/1", "b/2", "b/é", "b/\u{10ffff}x"]
    );
    assert_eq!(list("b/", Some("b/2")), ["b/2", "b/é", "b/\u{10ffff}x"]);
    assert_eq!(
        list("b/", Some("a")),
        ["b/", "b/1", "b/2", "b/é", "b/\u{10ffff}x"]
    );
    assert_eq!(list("b/", Some("c")), [""; 0]);
    assert_eq!(list("x", None), [""; 0]);
    let many: Vec<_> = (0..1500).map(|i| (format!("many{i:04}"), vec![])).collect();
    for chunk in many.chunks(1000) {
        ns.set_many("", chunk.to_vec(), soon()).unwrap();
    }
    let first = ns.list("", "many", None, soon()).unwrap();
    assert_eq!(
        (first.keys.len(), first.next.as_deref()),
        (1000, Some("many1000"))
    );
    assert_eq!(list("many", first.next.as_deref()).len(), 500);
}

fn values_end(store: &Arc<Store>) {
    let each = 4 + 1 + OVERHEAD;
    let ns = store.namespace("ends", 3 * (each + 16) + 100);
    let long = Duration::from_secs(3600);
    let set_for =
        |key: &str, size: usize, life| ns.set_for("", key.into(), vec![b'1'; size], life, soon());
    for life in [Duration::ZERO, Duration::from_secs(400_000_000)] {
        assert_eq!(set_for("a", 1, life), Err(StoreError::Life));
    }
    set_for("a", 1, long).unwrap();
    set_for("b", 1, Duration::from_millis(1)).unwrap();
    until("it ends", || !ns_exists(store, "b"));
    assert_eq!(ns.get("", "b", soon()), Ok(None));
    assert_eq!(ns.digest("", "b", soon()), Ok(None));
    let both = ["a".into(), "b".into()];
    assert_eq!(
        ns.get_many("", &both, soon()),
        Ok(vec![Some(b"1".to_vec()), None])
    );
    assert_eq!(ns.list("", "", None, soon()).unwrap().keys, ["a"]);
    // Of a number that ended, the next is the first.
    assert_eq!(ns.increment("", "b".into(), 5, soon()), Ok(5));
    set_for("b", 1, Duration::from_millis(1)).unwrap();
    until("it ends", || !ns_exists(store, "b"));
    assert_eq!(
        ns.swap("", "b".into(), None, b"2".to_vec(), soon()),
        Ok(true)
    );
    // Both keep an end, and `set` removes it.
    set_for("n", 1, Duration::from_millis(1500)).unwrap();
    assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(2));
    let swapped = ns.swap("", "n".into(), Some(digest(b"2")), b"3".to_vec(), soon());
    assert_eq!(swapped, Ok(true));
    set_for("b", 1, Duration::from_millis(1)).unwrap();
    ns.set("", "b".into(), b"stays".to_vec(), soon()).unwrap();
    until("it ends", || !ns_exists(store, "n"));
    assert_eq!(ns.get("", "b", soon()), Ok(Some(b"stays".to_vec())));
    // What has ended makes room.
    ns.delete("", "b".into(), soon()).unwrap();
    until("there is room", || {
        store.tend();
        set_for("c", 100 + each as usize + 14, long).is_ok()
    });
    assert!(matches!(
        set_for("d", 100, long),
        Err(StoreError::Quota { .. })
    ));
    assert_eq!(ns.get("", "a", soon()), Ok(Some(b"1".to_vec())));
}

fn ns_exists(store: &Arc<Store>, key: &str) -> bool {
    store.namespace("ends", 1).exists("", key, soon()).unwrap()
}

fn a_backup_is_taken_and_restored(store: &Arc<Store>) {
    let ns = store.namespace("backup", 1 << 20);
    let value: Vec<u8> = (0..=255).collect();
    ns.set("b", "k\"\0é".into(), value.clone(), soon()).unwrap();
    ns.increment("", "n".into(), 3, soon()).unwrap();
    let hour = Duration::from_secs(3600);
    ns.set_for("", "ends".into(), b"later".to_vec(), hour, soon())
        .unwrap();
    let mut backup = Vec::new();
    let exported = store
        .export(&mut backup, &mut |lost| panic!("{lost}"))
        .unwrap();
    // Into the other kind of engine, which has the same lines.
    let dir = tempfile::tempdir().unwrap();
    let copy = Store::open(&dir.path().join("store.redb"), 1 << 20).unwrap();
    assert_eq!(copy.import(&mut &*backup, false), Ok(exported.entries));
    let restored = copy.namespace("backup", 1 << 20);
    assert_eq!(restored.get("b", "k\"\0é", soon()), Ok(Some(value)));
    assert_eq!(restored.get("", "n", soon()), Ok(Some(b"3".to_vec())));
    assert_eq!(
        restored.get("", "ends", soon()),
        Ok(Some(b"later".to_vec()))
    );
    let mut again = Vec::new();
    copy.export(&mut again, &mut |lost| panic!("{lost}"))
        .unwrap();
    assert!(
        String::from_utf8(again).unwrap().contains("\"ends\":1"),
        "milliseconds"
    );
    // And back, over what is there.
    ns.set("", "n".into(), b"4".to_vec(), soon()).unwrap();
    let refused = store.import(&mut &*backup, false);
    assert!(matches!(refused, Err(StoreError::Import(_))), "{refused:?}");
    assert_eq!(store.import(&mut &*backup, true), Ok(exported.entries));
    assert_eq!(ns.get("", "n", soon()), Ok(Some(b"3".to_vec())));
    assert_eq!(ns.get("", "ends", soon()), Ok(Some(b"later".to_vec())));
    let cut = &backup[..backup.len() - 5];
    assert!(store.import(&mut &cut[..], true).is_err());
}

/// Runs `mb-server store` with settings in the environment.
fn command(environment: &[(&str, &str)], arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(BINARY)
        .arg("store")
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn a_running_server_hands_out_a_backup() {
    let server = Setup::empty(BINARY)
        .with_as("services", "granted/counter.wasm", "counter.wasm")
        .set("[services.counter.grants]\nkeyvalue = true")
        .start();
    server
        .connect()
        .ask("counter.add", r#"{"name":"x","by":7}"#);
    let home = server.settings_file().parent().unwrap().to_owned();
    let (state, file) = (home.join("state"), home.join("values.jsonl"));
    let (state, file) = (state.to_str().unwrap(), file.to_str().unwrap());
    let admin = server.admin.to_string();
    let export = ["export", file, "--admin", &admin];
    let (code, _, said) = command(&[("XDG_STATE_HOME", state)], &export);
    assert_eq!((code, said.trim()), (Some(0), "1 entries"));
    let other = home.join("other");
    let elsewhere = [("MB_STATE_DIR", other.to_str().unwrap())];
    let (code, _, said) = command(&elsewhere, &["import", file]);
    assert_eq!((code, said.trim()), (Some(0), "1 entries"));
    let (_, lines, _) = command(&elsewhere, &["export"]);
    assert_eq!(lines, std::fs::read_to_string(file).unwrap());
    // A token of another server is none.
    let (code, _, said) = command(&elsewhere, &["export", "-", "--admin", &admin]);
    assert!(code != Some(0) && said.contains("token"), "{said}");
    let post = |headers: &str| {
        let request = format!(
            "POST /store/export HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 0\r\nConnection: close\r\n\r\n"
        );
        crate::support::http(server.admin, &request)
    };
    assert_eq!(post("").0, 401);
    let bearer = format!("Authorization: Bearer {}\r\n", server.token());
    assert_eq!(post(&bearer), (200, lines));
    let without = Setup::empty(BINARY).with("services", "echo.wasm").start();
    let home = without.settings_file().parent().unwrap().join("state");
    let state = [("XDG_STATE_HOME", home.to_str().unwrap())];
    let (code, _, said) = command(
        &state,
        &["export", "-", "--admin", &without.admin.to_string()],
    );
    assert!(
        code == Some(1) && said.contains("there is no store"),
        "{said}"
    );
}

#[test]
fn the_command_works_on_an_engine_over_the_network() {
    let Some(redis) = Redis::start(&[]) else {
        return;
    };
    let ns = remote(&[redis.url()]).namespace("cli", 1000);
    ns.increment("", "n".into(), 7, soon()).unwrap();
    let url = redis.url();
    let settings = [("MB_STORE__URL", &*url)];
    let (code, lines, said) = command(&settings, &["export"]);
    assert_eq!((code, said.trim()), (Some(0), "1 entries"), "{lines}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("values.jsonl");
    std::fs::write(&file, &lines).unwrap();
    let file = file.to_str().unwrap();
    let (code, _, said) = command(&settings, &["import", file]);
    assert!(code == Some(1) && said.contains("not empty"), "{said}");
    redis.ask(&["FLUSHALL"]);
    let (code, _, said) = command(&settings, &["import", file]);
    assert_eq!((code, said.trim()), (Some(0), "1 entries"));
    assert_eq!(ns.get("", "n", soon()), Ok(Some(b"7".to_vec())));
    assert_eq!(command(&settings, &["check"]).0, Some(1));
}

//! What a client says of its calls while the server is killed and restarted.
//!
//! Eight threads share one client and call `counter.add` under a name of its
//! own for each call, so that the store, which outlives the kills, shows how
//! often each ran. Twenty times the server ends, by SIGKILL and by SIGTERM in
//! turns, and starts again on the same port. Exits 1 if anything that the
//! client said is not true.
//!
//! With `--handed-over` each server gets the listener from outside, as from
//! systemd, and ends by SIGTERM alone; the next one is started in turns after
//! its end and at once. Then no call may fail.

use std::{
    collections::HashMap,
    net::TcpListener,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use mb_server::{
    client::{Answer, Client, ClientError, Request},
    wire::{Payload, Topic},
};
use serde_json::{Value, json};

use super::support::{Setup, TestServer};

const THREADS: usize = 8;
const ROUNDS: usize = 20;
/// Answers that are waited for between two ends.
const ANSWERS_A_ROUND: usize = 300;

/// What the client said of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Said {
    Answered,
    NothingRan,
    MayHaveRun,
}

#[derive(clap::Args)]
pub struct Arguments {
    /// The listener outlives the servers, as one of systemd's; no call may fail
    #[arg(long)]
    handed_over: bool,
}

pub fn run(&Arguments { handed_over }: &Arguments) -> ExitCode {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let listener = handed_over.then_some(listener);
    let binary = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release/mb-server");
    let begin = || -> TestServer {
        let setup = Setup::empty(&binary)
            .with_as("services", "granted/counter.wasm", "counter.wasm")
            .set(&format!(
                "state_dir = {:?}",
                dir.path().join("state").display().to_string()
            ))
            .set("drain_timeout = 1000\n[services.counter.grants]\nkeyvalue = true");
        let (setup, mut command) = match &listener {
            Some(listener) => setup.command_with(listener),
            None => {
                let command = setup.command_on(port);
                (setup, command)
            }
        };
        setup.start_with(&mut command)
    };
    let mut server = begin();
    let client = Client::builder(format!("127.0.0.1:{port}"))
        .connect()
        .unwrap();
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let calls: Mutex<Vec<(String, bool, Said)>> = Mutex::default();

    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (client, stop, answered, calls) = (&client, &stop, &answered, &calls);
            scope.spawn(move || {
                for number in 0.. {
                    if stop.load(SeqCst) {
                        break;
                    }
                    let name = format!("{thread}-{number}");
                    let idempotent = number % 4 == 0;
                    let said = add(client, &name, idempotent);
                    answered.fetch_add(usize::from(said == Said::Answered), SeqCst);
                    calls.lock().unwrap().push((name, idempotent, said));
                }
            });
        }
        for round in 0..ROUNDS {
            let until = answered.load(SeqCst) + ANSWERS_A_ROUND;
            while answered.load(SeqCst) < until {
                thread::sleep(Duration::from_millis(5));
            }
            server.signal(if round % 2 == 0 && !handed_over {
                "KILL"
            } else {
                "TERM"
            });
            if round % 2 == 0 || !handed_over {
                let _ = server.wait();
            }
            let mut before = std::mem::replace(&mut server, begin());
            let _ = before.wait();
        }
        stop.store(true, SeqCst);
    });

    let mut wrong = 0;
    let mut tally: HashMap<(bool, Said, i64), usize> = HashMap::new();
    for (name, idempotent, said) in calls.into_inner().unwrap() {
        let count: Value = client
            .call_json("counter.get", &json!({"name": name}))
            .unwrap();
        let count = count["value"].as_i64().unwrap();
        let sound = match said {
            Said::Answered => count == 1 || idempotent && !handed_over && count >= 1,
            _ if handed_over => false,
            Said::NothingRan => count == 0,
            Said::MayHaveRun => count <= 1 || idempotent,
        };
        if !sound {
            wrong += 1;
            println!("WRONG: {name}, idempotent {idempotent}, said {said:?}, ran {count} times");
        }
        *tally.entry((idempotent, said, count)).or_default() += 1;
    }
    let mut rows: Vec<_> = tally.into_iter().collect();
    rows.sort_by_key(|((idempotent, said, count), _)| (*idempotent, format!("{said:?}"), *count));
    for ((idempotent, said, count), calls) in rows {
        println!("idempotent {idempotent:5}  said {said:10?}  ran {count}  calls {calls}");
    }
    println!("{ROUNDS} restarts, {wrong} untrue");
    ExitCode::from(u8::from(wrong > 0))
}

fn add(client: &Client, name: &str, idempotent: bool) -> Said {
    let payload = json!({"name": name}).to_string();
    let topic = Topic::parse("counter.add").unwrap();
    let request = Request {
        timeout: Duration::from_secs(2),
        idempotent,
        ..Request::new(topic, Payload::Json(&payload))
    };
    match client.call(&request) {
        Ok(Answer::Json(_)) => Said::Answered,
        Ok(Answer::Binary(_)) => panic!("counter.add answers JSON"),
        Err(
            error @ (ClientError::NotSent(_)
            | ClientError::Unanswered(_)
            | ClientError::Answered(_)),
        ) => {
            if error.may_have_run() {
                Said::MayHaveRun
            } else {
                Said::NothingRan
            }
        }
        Err(error @ ClientError::Unexpected(_)) => panic!("{error}"),
    }
}

//! Compares some of the instances that were reset with what they were, beside
//! the calls: the rewriter is tested, and is still not trusted.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    instance::renew,
    pool::{IdleEviction, IdleInstance, IdleInstances},
};
use crate::host::{Context, Unwatched};
use crate::locks::lock;

/// Instances that wait to be compared; one that finds no room is not.
const MAX_WAITING: usize = 4;
/// How long one comparison may take: 1 GiB of memory takes less than a second.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The share of one processor's time that comparing may take: one in so many.
/// 1.3 MiB of memory take 0.1 ms, which at 800,000 calls a second would be a
/// twentieth of what two processors do.
const SHARE: u32 = 100;
/// Most digests that are remembered because an instance was not as it was. A
/// file that is loaded beyond them gets fresh instances.
const MAX_RECORDS: usize = 1000;

/// What comparing has found about the instances of one component's file,
/// as often as that is loaded.
#[derive(Debug, Default)]
pub(super) struct ResetRecord {
    verified: AtomicU64,
    defects: AtomicU64,
}

impl ResetRecord {
    /// Instances that were compared.
    pub(super) fn verified(&self) -> u64 {
        self.verified.load(Relaxed)
    }

    /// Instances that were not as they had been.
    pub(super) fn defects(&self) -> u64 {
        self.defects.load(Relaxed)
    }
}

/// One instance that was reset.
struct Job {
    idle_instance: IdleInstance,
    idle: Arc<IdleInstances>,
    digest: Arc<str>,
    record: Arc<ResetRecord>,
}

/// Until when nothing is compared, because enough was.
#[derive(Debug)]
struct Pause {
    begin: Instant,
    /// Nanoseconds after that.
    until: AtomicU64,
}

impl Pause {
    fn is_over(&self) -> bool {
        self.begin.elapsed().as_nanos() >= u128::from(self.until.load(Relaxed))
    }

    fn after(&self, worked: Duration) {
        let until = self.begin.elapsed() + worked * (SHARE - 1);
        self.until.store(until.as_nanos() as u64, Relaxed);
    }
}

/// The thread that compares, and what it has found.
pub(super) struct Verifier {
    /// None if nothing is compared.
    queue: Option<SyncSender<Job>>,
    pause: Arc<Pause>,
    records: Mutex<BTreeMap<Arc<str>, Arc<ResetRecord>>>,
}

impl Verifier {
    /// Starts the thread if anything is to be compared. Its stack is for the
    /// code of the guests.
    pub(super) fn start(verify_resets: u32, stack: usize) -> Self {
        let pause = Arc::new(Pause {
            begin: Instant::now(),
            until: AtomicU64::new(0),
        });
        let start = || {
            let pause = Arc::clone(&pause);
            let (queue, jobs) = sync_channel(MAX_WAITING);
            thread::Builder::new()
                .name("mb-verify".into())
                .stack_size(stack)
                .spawn(move || run(&jobs, &pause))
                .inspect_err(|error| tracing::warn!("no resets are verified: {error}"))
                .ok()
                .map(|_| queue)
        };
        Self {
            queue: (verify_resets > 0).then(start).flatten(),
            pause,
            records: Mutex::default(),
        }
    }

    /// What is known of a file. Where far too many are known as defective, a
    /// new one counts as such.
    pub(super) fn record(&self, digest: &Arc<str>) -> Arc<ResetRecord> {
        let mut records = lock(&self.records);
        records.retain(|_, record| Arc::strong_count(record) > 1 || record.defects() > 0);
        let defective = records.values().filter(|record| record.defects() > 0);
        if defective.count() >= MAX_RECORDS && !records.contains_key(digest) {
            let record = ResetRecord::default();
            record.defects.store(1, Relaxed);
            return Arc::new(record);
        }
        Arc::clone(records.entry(Arc::clone(digest)).or_default())
    }

    /// Has an instance compared and returned to the idle ones. Where too
    /// many wait, enough was compared lately, or there is no memory or slot
    /// for another instance meanwhile, it is only returned.
    pub(super) fn verify(
        &self,
        idle_instance: IdleInstance,
        idle: &Arc<IdleInstances>,
        digest: &Arc<str>,
        record: &Arc<ResetRecord>,
        has_memory: bool,
    ) {
        let can = self.pause.is_over() && has_memory;
        let Some(queue) = self.queue.as_ref().filter(|_| can) else {
            idle.put(idle_instance);
            return;
        };
        let job = Job {
            idle_instance,
            idle: Arc::clone(idle),
            digest: Arc::clone(digest),
            record: Arc::clone(record),
        };
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) = queue.try_send(job)
        {
            job.idle.put(job.idle_instance);
        }
    }
}

fn run(jobs: &Receiver<Job>, pause: &Pause) {
    for job in jobs {
        let begun = Instant::now();
        let Job {
            mut idle_instance,
            idle,
            digest,
            record,
        } = job;
        let no_caller = Context::of_loading(Instant::now() + TIMEOUT);
        renew(
            &mut idle_instance.live.store,
            no_caller,
            Arc::new(Unwatched),
        );
        match idle_instance.live.differs() {
            Ok(false) => {
                record.verified.fetch_add(1, Relaxed);
                idle_instance.live.store.data_mut().host.rest();
                idle.put(idle_instance);
            }
            Ok(true) => {
                record.verified.fetch_add(1, Relaxed);
                if record.defects.fetch_add(1, Relaxed) == 0 {
                    tracing::error!(
                        "a defect of the server: an instance of the component {digest} was reset and was not what it \
                         had been. Its calls get fresh instances from now on; please report it with that file"
                    );
                }
                idle.evict(IdleEviction::All);
            }
            Err(error) => {
                tracing::warn!("a reset of the component {digest} was not verified: {error:#}")
            }
        }
        pause.after(begun.elapsed());
    }
}

/// Counts resets until the next one that is verified. How many there are is
/// random, one in so many on average, so that no guest can know which.
#[derive(Debug)]
pub(super) struct Countdown {
    one_in: u32,
    left: u32,
}

impl Countdown {
    /// None are verified if it is zero.
    pub(super) fn new(one_in: u32) -> Self {
        Self {
            one_in,
            left: draw(one_in),
        }
    }

    /// Whether this one is to be verified.
    #[inline]
    pub(super) fn is_due(&mut self) -> bool {
        if self.one_in == 0 {
            return false;
        }
        self.left -= 1;
        let due = self.left == 0;
        if due {
            self.left = draw(self.one_in);
        }
        due
    }
}

/// A number of trials until the first success, each with the same chance: of
/// the geometric distribution, at least one.
fn draw(one_in: u32) -> u32 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    let uniform = (bits + 1) as f64 / (1_u64 << 53) as f64;
    let trials = uniform.ln() / (1.0 - 1.0 / f64::from(one_in)).ln();
    (trials.ceil() as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_so_many_is_due() {
        for (one_in, least, most) in [(0, 0, 0), (1, 1000, 1000), (10, 20, 300)] {
            let mut countdown = Countdown::new(one_in);
            let due = (0..1000).filter(|_| countdown.is_due()).count();
            assert!(
                (least..=most).contains(&due),
                "{due} of 1000, one in {one_in}"
            );
        }
    }

    #[test]
    fn what_is_known_of_a_file_outlives_its_component() {
        let verifier = Verifier::start(0, 0);
        let digests = ["good", "bad"].map(Arc::<str>::from);
        let records = digests.each_ref().map(|digest| verifier.record(digest));
        records[1].defects.store(1, Relaxed);
        drop(records);
        let many: Vec<_> = (0..2 * MAX_RECORDS)
            .map(|file| verifier.record(&file.to_string().into()))
            .collect();
        assert!(many.iter().all(|record| record.defects() == 0));
        drop(many);
        let known = digests.map(|digest| verifier.record(&digest).defects());
        assert_eq!((known, verifier.records.lock().unwrap().len()), ([0, 1], 1));
    }

    /// Every store marks, with a one that a planted defect makes a zero.
    #[cfg(feature = "compiler")]
    #[test]
    fn a_planted_defect_is_found() {
        use crate::{
            config::{Config, services::settings_of},
            host::Granted,
            sandbox::{
                Call, CompilerConfig, Component, ComponentPolicy, Sandbox, SandboxConfig,
                component::ComponentFile, componentize, precompiled,
            },
            wire::Payload,
        };
        const MARK: [u8; 6] = [0x41, 10, 0x76, 0x41, 1, 0x3a];
        let config = Config::default();
        let settings = settings_of(&config.services, "echo");
        let sandbox = Sandbox::new(SandboxConfig {
            call_depth: 1,
            verify_resets: 1,
            largest_instance: 16 << 20,
            instances: 4,
            memory: crate::budget::Budget::new(64 << 20),
            compiler: CompilerConfig::default(),
        })
        .unwrap();
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/services/dist/echo.wasm");
        let echo = componentize(&std::fs::read(file).unwrap())
            .unwrap()
            .into_owned();
        let (good, info) = mb_reset::rewrite(&echo).unwrap();
        let mut bad = good.clone();
        let positions = 0..bad.len() - MARK.len();
        for at in positions.filter(|at| good[*at..].starts_with(&MARK)) {
            bad[at + 4] = 0;
        }
        assert_ne!(good, bad);
        for (digest, bytes, wanted) in [("good", good, 0), ("bad", bad, 1)] {
            let code = sandbox.engine.precompile_component(&bytes).unwrap();
            let sections = precompiled::Sections::default();
            let file = precompiled::file(&echo, false, Ok(info), sections, &code);
            let code = ComponentFile::trusted(file);
            let load = || {
                let policy = ComponentPolicy {
                    granted: Granted::for_inspection("echo"),
                    settings: settings.clone(),
                    memory: 16 << 20,
                    answer_size: 1 << 20,
                };
                Component::load(&sandbox, &code, digest, policy).unwrap()
            };
            let component = load();
            let deadline = Instant::now() + Duration::from_secs(60);
            let call = |component: &Component| {
                let call = Call {
                    action: "say",
                    payload: Payload::Json("\"what was said\""),
                    context: Context::of_loading(deadline),
                    watch: Arc::new(Unwatched),
                };
                let report = component.call(call);
                assert!(report.result.is_ok(), "{report:?}");
                report.created
            };
            while component.verified_resets().0 == 0 {
                assert!(Instant::now() < deadline, "nothing was verified");
                call(&component);
            }
            assert_eq!(component.verified_resets().1.min(1), wanted, "{digest}");
            assert_eq!(component.fresh_reason().is_some(), wanted > 0, "{digest}");
            if wanted > 0 {
                // It stays so when the same file is loaded again.
                let again = load();
                assert!((0..3).all(|_| call(&component) && call(&again)));
                assert!(again.fresh_reason().unwrap().contains("defect"));
            }
        }
    }
}

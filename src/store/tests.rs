use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use redb::{Builder, StorageBackend};

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A disk whose power can be cut: what was not synced is lost, or only some
/// of it arrives.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Platters>>);

#[derive(Debug, Default)]
struct Platters {
    live: Vec<u8>,
    synced: Vec<u8>,
    /// Writes since the last sync: offset and bytes, or a new length.
    pending: Vec<(usize, Result<Vec<u8>, ()>)>,
    /// The power goes at this sync, counted down; nothing works after it.
    cut_at: Option<u32>,
    dark: bool,
    full: bool,
}

impl Disk {
    fn lock(&self) -> MutexGuard<'_, Platters> {
        self.0.lock().unwrap()
    }

    /// What is there after the power comes back: of the writes that were not
    /// synced those that `arrives` picks.
    fn after_power_cut(&self, mut arrives: impl FnMut() -> bool) -> Self {
        let platters = self.lock();
        let mut image = platters.synced.clone();
        for (at, write) in &platters.pending {
            match write {
                Ok(bytes) if arrives() => {
                    image.resize(image.len().max(at + bytes.len()), 0);
                    image[*at..at + bytes.len()].copy_from_slice(bytes);
                }
                // A new length is the file system's own journal's business.
                Err(()) => image.resize(*at, 0),
                Ok(_) => {}
            }
        }
        drop(platters);
        let disk = Self::default();
        disk.lock().live = image.clone();
        disk.lock().synced = image;
        disk
    }

    fn open(&self) -> Result<Arc<Store>, StoreError> {
        let disk = self.clone();
        Store::with(move || {
            Ok(Builder::new()
                .set_cache_size(1 << 20)
                .create_with_backend(disk.clone())?)
        })
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.lock().live.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let at = offset as usize;
        out.copy_from_slice(&self.lock().live[at..at + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        let mut platters = self.lock();
        if platters.full && len as usize > platters.live.len() {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        platters.live.resize(len as usize, 0);
        platters.pending.push((len as usize, Err(())));
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut platters = self.lock();
        match &mut platters.cut_at {
            Some(0) => {
                platters.dark = true;
                return Err(io::Error::other("no power"));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        platters.synced = platters.live.clone();
        platters.pending.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let mut platters = self.lock();
        if platters.full {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        if platters.cut_at == Some(0) && platters.dark {
            return Err(io::Error::other("no power"));
        }
        let at = offset as usize;
        platters.live[at..at + data.len()].copy_from_slice(data);
        platters.pending.push((at, Ok(data.to_vec())));
        Ok(())
    }
}

fn namespace(store: &Arc<Store>) -> Namespace {
    store.namespace("svc", 10_000)
}

#[test]
fn values_come_back_each_to_its_own() {
    let store = Disk::default().open().unwrap();
    let (one, other) = (store.namespace("one", 1000), store.namespace("other", 1000));
    one.set("b", "k".into(), b"1".to_vec(), soon()).unwrap();
    other.set("b", "k".into(), b"2".to_vec(), soon()).unwrap();
    one.set("", "k".into(), b"3".to_vec(), soon()).unwrap();
    assert_eq!(one.get("b", "k"), Ok(Some(b"1".to_vec())));
    assert_eq!(other.get("b", "k"), Ok(Some(b"2".to_vec())));
    assert_eq!(one.get("", "k"), Ok(Some(b"3".to_vec())));
    assert_eq!(one.list("b", None).unwrap().keys, ["k"]);
    one.delete("b", "k".into(), soon()).unwrap();
    assert_eq!(
        (one.exists("b", "k"), other.exists("b", "k")),
        (Ok(false), Ok(true))
    );
}

#[test]
fn numbers_and_swaps() {
    let store = Disk::default().open().unwrap();
    let ns = namespace(&store);
    assert_eq!(ns.increment("", "n".into(), 5, soon()), Ok(5));
    assert_eq!(ns.increment("", "n".into(), -7, soon()), Ok(-2));
    assert_eq!(ns.get("", "n"), Ok(Some(b"-2".to_vec())));
    ns.set("", "n".into(), i64::MAX.to_string().into_bytes(), soon())
        .unwrap();
    assert_eq!(
        ns.increment("", "n".into(), 1, soon()),
        Err(StoreError::NotANumber)
    );
    ns.set("", "t".into(), b"text".to_vec(), soon()).unwrap();
    assert_eq!(
        ns.increment("", "t".into(), 1, soon()),
        Err(StoreError::NotANumber)
    );
    assert_eq!(
        ns.swap("", "t".into(), None, b"new".to_vec(), soon()),
        Ok(false)
    );
    assert_eq!(
        ns.swap(
            "",
            "t".into(),
            Some(b"text".to_vec()),
            b"new".to_vec(),
            soon()
        ),
        Ok(true)
    );
    assert_eq!(ns.get("", "t"), Ok(Some(b"new".to_vec())));
}

#[test]
fn bounds() {
    let store = Disk::default().open().unwrap();
    let ns = store.namespace("svc", 1 << 30);
    let key = |size: usize| "k".repeat(size);
    assert_eq!(ns.get("", ""), Err(StoreError::Key { size: 0 }));
    assert_eq!(
        ns.set("", key(1025), vec![], soon()),
        Err(StoreError::Key { size: 1025 })
    );
    assert_eq!(ns.set("", key(1024), vec![], soon()), Ok(()));
    assert_eq!(ns.get("a b", "k"), Err(StoreError::Bucket));
    let value = MAX_VALUE + 1;
    assert_eq!(
        ns.set("", key(1), vec![0; value], soon()),
        Err(StoreError::Value { size: value })
    );
    assert!(matches!(
        ns.delete_many("", vec![key(1); 1001], soon()),
        Err(StoreError::Batch { .. })
    ));
    assert_eq!(
        ns.set("", key(1), vec![], Instant::now()),
        Err(StoreError::Busy)
    );
}

#[test]
fn the_quota_is_exact_and_outlives_the_process() {
    let disk = Disk::default();
    let store = disk.open().unwrap();
    let ns = store.namespace("svc", 100);
    ns.set("", "a".into(), vec![0; 59], soon()).unwrap();
    ns.set("b", "c".into(), vec![0; 39], soon()).unwrap();
    let over = Err(StoreError::Quota {
        wanted: 102,
        limit: 100,
    });
    assert_eq!(ns.set("", "d".into(), vec![0; 1], soon()), over);
    let both = vec![("a".into(), vec![0; 1]), ("d".into(), vec![0; 57])];
    assert_eq!(ns.set_many("", both, soon()), Ok(()), "counted together");
    drop((ns, store));
    let store = disk.open().unwrap();
    let ns = store.namespace("svc", 100);
    assert_eq!(ns.set("", "e".into(), vec![0; 1], soon()), over);
    ns.delete("b", "c".into(), soon()).unwrap();
    assert_eq!(ns.set("", "e".into(), vec![0; 39], soon()), Ok(()));
    assert_eq!(
        store.namespace("svc", 10).delete("", "e".into(), soon()),
        Ok(()),
        "less is always allowed"
    );
}

#[test]
fn pages_cover_everything_once() {
    let store = Disk::default().open().unwrap();
    let ns = store.namespace("svc", 1 << 20);
    let keys: Vec<String> = (0..2500).map(|i| format!("{i:05}")).collect();
    for chunk in keys.chunks(1000) {
        ns.set_many(
            "b",
            chunk.iter().map(|key| (key.clone(), vec![1])).collect(),
            soon(),
        )
        .unwrap();
    }
    let (mut found, mut from) = (Vec::new(), None);
    loop {
        let page = ns.list("b", from.as_deref()).unwrap();
        found.extend(page.keys);
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(found, keys);
    let some = ns.get_many("b", &["00000".into(), "x".into()]).unwrap();
    assert_eq!(some, [Some(vec![1]), None]);
}

#[test]
fn many_threads_write_and_nothing_is_lost() {
    let store = Disk::default().open().unwrap();
    thread::scope(|scope| {
        for thread in 0..8 {
            let ns = namespace(&store);
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
    assert_eq!(namespace(&store).get("", "n"), Ok(Some(b"400".to_vec())));
}

#[test]
fn a_backup_is_taken_back_whole_or_not_at_all() {
    let store = Disk::default().open().unwrap();
    let ns = namespace(&store);
    ns.set("b", "k\"ey".into(), vec![0, 255, 10], soon())
        .unwrap();
    ns.increment("", "n".into(), 3, soon()).unwrap();
    let mut backup = Vec::new();
    assert_eq!(store.export(&mut backup), Ok(2));
    let copy = Disk::default().open().unwrap();
    for cut in [0, 10, backup.len() / 2, backup.len() - 15] {
        assert!(
            matches!(
                copy.import(&mut &backup[..cut], false),
                Err(StoreError::Import(_))
            ),
            "{cut}"
        );
        assert_eq!(copy.export(&mut Vec::new()), Ok(0));
    }
    assert_eq!(copy.import(&mut &*backup, false), Ok(2));
    assert!(
        matches!(
            copy.import(&mut &*backup, false),
            Err(StoreError::Import(_))
        ),
        "not empty"
    );
    assert_eq!(copy.import(&mut &*backup, true), Ok(2));
    let mut again = Vec::new();
    copy.export(&mut again).unwrap();
    assert_eq!(again, backup);
    let small = copy.namespace("svc", 12);
    assert_eq!(
        small.set("", "x".into(), vec![0; 3], soon()),
        Err(StoreError::Quota {
            wanted: 13,
            limit: 12
        })
    );
    let other = String::from_utf8(backup)
        .unwrap()
        .replace("\"format\":1", "\"format\":2");
    assert_eq!(
        copy.import(&mut other.as_bytes(), true),
        Err(StoreError::Format { found: 2, known: 1 })
    );
}

#[test]
fn a_file_is_private_and_has_one_owner() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state/store.redb");
    let store = Store::open(&file, 1 << 20).unwrap();
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(matches!(
        Store::open(&file, 1 << 20),
        Err(StoreError::Locked)
    ));
    namespace(&store)
        .increment("", "n".into(), 1, soon())
        .unwrap();
    drop(store);
    let store = Store::open(&file, 1 << 20).unwrap();
    assert_eq!(
        namespace(&store).increment("", "n".into(), 1, soon()),
        Ok(2)
    );
}

#[test]
fn a_full_disk_harms_nothing() {
    let disk = Disk::default();
    let store = disk.open().unwrap();
    let ns = store.namespace("svc", 1 << 30);
    ns.set("", "kept".into(), b"1".to_vec(), soon()).unwrap();
    disk.lock().full = true;
    for _ in 0..3 {
        assert_eq!(
            ns.set("", "lost".into(), vec![1; 100_000], soon()),
            Err(StoreError::Full)
        );
    }
    disk.lock().full = false;
    assert_eq!(ns.get("", "kept"), Ok(Some(b"1".to_vec())));
    assert_eq!(ns.get("", "lost"), Ok(None));
    assert_eq!(ns.set("", "lost".into(), vec![1; 100_000], soon()), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Cuts the power at one of the syncs of the last write, with any part of
    /// what was not synced on the disk: everything acknowledged is there, and
    /// the last write is there whole or not at all.
    #[test]
    fn power_cuts_lose_nothing_that_was_acknowledged(
        writes in proptest::collection::vec((0..20_u8, 0..3000_usize), 1..12),
        arrivals in any::<u64>(),
        cut_at in 0..4_u32,
    ) {
        let disk = Disk::default();
        let store = disk.open().unwrap();
        let ns = store.namespace("svc", 1 << 30);
        let (mut before, mut after, mut counted) = (BTreeMap::new(), BTreeMap::new(), 0);
        let mut acknowledged = false;
        for (round, (key, size)) in writes.iter().enumerate() {
            let (key, value) = (format!("k{key}"), vec![round as u8; *size]);
            before.clone_from(&after);
            after.insert(key.clone(), value.clone());
            let last = round + 1 == writes.len();
            if last {
                disk.lock().cut_at = Some(cut_at);
            }
            acknowledged = ns.set("", key, value, soon()).is_ok();
            prop_assert!(acknowledged || last);
            if !last {
                counted = ns.increment("", "n".into(), 1, soon()).unwrap();
            }
        }
        let mut bits = arrivals;
        let disk = disk.after_power_cut(|| {
            bits = bits.rotate_left(1);
            bits & 1 == 1
        });
        let ns = disk.open().unwrap().namespace("svc", 1 << 30);
        let keys = ns.list("", None).unwrap().keys.into_iter().filter(|key| key != "n");
        let found: BTreeMap<_, _> = keys.map(|key| (key.clone(), ns.get("", &key).unwrap().unwrap())).collect();
        prop_assert!(found == after || (!acknowledged && found == before), "acknowledged: {}", acknowledged);
        prop_assert_eq!(ns.increment("", "n".into(), 0, soon()), Ok(counted));
    }
}

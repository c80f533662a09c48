use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc},
    time::{Duration, Instant},
};

use proptest::prelude::*;
use redb::{Builder, Database, StorageBackend};

use super::{embedded::Embedded, journaled::Medium, *};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Two files on a disk whose power can be cut: what was not synced is lost, or
/// only some of it arrives.
#[derive(Debug, Clone, Default)]
struct Disk {
    database: Drive,
    journal: Drive,
}

#[derive(Debug, Clone, Default)]
struct Drive {
    platters: Arc<Mutex<Platters>>,
    power: Arc<Mutex<Power>>,
    /// Syncs wait while it hangs.
    hangs: Arc<(Mutex<bool>, Condvar)>,
}

#[derive(Debug, Default)]
struct Platters {
    live: Vec<u8>,
    synced: Vec<u8>,
    /// Writes since the last sync: offset and bytes, or a new length.
    pending: Vec<(usize, Result<Vec<u8>, ()>)>,
    full: bool,
    syncs: u32,
}

#[derive(Debug, Default)]
struct Power {
    /// It goes at this sync, counted down; nothing works after it.
    cut_at: Option<u32>,
    dark: bool,
}

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

impl Platters {
    fn write(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
        image.resize(image.len().max(at + bytes.len()), 0);
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn of(image: Vec<u8>) -> Self {
        Self {
            live: image.clone(),
            synced: image,
            ..Self::default()
        }
    }

    fn after_power_cut(&self, arrives: &mut dyn FnMut() -> bool) -> Vec<u8> {
        let mut image = self.synced.clone();
        for (at, write) in &self.pending {
            let Ok(bytes) = write else {
                // A new length is the file system's own journal's business.
                image.resize(*at, 0);
                continue;
            };
            for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
                if arrives() {
                    Self::write(&mut image, at + sector * SECTOR, bytes);
                }
            }
        }
        image
    }
}

impl Disk {
    fn new() -> Self {
        let disk = Self::default();
        let power = Arc::clone(&disk.database.power);
        Self {
            journal: Drive {
                power,
                ..disk.journal
            },
            ..disk
        }
    }

    fn lock(&self) -> MutexGuard<'_, Platters> {
        self.database.lock()
    }

    /// What is there after the power comes back: of the writes that were not
    /// synced those that `arrives` picks.
    fn after_power_cut(&self, mut arrives: impl FnMut() -> bool) -> Self {
        let disk = Self::new();
        for (before, after) in [
            (&self.database, &disk.database),
            (&self.journal, &disk.journal),
        ] {
            *after.lock() = Platters::of(before.lock().after_power_cut(&mut arrives));
        }
        disk
    }

    fn open(&self) -> Result<Arc<Store>, StoreError> {
        let embedded = Embedded::with(Arc::new(self.clone()), 1 << 20)?;
        Ok(Store::on(Arc::new(embedded)))
    }

    fn read(&self, verify: bool) -> Result<Reader, StoreError> {
        Reader::with(self, 1 << 20, verify)
    }

    /// A backup, and what it lacks.
    fn export(&self) -> (Vec<u8>, u64, Vec<String>) {
        let (mut out, mut lost) = (Vec::new(), Vec::new());
        let reader = self.read(false).unwrap();
        let checked = reader.export(&mut out, &mut |what| lost.push(what.into()));
        (out, checked.unwrap().entries, lost)
    }
}

impl Medium for Disk {
    fn database(&self, builder: &Builder) -> Result<Database, StoreError> {
        Ok(builder.create_with_backend(self.database.clone())?)
    }

    fn file(&self) -> Result<Box<dyn StorageBackend>, StoreError> {
        Ok(Box::new(self.database.clone()))
    }

    fn journal(&self) -> io::Result<Option<Box<dyn StorageBackend>>> {
        let is_there = !self.journal.lock().live.is_empty();
        Ok(is_there.then(|| Box::new(self.journal.clone()) as _))
    }

    fn create_journal(
        &self,
        fill: &mut dyn FnMut(&dyn StorageBackend) -> io::Result<()>,
    ) -> io::Result<Box<dyn StorageBackend>> {
        *self.journal.lock() = Platters::default();
        fill(&self.journal)?;
        Ok(Box::new(self.journal.clone()))
    }

    fn remove_journal(&self) -> io::Result<()> {
        *self.journal.lock() = Platters::default();
        Ok(())
    }

    fn has_room(&self) -> bool {
        !self.lock().full
    }

    fn size(&self) -> u64 {
        0
    }
}

impl Drive {
    fn lock(&self) -> MutexGuard<'_, Platters> {
        self.platters.lock().unwrap()
    }

    fn has_power(&self) -> io::Result<()> {
        if self.power.lock().unwrap().dark {
            return Err(io::Error::other("no power"));
        }
        Ok(())
    }
}

impl StorageBackend for Drive {
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
        let (hangs, changed) = &*self.hangs;
        drop(
            changed
                .wait_while(hangs.lock().unwrap(), |hangs| *hangs)
                .unwrap(),
        );
        let mut power = self.power.lock().unwrap();
        match &mut power.cut_at {
            Some(0) => {
                power.dark = true;
                return Err(io::Error::other("no power"));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        drop(power);
        let mut platters = self.lock();
        platters.syncs += 1;
        let Platters {
            synced, pending, ..
        } = &mut *platters;
        for (at, write) in pending.drain(..) {
            match write {
                Ok(bytes) => Platters::write(synced, at, &bytes),
                Err(()) => synced.resize(at, 0),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.has_power()?;
        let mut platters = self.lock();
        if platters.full {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let at = offset as usize;
        Platters::write(&mut platters.live, at, data);
        platters.pending.push((at, Ok(data.to_vec())));
        Ok(())
    }
}

fn namespace(store: &Arc<Store>) -> Namespace {
    store.namespace("svc", 10_000)
}

#[test]
fn the_quota_is_exact_and_outlives_the_process() {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    // What an entry of "svc" with a key of one byte counts beside its value.
    let each = 3 + 1 + entry::OVERHEAD;
    let limit = 2 * each + 1 + 98;
    let ns = store.namespace("svc", limit);
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
    let both = vec![("a".into(), vec![0; 1]), ("d".into(), vec![0; 22])];
    assert_eq!(ns.set_many("", both, soon()), Ok(()), "counted together");
    drop((ns, store));
    let store = disk.open().unwrap();
    let ns = store.namespace("svc", limit);
    assert_eq!(ns.set("", "e".into(), vec![], soon()), over(each));
    ns.delete("b", "c".into(), soon()).unwrap();
    assert_eq!(ns.set("", "e".into(), vec![0; 40], soon()), Ok(()));
    assert_eq!(store.size().unwrap().used, limit);
    assert_eq!(
        store.namespace("svc", 10).delete("", "e".into(), soon()),
        Ok(()),
        "less is always allowed"
    );
}

#[test]
fn a_backup_is_taken_back_whole_or_not_at_all() {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    let ns = namespace(&store);
    ns.set("b", "k\"ey".into(), vec![0, 255, 10], soon())
        .unwrap();
    ns.increment("", "n".into(), 3, soon()).unwrap();
    let (backup, entries, lost) = disk.export();
    assert!(entries == 2 && lost.is_empty(), "{lost:?}");
    let copied = Disk::new();
    let copy = copied.open().unwrap();
    for cut in [0, 10, backup.len() / 2, backup.len() - 15] {
        assert!(
            matches!(
                copy.import(&mut &backup[..cut], false),
                Err(StoreError::Import(_))
            ),
            "{cut}"
        );
        assert_eq!(copied.export().1, 0);
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
    assert_eq!(copied.export().0, backup);
    // Two entries: keys of 4 and 1 bytes, values of 3 and 1, a bucket of 1.
    let counted = 10 + 2 * 3 + 2 * entry::OVERHEAD;
    let small = copy.namespace("svc", counted);
    assert_eq!(
        small.set("", "x".into(), vec![0; 3], soon()),
        Err(StoreError::Quota {
            wanted: counted + 3 + 1 + 3 + entry::OVERHEAD,
            limit: counted
        })
    );
    let other = String::from_utf8(backup)
        .unwrap()
        .replace("\"format\":1", "\"format\":2");
    let refused = copy.import(&mut other.as_bytes(), true).unwrap_err();
    assert!(refused.to_string().contains("it has format 2"), "{refused}");
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
    let disk = Disk::new();
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
    let health = store.health();
    assert_eq!((health.full(), health.failed()), (3, 0));
    assert_eq!(health.problem(), Some("the disk is full".into()));
    disk.lock().full = false;
    assert_eq!(ns.get("", "kept", soon()), Ok(Some(b"1".to_vec())));
    assert_eq!(ns.get("", "lost", soon()), Ok(None));
    assert_eq!(ns.set("", "lost".into(), vec![1; 100_000], soon()), Ok(()));
    assert_eq!((health.full(), health.problem()), (3, None));
}

#[test]
fn names_count_and_what_is_deleted_goes_back_to_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.redb");
    let store = Store::open(&file, 1 << 20).unwrap();
    let limit = 4 << 20;
    let ns = store.namespace("svc", limit);
    // Nothing but names: a bucket of 64 bytes around keys without values.
    let bucket = "b".repeat(MAX_BUCKET);
    let (mut entries, mut full) = (0_u64, false);
    while !full {
        let keys = (entries..entries + 1000).map(|i| (format!("{i}"), vec![]));
        full = ns.set_many(&bucket, keys.collect(), soon()).is_err();
        entries += 1000;
    }
    assert!(entries < limit / (64 + entry::OVERHEAD), "{entries}");
    let size = store.size().unwrap();
    assert!(size.on_disk < 4 * limit, "{size:?}");
    let mut from = None;
    loop {
        let page = ns.list(&bucket, "", from.as_deref(), soon()).unwrap();
        ns.delete_many(&bucket, page.keys, soon()).unwrap();
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    store.compact().unwrap();
    let size = store.size().unwrap();
    assert!(size.used == 0 && size.on_disk < limit / 2, "{size:?}");
    assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(1));
}

#[test]
fn to_look_at_the_size_neither_waits_nor_opens_the_file_again() {
    let dir = tempfile::tempdir().unwrap();
    let embedded = Arc::new(Embedded::open(&dir.path().join("store.redb"), 1 << 20).unwrap());
    let store = Store::on(Arc::clone(&embedded) as Arc<dyn Engine>);
    let ns = store.namespace("svc", 1 << 20);
    ns.set("", "key".into(), vec![0; 100], soon()).unwrap();
    assert!(store.size().unwrap().used > 100);
    // As while it is opened again.
    let mut database = embedded.database.open.write().unwrap();
    assert!(store.size().is_err());
    database.database = None;
    drop(database);
    assert!(store.size().is_err());
    assert!(embedded.database.open.read().unwrap().database.is_none());
    assert!(
        ns.get("", "key", soon()).unwrap().is_some(),
        "a service opens it"
    );
    assert!(store.size().unwrap().used > 100);
}

#[test]
fn a_file_that_a_full_disk_left_empty_is_created_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.redb");
    for size in [0, 73_728] {
        std::fs::write(&file, vec![0; size]).unwrap();
        assert!(matches!(
            Reader::open(&file, 1 << 20, false),
            Err(StoreError::Empty { .. })
        ));
        let store = Store::open(&file, 1 << 20).unwrap();
        assert_eq!(
            namespace(&store).increment("", "n".into(), 1, soon()),
            Ok(1)
        );
        drop(store);
        let again = Store::open(&file, 1 << 20).unwrap();
        assert_eq!(
            namespace(&again).increment("", "n".into(), 1, soon()),
            Ok(2)
        );
    }
    std::fs::write(&file, "values of somebody else").unwrap();
    assert!(Store::open(&file, 1 << 20).is_err());
    assert_eq!(
        std::fs::read(&file).unwrap(),
        b"values of somebody else",
        "not ours to replace"
    );
}

/// Values of 100 bytes under 2,000 keys, in a file that was closed in order.
fn filled() -> (Disk, BTreeMap<String, Vec<u8>>) {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    let ns = store.namespace("svc", 1 << 30);
    let pairs: BTreeMap<_, _> = (0..2000_u32)
        .map(|i| (format!("key{i:05}"), i.to_le_bytes().repeat(25)))
        .collect();
    let all: Vec<_> = pairs.clone().into_iter().collect();
    for chunk in all.chunks(1000) {
        ns.set_many("b", chunk.to_vec(), soon()).unwrap();
    }
    (disk, pairs)
}

/// The entries of a backup.
fn entries(backup: &[u8]) -> BTreeMap<String, Vec<u8>> {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let lines = std::str::from_utf8(backup).unwrap().lines();
    let lines = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines
        .filter_map(|line| {
            let value = BASE64_STANDARD.decode(line["value"].as_str()?).unwrap();
            Some((line["key"].as_str()?.to_owned(), value))
        })
        .collect()
}

#[test]
fn a_file_is_opened_again_once_however_many_saw_the_error() {
    let disk = Disk::new();
    let embedded = Arc::new(Embedded::with(Arc::new(disk.clone()), 1 << 20).unwrap());
    let ns = namespace(&Store::on(Arc::clone(&embedded) as Arc<dyn Engine>));
    ns.set("", "k".into(), vec![1], soon()).unwrap();
    let seen = embedded.database.number();
    disk.lock().full = true;
    let full = ns.set("", "k".into(), vec![2], soon());
    assert!(full.is_err(), "{full:?}");
    disk.lock().full = false;
    assert_eq!(ns.get("", "k", soon()), Ok(Some(vec![1])));
    let now = embedded.database.number();
    assert!(now > seen, "{now}");
    let syncs = disk.syncs();
    embedded.database.reopen(seen).unwrap();
    assert_eq!((embedded.database.number(), disk.syncs()), (now, syncs));
}

#[test]
fn a_damaged_value_is_named_and_never_read_as_another() {
    let (disk, pairs) = filled();
    let sound = disk.read(true).unwrap().check(&mut |lost| panic!("{lost}"));
    assert_eq!((sound.entries, sound.damaged), (2000, 0));
    let before = disk.lock().live.clone();
    let at = |needle: &[u8]| {
        before
            .windows(needle.len())
            .position(|bytes| bytes == needle)
    };
    let at = at(&777_u32.to_le_bytes().repeat(25)).unwrap();
    disk.lock().live[at + 50] ^= 0x40;
    let damaged = disk.lock().live.clone();
    let mut lost = Vec::new();
    let reader = disk.read(true).unwrap();
    let checked = reader.check(&mut |what| lost.push(what.to_owned()));
    assert_eq!((checked.entries, checked.damaged), (1999, 2));
    drop(reader);
    let (backup, count, missing) = disk.export();
    assert!(lost[0].contains("checksums"), "{lost:?}");
    assert!(lost[1].contains("\"key00777\""), "{lost:?}");
    assert!(count == 1999 && missing.len() == 1, "{count} {missing:?}");
    let mut expected = pairs;
    expected.remove("key00777");
    assert_eq!(entries(&backup), expected);
    assert!(disk.lock().live == damaged, "looking changes nothing");
    let store = disk.open().unwrap();
    let ns = store.namespace("svc", 1 << 30);
    assert!(matches!(
        ns.get("b", "key00777", soon()),
        Err(StoreError::Damaged(_))
    ));
    assert_eq!(store.health().damaged(), 1);
    assert!(ns.get("b", "key00778", soon()).unwrap().is_some());
    ns.set("b", "key00777".into(), vec![1], soon()).unwrap();
    assert_eq!(ns.get("b", "key00777", soon()), Ok(Some(vec![1])));
}

#[test]
fn damaged_pages_are_named_and_everything_around_them_is_exported() {
    let (disk, pairs) = filled();
    // Leaves: the pages with many of our keys.
    let leaves: Vec<_> = {
        let live = &disk.lock().live;
        let pages = live.chunks(4096).enumerate();
        let keys = |page: &[u8]| page.windows(7).filter(|bytes| bytes == b"svcbkey").count();
        pages
            .filter(|(_, page)| keys(page) > 10)
            .map(|(at, _)| at * 4096)
            .collect()
    };
    assert!(leaves.len() > 40, "{}", leaves.len());
    // One, several apart, and two neighbours; offsets within a page that hold
    // its kind, its count and where its entries end.
    for hurt in [
        &leaves[9..10],
        &[leaves[3], leaves[20], leaves[37]],
        &leaves[11..13],
    ] {
        for bytes in [0..4, 8..12, 0..4096] {
            let damaged = Disk::new();
            let mut live = disk.lock().live.clone();
            for page in hurt {
                live[page + bytes.start..page + bytes.end].fill(0xff);
            }
            damaged.lock().live = live;
            let (backup, count, lost) = damaged.export();
            let found = entries(&backup);
            assert!(!lost.is_empty() && lost.len() <= 2 * hurt.len(), "{lost:?}");
            assert!(count as usize == found.len(), "each once");
            // A page holds some 30 entries, and stale copies of it are not read.
            let missing = pairs.len() - found.len();
            assert!(
                missing <= 70 * hurt.len(),
                "{missing} {hurt:?} {bytes:?} {lost:?}"
            );
            assert!(found.iter().all(|(key, value)| pairs[key] == *value));
            // A server serves the rest, and says what it can't.
            let Ok(store) = damaged.open() else { continue };
            let ns = store.namespace("svc", 1 << 30);
            let read = |key: &String| ns.get("b", key, soon());
            let served = pairs.iter().filter(|(key, value)| match read(key) {
                Ok(Some(got)) => {
                    assert_eq!(got, **value);
                    true
                }
                _ => false,
            });
            let served = served.count();
            assert!(served + 70 * hurt.len() >= pairs.len(), "{served}");
            // A batch is done whole or not at all, and others go on.
            let whole = |key: &&String| read(key).is_ok();
            let keys = [
                pairs.keys().find(whole),
                pairs.keys().find(|key| !whole(key)),
            ];
            if let [Some(sound), Some(lost)] = keys {
                let batch = [sound, lost].map(|key| (key.clone(), b"new".to_vec()));
                let written = ns.set_many("b", batch.to_vec(), soon());
                let expected = written.map_or(&*pairs[sound], |()| b"new");
                assert_eq!(read(sound), Ok(Some(expected.to_vec())));
                assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(1));
            }
        }
    }
}

impl Disk {
    /// Flushes of redb's file and of the journal so far.
    fn syncs(&self) -> (u32, u32) {
        (self.database.lock().syncs, self.journal.lock().syncs)
    }
}

#[test]
fn a_write_is_one_flush_of_the_journal_and_there_after_a_crash() {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    let ns = namespace(&store);
    ns.set("", "gone".into(), b"1".to_vec(), soon()).unwrap();
    ns.increment("", "n".into(), 1, soon()).unwrap();
    let (database, journal) = disk.syncs();
    assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(2));
    ns.delete("", "gone".into(), soon()).unwrap();
    let now = disk.syncs();
    // Where its file grows, redb makes the length durable at once.
    assert!(now.1 == journal + 2 && now.0 <= database + 1, "{now:?}");
    let other = Some(digest(b"other"));
    assert_eq!(ns.swap("", "n".into(), other, vec![], soon()), Ok(false));
    assert_eq!(disk.syncs(), now, "nothing has changed");
    let size = store.size().unwrap();

    let crashed = disk.after_power_cut(|| false);
    let before = crashed.database.lock().live.clone();
    let (backup, count, lost) = crashed.export();
    assert!(count == 1 && lost.is_empty(), "{lost:?}");
    assert_eq!(entries(&backup)["n"], b"2");
    let checked = crashed
        .read(true)
        .unwrap()
        .check(&mut |lost| panic!("{lost}"));
    assert_eq!((checked.entries, checked.damaged), (1, 0));
    assert!(
        crashed.database.lock().live == before,
        "looking changes nothing"
    );
    // Twice, and once more after an end in order.
    for sum in 3..6 {
        let store = crashed.open().unwrap();
        let ns = namespace(&store);
        assert_eq!(ns.exists("", "gone", soon()), Ok(false));
        assert_eq!(store.size().unwrap().used, size.used);
        assert_eq!(ns.increment("", "n".into(), 1, soon()), Ok(sum));
        if sum < 5 {
            std::mem::forget(store);
        }
    }
    assert!(crashed.journal.lock().live.is_empty());
    let ended = crashed.after_power_cut(|| false);
    assert_eq!(entries(&ended.export().0)["n"], b"5");
}

impl Disk {
    /// Whether flushes of the journal hang from now on.
    fn hangs(&self, hangs: bool) {
        let (state, changed) = &*self.journal.hangs;
        *state.lock().unwrap() = hangs;
        changed.notify_all();
    }
}

/// A store whose journal is there, and hangs.
fn hanging() -> (Disk, Arc<Store>) {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    let first = namespace(&store).set("", "old".into(), b"1".to_vec(), soon());
    first.unwrap();
    disk.hangs(true);
    (disk, store)
}

#[test]
fn a_write_takes_effect_at_once_and_its_writer_waits_for_the_disk() {
    let (disk, store) = hanging();
    let ahead = namespace(&store).ahead();
    for sum in 1..4 {
        assert_eq!(ahead.increment("", "n".into(), 1, soon()), Ok(sum));
    }
    assert_eq!(ahead.get("", "n", soon()), Ok(Some(b"3".to_vec())));
    ahead.delete("", "old".into(), soon()).unwrap();
    assert_eq!(ahead.exists("", "old", soon()), Ok(false));
    let limit = store.namespace("svc", 10).ahead();
    let over = limit.set("", "x".into(), vec![], soon());
    assert!(matches!(over, Err(StoreError::Quota { .. })), "{over:?}");
    let unflushed = ahead.unflushed().unwrap();
    let kept = Arc::new(());
    unflushed.keep(Arc::clone(&kept));
    let (sent, outcome) = mpsc::channel();
    unflushed.then(soon(), move |outcome, _| sent.send(outcome).unwrap());
    let now = Instant::now();
    assert!(matches!(
        unflushed.wait(now),
        Err(StoreError::Unconfirmed(_))
    ));
    assert!(outcome.try_recv().is_err(), "it is not on the disk");
    // What has been seen, rests on the same; other keys don't.
    let reader = namespace(&store).ahead();
    reader.get("", "n", soon()).unwrap();
    assert!(reader.unflushed().unwrap().wait(now).is_err());
    let reader = namespace(&store).ahead();
    reader.get("", "other", soon()).unwrap();
    assert!(reader.unflushed().is_none());
    // Several keys are read from the disk, for which one should wait.
    let readers = namespace(&store);
    assert!(readers.unflushed_of("other").is_none());
    assert!(readers.unflushed_of("").unwrap().wait(now).is_err());
    assert_eq!(readers.list("", "", None, now).unwrap().keys, ["old"]);
    let (sent, expired) = mpsc::channel();
    unflushed.then(now, move |outcome, _| sent.send(outcome).unwrap());
    store.tend();
    let expired = expired.recv().unwrap();
    assert!(matches!(expired, Err(StoreError::Unconfirmed(_))));
    assert_eq!(disk.after_power_cut(|| false).export().1, 1);
    assert_eq!(Arc::strong_count(&kept), 2);
    disk.hangs(false);
    assert_eq!(outcome.recv().unwrap(), Ok(()));
    assert_eq!(
        Arc::strong_count(&kept),
        1,
        "it is released before others hear"
    );
    let crashed = disk.after_power_cut(|| false);
    assert_eq!(entries(&crashed.export().0)["n"], b"3");
    let listed = namespace(&store).list("", "", None, soon()).unwrap();
    assert_eq!(listed.keys, ["n"]);
}

#[test]
fn what_fails_takes_with_it_what_was_done_on_top() {
    let (disk, store) = hanging();
    let add = || {
        let ahead = namespace(&store).ahead();
        let sum = ahead.increment("", "n".into(), 1, soon());
        (sum, ahead.unflushed().unwrap())
    };
    let first = add();
    let deadline = soon();
    while disk.journal.lock().pending.is_empty() {
        assert!(Instant::now() < deadline, "its record is written");
        std::thread::yield_now();
    }
    let second = add();
    assert_eq!((&first.0, &second.0), (&Ok(1), &Ok(2)));
    disk.lock().full = true;
    disk.journal.lock().full = true;
    disk.database.power.lock().unwrap().cut_at = Some(0);
    disk.hangs(false);
    assert!(first.1.wait(soon()).is_err() && second.1.wait(soon()).is_err());
    // One who has seen them learns it, also after the next success.
    disk.lock().full = false;
    disk.journal.lock().full = false;
    *disk.database.power.lock().unwrap() = Power::default();
    let mut seen = Some(second.1);
    let (third, unflushed) = add();
    // The record of the first was written, and not flushed.
    assert_eq!(third, Ok(2), "the second is not there");
    Unflushed::join(&mut seen, unflushed.clone());
    assert_eq!(unflushed.wait(soon()), Ok(()));
    assert!(seen.unwrap().wait(soon()).is_err());
}

#[test]
fn who_writes_while_the_disk_is_slow_waits_for_it_first() {
    let (disk, store) = hanging();
    let ahead = namespace(&store).ahead();
    ahead.increment("", "n".into(), 1, soon()).unwrap();
    // Until the group is taken, and its flush has taken too long.
    let deadline = soon();
    while ahead.backlog().is_none() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let late = Instant::now();
    assert_eq!(
        ahead.increment("", "n".into(), 1, late),
        Err(StoreError::Busy),
        "nothing is done whose time is over"
    );
    disk.hangs(false);
    if let Some(backlog) = ahead.backlog() {
        backlog.wait(soon()).unwrap();
    }
    assert_eq!(
        namespace(&store).increment("", "n".into(), 0, soon()),
        Ok(1)
    );
}

#[test]
fn the_end_waits_for_what_is_not_on_the_disk() {
    let (disk, store) = hanging();
    let ahead = namespace(&store).ahead();
    ahead.increment("", "n".into(), 7, soon()).unwrap();
    let ends = std::thread::spawn(move || store.end());
    disk.hangs(false);
    ends.join().unwrap();
    assert!(disk.journal.lock().live.is_empty(), "all is in one file");
    assert_eq!(entries(&disk.export().0)["n"], b"7");
    drop(ahead);
}

#[test]
fn writers_beside_each_other_are_all_counted() {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    let adds = |_| {
        let ns = namespace(&store);
        std::thread::spawn(move || {
            let one = || ns.increment("", "n".into(), 1, soon()).unwrap();
            (0..100).map(|_| one()).collect::<Vec<_>>()
        })
    };
    let threads: Vec<_> = (0..8).map(adds).collect();
    let threads = threads.into_iter().map(|thread| thread.join().unwrap());
    let mut sums: Vec<_> = threads.flatten().collect();
    sums.sort_unstable();
    assert!(sums.into_iter().eq(1..=800), "each once");
    let crashed = disk.after_power_cut(|| false);
    assert_eq!(entries(&crashed.export().0)["n"], b"800");
}

#[test]
fn a_journal_that_is_missing_or_damaged_is_named_and_nothing_is_rolled_back() {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    let ns = namespace(&store);
    ns.set("", "old".into(), b"1".to_vec(), soon()).unwrap();
    for key in ["a", "b", "c"] {
        ns.set("", key.into(), b"1".to_vec(), soon()).unwrap();
    }
    type Harm = fn(&mut Vec<u8>);
    let harms: [(Harm, u64); 3] = [
        (Vec::clear, 1),
        (|journal| journal[20] ^= 1, 1),
        // The second of three records.
        (|journal| journal[2 * 4096 + 40] ^= 1, 2),
    ];
    for (harm, kept) in harms {
        let crashed = disk.after_power_cut(|| false);
        harm(&mut crashed.journal.lock().live);
        let opened = crashed.open().map(drop);
        assert!(matches!(opened, Err(StoreError::Broken(_))), "{opened:?}");
        let (_, count, lost) = crashed.export();
        assert_eq!((count, lost.len()), (kept, 1), "{lost:?}");
        assert!(lost[0].contains("journal"), "{lost:?}");
    }
}

#[test]
fn with_little_room_or_large_values_redb_is_flushed_at_once() {
    let disk = Disk::new();
    let store = disk.open().unwrap();
    let ns = store.namespace("svc", 1 << 30);
    ns.increment("", "n".into(), 1, soon()).unwrap();
    let (_, journal) = disk.syncs();
    ns.set("", "large".into(), vec![1; MAX_VALUE], soon())
        .unwrap();
    assert_eq!(disk.syncs().1, journal);
    ns.increment("", "n".into(), 1, soon()).unwrap();
    assert_eq!(disk.syncs().1, journal + 1);
    let crashed = disk.after_power_cut(|| false);
    let ns = crashed.open().unwrap().namespace("svc", 1 << 30);
    assert_eq!(ns.increment("", "n".into(), 0, soon()), Ok(2));
    assert!(ns.exists("", "large", soon()).unwrap());
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
        let disk = Disk::new();
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
                disk.database.power.lock().unwrap().cut_at = Some(cut_at);
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
        let keys = ns.list("", "", None, soon()).unwrap().keys.into_iter().filter(|key| key != "n");
        let found: BTreeMap<_, _> = keys.map(|key| (key.clone(), ns.get("", &key, soon()).unwrap().unwrap())).collect();
        prop_assert!(found == after || (!acknowledged && found == before), "acknowledged: {}", acknowledged);
        prop_assert_eq!(ns.increment("", "n".into(), 0, soon()), Ok(counted));
    }
}

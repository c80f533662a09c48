//! Backup of what an engine holds, in the same lines as that of a file. Entries
//! are read by scanning, each as it is at its time.

use std::{
    io::{self, BufRead, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use redis::{Cmd, Value, cmd};

use super::{Remote, SCAN, strings, unexpected};
use crate::store::{
    Change, Checked, Engine as _, MAX_BATCH_BYTES, Op, Pairs, StoreError, entry,
    transfer::{Line, entry_line, first_line, line, not_empty, read_entries},
};

/// Entries that one step reads, about.
const STEP: usize = 8;
/// Names of keys that one step reads, about.
const STEP_KEYS: usize = 1000;
/// Longest answer of a step, in bytes.
const MAX_STEP: usize = 16 * MAX_BATCH_BYTES;
/// Time for one step.
const STEP_TIME: Duration = Duration::from_secs(10);
/// Entries that are written at once, and their bytes.
const MAX_GROUP: usize = 100;
const MAX_GROUP_BYTES: usize = 1024 * 1024;

/// An entry: its name, its value, and when it ends.
type Found = (Vec<u8>, Vec<u8>, Option<u64>);
/// Values of one bucket: its service, its name, and they.
type Group = (Arc<str>, Box<str>, Pairs);

impl Remote {
    pub(super) fn write_backup(&self, out: &mut dyn Write) -> io::Result<Checked> {
        line(out, &first_line())?;
        let mut entries = 0;
        for service in self.stored_services().map_err(io::Error::other)? {
            let mut cursor = b"0".to_vec();
            let mut home = None;
            loop {
                let (next, found) = self.step(&service, &cursor).map_err(io::Error::other)?;
                // A cursor is of the process that gave it.
                let now = self.nodes.home(&service);
                if home.get_or_insert_with(|| now.clone()) != &now {
                    let why = format!("the values of {service} moved meanwhile; export again");
                    return Err(io::Error::other(StoreError::Away(why)));
                }
                for (name, value, ends) in found {
                    let (bucket, key) = split(&name).map_err(io::Error::other)?;
                    line(out, &entry_line((&service, bucket, key), &value, ends))?;
                    entries += 1;
                }
                cursor = next;
                if cursor == b"0" {
                    break;
                }
            }
        }
        let damaged = 0;
        line(out, &Line::Last { entries, damaged })?;
        out.flush()?;
        Ok(Checked { entries, damaged })
    }

    /// Services that have values, wherever they are.
    fn stored_services(&self) -> Result<Vec<Arc<str>>, StoreError> {
        let mut services = Vec::new();
        for node in self.nodes.all(Instant::now() + STEP_TIME)? {
            let mut cursor = b"0".to_vec();
            loop {
                let mut scan = cmd("SCAN");
                scan.arg(&cursor).arg("MATCH").arg("mb:{*}:values");
                scan.arg("COUNT").arg(STEP_KEYS);
                let deadline = Instant::now() + STEP_TIME;
                let (next, keys) = scanned(self.nodes.ask_at(&node, &scan, MAX_STEP, deadline)?)?;
                let names = keys.into_iter().filter_map(|key| {
                    let key = String::from_utf8(key).ok()?;
                    Some(Arc::<str>::from(
                        key.strip_prefix("mb:{")?.strip_suffix("}:values")?,
                    ))
                });
                services.extend(names);
                cursor = next;
                if cursor == b"0" {
                    break;
                }
            }
        }
        services.sort();
        services.dedup();
        Ok(services)
    }

    /// Some entries of a service, each with its end, and where to go on.
    fn step(&self, service: &Arc<str>, cursor: &[u8]) -> Result<(Vec<u8>, Vec<Found>), StoreError> {
        let arguments = |command: &mut Cmd| {
            command.arg(cursor).arg(STEP);
        };
        let deadline = Instant::now() + STEP_TIME;
        let answer = self.run(service, &SCAN, &arguments, MAX_STEP, deadline)?;
        let mut parts = strings(answer)?.into_iter().flatten();
        let next = parts.next().ok_or_else(unexpected)?;
        let mut found = Vec::new();
        while let (Some(name), Some(value), Some(end)) = (parts.next(), parts.next(), parts.next())
        {
            let end = std::str::from_utf8(&end).ok();
            let end = end.and_then(|text| text.parse::<f64>().ok());
            found.push((name, value, end.map(|end| end as u64)));
        }
        Ok((next, found))
    }

    /// Group by group: an engine has no transaction over all of it.
    pub(super) fn read_backup(
        &self,
        input: &mut dyn BufRead,
        merge: bool,
    ) -> Result<u64, StoreError> {
        if !merge && !self.stored_services()?.is_empty() {
            return Err(not_empty());
        }
        let (mut group, mut bytes, mut written) = (None::<Group>, 0, 0);
        let read = read_entries(input, |(service, bucket, key), value, ends| {
            let fits = group.as_ref().is_some_and(|(of, place, pairs)| {
                **of == *service
                    && **place == *bucket
                    && pairs.len() < MAX_GROUP
                    && bytes < MAX_GROUP_BYTES
            });
            if !fits || ends.is_some() {
                written += self.write_group(group.take())?;
                bytes = 0;
            }
            let key = key.to_owned();
            if let Some(end) = ends {
                let life = end.saturating_sub(entry::now());
                if life > 0 {
                    let life = Duration::from_millis(life);
                    self.write_one(service, bucket, Change::SetFor { key, value, life })?;
                }
                written += 1;
                return Ok(());
            }
            bytes += value.len();
            let (_, _, pairs) =
                group.get_or_insert_with(|| (service.into(), bucket.into(), Vec::new()));
            pairs.push((key, Some(value)));
            Ok(())
        });
        match read.and_then(|_| self.write_group(group.take())) {
            Ok(last) => Ok(written + last),
            Err(error) if written == 0 => Err(error),
            Err(error) => Err(StoreError::ImportedPart {
                entries: written,
                why: error.to_string(),
            }),
        }
    }

    fn write_group(&self, group: Option<Group>) -> Result<u64, StoreError> {
        let Some((service, bucket, pairs)) = group else {
            return Ok(0);
        };
        let count = pairs.len() as u64;
        self.write_one(&service, &bucket, Change::Put(pairs))?;
        Ok(count)
    }

    fn write_one(&self, service: &str, bucket: &str, change: Change) -> Result<(), StoreError> {
        let op = Op {
            service: service.into(),
            // Whatever the service may have: it had it before.
            quota: u64::MAX,
            bucket: bucket.into(),
            change,
        };
        self.write(&op, Instant::now() + STEP_TIME).map(drop)
    }
}

/// The bucket and the key in the name of an entry.
fn split(name: &[u8]) -> Result<(&str, &str), StoreError> {
    let name = std::str::from_utf8(name).map_err(|_| unexpected())?;
    name.split_once('\0').ok_or_else(unexpected)
}

/// Where a scan goes on, and what it found.
fn scanned(answer: Value) -> Result<(Vec<u8>, Vec<Vec<u8>>), StoreError> {
    let Value::Array(parts) = answer else {
        return Err(unexpected());
    };
    let [cursor, found] = <[Value; 2]>::try_from(parts).map_err(|_| unexpected())?;
    let Value::BulkString(cursor) = cursor else {
        return Err(unexpected());
    };
    Ok((cursor, strings(found)?.into_iter().flatten().collect()))
}

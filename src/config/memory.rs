//! One number for the memory of the whole server, and what follows from it.

use std::fmt::Display;

use super::{Bytes, Config, OutOfBounds};

/// What a pooled instance keeps resident between two calls: memory and tables.
/// Covers all that a service written with the SDK has.
pub const KEPT_MEMORY: Bytes = Bytes::kib(512);
/// See [`KEPT_MEMORY`].
pub const KEPT_TABLES: Bytes = Bytes::kib(64);
/// First size of a connection's read buffer.
pub const READ_BUFFER: Bytes = Bytes::kib(8);
/// What a connection costs beside its read buffer: touched stack, write
/// buffer and what the allocator keeps for its thread. Measured with a
/// thousand connections that had each called a service: 43 KiB, the read
/// buffer included.
const CONNECTION: Bytes = Bytes::kib(56);
/// What TLS adds to it: keys, and a record each way while it is busy.
const TLS: Bytes = Bytes::kib(40);
/// Connections that are derived at most.
const MAX_DERIVED_CONNECTIONS: usize = 1024;
/// Instances that are derived at most: each reserves three memories of 4 GiB
/// of address space, of which there are 128 TiB.
const MAX_INSTANCES: usize = 8_000;
/// Bytes for the operator that are derived at most.
const MAX_ADMIN: usize = 64 * 1024 * 1024;
/// Bytes for the calls of the past that are derived at most.
const MAX_HISTORY: usize = 8 * 1024 * 1024;
/// Linear memory of an instance where no setting says another.
const DEFAULT_INSTANCE: Bytes = Bytes::mib(64);

/// How the memory is divided. A quarter at most goes to connections, a
/// quarter at most to what instances keep, a sixteenth to the operator and
/// half of that to the calls of the past; the rest is shared by everything that
/// grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The whole, in bytes.
    pub total: usize,
    /// Connections at the same time.
    pub connections: usize,
    /// Bytes of one connection.
    pub per_connection: usize,
    /// Instances at the same time.
    pub instances: usize,
    /// Bytes that one instance keeps.
    pub per_instance: usize,
    /// Bytes for requests and answers of the admin endpoint: a reader gets an
    /// answer when all else is taken.
    pub admin: usize,
    /// Bytes for calls that failed or were slow.
    pub history: usize,
    /// Bytes of shared memory: memory of guests beyond what instances keep,
    /// large messages and answers.
    pub shared: usize,
}

impl MemoryPlan {
    /// Derives it from the settings.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let total = config.memory.0;
        let tls = if config.tls.is_on() { TLS.0 } else { 0 };
        let per_connection = CONNECTION.0 + READ_BUFFER.0 + tls;
        let connections = match config.max_connections {
            0 => (total / 4 / per_connection).clamp(1, MAX_DERIVED_CONNECTIONS),
            set => set,
        };
        let per_instance = KEPT_MEMORY.0 + KEPT_TABLES.0;
        let instances = (total / 4 / per_instance).clamp(1, MAX_INSTANCES);
        let (admin, history) = ((total / 16).min(MAX_ADMIN), (total / 32).min(MAX_HISTORY));
        let taken = connections
            .saturating_mul(per_connection)
            .saturating_add(instances * per_instance + admin + history);
        Self {
            total,
            connections,
            per_connection,
            instances,
            per_instance,
            admin,
            history,
            shared: total.saturating_sub(taken),
        }
    }

    /// Linear memory of an instance of a service whose settings name none.
    #[must_use]
    pub fn default_instance(&self) -> Bytes {
        // Whole pages of WebAssembly.
        Bytes(DEFAULT_INSTANCE.0.min(self.shared / 3 * 2) / (64 * 1024) * (64 * 1024))
    }

    /// The division in words, and what is not in it.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0));
        let Self {
            total,
            connections,
            per_connection,
            instances,
            per_instance,
            admin,
            history,
            shared,
        } = *self;
        vec![
            format!("{} in all, of which", mib(total)),
            format!(
                "{} for {connections} connections of {} KiB",
                mib(connections * per_connection),
                per_connection / 1024
            ),
            format!(
                "{} for {instances} instances that keep {} KiB",
                mib(instances * per_instance),
                per_instance / 1024
            ),
            format!("{} for the operator: the admin endpoint and past calls", mib(admin + history)),
            format!("{} shared by services, large messages and answers", mib(shared)),
            "not counted: the program and compiled code, the kernel's stacks, socket buffers and page cache".into(),
        ]
    }

    /// Settings that do not fit into the memory, and with how much they would.
    #[must_use]
    pub fn conflicts(&self, config: &Config) -> Vec<OutOfBounds> {
        let Self {
            total,
            connections,
            per_connection,
            shared,
            ..
        } = *self;
        let conflict = |key: String, value: &dyn Display, most: &dyn Display, needed: usize| {
            let (total, needed) = (Bytes(total), Bytes(round_up(needed)));
            let problem = format!(
                "is {value}; memory = {total} has room for {most}: set memory to at least {needed}"
            );
            OutOfBounds { key, problem }
        };
        let mut conflicts = Vec::new();
        let (all, quarter) = (connections * per_connection, total / 4);
        if all > quarter {
            let most = quarter / per_connection;
            conflicts.push(conflict(
                "max_connections".into(),
                &connections,
                &most,
                4 * all,
            ));
        }
        // Of any memory, two fifths or more are shared.
        let largest = shared + KEPT_MEMORY.0;
        for (name, settings) in &config.services {
            if let Some(memory) = settings.memory.filter(|memory| memory.0 > largest) {
                let key = format!("services.{name}.memory");
                conflicts.push(conflict(
                    key,
                    &memory,
                    &whole_mib(largest),
                    memory.0 / 2 * 5,
                ));
            }
        }
        let size = config.max_message_size;
        if conflicts.is_empty() && size.0.saturating_mul(2) > shared {
            let key = "max_message_size".into();
            conflicts.push(conflict(key, &size, &whole_mib(shared / 2), size.0 * 5));
        }
        conflicts
    }
}

/// What is easier to read, and not more than there is.
fn whole_mib(bytes: usize) -> Bytes {
    const MIB: usize = 1024 * 1024;
    Bytes(if bytes >= MIB {
        bytes / MIB * MIB
    } else {
        bytes
    })
}

/// To the next whole MiB.
fn round_up(bytes: usize) -> usize {
    bytes.next_multiple_of(1024 * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ServiceSettings;

    fn config(memory: Bytes) -> Config {
        Config {
            memory,
            ..Config::default()
        }
    }

    #[test]
    fn the_parts_make_the_whole() {
        for mib in [32, 64, 256, 1024, 65536] {
            let config = config(Bytes::mib(mib));
            let plan = MemoryPlan::of(&config);
            let MemoryPlan {
                total,
                connections,
                per_connection,
                instances,
                per_instance,
                admin,
                history,
                shared,
            } = plan;
            assert_eq!(
                connections * per_connection + instances * per_instance + admin + history + shared,
                total
            );
            assert!(shared >= total / 5 * 2);
            assert_eq!(plan.conflicts(&config), [], "{mib}");
        }
        assert_eq!(MemoryPlan::of(&Config::default()).connections, 1024);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_arithmetic() {
        let check = |config: Config, key: &str, part: &str| {
            let conflicts = MemoryPlan::of(&config).conflicts(&config);
            assert_eq!(conflicts.len(), 1, "{conflicts:?}");
            assert_eq!(conflicts[0].key, key);
            let problem = &conflicts[0].problem;
            assert!(problem.contains(part), "{problem}");
            let (_, needed) = problem.rsplit_once(' ').unwrap();
            let memory = serde_json::from_value(needed.into()).unwrap();
            let config = Config { memory, ..config };
            assert_eq!(MemoryPlan::of(&config).conflicts(&config), [], "{problem}");
        };
        let many = Config {
            max_connections: 2048,
            ..config(Bytes::mib(256))
        };
        check(
            many,
            "max_connections",
            "room for 1024: set memory to at least 512MiB",
        );
        let mut large = config(Bytes::mib(256));
        large.services.insert(
            "big".into(),
            ServiceSettings {
                memory: Some(Bytes::mib(512)),
                ..ServiceSettings::default()
            },
        );
        check(large, "services.big.memory", "is 512MiB");
        let mut small = config(Bytes::mib(64));
        small.services.insert(
            "big".into(),
            ServiceSettings {
                memory: Some(Bytes::mib(100)),
                ..ServiceSettings::default()
            },
        );
        check(small, "services.big.memory", "is 100MiB");
        let messages = Config {
            max_message_size: Bytes::mib(64),
            ..config(Bytes::mib(64))
        };
        check(
            messages,
            "max_message_size",
            "room for 13MiB: set memory to at least 320MiB",
        );
    }
}

//! The snapshot in Prometheus' text format.

use std::{
    fmt::{Display, Write as _},
    fs,
};

use crate::metrics::{
    ProtocolUse,
    snapshot::{Distribution, PrincipalRow, ServiceRow, Snapshot, StoreRow, Totals},
};

/// Name, kind and meaning of each metric, one a line.
const METRICS: &str = include_str!("metrics.txt");

type Labels<'a> = Vec<(&'a str, &'a str)>;

pub(super) fn render(snapshot: &Snapshot) -> String {
    let Snapshot {
        totals,
        principals,
        services,
        store,
        ..
    } = snapshot;
    let mut text = Text(String::new());
    text.totals(totals);
    text.principals(principals);
    let loaded: Vec<_> = services
        .iter()
        .filter(|service| service.state != "failed")
        .collect();
    let failed = services.iter().filter(|service| service.error.is_some());
    text.value("mb_services", loaded.len());
    text.value("mb_services_failed", failed.count());
    text.services(&loaded);
    text.store(store.as_ref());
    text.process();
    text.0
}

/// What is written so far.
struct Text(String);

impl Text {
    /// The comments before the lines of a metric.
    fn head(&mut self, name: &str) {
        let about =
            |line: &'static str| line.strip_prefix(name)?.strip_prefix(' ')?.split_once(' ');
        if let Some((kind, help)) = METRICS.lines().find_map(about) {
            let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        }
    }

    /// One that has no labels.
    fn value(&mut self, name: &str, value: impl Display) {
        self.family(name, [(Labels::new(), value)]);
    }

    /// All lines of one that has labels.
    fn family<'a, V: Display>(
        &mut self,
        name: &str,
        samples: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) {
        self.head(name);
        for (labels, value) in samples {
            self.line(name, &labels, value);
        }
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<_> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
            .collect();
        let _ = match labels.as_slice() {
            [] => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{}}} {value}", labels.join(",")),
        };
    }

    fn totals(&mut self, totals: &Totals) {
        let Totals {
            uptime_seconds,
            connections,
            protocols,
            max_connections,
            threads,
            memory,
            max_memory,
            accepted,
            refused,
            accept_errors,
            truncated,
            write_timeouts,
            publish_failures,
            denied,
            evicted,
            calls_reset,
            calls_running,
            calls_waiting,
            handshake_failures,
            auth_failures,
            bytes_in,
            bytes_out,
            messages_in,
            messages_out,
            keep_alives,
            errors,
        } = totals;
        self.value("mb_uptime_seconds", uptime_seconds);
        for (name, value) in [
            ("mb_connections", connections),
            ("mb_connections_max", max_connections),
            ("mb_threads", threads),
            ("mb_memory_bytes", memory),
            ("mb_memory_max_bytes", max_memory),
            ("mb_connections_accepted_total", accepted),
            ("mb_connections_refused_total", refused),
            ("mb_accept_errors_total", accept_errors),
            ("mb_truncated_messages_total", truncated),
            ("mb_write_timeouts_total", write_timeouts),
            ("mb_publish_failures_total", publish_failures),
            ("mb_calls_reset_total", calls_reset),
            ("mb_calls_running", calls_running),
            ("mb_calls_waiting_to_run", calls_waiting),
            ("mb_connections_denied_total", denied),
            ("mb_connections_evicted_total", evicted),
            ("mb_received_bytes_total", bytes_in),
            ("mb_sent_bytes_total", bytes_out),
            ("mb_received_messages_total", messages_in),
            ("mb_sent_messages_total", messages_out),
            ("mb_keep_alives_total", keep_alives),
            ("mb_log_lines_dropped_total", &crate::log::dropped_lines()),
        ] {
            self.value(name, value);
        }
        type Value = fn(&ProtocolUse) -> u64;
        let by_protocol: [(_, Value); 3] = [
            ("mb_protocol_connections", |used| used.open),
            ("mb_protocol_connections_total", |used| used.connections),
            ("mb_protocol_requests_total", |used| used.requests),
        ];
        for (name, value) in by_protocol {
            let sample = |(protocol, used): &(&'static str, ProtocolUse)| {
                (vec![("protocol", *protocol)], value(used))
            };
            self.family(name, protocols.iter().map(sample));
        }
        for (name, label, counts) in [
            ("mb_handshake_failures_total", "reason", handshake_failures),
            ("mb_auth_failures_total", "reason", auth_failures),
            ("mb_errors_total", "code", errors),
        ] {
            let samples = counts.iter().map(|(of, count)| (vec![(label, *of)], count));
            self.family(name, samples);
        }
    }

    fn principals(&mut self, rows: &[PrincipalRow]) {
        let samples = rows.iter().map(|row| (principal_of(row), row.cpu_seconds));
        self.family("mb_principal_cpu_seconds_total", samples);
        let samples = rows
            .iter()
            .map(|row| (principal_of(row), row.usage.requests));
        self.family("mb_principal_requests_total", samples);
        let samples = rows.iter().flat_map(|row| {
            let bytes = [("in", row.usage.bytes_in), ("out", row.usage.bytes_out)];
            bytes.map(|(direction, bytes)| (with(principal_of(row), "direction", direction), bytes))
        });
        self.family("mb_principal_bytes_total", samples);
        let samples = rows
            .iter()
            .map(|row| (principal_of(row), row.usage.host_calls));
        self.family("mb_principal_host_calls_total", samples);
    }

    fn services(&mut self, rows: &[&ServiceRow]) {
        type Value = fn(&ServiceRow) -> u64;
        let counters: [(&str, Value); 8] = [
            ("mb_calls_total", |row| row.calls),
            ("mb_call_failures_total", |row| row.failures),
            ("mb_call_errors_total", |row| row.errors),
            ("mb_instances_created_total", |row| row.instances),
            ("mb_host_calls_total", |row| row.host_calls),
            ("mb_resets_verified_total", |row| row.verified_resets),
            ("mb_reset_defects_total", |row| row.reset_defects),
            ("mb_peak_memory_bytes", |row| row.peak_memory),
        ];
        for (name, value) in counters {
            self.family(name, rows.iter().map(|row| (version_of(row), value(row))));
        }
        let samples = rows.iter().flat_map(|row| {
            let bytes = [("in", row.bytes_in), ("out", row.bytes_out)];
            bytes.map(|(direction, bytes)| (with(version_of(row), "direction", direction), bytes))
        });
        self.family("mb_service_bytes_total", samples);
        // All versions of a name are one, and follow each other.
        let mut seen = "";
        let first = rows.iter().filter(|row| {
            row.version.is_some() && std::mem::replace(&mut seen, &row.name) != row.name
        });
        let samples = first.map(|row| (vec![("service", &*row.name)], row.cpu_seconds));
        self.family("mb_cpu_seconds_total", samples);
        self.head("mb_call_duration_seconds");
        for row in rows {
            for (outcome, durations) in &row.durations {
                let labels = with(version_of(row), "outcome", outcome);
                self.distribution("mb_call_duration_seconds", &labels, durations);
            }
        }
        self.head("mb_call_wait_seconds");
        for row in rows {
            self.distribution("mb_call_wait_seconds", &version_of(row), &row.waits);
        }
    }

    fn store(&mut self, store: Option<&StoreRow>) {
        let failing = store.is_some_and(|store| store.status != "ok");
        self.value("mb_store_failing", u8::from(failing));
        let count = |count: fn(&StoreRow) -> u64| store.map_or(0, count);
        let failures = [
            (vec![("reason", "disk-full")], count(|store| store.full)),
            (vec![("reason", "error")], count(|store| store.failed)),
        ];
        self.family("mb_store_write_failures_total", failures);
        self.value("mb_store_damaged_reads_total", count(|store| store.damaged));
        if let Some(bytes) = store.and_then(|store| store.used_bytes) {
            self.value("mb_store_used_bytes", bytes);
        }
        if let Some(bytes) = store.and_then(|store| store.file_bytes) {
            self.value("mb_store_file_bytes", bytes);
        }
    }

    /// The usual metrics of a process; zeros where the system does not tell.
    fn process(&mut self) {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // Behind the name, which may hold spaces; its third field is the state.
        let fields: Vec<u64> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_ascii_whitespace()
            .map(|f| f.parse().unwrap_or(0))
            .collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
        #[allow(clippy::cast_precision_loss, reason = "seconds of processor time")]
        let seconds =
            (field(14) + field(15)) as f64 / rustix::param::clock_ticks_per_second() as f64;
        self.value("process_cpu_seconds_total", seconds);
        let page = rustix::param::page_size() as u64;
        self.value("process_resident_memory_bytes", field(24) * page);
        self.value("process_virtual_memory_bytes", field(23));
        self.value("process_threads", field(20));
        let files = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        self.value("process_open_fds", files);
    }

    /// A histogram without its head.
    fn distribution(&mut self, name: &str, labels: &[(&str, &str)], durations: &Distribution) {
        let Distribution {
            buckets,
            seconds,
            count,
        } = durations;
        let bucket = format!("{name}_bucket");
        for (bound, seen) in buckets {
            let bound = bound.to_string();
            self.line(&bucket, &[labels, &[("le", &*bound)]].concat(), *seen);
        }
        // One that has never counted has no bounds but this.
        self.line(&bucket, &[labels, &[("le", "+Inf")]].concat(), *count);
        self.line(&format!("{name}_sum"), labels, *seconds);
        self.line(&format!("{name}_count"), labels, *count);
    }
}

fn principal_of(row: &PrincipalRow) -> Labels<'_> {
    vec![("principal", &*row.name)]
}

fn version_of(row: &ServiceRow) -> Labels<'_> {
    let version = row.version.as_deref().unwrap_or_default();
    vec![("service", &*row.name), ("version", version)]
}

fn with<'a>(mut labels: Labels<'a>, label: &'a str, value: &'a str) -> Labels<'a> {
    labels.push((label, value));
    labels
}

/// A value of a label: a client certificate may name a principal.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', r"\\").replace('"', r#"\""#);
    value.replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_value_ends_its_quotes() {
        let mut text = Text(String::new());
        text.line("mb_x", &[("principal", "o\"b\\r\n")], 1);
        assert_eq!(text.0, "mb_x{principal=\"o\\\"b\\\\r\\n\"} 1\n");
    }

    #[test]
    fn each_metric_is_described_and_each_description_is_of_one() {
        let store = StoreRow {
            status: "ok",
            error: None,
            full: 0,
            failed: 0,
            damaged: 0,
            used_bytes: Some(1),
            file_bytes: Some(1),
        };
        let text = render(&Snapshot {
            store: Some(store),
            ..crate::admin::tests::admin().operations.snapshot()
        });
        let heads = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let heads: BTreeSet<_> = heads.filter_map(|head| head.split(' ').next()).collect();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let samples: BTreeSet<_> = samples
            .filter_map(|line| line.split([' ', '{']).next())
            .collect();
        assert!(
            samples.is_subset(&heads),
            "{:?}",
            samples.difference(&heads)
        );
        let described = METRICS.lines().filter_map(|line| line.split(' ').next());
        assert_eq!(described.collect::<BTreeSet<_>>(), heads);
    }
}

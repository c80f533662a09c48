//! The snapshot in Prometheus' text format.

use std::{fmt::Write as _, fs};

use crate::metrics::{
    ProtocolUse, Usage,
    snapshot::{Distribution, PrincipalRow, ServiceRow, Snapshot, StoreRow, Totals},
};

/// Every metric, with its help and type.
pub(super) fn render(snapshot: &Snapshot) -> String {
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
    } = &snapshot.totals;
    let mut text = Text(String::new());
    text.gauge(
        "mb_uptime_seconds",
        "Time since the start of the server.",
        *uptime_seconds,
    );
    text.gauge("mb_connections", "Open connections.", *connections);
    text.gauge(
        "mb_connections_max",
        "Most connections at a time.",
        *max_connections,
    );
    text.gauge("mb_threads", "Threads that serve connections.", *threads);
    text.gauge(
        "mb_memory_bytes",
        "Shared memory in use by services, large messages and answers.",
        *memory,
    );
    text.gauge(
        "mb_memory_max_bytes",
        "Size of the shared memory.",
        *max_memory,
    );
    text.counter(
        "mb_connections_accepted_total",
        "Connections accepted.",
        *accepted,
    );
    text.counter(
        "mb_connections_refused_total",
        "Connections refused with SERVER_BUSY.",
        *refused,
    );
    text.counter(
        "mb_accept_errors_total",
        "Errors of the accept call.",
        *accept_errors,
    );
    text.counter(
        "mb_truncated_messages_total",
        "Messages cut off by the end of their stream.",
        *truncated,
    );
    text.counter(
        "mb_write_timeouts_total",
        "Connections whose peer took no answer in time.",
        *write_timeouts,
    );
    text.counter(
        "mb_publish_failures_total",
        "Failed PUBLISH messages that no client was notified of.",
        *publish_failures,
    );
    text.counter(
        "mb_calls_reset_total",
        "Calls stopped because their client had reset its connection.",
        *calls_reset,
    );
    text.gauge("mb_calls_running", "Long calls that run.", *calls_running);
    text.gauge(
        "mb_calls_waiting_to_run",
        "Long calls that wait for a processor.",
        *calls_waiting,
    );
    let name = "mb_principal_cpu_seconds_total";
    text.head(name, "Processor time of calls by principal.", "counter");
    for row in &snapshot.principals {
        text.line(name, &[("principal", &row.name)], row.cpu_seconds);
    }
    text.usages(&snapshot.principals);
    text.counter(
        "mb_connections_denied_total",
        "Connections from an address that is denied.",
        *denied,
    );
    text.counter(
        "mb_connections_evicted_total",
        "Unauthenticated connections evicted to free capacity for others.",
        *evicted,
    );
    text.protocols(protocols);
    for (name, help, counts) in [
        (
            "mb_handshake_failures_total",
            "Failed handshakes, by reason.",
            handshake_failures,
        ),
        (
            "mb_auth_failures_total",
            "Peers that failed to authenticate, by reason.",
            auth_failures,
        ),
    ] {
        text.head(name, help, "counter");
        for (reason, count) in counts {
            text.line(name, &[("reason", reason)], *count);
        }
    }
    text.counter("mb_received_bytes_total", "Bytes read.", *bytes_in);
    text.counter("mb_sent_bytes_total", "Bytes written.", *bytes_out);
    text.counter(
        "mb_received_messages_total",
        "Whole messages read.",
        *messages_in,
    );
    text.counter("mb_sent_messages_total", "Messages written.", *messages_out);
    text.counter(
        "mb_keep_alives_total",
        "Keep-alive frames read.",
        *keep_alives,
    );
    text.counter(
        "mb_log_lines_dropped_total",
        "Lines of the log that standard error did not take in time.",
        crate::log::dropped_lines(),
    );
    text.head(
        "mb_errors_total",
        "ERRORs by code, SERVICE for the services' own.",
        "counter",
    );
    for (code, count) in errors {
        text.line("mb_errors_total", &[("code", code)], *count);
    }
    let loaded: Vec<_> = snapshot
        .services
        .iter()
        .filter(|service| service.state != "failed")
        .collect();
    let failed = snapshot
        .services
        .iter()
        .filter(|service| service.error.is_some())
        .count();
    text.gauge(
        "mb_services",
        "Versions of services that are loaded.",
        loaded.len(),
    );
    text.gauge(
        "mb_services_failed",
        "Files that failed to load, also where an earlier one is served.",
        failed,
    );
    text.services(&loaded);
    text.store(snapshot.store.as_ref());
    text.process();
    text.0
}

/// Name, help and value of a counter that each service has.
type ServiceCounter = (&'static str, &'static str, fn(&ServiceRow) -> u64);

struct Text(String);

impl Text {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.head(name, help, "gauge");
        self.line(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, help, "counter");
        self.line(name, &[], value);
    }

    /// Label values come from fixed words and from names that follow the
    /// grammar of topics and versions: nothing in them needs an escape.
    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<_> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        let _ = match labels.as_slice() {
            [] => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{}}} {value}", labels.join(",")),
        };
    }

    fn protocols(&mut self, protocols: &[(&str, ProtocolUse)]) {
        type Value = fn(&ProtocolUse) -> u64;
        let metrics: [(&str, &str, &str, Value); 3] = [
            (
                "mb_protocol_connections",
                "Open connections, by protocol.",
                "gauge",
                |used| used.open,
            ),
            (
                "mb_protocol_connections_total",
                "Connections so far, by protocol.",
                "counter",
                |used| used.connections,
            ),
            (
                "mb_protocol_requests_total",
                "Whole requests read, by protocol.",
                "counter",
                |used| used.requests,
            ),
        ];
        for (name, help, kind, value) in metrics {
            self.head(name, help, kind);
            for (protocol, used) in protocols {
                self.line(name, &[("protocol", protocol)], value(used));
            }
        }
    }

    /// What connections have used, by principal.
    fn usages(&mut self, principals: &[PrincipalRow]) {
        let name = "mb_principal_requests_total";
        self.head(name, "Whole messages read, by principal.", "counter");
        for row in principals {
            self.line(name, &[("principal", &row.name)], row.usage.requests);
        }
        let name = "mb_principal_bytes_total";
        self.head(name, "Bytes read and written, by principal.", "counter");
        for row in principals {
            let Usage {
                bytes_in,
                bytes_out,
                ..
            } = row.usage;
            for (direction, bytes) in [("in", bytes_in), ("out", bytes_out)] {
                let labels = [("principal", &*row.name), ("direction", direction)];
                self.line(name, &labels, bytes);
            }
        }
        let name = "mb_principal_host_calls_total";
        let help = "Host functions that calls have called, by principal.";
        self.head(name, help, "counter");
        for row in principals {
            self.line(name, &[("principal", &row.name)], row.usage.host_calls);
        }
    }

    /// What every program should tell of itself, under the names that all use;
    /// see proc(5).
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
        let name = "process_cpu_seconds_total";
        self.head(name, "Processor time, user and system.", "counter");
        self.line(name, &[], seconds);
        let page = rustix::param::page_size() as u64;
        self.gauge(
            "process_resident_memory_bytes",
            "Resident memory.",
            field(24) * page,
        );
        self.gauge(
            "process_virtual_memory_bytes",
            "Address space; most of it is never touched.",
            field(23),
        );
        self.gauge("process_threads", "Threads.", field(20));
        let files = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        self.gauge("process_open_fds", "Open files.", files);
    }

    /// Of a server without a store, no sizes and zeros.
    fn store(&mut self, store: Option<&StoreRow>) {
        self.gauge(
            "mb_store_failing",
            "1 while the store refuses writes or could not be opened.",
            u8::from(store.is_some_and(|store| store.status != "ok")),
        );
        let count = |count: fn(&StoreRow) -> u64| store.map_or(0, count);
        let name = "mb_store_write_failures_total";
        self.head(name, "Writes that the store refused, by reason.", "counter");
        self.line(name, &[("reason", "disk-full")], count(|store| store.full));
        self.line(name, &[("reason", "error")], count(|store| store.failed));
        self.counter(
            "mb_store_damaged_reads_total",
            "Reads of the store that met a damaged page or value.",
            count(|store| store.damaged),
        );
        if let Some(bytes) = store.and_then(|store| store.used_bytes) {
            self.gauge(
                "mb_store_used_bytes",
                "What the entries of all services count.",
                bytes,
            );
        }
        if let Some(bytes) = store.and_then(|store| store.file_bytes) {
            self.gauge(
                "mb_store_file_bytes",
                "What the file of the store takes on the disk.",
                bytes,
            );
        }
    }

    fn services(&mut self, services: &[&ServiceRow]) {
        let labels = |row: &ServiceRow| (row.name.clone(), row.version.clone().unwrap_or_default());
        let counters: [ServiceCounter; 7] = [
            ("mb_calls_total", "Calls begun.", |row| row.calls),
            (
                "mb_call_failures_total",
                "Calls that ended with the service's own failure.",
                |row| row.failures,
            ),
            (
                "mb_call_errors_total",
                "Calls that the server ended.",
                |row| row.errors,
            ),
            (
                "mb_instances_created_total",
                "Instances created for calls.",
                |row| row.instances,
            ),
            (
                "mb_host_calls_total",
                "Host functions that calls have called.",
                |row| row.host_calls,
            ),
            (
                "mb_resets_verified_total",
                "Resets of instances that were verified.",
                |row| row.verified_resets,
            ),
            (
                "mb_reset_defects_total",
                "Verified resets that did not give the initial state.",
                |row| row.reset_defects,
            ),
        ];
        for (name, help, value) in counters {
            self.head(name, help, "counter");
            for row in services {
                let (service, version) = labels(row);
                self.line(
                    name,
                    &[("service", &service), ("version", &version)],
                    value(row),
                );
            }
        }
        let name = "mb_service_bytes_total";
        let help = "Bytes of the payloads and of the answers of calls.";
        self.head(name, help, "counter");
        for row in services {
            let (service, version) = labels(row);
            for (direction, bytes) in [("in", row.bytes_in), ("out", row.bytes_out)] {
                let labels = [
                    ("service", &*service),
                    ("version", &*version),
                    ("direction", direction),
                ];
                self.line(name, &labels, bytes);
            }
        }
        let name = "mb_peak_memory_bytes";
        let help = "Most linear memory that a call has held.";
        self.head(name, help, "gauge");
        for row in services {
            let (service, version) = labels(row);
            let labels = [("service", &*service), ("version", &*version)];
            self.line(name, &labels, row.peak_memory);
        }
        let name = "mb_cpu_seconds_total";
        self.head(
            name,
            "Processor time of calls by the service that was called first.",
            "counter",
        );
        let mut seen = "";
        // All versions of a name are one, and follow each other.
        for row in services.iter().filter(|row| row.version.is_some()) {
            if std::mem::replace(&mut seen, &row.name) != row.name {
                self.line(name, &[("service", &row.name)], row.cpu_seconds);
            }
        }
        let name = "mb_call_duration_seconds";
        self.head(
            name,
            "Duration of calls, waiting for a permit included, by outcome.",
            "histogram",
        );
        for row in services {
            let (service, version) = labels(row);
            for (outcome, durations) in &row.durations {
                let labels = [
                    ("service", &*service),
                    ("version", &*version),
                    ("outcome", *outcome),
                ];
                self.distribution(name, &labels, durations);
            }
        }
        let name = "mb_call_wait_seconds";
        self.head(
            name,
            "The part of it before they ran: permit, slot, memory, instance.",
            "histogram",
        );
        for row in services {
            let (service, version) = labels(row);
            self.distribution(
                name,
                &[("service", &*service), ("version", &*version)],
                &row.waits,
            );
        }
    }

    fn distribution(&mut self, name: &str, labels: &[(&str, &str)], durations: &Distribution) {
        let Distribution {
            buckets,
            seconds,
            count,
        } = durations;
        let bucket = format!("{name}_bucket");
        for (bound, seen) in buckets {
            self.line(
                &bucket,
                &[labels, &[("le", &*bound.to_string())]].concat(),
                *seen,
            );
        }
        // One that has never counted has no bounds but this.
        self.line(&bucket, &[labels, &[("le", "+Inf")]].concat(), *count);
        self.line(&format!("{name}_sum"), labels, *seconds);
        self.line(&format!("{name}_count"), labels, *count);
    }
}

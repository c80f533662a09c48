//! What the admin side shows: plain copies, taken without a lock. The field
//! names are those of its JSON.

use serde::Serialize;

use super::{ProtocolUse, Usage};

/// One connection.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionRow {
    /// As `system.hello` names it.
    pub id: String,
    /// Address and port of the other end.
    pub peer: String,
    /// Who that is, if they have shown it.
    pub principal: Option<String>,
    /// `1.2` or `1.3` where it is encrypted.
    pub tls: Option<&'static str>,
    /// `frames` or `http`, once that has shown.
    pub protocol: Option<&'static str>,
    /// `handshake`, `idle`, `reading`, `calling` or `closing`.
    pub state: &'static str,
    /// When it was accepted, RFC 3339.
    pub since: String,
    /// When the last byte arrived, RFC 3339.
    pub last_activity: String,
    /// Bytes read.
    pub bytes_in: u64,
    /// Bytes written.
    pub bytes_out: u64,
    /// Whole messages read.
    pub messages_in: u64,
    /// Messages written.
    pub messages_out: u64,
    /// Requests read and not answered.
    pub in_flight: u64,
    /// ERRORs written.
    pub errors: u64,
}

/// One call that takes long.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CallRow {
    /// Its number since the start.
    pub id: u64,
    /// The connection that it came over.
    pub connection: String,
    /// As its caller named it, `-` if it did not.
    pub request_id: String,
    /// What is called.
    pub topic: String,
    /// The principal, if authenticated.
    pub principal: Option<String>,
    /// `running`, or `waiting` for a permit, memory, time, the store or another
    /// service.
    pub state: &'static str,
    /// Milliseconds since it arrived.
    pub age_ms: u64,
    /// Milliseconds until its caller's deadline.
    pub remaining_ms: u64,
    /// Milliseconds of processor time so far.
    pub ran_ms: f64,
    /// Milliseconds that it has waited for a processor.
    pub cpu_waited_ms: f64,
    /// The operator has asked for its end.
    pub killed: bool,
}

/// What a principal has used.
#[derive(Debug, Clone, Default)]
pub struct PrincipalRow {
    /// Who; `-` for all without a name.
    pub name: String,
    /// Seconds of processor time of its calls.
    pub cpu_seconds: f64,
    /// By its connections.
    pub usage: Usage,
}

/// One version of a service, or a file that failed to load.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    /// As its topics begin.
    pub name: String,
    /// None if the file did not load and does not name one.
    pub version: Option<String>,
    /// `loaded`, `disabled` or `failed`.
    pub state: &'static str,
    /// `file`, `lastKnownGood` or `rolledBack`: what is served of it; none if
    /// it failed.
    pub source: Option<&'static str>,
    /// Where it came from.
    pub file: String,
    /// SHA-256 of the file.
    pub digest: Option<String>,
    /// Bytes of the file.
    pub size: Option<u64>,
    /// Why the file, as it is, is not served.
    pub error: Option<String>,
    /// SHA-256 of the file, where it is passed over because the operator went
    /// back from it.
    pub rolled_back_from: Option<String>,
    /// Bytes of the payloads of calls.
    pub bytes_in: u64,
    /// Bytes of their answers.
    pub bytes_out: u64,
    /// Host functions that they called, but for those that give constants.
    pub host_calls: u64,
    /// Most bytes of linear memory that one of them held.
    pub peak_memory: u64,
    /// Calls begun.
    pub calls: u64,
    /// Seconds of processor time of all versions of this name, with the calls
    /// to other services that they made.
    pub cpu_seconds: f64,
    /// Calls that ended with the service's own failure.
    pub failures: u64,
    /// Calls that the server ended.
    pub errors: u64,
    /// Instances created for calls.
    pub instances: u64,
    /// Why every call gets an instance that is made for it; none if instances
    /// serve one call after another, reset or shared.
    pub fresh_reason: Option<String>,
    /// Resets of instances that were verified.
    pub verified_resets: u64,
    /// Those of them that were found defective.
    pub reset_defects: u64,
    /// How long calls took.
    pub latency: Option<Latency>,
    /// Pairs of seconds and calls at or below, for the page.
    #[serde(skip)]
    pub buckets: Vec<(f64, u64)>,
    /// How long calls took, by outcome, for Prometheus.
    #[serde(skip)]
    pub durations: Vec<(&'static str, Distribution)>,
    /// How long they waited until they ran.
    #[serde(skip)]
    pub waits: Distribution,
}

/// Durations as Prometheus has them.
#[derive(Debug, Clone, Default)]
pub struct Distribution {
    /// Pairs of seconds and how many are at or below.
    pub buckets: Vec<(f64, u64)>,
    /// Their sum.
    pub seconds: f64,
    /// How many there are.
    pub count: u64,
}

/// Quantiles in milliseconds, each to an eighth above.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Latency {
    /// Median.
    pub p50_ms: f64,
    /// 90 %.
    pub p90_ms: f64,
    /// 99 %.
    pub p99_ms: f64,
    /// 99.9 %.
    pub p999_ms: f64,
}

/// Sums over the whole server.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Seconds since the start.
    pub uptime_seconds: f64,
    /// Connections open now.
    pub connections: u64,
    /// Connections and requests, by protocol.
    #[serde(skip)]
    pub protocols: Vec<(&'static str, ProtocolUse)>,
    /// Most connections at a time.
    pub max_connections: u64,
    /// Threads that serve connections.
    pub threads: u64,
    /// Shared memory in use, in bytes.
    pub memory: u64,
    /// How much of that there is, in bytes.
    pub max_memory: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Connections refused with SERVER_BUSY.
    pub refused: u64,
    /// Errors of the accept call.
    pub accept_errors: u64,
    /// Messages cut off by the end of their stream.
    pub truncated: u64,
    /// Peers that took no answer in time.
    pub write_timeouts: u64,
    /// Failed PUBLISH messages that no client was notified of.
    pub publish_failures: u64,
    /// Connections from an address that is denied.
    pub denied: u64,
    /// Unauthenticated peers that were evicted for others.
    pub evicted: u64,
    /// Failed handshakes, by reason.
    pub handshake_failures: Vec<(&'static str, u64)>,
    /// Peers that failed to authenticate, by reason.
    pub auth_failures: Vec<(&'static str, u64)>,
    /// Calls stopped because their client had reset its connection.
    pub calls_reset: u64,
    /// Calls that run and hold a run permit.
    pub calls_running: u64,
    /// Calls that wait for a run permit.
    pub calls_waiting: u64,
    /// Bytes read.
    pub bytes_in: u64,
    /// Bytes written.
    pub bytes_out: u64,
    /// Whole messages read.
    pub messages_in: u64,
    /// Messages written.
    pub messages_out: u64,
    /// Keep-alive frames read.
    pub keep_alives: u64,
    /// ERRORs by code, `SERVICE` for the services' own.
    pub errors: Vec<(&'static str, u64)>,
}

/// A certificate of the server's own that is not valid now.
#[derive(Debug, Clone, Serialize)]
pub struct InvalidCertificate {
    /// Where it was read from.
    pub file: String,
    /// Why it is not valid.
    pub error: String,
}

/// Files of the edge that could not be read again: what was read before holds.
#[derive(Debug, Clone, Serialize)]
pub struct StaleFiles {
    /// `certificates` or `tokens`.
    pub files: &'static str,
    /// Which of them, and why.
    pub error: String,
}

/// The store of durable values.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreRow {
    /// `ok`, `failing` while writes are refused or the engine is away, or
    /// `unavailable` where it could not be opened.
    pub status: &'static str,
    /// Why it does not do what it should.
    pub error: Option<String>,
    /// Writes refused because the disk is full.
    pub full: u64,
    /// Writes that failed for another reason of the disk or the file, and all
    /// that an engine over the network refused or did not answer.
    pub failed: u64,
    /// Reads that met a damaged page or value.
    pub damaged: u64,
    /// What the entries of all services count, in bytes.
    pub used_bytes: Option<u64>,
    /// What the file takes on the disk, in bytes; none without a file.
    pub file_bytes: Option<u64>,
}

/// Everything at one time, more or less: the counters are read one by one.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The server does not drain.
    pub accepting: bool,
    /// Sums.
    pub totals: Totals,
    /// Open connections, oldest first.
    pub connections: Vec<ConnectionRow>,
    /// Calls that take long, oldest first.
    pub calls: Vec<CallRow>,
    /// What principals have used; `-` for all without a name.
    pub principals: Vec<PrincipalRow>,
    /// Services and files that failed to load, by name and version.
    pub services: Vec<ServiceRow>,
    /// Certificates of the server's own that are not valid now.
    pub invalid_certificates: Vec<InvalidCertificate>,
    /// Certificates and tokens that could not be read again.
    pub stale_files: Vec<StaleFiles>,
    /// Why the folder of services can't be read, so that those that were
    /// loaded are served on.
    pub services_folder: Option<String>,
    /// None where no service is granted durable values.
    pub store: Option<StoreRow>,
}

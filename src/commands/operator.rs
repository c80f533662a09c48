//! What the admin endpoint may do to a running server.

use std::{
    collections::BTreeMap,
    io::Write,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    time::Instant,
};

use serde_json::{Value, json};

use super::{edge::Edge, live_settings::LiveSettings, serving::StoreState};
use crate::{
    access::ListenerPolicy,
    admin::{Body, Operations, Refused, Upload},
    catalog::{Deploys, LiveCatalog, Refusal, Service, Verdict},
    config::Auth,
    dispatch::{Dispatcher, Handle as _, Outcome, Reply, Request},
    host::{Unwatched, grant_for},
    http::Asks,
    log,
    metrics::snapshot::{PrincipalRow, Snapshot, Totals},
    scheduler::Scheduler,
    server::View,
    wire::{Version, json as wire_json},
};

/// Default timeout of an action that is tried, in milliseconds.
const DEFAULT_TRY_MS: u64 = 5000;
/// Longest timeout of it.
const MAX_TRY_MS: u64 = 60_000;

/// The hands of the operator.
pub(super) struct Operator {
    pub(super) catalog: Arc<LiveCatalog>,
    pub(super) edge: Arc<Edge>,
    pub(super) view: View,
    /// Asks for the end of the server.
    pub(super) end: mpsc::Sender<()>,
    pub(super) dispatcher: Dispatcher,
    pub(super) settings: Arc<LiveSettings>,
    pub(super) store: StoreState,
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) deploys: Arc<Deploys>,
}

impl Operations for Operator {
    fn snapshot(&self) -> Snapshot {
        let (running, waiting) = self.scheduler.counts();
        Snapshot {
            accepting: self.view.accepting(),
            totals: Totals {
                calls_running: running as u64,
                calls_waiting: waiting as u64,
                ..self.view.totals()
            },
            connections: self.view.connections(),
            calls: self.view.calls(),
            principals: self.principals(),
            services: self.catalog.current().snapshot(),
            invalid_certificates: self.edge.invalid_certificates(),
            stale_files: self.edge.stale_files(),
            services_folder: self.catalog.folder_error(),
            store: self.store.row(),
        }
    }

    fn accepting(&self) -> bool {
        self.view.accepting()
    }

    fn describe(&self, service: &str) -> Vec<Value> {
        self.catalog
            .current()
            .versions(service)
            .map(version)
            .collect()
    }

    fn settings(&self) -> Value {
        self.settings.shown()
    }

    fn change(&self, route: (&str, &str), name: &str, body: &Body) -> Result<Value, Refused> {
        let version = || parse(body.version.as_deref());
        let id = || name.parse().ok();
        let done = match route {
            ("POST", "/services/reload") => match self.catalog.reload() {
                Ok(changes) => return Ok(json!({"changes": changes})),
                Err(error) => return Err(Refused(500, format!("the services folder: {error}"))),
            },
            ("POST", "/config/reload") => return Ok(self.settings.reload()?.shown()),
            ("POST", "/services/{name}/try") => return Ok(self.try_action(name, body)?),
            ("POST", "/principals/{name}/disconnect") => {
                return Ok(json!({"closed": self.view.close_principal(name)}));
            }
            ("POST", "/tls/reload") => {
                self.edge.reload_tls()?;
                "the certificates were read again".into()
            }
            ("POST", "/services/{name}/rollback") if body.undo => {
                self.catalog.undo_rollback(name, version()?)?
            }
            ("POST", "/services/{name}/rollback") => self.catalog.rollback(name, version()?)?,
            ("POST", "/services/{name}/deploy") if body.undo => {
                self.deploys.undo(name, &body.digest)?
            }
            ("POST", "/services/{name}/deploy") => self.deploys.serve(name, &body.digest)?,
            ("POST", "/services/{name}/disable") => self.catalog.switch(name, version()?, false)?,
            ("POST", "/services/{name}/enable") => self.catalog.switch(name, version()?, true)?,
            ("POST", "/log/filter") => {
                log::set_filter(&body.filter).map_err(|error| Refused(400, error))?;
                format!("the log shows {} from now on", body.filter)
            }
            ("POST", "/drain") => {
                // Nobody hears it any more where the end has begun.
                let _ = self.end.send(());
                "the server drains".into()
            }
            ("DELETE", "/calls/{id}") if id().is_some_and(|id| self.view.kill(id)) => {
                "it is stopped by its next tick".into()
            }
            ("DELETE", "/connections/{id}") if id().is_some_and(|id| self.view.close(id)) => {
                "it is closed when what was begun is answered".into()
            }
            ("DELETE", "/calls/{id}") => {
                return Err(Refused(404, "no such call: it may have ended".into()));
            }
            ("DELETE", "/connections/{id}") => {
                return Err(Refused(404, "no such connection: it may have ended".into()));
            }
            _ => return Err(Refused(404, "no such page; / lists them".into())),
        };
        Ok(json!({"done": done}))
    }

    fn export(&self, out: &mut dyn Write) -> Result<u64, String> {
        let store = self.store.opened().ok_or("there is no store")?;
        let mut lost = |what: &str| tracing::error!("store: the backup lacks {what}");
        let exported = store.export(out, &mut lost);
        exported
            .map(|checked| checked.entries)
            .map_err(|error| error.to_string())
    }

    fn hold(&self, upload: Upload<'_>) -> Result<Value, Value> {
        let Upload {
            file,
            body,
            force,
            check,
        } = upload;
        let verdict = self.deploys.hold(file, body, force, check);
        verdict
            .map(|verdict| found(&verdict))
            .map_err(|Refusal { error, breaks }| json!({"error": error, "breaks": breaks}))
    }
}

impl Operator {
    fn principals(&self) -> Vec<PrincipalRow> {
        let mut rows = BTreeMap::<_, PrincipalRow>::new();
        for (name, time) in self.scheduler.cpu_by_principal() {
            rows.entry(name).or_default().cpu_seconds = time.as_secs_f64();
        }
        for (name, usage) in self.view.usages().all() {
            rows.entry(name).or_default().usage = usage;
        }
        let named = |(name, row)| PrincipalRow { name, ..row };
        rows.into_iter().map(named).collect()
    }

    /// Calls an action once, as the operator.
    fn try_action(&self, service: &str, body: &Body) -> Result<Value, String> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let (action, payload) = (&body.action, &body.payload);
        let version = body.version.as_deref().unwrap_or("1.0.0");
        let timeout = body
            .timeout_ms
            .unwrap_or(DEFAULT_TRY_MS)
            .clamp(1, MAX_TRY_MS);
        let id = format!("try-{}", NEXT.fetch_add(1, Relaxed));
        let body = format!("REQUEST:{service}.{action}:{version}:{id}::{timeout}\n{payload}");
        // Whoever has the token of this endpoint may call everything.
        let policy = Arc::new(ListenerPolicy {
            auth: Auth::None,
            rights: None,
            allow_unsecure: false,
        });
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let identity = Arc::new(self.edge.access.unauthenticated(
            "admin".into(),
            loopback,
            false,
            &policy,
        ));
        let begun = Instant::now();
        let request = Request {
            body: body.as_bytes(),
            binary: false,
            any_version: false,
            asks: &Asks::Topic,
            postponed: None,
            arrived: begun,
            identity: &identity,
            watch: Arc::new(Unwatched),
        };
        let Reply {
            header, answered, ..
        } = self.dispatcher.handle(request);
        let answered = answered.settled();
        let elapsed = begun.elapsed().as_secs_f64() * 1e3;
        if header.is_none() {
            return Err(
                "no such service, action or version can be: one of the names breaks its grammar"
                    .into(),
            );
        }
        let mut answer = json!({"requestId": id, "elapsedMs": (elapsed * 1e3).round() / 1e3});
        match answered.outcome {
            Outcome::Json(text) => {
                answer["outcome"] = json!("OK");
                answer["payload"] = serde_json::from_str(&text).unwrap_or(json!(text));
            }
            Outcome::Binary(bytes) => {
                answer["outcome"] = json!("OK");
                answer["bytes"] = json!(bytes.len());
            }
            Outcome::Error(_, error) => {
                answer["outcome"] = json!(error.code);
                answer["message"] = json!(error.message);
                answer["details"] = json!(error.details.as_deref().map(wire_json::tree));
            }
            Outcome::Silence
            | Outcome::Postponed(_)
            | Outcome::Response(..)
            | Outcome::Redirect(_)
            | Outcome::Deferred(_) => {}
        }
        Ok(answer)
    }
}

/// What the check of a component found, as JSON.
fn found(verdict: &Verdict) -> Value {
    let Verdict {
        name,
        version,
        digest,
        size,
        before,
        breaks,
        warnings,
    } = verdict;
    let before = before
        .as_ref()
        .map(|(version, digest)| json!({"version": version.to_string(), "digest": digest}));
    json!({
        "name": name, "version": version.to_string(), "digest": digest, "size": size,
        "before": before, "breaks": breaks, "warnings": warnings,
    })
}

/// What one version of a service is, for its own page.
fn version(service: &Service) -> Value {
    let description = &service.description;
    let policy = service.component.policy();
    let settings = &policy.settings;
    let imports = service.component.imports();
    let grants: Vec<_> = imports
        .iter()
        .filter_map(|import| grant_for(import))
        .collect();
    json!({
        "version": description.version.to_string(),
        "description": description.description,
        "actions": description.actions,
        "isolation": settings.isolation,
        "limits": {
            "timeout": settings.timeout.to_string(),
            "memory": policy.memory,
            "answerSize": policy.answer_size,
            "concurrency": settings.concurrency,
            "rate": settings.rate,
        },
        "imports": imports,
        "grants": grants,
        "durations": service.stats.sum().latency().buckets().collect::<Vec<_>>(),
    })
}

fn parse(version: Option<&str>) -> Result<Option<Version>, String> {
    version
        .map(|text| {
            text.parse()
                .map_err(|_| format!("{text:?} is no version, as 1.2.0 is"))
        })
        .transpose()
}

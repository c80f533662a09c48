//! What the admin endpoint may do to a running server.

use std::{
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

use super::{edge::Edge, live_settings::LiveSettings};
use crate::{
    access::ListenerPolicy,
    admin::{Attempt, Commands, Upload},
    catalog::{Catalog, Deploys, LiveCatalog, Refusal, Service, Verdict},
    config::Auth,
    dispatch::{Dispatcher, Handle as _, Outcome, Reply, Request},
    host::{Unwatched, grant_for},
    http::Asks,
    server::View,
    store::Store,
    wire::Version,
};

/// The hands of the operator.
pub(super) struct Operator {
    pub(super) catalog: Arc<LiveCatalog>,
    pub(super) edge: Arc<Edge>,
    pub(super) view: View,
    /// Asks for the end of the server.
    pub(super) end: mpsc::Sender<()>,
    pub(super) dispatcher: Dispatcher,
    pub(super) settings: Arc<LiveSettings>,
    /// None where no service is granted durable values.
    pub(super) store: Option<Arc<Store>>,
    pub(super) deploys: Arc<Deploys>,
}

impl Commands for Operator {
    fn reload(&self) -> Result<Vec<String>, String> {
        self.catalog
            .reload()
            .map_err(|error| format!("the services folder: {error}"))
    }

    fn reload_tls(&self) -> Result<(), String> {
        self.edge.reload_tls()
    }

    fn reconfigure(&self) -> Result<Value, String> {
        self.settings.reload().map(|applied| applied.shown())
    }

    fn rollback(&self, service: &str, version: Option<&str>) -> Result<String, String> {
        self.catalog.rollback(service, parse(version)?)
    }

    fn undo_rollback(&self, service: &str, version: Option<&str>) -> Result<String, String> {
        self.catalog.undo_rollback(service, parse(version)?)
    }

    fn switch(&self, service: &str, version: Option<&str>, on: bool) -> Result<String, String> {
        self.catalog.switch(service, parse(version)?, on)
    }

    fn export(&self, out: &mut dyn Write) -> Result<u64, String> {
        let store = self.store.as_ref().ok_or("there is no store")?;
        let mut lost = |what: &str| tracing::error!("store: the backup lacks {what}");
        let exported = store.export(out, &mut lost);
        exported
            .map(|checked| checked.entries)
            .map_err(|error| error.0.to_string())
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

    fn deploy(&self, file: &str, digest: &str, undo: bool) -> Result<String, String> {
        match undo {
            false => self.deploys.serve(file, digest),
            true => self.deploys.undo(file, digest),
        }
    }

    fn kill(&self, call: u64) -> bool {
        self.view.kill(call)
    }

    fn close(&self, connection: u64) -> bool {
        self.view.close(connection)
    }

    fn close_principal(&self, principal: &str) -> usize {
        self.view.close_principal(principal)
    }

    fn drain(&self) {
        // Nobody hears it any more where the end has begun.
        let _ = self.end.send(());
    }

    fn try_action(&self, attempt: &Attempt<'_>) -> Result<Value, String> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let Attempt {
            service,
            action,
            version,
            payload,
            timeout,
        } = *attempt;
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
            header,
            outcome,
            identity: _,
            held: _held,
            used: _,
            served: _,
        } = self.dispatcher.handle(request);
        let elapsed = begun.elapsed().as_secs_f64() * 1e3;
        if header.is_none() {
            return Err(
                "no such service, action or version can be: one of the names breaks its grammar"
                    .into(),
            );
        }
        let mut answer = json!({"requestId": id, "elapsedMs": (elapsed * 1e3).round() / 1e3});
        match outcome {
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
                answer["details"] = json!(error.details);
            }
            Outcome::Silence
            | Outcome::Postponed(_)
            | Outcome::Response(..)
            | Outcome::Redirect(_) => {}
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

/// What one service is in each of its versions, for its own page.
pub(super) fn described(catalog: &Catalog, name: &str) -> Vec<Value> {
    catalog.versions(name).map(version).collect()
}

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

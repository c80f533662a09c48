//! What the operator may change, and the requests for it.

use std::io::{Read, Write};

use serde::Deserialize;
use serde_json::Value;

use super::{
    Admin, Page,
    gateway::Request,
    page,
    pages::{Query, decode, listed},
    refuse,
    routes::{Route, Takes},
    shown, token,
};
use crate::{
    log::{AUDIT, Limiter},
    metrics::snapshot::Snapshot,
};

/// Lines about changes in a second.
const MAX_CHANGES: u32 = 100;

/// What the endpoint shows and changes of a running server.
pub trait Operations: Send + Sync {
    /// Takes a snapshot.
    fn snapshot(&self) -> Snapshot;

    /// Whether the server does not drain.
    fn accepting(&self) -> bool;

    /// Describes a service in each of its versions; none if there is none.
    fn describe(&self, service: &str) -> Vec<Value>;

    /// The settings, as they may be shown.
    fn settings(&self) -> Value;

    /// Applies a change. `route` is method and path as in the table of routes,
    /// `name` the parameter in the path.
    ///
    /// # Errors
    /// Why that is not possible.
    fn change(&self, route: (&str, &str), name: &str, body: &Body) -> Result<Value, Refused>;

    /// Receives a component, checks it and holds it. Returns what the check
    /// found.
    ///
    /// # Errors
    /// Why it is refused, as JSON.
    fn hold(&self, upload: Upload<'_>) -> Result<Value, Value>;

    /// Writes a backup of the durable values. Returns how many entries it has.
    ///
    /// # Errors
    /// There is no store, or it or `out` fails.
    fn export(&self, out: &mut dyn Write) -> Result<u64, String>;
}

/// Status of a change that is refused, and why.
pub struct Refused(pub u16, pub String);

impl<E: Into<String>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self(409, error.into())
    }
}

/// A component that arrives.
pub struct Upload<'a> {
    /// Its file without its ending, `NAME` or `NAME@VERSION`.
    pub file: &'a str,
    /// Its bytes.
    pub body: &'a mut dyn Read,
    /// It may break callers.
    pub force: bool,
    /// It is checked and dropped.
    pub check: bool,
}

/// The fields of a body; each route has some of them.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
#[allow(missing_docs, reason = "the table of routes says what they are")]
pub struct Body {
    pub version: Option<String>,
    pub action: String,
    pub payload: Value,
    pub timeout_ms: Option<u64>,
    pub filter: String,
    pub digest: String,
    pub undo: bool,
}

/// Writes the head of an answer before its first bytes.
struct Headed<'a> {
    out: &'a mut dyn Write,
    begun: bool,
}

impl Write for Headed<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if !std::mem::replace(&mut self.begun, true) {
            self.out.write_all(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/x-ndjson\r\n\
                  Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\r\n",
            )?;
        }
        self.out.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

impl Admin {
    /// Checks that a request may change something. Returns the refusal if not.
    fn authorise(&self, request: &Request, takes: Takes) -> Result<(), Page> {
        let (changes, deploys) = match takes {
            Takes::Nothing => return Ok(()),
            Takes::Admin => (&self.token, &None),
            Takes::Deploy => (&None, &self.deploy_token),
            Takes::AdminOrDeploy => (&self.token, &self.deploy_token),
        };
        let bearer = request.header("Authorization");
        let bearer = bearer.and_then(token::bearer);
        let mut taken = changes.iter().chain(deploys);
        if taken.any(|token| bearer.is_some_and(|shown| token::is_same(token, shown))) {
            return Ok(());
        }
        if changes.is_none() && deploys.is_none() {
            return Err(refuse(
                403,
                match takes {
                    Takes::Deploy => {
                        "deploying is off: set admin.deploy = true and restart; if it is set, the log says what is wrong with its token"
                    }
                    _ => "changes are switched off, because there is no token; the log says why",
                },
            ));
        }
        static REFUSED: Limiter = Limiter::audit();
        if REFUSED.allows("admin endpoint without its token") {
            tracing::warn!(
                target: AUDIT,
                security = "admin-token",
                peer = request.peer,
                method = request.method,
                path = shown(&request.url),
                "a change was requested without the token"
            );
        }
        Err(refuse(
            401,
            match takes {
                Takes::Deploy => {
                    "this takes the header Authorization: Bearer TOKEN; the token is in admin.deploy_token, by default state_dir/deploy.token"
                }
                _ => {
                    "this takes the header Authorization: Bearer TOKEN; the token is in state_dir/admin.token"
                }
            },
        ))
    }

    /// Writes a backup, if the request may have one; the head comes with its
    /// first bytes. None once some were written.
    pub(super) fn export(&self, request: &Request, out: &mut dyn Write) -> Option<Page> {
        if let Err(page) = self.authorise(request, Takes::Admin) {
            return Some(page);
        }
        let mut out = Headed { out, begun: false };
        let exported = self.operations.export(&mut out);
        let said = match &exported {
            Ok(entries) => format!("{entries} entries were exported"),
            Err(error) => format!("the export failed: {error}"),
        };
        tracing::info!(
            target: AUDIT,
            security = "change",
            peer = request.peer,
            path = shown(&request.url),
            "by the operator: {said}"
        );
        exported
            .err()
            .filter(|_| !out.begun)
            .map(|error| refuse(409, &error))
    }

    /// Answers requests other than GET.
    pub(super) fn change(
        &self,
        request: &Request,
        route: &Route,
        values: &[&str],
        upload: &mut dyn Read,
    ) -> Page {
        if let Err(page) = self.authorise(request, route.takes) {
            return page;
        }
        let is_upload = route.method == "PUT";
        let page = if is_upload {
            self.receive(request, route, values, upload)
        } else {
            self.apply(request, route, values)
        };
        // Only the operator causes these, so the bound is far from anything
        // that they do.
        static CHANGES: Limiter = Limiter::audit_up_to(MAX_CHANGES);
        if CHANGES.allows("changes by the operator") {
            // What is tried, and what came of it, is the service's.
            let is_try = route.path.ends_with("/try");
            let body = String::from_utf8_lossy(if is_try || is_upload {
                &[]
            } else {
                &request.body
            });
            tracing::info!(
                target: AUDIT,
                security = "change",
                peer = request.peer,
                method = route.method,
                path = shown(&request.url),
                body = shown(&body),
                status = page.0,
                "by the operator: {}",
                if is_try { "an action was tried" } else { shown(&page.2) }
            );
        }
        page
    }

    /// Answers the upload of a component.
    fn receive(
        &self,
        request: &Request,
        route: &Route,
        values: &[&str],
        body: &mut dyn Read,
    ) -> Page {
        let query = request.url.split_once('?').map_or("", |(_, query)| query);
        let flags = Query::parse(query, route.query)
            .and_then(|query| Ok((query.flag("force")?, query.flag("check")?)));
        let (force, check) = match flags {
            Ok(flags) => flags,
            Err(error) => return refuse(400, &error),
        };
        let file = values.first().and_then(|name| decode(name));
        let held = self.operations.hold(Upload {
            file: &file.unwrap_or_default(),
            body,
            force,
            check,
        });
        match held {
            Ok(verdict) => page(200, &verdict),
            Err(refused) => page(409, &refused),
        }
    }

    fn apply(&self, request: &Request, route: &Route, values: &[&str]) -> Page {
        let body = match read_body(request, route) {
            Ok(body) => body,
            Err(error) => return refuse(400, &error),
        };
        let name = values.first().and_then(|name| decode(name));
        let name = name.unwrap_or_default();
        match self
            .operations
            .change((route.method, route.path), &name, &body)
        {
            Ok(answer) => page(200, &answer),
            Err(Refused(status, error)) => refuse(status, &error),
        }
    }
}

fn read_body(request: &Request, route: &Route) -> Result<Body, String> {
    let text = std::str::from_utf8(&request.body)
        .map_err(|error| format!("the body can't be read: {error}"))?;
    let text = if text.trim().is_empty() { "{}" } else { text };
    let value: Value =
        serde_json::from_str(text).map_err(|error| format!("the body is no JSON: {error}"))?;
    let fields = value.as_object().ok_or("the body is no JSON object")?;
    if let Some(unknown) = fields
        .keys()
        .find(|name| !route.body.iter().any(|(known, ..)| known == name))
    {
        let known = listed(route.body.iter().map(|(name, ..)| *name));
        return Err(format!(
            "the body has the field {unknown:?}; known here: {known}"
        ));
    }
    if let Some(missing) = route
        .required
        .iter()
        .find(|name| !fields.contains_key(**name))
    {
        return Err(format!("the body lacks {missing}"));
    }
    serde_json::from_value(value).map_err(|error| format!("the body does not fit: {error}"))
}

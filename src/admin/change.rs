//! What the operator may change, and the requests for it.

use std::io::{Read, Write};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Admin, JSON_UTF8, Page,
    gateway::Request,
    pages::{Query, decode},
    routes::{Route, Takes},
    shown, token,
};
use crate::log::{AUDIT, Limiter};

/// Default timeout of an action that is tried, in milliseconds.
const DEFAULT_TRY_MS: u64 = 5000;
/// Longest timeout of it.
const MAX_TRY_MS: u64 = 60_000;

/// Lines about changes in a second.
const MAX_CHANGES: u32 = 100;

/// What the operator may do to a running server.
pub trait Commands: Send + Sync {
    /// Looks for changed components. Returns what changed.
    ///
    /// # Errors
    /// Why that is not possible; the same applies below.
    fn reload(&self) -> Result<Vec<String>, String>;

    /// Reads the certificates again.
    ///
    /// # Errors
    /// See above.
    fn reload_tls(&self) -> Result<(), String>;

    /// Reads the settings again and applies what can be applied. Returns the
    /// result as JSON.
    ///
    /// # Errors
    /// See above; nothing was changed.
    fn reconfigure(&self) -> Result<Value, String>;

    /// Goes back to the file that a service had before the present one.
    ///
    /// # Errors
    /// See above.
    fn rollback(&self, service: &str, version: Option<&str>) -> Result<String, String>;

    /// Undoes a rollback: serves the file in the services folder again.
    ///
    /// # Errors
    /// See above.
    fn undo_rollback(&self, service: &str, version: Option<&str>) -> Result<String, String>;

    /// Enables or disables a service, or one of its versions.
    ///
    /// # Errors
    /// See above.
    fn switch(&self, service: &str, version: Option<&str>, on: bool) -> Result<String, String>;

    /// Receives a component, checks it and holds it. Returns what the check
    /// found.
    ///
    /// # Errors
    /// Why it is refused, as JSON.
    fn hold(&self, upload: Upload<'_>) -> Result<Value, Value>;

    /// Serves the component with this digest that is held; or drops it, or serves
    /// again what was served before it.
    ///
    /// # Errors
    /// See above.
    fn deploy(&self, file: &str, digest: &str, undo: bool) -> Result<String, String>;

    /// Stops a call. Returns false if there is none of this number.
    fn kill(&self, call: u64) -> bool;

    /// Closes a connection gracefully. Returns false if there is none of this
    /// number.
    fn close(&self, connection: u64) -> bool;

    /// Closes all connections of a principal gracefully. Returns how many.
    fn close_principal(&self, principal: &str) -> usize;

    /// Begins the drain of the server.
    fn drain(&self);

    /// Writes a backup of the durable values. Returns how many entries it has.
    ///
    /// # Errors
    /// There is no store, or it or `out` fails.
    fn export(&self, _out: &mut dyn Write) -> Result<u64, String> {
        Err("there is no store".into())
    }

    /// Calls an action once, as the operator. Returns the result as JSON.
    ///
    /// # Errors
    /// If the request is not possible, as with an invalid version.
    fn try_action(&self, attempt: &Attempt<'_>) -> Result<Value, String>;
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

/// An action that is tried.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// The service.
    pub service: &'a str,
    /// Its action.
    pub action: &'a str,
    /// The version that the caller is written against.
    pub version: &'a str,
    /// One JSON text.
    pub payload: &'a str,
    /// Milliseconds.
    pub timeout: u64,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
struct Body {
    version: Option<String>,
    action: Option<String>,
    payload: Value,
    timeout_ms: Option<u64>,
    filter: Option<String>,
    digest: Option<String>,
    undo: bool,
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

fn refuse(status: u16, error: &str) -> Page {
    (status, JSON_UTF8, json!({"error": error}).to_string())
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
        let exported = self.commands.export(&mut out);
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
        let held = self.commands.hold(Upload {
            file: &file.unwrap_or_default(),
            body,
            force,
            check,
        });
        match held {
            Ok(verdict) => (200, JSON_UTF8, verdict.to_string()),
            Err(refused) => (409, JSON_UTF8, refused.to_string()),
        }
    }

    fn apply(&self, request: &Request, route: &Route, values: &[&str]) -> Page {
        let body = match read_body(request, route) {
            Ok(body) => body,
            Err(error) => return refuse(400, &error),
        };
        let number = || values.first().and_then(|id| id.parse::<u64>().ok());
        let name = values
            .first()
            .and_then(|name| decode(name))
            .unwrap_or_default();
        let done = |done: &str| (200, JSON_UTF8, json!({"done": done}).to_string());
        let result = |result: Result<String, String>| match result {
            Ok(message) => done(&message),
            Err(error) => refuse(409, &error),
        };
        let version = body.version.as_deref();
        match (route.method, route.path) {
            ("POST", "/services/reload") => match self.commands.reload() {
                Ok(changes) => (200, JSON_UTF8, json!({"changes": changes}).to_string()),
                Err(error) => refuse(500, &error),
            },
            ("POST", "/tls/reload") => result(
                self.commands
                    .reload_tls()
                    .map(|()| "the certificates were read again".into()),
            ),
            ("POST", "/config/reload") => match self.commands.reconfigure() {
                Ok(applied) => (200, JSON_UTF8, applied.to_string()),
                Err(error) => refuse(409, &error),
            },
            ("POST", "/services/{name}/rollback") => result(if body.undo {
                self.commands.undo_rollback(&name, version)
            } else {
                self.commands.rollback(&name, version)
            }),
            ("POST", "/services/{name}/deploy") => match &body.digest {
                Some(digest) => result(self.commands.deploy(&name, digest, body.undo)),
                None => refuse(400, "the body lacks digest"),
            },
            ("POST", "/services/{name}/disable") => {
                result(self.commands.switch(&name, version, false))
            }
            ("POST", "/services/{name}/enable") => {
                result(self.commands.switch(&name, version, true))
            }
            ("POST", "/services/{name}/try") => self.attempt(&name, &body),
            ("POST", "/principals/{name}/disconnect") => {
                let closed = self.commands.close_principal(&name);
                (200, JSON_UTF8, json!({"closed": closed}).to_string())
            }
            ("POST", "/log/filter") => {
                let Some(filter) = &body.filter else {
                    return refuse(400, "the body lacks filter");
                };
                result(
                    crate::log::set_filter(filter)
                        .map(|()| format!("the log shows {filter} from now on")),
                )
            }
            ("POST", "/drain") => {
                self.commands.drain();
                done("the server drains")
            }
            ("DELETE", "/calls/{id}") => match number().is_some_and(|id| self.commands.kill(id)) {
                true => done("it is stopped by its next tick"),
                false => refuse(404, "no such call: it may have ended"),
            },
            ("DELETE", "/connections/{id}") => {
                match number().is_some_and(|id| self.commands.close(id)) {
                    true => done("it is closed when what was begun is answered"),
                    false => refuse(404, "no such connection: it may have ended"),
                }
            }
            _ => refuse(404, "no such page; / lists them"),
        }
    }

    fn attempt(&self, service: &str, body: &Body) -> Page {
        let Some(action) = &body.action else {
            return refuse(400, "the body lacks action");
        };
        let attempt = Attempt {
            service,
            action,
            version: body.version.as_deref().unwrap_or("1.0.0"),
            payload: &body.payload.to_string(),
            timeout: body
                .timeout_ms
                .unwrap_or(DEFAULT_TRY_MS)
                .clamp(1, MAX_TRY_MS),
        };
        match self.commands.try_action(&attempt) {
            Ok(outcome) => (200, JSON_UTF8, outcome.to_string()),
            Err(error) => refuse(409, &error),
        }
    }
}

fn read_body(request: &Request, route: &Route) -> Result<Body, String> {
    let text = std::str::from_utf8(&request.body)
        .map_err(|error| format!("the body can't be read: {error}"))?;
    if text.trim().is_empty() {
        return Ok(Body::default());
    }
    let value: Value =
        serde_json::from_str(text).map_err(|error| format!("the body is no JSON: {error}"))?;
    let fields = value.as_object().ok_or("the body is no JSON object")?;
    if let Some(unknown) = fields
        .keys()
        .find(|name| !route.body.iter().any(|(known, ..)| known == name))
    {
        let known: Vec<_> = route.body.iter().map(|(name, ..)| *name).collect();
        return Err(format!(
            "the body has the field {unknown:?}; known here: {}",
            known.join(", ")
        ));
    }
    serde_json::from_value(value).map_err(|error| format!("the body does not fit: {error}"))
}

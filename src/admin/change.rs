//! What the operator may change, and how a request asks for it.

use std::io::Read as _;

use serde::Deserialize;
use serde_json::json;
use tiny_http::Request;

use super::{Admin, JSON, Page, token};

/// Largest body of a request, in bytes.
const MAX_BODY: u64 = 64 * 1024;

/// What the operator may do to a running server.
pub trait Commands: Send + Sync {
    /// Looks for changed components; names what changed.
    ///
    /// # Errors
    /// Why that is not possible; likewise below.
    fn reload(&self) -> Result<Vec<String>, String>;

    /// Reads the certificates again.
    ///
    /// # Errors
    /// See above.
    fn reload_tls(&self) -> Result<(), String>;

    /// Goes back to the file that a service had before the present one.
    ///
    /// # Errors
    /// See above.
    fn rollback(&self, service: &str, version: Option<&str>) -> Result<String, String>;

    /// Has a service, or one of its versions, served or not.
    ///
    /// # Errors
    /// See above.
    fn switch(&self, service: &str, version: Option<&str>, on: bool) -> Result<String, String>;
}

/// The routes that change something, and what each does.
pub const CHANGES: [(&str, &str); 5] = [
    ("/tls/reload", "read the certificates again; open connections stay"),
    ("/services/reload", "look for changed components now"),
    ("/services/{name}/rollback", "serve the file from before the present one"),
    ("/services/{name}/disable", "serve it no more, until it is enabled or the server starts again"),
    ("/services/{name}/enable", "serve it again"),
];

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Body {
    version: Option<String>,
}

impl Admin {
    /// Answers a POST.
    pub(super) fn change(&self, request: &mut Request, path: &str) -> Page {
        let refuse = |status, error: &str| (status, JSON, json!({"error": error}).to_string());
        let segments: Vec<_> = path.trim_start_matches('/').split('/').collect();
        let known = matches!(segments.as_slice(), ["services" | "tls", "reload"])
            || matches!(segments.as_slice(), ["services", _, "rollback" | "disable" | "enable"]);
        if !known {
            return refuse(405, "only GET is answered here; / lists what takes POST");
        }
        let Some(token) = &self.token else {
            return refuse(403, "changing is switched off, because there is no token; the log says why");
        };
        let shown = request.headers().iter().find(|header| header.field.equiv("Authorization"));
        let shown = shown.and_then(|header| header.value.as_str().strip_prefix("Bearer "));
        if !shown.is_some_and(|shown| token::is_same(token, shown.trim())) {
            return refuse(
                401,
                "this takes the header Authorization: Bearer TOKEN; the token is in state_dir/admin.token",
            );
        }
        let body = match read_body(request) {
            Ok(body) => body,
            Err(error) => return refuse(400, &error),
        };
        let version = body.version.as_deref();
        let done = match segments.as_slice() {
            ["tls", _] => self.commands.reload_tls().map(|()| "the certificates were read again".into()),
            [_, name, "rollback"] => self.commands.rollback(name, version),
            [_, name, what] => self.commands.switch(name, version, *what == "enable"),
            _ => {
                return match self.commands.reload() {
                    Ok(changes) => (200, JSON, json!({"changes": changes}).to_string()),
                    Err(error) => refuse(500, &error),
                };
            }
        };
        match done {
            Ok(done) => (200, JSON, json!({"done": done}).to_string()),
            Err(error) => refuse(409, &error),
        }
    }
}

fn read_body(request: &mut Request) -> Result<Body, String> {
    let mut text = String::new();
    let read = request.as_reader().take(MAX_BODY + 1).read_to_string(&mut text);
    read.map_err(|error| format!("the body can't be read: {error}"))?;
    if text.len() as u64 > MAX_BODY {
        return Err(format!("the body exceeds the limit of {MAX_BODY} bytes"));
    }
    if text.trim().is_empty() {
        return Ok(Body::default());
    }
    serde_json::from_str(&text).map_err(|error| format!("the body is not {{\"version\":\"1.0.0\"}}: {error}"))
}

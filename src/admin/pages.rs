//! What GET shows.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    Admin, Page, assets, metrics_text, page, refuse,
    routes::{LEVELS, PROMETHEUS, ROUTES, SORTS, openapi},
    version,
};
use crate::{log::lines, metrics::snapshot::Snapshot};

/// Rows of a list where nobody says how many.
const DEFAULT_LIMIT: usize = 1000;

/// Names for an error.
pub(super) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.collect();
    match names.is_empty() {
        true => "none".into(),
        false => names.join(", "),
    }
}

/// Parameters of a query. Values are plain or percent-encoded.
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    /// Reads what stands behind the question mark.
    ///
    /// # Errors
    /// A parameter that the route does not have, or one that is no text.
    pub(super) fn parse(text: &str, known: &[(&str, &str)]) -> Result<Self, String> {
        let mut found = BTreeMap::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !known.iter().any(|(known, _)| *known == name) {
                let names = listed(known.iter().map(|(name, _)| *name));
                return Err(format!("unknown parameter {name:?}; known here: {names}"));
            }
            let value = decode(&value.replace('+', " "))
                .ok_or_else(|| format!("{name} is not percent-encoded UTF-8"))?;
            found.insert(name.to_owned(), value);
        }
        Ok(Self(found))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    fn number(&self, name: &str) -> Result<Option<u64>, String> {
        self.0
            .get(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| format!("{name} is no whole number"))
            })
            .transpose()
    }

    /// Whether a parameter is `true`.
    pub(super) fn flag(&self, name: &str) -> Result<bool, String> {
        match self.0.get(name).map(String::as_str) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(format!("{name} is true or false")),
        }
    }

    fn limit(&self) -> Result<usize, String> {
        let limit = self.number("limit")?.unwrap_or(DEFAULT_LIMIT as u64);
        Ok(usize::try_from(limit).unwrap_or(usize::MAX))
    }
}

pub(super) fn decode(text: &str) -> Option<String> {
    let is_pair = |rest: &[u8]| {
        rest.iter()
            .take(2)
            .filter(|b| b.is_ascii_hexdigit())
            .count()
            == 2
    };
    let mut encoded = text.split('%').skip(1).map(str::as_bytes);
    if !encoded.all(is_pair) {
        return None;
    }
    let text = percent_encoding::percent_decode_str(text).decode_utf8();
    text.ok().map(Into::into)
}

impl Admin {
    /// A page, or what is wrong with the parameters.
    pub(super) fn page(&self, route: &str, values: &[&str], query: &Query) -> Result<Page, String> {
        let ok = |value: Value| Ok(page(200, &value));
        let none = |what: &str| Ok(refuse(404, &format!("no such {what}")));
        match route {
            "/healthz" => ok(json!({"status": "ok"})),
            "/version" => ok(version()),
            "/readyz" => Ok(readiness(&self.operations.snapshot())),
            "/connections" => {
                ok(json!({"connections": connections(&self.operations.snapshot(), query)?}))
            }
            "/connections/{id}" => {
                let snapshot = self.operations.snapshot();
                let Some(row) = snapshot.connections.iter().find(|row| row.id == values[0]) else {
                    return none("connection");
                };
                let calls: Vec<_> = snapshot
                    .calls
                    .iter()
                    .filter(|call| call.connection == row.id)
                    .collect();
                ok(json!({"connection": row, "calls": calls}))
            }
            "/calls" => ok(json!({"calls": self.operations.snapshot().calls})),
            "/calls/past" => {
                let (id, service) = (query.get("requestId"), query.get("service"));
                let fits = |call: &crate::metrics::PastCall| {
                    id.is_none_or(|id| {
                        call.request_id == id || call.parent_request_id.as_deref() == Some(id)
                    }) && service.is_none_or(|service| call.service == service)
                };
                ok(json!({"calls": self.metrics.history.find(query.limit()?, fits)}))
            }
            "/services" => ok(json!({"services": self.operations.snapshot().services})),
            "/services/{name}" => {
                let mut versions = self.operations.describe(values[0]);
                if versions.is_empty() {
                    return none("service");
                }
                let snapshot = self.operations.snapshot();
                for version in &mut versions {
                    let row = snapshot.services.iter().find(|row| {
                        row.name == values[0]
                            && row.version.as_deref() == version["version"].as_str()
                    });
                    version["row"] = json!(row);
                    version["histogram"] = json!(row.map(|row| &row.buckets));
                }
                let past = self
                    .metrics
                    .history
                    .find(50, |call| call.service == values[0]);
                ok(json!({"name": values[0], "versions": versions, "lastCalls": past}))
            }
            "/listeners" => ok(json!({"listeners": self.listeners})),
            "/config" => ok(self.operations.settings()),
            "/log" => ok(json!({"lines": log(query)?, "filter": crate::log::filter()})),
            "/metrics" => Ok((
                200,
                PROMETHEUS,
                metrics_text::render(&self.operations.snapshot()),
            )),
            "/openapi.json" => ok(openapi()),
            _ => none("page"),
        }
    }

    /// `/` and what the page is made of; a program gets the list of routes.
    pub(super) fn index(path: &str, wants_html: bool) -> Option<Page> {
        if path == "/" && !wants_html {
            let list = |changes: bool| -> serde_json::Map<String, Value> {
                let chosen = ROUTES
                    .iter()
                    .filter(|route| (route.method != "GET") == changes);
                chosen
                    .map(|route| {
                        let name = if changes {
                            format!("{} {}", route.method, route.path)
                        } else {
                            route.path.into()
                        };
                        (name, json!(route.what))
                    })
                    .collect()
            };
            let routes = json!({"routes": list(false), "changes": list(true)});
            return Some(page(200, &routes));
        }
        assets::find(path).map(|(kind, text)| (200, kind, text.to_owned()))
    }
}

/// Status and word of `/readyz`.
pub(super) fn readiness_word(accepting: bool) -> (u16, &'static str) {
    if accepting {
        (200, "ready")
    } else {
        (503, "draining")
    }
}

/// Requests are served, although some services may not have loaded: those
/// are named, and leave the rest alone.
fn readiness(snapshot: &Snapshot) -> Page {
    let failed: Vec<_> = snapshot
        .services
        .iter()
        .filter(|service| service.error.is_some())
        .map(|service| json!({"name": service.name, "file": service.file, "error": service.error}))
        .collect();
    let reset_defects: Vec<_> = snapshot
        .services
        .iter()
        .filter(|service| service.reset_defects > 0)
        .map(|service| json!({"name": service.name, "digest": service.digest}))
        .collect();
    let (status, word) = readiness_word(snapshot.accepting);
    // Services without durable values are served all the same.
    let is_whole = snapshot
        .store
        .as_ref()
        .is_none_or(|store| store.status == "ok");
    let word = if snapshot.accepting && !is_whole {
        "degraded"
    } else {
        word
    };
    page(
        status,
        &json!({
            "status": word,
            "failedServices": failed,
            "resetDefects": reset_defects,
            "invalidCertificates": snapshot.invalid_certificates,
            "servicesFolderError": snapshot.services_folder,
            "staleFiles": snapshot.stale_files,
            "store": snapshot.store,
        }),
    )
}

fn connections(snapshot: &Snapshot, query: &Query) -> Result<Vec<Value>, String> {
    let (state, principal, peer) = (
        query.get("state"),
        query.get("principal"),
        query.get("peer"),
    );
    let mut rows: Vec<_> = snapshot
        .connections
        .iter()
        .filter(|row| {
            state.is_none_or(|state| row.state == state)
                && principal.is_none_or(|principal| row.principal.as_deref() == Some(principal))
                && peer.is_none_or(|peer| row.peer.starts_with(peer))
        })
        .collect();
    if let Some(sort) = query.get("sort") {
        let key: fn(&crate::metrics::snapshot::ConnectionRow) -> u64 = match sort {
            "bytesIn" => |row| row.bytes_in,
            "bytesOut" => |row| row.bytes_out,
            "messagesIn" => |row| row.messages_in,
            "inFlight" => |row| row.in_flight,
            "errors" => |row| row.errors,
            other => {
                return Err(format!(
                    "sort by {other:?}? It is one of {}",
                    SORTS.join(", ")
                ));
            }
        };
        rows.sort_by_key(|row| std::cmp::Reverse(key(row)));
    }
    rows.truncate(query.limit()?);
    Ok(rows.into_iter().map(|row| json!(row)).collect())
}

fn log(query: &Query) -> Result<Vec<lines::Line>, String> {
    let rank = |level: &str| LEVELS.iter().position(|known| *known == level);
    let level = query.get("level").map(|level| {
        rank(level).ok_or(format!(
            "level {level:?}? It is one of {}",
            LEVELS.join(", ")
        ))
    });
    let level = level.transpose()?;
    let (target, service, id, text) = (
        query.get("target"),
        query.get("service"),
        query.get("requestId"),
        query.get("contains"),
    );
    let field = |line: &lines::Line, name: &str, value: &str| {
        line.fields.get(name).is_some_and(|found| found == value)
    };
    let fits = |line: &lines::Line| {
        level.is_none_or(|level| rank(line.level).is_some_and(|rank| rank <= level))
            && target.is_none_or(|target| line.target == target)
            && service.is_none_or(|service| field(line, "service", service))
            && id.is_none_or(|id| {
                field(line, "request_id", id) || field(line, "parent_request_id", id)
            })
            && text.is_none_or(|text| {
                line.message.contains(text)
                    || line.fields.values().any(|field| field.contains(text))
            })
    };
    Ok(lines::LINES.after(query.number("after")?.unwrap_or(0), query.limit()?, fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let known = [("a", ""), ("limit", "")];
        let query = Query::parse("a=x%20y+z&limit=7", &known).unwrap();
        assert_eq!((query.get("a"), query.limit()), (Some("x y z"), Ok(7)));
        // In a path, it is itself.
        assert_eq!(decode("a+b%2Bc").as_deref(), Some("a+b+c"));
        assert_eq!(Query::parse("", &known).unwrap().limit(), Ok(DEFAULT_LIMIT));
        assert!(
            Query::parse("b=1", &known)
                .err()
                .unwrap()
                .contains("known here: a, limit")
        );
        assert!(Query::parse("a=%f", &known).is_err() && Query::parse("a=%ff", &known).is_err());
        assert!(Query::parse("limit=-1", &known).unwrap().limit().is_err());
    }
}

//! What the endpoint answers: one table, from which requests are routed and
//! the OpenAPI document is made.

use serde_json::{Value, json};

/// One route.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// `GET`, `POST`, `PUT` or `DELETE`.
    pub method: &'static str,
    /// Segments in braces are parameters.
    pub path: &'static str,
    /// What it is for.
    pub what: &'static str,
    /// Parameters of the query: name, and what it is for.
    pub query: &'static [(&'static str, &'static str)],
    /// Fields of the body: name, JSON type, meaning.
    pub body: &'static [(&'static str, &'static str, &'static str)],
    /// Those of them that have to be there.
    pub required: &'static [&'static str],
    /// Kind of the answer, and the statuses that it may have beside those of
    /// every route.
    pub answers: (&'static str, &'static [u16]),
    /// Which token it takes.
    pub takes: Takes,
}

/// What a request must show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Nothing on this machine.
    Nothing,
    /// The token for changes.
    Admin,
    /// The token for deploys.
    Deploy,
    /// One of them.
    AdminOrDeploy,
}

pub(super) const JSON: &str = "application/json";
pub(super) const PROMETHEUS: &str = "text/plain; version=0.0.4";
pub(super) const LINES: &str = "application/x-ndjson";
pub(super) const EVENTS: &str = "text/event-stream";

const fn get(path: &'static str, what: &'static str) -> Route {
    Route {
        method: "GET",
        path,
        what,
        query: &[],
        body: &[],
        required: &[],
        answers: (JSON, &[200]),
        takes: Takes::Nothing,
    }
}

const fn post(path: &'static str, what: &'static str, statuses: &'static [u16]) -> Route {
    Route {
        method: "POST",
        path,
        what,
        query: &[],
        body: &[],
        required: &[],
        answers: (JSON, statuses),
        takes: Takes::Admin,
    }
}

/// What connections may be sorted by.
pub(super) const SORTS: [&str; 5] = ["bytesIn", "bytesOut", "messagesIn", "inFlight", "errors"];
/// Levels of the log, from the gravest on.
pub(super) const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

const ONE_VERSION: (&str, &str, &str) = (
    "version",
    "string",
    "MAJOR.MINOR.PATCH, where there are several",
);
const VERSION: &[(&str, &str, &str)] = &[ONE_VERSION];

/// All of them. Those that are not GET take a token.
pub const ROUTES: &[Route] = &[
    get("/healthz", "200 while the process lives"),
    Route {
        answers: (JSON, &[200, 503]),
        ..get(
            "/readyz",
            "200 while requests are served, 503 while the server drains; the files that did not load",
        )
    },
    get(
        "/listeners",
        "where the services are reached, and what is spoken there",
    ),
    Route {
        query: &[
            ("state", "only those in this state"),
            ("principal", "only those of this principal"),
            ("peer", "only those whose address begins so"),
            (
                "sort",
                "bytesIn, bytesOut, messagesIn, inFlight or errors: most first; else oldest first",
            ),
            ("limit", "how many at most"),
        ],
        ..get("/connections", "open connections")
    },
    Route {
        answers: (JSON, &[200, 404]),
        ..get("/connections/{id}", "one of them, with its calls")
    },
    Route {
        method: "DELETE",
        takes: Takes::Admin,
        answers: (JSON, &[200, 404]),
        ..get(
            "/connections/{id}",
            "close it gracefully: what was begun is answered",
        )
    },
    get("/calls", "calls that take longer than a millisecond or two"),
    Route {
        method: "DELETE",
        takes: Takes::Admin,
        answers: (JSON, &[200, 404]),
        ..get(
            "/calls/{id}",
            "stop one; its caller gets SERVICE_FAILED, reason killed",
        )
    },
    Route {
        query: &[
            ("requestId", "only that of this id, and what it caused"),
            ("service", "only those of this service"),
            ("limit", "how many at most"),
        ],
        ..get(
            "/calls/past",
            "the newest calls that failed or took more than 10 ms",
        )
    },
    get("/services", "services, and the files that did not load"),
    Route {
        answers: (JSON, &[200, 404]),
        ..get(
            "/services/{name}",
            "one of them in all its versions: schemas, limits, grants, latency, last calls that failed or were slow",
        )
    },
    Route {
        method: "PUT",
        takes: Takes::Deploy,
        query: &[
            ("force", "true: hold it although it breaks callers"),
            ("check", "true: check it and drop it"),
        ],
        ..post(
            "/services/{name}",
            "receive the file NAME.wasm or NAME@VERSION.wasm, check it, and hold it for two minutes at most",
            &[200, 409],
        )
    },
    Route {
        takes: Takes::Deploy,
        body: &[
            ("digest", "string", "as PUT has answered it"),
            (
                "undo",
                "boolean",
                "drop what is held, or serve again what was served before",
            ),
        ],
        required: &["digest"],
        ..post("/services/{name}/deploy", "serve what is held", &[200, 409])
    },
    post(
        "/services/reload",
        "look for changed components now, by what is in the files",
        &[200, 500],
    ),
    Route {
        takes: Takes::AdminOrDeploy,
        body: &[
            ONE_VERSION,
            (
                "undo",
                "boolean",
                "serve the file in the folder again, which was gone back from",
            ),
        ],
        ..post(
            "/services/{name}/rollback",
            "serve the file from before the present one",
            &[200, 409],
        )
    },
    Route {
        takes: Takes::AdminOrDeploy,
        body: VERSION,
        ..post(
            "/services/{name}/disable",
            "serve it no more, until it is enabled or the server starts again",
            &[200, 409],
        )
    },
    Route {
        takes: Takes::AdminOrDeploy,
        body: VERSION,
        ..post("/services/{name}/enable", "serve it again", &[200, 409])
    },
    Route {
        body: &[
            ("action", "string", "the topic without the service's name"),
            ("payload", "any", "JSON"),
            (
                "version",
                "string",
                "the version that the caller is written against",
            ),
            (
                "timeoutMs",
                "integer",
                "how long it may take, 5,000 if left out",
            ),
        ],
        required: &["action"],
        ..post(
            "/services/{name}/try",
            "call an action once, as the operator",
            &[200, 409],
        )
    },
    post(
        "/principals/{name}/disconnect",
        "close all connections of a principal gracefully: what was begun is answered, then UNAUTHORIZED",
        &[200],
    ),
    Route {
        answers: (LINES, &[200, 409]),
        ..post(
            "/store/export",
            "a backup of the durable values, as lines of JSON; one at a time",
            &[200],
        )
    },
    post(
        "/tls/reload",
        "read the certificates again; connections whose certificate does not hold any more are closed",
        &[200, 409],
    ),
    Route {
        body: &[("filter", "string", "as the setting log")],
        required: &["filter"],
        ..post(
            "/log/filter",
            "change what is logged, until the next start",
            &[200],
        )
    },
    post("/drain", "drain the server, as SIGTERM does", &[200]),
    get(
        "/config",
        "the effective settings, and where each comes from; secrets are masked",
    ),
    post(
        "/config/reload",
        "read the settings again, as SIGHUP does: apply what can be, name what waits",
        &[200, 409],
    ),
    Route {
        query: &[
            ("after", "only lines after this number"),
            (
                "level",
                "error, warn, info, debug or trace: at least this grave",
            ),
            ("target", "only lines with this target, such as audit"),
            ("service", "only lines of this service"),
            ("requestId", "only lines of this request"),
            (
                "contains",
                "only lines with this text in the message or a field",
            ),
            ("limit", "how many at most, the newest"),
        ],
        ..get("/log", "the newest lines of the log")
    },
    Route {
        answers: (EVENTS, &[200, 503]),
        ..get(
            "/events",
            "every second: totals, calls that run, new lines of the log",
        )
    },
    Route {
        answers: (PROMETHEUS, &[200]),
        ..get("/metrics", "counters, as Prometheus reads them")
    },
    get("/version", "what runs here"),
    get("/openapi.json", "this description, OpenAPI 3.1"),
];

/// The route of a request, with the values of its parameters, if there is one;
/// else whether there is the path, for another method.
pub(super) fn find<'a>(
    method: &str,
    path: &'a str,
) -> Result<(&'static Route, Vec<&'a str>), bool> {
    let mut other = false;
    // `/services/reload` is no service of that name.
    for route in ROUTES
        .iter()
        .filter(|route| !route.path.contains('{'))
        .chain(ROUTES.iter().filter(|route| route.path.contains('{')))
    {
        if let Some(values) = matches(route.path, path) {
            if route.method == method {
                return Ok((route, values));
            }
            other = true;
        }
    }
    Err(other)
}

/// The methods that a path takes, as the header `Allow` has them.
pub(super) fn methods(path: &str) -> String {
    // `/services/reload` is no service of that name.
    let literal = ROUTES.iter().any(|route| route.path == path);
    let named = |route: &&Route| {
        if literal {
            route.path == path
        } else {
            matches(route.path, path).is_some()
        }
    };
    let taken = ROUTES.iter().filter(named).map(|route| route.method);
    let mut taken: Vec<_> = taken
        .flat_map(|method| [Some(method), (method == "GET").then_some("HEAD")])
        .collect();
    taken.sort_unstable();
    taken.dedup();
    taken.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn matches<'a>(pattern: &str, path: &'a str) -> Option<Vec<&'a str>> {
    let (mut pattern, mut path) = (pattern.split('/'), path.split('/'));
    let mut values = Vec::new();
    loop {
        match (pattern.next(), path.next()) {
            (None, None) => return Some(values),
            (Some(named), Some(value)) if named.starts_with('{') && !value.is_empty() => {
                values.push(value)
            }
            (Some(expected), Some(found)) if expected == found => {}
            _ => return None,
        }
    }
}

/// The OpenAPI document of all routes.
pub(super) fn openapi() -> Value {
    let mut paths = serde_json::Map::new();
    for route in ROUTES {
        let entry = paths.entry(route.path).or_insert_with(|| json!({}));
        entry[route.method.to_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "mb-server admin endpoint",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Reading is open on this machine; what is not GET, and all from another machine, takes the \
                            token in state_dir/admin.token. Deploying takes that in state_dir/deploy.token, or in the \
                            file of admin.deploy_token, which also rolls back, disables and enables.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}},
        },
    })
}

fn operation(route: &Route) -> Value {
    let named = route
        .path
        .split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'));
    let in_path = named.map(|name| {
        let kind = if name == "id" { "integer" } else { "string" };
        json!({"name": name, "in": "path", "required": true, "schema": {"type": kind}})
    });
    let in_query = route.query.iter().map(|(name, what)| {
        let kind = match *name {
            "limit" | "after" => json!({"type": "integer", "minimum": 0}),
            "sort" => json!({"enum": SORTS}),
            "level" => json!({"enum": LEVELS}),
            "force" | "check" => json!({"type": "boolean"}),
            _ => json!({"type": "string"}),
        };
        json!({"name": name, "in": "query", "description": what, "schema": kind})
    });
    let parameters: Vec<_> = in_path.chain(in_query).collect();
    let mut responses = serde_json::Map::new();
    let (kind, statuses) = route.answers;
    for status in statuses {
        let fine = *status == 200 || route.path == "/readyz";
        let content = if fine {
            json!({kind: {"schema": if kind == JSON { json!({"type": "object"}) } else { json!({"type": "string"}) }}})
        } else {
            error()
        };
        responses.insert(
            status.to_string(),
            json!({"description": if fine { "done" } else { "refused" }, "content": content}),
        );
    }
    let always = [
        (400, "a parameter or the body is wrong"),
        (
            401,
            "the token is missing or wrong: what is not GET takes it, and from another machine all does",
        ),
        (403, "the Host header is not answered, or deploying is off"),
        (408, "the request did not arrive in time"),
        (411, "the body has no Content-Length"),
        (413, "the body is too large"),
        (431, "the header is too large"),
        (
            503,
            "too many requests or changes at the same time, or too many answers that were not read yet",
        ),
    ];
    for (status, description) in always {
        responses
            .entry(status.to_string())
            .or_insert_with(|| json!({"description": description, "content": error()}));
    }
    let mut operation =
        json!({"summary": route.what, "parameters": parameters, "responses": responses});
    if route.takes != Takes::Nothing {
        operation["security"] = json!([{"token": []}]);
    }
    if route.method == "PUT" {
        operation["requestBody"] = json!({"required": true, "content": {"application/wasm": {}}});
    }
    if !route.body.is_empty() {
        let property = |(name, kind, what): &(&str, &str, &str)| {
            let mut schema = json!({"description": what});
            if *kind != "any" {
                schema["type"] = json!(kind);
            }
            if *kind == "integer" {
                schema["minimum"] = json!(0);
            }
            ((*name).to_owned(), schema)
        };
        let properties: serde_json::Map<_, _> = route.body.iter().map(property).collect();
        let schema = json!({
            "type": "object", "additionalProperties": false, "properties": properties, "required": route.required,
        });
        let required = !route.required.is_empty();
        operation["requestBody"] =
            json!({"required": required, "content": {JSON: {"schema": schema}}});
    }
    operation
}

fn error() -> Value {
    json!({JSON: {"schema": {"$ref": "#/components/schemas/Error"}}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_their_route() {
        let found = |method: &str, path: &str| {
            find(method, path).map(|(route, values)| (route.path, values.join(",")))
        };
        assert_eq!(found("GET", "/services"), Ok(("/services", String::new())));
        assert_eq!(
            found("GET", "/services/calc"),
            Ok(("/services/{name}", "calc".into()))
        );
        assert_eq!(
            found("POST", "/services/reload"),
            Ok(("/services/reload", String::new()))
        );
        assert_eq!(
            found("GET", "/calls/past"),
            Ok(("/calls/past", String::new()))
        );
        assert_eq!(found("DELETE", "/calls/7"), Ok(("/calls/{id}", "7".into())));
        assert_eq!(found("POST", "/healthz"), Err(true));
        assert_eq!(
            (&*methods("/healthz"), &*methods("/calls/7")),
            ("GET, HEAD", "DELETE")
        );
        assert_eq!(methods("/services/reload"), "POST");
        assert_eq!(found("GET", "/services/"), Err(false));
        assert_eq!(found("GET", "/services/../healthz"), Err(false));
    }

    #[test]
    fn every_route_is_in_the_document() {
        let document = openapi();
        for route in ROUTES {
            let operation = &document["paths"][route.path][route.method.to_lowercase()];
            assert_eq!(operation["summary"], route.what);
            assert_eq!(
                operation["security"].is_array(),
                route.method != "GET",
                "{}",
                route.path
            );
            assert_eq!(route.takes == Takes::Nothing, route.method == "GET");
        }
    }
}

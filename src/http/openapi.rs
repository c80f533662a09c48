//! The OpenAPI 3.1 document of what a caller may call, from what the services
//! describe. No I/O.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::{response::status_of, schema::visit_all};
use crate::wire::{Code, Version};

/// An action that the caller may call.
#[derive(Debug, Clone, Copy)]
pub struct Operation<'a> {
    /// First segment of its topic.
    pub service: &'a str,
    /// Version of the service.
    pub version: Version,
    /// The caller has a right only where the request names the version.
    pub names_version: bool,
    /// For a person; may be empty.
    pub description: &'a str,
    /// JSON Schema of the payload, a valid one.
    pub input: Option<&'a Value>,
    /// JSON Schema of the answer, a valid one.
    pub output: Option<&'a Value>,
}

/// Refusals that have a status of their own, beside those by code.
const REFUSALS: [(u16, &str); 5] = [
    (415, "The body is neither JSON nor opaque bytes"),
    (417, "Something else than 100-continue is expected"),
    (421, "The Host is not answered without authentication"),
    (422, "The service's own failure; `origin` is `service`"),
    (431, "The head is too large"),
];

/// Where the schemas of actions stand.
const SCHEMAS: &str = "#/components/schemas/";

#[derive(Serialize)]
struct Document<P: Serialize, S: Serialize> {
    openapi: &'static str,
    info: Value,
    security: Value,
    paths: P,
    components: Components<S>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Components<S: Serialize> {
    schemas: S,
    parameters: Value,
    responses: Value,
    security_schemes: Value,
}

/// A map whose values are built one at a time, while they are written.
struct Lazily<F>(F);

impl<F: Fn() -> I, I: Iterator<Item = (String, Value)>> Serialize for Lazily<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map((self.0)())
    }
}

/// Writes the document of operations by topic. `must_authenticate`: whether
/// peers must authenticate before anything else.
///
/// # Errors
/// None that is known of.
pub fn document(
    operations: &BTreeMap<String, Operation<'_>>,
    must_authenticate: bool,
) -> serde_json::Result<String> {
    let schemes = [json!({}), json!({"bearer": []}), json!({"certificate": []})];
    let own = || operations.iter().flat_map(schemas);
    serde_json::to_string(&Document {
        openapi: "3.1.0",
        info: json!({
            "title": "mb-server",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "What this caller may call. A path may end with the version that is \
                asked for, as in /call/calc.add@1.0.0.",
        }),
        security: json!(schemes[usize::from(must_authenticate)..]),
        paths: Lazily(|| operations.iter().map(path)),
        components: Components {
            schemas: Lazily(|| own().chain([("Error".to_owned(), error())])),
            parameters: parameters(),
            responses: failures().into_iter().map(failure).collect(),
            security_schemes: json!({
                "bearer": {"type": "http", "scheme": "bearer"},
                "certificate": {"type": "mutualTLS"},
            }),
        },
    })
}

fn path((topic, operation): (&String, &Operation<'_>)) -> (String, Value) {
    let version = operation.version;
    let path = match operation.names_version {
        true => format!("/call/{topic}@{version}"),
        false => format!("/call/{topic}"),
    };
    let mut responses: Map<_, _> = failures()
        .into_keys()
        .map(|status| {
            let response = json!({"$ref": format!("#/components/responses/{status}")});
            (status.to_string(), response)
        })
        .collect();
    let answer = json!({
        "description": "The answer",
        "headers": {
            "Request-Id": {"schema": {"type": "string"}},
            "Service-Version": {"schema": {"type": "string"}, "example": version.to_string()},
        },
        "content": content(operation.output, &format!("{topic}.output")),
    });
    responses.insert("200".into(), answer);
    let parameters = ["Request-Id", "Parent-Request-Id", "Request-Timeout"]
        .map(|name| json!({"$ref": format!("#/components/parameters/{name}")}));
    let post = json!({
        "operationId": topic,
        "tags": [operation.service],
        "description": operation.description,
        "parameters": parameters,
        "requestBody": {"content": content(operation.input, &format!("{topic}.input"))},
        "responses": responses,
    });
    (path, json!({"post": post}))
}

/// The schemas of one action.
fn schemas(
    (topic, operation): (&String, &Operation<'_>),
) -> impl Iterator<Item = (String, Value)> + use<> {
    let both = [(operation.input, "input"), (operation.output, "output")];
    let named = both.map(|(schema, which)| {
        let name = format!("{topic}.{which}");
        let schema = schema.and_then(|schema| component(schema, &name))?;
        Some((name, schema))
    });
    named.into_iter().flatten()
}

/// A body: without a schema, JSON or bytes.
fn content(schema: Option<&Value>, name: &str) -> Value {
    if schema.and_then(|schema| component(schema, name)).is_none() {
        return json!({"application/json": {"schema": true}, "application/octet-stream": {}});
    }
    let schema = json!({"$ref": format!("{SCHEMAS}{name}")});
    json!({"application/json": {"schema": schema}})
}

/// A schema as it stands under a name in the document, where its references
/// count from the document's root. None where clients could not read it: a
/// reference leads out of it or nowhere.
fn component(schema: &Value, name: &str) -> Option<Value> {
    let mut own = schema.clone();
    if let Some(keywords) = own.as_object_mut() {
        keywords.remove("$id");
        keywords.remove("$schema");
    }
    let mut resolves = true;
    visit_all(&mut own, &mut |part| {
        // What has another base is not taken apart.
        resolves &= !part.contains_key("$id") && !part.contains_key("$dynamicRef");
        if let Some(Value::String(target)) = part.get_mut("$ref") {
            match target.strip_prefix('#') {
                Some(pointer) if schema.pointer(pointer).is_some() => {
                    *target = format!("{SCHEMAS}{name}{pointer}");
                }
                _ => resolves = false,
            }
        }
    });
    resolves.then_some(own)
}

/// What each status of a failure means.
fn failures() -> BTreeMap<u16, String> {
    let mut failures: BTreeMap<_, _> = REFUSALS
        .map(|(status, text)| (status, text.to_owned()))
        .into();
    for code in Code::ALL {
        let text: &mut String = failures.entry(status_of(Some(code))).or_default();
        let separator = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{separator}`{code}`");
    }
    failures
}

fn failure((status, description): (u16, String)) -> (String, Value) {
    let mut headers = json!({"Request-Id": {"schema": {"type": "string"}}});
    match status {
        401 => headers["WWW-Authenticate"] = json!({"schema": {"type": "string"}}),
        429 | 503 => headers["Retry-After"] = json!({"schema": {"type": "integer"}}),
        _ => {}
    }
    let schema = json!({"$ref": format!("{SCHEMAS}Error")});
    let content = json!({"application/json": {"schema": schema}});
    let response = json!({"description": description, "headers": headers, "content": content});
    (status.to_string(), response)
}

fn parameters() -> Value {
    let id = json!({"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"});
    let timeout = json!({"type": "integer", "minimum": 1, "maximum": 3_600_000});
    let parameter = |name: &str, description: &str, schema: &Value| json!({"name": name, "in": "header", "description": description, "schema": schema});
    json!({
        "Request-Id": parameter("Request-Id", "The server creates one where it is left out", &id),
        "Parent-Request-Id": parameter("Parent-Request-Id", "The request that caused it", &id),
        "Request-Timeout": parameter("Request-Timeout", "Milliseconds", &timeout),
    })
}

/// The ERROR object.
fn error() -> Value {
    json!({
        "type": "object",
        "required": ["code", "message", "timestamp", "origin"],
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z][A-Z0-9_]{0,63}$"},
            "message": {"type": "string"},
            "timestamp": {"type": "string", "format": "date-time"},
            "origin": {"enum": ["server", "service"]},
            "details": true,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(input: &Value, names_version: bool, must_authenticate: bool) -> Value {
        let add = Operation {
            service: "calc",
            version: Version::new(1, 2, 3),
            names_version,
            description: "Adds",
            input: Some(input),
            output: None,
        };
        let operations = [("calc.add".to_owned(), add)].into();
        serde_json::from_str(&document(&operations, must_authenticate).unwrap()).unwrap()
    }

    #[test]
    fn a_path_has_schemas_examples_and_all_failures() {
        let open = of(
            &json!({"type": "object", "examples": [{"a": 1}]}),
            false,
            false,
        );
        let post = &open["paths"]["/call/calc.add"]["post"];
        let body = &post["requestBody"]["content"];
        assert_eq!(
            body["application/json"]["schema"]["$ref"],
            "#/components/schemas/calc.add.input"
        );
        let schema = &open["components"]["schemas"]["calc.add.input"];
        assert_eq!(schema["examples"], json!([{"a": 1}]));
        assert_eq!(body.get("application/octet-stream"), None);
        let answer = &post["responses"]["200"];
        assert!(answer["content"].get("application/octet-stream").is_some());
        assert_eq!(answer["headers"]["Service-Version"]["example"], "1.2.3");
        for code in Code::ALL {
            let response = &open["components"]["responses"][status_of(Some(code)).to_string()];
            let description = response["description"].as_str().unwrap();
            assert!(description.contains(code.as_str()), "{code}");
        }
        assert_eq!(
            post["responses"].as_object().unwrap().len(),
            1 + open["components"]["responses"].as_object().unwrap().len()
        );
    }

    #[test]
    fn who_must_authenticate_and_name_versions_reads_so() {
        let anything = json!(true);
        assert_eq!(of(&anything, false, false)["security"][0], json!({}));
        let closed = of(&anything, true, true);
        assert_eq!(closed["security"][0], json!({"bearer": []}));
        assert!(closed["paths"].get("/call/calc.add@1.2.3").is_some());
    }

    #[test]
    fn references_count_from_the_root_of_the_document() {
        let schema = json!({
            "$id": "https://example.com/order.json",
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "properties": {"$ref": {"$ref": "#/$defs/item"}, "all": {"$ref": "#"}},
            "$defs": {"item": {"const": {"$ref": "#/nowhere"}}},
        });
        let open = of(&schema, false, false);
        let found = &open["components"]["schemas"]["calc.add.input"];
        let expected = json!({
            "properties": {
                "$ref": {"$ref": "#/components/schemas/calc.add.input/$defs/item"},
                "all": {"$ref": "#/components/schemas/calc.add.input"},
            },
            "$defs": {"item": {"const": {"$ref": "#/nowhere"}}},
        });
        assert_eq!(*found, expected);
        assert!(
            open.pointer("/components/schemas/calc.add.input/$defs/item")
                .is_some()
        );
    }

    #[test]
    fn schemas_that_clients_could_not_read_are_left_out() {
        for schema in [
            json!({"$ref": "#/$defs/none"}),
            json!({"$ref": "https://example.com/x.json"}),
            json!({"$ref": "other.json"}),
            json!({"items": {"$ref": "#anchor"}}),
            json!({"items": {"$id": "https://example.com/x.json"}}),
        ] {
            let open = of(&schema, false, false);
            let schemas = open["components"]["schemas"].as_object().unwrap();
            assert_eq!(schemas.len(), 1, "{schema}");
            let content = &open["paths"]["/call/calc.add"]["post"]["requestBody"]["content"];
            assert_eq!(content["application/json"]["schema"], true);
        }
    }
}

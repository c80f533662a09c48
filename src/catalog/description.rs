//! What a service says of itself, read once into types.

use std::sync::OnceLock;

use jsonschema::draft202012;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::wire::{Topic, Version, header::is_segment, json};

/// Longest name of a service, so that it leaves room for an action.
pub const MAX_NAME_SIZE: usize = 100;
/// Longest name of an action.
pub const MAX_ACTION_SIZE: usize = 150;
/// Most actions of one service.
pub const MAX_ACTIONS: usize = 256;
/// Longest description, of the service or of an action, in bytes.
pub const MAX_DESCRIPTION_SIZE: usize = 4096;

/// Longest document, in bytes: `system.services` gives out all of them.
pub const MAX_DOCUMENT_SIZE: usize = 64 * 1024;
/// How deep the document may nest: in the answer of `system.services`, a
/// schema stands two levels deeper than in it.
const MAX_DOCUMENT_DEPTH: usize = json::MAX_DEPTH - 2;

/// The name that is the server itself.
pub const SYSTEM: &str = "system";

/// A checked `describe` document.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// First segment of the service's topics.
    pub name: String,
    /// Its version.
    pub version: Version,
    /// For a person; may be empty.
    pub description: String,
    /// What it answers to.
    pub actions: Vec<Action>,
}

/// One action.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Action {
    /// The topic without the service's name.
    pub name: String,
    /// For a person; may be empty.
    #[serde(default)]
    pub description: String,
    /// JSON Schema of a JSON payload.
    #[serde(default)]
    pub input: Option<Value>,
    /// JSON Schema of a JSON answer.
    #[serde(default)]
    pub output: Option<Value>,
    /// See [`Action::valid_schemas`]. Looked at once, and not at each start.
    #[serde(skip)]
    pub(super) valid: OnceLock<[bool; 2]>,
}

impl Action {
    /// Returns the schemas of input and output, without those that are invalid
    /// by JSON Schema 2020-12.
    #[must_use]
    pub fn valid_schemas(&self) -> [Option<&Value>; 2] {
        let both = [self.input.as_ref(), self.output.as_ref()];
        let is_valid = |schema: Option<&Value>| schema.is_some_and(draft202012::meta::is_valid);
        let [input, output] = *self.valid.get_or_init(|| both.map(is_valid));
        [both[0].filter(|_| input), both[1].filter(|_| output)]
    }
}

/// The document as it comes. Unknown fields are passed over, so that later
/// contracts can add some.
#[derive(Deserialize)]
struct Document {
    name: String,
    version: String,
    #[serde(default)]
    description: String,
    actions: Vec<Action>,
}

impl Description {
    /// Reads and checks a document.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn parse(text: &str) -> Result<Self, DescriptionError> {
        let fail = |problem: String| Err(DescriptionError(problem));
        if text.len() > MAX_DOCUMENT_SIZE {
            return fail(format!(
                "it has {} bytes, allowed are {MAX_DOCUMENT_SIZE}",
                text.len()
            ));
        }
        let check =
            json::check_text(text).and_then(|()| json::check_depth(text, MAX_DOCUMENT_DEPTH));
        check.map_err(|e| DescriptionError(format!("it is {e}")))?;
        let Document {
            name,
            version,
            description,
            actions,
        } = serde_json::from_str(text).map_err(|e| DescriptionError(e.to_string()))?;
        if !is_name(&name) {
            return fail(format!(
                "name {name:?} must be a letter, then letters, digits, - and _, at most {MAX_NAME_SIZE} bytes, \
                 and not {SYSTEM:?}"
            ));
        }
        let version = version
            .parse()
            .map_err(|e| DescriptionError(format!("version {version:?}: {e}")))?;
        if actions.is_empty() || actions.len() > MAX_ACTIONS {
            return fail(format!(
                "{} actions, allowed is 1 to {MAX_ACTIONS}",
                actions.len()
            ));
        }
        for (index, action) in actions.iter().enumerate() {
            let Action {
                name: action_name,
                description,
                input: _,
                output: _,
                valid: _,
            } = action;
            let topic = format!("{name}.{action_name}");
            if action_name.len() > MAX_ACTION_SIZE || Topic::parse(&topic).is_err() {
                return fail(format!(
                    "action {action_name:?} must be 1 to 4 segments joined by dots, at most {MAX_ACTION_SIZE} bytes"
                ));
            }
            if actions[..index]
                .iter()
                .any(|other| other.name == *action_name)
            {
                return fail(format!("action {action_name:?} stands twice"));
            }
            check_size("description of an action", description)?;
        }
        check_size("description", &description)?;
        Ok(Self {
            name,
            version,
            description,
            actions,
        })
    }

    /// Whether the service has an action of this name.
    #[must_use]
    pub fn has_action(&self, name: &str) -> bool {
        self.actions.iter().any(|action| action.name == name)
    }
}

/// Whether a service may be called so.
#[must_use]
pub fn is_name(name: &str) -> bool {
    is_segment(name) && name.len() <= MAX_NAME_SIZE && name != SYSTEM
}

fn check_size(what: &str, text: &str) -> Result<(), DescriptionError> {
    if text.len() <= MAX_DESCRIPTION_SIZE {
        return Ok(());
    }
    Err(DescriptionError(format!(
        "{what} of {} bytes exceeds the limit of {MAX_DESCRIPTION_SIZE}",
        text.len()
    )))
}

/// What is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("what describe returns does not follow its schema: {0}")]
pub struct DescriptionError(String);

impl DescriptionError {
    pub(super) fn new(problem: String) -> Self {
        Self(problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The published schema, which must agree with the code on every case.
    fn schema_accepts(text: &str) -> bool {
        let schema: Value =
            serde_json::from_str(include_str!("../../wit/describe.schema.json")).unwrap();
        serde_json::from_str(text).is_ok_and(|document| jsonschema::is_valid(&schema, &document))
    }

    #[test]
    fn invalid_schemas_are_left_out() {
        let of = |schema: Value| {
            let actions = json!([{"name": "x", "input": schema, "output": {}}]);
            let document = json!({"name": "a", "version": "1.0.0", "actions": actions});
            let action = Description::parse(&document.to_string()).unwrap().actions[0].clone();
            action.valid_schemas().map(|schema| schema.is_some())
        };
        for schema in [json!({"type": "object"}), json!(true)] {
            assert_eq!(of(schema), [true, true]);
        }
        for schema in [
            json!(null),
            json!(1),
            json!({"type": "x"}),
            json!({"properties": []}),
        ] {
            assert_eq!(of(schema), [false, true]);
        }
    }

    #[test]
    fn documents() {
        let base = json!({"name": "calc", "version": "1.0.0", "actions": [{"name": "add"}]});
        let check = |change: &dyn Fn(&mut Value), problem: Option<&str>| {
            let mut document = base.clone();
            change(&mut document);
            let text = document.to_string();
            let parsed = Description::parse(&text);
            assert_eq!(
                parsed.is_ok(),
                schema_accepts(&text),
                "schema and code disagree about {text}"
            );
            match (parsed, problem) {
                (Ok(_), None) => {}
                (Err(error), Some(problem)) => {
                    assert!(error.to_string().contains(problem), "{error}")
                }
                (parsed, problem) => panic!("{text}: {parsed:?}, expected {problem:?}"),
            }
        };
        check(&|_| {}, None);
        check(&|d| d["later"] = json!({"x": 1}), None);
        check(
            &|d| d["actions"][0]["input"] = json!({"type": "object"}),
            None,
        );
        check(&|d| d["actions"][0]["input"] = json!(true), None);
        check(&|d| d["actions"][0]["name"] = json!("a.b.c.d"), None);
        check(&|d| d["name"] = json!("system"), Some("system"));
        check(&|d| d["name"] = json!("a.b"), Some("letter"));
        check(&|d| d["name"] = json!(""), Some("letter"));
        check(&|d| d["name"] = json!("a".repeat(101)), Some("100"));
        check(&|d| d["version"] = json!("1.0"), Some("MAJOR.MINOR.PATCH"));
        check(
            &|d| d["version"] = json!("01.0.0"),
            Some("MAJOR.MINOR.PATCH"),
        );
        check(&|d| d["actions"] = json!([]), Some("0 actions"));
        check(
            &|d| d["actions"][0]["name"] = json!("a.b.c.d.e"),
            Some("segments"),
        );
        check(&|d| d["actions"][0]["name"] = json!("1"), Some("segments"));
        check(
            &|d| d["description"] = json!("x".repeat(5000)),
            Some("5000"),
        );
        check(&|d| *d = json!([]), Some("invalid"));
        check(
            &|d| drop(d.as_object_mut().unwrap().remove("actions")),
            Some("actions"),
        );
        let twice =
            json!({"name": "a", "version": "1.0.0", "actions": [{"name": "x"}, {"name": "x"}]});
        assert!(
            Description::parse(&twice.to_string())
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
        assert!(Description::parse("nope").is_err());
        let with = |schema: &str| {
            let text = format!(
                "{{\"name\":\"a\",\"version\":\"1.0.0\",\"actions\":[{{\"name\":\"x\",\"input\":{schema}}}]}}"
            );
            Description::parse(&text).map_err(|error| error.to_string())
        };
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(with(&nested(122)).is_ok());
        assert!(with(&nested(123)).unwrap_err().contains("limit of 125"));
        let long = |size: usize| format!("\"{}\"", "x".repeat(size));
        assert!(with(&long(60_000)).is_ok());
        assert!(
            with(&long(70_000))
                .unwrap_err()
                .contains("allowed are 65536")
        );
    }
}

//! Payloads held against the schemas of their actions, where the operator
//! asks for it.

use std::collections::BTreeMap;

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use super::{
    description::{Action, Description, DescriptionError},
    tree::most_memory,
};
use crate::wire::Payload;

/// Longest account of what does not fit, in bytes: a service's own names are
/// in it.
const MAX_PROBLEM: usize = 300;
/// Memory that one regular expression of a schema may take, in bytes.
const MAX_PATTERN: usize = 1024 * 1024;
/// Longest payload in bytes whose values are not worth reserving memory for.
const SMALL: usize = 1024;

/// The input schemas of one service, ready to be used.
pub struct Inputs(BTreeMap<String, Validator>);

/// What of a payload does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidationError {
    /// Where, as a JSON Pointer; empty for the payload itself.
    pub path: String,
    /// Where and why, for a person.
    pub problem: String,
}

impl Inputs {
    /// Prepares the schemas that a service has. Regular expressions take time
    /// that grows with the text alone, and nothing is fetched.
    ///
    /// # Errors
    /// A schema is none.
    pub fn of(description: &Description) -> Result<Self, DescriptionError> {
        let prepare = |action: &Action| {
            let schema = action.input.as_ref().filter(|schema| !schema.is_null())?;
            let patterns = PatternOptions::regex()
                .size_limit(MAX_PATTERN)
                .dfa_size_limit(MAX_PATTERN);
            let built = jsonschema::options()
                .with_pattern_options(patterns)
                .build(schema);
            let built = built.map_err(|error| {
                DescriptionError::new(format!(
                    "the input schema of {} can't be used, and validate = true asks for it: {}",
                    action.name,
                    cut(error.to_string())
                ))
            });
            Some(built.map(|validator| (action.name.clone(), validator)))
        };
        description
            .actions
            .iter()
            .filter_map(prepare)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The most memory that [`Inputs::check`] takes for a payload, in bytes;
    /// whoever calls that reserves it before. Zero for one of 1 KiB or less.
    ///
    /// # Errors
    /// The payload holds what no value can: it does not fit.
    pub fn memory(&self, action: &str, payload: Payload<'_>) -> Result<usize, ValidationError> {
        match payload {
            Payload::Json(text) if text.len() > SMALL && self.0.contains_key(action) => {
                most_memory(text)
                    .map_err(|error| validation_error(String::new(), &error.to_string()))
            }
            Payload::Json(_) | Payload::Binary(_) => Ok(0),
        }
    }

    /// Holds a payload against the schema of an action, if that has one.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self, action: &str, payload: Payload<'_>) -> Result<(), ValidationError> {
        let Some(validator) = self.0.get(action) else {
            return Ok(());
        };
        let Payload::Json(text) = payload else {
            return Err(validation_error(
                String::new(),
                &format!("{action} takes JSON, not bytes"),
            ));
        };
        // It is JSON, but a number or half a surrogate pair may be beyond what
        // a value can hold.
        let value: Value = serde_json::from_str(text)
            .map_err(|error| validation_error(String::new(), &error.to_string()))?;
        // What the caller sent is not repeated: it may be long, or secret.
        let fits = validator.validate(&value);
        fits.map_err(|error| {
            validation_error(
                error.instance_path().to_string(),
                &error.masked().to_string(),
            )
        })
    }
}

fn validation_error(path: String, why: &str) -> ValidationError {
    let location = if path.is_empty() {
        "payload".into()
    } else {
        format!("payload at {path}")
    };
    ValidationError {
        problem: cut(format!("{location}: {why}")),
        path: cut(path),
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_PROBLEM));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(schema: &str) -> Result<Inputs, DescriptionError> {
        let text = format!(
            r#"{{"name":"a","version":"1.0.0","actions":[{{"name":"x","input":{schema}}},{{"name":"y"}}]}}"#
        );
        Inputs::of(&Description::parse(&text).unwrap())
    }

    #[test]
    fn payloads_are_held_against_their_schema() {
        let inputs = inputs(
            r#"{"type":"object","required":["items"],"properties":{"items":{"items":{"type":"integer"}},
                "name":{"pattern":"^(a+)+$"}}}"#,
        );
        let inputs = inputs.unwrap();
        let check = |payload: Payload<'_>, path: &str, part: &str| match inputs.check("x", payload)
        {
            Ok(()) => assert_eq!(part, "", "{payload:?} fits"),
            Err(ValidationError {
                path: found,
                problem,
            }) => {
                assert_eq!(found, path, "{problem}");
                assert!(!part.is_empty() && problem.contains(part), "{problem}");
            }
        };
        check(Payload::Json(r#"{"items":[1,2]}"#), "", "");
        check(
            Payload::Json(r#"{"items":[1,"my secret"]}"#),
            "/items/1",
            "payload at /items/1: value is not of type",
        );
        check(Payload::Json("{}"), "", "\"items\" is a required property");
        check(Payload::Json("null"), "", "payload: value is not of type");
        check(Payload::Json("\"\\ud800\""), "", "payload: ");
        check(Payload::Binary(b"{}"), "", "takes JSON");
        let long = format!(r#"{{"items":[],"name":"{}!"}}"#, "a".repeat(100_000));
        check(Payload::Json(&long), "/name", "does not match");
        assert_eq!(inputs.check("y", Payload::Binary(b"any")), Ok(()));
    }

    #[test]
    fn what_is_no_schema_is_said() {
        for schema in [
            r#"{"type":"nothing"}"#,
            r#"{"pattern":"("}"#,
            r#"{"$ref":"https://example.com/x.json"}"#,
        ] {
            let error = inputs(schema).err().unwrap().to_string();
            assert!(
                error.contains("the input schema of x can't be used"),
                "{error}"
            );
        }
        assert!(inputs("null").is_ok());
    }
}

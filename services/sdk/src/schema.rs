//! JSON Schemas from the types of a handler, for those that derive
//! `schemars::JsonSchema`; the others have none.
//!
//! Which of the two it is, is decided where the macro is expanded, by method
//! look-up: the trait that needs more is implemented for more references and
//! so found first.

use std::marker::PhantomData;

use schemars::{JsonSchema, generate::SchemaSettings};

use crate::Failure;

/// The types of a handler.
pub struct Probe<A, R>(PhantomData<(A, R)>);

/// Learns them from the handler itself.
pub fn probe<A, R>(_handler: impl Fn(A) -> R) -> Probe<A, R> {
    Probe(PhantomData)
}

/// The schema as text.
fn schema_of<T: JsonSchema>() -> Option<String> {
    // In one piece where that is possible: what contains itself is not.
    let settings = SchemaSettings::default().with(|settings| settings.inline_subschemas = true);
    let mut generator = settings.into_generator();
    let mut schema = T::json_schema(&mut generator);
    let shared = generator.take_definitions(true);
    if !shared.is_empty() {
        schema.insert("$defs".into(), shared.into());
    }
    serde_json::to_string(&schema).ok()
}

/// The value that a handler takes has a schema.
pub trait InputSchema {
    /// The schema as text.
    fn input(&self) -> Option<String>;
}

impl<A: JsonSchema, R> InputSchema for &Probe<A, R> {
    fn input(&self) -> Option<String> {
        schema_of::<A>()
    }
}

/// It has none.
pub trait AnyInput {
    /// None.
    fn input(&self) -> Option<String>;
}

impl<A, R> AnyInput for Probe<A, R> {
    fn input(&self) -> Option<String> {
        None
    }
}

/// The value that a handler answers or refuses to has a schema.
pub trait ResultSchema {
    /// The schema as text.
    fn output(&self) -> Option<String>;
}

impl<A, T: JsonSchema> ResultSchema for &&Probe<A, Result<T, Failure>> {
    fn output(&self) -> Option<String> {
        schema_of::<T>()
    }
}

/// The value that a handler answers has a schema.
pub trait AnswerSchema {
    /// The schema as text.
    fn output(&self) -> Option<String>;
}

impl<A, R: JsonSchema> AnswerSchema for &Probe<A, R> {
    fn output(&self) -> Option<String> {
        schema_of::<R>()
    }
}

/// It has none.
pub trait AnyOutput {
    /// None.
    fn output(&self) -> Option<String>;
}

impl<A, R> AnyOutput for Probe<A, R> {
    fn output(&self) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Payload;

    #[derive(JsonSchema)]
    #[allow(dead_code)]
    struct Tree {
        /// What it holds.
        value: u8,
        children: Vec<Tree>,
    }

    fn input(schema: Option<String>) -> serde_json::Value {
        serde_json::from_str(&schema.unwrap()).unwrap()
    }

    #[test]
    fn types_that_have_a_schema_show_it() {
        let known = probe(|tree: Tree| Ok::<Tree, Failure>(tree));
        let schema = input((&&known).input());
        assert_eq!(
            schema["properties"]["value"]["description"],
            "What it holds."
        );
        assert_eq!(
            schema["$defs"]["Tree"]["properties"]["children"]["items"]["$ref"],
            "#/$defs/Tree"
        );
        assert_eq!(input((&&&known).output())["type"], "object");
        assert_eq!(input((&&&probe(|(): ()| 7_u8)).output())["type"], "integer");
        let unknown = probe(|payload: Payload| payload);
        assert_eq!(((&&unknown).input(), (&&&unknown).output()), (None, None));
    }
}

//! The document that tells the server who a service is.

use std::borrow::Cow;

use serde::{Serialize, Serializer, ser::Error};
use serde_json::value::RawValue;

/// A service as it introduces itself; [`service!`](crate::service) fills it in.
#[derive(Serialize)]
pub struct Description<'a> {
    /// First segment of the service's topics; the component's file carries it.
    pub name: &'a str,
    /// `MAJOR.MINOR.PATCH`.
    pub version: &'a str,
    /// One or two sentences for a person.
    pub description: &'a str,
    /// Every action that the service answers to.
    pub actions: &'a [Action<'a>],
}

/// One action of a [`Description`].
#[derive(Serialize, Default)]
pub struct Action<'a> {
    /// The topic without the service's name.
    pub name: &'a str,
    /// One or two sentences for a person.
    pub description: &'a str,
    /// JSON Schema, as text, of the JSON payload that the action takes.
    #[serde(serialize_with = "embedded", skip_serializing_if = "Option::is_none")]
    pub input: Option<Cow<'a, str>>,
    /// JSON Schema, as text, of the JSON payload that it answers.
    #[serde(serialize_with = "embedded", skip_serializing_if = "Option::is_none")]
    pub output: Option<Cow<'a, str>>,
}

impl Description<'_> {
    /// The JSON document.
    ///
    /// # Panics
    ///
    /// Where a schema is no JSON: the server then refuses to load the service.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("the schemas are JSON")
    }
}

/// Writes a schema as the JSON that it is, not as a string.
fn embedded<S: Serializer>(
    schema: &Option<Cow<'_, str>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    schema
        .as_deref()
        .map(serde_json::from_str::<&RawValue>)
        .transpose()
        .map_err(S::Error::custom)?
        .serialize(serializer)
}

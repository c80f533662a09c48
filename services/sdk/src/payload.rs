//! What the generated types can do.

use serde::{Serialize, de::DeserializeOwned};

use crate::{Failure, Payload};

impl Payload {
    /// A JSON payload that holds `value`.
    pub fn json(value: &impl Serialize) -> Result<Self, Failure> {
        serde_json::to_string(value)
            .map(Payload::Json)
            .map_err(|error| Failure::new("INVALID_ANSWER", error.to_string()))
    }

    /// The value in a JSON payload. What doesn't fit `T` is the caller's
    /// mistake: `INVALID_ARGUMENTS`, with serde's word on what is wrong where.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        let invalid = |message: String| Failure::new("INVALID_ARGUMENTS", message);
        match self {
            Payload::Json(text) => {
                serde_json::from_str(text).map_err(|error| invalid(error.to_string()))
            }
            Payload::Binary(_) => Err(invalid("expected a JSON payload, got binary".into())),
        }
    }
}

impl Failure {
    /// A refusal. `code` is for programs and matches `[A-Z][A-Z0-9_]{0,63}`;
    /// `message` is one sentence for the person who reads the caller's log.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Failure {
            code: code.into(),
            message: message.into(),
            details: None,
        }
    }

    /// Adds what a program needs to know beyond the code.
    ///
    /// # Panics
    ///
    /// Where `details` has no JSON form, as a map whose keys are no strings.
    #[must_use]
    pub fn with_details(mut self, details: impl Serialize) -> Self {
        self.details = Some(serde_json::to_string(&details).expect("details have a JSON form"));
        self
    }
}

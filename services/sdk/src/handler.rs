//! From a typed function to an action: [`Arguments`] → function → [`Answer`].

use serde::{Serialize, de::DeserializeOwned};

use crate::{Failure, Payload};

/// What a handler may take: anything that serde deserialises, from a JSON
/// payload, or the [`Payload`] itself. `()` is the empty payload.
#[diagnostic::on_unimplemented(
    message = "a handler can't take `{Self}`",
    note = "it takes one value that is `serde::Deserialize` and owns its data, or a `Payload`"
)]
pub trait Arguments: Sized {
    /// Takes the value out of a request's payload.
    fn from_payload(payload: Payload) -> Result<Self, Failure>;
}

impl<T: DeserializeOwned> Arguments for T {
    fn from_payload(payload: Payload) -> Result<Self, Failure> {
        payload.parse()
    }
}

impl Arguments for Payload {
    fn from_payload(payload: Payload) -> Result<Self, Failure> {
        Ok(payload)
    }
}

/// What a handler may answer: anything that serde serialises, as a JSON
/// payload, or a [`Payload`]; and a `Result` of either with a [`Failure`].
///
/// `Kind` is inferred. It only keeps the implementations apart: serde could
/// make every `Result` serialise one day.
#[diagnostic::on_unimplemented(
    message = "a handler can't answer `{Self}`",
    note = "it answers a value that is `serde::Serialize`, a `Payload`, or a `Result<_, Failure>` of either"
)]
pub trait Answer<Kind = ()> {
    /// Makes a payload or a refusal of the value.
    fn into_result(self) -> Result<Payload, Failure>;
}

impl<T: Serialize> Answer for T {
    fn into_result(self) -> Result<Payload, Failure> {
        Payload::json(&self)
    }
}

impl Answer for Payload {
    fn into_result(self) -> Result<Payload, Failure> {
        Ok(self)
    }
}

impl<T: Answer> Answer<Failure> for Result<T, Failure> {
    fn into_result(self) -> Result<Payload, Failure> {
        self?.into_result()
    }
}

/// Calls a handler with a request's payload, as [`service!`](crate::service) does.
pub fn call<A: Arguments, R: Answer<K>, K>(
    handler: impl FnOnce(A) -> R,
    payload: Payload,
) -> Result<Payload, Failure> {
    handler(A::from_payload(payload)?).into_result()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn json(text: &str) -> Payload {
        Payload::Json(text.into())
    }

    #[test]
    fn every_kind_of_handler_fits() {
        let refuse = || Failure::new("NO", "no").with_details([1, 2]);
        assert_eq!(call(|n: u8| n + 1, json("1")), Ok(json("2")));
        assert_eq!(
            call(|n: u8| Ok::<_, Failure>(n + 1), json("1")),
            Ok(json("2"))
        );
        assert_eq!(call(|()| (), json("null")), Ok(json("null")));
        assert_eq!(call(|p: Payload| p, json("as it is")), Ok(json("as it is")));
        assert_eq!(
            call(|p: Payload| Ok::<_, Failure>(p), Payload::Binary(vec![7])),
            Ok(Payload::Binary(vec![7]))
        );
        assert_eq!(
            call(|()| Err::<(), _>(refuse()), json("null")),
            Err(refuse())
        );
        assert_eq!(refuse().details.as_deref(), Some("[1,2]"));
    }

    #[test]
    fn what_does_not_fit_is_a_failure() {
        let code = |result: Result<Payload, Failure>| result.unwrap_err().code;
        assert_eq!(code(call(|_: u8| (), json("256"))), "INVALID_ARGUMENTS");
        assert_eq!(
            code(call(|_: u8| (), Payload::Binary(vec![]))),
            "INVALID_ARGUMENTS"
        );
        assert_eq!(
            code(call(|()| BTreeMap::from([([1], 2)]), json("null"))),
            "INVALID_ANSWER"
        );
    }
}

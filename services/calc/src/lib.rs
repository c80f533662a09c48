//! Sums and quotients, exact wherever both numbers are integers.

use mb_service::{Failure, service};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Number;

/// The arguments of every action. A [`Number`] remembers whether it was
/// written as an integer, so that 2 + 40 is 42 and not 42.0.
#[derive(Deserialize, JsonSchema)]
#[schemars(extend("examples" = [{"a": 2, "b": 40}]))]
struct Pair {
    /// The first number.
    #[schemars(with = "f64")]
    a: Number,
    /// The second one.
    #[schemars(with = "f64")]
    b: Number,
}

impl Pair {
    /// Both as integers, where both are. JSON's are at most 64 bits wide here,
    /// so 128 hold the result of any one operation.
    fn integers(&self) -> Option<(i128, i128)> {
        self.a.as_i128().zip(self.b.as_i128())
    }

    fn floats(&self) -> (f64, f64) {
        let float = |number: &Number| number.as_f64().expect("every JSON number has a float");
        (float(&self.a), float(&self.b))
    }
}

#[derive(Serialize, JsonSchema)]
struct Sum {
    #[schemars(with = "f64")]
    sum: Number,
}

#[derive(Serialize, JsonSchema)]
struct Quotient {
    #[schemars(with = "f64")]
    quotient: Number,
}

fn add(pair: Pair) -> Result<Sum, Failure> {
    let sum = match pair.integers() {
        Some((a, b)) => Number::from_i128(a + b),
        None => {
            let (a, b) = pair.floats();
            Number::from_f64(a + b)
        }
    };
    sum.map(|sum| Sum { sum }).ok_or_else(out_of_range)
}

fn divide(pair: Pair) -> Result<Quotient, Failure> {
    let (a, b) = pair.floats();
    if b == 0.0 {
        return Err(Failure::new("DIVISION_BY_ZERO", "b must not be zero"));
    }
    let quotient = match pair.integers() {
        Some((a, b)) if a % b == 0 => Number::from_i128(a / b),
        _ => Number::from_f64(a / b),
    };
    quotient
        .map(|quotient| Quotient { quotient })
        .ok_or_else(out_of_range)
}

/// Neither a 64-bit integer nor a finite float holds the result.
fn out_of_range() -> Failure {
    Failure::new("OUT_OF_RANGE", "the result is too large")
}

service! {
    /// Adds: {"a","b"} → {"sum"}. Integers stay integers.
    "add" => add,
    /// Divides: {"a","b"} → {"quotient"}, an integer where it comes out even.
    "divide" => divide,
}

#[cfg(test)]
mod tests {
    use mb_service::{Guest, Payload};

    use super::Service;

    /// Calls as the server does; a failure is checked by its code.
    #[track_caller]
    fn check(action: &str, arguments: &str, expected: &str) {
        let answer = match Service::handle(action.into(), Payload::Json(arguments.into())) {
            Ok(Payload::Json(text)) => text,
            Ok(Payload::Binary(_)) => panic!("{action} answered bytes"),
            Err(failure) => failure.code,
        };
        assert_eq!(answer, expected, "{action} {arguments}");
    }

    #[test]
    fn adds() {
        check("add", r#"{"a":2,"b":40}"#, r#"{"sum":42}"#);
        check("add", r#"{"a":2.5,"b":40}"#, r#"{"sum":42.5}"#);
        check(
            "add",
            r#"{"a":9007199254740993,"b":-1}"#,
            r#"{"sum":9007199254740992}"#,
        );
        check(
            "add",
            r#"{"a":9223372036854775807,"b":1}"#,
            r#"{"sum":9223372036854775808}"#,
        );
        check("add", r#"{"a":18446744073709551615,"b":1}"#, "OUT_OF_RANGE");
        check("add", r#"{"a":1.7e308,"b":1.7e308}"#, "OUT_OF_RANGE");
    }

    #[test]
    fn divides() {
        check("divide", r#"{"a":84,"b":2}"#, r#"{"quotient":42}"#);
        check("divide", r#"{"a":1,"b":8}"#, r#"{"quotient":0.125}"#);
        check(
            "divide",
            r#"{"a":-9223372036854775808,"b":-1}"#,
            r#"{"quotient":9223372036854775808}"#,
        );
        check("divide", r#"{"a":1,"b":0}"#, "DIVISION_BY_ZERO");
        check("divide", r#"{"a":1.5,"b":-0.0}"#, "DIVISION_BY_ZERO");
        check("divide", r#"{"a":1e308,"b":1e-308}"#, "OUT_OF_RANGE");
    }

    #[test]
    fn refuses_what_is_no_pair_of_numbers() {
        for arguments in [
            "null",
            "[]",
            r#"{"a":1}"#,
            r#"{"a":1,"b":"2"}"#,
            r#"{"a":1,"b":null}"#,
        ] {
            check("add", arguments, "INVALID_ARGUMENTS");
        }
    }
}

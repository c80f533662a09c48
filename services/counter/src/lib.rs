//! Counters by name that outlive the server: needs the grant `keyvalue`.

use mb_service::{Failure, keyvalue::Bucket, service};
use serde::{Deserialize, Serialize};

/// Longest name, in bytes.
const MAX_NAME: usize = 64;

#[derive(Deserialize)]
struct Add {
    name: String,
    #[serde(default = "one")]
    by: i64,
}

fn one() -> i64 {
    1
}

#[derive(Deserialize)]
struct Get {
    name: String,
}

#[derive(Debug, Serialize)]
struct Count {
    value: i64,
}

fn add(Add { name, by }: Add) -> Result<Count, Failure> {
    check(&name)?;
    Ok(Count {
        value: counters()?.increment(&name, by)?,
    })
}

fn get(Get { name }: Get) -> Result<Count, Failure> {
    check(&name)?;
    let text = counters()?.get(&name)?.unwrap_or_else(|| b"0".to_vec());
    let value = String::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok());
    value
        .map(|value| Count { value })
        .ok_or_else(|| Failure::new("NOT_A_NUMBER", "the stored value is no number"))
}

fn counters() -> Result<Bucket, Failure> {
    Ok(Bucket::open("counters")?)
}

fn check(name: &str) -> Result<(), Failure> {
    let fine = (1..=MAX_NAME).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if fine {
        return Ok(());
    }
    Err(Failure::new(
        "INVALID_NAME",
        "a name has 1 to 64 letters, digits, dots, dashes and underscores",
    ))
}

service! {
    /// Adds to a counter: {"name","by":1} → {"value"}, the new count.
    "add" => add,
    /// Reads a counter: {"name"} → {"value"}; 0 where nobody has counted.
    "get" => get,
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn names() {
        for good in ["a", "orders.2026-11_x", &"n".repeat(64)] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "ä", "a/b", &"n".repeat(65)] {
            assert_eq!(check(bad).unwrap_err().code, "INVALID_NAME", "{bad}");
        }
    }
}

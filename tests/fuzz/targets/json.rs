//! What `serde_json` reads passes the check; what passes and is not read
//! breaks no rule of the grammar, only one of values.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mb_server::wire::json;

/// A number that no f64 holds, and escapes that are half of a surrogate pair.
const RULES_OF_VALUES: [&str; 3] = ["out of range", "surrogate", "hex escape"];

fuzz_target!(|data: &[u8]| {
    let passes = json::check(data).is_ok();
    match serde_json::from_slice::<serde_json::Value>(data) {
        Ok(_) => assert!(passes),
        Err(error) if passes => {
            let error = error.to_string();
            assert!(
                RULES_OF_VALUES.iter().any(|rule| error.contains(rule)),
                "{error}"
            );
        }
        Err(_) => {}
    }
});

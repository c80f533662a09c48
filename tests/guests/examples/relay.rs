//! Passes calls on, so that services can be made to call each other in circles.

use mb_service::{Payload, calls, service};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Forward {
    topic: String,
    #[serde(default)]
    payload: Value,
}

fn forward(Forward { topic, payload }: Forward) -> Value {
    match calls::call_raw(&topic, "1.0.0", &Payload::Json(payload.to_string()), None) {
        Ok(Payload::Json(text)) => serde_json::from_str(&text).unwrap(),
        Ok(Payload::Binary(bytes)) => json!({ "bytes": bytes.len() }),
        Err(error) => json!({ "code": error.code, "message": error.message }),
    }
}

service! {
    name: "relay",
    description: "Passes calls on",
    /// Calls {"topic","payload"} and answers what came of it.
    "forward" => forward,
}

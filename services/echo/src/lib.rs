//! The smallest service: it answers what it is sent.

use mb_service::{Payload, service};

/// Never looks inside, so any JSON and any bytes come back unchanged.
fn say(payload: Payload) -> Payload {
    payload
}

service! {
    /// Answers its payload as it is, JSON or binary.
    "say" => say,
}

#[cfg(test)]
mod tests {
    use mb_service::{Guest, Payload};

    use super::Service;

    #[test]
    fn answers_what_it_is_sent() {
        for payload in [
            Payload::Json("{ \"as\" : 1.0 }".into()),
            Payload::Binary(vec![0, 255]),
        ] {
            assert_eq!(Service::handle("say".into(), payload.clone()), Ok(payload));
        }
    }
}

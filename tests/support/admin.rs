//! Requests to the admin endpoint that change something.

use serde_json::Value;

use super::{TestServer, http};

/// A request with these headers: its status, and what it answers.
pub fn request(
    server: &TestServer,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> (u16, Value) {
    let length = body.len();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    let (status, body) = http(server.admin, &text);
    (
        status,
        serde_json::from_str(&body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}: {body}")),
    )
}

/// With the token that the server has made.
pub fn change(server: &TestServer, method: &str, path: &str, body: &str) -> (u16, Value) {
    let bearer = format!("Authorization: Bearer {}\r\n", server.token());
    request(server, method, path, &bearer, body)
}

/// Stops the calls that are listed now. A test that needs a call to run until
/// something else has happened gives it an hour, and ends it with this.
pub fn stop_calls(server: &TestServer) {
    for call in server.json("/calls")["calls"].as_array().unwrap() {
        let (status, answer) = change(server, "DELETE", &format!("/calls/{}", call["id"]), "");
        // It may have ended meanwhile.
        assert!([200, 404].contains(&status), "{answer}");
    }
}

//! What peers make the server hold stays within `memory`: here what a single
//! connection is enough for. `tests/load/memory.py` has the rest.

use std::fs;

use crate::{
    setup,
    support::{TestServer, most_resident, wat},
};

const MIB: usize = 1024 * 1024;

/// As values they take a hundred times the memory of the text.
fn small_objects(size: usize) -> String {
    format!(r#"{{"more":[{}0]}}"#, r#"{"":0},"#.repeat(size / 7 - 10))
}

/// Resident memory at its most, beyond what there was before.
fn grown(server: &TestServer, work: impl FnOnce()) -> usize {
    // The peak is counted from here.
    fs::write(format!("/proc/{}/clear_refs", server.child.id()), "5").unwrap();
    let before = usize::try_from(server.resident()).unwrap();
    work();
    most_resident(server.child.id()).saturating_sub(before)
}

#[test]
fn payloads_take_no_more_than_was_reserved() {
    let describe = r#"{"name":"strict","version":"1.0.0","actions":[{"name":"run","input":{"type":"object"}}]}"#;
    let server = setup()
        .with_bytes("strict.wasm", &wat::guest_that_says(describe, "", ""))
        .set("memory = \"64MiB\"\n[services.strict]\nvalidate = true")
        .start();
    let mut client = server.connect();
    for topic in ["system.hello", "system.services"] {
        let grown = grown(&server, || {
            let answer = client.ask(topic, &small_objects(MIB - 200));
            assert!(answer.json().is_object(), "{}", answer.text());
        });
        assert!(grown < 16 * MIB, "{topic}: {grown} bytes");
    }
    let beyond = grown(&server, || {
        let answer = client.ask("strict.run", &small_objects(MIB - 200));
        assert_eq!(answer.code(), "INVALID_PAYLOAD");
        assert!(
            answer.text().contains("as values it takes"),
            "{}",
            answer.text()
        );
    });
    assert!(beyond < 16 * MIB, "{beyond} bytes");
    // The factor that is reserved with is no less than the true one.
    let payload = small_objects(MIB / 8);
    let within = grown(&server, || {
        assert_eq!(client.ask("strict.run", &payload).text(), "null");
    });
    assert!(within < 110 * payload.len() + 4 * MIB, "{within} bytes");
    assert_eq!(client.ask("strict.run", "{}").text(), "null");
}

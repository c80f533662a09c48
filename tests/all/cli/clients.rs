//! The reference clients in other languages, which were written from the
//! protocol's document alone: plain, TLS, with a certificate, with a token.

use std::process::Command;

use crate::{
    BINARY, setup,
    support::{absent, pki::Pki},
};

#[test]
fn clients_of_other_languages_find_the_server_as_the_document_says() {
    let pki = Pki::new();
    pki.issue("client", &["ann"], (2020, 2040), 10);
    let setup = setup();
    let tokens = setup.dir.path().join("tokens.json").display().to_string();
    let new = Command::new(BINARY)
        .args(["token", "new", "bob", "--file", &tokens])
        .output()
        .unwrap();
    let token = String::from_utf8(new.stdout).unwrap().trim().to_owned();
    let server = setup
        .set(&format!("auth = \"optional\"\ntokens = {tokens:?}"))
        .set(&pki.settings(&(pki.ca_setting() + "reject_unauthorized = false\n")))
        .set("[principals.default]\nrights = [\"*\"]\n[principals.anonymous]\nrights = [\"*\"]")
        .start();
    let plain = format!("localhost:{}", server.listeners[0].port());
    let tls = format!("localhost:{}", server.listeners[1].port());
    let path = |name: &str| pki.path(name).display().to_string();
    let (ca, cert, key) = (path("ca.crt"), path("client.crt"), path("client.key"));
    let clients = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    for (program, file) in [("python3", "client.py"), ("node", "client.mjs")] {
        let script = clients.join(file).display().to_string();
        let ways: [&[&str]; 4] = [
            &[&plain],
            &[&tls, "--ca", &ca],
            &[&tls, "--ca", &ca, "--cert", &cert, "--key", &key],
            &[&plain, "--token", &token],
        ];
        for way in ways {
            match Command::new(program).arg(&script).args(way).output() {
                Err(error) => absent(program, &error),
                Ok(output) => {
                    let said = String::from_utf8_lossy(&output.stdout);
                    assert!(
                        output.status.success() && said.contains("ok 200 answers"),
                        "{file} {way:?}: {output:?}"
                    );
                }
            }
        }
    }
}

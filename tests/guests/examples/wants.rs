//! Fails to load: it imports what no server grants.

use mb_service::{Failure, service};

wit_bindgen::generate!({
    inline: "
        package acme:secrets@1.0.0;

        interface vault {
            read: func(name: string) -> string;
        }

        world wants {
            import vault;
        }
    ",
});

fn reveal(name: String) -> Result<String, Failure> {
    Ok(acme::secrets::vault::read(&name))
}

service! {
    name: "wants",
    /// Answers the secret of a name.
    "reveal" => reveal,
}

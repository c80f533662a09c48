//! Functions in, a service out: `service!` below makes the component.

use mb_service::{Failure, log, service};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Deserialize, JsonSchema)]
struct Person {
    /// Whom to greet; not empty.
    name: String,
}

#[derive(Serialize, JsonSchema)]
struct Greeting {
    text: String,
}

fn greet(person: Person) -> Result<Greeting, Failure> {
    if person.name.is_empty() {
        return Err(Failure::new("NAME_EMPTY", "the name must not be empty"));
    }
    log::info(format!("greeting {}", person.name));
    Ok(Greeting {
        text: format!("Hello, {}!", person.name),
    })
}

service! {
    /// Greets a person.
    "greet" => greet,
}

#[cfg(test)]
mod tests {
    use mb_service::{Guest, Payload, mock};

    use super::Service;

    fn greet(arguments: &str) -> Result<Payload, String> {
        Service::handle("greet".into(), Payload::Json(arguments.into()))
            .map_err(|failure| failure.code)
    }

    #[test]
    fn greets() {
        mock::reset();
        assert_eq!(
            greet(r#"{"name":"Ada"}"#),
            Ok(Payload::Json(r#"{"text":"Hello, Ada!"}"#.into()))
        );
        assert_eq!(mock::lines(), ["info: greeting Ada"]);
    }

    #[test]
    fn refuses() {
        assert_eq!(greet(r#"{"name":""}"#), Err("NAME_EMPTY".into()));
        assert_eq!(greet("{}"), Err("INVALID_ARGUMENTS".into()));
    }
}

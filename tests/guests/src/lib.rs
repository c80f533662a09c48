//! What the components in `examples` share.

/// Makes a component whose `describe` is the given expression, right or wrong.
/// It answers what it is sent.
#[macro_export]
macro_rules! describes {
    ($describe:expr) => {
        struct Service;

        impl mb_service::Guest for Service {
            fn describe() -> String {
                $describe
            }

            fn handle(
                _action: String,
                payload: mb_service::Payload,
            ) -> Result<mb_service::Payload, mb_service::Failure> {
                Ok(payload)
            }
        }

        mb_service::bindings::export!(Service with_types_in mb_service::bindings);
    };
}

/// Makes the service `versions` in the given version: `which` answers it.
#[macro_export]
macro_rules! versions {
    ($version:literal) => {
        fn which((): ()) -> serde_json::Value {
            serde_json::json!({ "version": $version })
        }

        mb_service::service! {
            name: "versions",
            version: $version,
            description: "Tells which of its versions was called",
            /// Answers {"version"}.
            "which" => which,
        }
    };
}

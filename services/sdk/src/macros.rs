//! The one macro.

/// Makes a service of functions: maps each action's name to its handler.
///
/// A handler takes one value ([`Arguments`](crate::Arguments)) and answers one
/// ([`Answer`](crate::Answer)). The doc comment above an action is what a
/// caller reads about it.
///
/// The service's name, version and description are those of the package in
/// `Cargo.toml`; each can be given instead, in this order.
///
/// JSON Schemas come from the types: what derives `schemars::JsonSchema` has
/// one, with the doc comments of its fields; other types have none. An action
/// may carry them as JSON text instead.
///
/// ```
/// use mb_service::service;
///
/// fn length(text: String) -> usize {
///     text.chars().count()
/// }
///
/// service! {
///     name: "text",
///     version: "1.2.0",
///     description: "Measures texts",
///     /// Counts the characters of a text.
///     "length" => length { input: r#"{"type":"string"}"#, output: include_str!("length.json") },
/// }
/// # macro_rules! include_str { ($file:literal) => { r#"{"type":"integer"}"# } } use include_str;
/// # fn main() {
/// # use mb_service::Guest;
/// # assert_eq!(Service::describe(), concat!(
/// #     r#"{"name":"text","version":"1.2.0","description":"Measures texts","actions":[{"name":"length","#,
/// #     r#""description":"Counts the characters of a text.","input":{"type":"string"},"output":{"type":"integer"}}]}"#));
/// # }
/// ```
///
/// Use it once, at the crate's root. It declares a unit struct `Service`; its
/// methods of trait [`Guest`](crate::Guest) are what the server calls.
#[macro_export]
macro_rules! service {
    (
        $(name: $name:expr,)?
        $(version: $version:expr,)?
        $(description: $description:expr,)?
        $(
            $(#[doc = $doc:literal])*
            $action:literal => $handler:path $({ $($schema:ident: $text:expr),+ $(,)? })?
        ),+ $(,)?
    ) => {
        /// This crate's service, as the server sees it.
        pub struct Service;

        impl $crate::Guest for Service {
            #[allow(clippy::needless_update, unused_variables)]
            fn describe() -> String {
                let name = env!("CARGO_PKG_NAME");
                let version = env!("CARGO_PKG_VERSION");
                let description = env!("CARGO_PKG_DESCRIPTION");
                $(let name = $name;)?
                $(let version = $version;)?
                $(let description = $description;)?
                #[allow(unused_imports)]
                use $crate::{AnswerSchema as _, AnyInput as _, AnyOutput as _, InputSchema as _, ResultSchema as _};
                let actions = &[$({
                    let probe = $crate::probe($handler);
                    let (input, output) = ((&&probe).input(), (&&&probe).output());
                    $crate::Action {
                        name: $action,
                        description: concat!($($doc),*).trim_ascii(),
                        $($($schema: Some($text.into()),)+)?
                        ..$crate::Action { name: "", description: "", input: input.map(Into::into), output: output.map(Into::into) }
                    }
                }),+];
                $crate::Description { name, version, description, actions }.to_json()
            }

            fn handle(
                action: String,
                payload: $crate::Payload,
            ) -> Result<$crate::Payload, $crate::Failure> {
                $crate::log::start();
                match action.as_str() {
                    $($action => $crate::call($handler, payload),)+
                    // The server asks only for what `describe` lists.
                    _ => Err($crate::Failure::new("UNKNOWN_ACTION", action)),
                }
            }
        }

        #[cfg(target_arch = "wasm32")]
        $crate::bindings::export!(Service with_types_in $crate::bindings);
    };
}

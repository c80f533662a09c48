//! Guests that no compiler would make, written by hand: a core module with
//! the contract embedded, as `cargo build` leaves one, which the server turns
//! into a component itself.

use wit_component::{StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// A service with the one action `run`, which runs `body` and answers `null`.
/// `more` stands at the module's top level; `describe` is what it says of
/// itself.
pub fn guest_that_says(describe: &str, more: &str, body: &str) -> Vec<u8> {
    let words = |numbers: &[u32]| -> String {
        numbers
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .map(|byte| format!("\\{byte:02x}"))
            .collect()
    };
    let text: String = describe
        .bytes()
        .map(|byte| format!("\\{byte:02x}"))
        .collect();
    let said = words(&[1024, describe.len() as u32]);
    let answer = words(&[0, 0, 512, 4]);
    let module = format!(
        r#"(module
            (memory (export "memory") 64)
            {more}
            (global $heap (mut i32) (i32.const 2097152))
            (data (i32.const 16) "{said}")
            (data (i32.const 32) "{answer}")
            (data (i32.const 512) "null")
            (data (i32.const 1024) "{text}")
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
                (global.get $heap)
                (global.set $heap (i32.and (i32.add (global.get $heap) (i32.add (local.get 3) (i32.const 7))) (i32.const -8))))
            (func (export "mb:service/handler@1.0.0#describe") (result i32) (i32.const 16))
            (func (export "mb:service/handler@1.0.0#handle") (param i32 i32 i32 i32 i32) (result i32)
                {body}
                (i32.const 32)))"#
    );
    let mut module = wat::parse_str(module).unwrap();
    let mut resolve = Resolve::default();
    let (package, _) = resolve
        .push_path(concat!(env!("CARGO_MANIFEST_DIR"), "/wit"))
        .unwrap();
    let world = resolve.select_world(&[package], Some("service")).unwrap();
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    module
}

/// The same, which says its name and what it must.
pub fn guest(name: &str, more: &str, body: &str) -> Vec<u8> {
    let describe = format!(
        r#"{{"name":"{name}","version":"1.0.0","description":"d","actions":[{{"name":"run","description":"d"}}]}}"#
    );
    guest_that_says(&describe, more, body)
}

//! Guests that no compiler would make, written by hand: a core module with
//! the contract embedded, as `cargo build` leaves one, which the server turns
//! into a component itself.

use wit_component::{StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// A service with the one action `run`, which runs `body` and answers `null`.
/// `more` stands at the module's top level; `describe` is what it says of
/// itself.
pub fn guest_that_says(describe: &str, more: &str, body: &str) -> Vec<u8> {
    module(describe, "", more, body)
}

fn module(describe: &str, imports: &str, more: &str, body: &str) -> Vec<u8> {
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
            {imports}
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
            (func (export "mb:service/handler@1.1.0#describe") (result i32) (i32.const 16))
            (func (export "mb:service/handler@1.1.0#handle") (param i32 i32 i32 i32 i32) (result i32)
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
    importing_guest(name, "", more, body)
}

/// The same, which imports something.
pub fn importing_guest(name: &str, imports: &str, more: &str, body: &str) -> Vec<u8> {
    let describe = format!(
        r#"{{"name":"{name}","version":"1.0.0","description":"d","actions":[{{"name":"run","description":"d"}}]}}"#
    );
    module(&describe, imports, more, body)
}

/// A component of one module `$main`, or more: `before` stands in front of it,
/// with what it imports and `with` gives it, `after` behind it. A call runs
/// `body` and answers `null`, unless that writes something else to 512.
#[derive(Default)]
pub struct Graph<'a> {
    pub before: &'a str,
    pub imports: &'a str,
    pub with: &'a str,
    pub more: &'a str,
    pub body: &'a str,
    pub after: &'a str,
}

impl Graph<'_> {
    pub fn service(&self, name: &str) -> Vec<u8> {
        let Self {
            before,
            imports,
            with,
            more,
            body,
            after,
        } = self;
        let describe = format!(
            r#"{{\"name\":\"{name}\",\"version\":\"1.0.0\",\"actions\":[{{\"name\":\"run\"}}]}}"#
        );
        let length = describe.replace('\\', "").len();
        let text = format!(
            r#"(component
              (import "mb:service/types@1.0.0" (instance $types
                (type $p (variant (case "json" string) (case "binary" (list u8))))
                (export "payload" (type $payload (eq $p)))
                (type $f (record (field "code" string) (field "message" string) (field "details" (option string))))
                (export "failure" (type $failure (eq $f)))))
              (alias export $types "payload" (type $payload))
              (alias export $types "failure" (type $failure))
              {before}
              (core module $main
                {imports}
                (memory (export "memory") 4)
                (global $heap (mut i32) (i32.const 131072))
                {more}
                (data (i32.const 32) "\00\00\00\00\00\00\00\00\00\02\00\00\04\00\00\00")
                (data (i32.const 512) "null") (data (i32.const 1024) "{describe}")
                (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
                  (global.get $heap)
                  (global.set $heap (i32.and (i32.add (global.get $heap) (i32.add (local.get 3) (i32.const 7))) (i32.const -8))))
                (func (export "post") (param i32))
                (func (export "describe") (result i32)
                  (i32.store (i32.const 16) (i32.const 1024)) (i32.store (i32.const 20) (i32.const {length})) (i32.const 16))
                (func $say (param i32) (if (local.get 0) (then (i32.store (i32.const 512) (i32.const 0x65757274)))))
                (func (export "handle") (param i32 i32 i32 i32 i32) (result i32) {body} (i32.const 32)))
              (core instance $m (instantiate $main {with}))
              (alias core export $m "memory" (core memory $memory))
              (alias core export $m "cabi_realloc" (core func $realloc))
              {after}
              (func $describe (result string)
                (canon lift (core func $m "describe") (memory $memory) (post-return (core func $m "post"))))
              (func $handle (param "action" string) (param "payload" $payload) (result (result $payload (error $failure)))
                (canon lift (core func $m "handle") (memory $memory) (realloc $realloc) (post-return (core func $m "post"))))
              (instance $handler (export "describe" (func $describe)) (export "handle" (func $handle)))
              (export "mb:service/handler@1.0.0" (instance $handler)))"#
        );
        wat::parse_str(text).unwrap()
    }
}

//! Nothing passes from one call to the next by way of an instance that is
//! reset: handles, what a start learned, and components of odd shapes.

use serde_json::Value;

use crate::{
    BINARY,
    support::{
        Setup, TestServer,
        wat::{self, Graph},
    },
};

/// A row of `/services`.
fn row(server: &TestServer, name: &str) -> Value {
    let services = server.json("/services");
    let rows = services["services"].as_array().unwrap();
    rows.iter().find(|row| row["name"] == name).unwrap().clone()
}

/// Keeps something in a call and finds it in a later one, if it can: says
/// `true` where it does. `instances` are made for six calls; none names those
/// that are not reset, by the reason.
fn check(name: &str, graph: &Graph<'_>, fresh_reason: Option<&str>) {
    let server = Setup::empty(BINARY)
        .with_bytes(&format!("{name}.wasm"), &graph.service(name))
        .start();
    let mut client = server.connect();
    for call in 0..6 {
        let answer = client.ask(&format!("{name}.run"), "");
        assert_eq!(answer.text(), "null", "{name}, call {call}");
    }
    let row = row(&server, name);
    match fresh_reason {
        None => {
            assert_eq!(
                (&row["freshReason"], &row["instances"]),
                (&Value::Null, &1.into())
            );
        }
        Some(reason) => {
            let given = row["freshReason"].as_str().unwrap();
            assert!(given.contains(reason), "{name}: {given}");
            assert_eq!(row["instances"], 6, "{name}");
        }
    }
}

/// Says whether there is something at an address, and leaves something there.
const FIND_AND_LEAVE: &str =
    "(call $say (i32.load (i32.const 40000))) (i32.store (i32.const 40000) (i32.const 1))";

#[test]
fn memory_and_globals() {
    let graph = Graph {
        more: "(global $kept (mut i64) (i64.const 0)) (global $kept-128 (mut v128) (v128.const i64x2 0 0))",
        body: "(call $say (i32.or (i32.load (i32.const 40000)) (i32.or (i32.wrap_i64 (global.get $kept))
                 (v128.any_true (global.get $kept-128)))))
               (i32.store (i32.const 40000) (i32.const 1)) (global.set $kept (i64.const 1))
               (global.set $kept-128 (v128.const i64x2 1 1))",
        ..Graph::default()
    };
    check("plain", &graph, None);
}

#[test]
fn a_post_return_function_that_gets_into_a_table() {
    // Called in the midst of a call, it would reset the instance, and what is
    // written afterwards to a card that is known as dirty would not be marked.
    let graph = Graph {
        before: "(core module $shim (table (export \"t\") 1 funcref)
                   (func (export \"f\") (param i32) (call_indirect (param i32) (local.get 0) (i32.const 0))))
                 (core instance $s (instantiate $shim))",
        imports: "(import \"s\" \"f\" (func $again (param i32)))",
        with: "(with \"s\" (instance $s))",
        body: "(local $at i32) (local.set $at (i32.const 40000))
               (call $say (i32.load offset=4 (local.get $at)))
               (i32.store (local.get $at) (i32.const 1)) (call $again (i32.const 0))
               (i32.store offset=4 (local.get $at) (i32.const 1))",
        after: "(core module $fix (import \"s\" \"t\" (table 1 funcref)) (import \"m\" \"post\" (func $post (param i32)))
                  (elem (i32.const 0) func $post))
                (core instance (instantiate $fix (with \"s\" (instance $s)) (with \"m\" (instance $m))))",
        ..Graph::default()
    };
    check("reentrant", &graph, None);
}

const CONNECTION: &str = "(import \"mb:service/context@1.0.0\" (instance $context
      (export \"connection-id\" (func (result string)))))
    (alias export $context \"connection-id\" (func $connection))";

#[test]
fn a_shim_that_hides_where_the_host_writes() {
    let before = format!(
        "{CONNECTION} (core module $shim (table (export \"t\") 1 funcref)
           (func (export \"f\") (param i32 i32) (call_indirect (param i32) (local.get 0) (i32.const 0))))
         (core instance $s (instantiate $shim))"
    );
    let graph = Graph {
        before: &before,
        imports: "(import \"s\" \"f\" (func $f (param i32 i32)))",
        with: "(with \"s\" (instance $s))",
        body: "(call $say (i32.load (i32.const 40004))) (call $f (i32.const 40000) (i32.const 0))",
        after: "(core func $lowered (canon lower (func $connection) (memory $memory) (realloc $realloc)))
                (core module $fix (import \"s\" \"t\" (table 1 funcref)) (import \"h\" \"f\" (func (param i32)))
                  (elem (i32.const 0) func 0))
                (core instance (instantiate $fix (with \"s\" (instance $s))
                  (with \"h\" (instance (export \"f\" (func $lowered))))))",
        ..Graph::default()
    };
    check("hidden", &graph, Some("functions of the host"));
}

#[test]
fn a_memory_of_no_pages_that_another_module_grows() {
    let graph = Graph {
        before: "(core module $zero (memory (export \"memory\") 0 10)) (core instance $z (instantiate $zero))
                 (core module $grown (import \"z\" \"memory\" (memory 0))
                   (func $start (drop (memory.grow (i32.const 1)))) (start $start)
                   (func (export \"look\") (result i32) (i32.load (i32.const 64)))
                   (func (export \"leave\") (i32.store (i32.const 64) (i32.const 1))))
                 (core instance $g (instantiate $grown (with \"z\" (instance $z))))",
        imports: "(import \"g\" \"look\" (func $look (result i32))) (import \"g\" \"leave\" (func $leave))",
        with: "(with \"g\" (instance $g))",
        body: "(call $say (call $look)) (call $leave)",
        ..Graph::default()
    };
    check("zero", &graph, Some("a memory without pages"));
}

#[test]
fn a_module_that_is_exported_and_gets_another_index() {
    // What is instantiated is the module with the memory, by its other index;
    // who does not count that export takes the shim for it.
    let graph = Graph {
        before: "(core module $kept (memory 1)
                   (func (export \"look\") (result i32) (i32.load (i32.const 64)))
                   (func (export \"leave\") (i32.store (i32.const 64) (i32.const 1))))
                 (export $again \"again\" (core module $kept))
                 (core module $decoy (table 2 funcref)
                   (func (export \"look\") (result i32) (call_indirect (result i32) (i32.const 0)))
                   (func (export \"leave\") (call_indirect (i32.const 1))))
                 (core instance $g (instantiate $again))",
        imports: "(import \"g\" \"look\" (func $look (result i32))) (import \"g\" \"leave\" (func $leave))",
        with: "(with \"g\" (instance $g))",
        body: "(call $say (call $look)) (call $leave)",
        ..Graph::default()
    };
    check("exported", &graph, Some("hands on code"));
}

#[test]
fn a_number_that_a_shim_passes_on_is_no_address() {
    // It comes to a function of the guest, by the shim through which the host
    // might be called.
    let before = format!(
        "{CONNECTION} (core module $shim (table (export \"t\") 1 funcref)
           (func (export \"f\") (param i32) (call_indirect (param i32) (local.get 0) (i32.const 0))))
         (core instance $s (instantiate $shim))"
    );
    let graph = Graph {
        before: &before,
        imports: "(import \"s\" \"f\" (func $f (param i32)))",
        with: "(with \"s\" (instance $s))",
        more: "(func (export \"g\") (param i32))",
        body: "(call $f (i32.const -1)) (call $f (i32.const 0x3fffff0)) (call $f (i32.const 0x7fffffff))",
        after: "(core func $lowered (canon lower (func $connection) (memory $memory) (realloc $realloc)))
                (core module $fix (import \"s\" \"t\" (table 1 funcref)) (import \"m\" \"g\" (func (param i32)))
                  (elem (i32.const 0) func 0))
                (core instance (instantiate $fix (with \"s\" (instance $s)) (with \"m\" (instance $m))))",
    };
    check("number", &graph, None);
}

#[test]
fn what_a_start_grew_by_counts_once() {
    // 20 MiB at the start and 20 in the call, of 48.
    let graph = Graph {
        more: "(func $start (drop (memory.grow (i32.const 320)))) (start $start)",
        body: "(call $say (i32.eq (memory.grow (i32.const 320)) (i32.const -1)))",
        ..Graph::default()
    };
    let server = Setup::empty(BINARY)
        .with_bytes("grows.wasm", &graph.service("grows"))
        .set("[services.grows]\nmemory = \"48MiB\"")
        .start();
    let mut client = server.connect();
    for _ in 0..3 {
        assert_eq!(client.ask("grows.run", "").text(), "null");
    }
    assert_eq!(row(&server, "grows")["freshReason"], Value::Null);
}

#[test]
fn a_table_that_is_passed_on_by_another_module() {
    // The table of the shim comes to the main module under another's name.
    let before = format!(
        "{CONNECTION} (core module $shim (table (export \"t\") 1 funcref)) (core instance $s (instantiate $shim))
         (core module $again (import \"s\" \"t\" (table $t 1 funcref)) (global i32 (i32.const 0)) (export \"t\" (table $t)))
         (core instance $a (instantiate $again (with \"s\" (instance $s))))"
    );
    let graph = Graph {
        before: &before,
        imports: "(import \"a\" \"t\" (table 1 funcref))",
        with: "(with \"a\" (instance $a))",
        body: "(call $say (i32.load (i32.const 40004)))
               (call_indirect (param i32) (i32.const 40000) (i32.const 0))",
        after: "(core func $lowered (canon lower (func $connection) (memory $memory) (realloc $realloc)))
                (core module $fix (import \"s\" \"t\" (table 1 funcref)) (import \"h\" \"f\" (func (param i32)))
                  (elem (i32.const 0) func 0))
                (core instance (instantiate $fix (with \"s\" (instance $s))
                  (with \"h\" (instance (export \"f\" (func $lowered))))))",
        ..Graph::default()
    };
    check("passed", &graph, Some("a table of another module"));
}

#[test]
fn handles_that_are_kept_count() {
    let graph = Graph {
        before: "(import \"wasi:sockets/network@0.2.0\" (instance $net (export \"network\" (type (sub resource)))))
                 (alias export $net \"network\" (type $network))
                 (import \"wasi:sockets/instance-network@0.2.0\" (instance $in
                   (export \"network\" (type $n (eq $network))) (export \"instance-network\" (func (result (own $n))))))
                 (alias export $in \"instance-network\" (func $get)) (core func $lowered (canon lower (func $get)))",
        imports: "(import \"h\" \"get\" (func $get (result i32)))",
        with: "(with \"h\" (instance (export \"get\" (func $lowered))))",
        body: "(call $say (i32.gt_u (call $get) (i32.const 1)))",
        ..Graph::default()
    };
    let server = Setup::empty(BINARY)
        .with_bytes("handles.wasm", &graph.service("handles"))
        .start();
    let mut client = server.connect();
    for _ in 0..4 {
        assert_eq!(client.ask("handles.run", "").text(), "null");
    }
    assert_eq!(row(&server, "handles")["instances"], 4);
}

#[test]
fn what_a_start_learns_is_of_its_own_caller() {
    // The start asks for the connection, and the answer says which it was.
    let guest = wat::importing_guest(
        "learns",
        "(import \"mb:service/context@1.1.0\" \"connection-id\" (func $connection (param i32)))",
        "(func (export \"_initialize\") (call $connection (i32.const 40000)))",
        "(i32.store8 (i32.sub (i32.load (i32.const 40000)) (i32.const 1)) (i32.const 34))
         (i32.store8 (i32.add (i32.load (i32.const 40000)) (i32.load (i32.const 40004))) (i32.const 34))
         (i32.store (i32.const 40) (i32.sub (i32.load (i32.const 40000)) (i32.const 1)))
         (i32.store (i32.const 44) (i32.add (i32.load (i32.const 40004)) (i32.const 2)))",
    );
    let server = Setup::empty(BINARY)
        .with_bytes("learns.wasm", &guest)
        .start();
    let (mut one, mut other) = (server.connect(), server.connect());
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(one.ask("learns.run", "").text());
        ids.push(other.ask("learns.run", "").text());
    }
    assert_eq!((&ids[0], &ids[1]), (&ids[2], &ids[3]));
    assert!(ids[0] != ids[1] && ids[0].len() > 2, "{ids:?}");
    let reason = row(&server, "learns")["freshReason"].clone();
    assert!(
        reason.as_str().unwrap().contains("as it starts"),
        "{reason}"
    );
}

#[test]
fn what_was_left_is_found_without_a_reset() {
    // The control: the same service, whose instances are meant to be shared.
    let graph = Graph {
        body: FIND_AND_LEAVE,
        ..Graph::default()
    };
    let server = Setup::empty(BINARY)
        .with_bytes("shared.wasm", &graph.service("shared"))
        .set("[services.shared]\nisolation = \"shared\"")
        .start();
    let mut client = server.connect();
    let answers = [(); 2].map(|()| client.ask("shared.run", "").text());
    assert_eq!(answers, ["null", "true"]);
}

#[test]
fn idle_instances_of_one_service_keep_no_other_out() {
    // With its 41 tables, eleven of these take all that the pool has.
    let hog = format!(
        "{} (func $spin (local $i i64) (loop $l (local.set $i (i64.add (local.get $i) (i64.const 1)))
           (br_if $l (i64.lt_u (local.get $i) (i64.const 50000000)))))",
        "(table 1 funcref)".repeat(41)
    );
    let hog = Graph {
        more: &hog,
        body: "(call $spin)",
        ..Graph::default()
    };
    let victim = Graph {
        more: "(table 1 funcref) (table 1 funcref)",
        body: "(nop)",
        ..Graph::default()
    };
    let server = Setup::empty(BINARY)
        .with_bytes("hog.wasm", &hog.service("hog"))
        .with_bytes("victim.wasm", &victim.service("victim"))
        .start();
    let clients = [(); 16].map(|()| server.connect());
    let calls = clients.map(|mut client| {
        std::thread::spawn(move || assert_eq!(client.ask("hog.run", "").text(), "null"))
    });
    calls.into_iter().for_each(|call| call.join().unwrap());
    assert_eq!(server.connect().ask("victim.run", "").text(), "null");
}

#[test]
fn limits_do_not_count_what_is_added() {
    // 64 MiB, to the last page.
    let full = Graph {
        body: "(call $say (i32.eq (memory.grow (i32.sub (i32.const 1024) (memory.size))) (i32.const -1)))",
        ..Graph::default()
    };
    let server = Setup::empty(BINARY)
        .with_bytes("full.wasm", &full.service("full"))
        .start();
    assert_eq!(server.connect().ask("full.run", "").text(), "null");
    assert_eq!(row(&server, "full")["freshReason"], Value::Null);
}

#[test]
fn what_can_not_be_compiled_rewritten_is_served_all_the_same() {
    let globals: String = (0..40_000)
        .map(|n| format!("(global (mut i64) (i64.const {n}))"))
        .collect();
    let graph = Graph {
        more: &globals,
        body: "(nop)",
        ..Graph::default()
    };
    check("globals", &graph, Some("more than 1000 globals"));
}

#[test]
fn an_allocator_that_a_guest_calls_traps_nothing() {
    let graph = Graph {
        more: "(type $r (func (param i32 i32 i32 i32) (result i32))) (table (export \"t\") 1 funcref)",
        body: "(drop (call_indirect (type $r) (i32.const 0) (i32.const 0) (i32.const 1)
                 (i32.const 0x70000000) (i32.const 0)))",
        after: "(core module $fix (import \"m\" \"t\" (table 1 funcref))
                  (import \"m\" \"cabi_realloc\" (func (param i32 i32 i32 i32) (result i32))) (elem (i32.const 0) func 0))
                (core instance (instantiate $fix (with \"m\" (instance $m))))",
        ..Graph::default()
    };
    check("refuses", &graph, None);
}

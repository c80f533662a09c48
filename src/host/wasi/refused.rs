//! Files and sockets: some languages import them all the same, so they are
//! there, in whatever version the component wants, and refuse everything.

use crate::host::HasHost;
use wasmtime::{
    Engine, StoreContextMut,
    component::{
        Linker, Resource, ResourceType, Type, Val,
        types::{ComponentFunc, ComponentInstance, ComponentItem},
    },
};

/// Stands for every resource of these interfaces. Only the network handle is
/// ever made; nothing can be done with it.
struct Nothing;

/// What the error codes of the two packages call it, the better one first.
const NOT_ALLOWED: [&str; 4] = ["access-denied", "not-permitted", "access", "not-supported"];

/// Whether all functions of an interface are refused.
pub(in crate::host) fn is_refused(import: &str) -> bool {
    import.starts_with("wasi:filesystem/") || import.starts_with("wasi:sockets/")
}

/// Defines the interface as the component describes it.
pub(in crate::host) fn link<T: HasHost>(
    linker: &mut Linker<T>,
    name: &str,
    interface: &ComponentInstance,
    engine: &Engine,
) -> wasmtime::Result<()> {
    let mut instance = linker.instance(name)?;
    for (name, item) in interface.exports(engine) {
        match item.ty {
            ComponentItem::Resource(_) if !is_of_streams(name) => {
                instance.resource(
                    name,
                    ResourceType::host::<Nothing>(),
                    |mut store, handle| {
                        let handle = Resource::<Nothing>::new_own(handle);
                        store.data_mut().called().drop_handle(handle)?;
                        Ok(())
                    },
                )?;
            }
            ComponentItem::ComponentFunc(_) => instance.func_new(name, refuse)?,
            _ => {}
        }
    }
    Ok(())
}

/// Resources that these interfaces use and others define.
fn is_of_streams(name: &str) -> bool {
    matches!(
        name,
        "error" | "pollable" | "input-stream" | "output-stream"
    )
}

fn refuse<T: HasHost>(
    mut store: StoreContextMut<'_, T>,
    kind: ComponentFunc,
    arguments: &[Val],
    results: &mut [Val],
) -> wasmtime::Result<()> {
    // One that was lent has to be returned, or the call ends in a trap.
    for argument in arguments {
        if let Val::Resource(lent) = argument {
            lent.resource_drop(&mut store)?;
        }
    }
    for (result, kind) in results.iter_mut().zip(kind.results()) {
        *result = match kind {
            Type::Result(kind) => Val::Result(Err(kind
                .err()
                .map(|kind| not_allowed(&kind))
                .transpose()?
                .map(Box::new))),
            Type::List(_) => Val::List(Vec::new()),
            Type::Option(_) => Val::Option(None),
            Type::Own(_) => {
                let handle = store.data_mut().called().create_handle(Nothing)?;
                Val::Resource(handle.try_into_resource_any(&mut store)?)
            }
            other => wasmtime::bail!("files and sockets are not there, so there is no {other:?}"),
        };
    }
    Ok(())
}

fn not_allowed(kind: &Type) -> wasmtime::Result<Val> {
    if let Type::Enum(codes) = kind {
        let code = NOT_ALLOWED
            .into_iter()
            .find(|code| codes.names().any(|name| name == *code));
        if let Some(code) = code {
            return Ok(Val::Enum(code.into()));
        }
    }
    wasmtime::bail!("files and sockets are not there, and {kind:?} has no word for it")
}

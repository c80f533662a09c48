//! From a component's imports to what the linker offers it: what is granted,
//! and nothing else.

use wasmtime::{
    Engine,
    component::{Component, HasSelf, Linker, types::ComponentItem},
};

use super::{
    Granted, HasHost, Host,
    bindings::{mb::service as mb, wasi as capability},
    wasi,
};
use crate::config::LogLevel;

/// What an import needs before it is linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    Log,
    Settings,
    KeyValue,
    Calls,
}

/// Interfaces by their names without versions, and what each needs. Those of
/// WASI that only refuse are recognised by their package.
const INTERFACES: [(&str, Needs); 13] = [
    ("mb:service/context", Needs::Nothing),
    ("mb:service/types", Needs::Nothing),
    ("mb:service/calls", Needs::Calls),
    ("mb:service/values", Needs::KeyValue),
    ("wasi:logging/logging", Needs::Log),
    ("wasi:config/store", Needs::Settings),
    ("wasi:keyvalue/", Needs::KeyValue),
    ("wasi:io/", Needs::Nothing),
    ("wasi:clocks/", Needs::Nothing),
    ("wasi:random/", Needs::Nothing),
    ("wasi:cli/", Needs::Nothing),
    ("wasi:filesystem/", Needs::Nothing),
    ("wasi:sockets/", Needs::Nothing),
];

impl Needs {
    fn of(import: &str) -> Option<Self> {
        let name = import.split('@').next().unwrap_or_default();
        let names = |listed: &str| {
            if listed.ends_with('/') {
                name.starts_with(listed)
            } else {
                name == listed
            }
        };
        INTERFACES
            .iter()
            .find(|(listed, _)| names(listed))
            .map(|(_, needs)| *needs)
    }

    /// The setting that grants it.
    const fn setting(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::Log => Some("log = \"info\""),
            Self::Settings => Some("config = { … } or secrets = { … }"),
            Self::KeyValue => Some("keyvalue = true"),
            Self::Calls => Some("calls = [\"service.action\"]"),
        }
    }

    /// The same, where it is not granted.
    fn missing(self, granted: &Granted) -> Option<&'static str> {
        let given = match self {
            Self::Nothing => true,
            Self::Log => granted.log != LogLevel::Off,
            Self::Settings => granted.settings.is_some(),
            Self::KeyValue => granted.keyvalue.is_some(),
            Self::Calls => !granted.calls.is_empty(),
        };
        self.setting().filter(|_| !given && !granted.inspected)
    }
}

/// The setting under `[services.NAME.grants]` that grants an import; none for
/// one that needs none, or that nobody offers. The log is granted unless the
/// operator takes it away.
#[must_use]
pub fn grant_for(import: &str) -> Option<&'static str> {
    Needs::of(import)
        .filter(|needs| *needs != Needs::Log)?
        .setting()
}

/// A linker with what this component imports, as far as it is granted.
///
/// # Errors
/// Names the import and, where one would help, the setting.
pub fn link<T: HasHost>(
    engine: &Engine,
    component: &Component,
    granted: &Granted,
) -> Result<Linker<T>, LinkError> {
    let mut linker = Linker::new(engine);
    let offer = |linker: &mut Linker<T>| {
        mb::context::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        mb::types::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        mb::calls::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        mb::values::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        capability::logging::logging::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        capability::config::store::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        capability::keyvalue::store::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        capability::keyvalue::atomics::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        capability::keyvalue::batch::add_to_linker::<T, HasSelf<Host>>(linker, T::called)?;
        wasi::add_to_linker(linker)
    };
    // What is linked is decided by the check below: an import that passes it
    // is granted, one that does not keeps the component from being loaded.
    offer(&mut linker).map_err(|e| LinkError::Contract(format!("{e:#}")))?;
    let kind = component.component_type();
    for (name, item) in kind.imports(engine) {
        let needs = Needs::of(name).ok_or_else(|| LinkError::Unknown {
            import: name.into(),
        })?;
        if let Some(setting) = needs.missing(granted) {
            let service = granted.service.to_string();
            return Err(LinkError::NotGranted {
                service,
                import: name.into(),
                setting,
            });
        }
        if let ComponentItem::ComponentInstance(interface) = item.ty
            && wasi::refused::is_refused(name)
        {
            wasi::refused::link(&mut linker, name, &interface, engine)
                .map_err(|e| LinkError::Contract(format!("{e:#}")))?;
        }
    }
    Ok(linker)
}

/// Why a component's imports can't be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Nobody offers it.
    #[error(
        "imports {import}, which this server does not offer; it offers mb:service, wasi:logging, wasi:config, wasi:keyvalue and \
        WASI 0.2"
    )]
    Unknown {
        /// The interface.
        import: String,
    },
    /// The operator does not grant it.
    #[error(
        "imports {import}, which is not granted; if you trust it, set {setting} under [services.{service}.grants]"
    )]
    NotGranted {
        /// Who wants it.
        service: String,
        /// The interface.
        import: String,
        /// What would grant it.
        setting: &'static str,
    },
    /// The right name, not the right types.
    #[error("does not fit the contract mb:service@1.1.0, was it built against another one? {0}")]
    Contract(String),
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        time::{Duration, Instant},
    };

    use wasmtime::Store;

    use super::*;
    use crate::{
        config::{Config, services::settings_of},
        host::{Context, Unwatched},
    };

    struct Guest(Host);

    impl HasHost for Guest {
        fn host(&mut self) -> &mut Host {
            &mut self.0
        }
    }

    /// Has a component call a function that it imports; answers which of the
    /// two a `result` was, and its payload.
    fn call_import(interface: &str, function: &str, result: &str) -> (u32, u32) {
        let text = format!(
            r#"(component
                (import "{interface}" (instance $i
                    (export "handle" (type $handle (sub resource)))
                    (type $code' (enum "unknown" "access-denied" "not-supported"))
                    (export "error-code" (type $code (eq $code')))
                    (export "{function}" (func (result {result})))))
                (core module $libc (memory (export "memory") 1))
                (core instance $libc (instantiate $libc))
                (alias export $i "{function}" (func $f))
                (core func $lowered (canon lower (func $f) (memory (core memory $libc "memory"))))
                (core module $m
                    (import "h" "f" (func $f (param i32)))
                    (import "h" "memory" (memory 1))
                    (func (export "run") (result i32)
                        (call $f (i32.const 0))
                        (i32.add
                            (i32.mul (i32.load8_u (i32.const 0)) (i32.const 256))
                            (i32.load8_u (i32.const 4)))))
                (core instance $m (instantiate $m (with "h" (instance
                    (export "f" (func $lowered))
                    (export "memory" (memory $libc "memory"))))))
                (func (export "run") (result u32) (canon lift (core func $m "run"))))"#
        );
        let engine = Engine::default();
        let component = Component::new(&engine, wat::parse_str(text).unwrap()).unwrap();
        let settings = settings_of(&Config::default().services, "x");
        let granted = Granted::new("x", &settings, "", None, None).unwrap();
        let context = Context::of_loading(Instant::now() + Duration::from_secs(10));
        let host = Host::new(context, Arc::clone(&granted), Arc::new(Unwatched));
        let mut store = Store::new(&engine, Guest(host));
        let linker = link::<Guest>(&engine, &component, &granted).unwrap();
        let instance = linker.instantiate(&mut store, &component).unwrap();
        let run = instance
            .get_typed_func::<(), (u32,)>(&mut store, "run")
            .unwrap();
        let (both,) = run.call(&mut store, ()).unwrap();
        (both / 256, both % 256)
    }

    #[test]
    fn files_and_sockets_are_there_in_any_version_and_refuse() {
        let denied = (1, 1);
        let handle = "(result (own $handle) (error $code))";
        assert_eq!(
            call_import(
                "wasi:sockets/tcp-create-socket@0.2.3",
                "create-tcp-socket",
                handle
            ),
            denied
        );
        assert_eq!(
            call_import(
                "wasi:sockets/ip-name-lookup@0.2.0",
                "resolve",
                "(result u32 (error $code))"
            ),
            denied
        );
        assert_eq!(
            call_import("wasi:filesystem/types@0.2.12", "open", handle),
            denied
        );
    }

    #[test]
    fn what_imports_need() {
        let check = |import: &str, needs| assert_eq!(Needs::of(import), needs, "{import}");
        check("mb:service/context@1.0.0", Some(Needs::Nothing));
        check("mb:service/calls@1.0.0", Some(Needs::Calls));
        check("mb:service/other@1.0.0", None);
        check("wasi:keyvalue/atomics@0.2.0-draft2", Some(Needs::KeyValue));
        check("wasi:config/store@0.2.0-rc.1", Some(Needs::Settings));
        check("wasi:io/poll@0.2.6", Some(Needs::Nothing));
        check("wasi:filesystem/types@0.2.6", Some(Needs::Nothing));
        check("wasi:http/types@0.2.6", None);
        check("example:thing/api", None);
    }
}

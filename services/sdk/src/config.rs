//! Values and secrets that the operator gives this service: the grants
//! `config` and `secrets`.

use std::str::FromStr;

use crate::Failure;

/// The value of a key, if the operator gives one.
///
/// # Errors
/// `CONFIG_FAILED` if the server can't read it.
pub fn get(key: &str) -> Result<Option<String>, Failure> {
    #[cfg(target_arch = "wasm32")]
    {
        use crate::bindings::wasi::config::store;
        store::get(key).map_err(|error| {
            let (store::Error::Upstream(error) | store::Error::Io(error)) = error;
            Failure::new("CONFIG_FAILED", format!("{key}: {error}"))
        })
    }
    #[cfg(not(target_arch = "wasm32"))]
    Ok(crate::mock::config_value(key))
}

/// The value of a key as another type, or the default where there is none.
///
/// # Errors
/// `CONFIG_FAILED` if the value is not of that type.
pub fn get_or<T: FromStr>(key: &str, default: T) -> Result<T, Failure> {
    match get(key)? {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| Failure::new("CONFIG_FAILED", format!("{key} has a wrong value"))),
    }
}

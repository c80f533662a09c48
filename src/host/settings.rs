//! `wasi:config`: values and secrets that the operator gives to one service.

use super::{
    Host,
    bindings::wasi::config::store::{self, Error},
};

impl store::Host for Host {
    fn get(&mut self, key: String) -> wasmtime::Result<Result<Option<String>, Error>> {
        Ok(Ok(self
            .granted
            .settings
            .as_ref()
            .and_then(|values| values.get(&key).cloned())))
    }

    fn get_all(&mut self) -> wasmtime::Result<Result<Vec<(String, String)>, Error>> {
        let values = self.granted.settings.iter().flatten();
        Ok(Ok(values
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()))
    }
}

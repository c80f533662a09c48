//! Notifies systemd, where it asks for it: see `sd_notify(3)`. Without
//! `NOTIFY_SOCKET` nothing happens.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

use super::every;

/// How long systemd may take to read earlier notifications.
const TAKE_WITHIN: Duration = Duration::from_secs(1);

/// Says something, such as `READY=1`, if somebody listens.
pub(super) fn notify(message: &str) {
    if let Err(error) = send(message) {
        tracing::warn!("systemd was not notified of {message}: {error}");
    }
}

fn send(message: &str) -> io::Result<()> {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let bytes = name.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(TAKE_WITHIN))?;
    socket.send_to_addr(message.as_bytes(), &address).map(drop)
}

/// Says every so often that `alive` still holds, as `WatchdogSec` wants it.
pub(super) fn keep_watchdog(alive: impl Fn() -> bool + Send + 'static) -> io::Result<()> {
    let micros = env::var("WATCHDOG_USEC")
        .ok()
        .and_then(|text| text.parse().ok());
    let Some(pause) = micros
        .map(|micros: u64| Duration::from_micros(micros / 2))
        .filter(|pause| !pause.is_zero())
    else {
        return Ok(());
    };
    every("mb-watchdog", pause, move || {
        if alive() {
            notify("WATCHDOG=1");
        }
        true
    })
}

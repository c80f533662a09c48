//! Where the admin endpoint listens: TCP, a Unix socket, or both.

use std::{
    fs, io,
    net::TcpListener,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixListener,
    },
    path::Path,
};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{Result, failure};
use crate::{
    admin::AdminListener,
    config::Config,
    transport::{BACKLOG, Inherited, is_absent, listen, resolve},
};

/// The ways in.
pub(super) struct AdminListeners {
    pub(super) listeners: Vec<AdminListener>,
    /// How each is reached, for people.
    pub(super) names: Vec<String>,
}

impl AdminListeners {
    /// Opens those that the settings name, or takes them over.
    pub(super) fn open(config: &Config, inherited: &mut Inherited) -> Result<Self> {
        let mut opened = Self {
            listeners: Vec::new(),
            names: Vec::new(),
        };
        let (host, port, path) = (&config.admin.host, config.admin.port, &config.admin.socket);
        if !host.is_empty() {
            let listener = tcp(host, port, inherited).map_err(|error| {
                let conflict = || {
                    let addresses = resolve(host, port).ok()?;
                    inherited.conflict("admin.host", &addresses)
                };
                let own = "; is another server running? --admin-port 0 takes a free one";
                let hint = match error.kind() {
                    io::ErrorKind::AddrInUse => {
                        conflict().map_or_else(|| own.into(), |conflict| format!("; {conflict}"))
                    }
                    _ => String::new(),
                };
                failure(format!(
                    "admin endpoint can't listen on {host} port {port}: {error}{hint}"
                ))
            })?;
            opened.names.push(format!(
                "http://{}/",
                listener.local_addr().map_err(|error| failure(format!(
                    "the address of the admin endpoint is unknown: {error}"
                )))?
            ));
            opened.listeners.push(AdminListener::Tcp(listener));
        }
        if !path.as_os_str().is_empty() {
            let listener = inherited
                .take_unix(path)
                .map_or_else(|| unix(path), Ok)
                .map_err(|error| {
                    failure(format!(
                        "admin endpoint can't listen on `admin.socket` = {}: {error}",
                        path.display()
                    ))
                })?;
            opened.names.push(format!("unix:{}", path.display()));
            opened.listeners.push(AdminListener::Unix(listener));
        }
        Ok(opened)
    }
}

fn tcp(host: &str, port: u16, inherited: &mut Inherited) -> io::Result<TcpListener> {
    let mut last = io::ErrorKind::NotFound.into();
    for address in resolve(host, port)? {
        match inherited.take(address).map_or_else(|| listen(address), Ok) {
            Err(error) if is_absent(&error) => last = error,
            result => return result,
        }
    }
    Err(last)
}

/// Listens on a file that this user alone may open.
fn unix(path: &Path) -> io::Result<UnixListener> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        if is_listened_on(path)? {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another server listens there",
            ));
        }
        // Of one that has ended.
        fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Nobody can connect before it listens.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG.into())?;
    Ok(socket.into())
}

/// Whether a process listens there. One that is stopped does not take the
/// connection, and is not waited for.
fn is_listened_on(path: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let connected = socket.connect(&SockAddr::unix(path)?);
    Ok(connected.map_or_else(|error| error.kind() == io::ErrorKind::WouldBlock, |()| true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_one_that_has_ended_is_replaced_and_that_of_another_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let first = unix(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(unix(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        // A process that another test is just starting may hold it for a moment.
        let begun = std::time::Instant::now();
        while let Err(error) = unix(&path) {
            assert!(begun.elapsed().as_secs() < 30, "{error}");
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a file").unwrap();
        assert!(unix(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }
}

//! Opening listeners and setting options.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// Connections that the kernel holds until the server accepts them.
pub const BACKLOG: u16 = 1024;

/// Quiet time before TCP probes a client.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// Sets the options of a connection: small messages leave at once, and TCP probes
/// a quiet peer.
///
/// # Errors
/// If the system refuses; the peer may be gone already.
pub fn set_options(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    SockRef::from(socket).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE))
}

/// `EAFNOSUPPORT`, which std does not name, with Linux's value.
const NO_SUCH_FAMILY: i32 = 97;

/// All addresses of a name or an address, each once; `host` may be IPv6 with
/// or without brackets. `localhost` is loopback also where no file says so.
///
/// # Errors
/// If the name can't be resolved.
pub fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let bare = without_brackets(host);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let is_localhost = bare.trim_end_matches('.').eq_ignore_ascii_case("localhost");
    let loopback = || {
        let ips = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        ips.map(|ip: IpAddr| SocketAddr::new(ip, port)).to_vec()
    };
    // In an empty root folder there is no file of hosts, and no server of
    // names that could be asked.
    if is_localhost && cfg!(target_feature = "crt-static") {
        return Ok(loopback());
    }
    names::without_plug_ins();
    let found = match (bare, port).to_socket_addrs() {
        Err(_) if is_localhost => return Ok(loopback()),
        found => found?,
    };
    let mut addresses = Vec::new();
    for address in found {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn without_brackets(host: &str) -> &str {
    let inner = host.strip_prefix('[');
    inner
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(host)
}

/// The same until a deadline. A thread that still waits for a server of names
/// then ends when the C library gives up, after some seconds.
///
/// # Errors
/// As [`resolve`]; `TimedOut` at the deadline.
pub fn resolve_until(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    // There is nothing to wait for.
    if without_brackets(host).parse::<IpAddr>().is_ok() {
        return resolve(host, port);
    }
    let name = host.to_owned();
    let found = answer_until(deadline, move || resolve(&name, port))?;
    found.unwrap_or_else(|| {
        let problem = format!("the name {host:?} was not resolved in time");
        Err(io::Error::new(io::ErrorKind::TimedOut, problem))
    })
}

/// What a look-up on a thread of its own answers; none if that takes longer.
fn answer_until<T: Send + 'static>(
    deadline: Instant,
    look_up: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Option<T>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new()
        .name("mb-resolve".into())
        .spawn(move || sender.send(look_up()))?;
    let remaining = deadline.saturating_duration_since(Instant::now());
    Ok(receiver.recv_timeout(remaining).ok())
}

/// How the C library looks up names.
mod names {
    /// Keeps a static program from loading the plug-ins that
    /// `/etc/nsswitch.conf` names: they are of the host's C library, and one
    /// that does not fit ends the process. Files and DNS are built in.
    pub(super) fn without_plug_ins() {
        #[cfg(all(target_feature = "crt-static", target_env = "gnu"))]
        {
            use std::{
                ffi::{c_char, c_int},
                sync::Once,
            };
            #[allow(unsafe_code)]
            unsafe extern "C" {
                /// Of glibc, `nss.h`: replaces one line of `nsswitch.conf`.
                fn __nss_configure_lookup(database: *const c_char, line: *const c_char) -> c_int;
            }
            static ONCE: Once = Once::new();
            ONCE.call_once(|| {
                // SAFETY: two constant strings that end with a zero, which the
                // C library copies. Nothing has looked up a name yet.
                #[allow(unsafe_code)]
                unsafe {
                    __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr());
                }
            });
        }
    }
}

/// Whether the machine lacks an address, or all of its kind: `localhost` has
/// an IPv6 address in many a `hosts` file where the kernel has no IPv6.
#[must_use]
pub fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(NO_SUCH_FAMILY)
}

/// Listens on all addresses of one host. Of several, those that the machine
/// lacks are passed over as long as there is another one; `taken` holds the
/// addresses that other hosts have, and gets those of this one. `open` makes
/// a listener, most often with [`listen`].
///
/// # Errors
/// As `open`, and if there is no address left.
pub fn listen_all<L>(
    addresses: &[SocketAddr],
    taken: &mut Vec<SocketAddr>,
    mut open: impl FnMut(SocketAddr) -> io::Result<L>,
) -> io::Result<Vec<L>> {
    let mut listeners = Vec::new();
    let (mut found, mut absent) = (false, None);
    for address in addresses {
        if !taken.contains(address) {
            match open(*address) {
                Ok(listener) => listeners.push(listener),
                Err(error) if is_absent(&error) => {
                    absent = Some(error);
                    continue;
                }
                Err(error) => return Err(error),
            }
            taken.push(*address);
        }
        found = true;
    }
    if found {
        Ok(listeners)
    } else {
        Err(absent.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    }
}

/// Listens on one address. `std::net` alone would hold the backlog at 128.
///
/// # Errors
/// If the address is taken, not this machine's, or not allowed.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // A restarted server shall not wait for old connections to be forgotten.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `::` and `0.0.0.0` can then be given side by side.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG.into())?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_addresses_the_absent_ones_are_passed_over() {
        // A network for documentation: no machine has it.
        let absent: SocketAddr = "192.0.2.1:0".parse().unwrap();
        let present: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let mut taken = Vec::new();
        let open = listen;
        let listeners = listen_all(&[absent, present], &mut taken, open).unwrap();
        assert_eq!((listeners.len(), &*taken), (1, &[present][..]));
        assert!(
            listen_all(&[absent, present], &mut taken, open)
                .unwrap()
                .is_empty(),
            "another host has it"
        );
        assert!(is_absent(
            &listen_all(&[absent], &mut taken, open).unwrap_err()
        ));

        let own = listeners[0].local_addr().unwrap();
        let error = listen_all(&[own, present], &mut Vec::new(), open).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::AddrInUse,
            "what is taken by others is not passed over"
        );
    }

    #[test]
    fn each_address_once() {
        let addresses = resolve("localhost", 7).unwrap();
        assert!(
            (1..addresses.len()).all(|i| !addresses[..i].contains(&addresses[i])),
            "{addresses:?}"
        );
        assert_eq!(resolve("[::1]", 7).unwrap(), ["[::1]:7".parse().unwrap()]);
        let loopback = resolve("LocalHost.", 7).unwrap();
        assert!(!loopback.is_empty() && loopback.iter().all(|address| address.ip().is_loopback()));
    }

    #[test]
    fn a_look_up_that_hangs_is_given_up() {
        let soon = Instant::now() + Duration::from_millis(20);
        let (release, held) = mpsc::channel::<()>();
        let hangs = move || held.recv().is_err();
        assert_eq!(answer_until(soon, hangs).unwrap(), None);
        drop(release);
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(answer_until(later, || 7).unwrap(), Some(7));
        assert!(resolve_until("localhost", 7, later).is_ok());
    }
}

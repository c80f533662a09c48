//! `mb-server cert dev`: certificates to develop with.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

use super::{Exit, Result, failure};
use crate::files;

/// Create certificates for development
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// A CA, and a server's and a client's certificate of it
    ///
    /// The CA's key is not kept, so it can sign nothing else.
    /// Not for production: nothing here expires before the year 2040.
    Dev {
        /// Folder that they are written to; created if it does not exist
        #[arg(default_value = "certs", value_name = "DIR")]
        dir: PathBuf,
        /// Name or address of the server, besides localhost, 127.0.0.1 and ::1; may be repeated
        #[arg(long = "host", value_name = "NAME")]
        hosts: Vec<String>,
        /// Principal that the client's certificate names
        #[arg(long, default_value = "dev", value_name = "PRINCIPAL")]
        client: String,
        /// Overwrite existing files
        #[arg(long)]
        force: bool,
    },
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Command::Dev {
        dir,
        hosts,
        client,
        force,
    } = &arguments.command;
    let files = make(hosts, client).map_err(failure)?;
    write(dir, &files, *force).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => failure(format!("{error}; --force writes over it")),
        _ => failure(error),
    })?;
    let path = |name: &str| dir.join(name).display().to_string();
    say!(
        "wrote {} files to {}\n\nserver, in its settings:\n  [tls]\n  cert = {:?}\n  key = {:?}\n  ca = {:?}\n\nclient:\n  \
         mb-server call echo.say '1' --server localhost:8444 --tls --ca {} --cert {} --key {}",
        files.len(),
        dir.display(),
        path("server.crt"),
        path("server.key"),
        path("ca.crt"),
        path("ca.crt"),
        path("client.crt"),
        path("client.key"),
    );
    Ok(Exit::Success)
}

type File = (&'static str, String);

fn make(hosts: &[String], client: &str) -> Result<Vec<File>, rcgen::Error> {
    let dated = |mut params: CertificateParams, name: &str| {
        // A fixed beginning in the past, for machines whose clocks differ.
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2040, 1, 1);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params
    };
    let mut ca = dated(CertificateParams::default(), "mb-server development CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;

    let mut server = dated(CertificateParams::default(), "mb-server");
    for host in ["localhost", "127.0.0.1", "::1"]
        .into_iter()
        .chain(hosts.iter().map(String::as_str))
    {
        server.subject_alt_names.push(alternative(host)?);
    }
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let server_key = KeyPair::generate()?;
    let server = server.signed_by(&server_key, &ca)?;

    let mut peer = dated(CertificateParams::default(), client);
    peer.subject_alt_names.push(alternative(client)?);
    peer.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let peer_key = KeyPair::generate()?;
    let peer = peer.signed_by(&peer_key, &ca)?;
    Ok(vec![
        ("ca.crt", ca.pem()),
        ("server.crt", server.pem()),
        ("server.key", server_key.serialize_pem()),
        ("client.crt", peer.pem()),
        ("client.key", peer_key.serialize_pem()),
    ])
}

fn alternative(name: &str) -> Result<SanType, rcgen::Error> {
    match name.parse::<IpAddr>() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) if name.contains("://") => name.try_into().map(SanType::URI),
        Err(_) if name.contains('@') => name.try_into().map(SanType::Rfc822Name),
        Err(_) => name.try_into().map(SanType::DnsName),
    }
}

fn write(dir: &Path, certificates: &[File], force: bool) -> io::Result<()> {
    files::private_dir(dir)?;
    let named = |path: &Path, error: io::Error| {
        io::Error::new(error.kind(), format!("{}: {error}", path.display()))
    };
    let present = certificates
        .iter()
        .map(|(name, _)| dir.join(name))
        .find(|path| path.exists());
    if let Some(present) = present.filter(|_| !force) {
        return Err(named(&present, io::ErrorKind::AlreadyExists.into()));
    }
    for (name, text) in certificates {
        let path = dir.join(name);
        files::replace(&path, files::PRIVATE, text.as_bytes())
            .map_err(|error| named(&path, error))?;
    }
    Ok(())
}

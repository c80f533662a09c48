//! What a server shows of itself, and whom it believes.

use std::sync::Arc;

use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::ring,
    pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime, pem::PemObject as _},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
};

use super::{
    client_tls::{TlsError, describe_key_error, read, read_certificates, read_key},
    tls::ALPN,
};
use crate::config::{PrincipalFrom, TlsFiles, TlsVersion};

/// What listeners use.
#[derive(Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    principal: PrincipalFrom,
}

impl ServerTls {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let TlsFiles {
            cert,
            key,
            ca: _,
            crl: _,
            reject_unauthorized,
            min_version,
            principal,
        } = files;
        let versions: &[_] = match min_version {
            TlsVersion::V12 => &[&rustls::version::TLS12, &rustls::version::TLS13],
            TlsVersion::V13 => &[&rustls::version::TLS13],
        };
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(versions)
            .map_err(|error| TlsError::new(cert, error))?;
        let verifier = verifier(files)?;
        let builder = match &verifier {
            Some(verifier) if *reject_unauthorized => {
                builder.with_client_cert_verifier(Arc::clone(verifier))
            }
            Some(verifier) => {
                builder.with_client_cert_verifier(Arc::new(Lenient(Arc::clone(verifier))))
            }
            None => builder.with_no_client_auth(),
        };
        let chain = read_certificates(cert)?;
        check_chain(&chain).map_err(|problem| TlsError::new(cert, problem))?;
        let mut config = builder
            .with_single_cert(chain, read_key(key)?)
            .map_err(|error| TlsError::new(key, describe_key_error(&error, cert)))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self {
            config: Arc::new(config),
            verifier,
            principal: *principal,
        })
    }

    /// A session for one connection.
    ///
    /// # Errors
    /// If the library refuses the settings, which it did not at the start.
    pub fn session(&self) -> Result<rustls::Connection, rustls::Error> {
        rustls::ServerConnection::new(Arc::clone(&self.config)).map(Into::into)
    }

    /// The principal that a client's certificates stand for, if they are
    /// valid and name one.
    #[must_use]
    pub fn principal(&self, certificates: &[CertificateDer<'_>]) -> Option<String> {
        let (own, others) = certificates.split_first()?;
        // Where any certificate is let through, this is the first real check.
        self.verifier
            .as_ref()?
            .verify_client_cert(own, others, UnixTime::now())
            .ok()?;
        let (_, certificate) = X509Certificate::from_der(own).ok()?;
        match self.principal {
            PrincipalFrom::Cn => {
                let name = certificate.subject().iter_common_name().next()?;
                name.as_str().ok().map(str::to_owned)
            }
            PrincipalFrom::San => {
                let names = certificate.subject_alternative_name().ok()??;
                names
                    .value
                    .general_names
                    .iter()
                    .find_map(|name| match name {
                        GeneralName::DNSName(name)
                        | GeneralName::RFC822Name(name)
                        | GeneralName::URI(name) => Some((*name).to_owned()),
                        _ => None,
                    })
            }
        }
    }
}

fn verifier(files: &TlsFiles) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
    let Some(ca) = &files.ca else { return Ok(None) };
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(ca)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::new(ca, error))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        Arc::new(ring::default_provider()),
    );
    if let Some(crl) = &files.crl {
        let lists: Result<Vec<_>, _> =
            CertificateRevocationListDer::pem_slice_iter(&read(crl)?).collect();
        let lists = lists.map_err(|error| TlsError::new(crl, format!("not PEM: {error}")))?;
        if lists.is_empty() {
            return Err(TlsError::new(crl, "no X509 CRL section in it"));
        }
        // A CA without a list has revoked nothing that we could know.
        builder = builder.with_crls(lists).allow_unknown_revocation_status();
    }
    let file = files.crl.as_ref().unwrap_or(ca);
    builder
        .build()
        .map(Some)
        .map_err(|error| TlsError::new(file, error))
}

/// Whether the server's own chain is one that clients can follow now.
fn check_chain(chain: &[CertificateDer<'_>]) -> Result<(), String> {
    let mut parsed = Vec::new();
    for (index, certificate) in chain.iter().enumerate() {
        let (_, certificate) = X509Certificate::from_der(certificate)
            .map_err(|error| format!("certificate {} can't be read: {error}", index + 1))?;
        parsed.push(certificate);
    }
    for (index, certificate) in parsed.iter().enumerate() {
        let validity = certificate.validity();
        let now = x509_parser::time::ASN1Time::now();
        if now < validity.not_before {
            return Err(format!(
                "certificate {} is not valid before {}",
                index + 1,
                validity.not_before
            ));
        }
        if now > validity.not_after {
            return Err(format!(
                "certificate {} expired at {}",
                index + 1,
                validity.not_after
            ));
        }
        if let Some(next) = parsed.get(index + 1)
            && certificate.issuer() != next.subject()
        {
            return Err(format!(
                "certificate {} was issued by {:?}, but the next one is of {:?}; put them in order, the server's first",
                index + 1,
                certificate.issuer().to_string(),
                next.subject().to_string()
            ));
        }
    }
    Ok(())
}

/// Lets clients through whose certificate is missing or not valid; it then
/// gives them no identity. They must hold its key all the same.
#[derive(Debug)]
struct Lenient(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Lenient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

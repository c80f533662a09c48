//! What a server shows of itself, and whom it believes.

use std::{path::Path, sync::Arc, time::Instant};

use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::ring,
    pki_types::{CertificateDer, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer as _, X509Certificate},
    time::ASN1Time,
};

use super::{
    client_tls::describe_identity_error,
    fault::TlsFault,
    pem::{Content, TlsError, read, read_key},
    tls::{ALPN, HTTP_ALPN},
    validity::Validity,
};
use crate::{
    config::{Tls, access::MAX_PRINCIPAL_SIZE, given},
    trusted,
};

/// What listeners use.
#[derive(Debug)]
pub struct ServerTls {
    /// For each of what a listener speaks; see [`Self::session`].
    configs: [Arc<ServerConfig>; 3],
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    demands_certificate: bool,
    validity: Validity,
}

/// What valid certificates say of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The principal that they name, if they name one.
    pub principal: Option<String>,
    /// When the first one of the chain expires.
    pub expires: Option<Instant>,
}

impl ServerTls {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(files: &Tls) -> Result<Self, TlsError> {
        let Tls {
            cert,
            key,
            reject_unauthorized,
            ..
        } = files;
        // Whoever can change one of these decides who gets in. Once this has
        // passed, nobody else can put others in their place to be read.
        for file in files.files() {
            trusted::check(file).map_err(|error| TlsError::new(file, error))?;
        }
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::new(cert, error))?;
        let mut chain = read(cert, Content::Chain)?;
        let mut validity = Validity::of_chain(cert, &mut chain)?;
        let verifier = verifier(files, &mut validity)?;
        let builder = match &verifier {
            Some(verifier) if *reject_unauthorized => {
                builder.with_client_cert_verifier(Arc::clone(verifier))
            }
            Some(verifier) => {
                builder.with_client_cert_verifier(Arc::new(Lenient(Arc::clone(verifier))))
            }
            None => builder.with_no_client_auth(),
        };
        let key_der = read_key(key)?;
        let mut config = builder
            .with_single_cert(chain, key_der.clone_key())
            .map_err(|error| describe_identity_error(&error, (cert, key), &key_der))?;
        let configs = [&[ALPN, HTTP_ALPN][..], &[ALPN], &[HTTP_ALPN]].map(|offered| {
            config.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
            Arc::new(config.clone())
        });
        Ok(Self {
            configs,
            demands_certificate: verifier.is_some() && *reject_unauthorized,
            verifier,
            validity,
        })
    }

    /// Why the server's own certificate is not valid now, and its file.
    #[must_use]
    pub fn invalid_now(&self) -> Option<(&Path, String)> {
        let problem = self.validity.leaf_problem(ASN1Time::now())?;
        Some((self.validity.file(), problem))
    }

    /// What an operator should know now of files that are used all the same,
    /// a bounded number of lines.
    #[must_use]
    pub fn warnings_now(&self) -> Vec<String> {
        self.validity.warnings(ASN1Time::now())
    }

    /// A session for one connection, which offers what is `spoken`: frames, HTTP
    /// or both.
    ///
    /// # Errors
    /// If the library refuses the settings, which it did not at the start.
    pub fn session(&self, spoken: (bool, bool)) -> Result<rustls::Connection, rustls::Error> {
        let [both, frames, http] = &self.configs;
        let config = match spoken {
            (true, false) => frames,
            (false, true) => http,
            _ => both,
        };
        rustls::ServerConnection::new(Arc::clone(config)).map(Into::into)
    }

    /// Whether clients may show certificates.
    #[must_use]
    pub fn takes_certificates(&self) -> bool {
        self.verifier.is_some()
    }

    /// Whether they must.
    #[must_use]
    pub fn demands_certificate(&self) -> bool {
        self.demands_certificate
    }

    /// Holds a client's certificates against the CAs, the revocation lists and
    /// the clock of the moment. The handshake does not do it where any
    /// certificate is let through, nor where a session is resumed.
    ///
    /// # Errors
    /// Why they are not valid.
    pub fn verify(
        &self,
        certificates: &[CertificateDer<'_>],
    ) -> Result<ClientCertificate, TlsFault> {
        let (Some(verifier), Some((own, others))) = (&self.verifier, certificates.split_first())
        else {
            return Err(TlsFault::NoCertificate);
        };
        verifier
            .verify_client_cert(own, others, UnixTime::now())
            .map_err(|error| TlsFault::of_error(&error))?;
        let now = ASN1Time::now();
        let left = certificates.iter().filter_map(|certificate| {
            let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
            let left = (certificate.validity().not_after - now)?;
            left.try_into().ok()
        });
        let expires = left.min().and_then(|left| Instant::now().checked_add(left));
        let principal =
            alternative_name(own).filter(|name| (1..=MAX_PRINCIPAL_SIZE).contains(&name.len()));
        Ok(ClientCertificate { principal, expires })
    }
}

/// The first DNS name, mail address or URI of the alternative names.
fn alternative_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::DNSName(name) | GeneralName::RFC822Name(name) | GeneralName::URI(name) => {
                Some((*name).to_owned())
            }
            _ => None,
        })
}

fn verifier(
    files: &Tls,
    validity: &mut Validity,
) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
    let Some(ca) = given(&files.ca) else {
        return Ok(None);
    };
    let cas = read(ca, Content::Cas)?;
    validity.add_cas(ca, &cas);
    let mut roots = RootCertStore::empty();
    for certificate in &cas {
        roots
            .add(certificate.clone())
            .map_err(|error| TlsError::new(ca, error))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        Arc::new(ring::default_provider()),
    );
    if let Some(crl) = given(&files.crl) {
        let mut lists = read(crl, Content::Crls)?;
        validity.add_crls(crl, &mut lists, &cas, files.crl_strict)?;
        builder = builder.with_crls(lists);
        builder = if files.crl_strict {
            builder.enforce_revocation_expiration()
        } else {
            // A CA without a list has revoked nothing that we could know.
            builder.allow_unknown_revocation_status()
        };
    }
    let file = given(&files.crl).unwrap_or(ca);
    builder
        .build()
        .map(Some)
        .map_err(|error| TlsError::new(file, error))
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

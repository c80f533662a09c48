//! What a client trusts, and what it shows of itself.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
};

use super::{
    fault::{OF_A_CA, TlsFault, USABLE_KEYS, is_p521},
    pem::{Content, TlsError, read, read_key},
    tls::ALPN,
};

/// How a client uses TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM file of the CAs that are trusted.
    pub ca: Option<PathBuf>,
    /// PEM files of the client's own certificate chain and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the server's certificate must be for; none for the host
    /// that is connected to.
    pub server_name: Option<String>,
    /// False for development only: any certificate is taken for the server's.
    pub reject_unauthorized: bool,
}

impl Default for ClientTls {
    fn default() -> Self {
        Self {
            ca: None,
            identity: None,
            server_name: None,
            reject_unauthorized: true,
        }
    }
}

/// Reads the files.
///
/// # Errors
/// Names the file and what is wrong with it.
pub fn client_config(tls: &ClientTls) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::new(Path::new("TLS"), error))?;
    let builder = if tls.reject_unauthorized {
        let mut roots = RootCertStore::empty();
        let Some(ca) = &tls.ca else {
            let problem = "which CA is to be trusted? name its file";
            return Err(TlsError::new(Path::new("TLS"), problem));
        };
        for certificate in read(ca, Content::Cas)? {
            roots
                .add(certificate)
                .map_err(|error| TlsError::new(ca, error))?;
        }
        builder.with_root_certificates(roots)
    } else {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
    };
    let mut config = match &tls.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let (chain, key_der) = (read(cert, Content::Chain)?, read_key(key)?);
            check_own(&chain[0]).map_err(|problem| TlsError::new(cert, problem))?;
            builder
                .with_client_auth_cert(chain, key_der.clone_key())
                .map_err(|error| describe_identity_error(&error, (cert, key), &key_der))?
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// What is wrong with a certificate and its key that can't be used together.
pub(super) fn describe_identity_error(
    error: &rustls::Error,
    (cert, key): (&Path, &Path),
    key_der: &PrivateKeyDer<'_>,
) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => TlsError::new(
            key,
            format!("is not the key of the certificate {}", cert.display()),
        ),
        rustls::Error::InvalidCertificate(_) => {
            TlsError::new(cert, TlsFault::explain(error, "the certificate"))
        }
        error => {
            let what = if is_p521(key_der.secret_der()) {
                "the key is of the curve P-521, which can't be used".to_owned()
            } else {
                format!("the key can't be used: {error}")
            };
            TlsError::new(key, format!("{what}; {USABLE_KEYS}"))
        }
    }
}

/// What no server would take from us.
fn check_own(certificate: &CertificateDer<'_>) -> Result<(), &'static str> {
    // Basic constraints, critical or not, that begin with CA:TRUE.
    let says_ca = certificate.windows(5).enumerate().any(|(at, oid)| {
        let rest = &certificate[at + oid.len()..];
        let rest = rest.strip_prefix(&[0x01, 0x01, 0xff]).unwrap_or(rest);
        oid == [0x06, 0x03, 0x55, 0x1d, 0x13]
            && matches!(rest, [0x04, _, 0x30, _, 0x01, 0x01, 0xff, ..])
    });
    if says_ca { Err(OF_A_CA) } else { Ok(()) }
}

/// Takes anyone for the server, as long as it holds the key it shows.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

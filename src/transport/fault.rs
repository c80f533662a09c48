//! Why TLS failed, as a word for logs and as a text that says what to do.

use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage, PeerMisbehaved};

crate::wire::words! {
    /// Why a handshake, or the session after it, failed.
    pub enum TlsFault {
        /// What came is not TLS.
        NotTls = "not-tls",
        /// No version, cipher or protocol name that both sides want.
        NothingInCommon = "nothing-in-common",
        /// The peer showed no certificate where one is demanded.
        NoCertificate = "no-certificate",
        /// Its certificate is not signed by a known CA.
        UnknownCa = "unknown-ca",
        /// Its certificate is no longer valid.
        Expired = "expired",
        /// Its certificate is not valid yet.
        NotYetValid = "not-yet-valid",
        /// Its certificate was revoked.
        Revoked = "revoked",
        /// Its certificate is for another name.
        WrongName = "wrong-name",
        /// Its certificate is wrong in another way.
        BadCertificate = "bad-certificate",
        /// The peer refuses, most often our certificate.
        RefusedByPeer = "refused-by-peer",
        /// The stream ended.
        Abandoned = "abandoned",
        /// The deadline passed.
        Timeout = "timeout",
        /// Anything else.
        Other = "other",
    }
}

impl TlsFault {
    /// What stands behind an error of this stream.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => return Self::Timeout,
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => {
                return Self::Abandoned;
            }
            _ => {}
        }
        error
            .get_ref()
            .and_then(|inner| inner.downcast_ref())
            .map_or(Self::Other, Self::of_error)
    }

    /// Whether the peer is at fault for not showing a valid certificate.
    #[must_use]
    pub const fn is_of_certificate(self) -> bool {
        matches!(
            self,
            Self::NoCertificate
                | Self::UnknownCa
                | Self::Expired
                | Self::NotYetValid
                | Self::Revoked
                | Self::WrongName
                | Self::BadCertificate
        )
    }

    /// What stands behind an error of TLS itself.
    pub(super) fn of_error(error: &rustls::Error) -> Self {
        use rustls::Error;
        match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::PeerIncompatible(_) | Error::NoApplicationProtocol => Self::NothingInCommon,
            Error::InvalidCertificate(error) => match error {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UnknownCa,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    Self::Expired
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotYetValid
                }
                CertificateError::Revoked => Self::Revoked,
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => Self::WrongName,
                _ => Self::BadCertificate,
            },
            // A missing client certificate may be said by either of them.
            Error::AlertReceived(AlertDescription::CertificateRequired) => Self::NoCertificate,
            Error::AlertReceived(_) => Self::RefusedByPeer,
            Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::InvalidEmptyPayload,
            ) => Self::NotTls,
            Error::PeerMisbehaved(PeerMisbehaved::IllegalMiddleboxChangeCipherSpec) => Self::NotTls,
            _ => Self::Other,
        }
    }
}

/// What is wrong with a certificate of a CA that a client or a server shows.
pub(super) const OF_A_CA: &str = "is that of a CA (CA:TRUE), which may sign but not be shown; sign one with CA:FALSE: \
                                  openssl x509 -req -in NAME.csr -CA ca.crt -CAkey ca.key -out NAME.crt -extfile FILE, \
                                  where FILE says basicConstraints=CA:FALSE and subjectAltName=…; openssl req -x509 \
                                  takes -addext basicConstraints=critical,CA:FALSE";

/// The same for one without extensions.
const OF_VERSION_1: &str = "is of version 1, without extensions; openssl x509 -req makes version 3 where it is given \
                            -extfile FILE, and FILE says basicConstraints=CA:FALSE and subjectAltName=…";

/// Keys that both sides can use, and how one is made.
pub(super) const USABLE_KEYS: &str = "RSA of 2048 to 4096 bits, P-256, P-384 and Ed25519 can, and openssl genpkey \
                                      -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out NEW.key makes one";

/// Whether a key, private or public, names the curve P-521.
pub(super) fn is_p521(der: &[u8]) -> bool {
    const IDENTIFIER: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23];
    der.windows(IDENTIFIER.len()).any(|part| part == IDENTIFIER)
}

impl TlsFault {
    /// The text of an error of this stream; where that alone is a riddle,
    /// with the cause and what to do.
    #[must_use]
    pub fn describe(error: &io::Error) -> String {
        match error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        {
            Some(inner) => Self::explain(inner, "the peer's certificate"),
            None => error.to_string(),
        }
    }

    /// The same of the library's error; `whose` is the certificate that it is
    /// about, if it is about one.
    pub(super) fn explain(error: &rustls::Error, whose: &str) -> String {
        use rustls::Error;
        match error {
            Error::InvalidCertificate(CertificateError::Other(other)) => {
                // The verifier's own names.
                match other.to_string().as_str() {
                    "CaUsedAsEndEntity" => format!("{whose} {OF_A_CA}"),
                    "UnsupportedCertVersion" => format!("{whose} {OF_VERSION_1}"),
                    _ => error.to_string(),
                }
            }
            Error::InvalidCertificate(
                CertificateError::UnsupportedSignatureAlgorithmContext { .. }
                | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. },
            ) => format!(
                "{whose} is signed in a way, or has a key, that can't be used; {USABLE_KEYS} ({error})"
            ),
            Error::InvalidCertificate(CertificateError::UnknownRevocationStatus) => format!(
                "tls.crl has no list of the CA of {whose}, and tls.crl_strict is set ({error})"
            ),
            Error::InvalidCertificate(
                CertificateError::ExpiredRevocationList
                | CertificateError::ExpiredRevocationListContext { .. },
            ) => format!(
                "the list in tls.crl of the CA of {whose} is past its next update, and tls.crl_strict is set; openssl \
                 ca -gencrl makes a new one ({error})"
            ),
            error => error.to_string(),
        }
    }
}

//! What can be wrong with certificates and revocation lists that are read
//! all the same, now or once time has passed.

use std::path::{Path, PathBuf};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::{
    prelude::{CertificateRevocationList, FromDer as _, X509Certificate},
    time::ASN1Time,
};

use super::{
    fault::{OF_A_CA, is_p521},
    pem::TlsError,
};

/// Most warnings about one set of files; the rest is counted.
const MAX_WARNINGS: usize = 16;

/// Problems of the files of TLS that do not keep the server from using them.
#[derive(Debug)]
pub(super) struct Validity {
    cert: PathBuf,
    /// Of the server's own certificate.
    leaf: Span,
    /// What is to be said at any time.
    fixed: Vec<String>,
    /// What else is valid for a time only, and what it is called.
    others: Vec<(String, Span)>,
}

/// The time for which something is valid.
#[derive(Debug, Clone, Copy)]
struct Span {
    begin: Option<ASN1Time>,
    end: Option<ASN1Time>,
}

impl Span {
    fn of(certificate: &X509Certificate<'_>) -> Self {
        let validity = certificate.validity();
        Self {
            begin: Some(validity.not_before),
            end: Some(validity.not_after),
        }
    }

    fn problem(self, now: ASN1Time) -> Option<String> {
        let Self { begin, end } = self;
        let early = begin.filter(|begin| now < *begin);
        let late = end.filter(|end| now > *end);
        early
            .map(|begin| format!("is not valid before {begin}; is the clock right?"))
            .or_else(|| late.map(|end| format!("expired at {end}")))
    }
}

impl Validity {
    /// Looks at the server's chain; duplicates are taken out of it.
    ///
    /// # Errors
    /// If the server's own certificate can't be read.
    pub(super) fn of_chain(
        file: &Path,
        chain: &mut Vec<CertificateDer<'static>>,
    ) -> Result<Self, TlsError> {
        let parse = |der: &'_ CertificateDer<'static>| {
            X509Certificate::from_der(der)
                .map(|(_, certificate)| {
                    let subject = certificate.subject().to_string();
                    (
                        subject,
                        certificate.issuer().to_string(),
                        Span::of(&certificate),
                        certificate.is_ca(),
                    )
                })
                .map_err(|error| error.to_string())
        };
        let at = file.display();
        let mut fixed = Vec::new();
        let (_, mut issuer, leaf, is_ca) = parse(&chain[0]).map_err(|error| {
            TlsError::new(file, format!("certificate 1 can't be read: {error}"))
        })?;
        if is_ca {
            fixed.push(format!(
                "{at}: the certificate {OF_A_CA}; most clients refuse it"
            ));
        }
        let mut others = Vec::new();
        let mut kept: Vec<CertificateDer<'static>> = Vec::new();
        for (index, der) in std::mem::take(chain).into_iter().enumerate() {
            let number = index + 1;
            if kept.contains(&der) {
                fixed.push(format!(
                    "{at}: certificate {number} is in it twice; the second is left out"
                ));
                continue;
            }
            if index > 0 {
                match parse(&der) {
                    Ok((subject, next, span, _)) => {
                        if issuer != subject {
                            fixed.push(format!(
                                "{at}: the certificate before number {number} was issued by {issuer:?}, but this one is \
                                 of {subject:?}; put them in order, the server's first, and leave out what is not needed"
                            ));
                        }
                        issuer = next;
                        others.push((
                            format!("{at}: certificate {number}, which clients may need,"),
                            span,
                        ));
                    }
                    Err(error) => {
                        fixed.push(format!("{at}: certificate {number} can't be read: {error}"))
                    }
                }
            }
            kept.push(der);
        }
        *chain = kept;
        Ok(Self {
            cert: file.to_owned(),
            leaf,
            fixed,
            others,
        })
    }

    /// Looks at the CAs of clients.
    pub(super) fn add_cas(&mut self, file: &Path, cas: &[CertificateDer<'_>]) {
        for (index, ca) in cas.iter().enumerate() {
            let Ok((_, certificate)) = X509Certificate::from_der(ca) else {
                continue;
            };
            if is_p521(certificate.subject_pki.raw) {
                self.fixed.push(format!(
                    "{}: certificate {}, {:?}, has a key of the curve P-521, which can't be used: clients of that CA are \
                     refused; openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 makes one that can",
                    file.display(),
                    index + 1,
                    certificate.subject().to_string()
                ));
            }
        }
    }

    /// Looks at revocation lists, and puts the newest first: of two that are
    /// of the same CA, the first one counts.
    ///
    /// # Errors
    /// If one can't be read.
    pub(super) fn add_crls(
        &mut self,
        file: &Path,
        lists: &mut Vec<CertificateRevocationListDer<'static>>,
        cas: &[CertificateDer<'_>],
        strict: bool,
    ) -> Result<(), TlsError> {
        let at = file.display();
        let mut issuers = Vec::new();
        let mut dated = Vec::new();
        for (index, der) in std::mem::take(lists).into_iter().enumerate() {
            let (_, list) = CertificateRevocationList::from_der(&der).map_err(|error| {
                TlsError::new(file, format!("list {} can't be read: {error}", index + 1))
            })?;
            let issuer = list.issuer().to_string();
            issuers.push(list.issuer().as_raw().to_vec());
            let what = format!(
                "{at}: the list of {issuer:?}, {},",
                if strict {
                    "whose clients are refused with tls.crl_strict"
                } else {
                    "which may lack what was revoked since"
                }
            );
            let span = Span {
                begin: None,
                end: list.next_update(),
            };
            let since = list.last_update();
            self.others.push((what, span));
            dated.push((since, der));
        }
        dated.sort_by_key(|(since, _)| std::cmp::Reverse(*since));
        *lists = dated.into_iter().map(|(_, der)| der).collect();
        for ca in cas {
            let Ok((_, certificate)) = X509Certificate::from_der(ca) else {
                continue;
            };
            let subject = certificate.subject();
            if !issuers.iter().any(|issuer| issuer == subject.as_raw()) {
                let so = if strict {
                    "its clients are refused with tls.crl_strict"
                } else {
                    "none of its certificates counts as revoked"
                };
                self.fixed.push(format!(
                    "{at}: no list of the CA {:?}: {so}",
                    subject.to_string()
                ));
            }
        }
        Ok(())
    }

    /// Why the server's own certificate is not valid at that time.
    pub(super) fn leaf_problem(&self, now: ASN1Time) -> Option<String> {
        self.leaf.problem(now)
    }

    /// The file of the server's own certificate.
    pub(super) fn file(&self) -> &Path {
        &self.cert
    }

    /// Everything that is to be warned of at that time.
    pub(super) fn warnings(&self, now: ASN1Time) -> Vec<String> {
        let leaf = self.leaf_problem(now).map(|problem| {
            format!(
                "{}: the server's certificate {problem}; listeners with TLS show it all the same, and clients that \
                 check it refuse",
                self.cert.display()
            )
        });
        let others = self.others.iter().filter_map(|(what, span)| {
            let problem = span.problem(now)?;
            Some(format!("{what} {problem}"))
        });
        let mut warnings: Vec<_> = leaf
            .into_iter()
            .chain(self.fixed.iter().cloned())
            .chain(others)
            .collect();
        if warnings.len() > MAX_WARNINGS {
            let more = warnings.len() - MAX_WARNINGS;
            warnings.truncate(MAX_WARNINGS);
            warnings.push(format!("tls: {more} more warnings of this kind"));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_decides() {
        let time = |seconds| ASN1Time::from_timestamp(seconds).unwrap();
        let span = |begin, end| Span {
            begin: Some(time(begin)),
            end: Some(time(end)),
        };
        let validity = Validity {
            cert: "server.crt".into(),
            leaf: span(1_000, 2_000),
            fixed: vec!["fixed".into()],
            others: vec![(
                "list".into(),
                Span {
                    begin: None,
                    end: Some(time(1_500)),
                },
            )],
        };
        let check = |now, leaf: Option<&str>, expected: &[&str]| {
            let found = validity.leaf_problem(time(now));
            assert_eq!(found.is_some(), leaf.is_some(), "{now}: {found:?}");
            assert!(
                found.unwrap_or_default().contains(leaf.unwrap_or_default()),
                "{now}"
            );
            let warnings = validity.warnings(time(now));
            assert_eq!(warnings.len(), expected.len(), "{now}: {warnings:?}");
            for (warning, part) in warnings.iter().zip(expected) {
                assert!(warning.contains(part), "{now}: {warning}");
            }
        };
        check(
            0,
            Some("not valid before"),
            &["server.crt: the server's certificate", "fixed"],
        );
        check(1_200, None, &["fixed"]);
        check(1_600, None, &["fixed", "list expired at"]);
        check(
            3_000,
            Some("expired at"),
            &["expired at", "fixed", "list expired at"],
        );
    }
}

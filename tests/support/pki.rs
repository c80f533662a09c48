//! Certificates for tests: right ones, and wrong in one way each.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

/// A CA and a folder with what it has signed.
pub struct Pki {
    pub dir: tempfile::TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    /// With `ca.crt` and a server's certificate for `localhost` and 127.0.0.1.
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, format!("test CA {}", uuid()));
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let pki = Self {
            dir: tempfile::tempdir().unwrap(),
            ca,
        };
        fs::write(pki.path("ca.crt"), pki.ca.pem()).unwrap();
        pki.issue("server", &["localhost", "127.0.0.1"], (2020, 2040), 1);
        pki
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes NAME.crt and NAME.key; valid from the first year to the second.
    pub fn issue(&self, name: &str, names: &[&str], years: (i32, i32), serial: u64) {
        let years = [years.0, years.1].map(|year| date_time_ymd(year, 1, 1).into());
        self.issue_as(name, names, years.into(), serial, IsCa::ExplicitNoCa);
    }

    /// The same from one time to another.
    pub fn issue_between(
        &self,
        name: &str,
        names: &[&str],
        times: (SystemTime, SystemTime),
        serial: u64,
    ) {
        self.issue_as(name, names, times, serial, IsCa::ExplicitNoCa);
    }

    /// The same, of a CA.
    pub fn issue_ca(&self, name: &str, names: &[&str], serial: u64) {
        let ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let years = [2020, 2040].map(|year| date_time_ymd(year, 1, 1).into());
        self.issue_as(name, names, years.into(), serial, ca);
    }

    fn issue_as(
        &self,
        name: &str,
        names: &[&str],
        (begins, ends): (SystemTime, SystemTime),
        serial: u64,
        ca: IsCa,
    ) {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = begins.into();
        params.not_after = ends.into();
        params.serial_number = Some(SerialNumber::from(serial));
        params.is_ca = ca;
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.ca).unwrap();
        fs::write(self.path(&format!("{name}.crt")), cert.pem()).unwrap();
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    /// Writes `crl.pem`, which revokes these.
    pub fn revoke(&self, serials: &[u64]) {
        let list = self.revocation_list(serials, (2021, 2040));
        fs::write(self.path("crl.pem"), list).unwrap();
    }

    /// A list of the first year, to be updated in the second, in PEM.
    pub fn revocation_list(&self, serials: &[u64], years: (i32, i32)) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(years.0, 1, 1),
            next_update: date_time_ymd(years.1, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.ca).unwrap().pem().unwrap()
    }

    /// `[tls]` with the server's certificate, and more lines.
    pub fn settings(&self, more: &str) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        format!(
            "[tls]\nport = 0\ncert = {:?}\nkey = {:?}\n{more}",
            path("server.crt"),
            path("server.key")
        )
    }

    pub fn ca_setting(&self) -> String {
        format!("ca = {:?}\n", self.path("ca.crt").display().to_string())
    }
}

fn uuid() -> String {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_nanos()
        .to_string()
}

/// The files of a certificate and its key.
pub fn pair(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    (
        dir.join(format!("{name}.crt")),
        dir.join(format!("{name}.key")),
    )
}

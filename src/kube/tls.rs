//! TLS 1.3 with ring, and of both only what Kubernetes' own certificates and servers need.
//!
//! A provider that names its algorithms, instead of the default one, leaves the rest out of the program: 110 KB. TLS 1.2 would add
//! 120 more; API servers speak 1.3 since Kubernetes 1.16 (Go 1.13). P-256 is the one key exchange because P-256 signatures are
//! needed anyway, and every server has it.

use std::fmt;
use std::io;
use std::sync::Arc;

use ring::rand::SystemRandom;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::ring::{cipher_suite, kx_group, sign};
use rustls::crypto::{
    CryptoProvider, GetRandomFailed, KeyProvider, SecureRandom, WebPkiSupportedAlgorithms, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::SigningKey;
use rustls::{AlertDescription, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};
use webpki::ring as algorithm;

use super::kubeconfig::Server;
use crate::error::{Code, Error, Result};

static SIGNATURES: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[
        algorithm::ECDSA_P256_SHA256,
        algorithm::ECDSA_P384_SHA384,
        algorithm::RSA_PKCS1_2048_8192_SHA256,
        algorithm::RSA_PKCS1_2048_8192_SHA384,
        algorithm::RSA_PKCS1_2048_8192_SHA512,
        algorithm::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    ],
    mapping: &[
        (SignatureScheme::ECDSA_NISTP256_SHA256, &[algorithm::ECDSA_P256_SHA256]),
        (SignatureScheme::ECDSA_NISTP384_SHA384, &[algorithm::ECDSA_P384_SHA384]),
        (SignatureScheme::RSA_PSS_SHA256, &[algorithm::RSA_PSS_2048_8192_SHA256_LEGACY_KEY]),
        (SignatureScheme::RSA_PKCS1_SHA256, &[algorithm::RSA_PKCS1_2048_8192_SHA256]),
        (SignatureScheme::RSA_PKCS1_SHA384, &[algorithm::RSA_PKCS1_2048_8192_SHA384]),
        (SignatureScheme::RSA_PKCS1_SHA512, &[algorithm::RSA_PKCS1_2048_8192_SHA512]),
    ],
};

#[derive(Debug)]
struct Random;

impl SecureRandom for Random {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), GetRandomFailed> {
        ring::rand::SecureRandom::fill(&SystemRandom::new(), bytes).map_err(|_| GetRandomFailed)
    }
}

/// RSA keys are kubeadm's, ECDSA keys k3s's.
#[derive(Debug)]
struct Keys;

impl KeyProvider for Keys {
    fn load_private_key(&self, key: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        sign::RsaSigningKey::new(&key)
            .map(|key| Arc::new(key) as Arc<dyn SigningKey>)
            .or_else(|_| sign::any_ecdsa_type(&key))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![cipher_suite::TLS13_AES_128_GCM_SHA256],
        kx_groups: vec![kx_group::SECP256R1],
        signature_verification_algorithms: SIGNATURES,
        secure_random: &Random,
        key_provider: &Keys,
    })
}

/// A connection to the server, as yet without a byte exchanged.
pub(super) fn session(server: &Server) -> Result<ClientConnection> {
    let name = server.tls_name.as_ref().unwrap_or(&server.host).clone();
    let no_name = |cause| Error::because(Code::Config, format!("{name:?} is not a name for a certificate"), cause);
    let server_name = ServerName::try_from(name.clone()).map_err(no_name)?;
    let connection = ClientConnection::new(Arc::new(config(server)?), server_name);
    connection.map_err(|cause| Error::because(Code::Config, "begin TLS", cause))
}

fn config(server: &Server) -> Result<ClientConfig> {
    let wrong = |what: &'static str| move |cause: rustls::Error| Error::because(Code::Config, what, cause);
    let provider = provider();
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(wrong("begin TLS 1.3"))?;
    let builder = builder.dangerous().with_custom_certificate_verifier(match &server.authority_pem {
        Some(pem) => verifier(pem, provider)?,
        None => Arc::new(AnyCertificate),
    });
    let mut config = match &server.client {
        None => builder.with_no_client_auth(),
        Some((certificates, key)) => {
            let key = PrivateKeyDer::from_pem_slice(key)
                .map_err(|cause| Error::because(Code::Config, "its client-key is no PEM of a key", cause))?;
            let chain = certificates_of(certificates, "client-certificate")?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(wrong("its client-certificate and client-key (RSA, or ECDSA with P-256 or P-384)"))?
        }
    };
    // There is one connection.
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn verifier(authority_pem: &[u8], provider: Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>> {
    let mut roots = RootCertStore::empty();
    // Some of a bundle may be of algorithms that are not known here; one has to be.
    roots.add_parsable_certificates(certificates_of(authority_pem, "certificate-authority")?);
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
    Ok(verifier.map_err(|cause| Error::because(Code::Config, "its certificate-authority", cause))?)
}

fn certificates_of(pem: &[u8], key: &str) -> Result<Vec<CertificateDer<'static>>> {
    let no_pem = |cause| Error::because(Code::Config, format!("its {key} is no PEM of certificates"), cause);
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(no_pem)?;
    if found.is_empty() { Err(Error::new(Code::Config, format!("its {key} holds no certificate"))) } else { Ok(found) }
}

/// `insecure-skip-tls-verify`: the administrator says so.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
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
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 was not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &SIGNATURES)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURES.supported_schemes()
    }
}

/// What went wrong, with what an operator can do about it.
pub(super) fn explained(cause: io::Error) -> Explained {
    let remedy = match cause.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_)) => {
            "; is certificate-authority the one of this cluster, and server a name or address in the server's certificate?"
        }
        Some(
            rustls::Error::AlertReceived(AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure)
            | rustls::Error::PeerIncompatible(_),
        ) => "; podshaper speaks TLS 1.3 alone",
        Some(rustls::Error::InvalidMessage(_)) => "; is there TLS on this port?",
        _ => "",
    };
    Explained { cause, remedy }
}

#[derive(Debug)]
pub(super) struct Explained {
    cause: io::Error,
    remedy: &'static str,
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.cause, self.remedy)
    }
}

impl std::error::Error for Explained {}

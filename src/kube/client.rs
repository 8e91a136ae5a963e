//! One GET by ureq, over TLS 1.2 or 1.3 by rustls with ring, within bounds of time and size.
//!
//! The library does HTTP and TLS, and tries the addresses one after the other. This file adds what a kubeconfig needs
//! beyond that (the name in the certificate may differ from the server's name) and error texts for the operator if the
//! server gives no answer.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, RootCertStore};
use ureq::config::Config;
use ureq::http::{Response, Uri};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{ConnectionDetails, Connector, NextTimeout, RustlsConnector, TcpConnector};
use ureq::{Agent, Body, Timeout};

use super::kubeconfig::Server;
use crate::error::{Code, Error, Result};

/// How many bytes of an answer's header are read at most.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// The path that is asked for, and the bounds on the answer.
pub(super) struct Question<'a> {
    /// The path below the server's own path, with its parameters.
    pub(super) path: &'a str,
    pub(super) accept: &'a str,
    /// The bound on the body. For a list it applies to an error answer only.
    pub(super) max_body_bytes: u64,
    /// The time until the body begins.
    pub(super) time_until_body: Duration,
    /// The time until the body ends.
    pub(super) time: Duration,
}

/// The status and the body.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// Asks a question and returns the whole answer.
///
/// # Errors
/// Besides a failed call: the answer is too long or is not HTTP.
pub(super) fn get(server: &Server, question: &Question<'_>) -> Result<Answer> {
    let answer = call(server, question)?;
    whole(answer, question).map_err(|cause| explained(cause, question))
}

/// Asks a question and passes the body to `read` as it arrives. The inner error is an answer with another status than
/// 200.
///
/// # Errors
/// Those of [`get`].
pub(super) fn get_list<T>(
    server: &Server,
    question: &Question<'_>,
    read: impl FnOnce(&mut dyn Read) -> io::Result<T>,
) -> Result<Result<T, Answer>> {
    let mut answer = call(server, question)?;
    let found = match answer.status().as_u16() {
        200 => read(&mut answer.body_mut().as_reader()).map(Ok).map_err(ureq::Error::from),
        _ => whole(answer, question).map(Err),
    };
    found.map_err(|cause| explained(cause, question))
}

fn whole(mut answer: Response<Body>, question: &Question<'_>) -> Result<Answer, ureq::Error> {
    let body = answer.body_mut().with_config().limit(question.max_body_bytes).read_to_vec()?;
    Ok(Answer { status: answer.status().as_u16(), body })
}

/// Sends the question. The caller reads the body.
fn call(server: &Server, question: &Question<'_>) -> Result<Response<Body>> {
    let Question { path, accept, max_body_bytes: _, time_until_body, time } = *question;
    let config = Agent::config_builder()
        .timeout_global(Some(time))
        .timeout_resolve(Some(time_until_body))
        .timeout_connect(Some(time_until_body))
        .timeout_recv_response(Some(time_until_body))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .https_only(true)
        // Otherwise ureq would take the proxy from the environment.
        .proxy(None)
        .max_response_header_size(MAX_HEAD_BYTES)
        .max_idle_connections(0)
        .user_agent(concat!("podshaper/", env!("CARGO_PKG_VERSION")))
        .accept(accept)
        .tls_config(tls(server)?)
        .build();
    let host = Host { name: server.host.clone(), port: server.port };
    let agent = Agent::with_parts(config, Tcp.chain(RustlsConnector::default()), host);
    // The host in the URI is the name that the certificate must be for. `Host` has the server's real address.
    let uri = Uri::builder().scheme("https").authority(server.authority_of(server.certificate_name()));
    let uri = uri.path_and_query(format!("{}{path}", server.path)).build();
    let uri = uri.map_err(|cause| Error::because(Code::Config, "put the URL together", cause))?;
    let mut request = agent.get(uri).header("Host", server.authority()).header("Connection", "close");
    if let Some(token) = &server.token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    request.call().map_err(|cause| explained(cause, question))
}

/// The server's name or address and its port, independent of the name in its certificate.
#[derive(Debug)]
struct Host {
    name: String,
    port: u16,
}

impl Resolver for Host {
    fn resolve(&self, _: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        if let Ok(address) = self.name.parse::<IpAddr>() {
            let mut addresses = self.empty();
            addresses.push(SocketAddr::new(address, self.port));
            return Ok(addresses);
        }
        crate::sys::look_up_names_without_plugins();
        let there =
            Uri::builder().scheme("https").authority(format!("{}:{}", self.name, self.port)).path_and_query("/");
        // The resolver runs in a thread of its own, which is left behind when the time is over.
        DefaultResolver::default().resolve(&there.build()?, config, timeout).map_err(|cause| {
            let text = format!("find the address of {} in /etc/hosts or by the servers of /etc/resolv.conf", self.name);
            failed(text, cause)
        })
    }
}

/// ureq's TCP connector, with the addresses added to its errors.
#[derive(Debug)]
struct Tcp;

impl Connector for Tcp {
    type Out = <TcpConnector as Connector>::Out;

    fn connect(&self, details: &ConnectionDetails<'_>, chained: Option<()>) -> Result<Option<Self::Out>, ureq::Error> {
        TcpConnector::default().connect(details, chained).map_err(|cause| {
            let addresses: Vec<_> = details.addrs.iter().map(SocketAddr::to_string).collect();
            failed(format!("connect to {}", addresses.join(", ")), cause)
        })
    }
}

/// Wraps an error of ureq with the name of the failed step.
fn failed(step: String, cause: ureq::Error) -> ureq::Error {
    ureq::Error::Other(match cause {
        ureq::Error::Io(cause) => Error::because(Code::ApiServer, step, cause).into(),
        ureq::Error::Timeout(_) => Error::new(Code::ApiServer, format!("{step}: no answer in time")).into(),
        cause => Error::because(Code::ApiServer, step, cause).into(),
    })
}

fn tls(server: &Server) -> Result<TlsConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let name = server.certificate_name();
    let no_name = |cause| Error::because(Code::Config, format!("{name:?} is not a name for a certificate"), cause);
    ServerName::try_from(name).map_err(no_name)?;
    let mut tls = TlsConfig::builder().unversioned_rustls_crypto_provider(provider.clone());
    tls = match &server.authority_pem {
        Some(pem) => tls.root_certs(authorities(pem)?),
        // `insecure-skip-tls-verify`: the administrator has asked for it.
        None => tls.disable_verification(true),
    };
    if let Some((certificates, key)) = &server.client {
        tls = tls.client_cert(Some(client(certificates, key, &provider)?));
    }
    Ok(tls.build())
}

fn authorities(pem: &[u8]) -> Result<RootCerts> {
    let certificates = certificates_of(pem, "certificate-authority")?;
    // rustls leaves out certificates of a bundle that it cannot parse; at least one must be left.
    if RootCertStore::empty().add_parsable_certificates(certificates.iter().cloned()).0 == 0 {
        return Err(Error::new(Code::Config, "its certificate-authority holds no certificate that can be read"));
    }
    Ok(RootCerts::new_with_certs(&for_ureq(&certificates)))
}

fn client(certificates: &[u8], key_pem: &[u8], provider: &CryptoProvider) -> Result<ClientCert> {
    let chain = certificates_of(certificates, "client-certificate")?;
    let no_key = "its client-key is no PEM of a key";
    let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|cause| Error::because(Code::Config, no_key, cause))?;
    let certificates = for_ureq(&chain);
    // ureq panics if rustls cannot use the certificate and the key as a pair.
    CertifiedKey::from_der(chain, key, provider)
        .map_err(|cause| Error::because(Code::Config, "its client-certificate and client-key", cause))?;
    let key = PrivateKey::from_pem(key_pem).map_err(|cause| Error::because(Code::Config, no_key, cause))?;
    Ok(ClientCert::new_with_certs(&certificates, key))
}

fn certificates_of(pem: &[u8], key: &str) -> Result<Vec<CertificateDer<'static>>> {
    let no_pem = |cause| Error::because(Code::Config, format!("its {key} is no PEM of certificates"), cause);
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(no_pem)?;
    if found.is_empty() { Err(Error::new(Code::Config, format!("its {key} holds no certificate"))) } else { Ok(found) }
}

fn for_ureq(certificates: &[CertificateDer<'_>]) -> Vec<Certificate<'static>> {
    certificates.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect()
}

/// The error of a call, with a remedy for the operator.
fn explained(cause: ureq::Error, question: &Question<'_>) -> Error {
    let text = match &cause {
        ureq::Error::Timeout(step) => {
            let time = match step {
                Timeout::Global | Timeout::RecvBody => question.time,
                _ => question.time_until_body,
            };
            return Error::new(Code::ApiServer, format!("no whole answer within {time:?}"));
        }
        ureq::Error::Other(step) => return Error::new(Code::ApiServer, step.to_string()),
        ureq::Error::BodyExceedsLimit(bytes) => format!("its answer has more than {bytes} bytes"),
        ureq::Error::LargeResponseHeader(_, bytes) => format!("the head of its answer has more than {bytes} bytes"),
        ureq::Error::Protocol(cause) => format!("its answer is not HTTP: {cause}"),
        ureq::Error::Io(cause) if cause.kind() == io::ErrorKind::UnexpectedEof => {
            "its answer ends too early".to_owned()
        }
        ureq::Error::Io(cause) => {
            let tls = cause.get_ref().and_then(|inner| inner.downcast_ref());
            format!("{cause}{}", tls.map_or("", remedy))
        }
        ureq::Error::Rustls(cause) => format!("{cause}{}", remedy(cause)),
        cause => cause.to_string(),
    };
    Error::new(Code::ApiServer, format!("talk to it: {text}"))
}

fn remedy(cause: &rustls::Error) -> &'static str {
    match cause {
        rustls::Error::InvalidCertificate(_) => {
            "; is certificate-authority the one of this cluster, and server a name or address in the server's certificate?"
        }
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure)
        | rustls::Error::PeerIncompatible(_) => "; podshaper speaks TLS 1.2 and 1.3",
        rustls::Error::InvalidMessage(_) => "; is there TLS on this port?",
        _ => "",
    }
}

//! An API server, as far as podshaper talks to one: TLS on loopback with its own certificates, and the answers that a
//! test asks for.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Context, Result};

/// The server's reaction to a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Sends these bytes and closes the connection.
    Bytes(Vec<u8>),
    /// Sends these bytes one by one, with a short pause between them.
    Drip(Vec<u8>),
    /// Sends these bytes again and again.
    Flood(Vec<u8>),
    /// Sends nothing and keeps the connection open.
    Silence,
    /// Sends the first of these replies whose path is a prefix of the request's path.
    ByPath(Vec<(&'static str, Reply)>),
}

impl Reply {
    fn to(&self, request: &str) -> &Self {
        let Self::ByPath(replies) = self else { return self };
        let path = request.split(' ').nth(1).unwrap_or_default();
        replies.iter().find(|(begin, _)| path.starts_with(begin)).map_or(self, |(_, reply)| reply)
    }

    pub fn json(status: &str, body: &Value) -> Self {
        let body = body.to_string();
        Self::Bytes(
            format!(
                "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .into(),
        )
    }

    /// A pod, sent in chunks as Go's server sends them.
    pub fn pod(uid: &str, labels: &Value, annotations: &Value) -> Self {
        let pod = json!({
            "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
            "metadata": { "name": "web-0", "uid": uid, "labels": labels, "annotations": annotations, "managedFields": [{ "manager": "kubectl" }] },
        });
        let (text, mut sent) = (pod.to_string(), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned());
        for chunk in text.as_bytes().chunks(100) {
            sent += &format!("{:x}\r\n{}\r\n", chunk.len(), String::from_utf8_lossy(chunk));
        }
        Self::Bytes((sent + "0\r\n\r\n").into())
    }

    /// The pods of a node: `in_front` pods with the annotations that make the longest answer, then one more pod.
    pub fn pods(in_front: usize, last: &Value) -> Self {
        /// The most bytes of annotations on a pod that an API server takes, here of a character that Go escapes with
        /// six bytes.
        const ANNOTATIONS_BYTES: usize = 256 << 10;
        let annotation = "\\u003c".repeat(ANNOTATIONS_BYTES);
        let mut items = String::new();
        for number in 0..in_front {
            items += &format!(
                r#"{{"metadata":{{"namespace":"a","name":"a{number}","uid":"a{number}","annotations":{{"a":"{annotation}"}}}}}},"#
            );
        }
        let body = format!(r#"{{"kind":"PartialObjectMetadataList","items":[{items}{last}],"metadata":{{}}}}"#);
        Self::Bytes(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into())
    }

    /// An error in the format of the API server.
    pub fn status(status: &str, message: &str) -> Self {
        Self::json(status, &json!({ "kind": "Status", "status": "Failure", "message": message }))
    }
}

/// A server that is listening. Its thread ends with the process.
pub struct ApiServer {
    pub address: SocketAddr,
    authority_pem: String,
    client_pem: (String, String),
    directory: TempDir,
    requests: Arc<Mutex<Vec<String>>>,
}

impl ApiServer {
    /// Starts on loopback, in this thread's network namespace.
    pub fn start(reply: Reply) -> Result<Self> {
        Self::start_with("127.0.0.1:0", rustls::ALL_VERSIONS, reply)
    }

    /// Starts at another address, with these versions of TLS.
    pub fn start_with(address: &str, versions: &[&'static SupportedProtocolVersion], reply: Reply) -> Result<Self> {
        let key = || KeyPair::generate().context("make a key");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, key()?).context("make an authority")?;
        let signed = |names: &[&str]| -> Result<(String, String)> {
            let key = key()?;
            let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
                .context("name a certificate")?;
            Ok((params.signed_by(&key, &authority).context("sign a certificate")?.pem(), key.serialize_pem()))
        };
        let (server, client) = (signed(&["127.0.0.1", "::1", "localhost", "api.example.org"])?, signed(&["node"])?);
        let listener = TcpListener::bind(address).context("listen")?;
        let this = Self {
            address: listener.local_addr().context("listen")?,
            authority_pem: authority.pem(),
            client_pem: client,
            directory: tempfile::tempdir().context("make a directory")?,
            requests: Arc::default(),
        };
        let config = Arc::new(tls(&this.authority_pem, &server, versions)?);
        let requests = this.requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, requests, reply) = (config.clone(), requests.clone(), reply.clone());
                // A client that gives up is no failure here: the test judges it.
                std::thread::spawn(move || serve(stream, config, &requests, &reply));
            }
        });
        Ok(this)
    }

    /// The requests so far, each as its head; header names are in lower case.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// A kubeconfig for this server, with a client certificate. `cluster_keys` and `user_keys` replace keys of the
    /// same name.
    pub fn kubeconfig(&self, cluster_keys: &Value, user_keys: &Value) -> Result<PathBuf> {
        let write = |name: &str, text: &str| -> Result<PathBuf> {
            let path = self.directory.path().join(name);
            std::fs::write(&path, text).context(path.display())?;
            Ok(path)
        };
        write("ca.crt", &self.authority_pem)?;
        write("client.crt", &self.client_pem.0)?;
        write("client.key", &self.client_pem.1)?;
        let mut cluster = json!({ "server": format!("https://{}", self.address), "certificate-authority": "ca.crt" });
        let mut user = json!({ "client-certificate": "client.crt", "client-key": "client.key" });
        for (object, keys) in [(&mut cluster, cluster_keys), (&mut user, user_keys)] {
            if let (Some(object), Some(keys)) = (object.as_object_mut(), keys.as_object()) {
                object.extend(keys.clone());
            }
        }
        // JSON is valid YAML, but real kubeconfigs use YAML's block style.
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: here\n  cluster: {cluster}\nusers:\n- name: node\n  user: {user}\n\
             contexts:\n- name: node@here\n  context:\n    cluster: here\n    user: node\ncurrent-context: node@here\n"
        );
        write("kubeconfig", &text)
    }
}

fn tls(
    authority_pem: &str,
    (certificate, key): &(String, String),
    versions: &[&'static SupportedProtocolVersion],
) -> Result<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).context("read a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(der(authority_pem)?).context("trust the authority")?;
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).allow_unauthenticated();
    let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(versions).context("TLS")?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).context("read a key")?;
    builder
        .with_client_cert_verifier(clients.build().context("verify clients")?)
        .with_single_cert(vec![der(certificate)?], key)
        .context("use the certificate")
}

/// Header names in HTTP are case-insensitive.
fn with_lower_names(head: &str) -> String {
    let lower = |(at, line): (usize, &str)| match line.split_once(':') {
        Some((name, value)) if at > 0 => format!("{}:{value}", name.to_ascii_lowercase()),
        _ => line.to_owned(),
    };
    head.split("\r\n").enumerate().map(lower).collect::<Vec<_>>().join("\r\n")
}

fn serve(stream: TcpStream, config: Arc<ServerConfig>, requests: &Mutex<Vec<String>>, reply: &Reply) -> Result<()> {
    let tls = ServerConnection::new(config).context("begin TLS")?;
    let mut stream = StreamOwned::new(tls, stream);
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = stream.read(&mut buffer).context("read the request")?;
        request.extend_from_slice(&buffer[..read]);
    }
    let certificate = stream.conn.peer_certificates().map_or("without", |_| "with");
    let head = format!("{} ({certificate} a certificate)", with_lower_names(&String::from_utf8_lossy(&request)));
    let reply = reply.to(&head);
    requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(head);
    match reply {
        Reply::ByPath(_) => {}
        Reply::Bytes(bytes) => stream.write_all(bytes).context("answer")?,
        Reply::Drip(bytes) => {
            for byte in bytes {
                stream.write_all(&[*byte]).and_then(|()| stream.flush()).context("answer")?;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Reply::Flood(bytes) => loop {
            stream.write_all(bytes).context("answer")?;
        },
        Reply::Silence => std::thread::sleep(Duration::from_secs(10)),
    }
    stream.conn.send_close_notify();
    stream.flush().context("answer")
}

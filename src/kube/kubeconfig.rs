//! A kubeconfig: where the API server is, how to verify it, and which credentials to present.
//!
//! The file is read as by client-go (`staging/src/k8s.io/client-go/tools/clientcmd/api/v1/types.go`), without the parts
//! that would start programs during an ADD (exec, auth-provider) or act as another user.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use ureq::http::Uri;
use ureq::http::uri::Scheme;

use crate::error::{Code, Error, Result, quoted};

/// How much is read at most of the kubeconfig, and of each file that it names.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The API server, and this node's credentials.
pub(super) struct Server {
    /// The URL as written in the kubeconfig, for messages.
    pub(super) url: String,
    /// The name or address, without brackets.
    pub(super) host: String,
    pub(super) port: u16,
    /// The part of the URL after the authority, without a slash at the end.
    pub(super) path: String,
    /// The name in the server's certificate, if it differs from `host`.
    pub(super) tls_name: Option<String>,
    /// The authorities' certificates as PEM. `None`: any certificate is accepted (`insecure-skip-tls-verify`).
    pub(super) authority_pem: Option<Vec<u8>>,
    /// The client's certificate and key as PEM.
    pub(super) client: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    current_context: Option<String>,
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    users: Vec<NamedUser>,
    #[serde(default)]
    contexts: Vec<NamedContext>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    #[serde(default)]
    user: User,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    #[serde(default)]
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    tls_server_name: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    proxy_url: Option<IgnoredAny>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<String>,
    client_certificate_data: Option<String>,
    client_key: Option<String>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<String>,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    username: Option<IgnoredAny>,
    #[serde(rename = "as")]
    impersonated: Option<IgnoredAny>,
}

impl Server {
    /// Reads a kubeconfig.
    ///
    /// # Errors
    /// [`Code::Config`], naming the file and the key.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let named = |error| Error::because(Code::Config, format!("kubeconfig {}", path.display()), error);
        let bytes = file(path).map_err(named)?;
        Self::parse(&bytes, path.parent().unwrap_or(Path::new("/"))).map_err(named)
    }

    /// Parses a kubeconfig. The files that the text names are relative to `directory`.
    pub(super) fn parse(text: &[u8], directory: &Path) -> Result<Self> {
        let decoded =
            serde_norway::from_slice(text).map_err(|cause| Error::because(Code::Config, "it is no kubeconfig", cause));
        let Kubeconfig { current_context, clusters, users, contexts } = decoded?;
        let wanted = current_context.unwrap_or_default();
        let missing = |what: &str, name: &str| wrong(format!("it has no {what} named {}", quoted(name)));
        let context = contexts.into_iter().find(|context| context.name == wanted);
        let context = context.ok_or_else(|| missing("context (current-context)", &wanted))?.context;
        let cluster = clusters.into_iter().find(|cluster| cluster.name == context.cluster);
        let cluster = cluster.ok_or_else(|| missing("cluster", &context.cluster))?.cluster;
        let user = users.into_iter().find(|user| user.name == context.user);
        let user = user.ok_or_else(|| missing("user", &context.user))?.user;
        Self::of(cluster, user, directory)
    }

    fn of(cluster: Cluster, user: User, directory: &Path) -> Result<Self> {
        refuse(&cluster, &user)?;
        let (host, port, path) = split(&cluster.server)?;
        let authority = material(
            "certificate-authority",
            cluster.certificate_authority_data,
            cluster.certificate_authority,
            directory,
        )?;
        if authority.is_none() && !cluster.insecure_skip_tls_verify {
            return Err(wrong(
                "its cluster has no certificate-authority; for one of the system's: /etc/ssl/certs/ca-certificates.crt",
            ));
        }
        let certificate =
            material("client-certificate", user.client_certificate_data, user.client_certificate, directory)?;
        let client = match (certificate, material("client-key", user.client_key_data, user.client_key, directory)?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err(wrong("its user has one of client-certificate and client-key, and not the other")),
        };
        Ok(Self {
            url: cluster.server,
            host,
            port,
            path,
            tls_name: cluster.tls_server_name.filter(|name| !name.is_empty()),
            authority_pem: authority.filter(|_| !cluster.insecure_skip_tls_verify),
            client,
            token: token(user.token, user.token_file, directory)?,
        })
    }

    /// The name or address that the server's certificate must be for.
    pub(super) fn certificate_name(&self) -> &str {
        self.tls_name.as_ref().unwrap_or(&self.host)
    }

    /// Host and port in the form that HTTP uses.
    pub(super) fn authority(&self) -> String {
        self.authority_of(&self.host)
    }

    /// Another host's name with this port, in the form that HTTP uses.
    pub(super) fn authority_of(&self, host: &str) -> String {
        let port = self.port;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

fn wrong(text: impl Into<String>) -> Error {
    Error::new(Code::Config, text)
}

/// Refuses settings that podshaper does not support and must not ignore silently.
fn refuse(cluster: &Cluster, user: &User) -> Result<()> {
    let advice =
        "give podshaper a kubeconfig of its own with a token or a client certificate (install/labels-rbac.yaml)";
    for (key, there) in [
        ("exec", user.exec.is_some()),
        ("auth-provider", user.auth_provider.is_some()),
        ("username", user.username.is_some()),
        ("as", user.impersonated.is_some()),
    ] {
        if there {
            return Err(wrong(format!("its user has {key:?}, which podshaper does not do: {advice}")));
        }
    }
    if cluster.proxy_url.is_some() {
        return Err(wrong("its cluster has \"proxy-url\", and podshaper asks no proxy"));
    }
    Ok(())
}

/// Splits `https://host[:port][/path]`. The other parts that a URL can have are refused.
fn split(url: &str) -> Result<(String, u16, String)> {
    let no_url = || wrong(format!("its server {} is not of the form https://HOST:PORT", quoted(url)));
    let uri = url.parse::<Uri>().map_err(|_| no_url())?;
    let authority = uri.authority().filter(|_| uri.scheme() == Some(&Scheme::HTTPS)).ok_or_else(no_url)?;
    let (host, port) = (authority.host(), authority.port_u16());
    // Otherwise the URL has a user, or a port that is not a number.
    let plain = authority.as_str() == port.map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    if host.is_empty() || !plain || uri.query().is_some() {
        return Err(no_url());
    }
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Ok((bare.to_owned(), port.unwrap_or(443), uri.path().trim_end_matches('/').to_owned()))
}

/// PEM from base64 in the kubeconfig, which has precedence, or from a file.
fn material(key: &str, data: Option<String>, path: Option<String>, directory: &Path) -> Result<Option<Vec<u8>>> {
    let data = data.filter(|data| !data.is_empty());
    if let Some(data) = data {
        let decoded = STANDARD.decode(data.split_ascii_whitespace().collect::<String>());
        return decoded
            .map(Some)
            .map_err(|cause| Error::because(Code::Config, format!("its {key}-data is not base64"), cause));
    }
    let path = path.filter(|path| !path.is_empty());
    let read = |path: String| file(&directory.join(path)).map_err(|error| Error::because(Code::Config, key, error));
    path.map(read).transpose()
}

/// A token. The file has precedence over the text in the kubeconfig, since tokens are renewed in files.
fn token(text: Option<String>, path: Option<String>, directory: &Path) -> Result<Option<String>> {
    let text = match path.filter(|path| !path.is_empty()) {
        Some(path) => {
            let bytes =
                file(&directory.join(path)).map_err(|error| Error::because(Code::Config, "tokenFile", error))?;
            Some(String::from_utf8(bytes).map_err(|_| wrong("its tokenFile is not text"))?)
        }
        None => text,
    };
    let token = text.map(|text| text.trim().to_owned()).filter(|token| !token.is_empty());
    // The token becomes a part of a header line.
    if token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
        return Err(wrong("its token has other than printable characters"));
    }
    Ok(token)
}

fn file(path: &Path) -> Result<Vec<u8>> {
    let reading = |cause| Error::because(Code::Config, format!("read {}", path.display()), cause);
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)).map_err(reading)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(wrong(format!("read {}: it has more than {MAX_FILE_BYTES} bytes", path.display())));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(cluster: &str, user: &str) -> Result<Server, String> {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- name: c\n  context: {{cluster: k, user: u, namespace: x}}\n\
             clusters:\n- name: k\n  cluster: {{{cluster}}}\nusers:\n- name: u\n  user: {{{user}}}\npreferences: {{}}\n"
        );
        Server::parse(text.as_bytes(), Path::new("/nowhere")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_server_is_a_host_a_port_and_a_path() {
        for (url, expected) in [
            ("https://10.96.0.1", Ok(("10.96.0.1:443", ""))),
            ("https://[fd00::1]:6443/", Ok(("[fd00::1]:6443", ""))),
            ("https://[fd00::1]", Ok(("[fd00::1]:443", ""))),
            ("https://api.example.org:8443/k8s/clusters/c-1", Ok(("api.example.org:8443", "/k8s/clusters/c-1"))),
            ("http://10.0.0.1", Err(())),
            ("https://", Err(())),
            ("https://a:b", Err(())),
            ("https://a:70000", Err(())),
            ("https://u@a", Err(())),
            ("https://a/x y", Err(())),
            ("https://a/\\r\\nX: y", Err(())),
            ("https://[a", Err(())),
            ("10.0.0.1:443", Err(())),
        ] {
            let found = parse(&format!("server: \"{url}\", insecure-skip-tls-verify: true"), "");
            match (&found, expected) {
                (Ok(server), Ok((authority, path))) => {
                    assert_eq!((server.authority().as_str(), server.path.as_str()), (authority, path))
                }
                (Err(error), Err(())) => assert!(error.contains("is not of the form https://HOST:PORT"), "{error}"),
                _ => panic!("{url}: {}", found.is_ok()),
            }
        }
    }

    #[test]
    fn what_podshaper_does_not_do_is_said() {
        let ca = "server: https://a, certificate-authority-data: Y2E=";
        let advice = "which podshaper does not do: give podshaper a kubeconfig of its own with a token or a client certificate (install/labels-rbac.yaml)";
        for (cluster, user, expected) in [
            (ca, "exec: {command: aws}", format!("its user has \"exec\", {advice}")),
            (ca, "auth-provider: {name: gcp}", format!("its user has \"auth-provider\", {advice}")),
            (ca, "username: a, password: b", format!("its user has \"username\", {advice}")),
            (ca, "as: admin", format!("its user has \"as\", {advice}")),
            (
                "server: https://a, proxy-url: x",
                "",
                "its cluster has \"proxy-url\", and podshaper asks no proxy".into(),
            ),
            (
                "server: https://a",
                "",
                "its cluster has no certificate-authority; for one of the system's: /etc/ssl/certs/ca-certificates.crt"
                    .into(),
            ),
            (
                ca,
                "client-key-data: Y2E=",
                "its user has one of client-certificate and client-key, and not the other".into(),
            ),
            (ca, "token: \"a\\nb\"", "its token has other than printable characters".into()),
            (ca, "tokenFile: t", "tokenFile: read /nowhere/t: No such file or directory (os error 2)".into()),
            (
                "server: https://a, certificate-authority-data: '?'",
                "",
                "its certificate-authority-data is not base64: Invalid symbol 63, offset 0.".into(),
            ),
        ] {
            assert_eq!(parse(cluster, user).err(), Some(expected), "{cluster} {user}");
        }
        for (text, expected) in [
            ("current-context: x", "it has no context (current-context) named \"x\""),
            ("{}", "it has no context (current-context) named \"\""),
            (
                "contexts: 1",
                "it is no kubeconfig: contexts: invalid type: integer `1`, expected a sequence at line 1 column 11",
            ),
        ] {
            let error = Server::parse(text.as_bytes(), Path::new("/")).err().unwrap().to_string();
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn data_counts_before_files_and_token_files_before_tokens() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("t"), "from-file\n").unwrap();
        let text = "{current-context: c, contexts: [{name: c, context: {cluster: k, user: u}}], \
                    clusters: [{name: k, cluster: {server: 'https://a', certificate-authority-data: Y2E=, certificate-authority: nowhere}}], \
                    users: [{name: u, user: {token: x, tokenFile: t}}]}";
        let server = Server::parse(text.as_bytes(), directory.path()).unwrap();
        assert_eq!((server.token.as_deref(), server.authority_pem.as_deref()), (Some("from-file"), Some(&b"ca"[..])));
    }
}

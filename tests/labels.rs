//! A pod's labels and annotations, from an API server that the test makes. Without root, the error about a label that
//! is no rate shows that the label was read.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::sched::{CloneFlags, unshare};
use rcgen::KeyPair;
use serde_json::{Map, Value, json};

use super::chain::{Attachment, Bed, MBIT};
use super::harness::cni::Cni;
use super::harness::limiter::Limiter;
use super::harness::meter;
use super::harness::pod::INTERFACE;
use super::harness::process;
use super::kernel::mounts;
use super::sandbox::{ok, refused};
use crate::api::{ApiServer, Reply};

const PODSHAPER: &str = env!("CARGO_BIN_EXE_podshaper");
const UID: &str = "b210522c-ecca-47e2-908a-76691272b43d";
const API: u64 = 103;
const CONFIG: u64 = 7;
const RESULT: &str = r#"{"cniVersion": "1.1.0", "ips": []}"#;

fn stdin(kubeconfig: &Path, keys: &str) -> String {
    let kubeconfig = json!(kubeconfig);
    format!(
        r#"{{"cniVersion": "1.1.0", "name": "net", "type": "podshaper", "prevResult": {RESULT}, "kubeconfig": {kubeconfig}{keys}}}"#
    )
}

/// An ADD for the pod default/web-0 in a sandbox that does not exist.
fn add(kubeconfig: &Path, keys: &str) -> Cni {
    Cni::new(PODSHAPER, "ADD")
        .env("CNI_CONTAINERID", "c1")
        .env("CNI_NETNS", "/run/netns/podshaper-nowhere")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID={UID}"))
        .stdin(stdin(kubeconfig, keys))
}

fn kubeconfig(server: &ApiServer) -> std::path::PathBuf {
    server.kubeconfig(&json!({}), &json!({})).unwrap()
}

fn asked(server: &ApiServer) -> String {
    format!("ask https://{} for pod default/web-0", server.address)
}

#[test]
fn a_label_and_an_annotation_of_the_api_server_are_limits() {
    let wrong = json!({ "rate": "fast" });
    for (labels, annotations, source) in [
        (&wrong, &json!(null), "API server's pod label rate"),
        (&json!({ "rate": "1M" }), &wrong, "API server's pod annotation rate"),
        (
            &json!({}),
            &json!({ "kubernetes.io/ingress-bandwidth": "fast" }),
            "API server's pod annotation kubernetes.io/ingress-bandwidth",
        ),
    ] {
        let server = ApiServer::start(Reply::pod(UID, labels, annotations)).unwrap();
        let (code, details) = refused(&add(&kubeconfig(&server), ""));
        assert_eq!(code, CONFIG, "{details}");
        assert!(details.starts_with(&format!("{source}: \"fast\" is not a rate (")), "{details}");
        let requests = server.requests();
        assert_eq!(requests.len(), 1, "one GET: {requests:?}");
        let (line, host) = ("GET /api/v1/namespaces/default/pods/web-0 HTTP/1.1\r\n", server.address);
        assert!(requests[0].starts_with(line) && requests[0].ends_with("(with a certificate)"), "{requests:?}");
        assert!(requests[0].contains(&format!("\r\nhost: {host}\r\n")), "{requests:?}");
    }
}

/// A pod must not get rid of its limit by keys that sort before it.
#[test]
fn a_limit_that_may_be_behind_more_keys_than_are_read_is_an_error() {
    let mut members: Map<String, Value> = (0..300).map(|i| (format!("a{i:03}"), json!("x".repeat(250)))).collect();
    members.insert("rate".into(), json!("1M"));
    let (many, none) = (json!(members), json!(null));
    for (labels, annotations, source) in
        [(&many, &none, "API server's pod label"), (&none, &many, "API server's pod annotation")]
    {
        let server = ApiServer::start(Reply::pod(UID, labels, annotations)).unwrap();
        let path = kubeconfig(&server);
        let (code, details) = refused(&add(&path, r#", "onApiError": "ignore""#));
        let expected = format!("{source} rate: it is not known whether pod default/web-0 has it, since ");
        assert!(code == CONFIG && details.starts_with(&expected), "{code} {details}");
        assert_eq!(ok(&add(&path, r#", "rateKey": """#)).stdout, RESULT);
    }
}

#[test]
fn a_pod_without_limits_is_let_through_and_asked_for_once() {
    let server = ApiServer::start(Reply::pod(UID, &json!({ "app": "web" }), &json!(null))).unwrap();
    assert_eq!(ok(&add(&kubeconfig(&server), "")).stdout, RESULT);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn nobody_is_asked_for_what_is_known() {
    let server = ApiServer::start(Reply::pod(UID, &json!({ "rate": "fast" }), &json!(null))).unwrap();
    let path = kubeconfig(&server);
    // Both directions are set, so the API server is not asked, and the missing sandbox is the error.
    let (code, details) =
        refused(&add(&path, r#", "runtimeConfig": {"bandwidth": {"EgressRate": 1000000, "IngressRate": 1000000}}"#));
    assert!(code != API && !details.contains("API server"), "{code} {details}");
    // A pod outside of Kubernetes.
    assert_eq!(ok(&add(&path, "").env("CNI_ARGS", "IgnoreUnknown=1")).stdout, RESULT);
    assert_eq!(server.requests(), [""; 0]);
    // One direction is set. For the other direction, the API server comes before the default.
    let (_, details) =
        refused(&add(&path, r#", "egress": "5M", "runtimeConfig": {"bandwidth": {"IngressRate": 1000000}}"#));
    assert!(details.starts_with("API server's pod label rate: \"fast\""), "{details}");
    let (_, details) = refused(&add(&path, "").env("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0"));
    assert!(details.contains("this runtime passes no K8S_POD_UID"), "{details}");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn tokens_are_shown_and_static_pods_known_by_their_mirror() {
    let mirrored = json!({ "kubernetes.io/config.mirror": UID, "rate": "fast" });
    let server = ApiServer::start(Reply::pod("another", &json!({}), &mirrored)).unwrap();
    let user = json!({ "client-certificate": null, "client-key": null, "token": "a.b-c" });
    let localhost = json!({ "server": format!("https://localhost:{}", server.address.port()) });
    let path = server.kubeconfig(&localhost, &user).unwrap();
    let (_, details) = refused(&add(&path, ""));
    assert!(details.starts_with("API server's pod annotation rate: \"fast\""), "{details}");
    let request = &server.requests()[0];
    assert!(
        request.contains("\r\nauthorization: Bearer a.b-c\r\n") && request.ends_with("(without a certificate)"),
        "{request}"
    );
}

/// All kinds of missing answers, the error for each, and the effect of `onApiError`.
#[test]
fn no_answer_is_an_error_that_says_why_unless_it_is_to_be_ignored() {
    let flood = Reply::Flood(vec![b'x'; 1 << 16]);
    let huge = Reply::Bytes([b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b' '; 3 << 20]].concat());
    let sized = |bytes: usize| {
        [format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n").into_bytes(), vec![b' '; bytes]].concat()
    };
    let raw = |text: &str| Reply::Bytes(text.into());
    let too_early = "talk to it: its answer ends too early".to_owned();
    let no_http = |why: &str| format!("talk to it: its answer is not HTTP: {why}");
    let no_pod = |why: &str| format!("its answer is no pod: {why}");
    let (again, none) = ("kubelet will give it up or try again", json!({}));
    for (reply, expected) in [
        (Reply::status("404 Not Found", "pods \"web-0\" not found"), "it answered 404 \"pods \\\"web-0\\\" not found\": there is no such pod (any more), or it is another cluster's API server".to_owned()),
        (Reply::status("403 Forbidden", "no"), "it answered 403 \"no\": its user may not; kubectl apply -f install/labels-rbac.yaml makes one who may get and list pods and namespaces, and install/kubeconfig writes its kubeconfig: put that in the place of this one (kubelet's own may get its node's pods alone)".to_owned()),
        (Reply::status("401 Unauthorized", "Unauthorized"), "it answered 401 \"Unauthorized\": the credentials in the kubeconfig are not (or no longer) valid".to_owned()),
        (Reply::Bytes(b"HTTP/1.1 503 x\r\n\r\n\x1b[2J".to_vec()), "it answered 503 \"\": is it an API server, and well?".to_owned()),
        (Reply::pod("other", &none, &none), format!("it has another pod of this name by now: UID \"other\", and the runtime makes {UID}; {again}")),
        (Reply::json("200 OK", &json!({ "metadata": {} })), "its answer is no pod: missing field `uid` at line 1 column 14".to_owned()),
        (huge, "talk to it: its answer has more than 2097152 bytes".to_owned()),
        (flood, "talk to it: its answer is not HTTP: http parse fail: invalid HTTP version".to_owned()),
        (raw(""), too_early.clone()),
        (raw("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{} "), too_early.clone()),
        (raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{} \r\n"), too_early.clone()),
        (raw("HTTP/1.1 200 OK\r\nX: y\r\n"), too_early),
        (raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"), no_http("chunk length cannot be read as a number")),
        (raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx"), no_pod("expected value at line 1 column 1")),
        (raw("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), no_http("content-length header not a number")),
        (Reply::Bytes(sized(3 << 20)), "talk to it: its answer has more than 2097152 bytes".to_owned()),
        (raw("SSH-2.0-OpenSSH_9.2\r\n"), no_http("http parse fail: invalid HTTP version")),
        (Reply::Bytes([b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 1 << 20]].concat()), "talk to it: the head of its answer has more than 16384 bytes".to_owned()),
        (raw("HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"), "it answered 302 \"\": is it an API server, and well?".to_owned()),
    ] {
        let server = ApiServer::start(reply).unwrap();
        let path = kubeconfig(&server);
        let (code, details) = refused(&add(&path, ""));
        assert_eq!((code, details), (API, format!("{}: {expected}", asked(&server))));
        let call = add(&path, r#", "onApiError": "ignore""#).call().unwrap();
        assert_eq!(call.success().unwrap().stdout, RESULT, "{call}");
        assert!(call.stderr.contains("without the pod's labels") && call.stderr.contains(&expected), "{call}");
    }
}

#[test]
fn an_answer_that_does_not_end_costs_two_seconds() {
    let head = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n".to_vec();
    // Accepts connections, but speaks no TLS.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let no_tls = json!({ "server": format!("https://{}", silent.local_addr().unwrap()) });
    let server = ApiServer::start(Reply::Silence).unwrap();
    let dripping = ApiServer::start(Reply::Drip([head, vec![b' '; 500]].concat())).unwrap();
    let other = ApiServer::start(Reply::Silence).unwrap();
    let paths = [kubeconfig(&server), kubeconfig(&dripping), other.kubeconfig(&no_tls, &json!({})).unwrap()];
    for path in paths {
        let start = Instant::now();
        let (code, details) = refused(&add(&path, ""));
        let took = start.elapsed();
        assert_eq!(code, API, "{details}");
        assert!(details.contains(": no whole answer within 2s"), "{details}");
        assert!(took > Duration::from_millis(1900) && took < Duration::from_millis(2600), "{took:?}: {details}");
    }
}

#[test]
fn a_server_that_is_not_the_one_is_not_believed() {
    let reply = || Reply::pod(UID, &json!({ "rate": "fast" }), &json!(null));
    let (server, other) = (ApiServer::start(reply()).unwrap(), ApiServer::start(reply()).unwrap());
    let here = |server: &ApiServer| json!({ "server": format!("https://{}", server.address) });
    let advice =
        "; is certificate-authority the one of this cluster, and server a name or address in the server's certificate?";
    let none = json!({});
    // The other server's authority did not sign this server's certificate.
    let (code, details) = refused(&add(&other.kubeconfig(&here(&server), &none).unwrap(), ""));
    assert_eq!(code, API, "{details}");
    assert!(details.contains("invalid peer certificate: ") && details.ends_with(advice), "{details}");
    // Signed, but for another name.
    let (_, details) =
        refused(&add(&server.kubeconfig(&json!({ "tls-server-name": "kubernetes" }), &none).unwrap(), ""));
    assert!(
        details.contains("invalid peer certificate: certificate not valid for name \"kubernetes\"")
            && details.ends_with(advice),
        "{details}"
    );
    assert_eq!(server.requests(), [""; 0], "nothing is sent to a server that is not known");
    // With the administrator's consent.
    let skip = json!({ "insecure-skip-tls-verify": true, "tls-server-name": "kubernetes" });
    let (_, details) = refused(&add(&server.kubeconfig(&skip, &none).unwrap(), ""));
    assert!(details.starts_with("API server's pod label rate"), "{details}");
    // A server without TLS, and an address without a server.
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = plain.local_addr().unwrap();
    std::thread::spawn(move || {
        plain
            .incoming()
            .flatten()
            .for_each(|mut stream| drop(std::io::Write::write_all(&mut stream, b"HTTP/1.0 400 no\r\n\r\n")))
    });
    let (_, details) =
        refused(&add(&server.kubeconfig(&json!({ "server": format!("https://{address}") }), &none).unwrap(), ""));
    assert!(details.ends_with("; is there TLS on this port?"), "{details}");
    let (_, details) =
        refused(&add(&server.kubeconfig(&json!({ "server": "https://127.0.0.1:1" }), &none).unwrap(), ""));
    assert!(
        details.ends_with("for pod default/web-0: connect to 127.0.0.1:1: Connection refused (os error 111)"),
        "{details}"
    );
    let (code, details) = refused(&add(Path::new("/nowhere/kubeconfig"), ""));
    assert_eq!(
        (code, details.as_str()),
        (CONFIG, "kubeconfig /nowhere/kubeconfig: read /nowhere/kubeconfig: No such file or directory (os error 2)")
    );
}

/// Behaviour that ureq alone does not have: see src/kube/client.rs.
#[test]
fn the_server_is_asked_where_the_kubeconfig_says_and_under_its_own_name() {
    let reply = || Reply::pod(UID, &json!({ "rate": "fast" }), &json!(null));
    let none = json!({});
    let versions = rustls::ALL_VERSIONS;
    for server in [
        ApiServer::start_with("[::1]:0", versions, reply()).unwrap(),
        ApiServer::start_with("127.0.0.1:0", &[&rustls::version::TLS12], reply()).unwrap(),
        ApiServer::start_with("127.0.0.1:0", &[&rustls::version::TLS13], reply()).unwrap(),
    ] {
        // A name that cannot be resolved, and a proxy that does not exist.
        for cluster in [&none, &json!({ "tls-server-name": "api.example.org" })] {
            let path = server.kubeconfig(cluster, &none).unwrap();
            let (_, details) = refused(&add(&path, "").env("HTTPS_PROXY", "http://127.0.0.1:1"));
            assert!(details.starts_with("API server's pod label rate: \"fast\""), "{details}");
            let request = server.requests().pop().unwrap();
            assert!(request.contains(&format!("\r\nhost: {}\r\n", server.address)), "{request}");
        }
        let url = json!({ "server": format!("https://{}/k8s/c-1/", server.address) });
        refused(&add(&server.kubeconfig(&url, &none).unwrap(), ""));
        let request = server.requests().pop().unwrap();
        assert!(request.starts_with("GET /k8s/c-1/api/v1/namespaces/default/pods/web-0 HTTP/1.1\r\n"), "{request}");
    }
}

#[test]
fn credentials_that_are_none_are_said() {
    let server = ApiServer::start(Reply::Silence).unwrap();
    // PEM whose content is no certificate.
    let hollow = STANDARD.encode("-----BEGIN CERTIFICATE-----\nYQ==\n-----END CERTIFICATE-----\n");
    let key = STANDARD.encode(KeyPair::generate().unwrap().serialize_pem());
    let none = json!({});
    for (cluster, user, expected) in [
        (&json!({ "certificate-authority-data": "Y2E=" }), &none, "its certificate-authority holds no certificate"),
        (
            &json!({ "certificate-authority-data": hollow }),
            &none,
            "its certificate-authority holds no certificate that can be read",
        ),
        (&json!({ "tls-server-name": "a b" }), &none, "\"a b\" is not a name for a certificate: invalid dns name"),
        (&none, &json!({ "client-certificate-data": "Y2E=" }), "its client-certificate holds no certificate"),
        (&none, &json!({ "client-key-data": "Y2E=" }), "its client-key is no PEM of a key: no items found"),
        (
            &none,
            &json!({ "client-key-data": key }),
            "its client-certificate and client-key: keys may not be consistent: KeyMismatch",
        ),
        (&none, &json!({ "client-certificate-data": hollow }), "its client-certificate and client-key: "),
    ] {
        let (code, details) = refused(&add(&server.kubeconfig(cluster, user).unwrap(), ""));
        assert_eq!(code, API, "{details}");
        let (asked, found) = details.split_once(" for pod default/web-0: ").unwrap();
        assert!(asked.starts_with("ask https://127.0.0.1:") && found.starts_with(expected), "{details}");
    }
}

/// A name server that knows one name, with an alias and an address of each kind.
fn serve_names(socket: &UdpSocket) {
    let mut buffer = [0; 512];
    while let Ok((read, from)) = socket.recv_from(&mut buffer) {
        let question = &buffer[12..read];
        let end = question.iter().position(|byte| *byte == 0).unwrap() + 5;
        let (known, kind) = (question.starts_with(b"\x03api\x07example\x03org\0"), question[end - 3]);
        let address: &[u8] =
            if kind == 1 { &[127, 0, 0, 1] } else { &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] };
        // RFC 1035, 4.1: a response to one question, with two answers, or with the error that there is no such name.
        let mut packet = buffer[..2].to_vec();
        packet.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, if known { 2 } else { 0 }, 0, 0, 0, 0]);
        packet.extend(&question[..end]);
        if known {
            packet.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 4, 1, b'x', 0xc0, 16]);
            packet.extend([1, b'x', 0xc0, 16, 0, kind, 0, 1, 0, 0, 0, 9, 0, u8::try_from(address.len()).unwrap()]);
            packet.extend(address);
        }
        socket.send_to(&packet, from).unwrap();
    }
}

/// The nsswitch.conf names only libraries. If podshaper loaded them, which a static binary must not do, it would find
/// no name.
#[test]
#[ignore = "needs root"]
fn names_come_from_name_servers_in_time_and_from_no_library_of_the_node() {
    mounts::with_own(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        process::run(Command::new("ip").args(["link", "set", "lo", "up"])).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let file = directory.path().join(name);
            std::fs::write(&file, text).unwrap();
            mounts::bind(&file, &Path::new("/etc").join(name));
        };
        put("nsswitch.conf", "hosts: mymachines resolve [!UNAVAIL=return] myhostname\n");
        put("resolv.conf", "nameserver 127.0.0.9\nnameserver 127.0.0.1\n");
        let names = UdpSocket::bind("127.0.0.1:53").unwrap();
        std::thread::spawn(move || serve_names(&names));
        let server = ApiServer::start(Reply::pod(UID, &json!({ "rate": "fast" }), &json!(null))).unwrap();
        let none = json!({});
        let call = |name: &str| {
            let url = json!({ "server": format!("https://{name}:{}", server.address.port()) });
            let cni = add(&server.kubeconfig(&url, &none).unwrap(), "");
            let (start, answer) = (Instant::now(), refused(&cni).1);
            (start.elapsed(), answer)
        };
        // First no server has the first address, which the kernel reports at once. Then a server has the address and
        // does not answer.
        for silent in [None, Some(UdpSocket::bind("127.0.0.9:53").unwrap())] {
            let (took, details) = call("api.example.org");
            assert!(details.starts_with("API server's pod label rate: \"fast\""), "{silent:?}: {details}");
            assert!(took < Duration::from_millis(1500), "{silent:?}: {took:?}");
        }
        let (_, details) = call("api.example.net");
        let text = "find the address of api.example.net in /etc/hosts or by the servers of /etc/resolv.conf: ";
        assert!(details.contains(&format!("{text}failed to lookup address information: ")), "{details}");
        std::fs::write(directory.path().join("resolv.conf"), "nameserver 127.0.0.9\n").unwrap();
        let _silent = UdpSocket::bind("127.0.0.9:53").unwrap();
        let (took, details) = call("api.example.org");
        // The C library also gives up after two seconds; the first of the two reports the error.
        let texts = [": no answer in time", ": Temporary failure in name resolution"];
        assert!(texts.iter().any(|text| details.ends_with(text)), "{details}");
        assert!(took > Duration::from_millis(1900) && took < Duration::from_millis(2600), "{took:?}: {details}");
    });
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn the_ancestors_label_limits_a_pod() {
    let bed = Bed::new();
    let mut pod = bed.pod(Limiter::Bare, 0);
    pod.offers.remove("bandwidth");
    let labels = json!({ "rate": "1M" });
    let call = |uid: &str| {
        let server =
            ApiServer::start(Reply::pod(uid, &labels, &json!({ "kubernetes.io/ingress-bandwidth": "20M" }))).unwrap();
        let mut stdin: Value = serde_json::from_str(&stdin(&kubeconfig(&server), "")).unwrap();
        stdin["runtimeConfig"] = json!(pod.offers);
        (pod.environment(Cni::new(PODSHAPER, "ADD").stdin(stdin.to_string())), server)
    };
    let (cni, _server) = call("of another pod");
    let (code, details) = refused(&cni);
    assert!(code == API && details.contains("it has another pod of this name by now"), "{details}");
    assert!(!meter::directory(&pod, INTERFACE).exists(), "a failed ADD leaves nothing");
    let uid = pod.uid.clone();
    let (cni, _server) = call(&uid);
    let attachment = Attachment::add(cni);
    assert_eq!(meter::egress_limit(&pod, INTERFACE).unwrap().rate_bits_per_s, 8 * MBIT);
    drop(attachment);
}

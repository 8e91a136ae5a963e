//! A pod's labels and annotations, from an API server that a test makes. That a label was read shows without root in the error about
//! one that is no rate.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::chain::{Attachment, Bed, MBIT};
use super::harness::api::{ApiServer, Reply};
use super::harness::cni::Cni;
use super::harness::limiter::Limiter;
use super::harness::meter;
use super::harness::pod::INTERFACE;
use super::sandbox::{ok, refused};

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

/// An ADD for pod default/web-0 in a sandbox that is nowhere.
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
        let expected = format!("GET /api/v1/namespaces/default/pods/web-0 HTTP/1.1\r\nHost: {}\r\n", server.address);
        assert!(requests[0].starts_with(&expected) && requests[0].ends_with("(with a certificate)"), "{requests:?}");
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
    // Both directions set: the sandbox that is nowhere is what fails.
    let (code, details) =
        refused(&add(&path, r#", "runtimeConfig": {"bandwidth": {"EgressRate": 1000000, "IngressRate": 1000000}}"#));
    assert!(code != API && !details.contains("API server"), "{code} {details}");
    // No pod of Kubernetes.
    assert_eq!(ok(&add(&path, "").env("CNI_ARGS", "IgnoreUnknown=1")).stdout, RESULT);
    assert_eq!(server.requests(), [""; 0]);
    // One direction set, and the other one is the API server's to tell; its default is behind that.
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
        request.contains("\r\nAuthorization: Bearer a.b-c\r\n") && request.ends_with("(without a certificate)"),
        "{request}"
    );
}

/// Every way of not answering, what is said about it, and that `onApiError` decides.
#[test]
fn no_answer_is_an_error_that_says_why_unless_it_is_to_be_ignored() {
    let flood = Reply::Flood(vec![b'x'; 1 << 16]);
    let huge = Reply::Bytes([b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b' '; 3 << 20]].concat());
    let (again, none) = ("kubelet will give it up or try again", json!({}));
    for (reply, expected) in [
        (Reply::status("404 Not Found", "pods \"web-0\" not found"), "it answered 404 \"pods \\\"web-0\\\" not found\": there is no such pod (any more), or it is another cluster's API server".to_owned()),
        (Reply::status("403 Forbidden", "no"), "it answered 403 \"no\": its user must be allowed to get pods (install/labels-rbac.yaml)".to_owned()),
        (Reply::status("401 Unauthorized", "Unauthorized"), "it answered 401 \"Unauthorized\": the credentials in the kubeconfig are not (or no longer) valid".to_owned()),
        (Reply::Bytes(b"HTTP/1.1 503 x\r\n\r\n\x1b[2J".to_vec()), "it answered 503 \"\": is it an API server, and well?".to_owned()),
        (Reply::pod("other", &none, &none), format!("it has another pod of this name by now: UID \"other\", and the runtime makes {UID}; {again}")),
        (Reply::json("200 OK", &json!({ "metadata": {} })), "its answer is no pod: missing field `uid` at line 1 column 14".to_owned()),
        (huge, "talk to it: its answer has more than 2097152 bytes".to_owned()),
        (flood, "talk to it: its answer is not HTTP: invalid HTTP version".to_owned()),
        (Reply::Bytes(Vec::new()), "talk to it: its answer ends after 0 bytes, too early".to_owned()),
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
    // Takes the connection, and no TLS comes of it.
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
    // The other's authority did not sign this one's certificate.
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
    // As the administrator says.
    let skip = json!({ "insecure-skip-tls-verify": true, "tls-server-name": "kubernetes" });
    let (_, details) = refused(&add(&server.kubeconfig(&skip, &none).unwrap(), ""));
    assert!(details.starts_with("API server's pod label rate"), "{details}");
    // No TLS at all, and nobody there.
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
        details.ends_with("for pod default/web-0: connect: 127.0.0.1: Connection refused (os error 111)"),
        "{details}"
    );
    let (code, details) = refused(&add(Path::new("/nowhere/kubeconfig"), ""));
    assert_eq!(
        (code, details.as_str()),
        (CONFIG, "kubeconfig /nowhere/kubeconfig: read /nowhere/kubeconfig: No such file or directory (os error 2)")
    );
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

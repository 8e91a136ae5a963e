use std::fs::{self, File};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::{alone, call, podshaper, says};
use crate::sandbox::{PINS, Sandbox};

const ASIDE: &str = "/sys/fs/bpf/aside";

/// Starts a command while the lock that it needs is held, and releases the lock after `meanwhile`. The command has
/// read the state before that.
fn with_its_lock_held(arguments: &[&str], meanwhile: impl FnOnce()) -> Output {
    let lock = File::open("/sys/fs/bpf/podshaper").unwrap();
    lock.lock().unwrap();
    let command: Child = podshaper(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Reading takes milliseconds.
    std::thread::sleep(Duration::from_secs(1));
    meanwhile();
    drop(lock);
    command.wait_with_output().unwrap()
}

/// Replaces the attachment of a pod by another's, as the ADD of a new sandbox would.
fn replace(pod: &Sandbox, by: &Sandbox) {
    let [old, new] = [pod, by].map(Sandbox::pod_directory);
    fs::rename(&old, ASIDE).unwrap();
    fs::rename(new, old).unwrap();
}

fn remove_aside() {
    fs::remove_dir_all(ASIDE).unwrap();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn what_replaces_an_attachment_meanwhile_is_not_detached() {
    alone(|| {
        let (pod, successor) = (Sandbox::new(), Sandbox::new());
        pod.call("ADD");
        successor.call("ADD");
        let output = with_its_lock_held(&["detach", &pod.uid], || replace(&pod, &successor));
        assert_eq!(pod.owner("eth0")["containerId"], successor.container_id.as_str());
        // The limit is still in force, too.
        assert_eq!(pod.rates("eth0")[0], crate::sandbox::RATE);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && text.contains("has just been replaced"), "{text}");
        remove_aside();
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn what_replaces_an_attachment_meanwhile_is_not_collected() {
    alone(|| {
        let (pod, successor) = (Sandbox::new(), Sandbox::new());
        pod.call("ADD");
        successor.call("ADD");
        pod.cgroup.remove().unwrap();
        let output = with_its_lock_held(&["gc", "-o", "json"], || replace(&pod, &successor));
        assert_eq!(pod.owner("eth0")["containerId"], successor.container_id.as_str());
        let removed: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(output.status.success() && removed.as_array().unwrap().is_empty(), "{removed}");
        remove_aside();
    });
}

/// A directory among the pins cannot be removed like a pin.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn gc_goes_on_after_an_error_and_tells_it() {
    alone(|| {
        let mut pods: Vec<Sandbox> = (0..3).map(|_| Sandbox::new()).collect();
        pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        for pod in &pods {
            pod.call("ADD");
            pod.cgroup.remove().unwrap();
        }
        let in_the_way = pods[0].pod_directory().join("eth0/in-the-way");
        fs::create_dir(&in_the_way).unwrap();
        let (code, stdout, stderr) = call(&["gc"]);
        assert!(
            code == 1 && stderr.contains(&format!("remove the pins in {PINS}/{}", pods[0].uid)),
            "{stdout}{stderr}"
        );
        for pod in &pods[1..] {
            assert!(stdout.contains(&pod.uid) && !pod.pod_directory().exists(), "{stdout}{stderr}");
        }
        assert!(!stdout.contains(&pods[0].uid), "{stdout}");
        fs::remove_dir(in_the_way).unwrap();
        says(&["gc"]);
        assert!(!pods[0].pod_directory().exists());
    });
}

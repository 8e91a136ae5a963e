//! A throw-away node: a network namespace with a bridge, made by the real bridge and host-local plugins.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::cni::Chain;
use super::netns::Netns;
use super::{Context, PLUGIN_DIR, Result, unique};

// These addresses are not visible outside: the node is a namespace without a link to the machine's.
const SUBNET_V4: &str = "10.213.0.0/24";
const GATEWAY_V4: [u8; 4] = [10, 213, 0, 1];
const SUBNET_V6: &str = "fd00:213::/64";
const GATEWAY_V6: [u16; 8] = [0xfd00, 0x213, 0, 0, 0, 0, 0, 1];

/// The node's end of its pods' network.
pub const BRIDGE: &str = "cni0";

/// A node. Its bridge and the pods' veths are removed with its namespace, its allocated addresses with its directory.
pub struct Host {
    pub netns: Netns,
    state: TempDir,
}

impl Host {
    pub fn new() -> Result<Self> {
        let state = tempfile::Builder::new().prefix("podshaper-node-").tempdir().context("make a directory")?;
        Ok(Self { netns: Netns::new(&unique("node"))?, state })
    }

    /// The destination of traffic for the node: the bridge's own address.
    pub fn gateway_v4(&self) -> IpAddr {
        GATEWAY_V4.into()
    }

    pub fn gateway_v6(&self) -> IpAddr {
        GATEWAY_V6.into()
    }

    /// The directory for the state of this node's plugins.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// The network of every measurement: bridge and host-local, both address families, the gateway on the bridge.
    pub fn bridge_chain(&self) -> Result<Chain> {
        let conflist = json!({
            "cniVersion": "1.0.0",
            "name": "podshaper-test",
            "plugins": [{
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": self.state(),
                    "ranges": [[{ "subnet": SUBNET_V4 }], [{ "subnet": SUBNET_V6 }]],
                },
            }],
        });
        Chain::new(&conflist, &[PLUGIN_DIR])
    }

    /// A command that runs on the node, outside of any pod.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.netns.command(program)
    }
}

/// The bandwidth plugin of the containernetworking project, as an entry of a conflist.
pub fn bandwidth_plugin() -> Value {
    json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } })
}

/// podshaper, as an entry of a conflist.
pub fn podshaper_plugin() -> Value {
    json!({ "type": "podshaper", "capabilities": { "bandwidth": true, "cgroupPath": true } })
}

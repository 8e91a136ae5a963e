//! The API server's name: from /etc/hosts, else from the name servers of /etc/resolv.conf.
//!
//! Not by getaddrinfo: in a static binary it loads the node's NSS libraries, which belong to another glibc and may crash it, it
//! cannot be given up after a time, and it is 175 KB. What this leaves out: nsswitch.conf, search domains, answers over TCP. A
//! wrong address costs a handshake that fails: the certificate says who the server is.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom, SystemRandom};

use crate::error::{Code, Error, Result};

/// How long a name server is waited for before the next is asked; all of them are, twice.
const PATIENCE: Duration = Duration::from_millis(400);
/// The resolver of libc takes as many.
const MAX_SERVERS: usize = 3;
const A: u16 = 1;
const AAAA: u16 = 28;

/// Every address of the name, IPv4 first.
pub(super) fn addresses(name: &str, deadline: Instant) -> Result<Vec<IpAddr>> {
    let hosts = in_hosts(&fs::read_to_string("/etc/hosts").unwrap_or_default(), name);
    if !hosts.is_empty() {
        return Ok(hosts);
    }
    let servers = name_servers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    ask(&servers, name, deadline)
}

fn in_hosts(hosts: &str, name: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
    };
    hosts.lines().filter_map(address).collect()
}

fn name_servers(resolv: &str) -> Vec<SocketAddr> {
    let server = |line: &str| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok();
    let mut servers: Vec<_> = resolv.lines().filter_map(server).map(|address| SocketAddr::new(address, 53)).collect();
    servers.truncate(MAX_SERVERS);
    if servers.is_empty() {
        servers.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53));
    }
    servers
}

fn ask(servers: &[SocketAddr], name: &str, deadline: Instant) -> Result<Vec<IpAddr>> {
    let mut failed = Vec::new();
    for server in servers.iter().chain(servers) {
        let until = deadline.min(Instant::now() + PATIENCE);
        match ask_one(*server, name, until) {
            Ok(addresses) if !addresses.is_empty() => return Ok(addresses),
            Ok(_) => failed.push(format!("{server}: no such name")),
            Err(cause) => failed.push(format!("{server}: {cause}")),
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    failed.dedup();
    let text = format!("find the address of {name}: it is not in /etc/hosts; {}", failed.join("; "));
    Err(Error::new(Code::ApiServer, text))
}

/// Asks for both kinds of address at once. An answer of one kind is enough when the other does not come.
fn ask_one(server: SocketAddr, name: &str, until: Instant) -> io::Result<Vec<IpAddr>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Connected, so that only this server's packets come in, to a port the kernel picks at random.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    let mut ids = [0; 4];
    SystemRandom::new().fill(&mut ids).map_err(|_| io::Error::other("no random numbers"))?;
    let mut open = vec![([ids[0], ids[1]], A), ([ids[2], ids[3]], AAAA)];
    for (id, kind) in &open {
        socket.send(&query(*id, name, *kind)?)?;
    }
    let (mut found, mut buffer) = (Vec::new(), [0; 1500]);
    while !open.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut buffer) {
            Ok(read) => {
                let Some((id, addresses)) = understand(&buffer[..read]) else { continue };
                let before = open.len();
                open.retain(|(asked, _)| *asked != id);
                if open.len() < before {
                    found.extend(addresses);
                }
            }
            Err(cause)
                if matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) && !found.is_empty() =>
            {
                break;
            }
            Err(cause) => return Err(cause),
        }
    }
    found.sort();
    if found.is_empty() && !open.is_empty() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(found) }
}

/// RFC 1035, 4.1: a header that wishes for recursion, and one question.
fn query(id: [u8; 2], name: &str, kind: u16) -> io::Result<Vec<u8>> {
    let mut query = vec![id[0], id[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..=63).contains(length));
        query.push(length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a name"))?);
        query.extend_from_slice(label.as_bytes());
    }
    query.push(0);
    query.extend([kind.to_be_bytes(), [0, 1]].concat());
    Ok(query)
}

/// The id and the addresses of an answer; None if it is none.
fn understand(packet: &[u8]) -> Option<([u8; 2], Vec<IpAddr>)> {
    let number = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let id = [*packet.first()?, *packet.get(1)?];
    // A response, to one question.
    if packet.get(2)? & 0x80 == 0 || number(4)? != 1 {
        return None;
    }
    let mut at = behind_name(packet, 12)? + 4;
    let mut addresses = Vec::new();
    for _ in 0..number(6)? {
        let start = behind_name(packet, at)?;
        let (kind, length) = (number(start)?, usize::from(number(start + 8)?));
        let data = packet.get(start + 10..start + 10 + length)?;
        match kind {
            A => addresses.push(<[u8; 4]>::try_from(data).ok()?.into()),
            AAAA => addresses.push(<[u8; 16]>::try_from(data).ok()?.into()),
            // Other records lead from the name asked for to the one with the address.
            _ => {}
        }
        at = start + 10 + length;
    }
    Some((id, addresses))
}

/// Names end with an empty label, or with two bytes that point to where the rest of the name is.
fn behind_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *packet.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hosts_and_name_servers_are_read_as_libc_reads_them() {
        let hosts = "127.0.0.1 localhost\n# 10.0.0.9 api\n10.0.0.1\tother API.example # api\nfd00::1 api.example\nx api.example\n";
        assert_eq!(in_hosts(hosts, "api.example"), ["10.0.0.1", "fd00::1"].map(|text| text.parse::<IpAddr>().unwrap()));
        assert!(in_hosts(hosts, "api").is_empty());
        let servers = name_servers("search a\nnameserver 10.0.0.2\nnameserver\tfd00::2\n;nameserver 1.1.1.1\n");
        assert_eq!(servers, ["10.0.0.2:53", "[fd00::2]:53"].map(|text| text.parse().unwrap()));
        assert_eq!(name_servers(""), ["127.0.0.1:53".parse().unwrap()]);
    }

    /// A name server that answers each question with an alias and an address of the kind asked for.
    fn serve(socket: &UdpSocket) {
        let mut buffer = [0; 512];
        while let Ok((read, from)) = socket.recv_from(&mut buffer) {
            let question = &buffer[..read];
            let name = behind_name(question, 12).unwrap();
            let address: &[u8] = if question[name + 1] == 1 {
                &[10, 0, 0, 1]
            } else {
                &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
            };
            let mut packet = question.to_vec();
            packet[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 2]);
            packet.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 3, 1, b'x', 0]);
            packet.extend([0xc0, 12, 0, question[name + 1], 0, 1, 0, 0, 0, 9, 0, u8::try_from(address.len()).unwrap()]);
            packet.extend(address);
            socket.send_to(&packet, from).unwrap();
        }
    }

    #[test]
    fn a_name_server_is_asked_for_both_kinds_of_address() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (address, other) = (server.local_addr().unwrap(), silent.local_addr().unwrap());
        std::thread::spawn(move || serve(&server));
        let deadline = Instant::now() + Duration::from_secs(2);
        let found = ask(&[other, address], "api.example.org", deadline).unwrap();
        assert_eq!(found, ["10.0.0.1", "fd00::1"].map(|text| text.parse::<IpAddr>().unwrap()));

        let start = Instant::now();
        let error = ask(&[other], "api.example.org", start + Duration::from_millis(200)).unwrap_err().to_string();
        assert!(
            error.starts_with("find the address of api.example.org: it is not in /etc/hosts; 127.0.0.1:"),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_millis(600), "{:?}", start.elapsed());
        assert!(ask(&[address], "a..b", deadline).is_err());
    }

    proptest! {
        #[test]
        fn no_packet_makes_the_parser_panic(packet in prop::collection::vec(any::<u8>(), 0..64), start in any::<bool>()) {
            let mut packet = packet;
            if start && packet.len() > 12 {
                packet[2..8].copy_from_slice(&[0x80, 0, 0, 1, 0, 3]);
            }
            let _ = understand(&packet);
        }
    }
}

//! Guests on user-mode networks: what they reach, and who reaches them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use guest_tests::artefacts::cloud_kernel;
use guest_tests::{Ospite, Session};

/// Configures what DHCP offers, and prints it.
const LEASED: &str = "#!/bin/sh\n[ $1 = bound ] || exit 0\nip addr add $ip/$mask dev $interface\n\
    ip route add default via $router\necho nameserver $dns > /etc/resolv.conf\necho search $domain >> /etc/resolv.conf\n\
    echo lease $ip/$mask via $router dns $dns host $hostname\n";

/// A guest at its shell, with an address.
struct Guest {
    session: Session,
    lease: String,
}

impl Guest {
    fn start(name: &str, home: &Path, options: &[&str]) -> Guest {
        let mut ospite =
            Ospite::run().home(home).kernel(&cloud_kernel()).memory("256M").option("--name", name);
        for option in options {
            ospite = ospite.arg(option);
        }
        let mut session = ospite.append("quiet ospite.modules=virtio ospite.shell").start();
        session.wait_for("ospite-init: ready", 120);
        session.wait_for("/ # ", 60);
        let mut guest = Guest { session, lease: String::new() };
        guest.run("stty -echo");
        guest.run(&format!("printf '{}' > /tmp/leased; chmod +x /tmp/leased", LEASED.replace('\n', "\\n")));
        guest.lease =
            guest.run("ip link set lo up; ip link set eth0 up; udhcpc -i eth0 -q -n -s /tmp/leased 2>&1");
        guest
    }

    /// Runs a command; what it prints.
    fn run(&mut self, command: &str) -> String {
        self.session.type_line(&format!("{command}; echo do''ne $?"));
        let printed = self.session.wait_for("done ", 60);
        printed + &self.session.wait_for("\n", 10)
    }

    /// The first line that a TCP server says to "hello", or nothing.
    fn ask(&mut self, host: &str, port: u16) -> String {
        self.run(&format!("echo hello | nc -w 4 {host} {port} 2>&1"))
    }
}

fn home() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A server that answers a line with itself in other words.
fn server(address: impl Into<IpAddr>) -> SocketAddr {
    let listener = TcpListener::bind((address.into(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut line = [0; 64];
            let count = client.read(&mut line).unwrap_or(0);
            let _ = client.write_all(&[b"you said ", &line[..count]].concat());
        }
    });
    address
}

/// A port that nobody has at the moment.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// An address of the host besides loopback, if it has one.
fn host_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.250:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_guest_gets_an_address_and_reaches_what_it_may() {
    let server = server([127, 0, 0, 1]);
    let home = home();
    let mut guest = Guest::start("alone", home.path(), &["--net-allow", "127.0.0.1"]);
    assert!(
        guest.lease.contains("lease 10.200.0.2/16 via 10.200.0.1 dns 10.200.0.1 host alone"),
        "{}",
        guest.lease
    );
    assert!(guest.run("ping -c 2 10.200.0.1").contains(" 0% packet loss"));
    let name = guest.run("nslookup alone.internal");
    assert!(name.contains("Address: 10.200.0.2"), "{name}");
    let answer = guest.ask("10.200.0.1", server.port());
    assert!(answer.contains("you said hello"), "{answer}");
    let mut v6 = String::new();
    for _ in 0..20 {
        v6 = guest.run("sleep 0.5; ip -6 addr show dev eth0 scope global");
        if v6.contains("inet6 fd") && !v6.contains("tentative") {
            break;
        }
    }
    assert!(v6.contains("inet6 fd"), "{v6}");
    assert!(guest.run("ping -c 2 gateway.internal").contains(" 0% packet loss"));
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn without_leave_a_guest_reaches_neither_the_host_nor_its_neighbours() {
    let loopback = server([127, 0, 0, 1]);
    let home = home();
    let mut guest = Guest::start("alone", home.path(), &[]);
    assert!(!guest.ask("10.200.0.1", loopback.port()).contains("you said"));
    if let Some(address) = host_address() {
        let server = server(address);
        let answer = guest.ask(&address.to_string(), server.port());
        assert!(!answer.contains("you said"), "{answer}");
    }
    for near in ["169.254.169.254", "10.0.0.1", "192.168.0.1", "0.0.0.0"] {
        let answer = guest.ask(near, 80);
        assert!(answer.contains("done 1"), "{near}: {answer}");
    }
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_published_port_leads_to_the_guest() {
    let (home, port) = (home(), free_port());
    let publish = format!("127.0.0.1:{port}:80");
    let mut guest = Guest::start("web", home.path(), &["-p", &publish]);
    guest.run(
        "mkdir /tmp/www; head -c 3000000 /dev/zero | tr '\\0' x > /tmp/www/big; httpd -p 80 -h /tmp/www",
    );
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    client.write_all(b"GET /big HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    assert!(answer.starts_with(b"HTTP/1.") && answer[body..].iter().all(|&byte| byte == b'x'));
    assert_eq!(answer.len() - body, 3_000_000);
    let second = Ospite::run().home(home.path()).kernel(&cloud_kernel()).option("-p", &publish).refused();
    assert!(second.text.contains("is taken"), "{}", second.text);
}

#[test]
#[ignore = "boots guests: make guest-test"]
fn guests_of_one_network_meet_by_name_and_nobody_else_meets_them() {
    let home = home();
    let mut web = Guest::start("web", home.path(), &["--network", "office"]);
    web.run("(nc -ll -p 7 -e cat &)");
    let mut ftp = Guest::start("ftp", home.path(), &["--network", "office"]);
    let answer = ftp.ask("web", 7);
    assert!(answer.contains("hello"), "{answer}");
    let address =
        web.lease.rsplit("\nlease ").next().and_then(|lease| lease.split('/').next()).unwrap_or_default();
    // Another network has the same addresses, and somebody else, or nobody, at them.
    let mut other = Guest::start("other", home.path(), &["--network", "home"]);
    let answer = other.ask(address, 7);
    assert!(!answer.contains("hello"), "{answer}");
    // Who takes another's address is not heard.
    let forge =
        format!("ip addr flush dev eth0; ip addr add {address}/16 dev eth0; ping -c 2 -W 1 10.200.0.1");
    let answer = ftp.run(&forge);
    assert!(answer.contains("100% packet loss"), "{answer}");
    let answer = web.run("ping -c 2 10.200.0.1");
    assert!(answer.contains(" 0% packet loss"), "{answer}");
}

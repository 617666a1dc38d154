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

fn ospite(name: &str, home: &Path, options: &[&str]) -> Ospite {
    let ospite = Ospite::run().home(home).kernel(&cloud_kernel()).memory("256M").option("--name", name);
    options.iter().fold(ospite, |ospite, option| ospite.arg(option))
}

impl Guest {
    fn start(name: &str, home: &Path, options: &[&str]) -> Guest {
        let mut guest = Guest::boot(&ospite(name, home, options));
        guest.lease();
        guest
    }

    /// A guest whose network is down.
    fn boot(ospite: &Ospite) -> Guest {
        let mut session = ospite.clone().append("quiet ospite.modules=virtio ospite.shell").start();
        session.wait_for("ospite-init: ready", 120);
        session.wait_for("/ # ", 60);
        let mut guest = Guest { session, lease: String::new() };
        guest.run("stty -echo");
        guest
    }

    fn lease(&mut self) {
        let guest = self;
        guest.run(&format!("printf '{}' > /tmp/leased; chmod +x /tmp/leased", LEASED.replace('\n', "\\n")));
        guest.lease =
            guest.run("ip link set lo up; ip link set eth0 up; udhcpc -i eth0 -q -n -s /tmp/leased 2>&1");
    }

    /// Waits until it has an IPv6 address.
    fn wait_for_v6(&mut self) {
        let mut v6 = String::new();
        for _ in 0..20 {
            v6 = self.run("sleep 0.5; ip -6 addr show dev eth0 scope global");
            if v6.contains("inet6 fd") && !v6.contains("tentative") {
                return;
            }
        }
        panic!("no address: {v6}");
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
    guest.wait_for_v6();
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

/// A TFTP server with one short file, for one question (RFC 1350).
fn tftp_server() -> SocketAddr {
    let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut question = [0; 600];
        let (length, from) = socket.recv_from(&mut question).unwrap();
        assert_eq!(question[..2], [0, 1], "{:?}", &question[..length]);
        socket.send_to(b"\0\x03\0\x01out and back", from).unwrap();
    });
    address
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn datagrams_pings_and_ipv6_leave_and_published_datagrams_come() {
    let (udp, tcp6) = (tftp_server(), server(std::net::Ipv6Addr::LOCALHOST));
    let (home, port) = (home(), free_port());
    let own = host_address().map(|address| address.to_string());
    let publish = format!("127.0.0.1:{port}:4000/udp");
    let mut options = vec!["--net-allow", "127.0.0.1", "--net-allow", "::1", "-p", &publish];
    options.extend(own.iter().flat_map(|own| ["--net-allow", own]));
    let mut guest = Guest::start("alone", home.path(), &options);
    let file = guest.run(&format!("tftp -g -r f -l /tmp/f 10.200.0.1 {}; cat /tmp/f", udp.port()));
    assert!(file.contains("out and back"), "{file}");
    // The host lets root ping, and others where it is set up for it.
    if let Some(own) = own.filter(|_| rustix::process::geteuid().is_root()) {
        let answer = guest.run(&format!("ping -c 2 {own}"));
        assert!(answer.contains(" 0% packet loss"), "{answer}");
    }
    guest.wait_for_v6();
    let gateway = guest.run("nslookup -type=aaaa gateway.internal | grep -o 'fd[0-9a-f:]*' | tail -n 1");
    let gateway = gateway.split_whitespace().find(|word| word.starts_with("fd")).unwrap_or_default();
    let answer = guest.ask(gateway, tcp6.port());
    assert!(answer.contains("you said hello"), "{gateway}: {answer}");
    // Nobody listens: the kernel counts what comes whole to a port without a socket.
    let client = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
    for _ in 0..5 {
        client.send_to(b"come in", ("127.0.0.1", port)).unwrap();
    }
    let mut counted = String::new();
    for _ in 0..20 {
        counted = guest.run("sleep 0.2; awk '/^Udp:/ { print \"no port\", $3 }' /proc/net/snmp");
        if counted.contains("no port 5") {
            return;
        }
    }
    panic!("{counted}");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn nobody_needs_to_be_root() {
    if !rustix::process::geteuid().is_root() {
        return; // all others of these tests are this one
    }
    const NOBODY: u32 = 65534;
    let server = server([127, 0, 0, 1]);
    let home = home();
    std::os::unix::fs::chown(home.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:80");
    let options = ["--network", "office", "--net-allow", "127.0.0.1", "-p", &publish];
    let mut guest = Guest::boot(&ospite("alone", home.path(), &options).as_user(NOBODY));
    guest.lease();
    let answer = guest.ask("10.200.0.1", server.port());
    assert!(answer.contains("you said hello"), "{answer}");
    guest.run("mkdir /tmp/www; echo welcome > /tmp/www/hi; httpd -p 80 -h /tmp/www");
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    client.write_all(b"GET /hi HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    client.read_to_string(&mut page).unwrap();
    assert!(page.ends_with("welcome\n"), "{page}");
    let low = ospite("low", home.path(), &["-p", "127.0.0.1:1:80"]).as_user(NOBODY).refused();
    assert!(low.text.contains("below 1024 are root's") || low.text.contains("is taken"), "{}", low.text);
    let tap = ospite("tap", home.path(), &["--network", "tap=ospite-none"]).as_user(NOBODY).refused();
    assert!(
        tap.text.contains("ip tuntap add dev ospite-none mode tap user 65534")
            || tap.text.contains("/dev/net/tun"),
        "{}",
        tap.text
    );
}

/// A bridge of the host with an address, removed at the end.
struct Bridge(String);

impl Bridge {
    fn new(address: &str) -> Option<Bridge> {
        let name = format!("ospb{}", std::process::id() % 100_000);
        let ip = |args: &str| {
            let status = std::process::Command::new("ip").args(args.split(' ')).status();
            status.is_ok_and(|status| status.success())
        };
        if !rustix::process::geteuid().is_root() || !ip(&format!("link add {name} type bridge")) {
            return None; // there is nothing to be had by a tap interface here
        }
        let bridge = Bridge(name);
        assert!(
            ip(&format!("address add {address} dev {}", bridge.0))
                && ip(&format!("link set {} up", bridge.0))
        );
        Some(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["link", "del", &self.0]).status();
    }
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_tap_interface_leads_to_the_hosts_bridge() {
    let Some(bridge) = Bridge::new("198.18.77.1/30") else { return };
    let server = server([198, 18, 77, 1]);
    let home = home();
    let tap = format!("t{}", bridge.0);
    let network = format!("tap={tap},bridge={}", bridge.0);
    let mut guest = Guest::boot(&ospite("alone", home.path(), &["--network", &network]));
    guest.run("ip link set eth0 up; ip addr add 198.18.77.2/30 dev eth0");
    let answer = guest.run("ping -c 2 198.18.77.1");
    assert!(answer.contains(" 0% packet loss"), "{answer}");
    let answer = guest.ask("198.18.77.1", server.port());
    assert!(answer.contains("you said hello"), "{answer}");
    // Packets longer than the MTU, both ways.
    guest.run(
        "mkdir /tmp/www; head -c 3000000 /dev/zero | tr '\\0' x > /tmp/www/big; httpd -p 80 -h /tmp/www",
    );
    let mut client = TcpStream::connect(("198.18.77.2", 80)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    client.write_all(b"GET /big HTTP/1.0\r\n\r\n").unwrap();
    let mut page = Vec::new();
    client.read_to_end(&mut page).unwrap();
    assert!(page.len() > 3_000_000 && page.ends_with(b"xxxx"));

    let refused = |network: &str| ospite("b", home.path(), &["--network", network]).refused().text;
    assert!(refused(&network).contains("is in use, by another VM perhaps"));
    let text = refused("tap=ospite-t9,bridge=ospite-no");
    assert!(text.contains("ip link add ospite-no type bridge && ip link set ospite-no up"), "{text}");
    assert!(refused("tap=lo").contains("is not a tap interface"));
    let publish = ospite("b", home.path(), &["--network", &network, "-p", "8080:80"]).refused();
    assert!(publish.code == 2 && publish.text.contains("--network user"), "{}", publish.text);
    drop(guest);
    let gone = || !Path::new("/sys/class/net").join(&tap).exists();
    assert!(
        (0..100).any(|_| gone() || {
            thread::sleep(Duration::from_millis(50));
            false
        }),
        "it goes with the VM"
    );
}

//! TCP, out and in.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;

use super::*;

/// A server of the host that says everything back until it is told that there is no more.
fn echo_server(address: impl Into<IpAddr>) -> SocketAddr {
    let listener = TcpListener::bind((address.into(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || std::io::copy(&mut &client, &mut &client));
        }
    });
    address
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
}

/// Sends `data` on a connection, ends it, and hears all that the other end says until it ends, too.
fn exchange(world: &mut World, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
    let (mut sent, mut closed, mut heard) = (0, false, Vec::new());
    world.until("the end of an exchange", |guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        if sent == data.len() && !closed && socket.may_send() {
            closed = true;
            socket.close();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), heard.extend_from_slice(bytes))).unwrap();
        }
        (closed && !socket.may_recv() && socket.state() != State::SynSent).then_some(())
    });
    heard
}

#[test]
fn what_goes_out_comes_back_whole() {
    let server = echo_server([127, 0, 0, 1]);
    let mut world = World::alone(&[]);
    let data = pattern(1_000_000);
    let handle = world.guest().connect((GATEWAY, server.port()), 100_000);
    assert!(exchange(&mut world, handle, &data) == data);
    let direct = world.guest().connect(server, 100_000);
    assert!(exchange(&mut world, direct, &data[..10]) == data[..10], "an allowed address by itself");
}

#[test]
fn the_same_over_ipv6() {
    let server = echo_server(Ipv6Addr::LOCALHOST);
    let mut world = World::alone(&[]);
    world.with_v6();
    let data = pattern(300_000);
    let gateway = world.gateway_v6();
    let handle = world.guest().connect((gateway, server.port()), 100_000);
    assert!(exchange(&mut world, handle, &data) == data);
}

/// What made guests with one packet on its way as slow as 60 Mbit/s: an answer was put off by 10 ms.
#[test]
fn a_lone_packet_is_answered_at_once() {
    let server = echo_server([127, 0, 0, 1]);
    let mut world = World::alone(&[]);
    let handle = world.guest().connect((GATEWAY, server.port()), 1000);
    world.until("a connection", |guest| (guest.state(handle) == State::Established).then_some(()));
    world.turns(3);
    for _ in 0..5 {
        world.turns(3);
        let _ = world.guest().tcp(handle).recv(|bytes| (bytes.len(), ()));
        while world.guest().next().is_some() {}
        assert_eq!(world.guest().tcp(handle).send_slice(&[7; 1000]), Ok(1000));
        world.guest().poll();
        // Nobody has a second turn, so that what comes is the answer to this packet.
        world.network.turn(&mut world.buffer, Duration::ZERO).unwrap();
        world.guest().poll();
        assert_eq!(world.guest().tcp(handle).send_queue(), 0, "it is acknowledged");
    }
}

#[test]
fn who_has_said_all_still_hears() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // It answers only after the end of the question.
    let server = thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut question = Vec::new();
        client.read_to_end(&mut question).unwrap();
        client.write_all(&question.repeat(1000)).unwrap();
    });
    let mut world = World::alone(&[]);
    let handle = world.guest().connect((GATEWAY, port), 4096);
    assert_eq!(exchange(&mut world, handle, b"question").len(), 8000);
    server.join().unwrap();
}

#[test]
fn a_reset_passes_both_ways() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut world = World::alone(&[]);
    let handle = world.guest().connect((GATEWAY, port), 4096);
    world.turns(5);
    let (mut client, _) = listener.accept().unwrap();
    world.until("a connection", |guest| (guest.state(handle) == State::Established).then_some(()));
    world.guest().tcp(handle).abort();
    world.turns(20);
    let error = client.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let handle = world.guest().connect((GATEWAY, port), 4096);
    world.turns(5);
    let (client, _) = listener.accept().unwrap();
    world.until("a connection", |guest| (guest.state(handle) == State::Established).then_some(()));
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    world.until("a reset", |guest| (guest.state(handle) == State::Closed).then_some(()));
}

#[test]
fn a_closed_port_looks_closed_and_not_silent() {
    let mut world = World::alone(&[]);
    let port = free_port();
    let start = Instant::now();
    let handle = world.guest().connect((GATEWAY, port), 4096);
    world.until("a refusal", |guest| (guest.state(handle) == State::Closed).then_some(()));
    assert!(start.elapsed() < Duration::from_secs(10), "by a reset, not by patience");
}

#[test]
fn a_published_port_leads_in_and_closing_leads_out() {
    let port = free_port();
    let mut world = World::alone(&[&format!("127.0.0.1:{port}:80")]);
    let handle = world.guest().listen(80, 50_000);
    let data = pattern(200_000);
    let sent = data.clone();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(&sent).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let mut heard = Vec::new();
    world.until("all of it", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), heard.extend_from_slice(bytes))).unwrap();
        }
        (heard.len() == data.len()).then_some(())
    });
    assert!(heard == data);
    let socket = world.guest().tcp(handle);
    assert_eq!(socket.remote_endpoint().unwrap().addr, GATEWAY.into(), "a loopback client is the gateway");
    socket.send_slice(b"thanks").unwrap();
    socket.close();
    world.until("the end", |guest| (!guest.tcp(handle).is_open()).then_some(()));
    assert_eq!(client.join().unwrap(), "thanks");
}

#[test]
fn a_client_of_a_port_that_the_guest_does_not_have_is_reset() {
    let port = free_port();
    let mut world = World::alone(&[&format!("127.0.0.1:{port}:80")]);
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let start = Instant::now();
    loop {
        world.turns(3);
        match client.read(&mut [0; 1]) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(_) => assert!(start.elapsed() < PATIENCE),
            Ok(_) => panic!("it was told that the connection ended well"),
        }
    }
}

#[test]
fn two_thousand_connections_are_served_and_then_nothing_of_them_is_left() {
    let server = echo_server([127, 0, 0, 1]);
    let mut world = World::alone(&[]);
    for round in 0..10 {
        let handles: Vec<_> =
            (0..200).map(|_| world.guest().connect((GATEWAY, server.port()), 256)).collect();
        for handle in handles {
            let word = format!("word {round}");
            assert_eq!(exchange(&mut world, handle, word.as_bytes()), word.as_bytes());
            world.guest().tcp(handle).abort();
        }
    }
    let start = Instant::now();
    while world.network.tcp.len() > 0 {
        assert!(start.elapsed() < PATIENCE, "{} are left", world.network.tcp.len());
        world.turn();
    }
}

#[test]
fn who_does_not_read_holds_up_nobody_but_himself() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // It writes without end until the other end closes.
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        while client.write_all(&[7; 65536]).is_ok() {}
    });
    let server = echo_server([127, 0, 0, 1]);
    let mut world = World::alone(&[]);
    world.take_offloads();
    let stuck = world.guest().connect((GATEWAY, port), 100_000);
    world.until("a full window", |guest| (guest.tcp(stuck).recv_queue() == 100_000).then_some(()));
    let handle = world.guest().connect((GATEWAY, server.port()), 4096);
    let data = pattern(50_000);
    assert!(exchange(&mut world, handle, &data) == data);
    // And it gets what it left, once it reads.
    let mut read = 0;
    world.until("a megabyte", |guest| {
        let socket = guest.tcp(stuck);
        while socket.can_recv() {
            read += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        (read > 1_000_000).then_some(())
    });
}

//! The VM's end of its control socket: see [`protocol`](crate::vms::protocol).

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

use super::hub::{Hub, Reader};
use crate::vms::protocol::{self, Answer, Request, Status};
use crate::vms::socket;

/// More at once are turned away.
const CONNECTIONS: usize = 64;
/// How long a connection may be silent before it asks, and a client may take to read an answer.
const SILENCE: Duration = Duration::from_secs(30);

type Ask = Box<dyn Fn(vmm::Request) -> Result<vmm::Status, vmm::Gone> + Send + Sync>;
type Agent = Box<dyn Fn(UnixStream) -> io::Result<()> + Send + Sync>;
type Keyboard = Box<dyn Fn(&[u8]) + Send + Sync>;

/// What the server has to offer.
pub struct Services {
    /// The engine that was chosen.
    pub engine: String,
    /// Asks the VM.
    pub ask: Ask,
    /// Makes a connection one to [`vmm::guest_ports`].
    pub agent: Agent,
    /// What the guest prints.
    pub hub: Hub,
    /// Types on the guest's keyboard, waiting for a guest that does not read.
    pub keyboard: Keyboard,
}

/// Serves until the process ends.
pub fn start(listener: UnixListener, services: Arc<Services>) -> io::Result<()> {
    thread::Builder::new().name("control".into()).spawn(move || accept(&listener, &services)).map(drop)
}

fn accept(listener: &UnixListener, services: &Arc<Services>) {
    let count = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => admit(stream, services, &count),
            // Out of descriptors, most likely: they come back.
            Err(error) => {
                log::warn!("the control socket: {error}");
                thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn admit(stream: UnixStream, services: &Arc<Services>, count: &Arc<AtomicUsize>) {
    let _ = stream.set_read_timeout(Some(SILENCE)).and_then(|()| stream.set_write_timeout(Some(SILENCE)));
    if !socket::is_ours(&stream) {
        return refuse(stream, "this VM belongs to another user");
    }
    if count.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
        count.fetch_sub(1, Ordering::SeqCst);
        return refuse(stream, "too many connections");
    }
    let (services, slot) = (services.clone(), Slot(count.clone()));
    let body = move || {
        let _slot = slot;
        if let Err(error) = serve(stream, &services) {
            log::debug!("a connection to the control socket: {error}");
        }
    };
    let _ = thread::Builder::new().name("client".into()).spawn(body); // it sees the connection close
}

/// A connection that counts.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn refuse(mut stream: UnixStream, why: &str) {
    let _ = protocol::write_answer(&mut stream, Answer::Error(why.into()));
}

/// Answers until the client goes, or the connection becomes a stream and that ends.
fn serve(stream: UnixStream, services: &Services) -> io::Result<()> {
    let mut answers = stream.try_clone()?;
    let mut requests = BufReader::new(stream);
    loop {
        let request = match protocol::read_request(&mut requests) {
            Ok(None) => return Ok(()),
            Ok(Some(request)) => request,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                // Where the next request would begin is not known.
                return protocol::write_answer(&mut answers, Answer::Error(error.to_string()));
            }
            Err(error) => return Err(error),
        };
        match request {
            Request::Vm(request) => protocol::write_answer(&mut answers, ask(services, request))?,
            Request::Console { lines } => return console(requests, answers, services, lines),
            Request::Agent => return agent(&requests, answers, services),
        }
    }
}

fn ask(services: &Services, request: vmm::Request) -> Answer {
    match (services.ask)(request) {
        Ok(vm) => Answer::Status(Status { vm, engine: services.engine.clone() }),
        Err(gone) => Answer::Error(gone.to_string()),
    }
}

/// The connection becomes a stream from here on.
fn begin_stream(answers: &mut UnixStream) -> io::Result<()> {
    protocol::write_answer(answers, Answer::Stream)?;
    answers.set_read_timeout(None)?;
    answers.set_write_timeout(None)
}

/// The rest is said as on the socket of [`vmm::guest_ports`].
fn agent(requests: &BufReader<UnixStream>, mut client: UnixStream, services: &Services) -> io::Result<()> {
    if !requests.buffer().is_empty() {
        let why = "nothing may be sent before the answer";
        return protocol::write_answer(&mut client, Answer::Error(why.into()));
    }
    begin_stream(&mut client)?;
    (services.agent)(client)
}

fn console(
    mut keys: BufReader<UnixStream>,
    mut output: UnixStream,
    services: &Services,
    lines: usize,
) -> io::Result<()> {
    // Attached before it is told: what is written from then on is the client's.
    let reader = Arc::new(services.hub.attach(lines));
    let theirs = reader.clone();
    let begun = begin_stream(&mut output)
        .and_then(|()| thread::Builder::new().name("console".into()).spawn(move || print(&theirs, output)));
    if let Err(error) = begun {
        reader.end();
        return Err(error);
    }
    let typed = type_all(&mut keys, &*services.keyboard);
    // The end of a pipe ends nothing: the client still reads. Once it has gone, nobody does.
    if typed.is_ok() {
        let _ = poll(&mut [PollFd::new(keys.get_ref(), PollFlags::empty())], None);
    }
    reader.end();
    Ok(())
}

fn type_all(keys: &mut impl Read, keyboard: &dyn Fn(&[u8])) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match keys.read(&mut buffer)? {
            0 => return Ok(()),
            count => keyboard(&buffer[..count]),
        }
    }
}

fn print(reader: &Reader, mut output: UnixStream) {
    while let Some(bytes) = reader.next() {
        if output.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = output.shutdown(Shutdown::Both); // the client may have gone
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, channel};

    use store::Home;

    use super::*;
    use crate::vms::Client;

    struct Vm {
        home: Home,
        hub: Hub,
        asked: Receiver<vmm::Request>,
        typed: Receiver<Vec<u8>>,
        _folder: tempfile::TempDir,
    }

    const PATIENCE: Duration = Duration::from_secs(20);

    fn vm() -> Vm {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path());
        home.prepare().unwrap();
        let hub = Hub::new(io::sink());
        let ((send, asked), (keys, typed)) = (channel(), channel());
        let (send, keys) = (Mutex::new(send), Mutex::new(keys));
        let services = Services {
            engine: "soft".into(),
            agent: Box::new(|mut client| {
                let mut line = [0; 6];
                client.read_exact(&mut line)?;
                client.write_all(&line)
            }),
            ask: Box::new(move |request| {
                send.lock().unwrap().send(request).map_err(|_| vmm::Gone)?;
                Ok(vmm::Status { state: vmm::State::Running, resets: 0, uptime: Duration::ZERO })
            }),
            hub: hub.clone(),
            keyboard: Box::new(move |bytes| drop(keys.lock().unwrap().send(bytes.to_vec()))),
        };
        let listener = socket::listen(&socket::path(&home, &"web".parse().unwrap())).unwrap();
        start(listener, Arc::new(services)).unwrap();
        Vm { home, hub, asked, typed, _folder: folder }
    }

    impl Vm {
        fn client(&self) -> Client {
            Client::connect(&self.home, &"web".parse().unwrap(), PATIENCE).unwrap()
        }

        fn raw(&self) -> UnixStream {
            let stream = socket::connect(&socket::path(&self.home, &"web".parse().unwrap())).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        }
    }

    #[test]
    fn one_connection_asks_one_thing_after_another() {
        let vm = vm();
        let mut client = vm.client();
        for request in [vmm::Request::Pause, vmm::Request::PowerButton, vmm::Request::Status] {
            assert_eq!(client.request(request).unwrap().engine, "soft");
            assert_eq!(vm.asked.recv().unwrap(), request);
        }
    }

    #[test]
    fn a_connection_becomes_the_agents() {
        let vm = vm();
        let mut port = vm.client().stream(Request::Agent).unwrap();
        port.get_mut().write_all(b"agent\n").unwrap();
        let mut line = String::new();
        port.read_line(&mut line).unwrap();
        assert_eq!(line, "agent\n");
        let mut hasty = vm.raw();
        hasty.write_all(b"{\"version\":1,\"request\":\"agent\"}\nagent\n").unwrap();
        let mut answer = String::new();
        hasty.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("before the answer"), "{answer}");
    }

    #[test]
    fn several_look_at_the_console_and_type() {
        let mut vm = vm();
        vm.hub.write_all(b"old\nlogin: ").unwrap();
        let mut consoles: Vec<_> =
            (0..3).map(|_| vm.client().stream(Request::Console { lines: 1 }).unwrap()).collect();
        consoles[1].get_mut().write_all(b"root\r").unwrap();
        assert_eq!(vm.typed.recv_timeout(PATIENCE).unwrap(), b"root\r");
        vm.hub.write_all(b"root\n").unwrap();
        for console in &mut consoles {
            console.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
            let mut line = String::new();
            console.read_line(&mut line).unwrap();
            assert_eq!(line, "login: root\n");
        }
        // The end of the keys is not the end of the output.
        consoles[0].get_ref().shutdown(Shutdown::Write).unwrap();
        vm.hub.write_all(b"bye\n").unwrap();
        vm.hub.end();
        for mut console in consoles {
            let mut rest = String::new();
            console.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "bye\n");
        }
    }

    #[test]
    fn nonsense_is_answered_by_an_error_and_serves_nobody_badly() {
        let vm = vm();
        let nonsense: [&[u8]; 5] =
            [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"{}\n", &[b'x'; 100_000], b"{\"version\":1}\n"];
        for bytes in nonsense {
            let mut stream = vm.raw();
            let _ = stream.write_all(bytes); // it may be turned away before its end
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.starts_with(b"{\"version\":1,\"answer\":{\"error\":"), "{bytes:?}");
        }
        vm.client().request(vmm::Request::Status).unwrap();
    }

    #[test]
    fn too_many_connections_are_turned_away_and_their_places_come_back() {
        let vm = vm();
        let held: Vec<UnixStream> = (0..CONNECTIONS).map(|_| vm.raw()).collect();
        let mut answer = String::new();
        BufReader::new(vm.raw()).read_line(&mut answer).unwrap();
        assert!(answer.contains("too many connections"), "{answer}");
        drop(held);
        let begun = std::time::Instant::now();
        while vm.client().request(vmm::Request::Status).is_err() {
            assert!(begun.elapsed() < PATIENCE);
        }
    }
}

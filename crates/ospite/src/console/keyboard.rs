//! The way from the host's keyboard to a console of the guest.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Sender};

use machine::{ConsoleInput, SerialInput};

/// The keyboard end of one of the guest's consoles.
pub enum Keyboard {
    /// COM1.
    Serial(SerialInput),
    /// The virtio console.
    Virtio(ConsoleInput),
    /// That of a VM in another process.
    Remote(UnixStream),
}

impl Keyboard {
    /// Types, waiting for a guest that does not read. One that has ended needs no keys.
    pub fn send(&self, bytes: &[u8]) {
        match self {
            Keyboard::Serial(line) => line.send(bytes),
            Keyboard::Virtio(line) => line.send(bytes),
            Keyboard::Remote(line) => drop((&*line).write_all(bytes)),
        }
    }
}

/// A pipe waits for a guest that does not read. A person does not: the menu must work all the same,
/// so that what is typed on a terminal waits on a thread of its own.
pub enum Line {
    /// Typed by a person.
    Keys(Sender<Vec<u8>>),
    /// From a pipe.
    Pipe(Keyboard),
}

impl Line {
    /// A line for a person.
    pub fn keys(keyboard: Keyboard) -> io::Result<Line> {
        let (keys, typed) = mpsc::channel::<Vec<u8>>();
        let body = move || typed.iter().for_each(|bytes| keyboard.send(&bytes));
        machine::spawn("typist", body)?;
        Ok(Line::Keys(keys))
    }

    /// Types.
    pub fn send(&self, bytes: Vec<u8>) {
        match self {
            Line::Keys(keys) => drop(keys.send(bytes)), // its thread ends with us only
            Line::Pipe(keyboard) => keyboard.send(&bytes),
        }
    }
}

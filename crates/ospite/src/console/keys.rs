//! What keys mean: most are the guest's, the escape key opens the menu.

use vmm::{State, Status};

/// What to do with what was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// For the guest.
    Send(Vec<u8>),
    /// The escape key: say what the next key can be.
    Menu,
    /// The key after it.
    Press(Pressed),
}

/// An entry of the menu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressed {
    /// q
    Kill,
    /// p
    PowerButton,
    /// r
    Reset,
    /// z
    PauseOrContinue,
    /// i
    Status,
    /// d
    Detach,
    /// Any other key.
    Back,
}

/// Reads a stream of keys.
pub struct Keys {
    escape: Option<u8>,
    in_menu: bool,
}

impl Keys {
    /// Without an escape key every byte is the guest's.
    pub fn new(escape: Option<u8>) -> Keys {
        Keys { escape, in_menu: false }
    }

    /// The actions for the next bytes, in order.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Action> {
        let mut actions = Vec::new();
        for &byte in bytes {
            let action = self.key(byte);
            match (actions.last_mut(), action) {
                (Some(Action::Send(text)), Action::Send(more)) => text.extend(more),
                (_, action) => actions.push(action),
            }
        }
        actions
    }

    fn key(&mut self, byte: u8) -> Action {
        let is_escape = Some(byte) == self.escape;
        if std::mem::take(&mut self.in_menu) {
            return if is_escape { Action::Send(vec![byte]) } else { Action::Press(entry(byte)) };
        }
        self.in_menu = is_escape;
        if is_escape { Action::Menu } else { Action::Send(vec![byte]) }
    }
}

fn entry(byte: u8) -> Pressed {
    match byte.to_ascii_lowercase() {
        b'q' => Pressed::Kill,
        b'p' => Pressed::PowerButton,
        b'r' => Pressed::Reset,
        b'z' => Pressed::PauseOrContinue,
        b'i' => Pressed::Status,
        b'd' => Pressed::Detach,
        _ => Pressed::Back,
    }
}

/// How a VM is, for a person.
pub fn describe(status: &Status) -> String {
    let state = match status.state {
        State::Running => "running",
        State::Paused => "paused",
    };
    let seconds = status.uptime.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{state}, started {hours}:{minutes:02}:{seconds:02} ago, resets: {}", status.resets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn send(text: &str) -> Action {
        Action::Send(text.into())
    }

    #[test]
    fn text_and_ctrl_c_go_to_the_guest_in_one_piece() {
        assert_eq!(Keys::new(Some(0x1d)).feed(b"ls\x03\r"), [send("ls\x03\r")]);
    }

    #[test]
    fn the_escape_key_opens_the_menu_even_across_reads() {
        let mut keys = Keys::new(Some(0x1d));
        assert_eq!(keys.feed(b"a\x1d"), [send("a"), Action::Menu]);
        assert_eq!(keys.feed(b"Pb"), [Action::Press(Pressed::PowerButton), send("b")]);
        assert_eq!(keys.feed(b"\x1d\x1dc"), [Action::Menu, send("\x1dc")]);
        assert_eq!(keys.feed(b"\x1d?q"), [Action::Menu, Action::Press(Pressed::Back), send("q")]);
    }

    #[test]
    fn without_an_escape_key_nothing_is_kept_from_the_guest() {
        assert_eq!(Keys::new(None).feed(b"\x1dq\xff"), [Action::Send(b"\x1dq\xff".to_vec())]);
    }

    #[test]
    fn a_status_is_one_line() {
        let status = Status { state: State::Paused, resets: 2, uptime: Duration::from_secs(3723) };
        assert_eq!(describe(&status), "paused, started 1:02:03 ago, resets: 2");
    }
}

//! POST code port 0x80: takes progress codes, and the dummy writes by which old software waits a
//! microsecond. What is read is the last code written, as the PC's page register behind it answers.

use device::{BadState, Device, Snapshot};
use serde::{Deserialize, Serialize};

/// Saved state of [`Post`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostState {
    /// The last code.
    pub code: u8,
}

/// The port.
#[derive(Default)]
pub struct Post {
    state: PostState,
}

impl Device for Post {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let [first, ..] = data {
            *first = self.state.code;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [code, ..] = *data {
            self.state.code = code;
        }
    }

    fn reset(&mut self) {
        self.state = PostState::default();
    }
}

impl Snapshot for Post {
    type State = PostState;

    fn save(&self) -> PostState {
        self.state.clone()
    }

    fn restore(&mut self, state: PostState) -> Result<(), BadState> {
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_code_is_read_back_until_reset() {
        let mut port = Post::default();
        port.write(0, &[0x42]);
        let mut byte = [0xff];
        port.read(0, &mut byte);
        assert_eq!(byte, [0x42]);
        let saved = port.save();
        port.reset();
        port.read(0, &mut byte);
        assert_eq!(byte, [0]);
        port.restore(saved).unwrap();
        port.read(0, &mut byte);
        assert_eq!(byte, [0x42]);
    }
}

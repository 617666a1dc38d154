//! MAC addresses.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of a VM's card number `index`: locally administered, the same at every start.
    pub fn of_card(index: u32) -> Mac {
        let [_, b, c, d] = index.to_be_bytes();
        Mac([0x52, 0x54, 0x00, b, c, d])
    }

    /// The address of the card of the VM called `name`: the same at every start, another for each name.
    pub fn of_vm(name: &str) -> Mac {
        let [.., b, c, d] = stable_hash(name).to_be_bytes();
        Mac([0x52, 0x54, 0x00, b | 0x80, c, d])
    }
}

/// FNV-1a with 64 bits (RFC 9923): the same in every build, which the standard library's is not.
pub(crate) fn stable_hash(text: &str) -> u64 {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    // Its low bits alone are weak for short texts.
    hash ^ (hash >> 32)
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_have_addresses_of_their_own() {
        assert_eq!(Mac::of_card(1).to_string(), "52:54:00:00:00:01");
        assert_ne!(Mac::of_card(0), Mac::of_card(256));
        assert_ne!(Mac::of_vm("web"), Mac::of_vm("ftp"));
        assert_eq!(Mac::of_vm("web"), Mac::of_vm("web"));
    }

    #[test]
    fn the_hash_is_the_published_one_folded() {
        let plain = 0xaf63_dc4c_8601_ec8c_u64; // of "a"
        assert_eq!(stable_hash("a"), plain ^ (plain >> 32));
    }
}

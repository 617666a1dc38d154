//! Decoded blocks, kept by guest-physical address and mode.
//!
//! A block is a run of instructions within one page, up to a branch. It is keyed by where its bytes
//! are *physically*, so it survives address-space switches, and carries the page's code version
//! ([`mem::PageState`]): one comparison tells whether its bytes are still what they were.

use super::cpu::Mode;
use super::op::Op;

/// Most instructions of a block.
pub const MAX_OPS: usize = 64;
const SLOTS: usize = 1 << 15;
/// Blocks, and instructions in them, that are kept before all are dropped at once.
const MAX_BLOCKS: usize = 1 << 17;
const MAX_KEPT_OPS: usize = 1 << 20;
/// Bytes that the blocks of one vCPU take at most. The list of them may be twice as long as it is full.
pub const MEMORY_LIMIT: usize =
    SLOTS * 4 + 2 * MAX_BLOCKS * size_of::<Block>() + (MAX_KEPT_OPS + MAX_OPS) * size_of::<Op>();

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Guest-physical address of the first instruction.
    gpa: u64,
    /// The parts of the mode that decoding depends on.
    mode: u8,
}

impl Key {
    /// The key of code at `gpa` in `mode`.
    #[inline(always)]
    pub fn new(gpa: u64, mode: &Mode) -> Key {
        Key {
            gpa,
            mode: mode.code_bits
                | mode.stack_bits >> 5
                | u8::from(mode.protected) << 2
                | u8::from(mode.v86) << 3,
        }
    }

    #[inline(always)]
    fn slot(self) -> usize {
        let hash = (self.gpa ^ u64::from(self.mode) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> 49) as usize & (SLOTS - 1)
    }
}

/// A decoded run of instructions.
pub struct Block {
    key: Key,
    /// Code version of the page when the bytes were read.
    pub version: u32,
    /// Length in bytes.
    pub len: u32,
    /// The instructions; at least one.
    pub ops: Box<[Op]>,
    /// Next block in the same slot, plus one.
    next: u32,
}

/// The blocks of one vCPU.
pub struct Blocks {
    heads: Box<[u32]>,
    blocks: Vec<Block>,
    /// Instructions in them.
    ops: usize,
    /// Blocks decoded so far, for statistics.
    pub decoded: u64,
}

impl Default for Blocks {
    fn default() -> Self {
        Blocks { heads: vec![0; SLOTS].into(), blocks: Vec::new(), ops: 0, decoded: 0 }
    }
}

impl Blocks {
    /// The block at `key`, if its page still is at `version`.
    #[inline(always)]
    pub fn find(&self, key: Key, version: u32) -> Option<&Block> {
        let mut at = self.heads[key.slot()];
        while at != 0 {
            let block = &self.blocks[at as usize - 1];
            if block.key == key {
                return (block.version == version).then_some(block);
            }
            at = block.next;
        }
        None
    }

    /// Keeps a block, instead of an older one with the same key.
    pub fn insert(&mut self, key: Key, version: u32, len: u32, ops: Box<[Op]>) -> &Block {
        self.decoded += 1;
        if self.blocks.len() >= MAX_BLOCKS || self.ops >= MAX_KEPT_OPS {
            self.clear();
        }
        self.ops += ops.len();
        let mut at = self.heads[key.slot()];
        while at != 0 {
            let index = at as usize - 1;
            if self.blocks[index].key == key {
                let block = &mut self.blocks[index];
                self.ops -= block.ops.len();
                (block.version, block.len, block.ops) = (version, len, ops);
                return &self.blocks[index];
            }
            at = self.blocks[index].next;
        }
        let head = &mut self.heads[key.slot()];
        let next = std::mem::replace(head, self.blocks.len() as u32 + 1);
        self.blocks.push(Block { key, version, len, ops, next });
        &self.blocks[self.blocks.len() - 1]
    }

    /// Drops all blocks.
    pub fn clear(&mut self) {
        self.heads.fill(0);
        self.blocks.clear();
        self.ops = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_blocks_do_not_take_more_than_the_limit() {
        let mode = Mode { code_bits: 64, stack_bits: 64, ..Mode::default() };
        let op = crate::x86::decode::decode(&[0x90; 15], &mode).unwrap().unwrap();
        let mut blocks = Blocks::default();
        for gpa in 0..2 * (MAX_KEPT_OPS / MAX_OPS) as u64 {
            blocks.insert(Key::new(gpa, &mode), 1, 64, vec![op; MAX_OPS].into());
            let kept: usize = blocks.blocks.iter().map(|block| block.ops.len()).sum();
            assert!(gpa % 4096 != 0 || kept == blocks.ops && kept <= MAX_KEPT_OPS + MAX_OPS, "{kept}");
        }
    }

    #[test]
    fn a_block_is_found_at_its_version_only_and_replaced_in_place() {
        let mode = Mode { code_bits: 64, stack_bits: 64, ..Mode::default() };
        let (mut blocks, key) = (Blocks::default(), Key::new(0x1000, &mode));
        blocks.insert(key, 1, 4, Box::new([]));
        assert!(blocks.find(key, 1).is_some() && blocks.find(key, 3).is_none());
        assert!(blocks.find(Key::new(0x1000, &Mode { code_bits: 32, ..mode }), 1).is_none());
        blocks.insert(key, 3, 5, Box::new([]));
        assert_eq!(blocks.find(key, 3).map(|b| b.len), Some(5));
        assert_eq!(blocks.blocks.len(), 1);
    }
}

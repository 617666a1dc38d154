//! The least driver of a virtio disk: one request at a time, completion by MSI-X.

use engine::CpuIo;
use mem::{Bytes, GuestAddress, GuestRam};

const CONFIG: u64 = 0xe000_0000 + (8 << 15);
/// Where the driver keeps its rings and buffers.
const DESC: u64 = 0x20_0000;
const AVAIL: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const HEADER: u64 = 0x20_3000;
const STATUS: u64 = 0x20_3010;
const DATA: u64 = 0x20_4000;
const QUEUE_SIZE: u16 = 8;

pub const VECTOR: u32 = 0x51;

fn read32(io: &dyn CpuIo, gpa: u64) -> u32 {
    let mut data = [0; 4];
    io.mmio_read(gpa, &mut data);
    u32::from_le_bytes(data)
}

fn bar(io: &dyn CpuIo, index: u64) -> u64 {
    u64::from(read32(io, CONFIG + 0x10 + 4 * index) & !0xf)
}

/// Walks the capability list.
fn capability(io: &dyn CpuIo, id: u8) -> u64 {
    let mut at = u64::from(read32(io, CONFIG + 0x34) as u8);
    while at != 0 {
        let head = read32(io, CONFIG + at);
        if head as u8 == id {
            return CONFIG + at;
        }
        at = u64::from(head >> 8 & 0xff);
    }
    panic!("no capability {id:#x}");
}

/// Bus mastering, MSI-X with the queue's vector, features, one queue.
pub fn start(io: &dyn CpuIo) {
    io.mmio_write(CONFIG + 4, &6u16.to_le_bytes());
    let (registers, msix) = (bar(io, 0), bar(io, 2));
    io.mmio_write(capability(io, 0x11) + 2, &0x8000u16.to_le_bytes());
    for (offset, value) in [(16, 0xfee0_0000u32), (20, 0), (24, VECTOR), (28, 0)] {
        io.mmio_write(msix + offset, &value.to_le_bytes());
    }
    let status = |value: u8| io.mmio_write(registers + 20, &[value]);
    let set16 = |offset: u64, value: u16| io.mmio_write(registers + offset, &value.to_le_bytes());
    let set32 = |offset: u64, value: u32| io.mmio_write(registers + offset, &value.to_le_bytes());
    status(0);
    status(3);
    set32(8, 0);
    set32(12, 1 << 9); // FLUSH
    set32(8, 1);
    set32(12, 1); // VERSION_1
    status(11);
    set16(22, 0);
    set16(24, QUEUE_SIZE);
    set16(26, 1);
    for (offset, address) in [(32, DESC), (40, AVAIL), (48, USED)] {
        set32(offset, address as u32);
        set32(offset + 4, 0);
    }
    set16(28, 1);
    status(15);
}

/// Makes the device write `text` at `sector`, as the request number `nth` from 0.
pub fn write(io: &dyn CpuIo, ram: &GuestRam, nth: u16, sector: u64, text: &[u8]) {
    let mut data = [0; 512];
    data[..text.len()].copy_from_slice(text);
    ram.write_slice(&data, GuestAddress(DATA)).unwrap();
    ram.write_obj(1u32, GuestAddress(HEADER)).unwrap(); // VIRTIO_BLK_T_OUT
    ram.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    ram.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    let chain = [(HEADER, 16u32, 1u16), (DATA, 512, 1), (STATUS, 1, 2)];
    for (i, (address, length, flags)) in (0u16..).zip(chain) {
        let at = DESC + 16 * u64::from(i);
        ram.write_obj(address, GuestAddress(at)).unwrap();
        ram.write_obj(length, GuestAddress(at + 8)).unwrap();
        ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        ram.write_obj(i + 1, GuestAddress(at + 14)).unwrap();
    }
    ram.write_obj(0u16, GuestAddress(AVAIL + 4 + 2 * u64::from(nth % QUEUE_SIZE))).unwrap();
    ram.write_obj(nth + 1, GuestAddress(AVAIL + 2)).unwrap();
    io.mmio_write(bar(io, 0) + 0x1000, &0u16.to_le_bytes());
}

/// Status byte of the last request; 0 is good.
pub fn status(ram: &GuestRam) -> u8 {
    ram.read_obj(GuestAddress(STATUS)).unwrap()
}

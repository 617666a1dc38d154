//! `IN`, `OUT`, and the I/O permission check that string I/O shares.

use engine::x86::bits::access;
use iced_x86::Code;

use super::super::cpu::Cpu;
use super::super::decode::Lower;
use super::super::exception::{Exception, Exec};
use super::super::int::Int;
use super::super::op::{Handler, Op, reg};
use super::super::tlb::View;

/// Offset of the I/O map base in a 32- or 64-bit task state segment.
const IO_MAP_BASE: u32 = 0x66;

/// Handlers for port I/O.
pub fn lower(l: &Lower<'_>, _: &mut Op) -> Option<Handler> {
    use Code::*;
    Some(match l.ins.code() {
        In_AL_imm8 => input::<u8, true>,
        In_AX_imm8 => input::<u16, true>,
        In_EAX_imm8 => input::<u32, true>,
        In_AL_DX => input::<u8, false>,
        In_AX_DX => input::<u16, false>,
        In_EAX_DX => input::<u32, false>,
        Out_imm8_AL => output::<u8, true>,
        Out_imm8_AX => output::<u16, true>,
        Out_imm8_EAX => output::<u32, true>,
        Out_DX_AL => output::<u8, false>,
        Out_DX_AX => output::<u16, false>,
        Out_DX_EAX => output::<u32, false>,
        _ => return None,
    })
}

fn port<const IMM: bool>(cpu: &Cpu, op: &Op) -> u16 {
    if IMM { op.imm as u8 as u16 } else { u16::get(cpu, reg::RDX) }
}

fn input<T: Int, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = port::<IMM>(cpu, op);
    cpu.check_io(port, T::BYTES)?;
    let value = cpu.port_in::<T>(port);
    T::set(cpu, reg::RAX, value);
    Ok(())
}

fn output<T: Int, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = port::<IMM>(cpu, op);
    cpu.check_io(port, T::BYTES)?;
    let value = T::get(cpu, reg::RAX);
    cpu.port_out(port, value);
    Ok(())
}

impl Cpu {
    /// `#GP(0)` unless the running code may access `size` bytes of ports from `port`: by IOPL, or by the
    /// permission map in the task state segment (SDM 1, 19.5).
    pub fn check_io(&mut self, port: u16, size: u64) -> Exec {
        if !self.mode.protected || (self.cpl <= self.iopl() && !self.mode.v86) {
            return Ok(());
        }
        let wide = self.tr.access & 8 != 0 && self.tr.access & access::P != 0 && !self.tr.unusable;
        let limit = self.tr.limit;
        if !wide || limit < IO_MAP_BASE + 1 {
            return Err(Exception::GP0);
        }
        let map = self.task_field::<u16>(IO_MAP_BASE)?;
        // Two bytes are always read, for ports whose bits cross a byte.
        let at = u32::from(map) + u32::from(port / 8);
        if at + 1 > limit {
            return Err(Exception::GP0);
        }
        let linear = self.table_address(self.tr.base, at.into())?;
        let bits = self.load_linear::<u16>(View::Kernel, linear)?;
        let wanted = ((1u16 << size) - 1) << (port % 8);
        if bits & wanted == 0 { Ok(()) } else { Err(Exception::GP0) }
    }

    /// Reads a port, after [`Cpu::check_io`].
    pub fn port_in<T: Int>(&mut self, port: u16) -> T {
        let mut bytes = [0; 8];
        self.io().port_read(port, &mut bytes[..T::BYTES as usize]);
        self.after_io(port, T::BYTES);
        T::cut(u64::from_le_bytes(bytes))
    }

    /// Writes a port, after [`Cpu::check_io`].
    pub fn port_out<T: Int>(&mut self, port: u16, value: T) {
        self.io().port_write(port, &value.zx().to_le_bytes()[..T::BYTES as usize]);
        self.after_io(port, T::BYTES);
    }

    /// The device may have raised an interrupt: the CPU looks before the next instruction.
    fn after_io(&mut self, port: u16, size: u64) {
        self.watch_io(port, size);
        self.leave_block = true;
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::systest::*;
    use super::*;

    /// in al, 0x60 in ring 3 with a task state segment of this limit, I/O map base, and map bytes 12, 13.
    fn user_input(limit: u32, base: u16, map: [u8; 2]) -> Exec {
        let mut system = System::long(&[0xe4, 0x60]);
        system.cpu.tr.limit = limit;
        system.poke(TSS + 0x66, &base.to_le_bytes());
        system.poke(TSS + u64::from(base) + 0x60 / 8, &map);
        system.enter_ring3();
        system.guest.step()
    }

    #[test]
    fn ring_3_reaches_the_ports_that_its_task_allows() {
        let gp = Err(Exception::GP0);
        assert_eq!(user_input(0x2067, 0x68, [0xfe, 0xff]), Ok(()));
        assert_eq!(user_input(0x2067, 0x68, [0xff, 0xff]), gp);
        assert_eq!(user_input(0x67, 0x68, [0, 0]), gp, "the map is behind the limit");
        assert_eq!(user_input(0x68 + 12, 0x68, [0, 0]), gp, "two bytes are read");
        assert_eq!(user_input(0x68 + 13, 0x68, [0, 0]), Ok(()));
    }

    #[test]
    fn wide_accesses_need_all_their_ports() {
        let mut system = System::long(&[0xed]); // in eax, dx
        system.cpu.tr.limit = 0x2067;
        system.poke(TSS + 0x66, &0x68u16.to_le_bytes());
        system.poke(TSS + 0x68, &[0x1f, 0x02]); // ports 5-8 are free, 9 is not
        system.enter_ring3();
        for (port, allowed) in [(5, true), (6, false), (4, false)] {
            assert_eq!(system.guest.cpu.check_io(port, 4).is_ok(), allowed, "port {port}");
        }
        system.cpu.rflags |= 3 << 12;
        assert_eq!(system.guest.cpu.check_io(6, 4), Ok(()), "IOPL 3");
    }

    #[test]
    fn input_fills_the_accumulator_as_wide_as_it_is() {
        let mut system = System::long(&[0xec, 0x66, 0xed, 0xed]); // in al, dx; in ax, dx; in eax, dx
        system.cpu.regs[0] = 0x1122_3344_5566_7700;
        system.guest.step().unwrap();
        assert_eq!(system.cpu.regs[0], 0x1122_3344_5566_77ff);
        system.guest.step().unwrap();
        assert_eq!(system.cpu.regs[0], 0x1122_3344_5566_ffff);
        system.guest.step().unwrap();
        assert_eq!(system.cpu.regs[0], 0xffff_ffff);
    }
}

//! The fixed pieces of code: into and out of translated code, and the calls it makes.

#![allow(unsafe_code)] // turns the address of generated code into a function

use engine::Error;

use super::super::cpu::Cpu;
use super::asm::{Alu, Asm, Fixup, Mem, cc, host};
use super::cache::CodeCache;
use super::frame::at;
use super::regs::{A, B, pairs};
use crate::x86::fast::JUMP_ENTRIES;
use crate::x86::tlb::View;

/// What translated code calls: the vCPU, then a site's number. The answer is the address to go on at,
/// or 0 to leave translated code.
pub type Helper = unsafe extern "sysv64" fn(*mut Cpu, u64) -> u64;

/// The helpers behind [`Stubs::go`], [`Stubs::miss`] and [`Stubs::run`].
#[derive(Clone, Copy)]
pub struct Helpers {
    /// A jump.
    pub go: Helper,
    /// A miss of the fast TLB.
    pub miss: Helper,
    /// An instruction's handler.
    pub run: Helper,
}

/// The site number of an indirect jump whose target is not in the jump cache.
pub const SITE_INDIRECT: u64 = 0;
/// The site number of a jump to another page whose target is not in the jump cache.
pub const SITE_FAR: u64 = 1;

/// Addresses of the fixed code.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    enter: u64,
    /// `push site; jmp`: leaves translated code.
    pub exit: u64,
    /// `push site; jmp`: goes where the site says if that is translated, else leaves translated code.
    pub go: u64,
    /// `push site; jmp`: a load or store missed the fast TLB.
    pub miss: u64,
    /// `push site; jmp`: runs an instruction's handler.
    pub run: u64,
    /// `jmp`: goes on at the linear address in [`A`], by view. Remembers it as one of the latest jumps.
    pub indirect: [u64; 3],
    /// The same, from a jump whose site is in [`Frame::far_site`](super::frame::Frame::far_site).
    pub far: u64,
    /// `call`: brings the guest's vector registers into the host's.
    pub simd_load: u64,
    /// `call`: brings the guest's x87 unit into the host's.
    pub x87_load: u64,
}

fn rsp(disp: i32) -> Mem {
    Mem::at(host::RSP, disp)
}

fn spill(asm: &mut Asm) {
    for (guest, reg) in pairs() {
        asm.store(rsp(at::reg(guest)), reg);
    }
}

fn reload(asm: &mut Asm) {
    for (guest, reg) in pairs() {
        asm.load(reg, rsp(at::reg(guest)));
    }
}

const SAVED: [u8; 6] = [host::RBX, host::RBP, host::R12, host::R13, host::R14, host::R15];

fn enter(asm: &mut Asm) {
    SAVED.iter().for_each(|&reg| asm.push(reg));
    asm.store(Mem::at(host::RDI, at::HOST_RSP), host::RSP);
    asm.mov(host::RSP, host::RDI);
    asm.store(rsp(at::TARGET), host::RSI);
    reload(asm);
    asm.jmp_mem(rsp(at::TARGET));
}

/// Back to the host's stack and out. The guest's registers are in their slots.
fn leave(asm: &mut Asm) {
    asm.load(host::RSP, rsp(at::HOST_RSP));
    SAVED.iter().rev().for_each(|&reg| asm.pop(reg));
    asm.ret();
}

/// `pop [rsp + disp]`: the address is computed with RSP after the pop.
fn pop_site(asm: &mut Asm) {
    asm.op_mem(false, &[0x8f], 0, &rsp(at::SITE));
}

fn vector_registers(asm: &mut Asm, avx: bool, store: bool) {
    let opcode = if store { 0x11 } else { 0x10 };
    for number in 0..16u8 {
        if avx {
            // vmovups ymm, [rsp + disp32]
            asm.raw(&[0xc5, if number < 8 { 0xfc } else { 0x7c }, opcode]);
        } else {
            if number >= 8 {
                asm.raw(&[0x44]);
            }
            asm.raw(&[0x0f, opcode]);
        }
        // RSP is 8 lower: these are called.
        asm.modrm_mem(number, &rsp(at::ymm(number) + 8));
    }
}

fn mxcsr(asm: &mut Asm, store: bool, slot: i32) {
    asm.op_mem(false, &[0x0f, 0xae], if store { 3 } else { 2 }, &rsp(slot + 8));
}

fn simd_load(asm: &mut Asm, avx: bool) {
    mxcsr(asm, true, at::HOST_MXCSR);
    mxcsr(asm, false, at::MXCSR);
    vector_registers(asm, avx, false);
    asm.store_imm32(rsp(at::SIMD + 8), 1);
    asm.ret();
}

fn simd_save(asm: &mut Asm, avx: bool) {
    mxcsr(asm, true, at::MXCSR);
    mxcsr(asm, false, at::HOST_MXCSR);
    vector_registers(asm, avx, true);
    asm.store_imm32(rsp(at::SIMD + 8), 0);
    if avx {
        asm.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    asm.ret();
}

/// Takes the guest's vector registers out of the host's if they are there.
fn save_simd_if_loaded(asm: &mut Asm, simd_save: u64) {
    asm.cmp_mem32(rsp(at::SIMD), 0);
    let none = asm.jcc_forward(cc::Z);
    asm.call(simd_save);
    asm.bind(none);
}

/// A call of a helper, with all of the guest's registers in their slots.
fn helper(asm: &mut Asm, target: Helper, simd_save: u64, simd_load: u64) {
    pop_site(asm);
    asm.store(rsp(at::SCRATCH), A);
    asm.store(rsp(at::SCRATCH + 8), B);
    spill(asm);
    asm.load32(host::R12, rsp(at::SIMD));
    save_simd_if_loaded(asm, simd_save);
    asm.mov(host::RDI, host::RSP);
    asm.load(host::RSI, rsp(at::SITE));
    asm.mov_imm(host::RAX, target as usize as u64);
    asm.call_reg(host::RAX);
    asm.op_reg(true, &[0x85], host::RAX, host::RAX);
    let out = asm.jcc_forward(cc::Z);
    asm.store(rsp(at::TARGET), host::RAX);
    asm.op_reg(false, &[0x85], host::R12, host::R12);
    let without = asm.jcc_forward(cc::Z);
    asm.call(simd_load);
    asm.bind(without);
    reload(asm);
    asm.jmp_mem(rsp(at::TARGET));
    asm.bind(out);
    leave(asm);
}

/// Jump to the linear address in A: flags are in their slot. What is not in the jump cache goes to `go`
/// as `site`. What is becomes one of the latest jumps of `view`.
fn indirect(asm: &mut Asm, site: u64, go: u64, view: Option<View>) {
    asm.mov(B, A);
    asm.shr(B, 12);
    asm.alu(Alu::Xor, B, A);
    asm.alu_imm(false, Alu::And, B, (JUMP_ENTRIES - 1) as i32);
    asm.shl32(B, 5);
    asm.alu_mem(Alu::Cmp, A, Mem::indexed(host::RSP, B, 0, at::JUMP_LINEAR));
    let other = asm.jcc_forward(cc::NZ);
    let elsewhere = hit(asm, view);
    asm.bind(elsewhere);
    asm.load(A, Mem::indexed(host::RSP, B, 0, at::JUMP_LINEAR));
    asm.bind(other);
    asm.alu_imm(false, Alu::Xor, B, 32); // the second way
    asm.alu_mem(Alu::Cmp, A, Mem::indexed(host::RSP, B, 0, at::JUMP_LINEAR));
    let none = asm.jcc_forward(cc::NZ);
    let nowhere = hit(asm, view);
    asm.bind(nowhere);
    asm.load(A, Mem::indexed(host::RSP, B, 0, at::JUMP_LINEAR));
    asm.bind(none);
    asm.push_imm(site as u32);
    asm.jmp(go);
}

/// The entry at B has the right address: goes there if the context is right, too.
fn hit(asm: &mut Asm, view: Option<View>) -> Fixup {
    asm.load(A, rsp(at::CONTEXT));
    asm.alu_mem(Alu::Cmp, A, Mem::indexed(host::RSP, B, 0, at::JUMP_CONTEXT));
    let elsewhere = asm.jcc_forward(cc::NZ);
    asm.load(A, Mem::indexed(host::RSP, B, 0, at::JUMP_PAGE));
    asm.store(rsp(at::PAGE), A);
    match view {
        None => asm.jmp_mem(Mem::indexed(host::RSP, B, 0, at::JUMP_CODE)),
        Some(view) => remember(asm, view),
    }
    elsewhere
}

/// Goes to the code of the entry at B, and keeps it as one of the latest jumps.
fn remember(asm: &mut Asm, view: View) {
    asm.load(A, Mem::indexed(host::RSP, B, 0, at::JUMP_CODE));
    asm.store(rsp(at::TARGET), A);
    asm.load(A, Mem::indexed(host::RSP, B, 0, at::JUMP_LINEAR));
    asm.movzx_byte(B, A);
    asm.store(Mem::indexed(host::RSP, B, 3, at::latest_linear(view)), A);
    asm.load(A, rsp(at::TARGET));
    asm.store(Mem::indexed(host::RSP, B, 3, at::latest_code(view)), A);
    asm.jmp_reg(A);
}

impl Stubs {
    /// Assembles the fixed code at the start of the cache.
    pub fn install(cache: &mut CodeCache, helpers: Helpers, avx: bool) -> Result<Stubs, Error> {
        let mut asm = Asm::new(cache.cursor());
        let mut stubs = Stubs { simd_load: asm.here(), ..Stubs::default() };
        simd_load(&mut asm, avx);
        stubs.x87_load = asm.here();
        super::x87::load(&mut asm);
        let simd_save_at = asm.here();
        simd_save(&mut asm, avx);
        stubs.enter = asm.here();
        enter(&mut asm);
        stubs.exit = asm.here();
        pop_site(&mut asm);
        spill(&mut asm);
        save_simd_if_loaded(&mut asm, simd_save_at);
        leave(&mut asm);
        for (place, target) in
            [(&mut stubs.go, helpers.go), (&mut stubs.miss, helpers.miss), (&mut stubs.run, helpers.run)]
        {
            *place = asm.here();
            helper(&mut asm, target, simd_save_at, stubs.simd_load);
        }
        for view in [View::User, View::Kernel, View::KernelUser] {
            stubs.indirect[view as usize] = asm.here();
            indirect(&mut asm, SITE_INDIRECT, stubs.go, Some(view));
        }
        stubs.far = asm.here();
        indirect(&mut asm, SITE_FAR, stubs.go, None);
        let full = || Error::Unsupported { engine: "soft", what: "a code cache this small".into() };
        cache.append(asm.bytes()).ok_or_else(full)?;
        cache.fix();
        Ok(stubs)
    }

    /// Runs translated code at `code` until it leaves.
    ///
    /// # Safety
    /// `cpu` is in a [`CpuBox`](super::frame::CpuBox), and `code` is the entry of a live unit (or fixed
    /// code) in the cache of these stubs. No reference to the vCPU is used meanwhile.
    pub unsafe fn enter(&self, cpu: *mut Cpu, code: u64) {
        // SAFETY: the code at `enter` was assembled as such a function.
        let function: unsafe extern "sysv64" fn(*mut Cpu, u64) =
            unsafe { std::mem::transmute(std::ptr::with_exposed_provenance::<()>(self.enter as usize)) };
        // SAFETY: the caller's promise.
        unsafe { function(cpu, code) }
    }
}

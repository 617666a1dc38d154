//! How fast the interpreter is: `cargo test --release -p engine-soft -- --ignored --nocapture speed`.

use rustix::time::{ClockId, clock_gettime};

use crate::x86::op::reg;
use crate::x86::testing::{CODE, DATA, Guest};

/// CPU time of this thread: the machine may be busy with other things.
fn seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// Runs `code`, a loop of `body` instructions that counts RCX down and jumps to its end, and returns millions of guest
/// instructions a second.
fn measure(name: &str, code: &[u8], body: u64, rounds: u64) -> f64 {
    let mut guest = Guest::new(64, code);
    guest.cpu.regs[usize::from(reg::RSI)] = DATA;
    guest.cpu.regs[usize::from(reg::RCX)] = 1000;
    guest.run_to(CODE + code.len() as u64);
    guest.cpu.regs[usize::from(crate::x86::op::RIP)] = CODE;
    guest.cpu.regs[usize::from(reg::RCX)] = rounds;
    let start = seconds();
    guest.run_to(CODE + code.len() as u64);
    let speed = (rounds * body) as f64 / (seconds() - start) / 1e6;
    println!("{name}: {speed:.0} million instructions a second");
    speed
}

#[test]
#[ignore = "takes a second, and says something in release builds only"]
fn a_mixed_loop_runs_at_a_hundred_million_instructions_a_second() {
    #[rustfmt::skip]
    let code = [
        0x48, 0x8b, 0x06,             // mov rax, [rsi]
        0x48, 0x01, 0xc8,             // add rax, rcx
        0x48, 0x89, 0x46, 0x08,       // mov [rsi + 8], rax
        0x8d, 0x54, 0x48, 0x10,       // lea edx, [rax + rcx * 2 + 16]
        0xc1, 0xea, 0x03,             // shr edx, 3
        0x53,                         // push rbx
        0x0f, 0xb6, 0x5e, 0x08,       // movzx ebx, byte [rsi + 8]
        0x39, 0xda,                   // cmp edx, ebx
        0x74, 0x02,                   // je +2
        0x31, 0xd3,                   // xor ebx, edx
        0x5b,                         // pop rbx
        0x48, 0xff, 0xc9,             // dec rcx
        0x75, 0xde,                   // jne start
        0xeb, 0x00,                   // jmp end
    ];
    let speed = measure("mixed loop", &code, 13, 10_000_000);
    if !cfg!(debug_assertions) {
        assert!(speed > 100.0);
    }
}

#[test]
#[ignore = "takes a second"]
fn calls_and_returns() {
    #[rustfmt::skip]
    let code = [
        0xe8, 0x07, 0, 0, 0,          // call f
        0x48, 0xff, 0xc9,             // dec rcx
        0x75, 0xf6,                   // jne start
        0xeb, 0x06,                   // jmp end
        0x48, 0xff, 0x06,             // f: inc [rsi]
        0x85, 0xc0,                   // test eax, eax
        0xc3,                         // ret
    ];
    measure("calls", &code, 6, 10_000_000);
}

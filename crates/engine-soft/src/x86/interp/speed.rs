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

#[test]
#[ignore = "takes a second"]
fn vectors_and_x87() {
    #[rustfmt::skip]
    let string = [
        0xf3, 0x0f, 0x6f, 0x06,       // movdqu xmm0, [rsi]
        0x66, 0x0f, 0x74, 0xc1,       // pcmpeqb xmm0, xmm1
        0x66, 0x0f, 0xd7, 0xc0,       // pmovmskb eax, xmm0
        0x66, 0x0f, 0xef, 0xd2,       // pxor xmm2, xmm2
        0x48, 0xff, 0xc9,             // dec rcx
        0x75, 0xeb,                   // jne start
        0xeb, 0x00,                   // jmp end
    ];
    measure("SSE2 string functions", &string, 6, 5_000_000);
    #[rustfmt::skip]
    let avx = [
        0xc5, 0xfe, 0x6f, 0x06,       // vmovdqu ymm0, [rsi]
        0xc5, 0xfd, 0x74, 0xc9,       // vpcmpeqb ymm1, ymm0, ymm1
        0xc5, 0xfd, 0xd7, 0xc1,       // vpmovmskb eax, ymm1
        0xc5, 0xf8, 0x77,             // vzeroupper
        0x48, 0xff, 0xc9,             // dec rcx
        0x75, 0xec,                   // jne start
        0xeb, 0x00,                   // jmp end
    ];
    measure("AVX2 string functions", &avx, 6, 5_000_000);
    #[rustfmt::skip]
    let stubs = [
        0x66, 0x0f, 0xfd, 0xc1,       // paddw xmm0, xmm1
        0x66, 0x0f, 0x38, 0x00, 0xc1, // pshufb xmm0, xmm1
        0xc5, 0xf5, 0xfd, 0xc1,       // vpaddw ymm0, ymm1, ymm1
        0x48, 0xff, 0xc9,             // dec rcx
        0x75, 0xee,                   // jne start
        0xeb, 0x00,                   // jmp end
    ];
    measure("integer vectors by stubs", &stubs, 5, 2_000_000);
    #[rustfmt::skip]
    let floats = [
        0xf2, 0x0f, 0x58, 0xc1,       // addsd xmm0, xmm1
        0x0f, 0x59, 0xc1,             // mulps xmm0, xmm1
        0xf2, 0x48, 0x0f, 0x2a, 0xd1, // cvtsi2sd xmm2, rcx
        0x48, 0xff, 0xc9,             // dec rcx
        0x75, 0xef,                   // jne start
        0xeb, 0x00,                   // jmp end
    ];
    measure("SSE2 floating point by stubs", &floats, 5, 2_000_000);
    #[rustfmt::skip]
    let x87 = [
        0xdd, 0x06,                   // fld qword [rsi]
        0xd8, 0xc0,                   // fadd st, st
        0xdd, 0x1e,                   // fstp qword [rsi]
        0x48, 0xff, 0xc9,             // dec rcx
        0x75, 0xf5,                   // jne start
        0xeb, 0x00,                   // jmp end
    ];
    measure("x87 by stubs", &x87, 5, 500_000);
}

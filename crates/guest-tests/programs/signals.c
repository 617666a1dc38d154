// Signals during system calls, faults that a handler mends, and what a handler must not disturb.
#define _GNU_SOURCE
#include <errno.h>
#include <fenv.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static volatile sig_atomic_t seen;
static char *page;
static sigjmp_buf back;

static void count(int signal)
{
    seen += signal == SIGALRM || signal == SIGUSR1;
}

static void handle(int signal, void (*handler)(int), int flags)
{
    struct sigaction action = { .sa_handler = handler, .sa_flags = flags };
    sigaction(signal, &action, NULL);
}

static void inform(int signal, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = flags | SA_SIGINFO };
    sigaction(signal, &action, NULL);
}

static void alarm_in(int millis, int every)
{
    struct itimerval timer = { .it_value.tv_usec = millis * 1000, .it_interval.tv_usec = every * 1000 };
    setitimer(ITIMER_REAL, &timer, NULL);
}

// A read that waits: interrupted without SA_RESTART, gone on with it.
static void reads(int flags)
{
    int ends[2];
    char byte = 0;
    if (pipe(ends) != 0)
        return;
    handle(SIGALRM, count, flags);
    seen = 0;
    if (fork() == 0) {
        usleep(300000);
        _exit(write(ends[1], "x", 1) != 1);
    }
    alarm_in(50, 0);
    ssize_t got = read(ends[0], &byte, 1);
    printf("read %s: %zd %s, signals %d\n", flags ? "SA_RESTART" : "plain", got, got < 0 ? strerror(errno) : "x", (int)seen);
    wait(NULL);
    close(ends[0]);
    close(ends[1]);
}

static void sleeps(void)
{
    struct timespec time = { 0, 400000000 }, rest = { 0, 0 };
    handle(SIGALRM, count, SA_RESTART);
    alarm_in(50, 0);
    int result = nanosleep(&time, &rest);
    printf("nanosleep: %d %s, rest %d\n", result, strerror(errno), rest.tv_nsec > 0 && rest.tv_nsec < 400000000);
}

static void mend(int signal, siginfo_t *info, void *context)
{
    (void)context;
    seen++;
    if (signal != SIGSEGV || (char *)info->si_addr < page || (char *)info->si_addr >= page + 4096)
        _exit(3);
    mprotect(page, 4096, PROT_READ | PROT_WRITE);
}

// The store that faulted is done again.
static void faults(void)
{
    page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    inform(SIGSEGV, mend, 0);
    seen = 0;
    for (int i = 0; i < 200; i++) {
        mprotect(page, 4096, i % 2 ? PROT_NONE : PROT_READ);
        ((volatile char *)page)[i] = (char)i;
    }
    int sum = 0;
    for (int i = 0; i < 200; i++)
        sum += page[i] == (char)i;
    printf("faults mended %d, bytes %d\n", (int)seen, sum);
}

static void skip(int signal, siginfo_t *info, void *context)
{
    ucontext_t *user = context;
    printf("signal %d, code %d\n", signal, info->si_code);
    if (signal == SIGTRAP)
        return; // the CPU stands behind the INT3
    if (signal == SIGFPE && info->si_code == FPE_INTDIV)
        user->uc_mcontext.gregs[REG_RIP] += 2; // div ecx
    else
        siglongjmp(back, 1);
}

static void exceptions(void)
{
    inform(SIGFPE, skip, SA_NODEFER);
    inform(SIGTRAP, skip, 0);
    inform(SIGILL, skip, SA_NODEFER);
    inform(SIGSEGV, skip, SA_NODEFER);
    inform(SIGBUS, skip, SA_NODEFER);
    fflush(stdout);
    __asm__ volatile("mov $1, %%eax; xor %%edx, %%edx; xor %%ecx, %%ecx; div %%ecx" ::: "eax", "ecx", "edx");
    __asm__ volatile("int3");
    if (!sigsetjmp(back, 1))
        __asm__ volatile("ud2");
    if (!sigsetjmp(back, 1))
        __asm__ volatile("hlt");
    if (!sigsetjmp(back, 1))
        *(volatile char *)0x8000000000000000 = 1; // not canonical
    if (!sigsetjmp(back, 1))
        __asm__ volatile("xor %%eax, %%eax; jmp *%%rax" ::: "rax");
    if (!sigsetjmp(back, 1)) {
        feenableexcept(FE_DIVBYZERO);
        volatile double zero = 0;
        printf("%f\n", 1 / zero);
    }
    fedisableexcept(FE_ALL_EXCEPT);
}

static volatile int steps;
static void step(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)info, (void)context;
    steps++;
}

// The trap flag: one signal for each instruction.
static void single_steps(void)
{
    inform(SIGTRAP, step, 0);
    __asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq; nop; xor %%ecx, %%ecx; add $5, %%ecx\n"
                     "1: dec %%ecx; jnz 1b; pushfq; andq $~0x100, (%%rsp); popfq; nop" ::: "rcx", "cc", "memory");
    printf("single steps %d\n", steps);
}

// A storm of signals on a stack of their own must not change what is computed below it.
__attribute__((noipa)) static uint64_t compute(void)
{
    uint64_t a = 1, b = 0;
    double x = 1.0;
    long double y = 1.0L;
    for (int i = 1; i < 3000000; i++) {
        a = a * 6364136223846793005u + 1442695040888963407u;
        b ^= a >> (i & 31);
        x = x * 1.0000001 + 1e-9 * (double)(i & 7);
        y += 1.0L / i;
    }
    return b ^ (uint64_t)(x * 1e9) ^ (uint64_t)(y * 1e12L);
}

static void storm(void)
{
    static char stack[65536];
    stack_t alternate = { .ss_sp = stack, .ss_size = sizeof stack };
    sigaltstack(&alternate, NULL);
    uint64_t calm = compute();
    handle(SIGALRM, count, SA_ONSTACK | SA_RESTART);
    seen = 0;
    struct itimerval timer = { .it_value.tv_usec = 500, .it_interval.tv_usec = 500 };
    setitimer(ITIMER_REAL, &timer, NULL);
    uint64_t stormy = compute();
    alarm_in(0, 0);
    printf("the same under signals: %d, %s\n", calm == stormy, seen > 3 ? "many came" : "few came");
}

static void *wait_for(void *unused)
{
    (void)unused;
    sigset_t set;
    int got = 0;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigwait(&set, &got);
    return (void *)(intptr_t)got;
}

static void threads(void)
{
    sigset_t set;
    pthread_t thread;
    void *got = NULL;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_create(&thread, NULL, wait_for, NULL);
    pthread_kill(thread, SIGUSR2);
    pthread_join(thread, &got);
    printf("a thread waited for signal %d\n", (int)(intptr_t)got);
}

int main(void)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    reads(0);
    reads(SA_RESTART);
    sleeps();
    faults();
    exceptions();
    single_steps();
    storm();
    threads();
    return 0;
}

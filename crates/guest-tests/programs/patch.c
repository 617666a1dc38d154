// Programs that change their own code, as JITs, tracers and old copy protections do. Prints what each found.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int (*function)(void);

// mov eax, N; ret
static void put(unsigned char *at, int n)
{
    at[0] = 0xb8;
    memcpy(at + 1, &n, 4);
    at[5] = 0xc3;
}

static unsigned char *map(int protection, int fd)
{
    return mmap(NULL, 8192, protection, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
}

static long rewritten(unsigned char *write, unsigned char *run, int times)
{
    long sum = 0;
    for (int i = 0; i < times; i++) {
        put(write, i);
        sum += ((function)run)();
    }
    return sum;
}

// The instruction behind a store, in the same block, is the one that is stored to: the function adds 1 or,
// patched just in front of it, 5.
static long next_instruction(unsigned char *page)
{
    // mov byte [rip + 3], dil; add eax, imm8 (the byte); ret - preceded by xor eax, eax
    static const unsigned char code[] = { 0x31, 0xc0, 0x40, 0x88, 0x3d, 2, 0, 0, 0, 0x83, 0xc0, 1, 0xc3 };
    long sum = 0;
    memcpy(page, code, sizeof code);
    for (int i = 0; i < 1000; i++) {
        sum += ((int (*)(int))page)(i % 100);
    }
    return sum;
}

// Data beside code, in one page, written all the time.
static long data_beside(unsigned char *page)
{
    volatile long *data = (volatile long *)(page + 2048);
    long sum = 0;
    put(page, 3);
    *data = 0;
    for (int i = 0; i < 20000; i++) {
        *data += ((function)page)();
        sum += *data & 1;
    }
    return sum + *data;
}

static unsigned char *shared_page;
static atomic_int turn, stop;

// The other thread calls what this one wrote, in turns. It serializes with CPUID, as it must.
static void *caller(void *sum)
{
    for (int i = 0; i < 3000; i++) {
        while (atomic_load(&turn) != 1)
            ;
        unsigned a = 0, b, c = 0, d;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d)::"memory");
        *(long *)sum += ((function)shared_page)();
        atomic_store(&turn, 0);
    }
    return NULL;
}

static long in_turns(void)
{
    pthread_t thread;
    long sum = 0;
    pthread_create(&thread, NULL, caller, &sum);
    for (int i = 0; i < 3000; i++) {
        while (atomic_load(&turn) != 0)
            ;
        put(shared_page, i);
        atomic_store(&turn, 1);
    }
    pthread_join(thread, NULL);
    return sum;
}

// A jump that is switched to and fro while another thread runs through it: a short jump is two bytes, written
// at once. Whoever comes by sees the one or the other, and in the end the last.
static void *runner(void *wrong)
{
    long bad = 0;
    while (!atomic_load(&stop)) {
        int got = ((function)shared_page)();
        bad += got != 1 && got != 2;
    }
    *(long *)wrong = bad;
    return NULL;
}

static long under_way(void)
{
    // jmp +0 or +6; mov eax, 1; ret; mov eax, 2; ret
    static const unsigned char code[] = { 0xeb, 0, 0xb8, 1, 0, 0, 0, 0xc3, 0xb8, 2, 0, 0, 0, 0xc3 };
    pthread_t thread;
    long wrong = 0;
    memcpy(shared_page, code, sizeof code);
    pthread_create(&thread, NULL, runner, &wrong);
    for (int i = 0; i < 20000; i++) {
        atomic_store((_Atomic unsigned short *)shared_page, i % 2 ? 0x06eb : 0x00eb);
    }
    atomic_store(&stop, 1);
    pthread_join(thread, NULL);
    return wrong * 1000 + ((function)shared_page)();
}

int main(void)
{
    int all = PROT_READ | PROT_WRITE | PROT_EXEC;
    unsigned char *page = map(all, -1);
    int fd = memfd_create("code", 0);
    if (ftruncate(fd, 8192) != 0)
        return 1;
    unsigned char *write = map(PROT_READ | PROT_WRITE, fd), *run = map(PROT_READ | PROT_EXEC, fd);
    shared_page = map(all, -1);
    printf("own page %ld\n", rewritten(page, page, 20000));
    printf("across pages %ld\n", rewritten(page + 4093, page + 4093, 20000));
    printf("other mapping %ld\n", rewritten(write, run, 20000));
    printf("next instruction %ld\n", next_instruction(page));
    printf("data beside code %ld\n", data_beside(page));
    printf("another thread in turns %ld\n", in_turns());
    printf("another thread under way %ld\n", under_way());
    // A page that is mapped anew has new code.
    mprotect(page, 8192, PROT_READ | PROT_EXEC);
    munmap(page, 8192);
    unsigned char *again = mmap(page, 8192, all, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    put(again, 77);
    printf("mapped anew %d\n", ((function)again)());
    return 0;
}

// A 32-bit program without a C library: the old system call, segments of its own, BCD, far calls, frames.
typedef unsigned int u32;
typedef unsigned long long u64;

static int call(int number, int a, int b, int c)
{
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}

static void tell(const char *name, u64 value)
{
    char line[64];
    int len = 0;
    while (*name)
        line[len++] = *name++;
    line[len++] = ' ';
    for (int shift = 60; shift >= 0; shift -= 4)
        line[len++] = "0123456789abcdef"[value >> shift & 15];
    line[len++] = '\n';
    call(4, 1, (int)line, len);
}

static u64 mix(void)
{
    u64 a = 1, b = 0;
    for (u32 i = 1; i < 200000; i++) {
        a = a * 6364136223846793005ull + 1442695040888963407ull;
        u32 low = (u32)a, high = (u32)(a >> 32) % i, rest;
        __asm__("divl %3" : "+a"(low), "=d"(rest) : "1"(high), "r"(i) : "cc");
        b += a >> (i & 31) ^ rest;
        b ^= (u64)low << 7;
    }
    return b;
}

static u32 decimal(void)
{
    u32 sum = 0;
    for (u32 i = 0; i < 4096; i++) {
        u32 a = i * 2654435761u;
        __asm__("add $0x27, %%al; daa; aam; add $3, %%al; aaa; aad; sub $0x13, %%al; das; aas" : "+a"(a)::"cc");
        sum = sum * 31 + (a & 0xffff);
    }
    return sum;
}

// Instructions that 64-bit mode has not got, and flags through the stack.
static u32 old_instructions(void)
{
    static const short bounds[2] = { 3, 9 };
    u32 a = 5, flags;
    __asm__ volatile("pushal; popal; bound %w0, %2; enter $16, $1; leave; push %%es; pop %%es; push %%ds; pop %%ds\n"
                     "into; cmp $6, %0; .byte 0xd6; pushfl; popl %1; arpl %w0, %w0; inc %0; dec %0"
                     : "+a"(a), "=&c"(flags)
                     : "m"(bounds)
                     : "cc", "memory");
    return a ^ (flags & 0x8d5) << 8;
}

static u32 string_work(void)
{
    static unsigned char from[5000], to[5000];
    u32 sum = 0;
    for (u32 i = 0; i < sizeof from; i++)
        from[i] = (unsigned char)(i * 7 + (i >> 5));
    for (u32 n = 1; n < 4000; n += 37) {
        void *s = from + n % 50, *d = to + n % 13;
        u32 c = n;
        __asm__ volatile("rep movsb" : "+S"(s), "+D"(d), "+c"(c)::"memory");
        d = to, c = 4500;
        __asm__ volatile("repne scasb" : "+D"(d), "+c"(c) : "a"(n & 255) : "cc", "memory");
        sum = sum * 33 + c + to[n];
    }
    return sum;
}

struct user_desc {
    u32 entry, base, limit, flags;
};

// A segment in the LDT whose base is a variable's address.
static u32 segment(void)
{
    static u32 cell[4] = { 0x11111111, 0x22222222, 0x33333333, 0x44444444 };
    struct user_desc descriptor = { 0, (u32)cell, 15, 1 | 1 << 6 };
    if (call(123, 1, (int)&descriptor, sizeof descriptor) != 0)
        return 0;
    u32 value;
    __asm__ volatile("push %%fs; mov %1, %%fs; mov %%fs:8, %0; movl $0x55555555, %%fs:4; pop %%fs"
                     : "=&r"(value)
                     : "r"(7)
                     : "memory");
    return value ^ cell[1];
}

static double x87(void)
{
    double x = 1;
    for (int i = 1; i < 100000; i++) {
        __asm__("fldl %0; fsin; fld1; faddp; fsqrt; fstpl %0" : "+m"(x));
        x += 1.0 / i;
    }
    return x;
}

void _start(void)
{
    tell("mix", mix());
    tell("decimal", decimal());
    tell("old", old_instructions());
    tell("strings", string_work());
    tell("segment", segment());
    double x = x87();
    tell("x87", *(u64 *)&x);
    call(1, 0, 0, 0);
}

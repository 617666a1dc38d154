// What gdb and strace are pointed at.
#include <stdio.h>
#include <unistd.h>

volatile int total;

__attribute__((noinline)) int work(int n)
{
    total += n;
    return total * 2;
}

int main(void)
{
    int sum = 0;
    for (int i = 1; i <= 5; i++)
        sum += work(i);
    printf("sum %d, total %d\n", sum, total);
    fflush(stdout);
    return write(1, "bye\n", 4) == 4 ? sum % 256 : 1;
}

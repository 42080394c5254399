/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Range mode: a VMM with a balloon device of its own discards what its guest gave, many ranges in a
 * call.
 *
 *     cc range.c -laerostat && ./a.out
 */
#include "guest.h"

#include <aerostat.h>
#include <errno.h>

#define RAM_BYTES ((size_t)4 << 20)
#define RAM_GPA ((uint64_t)1 << 32)

static struct aerostat_range pages(uint64_t first, uint64_t count)
{
    struct aerostat_range range;
    range.gpa = RAM_GPA + first * PAGE_BYTES;
    range.len_bytes = count * PAGE_BYTES;
    return range;
}

int main(void)
{
    struct aerostat_runtime_config config = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
    struct aerostat_runtime *runtime = NULL;
    struct aerostat_memory *memory = NULL;
    struct aerostat_range ranges[4];
    struct guest guest;
    int results[4];

    memset(&guest, 0, sizeof(guest));
    guest.ram_bytes = RAM_BYTES;
    guest.ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(guest.ram != MAP_FAILED);
    memset(guest.ram, 0x5a, RAM_BYTES);
    region.gpa = RAM_GPA;
    region.hva = guest.ram;
    region.len_bytes = RAM_BYTES;
    OK(aerostat_runtime_new(&config, &runtime));
    OK(aerostat_memory_new(&region, 1, &memory));

    /* In any order, overlapping, and one that is partly not the guest's. */
    ranges[0] = pages(16, 8);
    ranges[1] = pages(0, 16);
    ranges[2] = pages(RAM_BYTES / PAGE_BYTES - 1, 2);
    ranges[3] = pages(20, 12);
    CHECK(aerostat_runtime_discard(runtime, memory, ranges, 4, results) == 3);
    CHECK(results[0] == 0 && results[1] == 0 && results[2] == -EFAULT && results[3] == 0);
    for (uint32_t page = 0; page < RAM_BYTES / PAGE_BYTES; page++) {
        CHECK(page_is_resident(&guest, page) == (page >= 32));
    }
    /* The guest takes a page back by using it. */
    CHECK(guest.ram[0] == 0 && guest.ram[32 * PAGE_BYTES] == 0x5a);

    /* Who wants no answers asks for none. */
    CHECK(aerostat_runtime_discard(runtime, memory, ranges, 1, NULL) == 1);
    CHECK(aerostat_runtime_discard(runtime, memory, NULL, 0, NULL) == 0);

    aerostat_memory_destroy(&memory);
    aerostat_runtime_destroy(&runtime);
    CHECK(munmap(guest.ram, RAM_BYTES) == 0);
    puts("32 pages discarded, one range refused");
    return 0;
}

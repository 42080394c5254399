/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * VMware's balloon: a VMM that emulates port 0x5670 passes the guest's registers on. The guest here
 * does what Linux's vmw_balloon does: START, GET_TARGET, LOCK, UNLOCK.
 *
 *     cc vmware.c -laerostat && ./a.out
 */
#include "guest.h"

#include <aerostat.h>

#define RAM_BYTES ((size_t)4 << 20)

enum { START, GET_TARGET, LOCK, UNLOCK };

/* A virtual CPU, as far as the port sees it. */
struct registers {
    uint64_t rax, rbx, rcx, rdx, rsi;
};

/* What a VMM does for `in eax, dx` of 32 bits, with 0x5670 in DX. */
static void port_in(struct aerostat_device *device, struct registers *guest)
{
    uint64_t command = (uint32_t)guest->rcx, result;
    uint32_t status;
    if ((uint32_t)guest->rax != AEROSTAT_VMWARE_MAGIC) {
        return;
    }
    OK(aerostat_vmware_command(device, command, guest->rbx, guest->rsi, &status, &result));
    guest->rax = status;
    if (command == START) {
        guest->rcx = result;
    } else {
        guest->rbx = result;
    }
}

/* The guest's side. */
static uint32_t say(struct aerostat_device *device, uint64_t command, uint64_t argument,
                    uint64_t *target)
{
    struct registers cpu = {AEROSTAT_VMWARE_MAGIC, argument, command, AEROSTAT_VMWARE_PORT, 1};
    port_in(device, &cpu);
    *target = cpu.rbx;
    return (uint32_t)cpu.rax;
}

int main(void)
{
    struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
    struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
    struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;
    struct aerostat_runtime *runtime = NULL;
    struct aerostat_device *device = NULL;
    struct aerostat_memory *memory = NULL;
    unsigned char *ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t target, page, first = 256;
    CHECK(ram != MAP_FAILED);
    memset(ram, 0x5a, RAM_BYTES);
    OK(aerostat_runtime_new(&threads, &runtime));
    offer.kind = AEROSTAT_KIND_VMWARE;
    OK(aerostat_device_new(runtime, &offer, &device));
    region.hva = ram;
    region.len_bytes = RAM_BYTES;
    OK(aerostat_memory_new(&region, 1, &memory));
    OK(aerostat_device_set_memory(device, memory));
    aerostat_memory_destroy(&memory);
    OK(aerostat_device_activate(device));

    /* The host wants 1 MiB; the guest polls, and gives page after page. */
    OK(aerostat_device_set_target(device, (uint64_t)1 << 20));
    CHECK(say(device, START, 2, &target) == 0);
    CHECK(say(device, GET_TARGET, RAM_BYTES / PAGE_BYTES, &target) == 0);
    CHECK(target == 256);
    for (page = first; page < first + 256; page++) {
        CHECK(say(device, LOCK, page, &target) == 0);
    }
    /* One more is not needed, and stays as it is. */
    CHECK(say(device, LOCK, page, &target) == 6);
    CHECK(ram[page * PAGE_BYTES] == 0x5a);
    CHECK(ram[first * PAGE_BYTES] == 0);
    OK(aerostat_device_query(device, &balloon));
    CHECK(balloon.ballooned_bytes == (uint64_t)1 << 20);

    /* It takes half of them back. */
    OK(aerostat_device_set_target(device, (uint64_t)1 << 19));
    CHECK(say(device, GET_TARGET, RAM_BYTES / PAGE_BYTES, &target) == 0);
    for (page = first; page < first + target; page++) {
        CHECK(say(device, UNLOCK, page, &target) == 0);
    }
    OK(aerostat_device_query(device, &balloon));
    CHECK(balloon.actual_bytes == (uint64_t)1 << 19);
    printf("the guest gave %llu KiB\n", (unsigned long long)(balloon.actual_bytes >> 10));
    aerostat_device_destroy(&device);
    aerostat_runtime_destroy(&runtime);
    munmap(ram, RAM_BYTES);
    return 0;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What a VMM sees of a guest that destroys its own ring: the device needs a reset, the library says
 * why in the log, another guest on the same threads notices nothing, and after a reset all is well.
 *
 *     cc broken_ring.c -laerostat && ./a.out
 */
#include "guest.h"

#include <aerostat.h>

#define RAM_BYTES ((size_t)1 << 20)

enum { GOOD, BAD, GUESTS };

/* A virtual machine with an inflate queue. */
struct vm {
    struct guest guest;
    struct ring inflate;
    uint64_t buffer;
    int config_fd;
    struct aerostat_device *device;
};

/* What the library logged; several threads may call at a time. */
static void count_warnings(void *user, int level, const char *message)
{
    CHECK(message[0] != 0);
    if (level <= AEROSTAT_LOG_WARN) {
        __atomic_fetch_add((int *)user, 1, __ATOMIC_RELAXED);
    }
}

/* The driver starts with an empty ring. */
static void start(struct vm *vm)
{
    struct aerostat_queue_config config = AEROSTAT_QUEUE_CONFIG_INIT;
    vm->guest.unused = 0;
    ring_new(&vm->inflate, &vm->guest, 64);
    vm->buffer = guest_alloc(&vm->guest, PAGE_BYTES, PAGE_BYTES);
    config.queue_size = vm->inflate.size;
    config.kick_fd = vm->inflate.kick_fd;
    config.call_fd = vm->inflate.call_fd;
    config.desc_gpa = vm->inflate.desc_gpa;
    config.avail_gpa = vm->inflate.avail_gpa;
    config.used_gpa = vm->inflate.used_gpa;
    OK(aerostat_device_set_features(vm->device, AEROSTAT_FEATURE_VERSION_1));
    OK(aerostat_device_start_queue(vm->device, 0, &config));
    OK(aerostat_device_activate(vm->device));
}

static void vm_new(struct vm *vm, struct aerostat_runtime *runtime)
{
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
    struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
    struct aerostat_memory *memory = NULL;
    vm->guest.ram_bytes = RAM_BYTES;
    vm->guest.ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(vm->guest.ram != MAP_FAILED);
    vm->config_fd = new_eventfd();
    offer.config_fd = vm->config_fd;
    OK(aerostat_device_new(runtime, &offer, &vm->device));
    region.hva = vm->guest.ram;
    region.len_bytes = RAM_BYTES;
    OK(aerostat_memory_new(&region, 1, &memory));
    OK(aerostat_device_set_memory(vm->device, memory));
    aerostat_memory_destroy(&memory);
    start(vm);
}

static void vm_destroy(struct vm *vm)
{
    aerostat_device_destroy(&vm->device);
    ring_close(&vm->inflate);
    close(vm->config_fd);
    munmap(vm->guest.ram, vm->guest.ram_bytes);
}

/* The guest gives one page. */
static void inflate(struct vm *vm, uint32_t pfn)
{
    vm->guest.ram[(size_t)pfn * PAGE_BYTES] = 1;
    put_pfn(vm->guest.ram + vm->buffer, 0, pfn);
    ring_add(&vm->inflate, vm->buffer, sizeof(pfn), 0);
    ring_wait(&vm->inflate);
    CHECK(!page_is_resident(&vm->guest, pfn));
}

int main(void)
{
    struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_runtime *runtime = NULL;
    struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
    struct vm vms[GUESTS];
    int warnings = 0;

    threads.workers_per_node = 1;
    OK(aerostat_runtime_new(&threads, &runtime));
    OK(aerostat_set_log(count_warnings, &warnings, AEROSTAT_LOG_INFO));
    for (int i = 0; i < GUESTS; i++) {
        vm_new(&vms[i], runtime);
        inflate(&vms[i], 100);
    }

    /* More entries than the ring has cannot be available. */
    vms[BAD].inflate.avail[1] = htole16(40000);
    ring_add(&vms[BAD].inflate, vms[BAD].buffer, 4, 0);
    CHECK(wait_eventfd(vms[BAD].config_fd));
    CHECK(aerostat_device_state(vms[BAD].device) == AEROSTAT_STATE_NEEDS_RESET);

    /* The other guest is served as before. */
    CHECK(aerostat_device_state(vms[GOOD].device) == AEROSTAT_STATE_ACTIVE);
    inflate(&vms[GOOD], 101);

    /* Why it broke is in the books, and in the log. */
    OK(aerostat_device_counters(vms[BAD].device, &counters));
    CHECK(counters.broken_rings == 1);
    CHECK(__atomic_load_n(&warnings, __ATOMIC_RELAXED) >= 1);

    /* The driver resets the device and starts again. */
    OK(aerostat_device_reset(vms[BAD].device));
    ring_close(&vms[BAD].inflate);
    start(&vms[BAD]);
    inflate(&vms[BAD], 102);
    inflate(&vms[GOOD], 102);

    for (int i = 0; i < GUESTS; i++) {
        vm_destroy(&vms[i]);
    }
    OK(aerostat_set_log(NULL, NULL, AEROSTAT_LOG_OFF));
    aerostat_runtime_destroy(&runtime);
    printf("a ring broke, with %d warnings, and was repaired\n", warnings);
    return 0;
}

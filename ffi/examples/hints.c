/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A migration asks the guest which pages are free, and leaves them out. The VMM pops the guest's
 * buffers itself, as in element.c.
 *
 *     cc hints.c -laerostat && ./a.out
 */
#include "guest.h"

#include <aerostat.h>
#include <errno.h>

#define RAM_BYTES ((size_t)4 << 20)
#define FREE_BYTES ((size_t)1 << 20)

/* Queues are numbered densely: this driver has no statistics. */
enum { INFLATE, DEFLATE, HINTS, QUEUES };

/* A VM, as far as it matters here. */
struct vm {
    struct aerostat_device *device;
    unsigned char *ram;
    int config_fd, completion_fd;
};

static void start(struct vm *vm, struct aerostat_runtime *runtime)
{
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
    struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
    struct aerostat_queue_config queue = AEROSTAT_QUEUE_CONFIG_INIT;
    struct aerostat_memory *memory = NULL;
    offer.features = AEROSTAT_FEATURE_VERSION_1 | AEROSTAT_FEATURE_FREE_PAGE_HINT;
    offer.config_fd = vm->config_fd = new_eventfd();
    offer.completion_fd = vm->completion_fd = new_eventfd();
    OK(aerostat_device_new(runtime, &offer, &vm->device));
    vm->ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(vm->ram != MAP_FAILED);
    memset(vm->ram, 0x5a, RAM_BYTES);
    region.gpa = (uint64_t)1 << 32;
    region.hva = vm->ram;
    region.len_bytes = RAM_BYTES;
    OK(aerostat_memory_new(&region, 1, &memory));
    OK(aerostat_device_set_memory(vm->device, memory));
    aerostat_memory_destroy(&memory);
    OK(aerostat_device_set_features(vm->device, offer.features));
    queue.flags = AEROSTAT_QUEUE_ELEMENT;
    for (uint32_t i = 0; i < QUEUES; i++) {
        OK(aerostat_device_start_queue(vm->device, i, &queue));
    }
    OK(aerostat_device_activate(vm->device));
}

/* The guest's buffer on the hint queue: an id to read, or free memory. */
static void send(struct vm *vm, void *base, size_t len, int writable)
{
    struct aerostat_element element;
    struct aerostat_completion done;
    struct iovec part;
    int count;
    memset(&element, 0, sizeof(element));
    part.iov_base = base;
    part.iov_len = len;
    element.queue = HINTS;
    if (writable) {
        element.writable = &part;
        element.n_writable = 1;
    } else {
        element.readable = &part;
        element.n_readable = 1;
    }
    OK(aerostat_device_submit(vm->device, &element, 1));
    while ((count = aerostat_device_completions(vm->device, &done, 1)) == 0) {
        CHECK(wait_eventfd(vm->completion_fd));
    }
    CHECK(count == 1 && done.flags == 0);
}

/* free_page_hint_cmd_id of the configuration space. */
static uint32_t command(struct vm *vm)
{
    uint32_t id = 0;
    CHECK(wait_eventfd(vm->config_fd));
    OK(aerostat_device_read_config(vm->device, 8, &id, sizeof(id)));
    return le32toh(id);
}

int main(void)
{
    struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
    struct aerostat_runtime *runtime = NULL;
    struct aerostat_range ranges[4];
    uint32_t id, state = 99;
    struct vm vm;

    OK(aerostat_runtime_new(&threads, &runtime));
    memset(&vm, 0, sizeof(vm));
    start(&vm, runtime);
    CHECK(aerostat_device_take_hints(vm.device, ranges, 4, &state) == 0);
    CHECK(state == AEROSTAT_HINT_IDLE);

    /* The VMM begins to track writes, and asks. */
    CHECK(aerostat_device_start_hints(vm.device, 0) == -EINVAL);
    OK(aerostat_device_start_hints(vm.device, 60000));
    CHECK(aerostat_device_start_hints(vm.device, 60000) == -EALREADY);
    id = htole32(command(&vm));
    CHECK(le32toh(id) >= 2);

    /* The guest answers: the id, then what is free. */
    send(&vm, &id, sizeof(id), 0);
    send(&vm, vm.ram + FREE_BYTES, FREE_BYTES, 1);
    CHECK(aerostat_device_take_hints(vm.device, ranges, 4, &state) == 1);
    CHECK(ranges[0].gpa == ((uint64_t)1 << 32) + FREE_BYTES && ranges[0].len_bytes == FREE_BYTES);
    CHECK(state == AEROSTAT_HINT_RUNNING);
    CHECK(vm.ram[FREE_BYTES] == 0x5a); /* hints discard nothing */

    /* The guest has no more. */
    id = 0;
    send(&vm, &id, sizeof(id), 0);
    CHECK(aerostat_device_take_hints(vm.device, NULL, 0, &state) == 0);
    CHECK(state == AEROSTAT_HINT_COMPLETE);

    /* The migration is done; the guest may have its pages back. */
    OK(aerostat_device_finish_hints(vm.device));
    CHECK(command(&vm) == 1);
    CHECK(aerostat_device_take_hints(vm.device, ranges, 4, NULL) == 0);
    OK(aerostat_device_counters(vm.device, &counters));
    CHECK(counters.hint_chains == 3 && counters.chain_errors == 0);
    printf("%llu buffers of hints\n", (unsigned long long)counters.hint_chains);

    aerostat_device_destroy(&vm.device);
    aerostat_runtime_destroy(&runtime);
    munmap(vm.ram, RAM_BYTES);
    close(vm.config_fd);
    close(vm.completion_fd);
    return 0;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * One device, used by many threads at once: a main loop that serves the guest, a monitor that stops and
 * continues the VM, a device that comes and goes and forbids discarding, a memory table that is
 * replaced, and statistics. Each buffer still completes exactly once, and the books balance whenever
 * they are looked at.
 *
 *     cc threads.c -laerostat -pthread && ./a.out
 */
#include "guest.h"

#include <aerostat.h>
#include <errno.h>
#include <pthread.h>

#define RAM_BYTES ((size_t)8 << 20)
#define ROUNDS 300u
#define PFNS 64u

enum { INFLATE, DEFLATE, QUEUES };

/* What all threads share. */
struct shared {
    struct aerostat_device *device;
    struct aerostat_memory *memory;
    unsigned char *ram;
    int completion_fd;
    int finished;
};

static int finished(const struct shared *shared)
{
    return __atomic_load_n(&shared->finished, __ATOMIC_ACQUIRE);
}

/* The monitor: stop, cont. */
static void *stop_and_continue(void *argument)
{
    struct shared *shared = (struct shared *)argument;
    while (!finished(shared)) {
        OK(aerostat_device_pause(shared->device));
        CHECK(aerostat_device_state(shared->device) == AEROSTAT_STATE_PAUSED);
        OK(aerostat_device_resume(shared->device));
        usleep(100);
    }
    return NULL;
}

/* Device assignment that comes and goes. */
static void *forbid_and_allow(void *argument)
{
    struct shared *shared = (struct shared *)argument;
    while (!finished(shared)) {
        OK(aerostat_device_inhibit(shared->device));
        OK(aerostat_device_inhibit(shared->device));
        usleep(100);
        OK(aerostat_device_uninhibit(shared->device));
        OK(aerostat_device_uninhibit(shared->device));
        usleep(100);
    }
    return NULL;
}

/* A memory listener. */
static void *replace_memory(void *argument)
{
    struct shared *shared = (struct shared *)argument;
    while (!finished(shared)) {
        OK(aerostat_device_set_memory(shared->device, shared->memory));
        usleep(100);
    }
    return NULL;
}

static uint64_t skipped(const struct aerostat_flow *flow)
{
    return flow->skipped_inhibited_bytes + flow->skipped_out_of_range_bytes +
           flow->skipped_duplicate_bytes + flow->skipped_pinned_bytes +
           flow->skipped_partial_bytes + flow->skipped_failed_bytes;
}

/* Invariant I4. */
static int balances(const struct aerostat_flow *flow)
{
    return flow->requested_bytes + flow->reopened_bytes ==
           flow->discarded_bytes + flow->pending_bytes + flow->held_bytes + flow->withdrawn_bytes +
               skipped(flow);
}

/* Monitoring; also mistakes, whose messages are each thread's own. */
static void *look(void *argument)
{
    struct shared *shared = (struct shared *)argument;
    while (!finished(shared)) {
        struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
        struct aerostat_balloon balloon = AEROSTAT_BALLOON_INIT;
        uint32_t space[4];
        OK(aerostat_device_counters(shared->device, &counters));
        CHECK(balances(&counters.balloon));
        OK(aerostat_device_query(shared->device, &balloon));
        CHECK(balloon.ballooned_bytes <= PFNS * PAGE_BYTES);
        OK(aerostat_device_set_target(shared->device, PFNS * PAGE_BYTES));
        OK(aerostat_device_read_config(shared->device, 0, space, sizeof(space)));
        CHECK(le32toh(space[0]) == PFNS || le32toh(space[0]) == 0);
        CHECK(aerostat_device_activate(NULL) == -EFAULT);
        CHECK(strcmp(aerostat_last_error(), "device is NULL") == 0);
        usleep(100);
    }
    return NULL;
}

/* Submits one buffer, and again as long as the VM is stopped. */
static void submit(struct shared *shared, uint32_t queue, uint64_t token, struct iovec *part)
{
    struct aerostat_element element;
    int result;
    memset(&element, 0, sizeof(element));
    element.token = token;
    element.queue = queue;
    element.readable = part;
    element.n_readable = 1;
    do {
        result = aerostat_device_submit(shared->device, &element, 1);
    } while (result == -EBUSY);
    OK(result);
}

/* Waits for the one completion that is due. */
static void collect(struct shared *shared, uint64_t token)
{
    struct aerostat_completion done[2];
    int count;
    while ((count = aerostat_device_completions(shared->device, done, 2)) == 0) {
        CHECK(wait_eventfd(shared->completion_fd));
    }
    CHECK(count == 1);
    CHECK(done[0].token == token && done[0].flags == 0 && done[0].written_bytes == 0);
}

/* The main loop: the guest gives pages and takes them back, again and again. */
static void serve_guest(struct shared *shared)
{
    unsigned char buffer[PFNS * sizeof(uint32_t)];
    struct iovec part;
    part.iov_base = buffer;
    part.iov_len = sizeof(buffer);
    for (uint32_t i = 0; i < PFNS; i++) {
        put_pfn(buffer, i, 100 + i);
    }
    for (uint32_t round = 0; round < ROUNDS; round++) {
        submit(shared, INFLATE, round, &part);
        collect(shared, round);
        submit(shared, DEFLATE, ~(uint64_t)round, &part);
        collect(shared, ~(uint64_t)round);
        memset(shared->ram + (size_t)100 * PAGE_BYTES, (int)round & 0xff, PFNS * PAGE_BYTES);
    }
}

static void start(struct shared *shared, struct aerostat_runtime *runtime)
{
    struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
    struct aerostat_memory_region region = AEROSTAT_MEMORY_REGION_INIT;
    struct aerostat_queue_config queue = AEROSTAT_QUEUE_CONFIG_INIT;
    shared->completion_fd = new_eventfd();
    offer.completion_fd = shared->completion_fd;
    OK(aerostat_device_new(runtime, &offer, &shared->device));
    shared->ram = (unsigned char *)mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(shared->ram != MAP_FAILED);
    region.hva = shared->ram;
    region.len_bytes = RAM_BYTES;
    OK(aerostat_memory_new(&region, 1, &shared->memory));
    OK(aerostat_device_set_memory(shared->device, shared->memory));
    OK(aerostat_device_set_features(shared->device, AEROSTAT_FEATURE_VERSION_1));
    queue.flags = AEROSTAT_QUEUE_ELEMENT;
    for (uint32_t i = 0; i < QUEUES; i++) {
        OK(aerostat_device_start_queue(shared->device, i, &queue));
    }
    OK(aerostat_device_activate(shared->device));
}

int main(void)
{
    void *(*const work[])(void *) = {stop_and_continue, forbid_and_allow, replace_memory, look, look};
    enum { THREADS = sizeof(work) / sizeof(work[0]) };
    struct aerostat_runtime_config config = AEROSTAT_RUNTIME_CONFIG_INIT;
    struct aerostat_counters counters = AEROSTAT_COUNTERS_INIT;
    struct aerostat_runtime *runtime = NULL;
    pthread_t threads[THREADS];
    struct shared shared;

    memset(&shared, 0, sizeof(shared));
    config.workers_per_node = 2;
    OK(aerostat_runtime_new(&config, &runtime));
    start(&shared, runtime);
    /* The device keeps its threads. */
    aerostat_runtime_destroy(&runtime);

    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, work[i], &shared) == 0);
    }
    serve_guest(&shared);
    __atomic_store_n(&shared.finished, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }

    OK(aerostat_device_counters(shared.device, &counters));
    CHECK(counters.inflate_chains == ROUNDS && counters.deflate_chains == ROUNDS);
    CHECK(counters.balloon.requested_bytes == (uint64_t)ROUNDS * PFNS * PAGE_BYTES);
    CHECK(counters.returned_bytes == counters.balloon.requested_bytes);
    CHECK(balances(&counters.balloon));
    CHECK(counters.balloon.discarded_bytes + counters.balloon.skipped_inhibited_bytes ==
          counters.balloon.requested_bytes);
    printf("%llu bytes discarded, %llu kept while it was forbidden\n",
           (unsigned long long)counters.balloon.discarded_bytes,
           (unsigned long long)counters.balloon.skipped_inhibited_bytes);

    aerostat_device_destroy(&shared.device);
    aerostat_memory_destroy(&shared.memory);
    munmap(shared.ram, RAM_BYTES);
    close(shared.completion_fd);
    return 0;
}
